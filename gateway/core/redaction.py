"""Takes out of a recording what must not leave the house: in its question, and in the text that its stream comes to."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from gateway.core.apis.base import REPEATED, numbered
from gateway.core.jsonl import exactly

Redact = Callable[[dict[str, Any]], dict[str, Any] | None]
"""Takes a line's object and gives the one that is to be written; None for none."""


class Rule(NamedTuple):
    """What to look for, and what to write instead: a template, as `re.sub` takes it."""

    pattern: "re.Pattern[str]"
    instead: str


class _Place(NamedTuple):
    """Where a text stands, so that another one can be put there."""

    inside: Any
    name: Any

    @property
    def text(self) -> str:
        found: str = self.inside[self.name]
        return found

    def put(self, text: str) -> None:
        self.inside[self.name] = text


def by_rules(rules: Sequence[Rule]) -> Redact:
    """Applies the rules, one after the other, to the request, to the tags, and to each text of the answer as a whole: a
    stream may cut anywhere what a pattern looks for. Where the text of a choice has changed its ``logprobs`` go, since
    they repeat it.
    """

    def redact(line: dict[str, Any]) -> dict[str, Any]:
        asked, answer, meta = line["request"], line["answer"], line["meta"]
        for texts in ({"body": asked["body"]}, {"tags": meta["tags"]}):
            for _, place in _texts(texts, ()):
                _apply(rules, [place])
        asked["canonical"] = None  # it follows from the body
        if "body" in answer:
            [answer["body"]] = _redacted(rules, [answer["body"]])
        if "frames" in answer:
            answer["frames"] = _redacted(rules, answer["frames"])
        else:
            line["timing"].pop("at_us", None)  # a shorter text may have fewer frames
        return line

    return redact


def _redacted(rules: Sequence[Rule], parts: Sequence[Any]) -> list[Any]:
    """The parts of an answer; those of which nothing has changed as they were."""
    parsed = [orjson.loads(exactly(part)) for part in parts]
    texts: dict[Any, list[_Place]] = {}
    for number, part in enumerate(parsed):
        for path, place in _texts(part, ()):
            # What goes on from chunk to chunk is one text; all else stands for itself.
            goes_on = path[0] == "choices" and path[-1] not in REPEATED and "logprobs" not in path
            texts.setdefault(path if goes_on else (number, path), []).append(place)
    changed = {path[1] for path, places in texts.items() if _apply(rules, places) and path[0] == "choices"}
    for part in parsed:
        for index, choice in numbered(part.get("choices")) if isinstance(part, dict) else ():
            if index in changed and choice.get("logprobs"):
                choice["logprobs"] = None
    # What is not changed keeps its bytes, if it is a string because they are unusual.
    return [new if orjson.loads(exactly(old)) != new else old for old, new in zip(parts, parsed, strict=True)]


def _texts(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], _Place]]:
    """Every text in a JSON value with where it is; items that name an ``index`` are known by it."""
    if isinstance(value, dict):
        items: Iterator[tuple[Any, Any, Any]] = ((name, name, item) for name, item in value.items())
    elif isinstance(value, list):
        items = ((_index(item, place), place, item) for place, item in enumerate(value))
    else:
        return
    for step, name, item in items:
        if isinstance(item, str):
            if (*path, step) != ("body", "model"):
                yield (*path, step), _Place(value, name)
        else:
            yield from _texts(item, (*path, step))


def _index(item: Any, place: int) -> int:
    index = item.get("index") if isinstance(item, dict) else None
    return index if isinstance(index, int) else place


def _apply(rules: Sequence[Rule], places: Sequence[_Place]) -> bool:
    """Applies the rules to a text that stands in several places; tells whether it has changed."""
    changed = False
    for rule in rules:
        pieces = [place.text for place in places]
        matches = [match for match in rule.pattern.finditer("".join(pieces)) if match[0]]
        if matches:
            changed = True
            for place, text in zip(places, _replaced(pieces, matches, rule.instead), strict=True):
                place.put(text)
    return changed


def _replaced(pieces: Sequence[str], matches: "Sequence[re.Match[str]]", instead: str) -> list[str]:
    """What is put in the place of a match stands where that began."""
    found, start = [], 0
    for piece in pieces:
        end, at, text = start + len(piece), start, ""
        for match in matches:
            if match.end() <= at or match.start() >= end:
                continue
            if match.start() >= start:
                text += piece[at - start : match.start() - start] + match.expand(instead)
            at = min(match.end(), end)
        found.append(text + piece[at - start :])
        start = end
    return found

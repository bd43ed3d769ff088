"""What the gateway must know of an API to key, judge, assemble and split its answers."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

Json = dict[str, Any]

# Delivery, identity, billing and bookkeeping: nothing here changes the answer (DESIGN 5).
IGNORED = frozenset({
    "stream", "stream_options", "user", "safety_identifier", "metadata", "store",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "service_tier",
})  # fmt: skip
IGNORED_IN_MESSAGES = "prompt_cache_breakpoint"

# Beyond this a float no longer names one integer.
_EXACT = 2.0**53

# Text is cut where a tokenizer would: white space stays with the word that follows it.
_TOKEN_LIKE = re.compile(r"\s*\S{1,12}|\s+")

_IN_EVERY_CHUNK = ("id", "object", "created", "model", "system_fingerprint", "service_tier")

# In a fragment these say the same thing again; any other string is the next piece of a text.
REPEATED = frozenset({"role", "id", "type", "name", "index", "object", "format", "signature", "call_id", "expires_at"})


class RequestProblem(ValueError):
    """A member of the request has a wrong type; ``param`` names it."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class Assembler(Protocol):
    """Builds the unstreamed answer from the chunks of a streamed one."""

    def add(self, chunk: Json) -> None:
        """Takes ``chunk`` over: its parts become parts of the answer, and grow there."""
        ...

    def body(self) -> Json: ...


@dataclass(frozen=True, slots=True)
class Api:
    """One API: its path below ``/v1``, and the pure functions that know its shapes."""

    name: str
    path: str
    id_prefix: str
    validate: Callable[[Json], None]
    """Raises `RequestProblem` where a member that the gateway reads has a wrong type."""
    canonical: Callable[[Json], Json]
    """The request with ignored members left out, sorted and normalised (DESIGN 5)."""
    choices: Callable[[Json], int]
    """How many choices the request asks for."""
    limits_tokens: Callable[[Json], bool]
    """Whether the request itself sets the token limit, so that ``length`` is what was asked for."""
    cannot_stream: Callable[[Json], bool]
    """Whether streaming would fail, or lose, what works unstreamed (DESIGN 2.3)."""
    assembler: Callable[[], Assembler]
    split: Callable[[Json], list[Json]]
    """An unstreamed answer as token-like chunks, such that assembling them gives it back."""


_NOT_OF_ENVELOPE = frozenset({"choices", "object", "obfuscation"})
_FIRST_HOLDS = frozenset({"id", "created", "model"})


@dataclass(slots=True)
class Envelope:
    """The members of an answer that stand beside its choices. The first id, model and time hold; else the last value."""

    object: str
    members: Json = field(default_factory=dict)

    def add(self, chunk: Json) -> None:
        members = self.members
        for name, value in chunk.items():
            if name in _NOT_OF_ENVELOPE:
                continue
            if name not in _FIRST_HOLDS:
                keep_last(members, name, value)
            elif not members.get(name):
                members[name] = value

    def body(self, choices: list[Json]) -> Json:
        members = dict(self.members)
        head = {name: members.pop(name) for name in ("id",) if name in members}
        head["object"] = self.object
        head |= {name: members.pop(name) for name in ("created", "model") if name in members}
        tail = {name: members.pop(name) for name in ("usage",) if members.get(name) is not None}
        members.pop("usage", None)
        return {**head, "choices": choices, **tail, **members}


def numbered(items: Any) -> Iterator[tuple[int, Json]]:
    """The objects of a list, each with its ``index``, or its place where it names none; nothing of what is no list."""
    for place, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, dict):
            index = item.get("index")
            yield (index if isinstance(index, int) else place), item


def keep_last(into: Json, name: str, value: Any) -> None:
    """The last value that says something holds; one that never does is kept as it came."""
    if name not in into or value not in (None, ""):
        into[name] = value


def merge(into: Json, fragment: Json) -> None:
    """Adds a delta's members to what came before: text grows, lists grow or merge by ``index``, else the last holds.

    ``fragment`` is taken over: its lists and objects may become parts of ``into``.
    """
    for name, value in fragment.items():
        old = into.get(name)
        if old is None:
            into[name] = value
        elif isinstance(old, str) and isinstance(value, str) and name not in REPEATED:
            # CPython extends a string in place while nothing else refers to it: without this, n pieces copy n² bytes.
            into[name] = None
            old += value
            into[name] = old
        elif isinstance(old, dict) and isinstance(value, dict):
            merge(old, value)
        elif isinstance(old, list) and isinstance(value, list):
            _merge_lists(old, value)
        elif value is not None and not (value == "" and name in REPEATED):
            into[name] = value


def _merge_lists(into: list[Any], items: list[Any]) -> None:
    for item in items:
        old = _with_index(into, item["index"]) if isinstance(item, dict) and isinstance(item.get("index"), int) else None
        if old is None:
            into.append(item)
        else:
            merge(old, item)


def _with_index(items: list[Any], index: int) -> Json | None:
    return next((item for item in reversed(items) if isinstance(item, dict) and item.get("index") == index), None)


SplitChoice = Callable[[int, Json], Iterator[Json]]
"""A choice and its index → the choices of the chunks that say the same."""


def split_answer(body: Json, chunk_object: str, split_choice: SplitChoice) -> list[Json]:
    """The chunks of an unstreamed answer: none of one without choices. What they do not share comes with the first."""
    everywhere = {**body, "object": chunk_object}
    head = {name: everywhere[name] for name in _IN_EVERY_CHUNK if name in everywhere}
    parts = [part for index, choice in numbered(body.get("choices")) for part in split_choice(index, choice)]
    chunks = [{**head, "choices": [part]} for part in parts]
    if not chunks:
        return []
    chunks[0] |= {name: value for name, value in body.items() if name not in (*_IN_EVERY_CHUNK, "choices", "usage")}
    if body.get("usage") is not None:
        chunks.append({**head, "choices": [], "usage": body["usage"]})
    return chunks


def tokens(text: str) -> list[str]:
    """``text`` in pieces of about a token's length; joined they are ``text``."""
    return _TOKEN_LIKE.findall(text)


def normalise(value: Any, ignored: str | None = None) -> Any:
    """A known member's canonical form: members sorted, null and ``ignored`` left out, ``1.0`` as ``1``, text as it is."""
    if isinstance(value, dict):
        return {
            name: normalise(value[name], ignored) for name in sorted(value) if value[name] is not None and name != ignored
        }
    if isinstance(value, list):
        return [normalise(item, ignored) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    return value


def canonical_members(body: Json, normal: Mapping[str, Callable[[Any], Any]]) -> Json:
    """The sorted members that are not ignored; those in ``normal`` normalised (null left out), all others as sent."""
    members: Json = {}
    for name in sorted(body):
        value = body[name]
        if name in IGNORED or name == "model":
            continue
        form = normal.get(name)
        if form is None:
            members[name] = value
        elif value is not None:
            members[name] = form(value)
    return members


def one_or_many(value: Any) -> Any:
    """``"x"`` as ``["x"]``."""
    return [value] if isinstance(value, str) else value


def as_sent(value: Any) -> Any:
    """Order steers the answer here (the properties of a schema), so nothing is touched."""
    return value


def check(body: Json, name: str, what: str, valid: Callable[[Any], bool], *, required: bool = False) -> None:
    """Raises `RequestProblem` unless ``body[name]`` is ``valid``, or absent (null is absent) and not required."""
    value = body.get(name)
    if value is None:
        if required:
            raise RequestProblem(f"Missing required parameter: '{name}'.", name)
        return
    if not valid(value):
        raise RequestProblem(f"Invalid type for '{name}': expected {what}.", name)


def _check_nesting(body: Json) -> None:
    """What can be read can be nested four times as deep as what can be written (254 levels), and goes upstream."""
    name = ""
    try:
        for name, value in body.items():  # noqa: B007
            orjson.dumps([value])
    except TypeError:
        raise RequestProblem(f"Invalid value for '{name}': nested too deeply.", name) from None


def check_common(body: Json) -> None:
    """``model``, ``stream`` and ``n``, which every API has, and that the request can be written again."""
    _check_nesting(body)
    check(body, "model", "a non-empty string", lambda value: isinstance(value, str) and bool(value), required=True)
    check(body, "stream", "a boolean", lambda value: isinstance(value, bool))
    check(body, "stream_options", "an object", lambda value: isinstance(value, dict))
    check(body, "n", "a positive integer", _is_positive_int)


def _is_positive_int(value: Any) -> bool:
    if isinstance(value, float):
        value = int(value) if value.is_integer() else 0
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

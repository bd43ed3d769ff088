"""The strings of a chunk, each with its channel, and what kind of thing it is."""

from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

import orjson

from gateway.core.apis.base import Json, numbered

_FINISH = "finish_reason"
# What a fragment says beside its text and may say again, or says otherwise in each run.
_NOT_CONTENT = frozenset({"type", "index", "object", "format", "expires_at", _FINISH})
# Content is never nested so deep; what a parser accepts can be too deep for recursion.
_DEPTH = 24


class Kind(Enum):
    GROWS = "grows"
    """Each piece goes on where the last one ended."""
    WHOLE = "whole"
    """The same, but a piece cannot be cut: an item of a list, as JSON text, or encoded bytes."""
    HOLDS = "holds"
    """A value that may be said again: the name of a function, a finish reason."""
    MARK = "mark"
    """Such a value that is no content, since each run has its own: a role, an id, a signature."""


_KINDS = {
    "content": Kind.GROWS, "text": Kind.GROWS, "arguments": Kind.GROWS, "data": Kind.WHOLE,
    "name": Kind.HOLDS, "role": Kind.MARK, "id": Kind.MARK, "call_id": Kind.MARK,
}  # fmt: skip


class Leaf(NamedTuple):
    """A string of a chunk, and where it stands there: ``holder[name]``."""

    kind: Kind
    channel: str
    text: str
    holder: Any
    name: Any

    @property
    def is_finish(self) -> bool:
        return bool(self.name == _FINISH)

    @property
    def is_unnumbered_id(self) -> bool:
        """Whether it is all that tells to which call a fragment belongs."""
        return self.name == "id" and ".tool_calls." in self.channel and not isinstance(self.holder.get("index"), int)


class _Walker:
    """Finds the strings of one choice's chunks. It remembers the tool calls: not every server numbers them."""

    def __init__(self) -> None:
        self._found: list[Leaf] = []
        self._numbers: dict[str, int] = {}
        self._last = -1

    def leaves(self, index: int, choice: Json) -> list[Leaf]:
        """In order, the finish reason last. Empty strings are none."""
        found: list[Leaf] = []
        self._found = found
        delta = choice.get("delta")
        if isinstance(delta, dict):
            self._walk(delta, str(index))
        else:
            # Beside a delta, and in what is none, objects are about the content (Azure's filters) and come again and again.
            own = {name: text for name, text in choice.items() if isinstance(text, str) and not name.endswith("_reason")}
            self._walk(own, str(index))
            found[:] = [leaf._replace(holder=choice) for leaf in found]
        reason = choice.get(_FINISH)
        if reason and isinstance(reason, str):
            found.append(Leaf(Kind.HOLDS, f"{index}.{_FINISH}", reason, choice, _FINISH))
        return found

    def _walk(self, holder: Json, path: str, *, parts: bool = False) -> None:
        for name, item in holder.items():
            if not item:
                continue
            if isinstance(item, str):
                if name not in _NOT_CONTENT:
                    self._found.append(Leaf(_kind(name), f"{path}.{name}", item, holder, name))
            elif isinstance(item, dict):
                self._descend(item, f"{path}.{name}", parts=parts)
            elif isinstance(item, list):
                self._walk_list(item, f"{path}.{name}", parts=parts or name == "content")

    def _descend(self, holder: Json, path: str, *, parts: bool) -> None:
        if path.count(".") < _DEPTH:
            self._walk(holder, path, parts=parts)

    def _walk_list(self, items: list[Any], path: str, *, parts: bool) -> None:
        for place, item in enumerate(items):
            if (key := self._key(item, place, path, parts=parts)) is not None:
                self._descend(item, f"{path}.{key}", parts=parts)
            elif text := _json_text(item):
                self._found.append(Leaf(Kind.WHOLE, f"{path}[]", text, items, place))

    def _key(self, item: Any, place: int, path: str, *, parts: bool) -> int | str | None:
        """What tells an item that grows from its neighbours; None for one that comes whole."""
        if not isinstance(item, dict):
            return None
        if path.endswith(".tool_calls"):
            return self._number(item, place)
        if isinstance(index := item.get("index"), int):
            return index
        if not parts:
            return None
        # Parts of one type are pieces of one part, however many come in a chunk.
        return kind if isinstance(kind := item.get("type"), str) else place

    def _number(self, call: Json, place: int) -> int:
        """As the assembler numbers calls: a new id begins one, and a lone fragment goes on with the last."""
        call_id = call.get("id")
        number = call.get("index")
        if not isinstance(number, int):
            number = place or max(self._last, 0)
            if call_id and isinstance(call_id, str):
                number = self._numbers.get(call_id, self._last + 1)
        self._last = max(self._last, number)
        if isinstance(call_id, str):
            self._numbers.setdefault(call_id, number)
        return number


def _kind(name: str) -> Kind:
    return _KINDS.get(name) or (Kind.MARK if name.endswith("signature") else Kind.GROWS)


def _json_text(item: Any) -> str:
    """The same for the same item; empty where it is no content, or nested too deeply to be any."""
    if not isinstance(item, dict | str):
        return ""
    try:
        return orjson.dumps(item, option=orjson.OPT_SORT_KEYS).decode()
    except TypeError:
        return ""


class Walkers:
    """Finds the strings of all choices of a stream."""

    def __init__(self) -> None:
        self._walkers: dict[int, _Walker] = {}

    def choices(self, chunk: Json) -> Iterator[tuple[int, Json, list[Leaf]]]:
        """The choices of the next chunk, each with its index and its strings."""
        for index, choice in numbered(chunk.get("choices")):
            walker = self._walkers.get(index)
            if walker is None:
                walker = self._walkers[index] = _Walker()
            yield index, choice, walker.leaves(index, choice)


def pieces(chunk: Json) -> list[tuple[str, str]]:
    """The content of one chunk: channels, each with the string that it adds to it (or, a name or an end, says again)."""
    choices = Walkers().choices(chunk)
    return [(leaf.channel, leaf.text) for _, _, leaves in choices for leaf in leaves if leaf.kind is not Kind.MARK]


def reports_usage(chunk: Json) -> bool:
    usage = chunk.get("usage")
    return bool(usage) and isinstance(usage, dict)

"""What a stream says, apart from how it was cut into chunks: its text, reasoning, calls and ends, channel by channel.

Two runs of one request have other chunk borders, ids, times, log probabilities and usage; their content can be compared.
A channel is one string that grows: ``0.content``, ``0.tool_calls.1.function.arguments``, ``0.text``, ``0.finish_reason``.
Position and length are counted in characters (code points) over all channels.
"""

import re
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from hashlib import blake2b
from itertools import takewhile
from typing import Any, NamedTuple

import orjson

from gateway.core.apis.base import Json, numbered
from gateway.core.json_scan import members
from gateway.core.recording import MalformedChunk, parse_chunk

_ENVELOPE = ("id", "created", "model", "system_fingerprint", "service_tier")
_FINISH = "finish_reason"
_NOBODYS = ("", 0)  # Azure's first chunk is nobody's and of no time: it stays so
# What a fragment says beside its text and may say again, or says otherwise in each run.
_NOT_CONTENT = frozenset({"type", "index", "object", "format", "expires_at", _FINISH})
# Content is never nested so deep; what a parser accepts can be too deep for recursion.
_DEPTH = 24
_DIGEST_BYTES = 6
_POSITION = re.compile(r"(0|[1-9a-f][0-9a-f]{0,11})-([A-Za-z0-9_-]{8})")
_CHANNEL_SHOWN = 100  # characters of a channel's name in a message: the names are the upstream's


class Diverged(ValueError):
    """Two streams do not say the same: ``channel`` tells where, ``at`` at which of its characters."""

    def __init__(self, channel: str, at: int, why: str = "the new run differs from what was shown") -> None:
        super().__init__(f"{why}, at character {at} of {channel[:_CHANNEL_SHOWN]}")
        self.channel = channel
        self.at = at


class _Kind(Enum):
    GROWS = "grows"
    """Each piece goes on where the last one ended."""
    WHOLE = "whole"
    """The same, but a piece cannot be cut: an item of a list, as JSON text, or encoded bytes."""
    HOLDS = "holds"
    """A value that may be said again: the name of a function, a finish reason."""
    MARK = "mark"
    """Such a value that is no content, since each run has its own: a role, an id, a signature."""


_KINDS = {
    "content": _Kind.GROWS, "text": _Kind.GROWS, "arguments": _Kind.GROWS, "data": _Kind.WHOLE,
    "name": _Kind.HOLDS, "role": _Kind.MARK, "id": _Kind.MARK, "call_id": _Kind.MARK,
}  # fmt: skip


class _Leaf(NamedTuple):
    """A string of a chunk, and where it stands there: ``holder[name]``."""

    kind: _Kind
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
        self._found: list[_Leaf] = []
        self._numbers: dict[str, int] = {}
        self._last = -1

    def leaves(self, index: int, choice: Json) -> list[_Leaf]:
        """In order, the finish reason last. Empty strings are none."""
        found: list[_Leaf] = []
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
            found.append(_Leaf(_Kind.HOLDS, f"{index}.{_FINISH}", reason, choice, _FINISH))
        return found

    def _walk(self, holder: Json, path: str, *, parts: bool = False) -> None:
        for name, item in holder.items():
            if not item:
                continue
            if isinstance(item, str):
                if name not in _NOT_CONTENT:
                    self._found.append(_Leaf(_kind(name), f"{path}.{name}", item, holder, name))
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
                self._found.append(_Leaf(_Kind.WHOLE, f"{path}[]", text, items, place))

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


def _kind(name: str) -> _Kind:
    return _KINDS.get(name) or (_Kind.MARK if name.endswith("signature") else _Kind.GROWS)


def _json_text(item: Any) -> str:
    """The same for the same item; empty where it is no content, or nested too deeply to be any."""
    if not isinstance(item, dict | str):
        return ""
    try:
        return orjson.dumps(item, option=orjson.OPT_SORT_KEYS).decode()
    except TypeError:
        return ""


class _Walkers:
    """Finds the strings of all choices of a stream."""

    def __init__(self) -> None:
        self._walkers: dict[int, _Walker] = {}

    def choices(self, chunk: Json) -> Iterator[tuple[int, Json, list[_Leaf]]]:
        """The choices of the next chunk, each with its index and its strings."""
        for index, choice in numbered(chunk.get("choices")):
            walker = self._walkers.get(index)
            if walker is None:
                walker = self._walkers[index] = _Walker()
            yield index, choice, walker.leaves(index, choice)


def pieces(chunk: Json) -> list[tuple[str, str]]:
    """The content of one chunk: channels, each with the string that it adds to it (or, a name or an end, says again)."""
    choices = _Walkers().choices(chunk)
    return [(leaf.channel, leaf.text) for _, _, leaves in choices for leaf in leaves if leaf.kind is not _Kind.MARK]


class Trace:
    """How far a stream has come, counted and digested by its content alone."""

    def __init__(self) -> None:
        self.length = 0
        self._walkers = _Walkers()
        self._hashes: dict[str, blake2b] = {}
        self._held: dict[str, str] = {}

    def add(self, chunk: Json) -> None:
        for _, _, leaves in self.choices(chunk):
            for leaf in leaves:
                if self.adds(leaf):
                    self.grow(leaf, leaf.text)

    def choices(self, chunk: Json) -> Iterator[tuple[int, Json, list[_Leaf]]]:
        """The strings of the next chunk, which are not counted yet."""
        return self._walkers.choices(chunk)

    def adds(self, leaf: _Leaf) -> bool:
        """Whether a string is content, and not the same name or end again."""
        if leaf.kind is _Kind.HOLDS:
            return self._held.get(leaf.channel) != leaf.text
        return leaf.kind is not _Kind.MARK

    def grow(self, leaf: _Leaf, text: str) -> None:
        """Counts ``text``: the string, or the beginning of it."""
        if leaf.kind is _Kind.HOLDS:
            self._held[leaf.channel] = text
        known = self._hashes.get(leaf.channel)
        if known is None:
            known = self._hashes[leaf.channel] = blake2b(digest_size=16)
        known.update(text.encode("utf-8", "surrogatepass"))
        self.length += len(text)

    def digest(self) -> str:
        """8 letters, digits, ``-`` and ``_``. It does not depend on how chunks were cut or channels interleaved."""
        total = blake2b(digest_size=_DIGEST_BYTES)
        for channel in sorted(self._hashes):
            name = channel.encode("utf-8", "surrogatepass")
            total.update(b"%d %b %b" % (len(name), name, self._hashes[channel].digest()))
        return urlsafe_b64encode(total.digest()).decode()

    def position(self) -> str:
        """Length and digest in one word, for a cursor."""
        return f"{self.length:x}-{self.digest()}"


def parse_position(text: str) -> tuple[int, str]:
    """Length and digest of a `Trace.position`; raises ValueError."""
    match = _POSITION.fullmatch(text)
    if match is None:
        raise ValueError("not a position")
    return int(match[1], 16), match[2]


def _cut(choice: Json, leaves: Iterable[_Leaf], count_known: Callable[[_Leaf], int]) -> tuple[bool, bool]:
    """Cuts from a choice what is known already: of each string as many characters as ``count_known`` says.

    Returns whether anything is left, and whether anything was cut. Raises `Diverged` where that cannot be cut.
    """
    gone: list[_Leaf] = []
    left = cut = False
    text_left: _Leaf | None = None
    text_known = False
    for leaf in leaves:
        count = count_known(leaf)
        is_text = leaf.kind in (_Kind.GROWS, _Kind.WHOLE)  # a name that is said again is no reason not to cut
        text_known = text_known or (is_text and count > 0)
        if count >= len(leaf.text):
            gone.append(leaf)
            continue
        left = True
        text_left = leaf if is_text else text_left
        if count:
            _cut_leaf(leaf, count)
            cut = True
    cut = _cut_logprobs(choice, text_left, known=text_known) or cut
    for leaf in reversed(gone):  # so that places in lists stay true
        _remove(leaf)
    return left, cut or bool(gone)


def _cut_leaf(leaf: _Leaf, count: int) -> None:
    if leaf.kind is not _Kind.GROWS:
        raise Diverged(leaf.channel, count, "the border is inside of what cannot be cut")
    leaf.holder[leaf.name] = leaf.text[count:]


def _remove(leaf: _Leaf) -> None:
    if leaf.kind is _Kind.GROWS:
        leaf.holder[leaf.name] = ""
    elif leaf.is_finish:
        leaf.holder[leaf.name] = None
    elif not leaf.is_unnumbered_id:
        del leaf.holder[leaf.name]


def _cut_logprobs(choice: Json, text_left: _Leaf | None, *, known: bool) -> bool:
    """They are per token: they stay or go with all of a chunk's text."""
    logprobs = choice.get("logprobs")
    if not known or not logprobs or (isinstance(logprobs, dict) and not any(logprobs.values())):
        return False
    if text_left:
        raise Diverged(text_left.channel, 0, "a chunk with logprobs cannot be cut")
    choice["logprobs"] = None
    return True


class _Text:
    """What was shown of a string, and how much of that a new run has said again."""

    def __init__(self, pieces: list[str]) -> None:
        self._text = "".join(pieces)
        self.at = 0

    @property
    def is_used_up(self) -> bool:
        return self.at == len(self._text)

    def take(self, leaf: _Leaf) -> int:
        """How many of its characters were shown; raises `Diverged`."""
        known = self._text[self.at : self.at + len(leaf.text)]
        if not leaf.text.startswith(known):
            same = takewhile(lambda pair: pair[0] == pair[1], zip(known, leaf.text, strict=False))
            raise Diverged(leaf.channel, self.at + sum(1 for _ in same))
        self.at += len(known)
        return len(known)


class _Values:
    """The same for a value that may be said again: those that were shown, one after the other."""

    def __init__(self, values: list[str]) -> None:
        self._values = [value for place, value in enumerate(values) if not place or value != values[place - 1]]
        self._count = 0

    @property
    def at(self) -> int:
        return sum(map(len, self._values[: self._count]))

    @property
    def is_used_up(self) -> bool:
        return self._count == len(self._values)

    def take(self, leaf: _Leaf) -> int:
        if self._count and leaf.text == self._values[self._count - 1]:
            return len(leaf.text)
        if self.is_used_up:
            return 0
        if leaf.text != self._values[self._count]:
            raise Diverged(leaf.channel, self.at)
        self._count += 1
        return len(leaf.text)


class _Shown:
    """What was shown of one choice."""

    def __init__(self, leaves: Sequence[_Leaf] = ()) -> None:
        self._marks: dict[str, str] = {}
        found: dict[tuple[str, bool], list[str]] = {}
        for leaf in leaves:
            if leaf.kind is _Kind.MARK:
                self._marks[leaf.channel] = leaf.text
            else:
                found.setdefault((leaf.channel, leaf.kind is _Kind.HOLDS), []).append(leaf.text)
        self._channels = {channel: _Values(texts) if holds else _Text(texts) for (channel, holds), texts in found.items()}
        self._open = dict.fromkeys(self._channels)
        self._is_finished = any(leaf.is_finish for leaf in leaves)

    @property
    def is_used_up(self) -> bool:
        return not self._open

    def check_used_up(self, *, but: str = "") -> None:
        """Raises `Diverged` for what was shown, and was not said again."""
        for channel in self._open:
            if channel != but:
                raise Diverged(channel, self._channels[channel].at, "the new run ends before what was shown")

    def take(self, leaf: _Leaf) -> int:
        """How many characters of the new run's next string were shown; raises `Diverged`."""
        if leaf.kind is _Kind.MARK:
            return self._take_mark(leaf)
        if leaf.is_finish:
            self.check_used_up(but=leaf.channel)
        known = self._channels.get(leaf.channel)
        count = known.take(leaf) if known else 0
        if known and known.is_used_up:
            self._open.pop(leaf.channel, None)
        if self._is_finished and count < len(leaf.text):
            raise Diverged(leaf.channel, known.at if known else 0, "the new run goes on after what was shown had ended")
        return count

    def _take_mark(self, leaf: _Leaf) -> int:
        shown = self._marks.get(leaf.channel)
        if shown is None:
            return len(leaf.text) if self._is_finished else 0
        if leaf.is_unnumbered_id:
            leaf.holder[leaf.name] = shown
        return len(leaf.text)


class _Patcher:
    """Writes the first run's envelope into a chunk's own bytes. Most chunks of a stream begin alike: that is done once."""

    def __init__(self, envelope: Json) -> None:
        self._values = {name.encode(): orjson.dumps(value) for name, value in envelope.items()}
        self._names = tuple(envelope)
        self._head = b""
        self._patched_head = b""
        self._named_in_head = 0

    def patch(self, payload: bytes, chunk: Json) -> bytes:
        """``chunk`` is what ``payload`` says."""
        named = sum(name in chunk for name in self._names)
        if not (self._head and payload.startswith(self._head) and named == self._named_in_head):
            self._learn(payload, named)
        return self._patched_head + payload[len(self._head) :]

    def _learn(self, payload: bytes, named: int) -> None:
        parts: list[bytes] = []
        end = 0
        for member in members(payload):
            if member.name not in self._values:
                continue
            value = payload[member.value_start : member.value_end]
            parts += payload[end : member.value_start], value if value in (b'""', b"0") else self._values[member.name]
            end = member.value_end
        # One byte more than the last value, or a longer number would look the same.
        self._head = payload[: end + 1]
        self._patched_head = b"".join((*parts, payload[end : end + 1]))
        self._named_in_head = named


class Continuation:
    """Goes on with a stream from a new run of the same request, as long as that says what was shown already.

    ``shown_chunks`` are all chunks of the log. Each channel goes on once what was shown of it is used up.
    """

    def __init__(self, shown_chunks: Iterable[Json]) -> None:
        self._is_new = True
        self._envelope: Json = {}
        self._usages_left = 0
        self._usage_was_shown = False
        self._goes_on = False
        leaves: dict[int, list[_Leaf]] = {}
        walkers = _Walkers()
        for chunk in shown_chunks:
            self._is_new = False
            self._learn(chunk)
            for index, _, found in walkers.choices(chunk):
                leaves.setdefault(index, []).extend(found)
        self._shown = {index: _Shown(found) for index, found in leaves.items()}
        self._nothing_shown = _Shown()
        self._patcher = _Patcher(self._envelope)
        self._walkers = _Walkers()

    def _learn(self, chunk: Json) -> None:
        for name in _ENVELOPE:
            value = chunk.get(name)
            if name not in self._envelope and value and isinstance(value, str | int):
                self._envelope[name] = value
        if _usage(chunk):
            self._usage_was_shown = True
            self._usages_left += not chunk.get("choices")

    @property
    def is_used_up(self) -> bool:
        """Whether the new run has said all that was shown."""
        return all(shown.is_used_up for shown in self._shown.values())

    def feed(self, payload: bytes) -> bytes | None:
        """Takes the new run's next chunk; returns what of it goes to the log, None where nothing is new.

        Raises `Diverged`. What is no JSON object, or reports an error, is returned as it came.
        """
        if self._is_new:
            return payload
        try:
            chunk = parse_chunk(payload)
        except MalformedChunk:
            return payload
        if chunk.get("error"):
            return payload
        is_new, is_cut = self._cut(chunk)
        is_new = self._has_new_usage(chunk) or is_new
        self._goes_on = self._goes_on or (is_new and self.is_used_up)
        # Once the stream goes on, chunks that say nothing belong to it, but not those that only say a role again.
        if not is_new and (is_cut or not self._goes_on):
            return None
        return self._written(chunk) if is_cut else self._patcher.patch(payload, chunk)

    def finish(self) -> None:
        """The new run has ended; raises `Diverged` if it said less than was shown."""
        for shown in self._shown.values():
            shown.check_used_up()

    def _cut(self, chunk: Json) -> tuple[bool, bool]:
        is_new = is_cut = False
        for index, choice, leaves in self._walkers.choices(chunk):
            left, cut = _cut(choice, leaves, self._shown.get(index, self._nothing_shown).take)
            is_new, is_cut = is_new or left, is_cut or cut
        return is_new, is_cut

    def _has_new_usage(self, chunk: Json) -> bool:
        """Each chunk about usage only that was shown stands for one; usage beside text is new only once, at the end."""
        if not _usage(chunk):
            return False
        if chunk.get("choices"):
            return self.is_used_up and not self._usage_was_shown
        self._usages_left -= 1
        return self._usages_left < 0

    def _written(self, chunk: Json) -> bytes:
        for name, value in self._envelope.items():
            if chunk.get(name, "") not in _NOBODYS:
                chunk[name] = value
        try:
            return orjson.dumps(chunk)
        except TypeError:
            raise Diverged("choices", 0, "a chunk is nested too deeply to be cut") from None


def _usage(chunk: Json) -> bool:
    usage = chunk.get("usage")
    return bool(usage) and isinstance(usage, dict)


class Skip:
    """Leaves out the beginning of a log that a client has seen, of which only `Trace.position` is known.

    ``reached`` tells whether the position was found: from then on chunks come out as they are. If it still is not when
    the log ends, the client saw more than the log has.
    """

    def __init__(self, length: int, digest: str) -> None:
        self._length = length
        self._digest = digest
        self._trace = Trace()
        self.reached = length == 0 and digest == self._trace.digest()

    def feed(self, chunk: Json) -> Json | None:
        """Takes the log's next chunk over; returns what of it the client has not seen, None where that is nothing.

        Raises `Diverged` where the log does not say what the client saw.
        """
        if self.reached:
            return chunk
        is_left = False
        for _, choice, leaves in self._trace.choices(chunk):
            left, _ = _cut(choice, leaves, self._count_seen)
            is_left = is_left or left
        if self._trace.length < self._length:
            return None
        if self._trace.digest() != self._digest:
            raise Diverged("all channels", self._length, "the log differs from what the client saw")
        self.reached = True
        return chunk if is_left or _usage(chunk) else None

    def _count_seen(self, leaf: _Leaf) -> int:
        left = self._length - self._trace.length
        if not left:
            return 0
        if not self._trace.adds(leaf):
            return len(leaf.text)
        self._trace.grow(leaf, leaf.text[:left])
        return min(left, len(leaf.text))

"""Going on with a stream from a new run of the same request."""

from collections.abc import Iterable, Sequence
from itertools import takewhile

import orjson

from gateway.core.apis.base import Json
from gateway.core.content.cutting import Diverged, cut_known
from gateway.core.content.leaves import Kind, Leaf, Walkers, reports_usage
from gateway.core.json_scan import members
from gateway.core.recording import MalformedChunk, parse_chunk

_ENVELOPE = ("id", "created", "model", "system_fingerprint", "service_tier")
_NOBODYS = ("", 0)  # Azure's first chunk is nobody's and of no time: it stays so


class _Text:
    """What was shown of a string, and how much of that a new run has said again."""

    def __init__(self, pieces: list[str]) -> None:
        self._text = "".join(pieces)
        self.at = 0

    @property
    def is_used_up(self) -> bool:
        return self.at == len(self._text)

    def take(self, leaf: Leaf) -> int:
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

    def take(self, leaf: Leaf) -> int:
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

    def __init__(self, leaves: Sequence[Leaf] = ()) -> None:
        self._marks: dict[str, str] = {}
        found: dict[tuple[str, bool], list[str]] = {}
        for leaf in leaves:
            if leaf.kind is Kind.MARK:
                self._marks[leaf.channel] = leaf.text
            else:
                found.setdefault((leaf.channel, leaf.kind is Kind.HOLDS), []).append(leaf.text)
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

    def take(self, leaf: Leaf) -> int:
        """How many characters of the new run's next string were shown; raises `Diverged`."""
        if leaf.kind is Kind.MARK:
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

    def _take_mark(self, leaf: Leaf) -> int:
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
        leaves: dict[int, list[Leaf]] = {}
        walkers = Walkers()
        for chunk in shown_chunks:
            self._is_new = False
            self._learn(chunk)
            for index, _, found in walkers.choices(chunk):
                leaves.setdefault(index, []).extend(found)
        self._shown = {index: _Shown(found) for index, found in leaves.items()}
        self._nothing_shown = _Shown()
        self._patcher = _Patcher(self._envelope)
        self._walkers = Walkers()

    def _learn(self, chunk: Json) -> None:
        for name in _ENVELOPE:
            value = chunk.get(name)
            if name not in self._envelope and value and isinstance(value, str | int):
                self._envelope[name] = value
        if reports_usage(chunk):
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
            left, cut = cut_known(choice, leaves, self._shown.get(index, self._nothing_shown).take)
            is_new, is_cut = is_new or left, is_cut or cut
        return is_new, is_cut

    def _has_new_usage(self, chunk: Json) -> bool:
        """Each chunk about usage only that was shown stands for one; usage beside text is new only once, at the end."""
        if not reports_usage(chunk):
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

"""A stream as a recording: frames with their timing, and the byte spans that a reply patches or cuts.

Frames are kept as the upstream's own bytes. What a reply changes is found once, when the frame arrives, and
kept as spans: the values of ``id`` and ``created`` (fresh on a hit), and the member ``usage``, which reaches only
a caller who asked for it. All else is passed on untouched, unknown members included.
"""

import re
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from gateway.core.json_scan import cut_member, members

SCHEMA_VERSION = 1
_HEAD = b"data: "
_TAIL = b"\n\n"
# Inside a JSON string a quote is escaped, so a quoted name before a colon is always a member's name.
_FLAGGED = re.compile(rb'"(?:finish_reason|usage|error)"\s*:(?!\s*null\b)')
_NULL_USAGE = b',"usage":null'
_OBFUSCATION_TO_END = re.compile(rb',"obfuscation":"[A-Za-z0-9]*"\}')
_ID_PREFIX = re.compile(r"[A-Za-z]+[-_]")

Span = tuple[int, int]


class CorruptRecording(ValueError):
    """Stored bytes that do not load as a recording."""


class MalformedChunk(ValueError):
    """An event whose data is not a JSON object."""


class Frame(NamedTuple):
    """One event of a stream, ready to write.

    ``full`` is for a caller who asked for usage, ``plain`` for one who did not: the same bytes but for the
    member ``usage``, and empty where the chunk is about usage only. ``at_us`` is the arrival, in microseconds
    after the call began.
    """

    plain: bytes
    full: bytes
    at_us: int

    @property
    def payload(self) -> bytes:
        """The chunk's JSON text."""
        return self.full[len(_HEAD) : -len(_TAIL)]


class Scan(NamedTuple):
    """What is to be known of a chunk's bytes; spans are relative to the chunk's first byte."""

    id: Span | None
    created: Span | None
    usage: Span | None
    chunk: dict[str, Any] | None
    """The parsed chunk, only where it says something that must be known while the stream runs."""


class Scanner:
    """Scans the chunks of one stream. It remembers how they begin: all chunks of a stream share their first members."""

    def __init__(self) -> None:
        self._prefix = b""
        self._id: Span | None = None
        self._created: Span | None = None

    def scan(self, payload: bytes) -> Scan:
        """Raises `MalformedChunk`."""
        if not (payload.startswith(b"{") and payload.endswith(b"}")):
            self._refuse(payload)
        chunk = self._parse(payload) if _FLAGGED.search(payload) else None
        usage_named = b'"usage"' in payload
        if self._prefix and payload.startswith(self._prefix):
            usage = _null_usage_at_end(payload) if usage_named else None
            if usage or not usage_named:
                return Scan(self._id, self._created, usage, chunk)
        return self._scan_members(payload, chunk)

    def _scan_members(self, payload: bytes, chunk: dict[str, Any] | None) -> Scan:
        id_span = created_span = usage_span = None
        try:
            for member in members(payload):
                first = payload[member.value_start : member.value_start + 1]
                if member.name == b"id" and first == b'"':
                    id_span = (member.value_start, member.value_end)
                elif member.name == b"created" and first.isdigit():
                    created_span = (member.value_start, member.value_end)
                elif member.name == b"usage":
                    usage_span = cut_member(payload, member)
        except ValueError:
            self._refuse(payload)
        if id_span and created_span and not self._prefix:
            # One byte more than the values, or a longer number would look the same.
            self._prefix = payload[: max(id_span[1], created_span[1]) + 1]
            self._id, self._created = id_span, created_span
        return Scan(id_span, created_span, usage_span, chunk)

    def _refuse(self, payload: bytes) -> None:
        """Raises, unless a parser takes what the scan could not read (an object with spaces around it)."""
        self._parse(payload)

    @staticmethod
    def _parse(payload: bytes) -> dict[str, Any]:
        try:
            chunk = orjson.loads(payload)
        except orjson.JSONDecodeError as error:
            raise MalformedChunk(f"a chunk is not JSON: {error}") from None
        if not isinstance(chunk, dict):
            raise MalformedChunk("a chunk is not a JSON object")
        return chunk


def _null_usage_at_end(payload: bytes) -> Span | None:
    """The span of ``,"usage":null`` where only the closing brace, or obfuscation, follows: so it is a top-level member."""
    start = payload.rfind(_NULL_USAGE)
    end = start + len(_NULL_USAGE)
    if start < 0 or not (payload[end:] == b"}" or _OBFUSCATION_TO_END.fullmatch(payload, end)):
        return None
    return start, end


class Spans:
    """Byte spans in ascending order; ``length`` is what they all measure, or None where they differ."""

    __slots__ = ("lengths", "starts")

    def __init__(self, starts: Iterable[int] = (), lengths: Iterable[int] = ()) -> None:
        self.starts = array("I", starts)
        self.lengths = array("I", lengths)

    def add(self, start: int, end: int) -> None:
        self.starts.append(start)
        self.lengths.append(end - start)

    def uniform(self, length: int) -> bool:
        """Whether each span measures ``length`` bytes."""
        return self.lengths.count(length) == len(self.lengths)

    def __iter__(self) -> Any:
        return ((start, start + length) for start, length in zip(self.starts, self.lengths, strict=True))

    def __len__(self) -> int:
        return len(self.starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spans) and (self.starts, self.lengths) == (other.starts, other.lengths)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"Spans({list(self)})"


@dataclass(slots=True, eq=True)
class Marks:
    """Where the frames of ``sse`` end, when each arrived (µs), and what a reply patches or cuts."""

    ends: "array[int]" = field(default_factory=lambda: array("I"))
    at_us: "array[int]" = field(default_factory=lambda: array("Q"))
    ids: Spans = field(default_factory=Spans)
    created: Spans = field(default_factory=Spans)
    cuts: Spans = field(default_factory=Spans)

    def pack(self) -> bytes:
        """Eight counted arrays of little-endian integers, 8 bytes for times and 4 for all else."""
        packed = []
        for numbers in self._arrays():
            packed.append(len(numbers).to_bytes(4, "little"))
            packed.append(_little_endian(numbers).tobytes())
        return b"".join(packed)

    @classmethod
    def unpack(cls, data: bytes) -> "Marks":
        """Raises `CorruptRecording`."""
        marks = cls()
        at = 0
        for numbers in marks._arrays():
            count = int.from_bytes(data[at : at + 4], "little")
            end = at + 4 + count * numbers.itemsize
            if end > len(data) or at + 4 > len(data):
                raise CorruptRecording("the marks are cut short")
            numbers.frombytes(data[at + 4 : end])
            if sys.byteorder == "big":
                numbers.byteswap()
            at = end
        if at != len(data):
            raise CorruptRecording("the marks are longer than they say")
        return marks

    def _arrays(self) -> tuple["array[int]", ...]:
        ids, created, cuts = self.ids, self.created, self.cuts
        return self.ends, self.at_us, ids.starts, ids.lengths, created.starts, created.lengths, cuts.starts, cuts.lengths


def _little_endian(numbers: "array[int]") -> "array[int]":
    if sys.byteorder == "little":
        return numbers
    swapped = array(numbers.typecode, numbers)
    swapped.byteswap()
    return swapped


@dataclass(frozen=True, slots=True)
class Meta:
    """What is known of a recording besides its bytes. Times are Unix seconds; spans are of ``body``."""

    api: str
    model: str
    upstream: str
    started_at: float
    written_at: float
    duration_us: int
    ttl_s: float
    id: str
    finish_reasons: tuple[str, ...] = ()
    usage: dict[str, Any] | None = None
    body_id: Span | None = None
    body_created: Span | None = None
    whole: bool = False
    """Whether the upstream answered unstreamed: then the frames are split from ``body``, not the other way round."""

    def dumps(self) -> bytes:
        return orjson.dumps(self)

    @classmethod
    def loads(cls, data: bytes) -> "Meta":
        """Raises `CorruptRecording`."""
        try:
            meta = cls(**orjson.loads(data))
            float(meta.written_at), float(meta.ttl_s), str(meta.id)
        except (orjson.JSONDecodeError, TypeError, ValueError) as error:
            raise CorruptRecording(f"the meta data does not load: {error}") from None
        return meta


@dataclass(frozen=True, slots=True)
class Identity:
    """The ``id`` and ``created`` of one reply, as JSON text."""

    id: bytes
    created: bytes

    @classmethod
    def fresh(cls, original_id: str, token: str, now: float) -> "Identity":
        """An identity of the original's shape: its prefix, its length, and letters and digits of ``token`` (≥ 64)."""
        match = _ID_PREFIX.match(original_id)
        prefix = match[0] if match else ""
        length = len(original_id) - len(prefix)
        return cls(orjson.dumps(prefix + token[: length if 16 <= length <= len(token) else 24]), b"%d" % now)


@dataclass(frozen=True, slots=True)
class Recording:
    """A closed, immutable stream. A lookup loads only the parts that its reply needs; the others are None."""

    meta: Meta
    sse: bytes | None = None
    marks: Marks | None = None
    body: bytes | None = None

    @property
    def size_bytes(self) -> int:
        return len(self.sse or b"") + len(self.body or b"")

    def stream(self, identity: Identity | None, *, usage: bool) -> bytes:
        """All frames in one piece: under a fresh identity, with or without usage, else as they came."""
        sse, marks = self._frames()
        patched: bytes | bytearray = sse
        if identity:
            if not (marks.ids.uniform(len(identity.id)) and marks.created.uniform(len(identity.created))):
                return b"".join(self.frames(identity, usage=usage))
            patched = bytearray(sse)
            _overwrite(patched, marks.ids, identity.id)
            _overwrite(patched, marks.created, identity.created)
        if usage or not marks.cuts:
            return bytes(patched)
        return _without(patched, marks.cuts)

    def frames(self, identity: Identity | None, *, usage: bool) -> list[bytes]:
        """The same, one by one. A frame about usage only is empty for a caller who did not ask for it."""
        sse, marks = self._frames()
        edits: list[tuple[int, int, bytes]] = []
        if identity:
            edits += [(start, end, identity.id) for start, end in marks.ids]
            edits += [(start, end, identity.created) for start, end in marks.created]
        if not usage:
            edits += [(start, end, b"") for start, end in marks.cuts]
        # A frame that is cut whole has an identity too: the outer edit comes first and swallows the inner ones.
        edits.sort(key=lambda edit: (edit[0], -edit[1]))
        return _edited(sse, marks.ends, edits)

    def whole(self, identity: Identity | None) -> bytes:
        """The assembled body, under a fresh identity if one is given."""
        if self.body is None:
            raise CorruptRecording("the recording has no body")
        body = self.body
        if not identity:
            return body
        spans = [(self.meta.body_id, identity.id), (self.meta.body_created, identity.created)]
        for span, value in sorted(((span, value) for span, value in spans if span), reverse=True):
            body = body[: span[0]] + value + body[span[1] :]
        return body

    def _frames(self) -> tuple[bytes, Marks]:
        if self.sse is None or self.marks is None:
            raise CorruptRecording("the recording has no frames")
        return self.sse, self.marks


def _overwrite(buffer: bytearray, spans: Spans, value: bytes) -> None:
    length = len(value)
    for start in spans.starts:
        buffer[start : start + length] = value


def _without(buffer: bytes | bytearray, cuts: Spans) -> bytes:
    view = memoryview(buffer)
    pieces = []
    at = 0
    for start, end in cuts:
        pieces.append(view[at:start])
        at = end
    pieces.append(view[at:])
    return b"".join(pieces)


def _edited(sse: bytes, ends: Sequence[int], edits: list[tuple[int, int, bytes]]) -> list[bytes]:
    frames = []
    edit = at = 0
    for frame_end in ends:
        pieces = []
        while edit < len(edits) and edits[edit][0] < frame_end:
            start, end, value = edits[edit]
            edit += 1
            if start >= at:
                pieces += (sse[at:start], value)
                at = end
        pieces.append(sse[at:frame_end])
        at = frame_end
        frames.append(b"".join(pieces))
    return frames


class Recorder:
    """Takes the chunks of one running stream and keeps what a recording needs."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.finish_reasons: dict[int, str] = {}
        self.usage: dict[str, Any] | None = None
        self.size_bytes = 0
        self.id = ""
        self._scanner = Scanner()
        self._marks = Marks()

    def add(self, payload: bytes, at_us: int) -> dict[str, Any] | None:
        """Appends a chunk to ``frames``; returns it parsed if it reports an error, which then is not appended.

        Raises `MalformedChunk`.
        """
        scan = self._scanner.scan(payload)
        about_usage = False
        if scan.chunk is not None:
            if scan.chunk.get("error"):
                return scan.chunk
            about_usage = self._learn(scan.chunk)
        if b"\n" in payload or b"\r" in payload:
            # Only white space between tokens: a line break would end the event's data line. Spans stay where they are.
            payload = payload.replace(b"\r", b" ").replace(b"\n", b" ")
        self._append(payload, scan, about_usage, at_us)
        return None

    def _append(self, payload: bytes, scan: Scan, about_usage: bool, at_us: int) -> None:
        full = b"".join((_HEAD, payload, _TAIL))
        cut: Span | None = None
        if about_usage:
            cut = (0, len(full))
        elif scan.usage:
            cut = (scan.usage[0] + len(_HEAD), scan.usage[1] + len(_HEAD))
        plain = full[: cut[0]] + full[cut[1] :] if cut else full
        self.frames.append(Frame(plain, full, at_us))
        marks, base = self._marks, self.size_bytes
        body = base + len(_HEAD)
        if scan.id:
            marks.ids.add(body + scan.id[0], body + scan.id[1])
            if not self.id:
                self.id = orjson.loads(payload[scan.id[0] : scan.id[1]])
        if scan.created:
            marks.created.add(body + scan.created[0], body + scan.created[1])
        if cut:
            marks.cuts.add(base + cut[0], base + cut[1])
        self.size_bytes += len(full)
        marks.ends.append(self.size_bytes)
        marks.at_us.append(at_us)

    def _learn(self, chunk: dict[str, Any]) -> bool:
        """Takes note of finish reasons and usage; tells whether the chunk is about usage only."""
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and isinstance(reason := choice.get("finish_reason"), str):
                index = choice.get("index")
                self.finish_reasons[index if isinstance(index, int) else 0] = reason
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self.usage = usage
        return bool(usage) and choices == []

    def recording(self, meta: Meta, body: bytes) -> Recording:
        """Closes the stream. ``body`` is the assembled answer, or the upstream's own where it did not stream."""
        return Recording(meta, b"".join([frame.full for frame in self.frames]), self._marks, body)


def body_spans(body: bytes) -> tuple[Span | None, Span | None]:
    """Where the values of ``id`` and ``created`` stand in an answer's body."""
    scan = Scanner().scan(body.strip())
    offset = len(body) - len(body.lstrip())

    def shift(span: Span | None) -> Span | None:
        return (span[0] + offset, span[1] + offset) if span else None

    return shift(scan.id), shift(scan.created)

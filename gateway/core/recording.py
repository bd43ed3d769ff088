"""A stream as a recording: frames with their timing, and the byte spans that a reply patches or cuts.

Frames are kept as the upstream's own bytes. What a reply changes is found once, when the frame arrives, and
kept as spans: the values of ``id`` and ``created`` (fresh on a hit), and the member ``usage``, which reaches only
a caller who asked for it. All else is passed on untouched, unknown members included.
"""

import re
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import orjson

from gateway.core.apis.base import Assembler, numbered
from gateway.core.json_scan import cut_member, members

SCHEMA_VERSION = 1
_HINTS_AND_COUNTS = struct.Struct("<6I")
_LF, _CR = b"\n\r"  # as numbers, which are found in bytes at once
_HEAD = b"data: "
_TAIL = b"\n\n"
_NULL_USAGE = b',"usage":null'
_OBFUSCATION_TO_END = re.compile(rb',"obfuscation":"[A-Za-z0-9]*"\}')
_NONZERO = b"123456789"
_ID_PREFIX = re.compile(r"[A-Za-z]+[-_]")

Span = tuple[int, int]


class CorruptRecording(ValueError):
    """Stored bytes that do not load as a recording."""


class MalformedChunk(ValueError):
    """An event whose data is not a JSON object."""


class Frame(NamedTuple):
    """One event of a stream, ready to write.

    ``full`` is for a caller who asked for usage, ``plain`` for one who did not: ``cut`` is the span between them, the
    whole frame where the chunk is about usage only. ``at_us`` is the arrival, in microseconds after the call began.
    """

    full: bytes
    cut: Span | None
    at_us: int

    @property
    def plain(self) -> bytes:
        full, cut, _ = self
        return full if cut is None else full[: cut[0]] + full[cut[1] :]

    @property
    def about_usage(self) -> bool:
        """Whether nothing is left of it for a caller who did not ask for usage."""
        return self.cut == (0, len(self.full))

    @property
    def payload(self) -> bytes:
        """The chunk's JSON text."""
        return self.full[len(_HEAD) : -len(_TAIL)]


def parse_chunk(payload: bytes) -> dict[str, Any]:
    """An event's data as the JSON object that it has to be; raises `MalformedChunk`."""
    try:
        chunk = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise MalformedChunk(f"a chunk is not JSON: {error}") from None
    if not isinstance(chunk, dict):
        raise MalformedChunk("a chunk is not a JSON object")
    return chunk


Scan = tuple[Span | None, Span | None, Span | None]
"""The values of ``id`` and ``created`` and the member ``usage`` in a chunk's bytes: what a reply may patch or cut."""


class Scanner:
    """Scans the chunks of one stream. It remembers how they begin: most chunks of a stream share their first members."""

    def __init__(self) -> None:
        self._prefix = b""
        self._id: Span | None = None
        self._created: Span | None = None

    def scan(self, payload: bytes, chunk: dict[str, Any]) -> Scan:
        """``chunk`` is what ``payload`` says."""
        if self._prefix and payload.startswith(self._prefix):
            if "usage" not in chunk:
                return self._id, self._created, None
            if usage := _null_usage_at_end(payload):
                return self._id, self._created, usage
        return self._scan_members(payload)

    def _scan_members(self, payload: bytes) -> Scan:
        id_span = created_span = usage_span = None
        for member in members(payload):
            value = payload[member.value_start : member.value_end]
            # Azure's first chunk is nobody's and of no time: it stays so.
            if member.name == b"id" and value[:1] == b'"' and value != b'""':
                id_span = (member.value_start, member.value_end)
            elif member.name == b"created" and value[:1] in _NONZERO:
                created_span = (member.value_start, member.value_end)
            elif member.name == b"usage":
                usage_span = cut_member(payload, member)
        if id_span and created_span:
            # One byte more than the values, or a longer number would look the same.
            self._prefix = payload[: max(id_span[1], created_span[1]) + 1]
            self._id, self._created = id_span, created_span
        return id_span, created_span, usage_span


def _null_usage_at_end(payload: bytes) -> Span | None:
    """The span of ``,"usage":null`` where only the closing brace, or obfuscation, follows: so it is a top-level member."""
    start = payload.rfind(_NULL_USAGE)
    end = start + len(_NULL_USAGE)
    if start < 0 or (len(payload) != end + 1 and not _OBFUSCATION_TO_END.fullmatch(payload, end)):
        return None
    return start, end


class Spans:
    """Byte spans in ascending order."""

    __slots__ = ("lengths", "starts")

    def __init__(self, starts: Iterable[int] = (), lengths: Iterable[int] = ()) -> None:
        self.starts = array("I", starts)
        self.lengths = array("I", lengths)

    def add(self, base: int, span: Span) -> None:
        """Appends a span that is counted from ``base``."""
        start, end = span
        self.starts.append(base + start)
        self.lengths.append(end - start)

    def __iter__(self) -> Iterator[Span]:
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
    """Where the frames of ``sse`` end, when each arrived (µs), and what a reply patches or cuts.

    Two hints make most replies one join of as many slices. ``head`` is how many bytes all frames begin with
    alike, their id and created included, 0 if they do not; ``plain_frames`` is how many come before those about usage
    only, if these are the last and either each of the former names usage or none does, else 0.
    """

    ends: "array[int]" = field(default_factory=lambda: array("I"))
    at_us: "array[int]" = field(default_factory=lambda: array("Q"))
    ids: Spans = field(default_factory=Spans)
    created: Spans = field(default_factory=Spans)
    cuts: Spans = field(default_factory=Spans)
    head: int = 0
    plain_frames: int = 0

    def pack(self) -> bytes:
        """Two hints, four counts, the times (8 bytes each), then all else (4 bytes each); little-endian."""
        ids, created, cuts = self.ids, self.created, self.cuts
        counts = _HINTS_AND_COUNTS.pack(self.head, self.plain_frames, len(self.ends), len(ids), len(created), len(cuts))
        numbers = self.ends + ids.starts + ids.lengths + created.starts + created.lengths + cuts.starts + cuts.lengths
        return b"".join((counts, _little_endian(self.at_us[:]).tobytes(), _little_endian(numbers).tobytes()))

    @classmethod
    def unpack(cls, data: bytes) -> "Marks":
        """Raises `CorruptRecording`."""
        if len(data) < _HINTS_AND_COUNTS.size:
            raise CorruptRecording("the marks are cut short")
        head, plain_frames, frames, ids, created, cuts = _HINTS_AND_COUNTS.unpack_from(data)
        times_end = _HINTS_AND_COUNTS.size + 8 * frames
        if len(data) != times_end + 4 * frames + 8 * (ids + created + cuts):
            raise CorruptRecording("the marks are not as long as they say")
        times = _little_endian(array("Q", data[_HINTS_AND_COUNTS.size : times_end]))
        numbers = _little_endian(array("I", data[times_end:]))
        after_ids = frames + 2 * ids
        after_created = after_ids + 2 * created
        return cls(
            numbers[:frames],
            times,
            Spans(numbers[frames : frames + ids], numbers[frames + ids : after_ids]),
            Spans(numbers[after_ids : after_ids + created], numbers[after_ids + created : after_created]),
            Spans(numbers[after_created : after_created + cuts], numbers[after_created + cuts :]),
            head,
            plain_frames,
        )


def _little_endian(numbers: "array[int]") -> "array[int]":
    """From the machine's order, or back; in place."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


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
    frames: int = 0
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
            members = orjson.loads(data)
            for name in ("finish_reasons", "body_id", "body_created"):
                if members[name] is not None:
                    members[name] = tuple(members[name])
            meta = cls(**members)
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptRecording(f"the meta data does not load: {error!r}") from None
        numbers = (meta.written_at, meta.ttl_s, meta.duration_us, meta.frames)
        if not (isinstance(meta.id, str) and all(isinstance(number, int | float) for number in numbers)):
            raise CorruptRecording("the meta data has members of wrong types")
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
        if identity is None and usage:
            return sse
        if not marks.head or not (usage or marks.plain_frames):
            return b"".join(self.frames(identity, usage=usage))
        head = _head_of(identity, sse, marks)
        return head + head.join(_bodies(sse, marks) if usage else _plain_bodies(sse, marks))

    def frames(self, identity: Identity | None, *, usage: bool) -> list[bytes]:
        """The same, one by one. A frame about usage only is empty for a caller who did not ask for it."""
        sse, marks = self._frames()
        edits: list[tuple[int, int, bytes]] = []
        if identity:
            edits += [(start, -end, identity.id) for start, end in marks.ids]
            edits += [(start, -end, identity.created) for start, end in marks.created]
        if not usage:
            edits += [(start, -end, b"") for start, end in marks.cuts]
        # A frame that is cut whole has an identity too: the outer edit comes first and swallows the inner ones.
        edits.sort()
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


def _head_of(identity: Identity | None, sse: bytes, marks: Marks) -> bytes:
    """What all frames begin with, under a new identity if one is given."""
    head = sse[: marks.head]
    if identity is None:
        return head
    spans = [(next(iter(marks.ids)), identity.id), (next(iter(marks.created)), identity.created)]
    for (start, end), value in sorted(spans, reverse=True):
        head = head[:start] + value + head[end:]
    return head


def _bodies(sse: bytes, marks: Marks) -> list[bytes]:
    """What the frames have behind their heads."""
    head = marks.head
    return [sse[start + head : end] for start, end in zip(chain((0,), marks.ends), marks.ends, strict=False)]


def _plain_bodies(sse: bytes, marks: Marks) -> list[bytes]:
    """The same without usage."""
    head, cuts, ends = marks.head, marks.cuts, marks.ends[: marks.plain_frames]
    starts = chain((0,), ends)
    if len(cuts) < len(ends):
        return [sse[start + head : end] for start, end in zip(starts, ends, strict=False)]
    spans = zip(starts, cuts.starts, cuts.lengths, ends, strict=False)
    return [sse[start + head : cut] + sse[cut + length : end] for start, cut, length, end in spans]


def _edited(sse: bytes, ends: Sequence[int], edits: list[tuple[int, int, bytes]]) -> list[bytes]:
    """The frames with ``edits``, each a start, a negated end and what takes that span's place."""
    frames = []
    edit = at = 0
    for frame_end in ends:
        pieces: list[bytes] = []
        while edit < len(edits) and edits[edit][0] < frame_end:
            start, negated_end, value = edits[edit]
            edit += 1
            if start >= at:
                pieces += (sse[at:start], value)
                at = -negated_end
        pieces.append(sse[at:frame_end])
        at = frame_end
        frames.append(b"".join(pieces))
    return frames


class Recorder:
    """Takes the chunks of one running stream, keeps what a recording needs and feeds the ``assembler``, if there is one."""

    def __init__(self, assembler: Assembler | None = None) -> None:
        self.frames: list[Frame] = []
        self.finish_reasons: dict[int, str] = {}
        self.usage: dict[str, Any] | None = None
        self.size_bytes = 0
        self.id = ""
        self._assembler = assembler
        self._scanner = Scanner()
        self._marks = Marks()

    def add(self, payload: bytes, at_us: int) -> dict[str, Any] | None:
        """Appends a chunk to ``frames``; returns it parsed if it reports an error, which then is not appended.

        Raises `MalformedChunk`.
        """
        chunk = parse_chunk(payload)
        if chunk.get("error"):
            return chunk
        if _LF in payload or _CR in payload:
            # It would end the event's data line; in JSON it can only be white space between tokens.
            payload = payload.replace(b"\r", b" ").replace(b"\n", b" ")
        about_usage = self._learn(chunk)
        self._append(payload, self._scanner.scan(payload, chunk), at_us, about_usage=about_usage)
        if self._assembler:
            self._assembler.add(chunk)  # which takes the chunk over
        return None

    def _learn(self, chunk: dict[str, Any]) -> bool:
        """Takes note of id, finish reasons and usage; tells whether the chunk is about usage only."""
        choices = chunk.get("choices")
        for index, choice in numbered(choices):
            reason = choice.get("finish_reason")
            if reason and isinstance(reason, str):
                self.finish_reasons[index] = reason
        if not self.id and isinstance(chunk_id := chunk.get("id"), str):
            self.id = chunk_id
        usage = chunk.get("usage")
        if not (usage and isinstance(usage, dict)):
            return False
        self.usage = usage
        return not choices

    def _append(self, payload: bytes, scan: Scan, at_us: int, *, about_usage: bool) -> None:
        full = b"".join((_HEAD, payload, _TAIL))
        marks, base = self._marks, self.size_bytes
        body = base + len(_HEAD)
        id_span, created_span, usage_span = scan
        if id_span:
            marks.ids.add(body, id_span)
        if created_span:
            marks.created.add(body, created_span)
        cut = None
        if about_usage:
            cut = (0, len(full))
        elif usage_span:
            cut = (usage_span[0] + len(_HEAD), usage_span[1] + len(_HEAD))
        if cut:
            marks.cuts.add(base, cut)
        self.frames.append(Frame(full, cut, at_us))
        self.size_bytes += len(full)
        marks.ends.append(self.size_bytes)
        marks.at_us.append(at_us)

    def recording(self, meta: Meta, body: bytes) -> Recording:
        """Closes the stream. ``body`` is the assembled answer, or the upstream's own where it did not stream."""
        marks = self._marks
        marks.head = self._shared_head()
        marks.plain_frames = self._plain_frames()
        return Recording(meta, b"".join([frame.full for frame in self.frames]), marks, body)

    def _shared_head(self) -> int:
        ids, created, frames = self._marks.ids, self._marks.created, self.frames
        if not len(ids) == len(created) == len(frames) > 0:
            return 0
        end = max(next(iter(spans))[1] for spans in (ids, created))
        # One byte more than the values, or a longer number would look the same.
        head = frames[0].full[: end + 1]
        alike = all(frame.full.startswith(head) for frame in frames)
        uncut = all(frame.cut is None or frame.about_usage or frame.cut[0] >= end for frame in frames)
        return end if alike and uncut else 0

    def _plain_frames(self) -> int:
        plain = [frame for frame in self.frames if not frame.about_usage]
        about_usage_last = all(frame.about_usage for frame in self.frames[len(plain) :])
        cut = sum(frame.cut is not None for frame in plain)
        return len(plain) if about_usage_last and cut in (0, len(plain)) else 0


def body_spans(body: bytes) -> tuple[Span | None, Span | None]:
    """Where the values of ``id`` and ``created`` stand in an answer's body. Raises `MalformedChunk`."""
    id_span, created_span, _ = Scanner().scan(body, parse_chunk(body))
    return id_span, created_span

"""A stream as a recording: frames with their timing, and marks where a reply says something of its own.

Frames are kept as the upstream's own bytes. What a reply changes is found once, when the frame arrives: the values of
``id`` and ``created`` (fresh on a hit), and the member ``usage``, which reaches only a caller who asked for it. In a
recording a mark stands in their place: a control character, which no JSON text holds, so that a reply is three
replacements at the speed of memory and can touch nothing else. What stood there is kept beside it.
"""

import re
import struct
import sys
from array import array
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain
from typing import Any, NamedTuple

import orjson

from gateway.core.apis.base import Assembler, numbered
from gateway.core.json_scan import cut_member, members

SCHEMA_VERSION = 2
_HEADER = struct.Struct("<7I")
_USAGE, _ID, _CREATED = b"\x01", b"\x02", b"\x03"
_LF, _CR = b"\n\r"  # as numbers, which are found in bytes at once
_HEAD = b"data: "
_TAIL = b"\n\n"
_NULL_USAGE = b',"usage":null'
_OBFUSCATION_TO_END = re.compile(rb',"obfuscation":"[A-Za-z0-9]*"\}')
_NONZERO = b"123456789"
_NUMBERS = frozenset({int, float})
_ID_PREFIX = re.compile(r"[A-Za-z]+[-_]")
_FRESH_DIGITS = range(24, 65)  # fewer would not tell of which recording it is (see `stream_id.flight_of`)
_DEFAULT_DIGITS = 32

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
    id: Span | None
    created: Span | None

    @property
    def plain(self) -> bytes:
        full, cut = self.full, self.cut
        return full if cut is None else full[: cut[0]] + full[cut[1] :]

    @property
    def about_usage(self) -> bool:
        """Whether nothing is left of it for a caller who did not ask for usage."""
        return self.cut == (0, len(self.full))

    @property
    def payload(self) -> bytes:
        """The chunk's JSON text."""
        return payload_of(self.full)


def payload_of(frame: bytes) -> bytes:
    """The JSON text in a frame's bytes."""
    return frame[len(_HEAD) : -len(_TAIL)]


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
    """Scans the chunks of one stream. It remembers how they begin: most chunks of a stream share their first members.

    Spans are counted from ``offset`` bytes before the chunk.
    """

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset
        self._prefix = b""
        self._id: Span | None = None
        self._created: Span | None = None

    def scan(self, payload: bytes, chunk: dict[str, Any]) -> Scan:
        """``chunk`` is what ``payload`` says."""
        if self._prefix and payload.startswith(self._prefix):
            if "usage" not in chunk:
                return self._id, self._created, None
            if usage := _null_usage_at_end(payload):
                return self._id, self._created, self._shifted(*usage)
        return self._scan_members(payload)

    def _scan_members(self, payload: bytes) -> Scan:
        id_span = created_span = usage_span = None
        for member in members(payload):
            value = payload[member.value_start : member.value_end]
            # Azure's first chunk is nobody's and of no time: it stays so.
            if member.name == b"id" and value[:1] == b'"' and value != b'""':
                id_span = self._shifted(member.value_start, member.value_end)
            elif member.name == b"created" and value[:1] in _NONZERO:
                created_span = self._shifted(member.value_start, member.value_end)
            elif member.name == b"usage":
                usage_span = self._shifted(*cut_member(payload, member))
        if id_span and created_span:
            # One byte more than the values, or a longer number would look the same.
            self._prefix = payload[: max(id_span[1], created_span[1]) - self._offset + 1]
            self._id, self._created = id_span, created_span
        return id_span, created_span, usage_span

    def _shifted(self, start: int, end: int) -> Span:
        return start + self._offset, end + self._offset


def _null_usage_at_end(payload: bytes) -> Span | None:
    """The span of ``,"usage":null`` where only the closing brace, or obfuscation, follows: so it is a top-level member."""
    start = payload.rfind(_NULL_USAGE)
    end = start + len(_NULL_USAGE)
    if start < 0 or (len(payload) != end + 1 and not _OBFUSCATION_TO_END.fullmatch(payload, end)):
        return None
    return start, end


Values = tuple[bytes, ...]
"""What stands behind the marks of one kind: one for all of them, or one for each."""


@dataclass(slots=True)
class Marks:
    """When each frame of ``sse`` arrived (µs), and what stands behind its marks.

    ``size`` is that of ``sse``. A caller who did not ask for usage gets its first ``plain_size`` bytes, without the
    frames at the places in ``silent``: frames about usage only nearly always come last.
    """

    size: int = 0
    plain_size: int = 0
    at_us: "array[int]" = field(default_factory=lambda: array("Q"))
    silent: "array[int]" = field(default_factory=lambda: array("I"))
    usages: Values = ()
    ids: Values = ()
    created: Values = ()

    def pack(self) -> bytes:
        """Two sizes, five counts, the times (8 bytes each), places and lengths (4 bytes each), values; little-endian."""
        kinds = self.usages, self.ids, self.created
        header = _HEADER.pack(self.size, self.plain_size, len(self.at_us), len(self.silent), *map(len, kinds))
        values = [value for kind in kinds for value in kind]
        numbers = self.silent + array("I", map(len, values))
        return b"".join((header, _little_endian(self.at_us[:]).tobytes(), _little_endian(numbers).tobytes(), *values))

    @classmethod
    def unpack(cls, data: bytes) -> "Marks":
        """Raises `CorruptRecording`."""
        if len(data) < _HEADER.size:
            raise CorruptRecording("the marks are cut short")
        size, plain_size, frames, silent, usages, ids, created = _HEADER.unpack_from(data)
        times_end = _HEADER.size + 8 * frames
        at = times_end + 4 * (silent + usages + ids + created)
        if at > len(data):
            raise CorruptRecording("the marks are cut short")
        times = _little_endian(array("Q", data[_HEADER.size : times_end]))
        numbers = _little_endian(array("I", data[times_end:at]))
        values = []
        for length in numbers[silent:]:
            values.append(data[at : at + length])
            at += length
        if at != len(data):
            raise CorruptRecording("the marks are not as long as they say")
        kinds = tuple(values[:usages]), tuple(values[usages : usages + ids]), tuple(values[usages + ids :])
        return cls(size, plain_size, times, numbers[:silent], *kinds)


def _little_endian(numbers: "array[int]") -> "array[int]":
    """From the machine's order, or back; in place."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def first_run(flight: str) -> str:
    """What the run that begins a flight is called: so whoever has the log can tell whether that run ever wrote there."""
    return flight[:8]


class Meta(NamedTuple):
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
    flight: str = ""
    """The flight that brought the answer."""
    runs: tuple[tuple[str, int], ...] = ()
    """The runs that wrote the frames, each with the index of its first; none where the one that began the flight did."""
    stale_s: float = 0.0
    """For how long it is kept when it is no longer fresh."""
    owner: str = ""
    """Whose it is: the tenant's digest, ``shared``, or ``ns:`` and a namespace."""
    namespace: str = ""
    tags: tuple[str, ...] = ()
    sample_of: str = ""
    """The cache key of the question, where this is another sample than the first."""
    size_bytes: int = 0
    """Of frames, body and request together, before compression."""
    content: str = ""
    """A digest of what was said, where several answers of one question are kept."""

    @property
    def run(self) -> str:
        """The one that wrote the last frame: of one flight, two that know nothing of each other may both come to an end."""
        return self.runs[-1][0] if self.runs else first_run(self.flight)

    def dumps(self) -> bytes:
        return orjson.dumps(self._asdict())

    @classmethod
    def loads(cls, data: bytes) -> "Meta":
        """Raises `CorruptRecording`."""
        try:
            members = orjson.loads(data)
            members["finish_reasons"] = tuple(members["finish_reasons"])
            if members["body_id"]:
                members["body_id"] = tuple(members["body_id"])
            if members["body_created"]:
                members["body_created"] = tuple(members["body_created"])
            members["runs"] = tuple(map(tuple, members.get("runs", ())))
            members["tags"] = tuple(members.get("tags", ()))
            meta = cls(**members)
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptRecording(f"the meta data does not load: {error!r}") from None
        if not (
            isinstance(meta.id, str)
            and _are_numbers(meta.written_at, meta.ttl_s, meta.stale_s, meta.duration_us, meta.frames)
        ):
            raise CorruptRecording("the meta data has members of wrong types")
        return meta


def _are_numbers(*values: object) -> bool:
    return _NUMBERS.issuperset(map(type, values))


class Identity(NamedTuple):
    """The ``id`` and ``created`` of one reply, as JSON text."""

    id: bytes
    created: bytes

    @classmethod
    def fresh(cls, original_id: str, token: str, now: float) -> "Identity":
        """An identity of the original's shape: its prefix and length (32 where 24 to 64 do not hold it), then ``token``'s
        letters and digits, of which there are 64.
        """
        match = _ID_PREFIX.match(original_id)
        prefix = match[0] if match else ""
        length = len(original_id) - len(prefix)
        return cls(orjson.dumps(prefix + token[: length if length in _FRESH_DIGITS else _DEFAULT_DIGITS]), b"%d" % now)


@dataclass(frozen=True, slots=True)
class Recording:
    """A closed, immutable stream. A lookup loads only the parts that its reply needs; the others are None."""

    meta: Meta
    sse: bytes | None = None
    marks: Marks | None = None
    body: bytes | None = None
    request: bytes = b""
    """What was asked (JSON: ``api`` and ``body``), where that is kept. A lookup does not load it."""

    @property
    def size_bytes(self) -> int:
        return len(self.sse or b"") + len(self.body or b"") + len(self.request)

    def stream(self, identity: Identity | None, *, usage: bool) -> bytes:
        """All frames in one piece: under a fresh identity, with or without usage, else as they came."""
        sse, marks = self._frames()
        text = _filled(sse if usage else sse[: marks.plain_size], marks, identity, usage=usage)
        if usage or not marks.silent:
            return text
        return b"".join(frame for place, frame in enumerate(_split(text)) if place not in marks.silent)

    def frames(self, identity: Identity | None, *, usage: bool) -> list[bytes]:
        """The same, one by one. A frame about usage only is empty for a caller who did not ask for it."""
        sse, marks = self._frames()
        frames = _split(_filled(sse, marks, identity, usage=usage))
        if usage:
            return frames
        spoken = sse.count(_TAIL, 0, marks.plain_size)
        return [b"" if place >= spoken or place in marks.silent else frame for place, frame in enumerate(frames)]

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


def _filled(text: bytes, marks: Marks, identity: Identity | None, *, usage: bool) -> bytes:
    if marks.usages:
        text = _fill(text, _USAGE, marks.usages if usage else (b"",))
    text = _fill(text, _ID, (identity.id,) if identity else marks.ids)
    return _fill(text, _CREATED, (identity.created,) if identity else marks.created)


def _fill(text: bytes, mark: bytes, values: Values) -> bytes:
    if len(values) <= 1:
        return text.replace(mark, values[0]) if values else text
    *pieces, last = text.split(mark)
    return b"".join(chain.from_iterable(zip(pieces, values, strict=False))) + last


def _split(text: bytes) -> list[bytes]:
    """The frames of a text: an empty line ends each, and none holds one."""
    return [frame + _TAIL for frame in text.split(_TAIL)[:-1]]


class Recorder:
    """Takes the chunks of one running stream, keeps what a recording needs and feeds the ``assembler``, if there is one."""

    def __init__(self, assembler: Assembler | None = None) -> None:
        self.frames: list[Frame] = []
        self.finish_reasons: dict[int, str] = {}
        self.usage: dict[str, Any] | None = None
        self.size_bytes = 0
        self.id = ""
        self._assembler = assembler
        self._scanner = Scanner(len(_HEAD))

    def stop_assembling(self) -> None:
        """From here on only the frames are kept."""
        self._assembler = None

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
        id_span, created_span, usage_span = scan
        full = b"".join((_HEAD, payload, _TAIL))
        cut = (0, len(full)) if about_usage else usage_span
        self.frames.append(Frame(full, cut, at_us, id_span, created_span))
        self.size_bytes += len(full)

    def recording(self, meta: Meta, body: bytes, request: bytes = b"") -> Recording:
        """Closes the stream. ``body`` is the assembled answer, or the upstream's own where it did not stream."""
        marker = _Marker()
        texts = [marker.mark(frame) for frame in self.frames]
        last = len(texts)
        while last and self.frames[last - 1].about_usage:
            last -= 1
        silent = [place for place, frame in enumerate(self.frames[:last]) if frame.about_usage]
        sse = b"".join(texts)
        marks = Marks(
            size=len(sse),
            plain_size=sum(map(len, texts[:last])),
            at_us=array("Q", [frame.at_us for frame in self.frames]),
            silent=array("I", silent),
            usages=_few(marker.usages),
            ids=_few(marker.ids),
            created=_few(marker.created),
        )
        recording = Recording(meta, sse, marks, body, request)
        return replace(recording, meta=meta._replace(size_bytes=recording.size_bytes))


class _Marker:
    """Puts marks into frames, and keeps what stood there. It remembers how they begin, as a `Scanner` does."""

    def __init__(self) -> None:
        self.usages: list[bytes] = []
        self.ids: list[bytes] = []
        self.created: list[bytes] = []
        self._spans: tuple[Span | None, Span | None] | None = None
        self._beginning = self._marked = b""

    def mark(self, frame: Frame) -> bytes:
        text, spans, usage = frame.full, (frame.id, frame.created), None if frame.about_usage else frame.cut
        at = len(self._beginning)
        if spans != self._spans or not text.startswith(self._beginning) or (usage and usage[0] < at):
            return self._mark_anew(text, *spans, usage)
        self.ids.append(self.ids[-1])
        self.created.append(self.created[-1])
        if usage is None:
            return self._marked + text[at:]
        start, end = usage
        self.usages.append(text[start:end])
        return b"".join((self._marked, text[at:start], _USAGE, text[end:]))

    def _mark_anew(self, text: bytes, id_span: Span | None, created_span: Span | None, usage: Span | None) -> bytes:
        kinds = (usage, _USAGE, self.usages), (id_span, _ID, self.ids), (created_span, _CREATED, self.created)
        marked = text
        # From the last to the first, so that the spans that are left stay true.
        for span, mark, values in sorted((kind for kind in kinds if kind[0]), reverse=True, key=lambda kind: kind[0] or ()):
            start, end = span or (0, 0)
            values.append(text[start:end])
            marked = marked[:start] + mark + marked[end:]
        if id_span and created_span and not (usage and usage < max(id_span, created_span)):
            end = max(id_span[1], created_span[1])
            self._spans, self._beginning = (id_span, created_span), text[:end]
            self._marked = marked[: end + 2 - len(self.ids[-1]) - len(self.created[-1])]
        return marked


def _few(values: list[bytes]) -> Values:
    return tuple(values[:1] if len(set(values)) == 1 else values)


def content_digest(body: bytes) -> str:
    """What two answers share that say the same under other ids. Raises `MalformedChunk`."""
    return blake2b(orjson.dumps(parse_chunk(body).get("choices")), digest_size=16).hexdigest()


def body_spans(body: bytes) -> tuple[Span | None, Span | None]:
    """Where the values of ``id`` and ``created`` stand in an answer's body. Raises `MalformedChunk`."""
    id_span, created_span, _ = Scanner().scan(body, parse_chunk(body))
    return id_span, created_span

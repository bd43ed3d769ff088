"""Cursors over logs: what a request holds of an answer, whoever makes it and however it is paced."""

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import orjson

from gateway.core.content import Diverged, Skip, Trace, parse_position
from gateway.core.dialects.openai import END, KEEP_ALIVE, KEEP_ALIVE_BETWEEN_IDS, error_event, with_id
from gateway.core.pacing import INSTANT, Draw, Pace, due_by, speaks, tokens_said
from gateway.core.recording import Frame, Identity, Recording, parse_chunk, payload_of
from gateway.core.sse import encode
from gateway.core.stream_id import Cursor, format_cursor
from gateway.errors import GatewayError, InvalidRequest, ShuttingDown, StreamDiverged, StreamLost
from gateway.flight import Flight
from gateway.pacer import Pacer
from gateway.pulse import Meter

# A long recording is written in pieces of about this size, so that a slow client's backlog stays small.
_PIECE_BYTES = 65_536
_PIECE_FRAMES = 512
FROM_START = Cursor(0)
_BEHIND_THE_END = "The cursor is behind the end of the stream."
_SAID_LESS = "The run that goes on with this stream ended before all that was shown of it."

Push = Callable[[bytes], bool]
"""Sends what is due, if that can be done without waiting; tells whether it did."""


def takes_nothing(_: bytes) -> bool:
    """A `Push` that leaves everything to who has asked."""
    return False


class EventIds:
    """Puts an ``id`` on each event of one stream: the cursor to resume from after it."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._trace: Trace | None = Trace()

    def pass_by(self, payload: bytes) -> None:
        """A chunk that the caller has, or that is not shown to it."""
        if self._trace:
            self._trace.add(parse_chunk(payload))

    def lose_track(self) -> None:
        """Not all that the caller has is known: from here on its cursors say no more than a number."""
        self._trace = None

    def stamp(self, event: bytes, number: int, *, ended: bool = False) -> bytes:
        position = self._trace.position() if self._trace else ""
        return with_id(format_cursor(self._token, number, position, ended), event)


class _Ending:
    """How a stream ends for its caller, whatever it is a stream of."""

    ids: EventIds | None = None
    nonce = ""
    """What tells this reader from any other, where it can be resumed."""
    meter: Meter | None = None
    """What counts the frames that it gives."""
    over = False
    """Whether the caller had seen all there is, the end included."""
    _number = 0

    @property
    def keep_alive(self) -> bytes:
        return KEEP_ALIVE_BETWEEN_IDS if self.ids else KEEP_ALIVE

    def end_event(self, error: GatewayError | None, *, final: bool = True) -> bytes:
        """The last event. One that is not ``final``, but an end of this connection only, is no place to resume after."""
        if self.over:
            return b""
        event = error_event(error) if error else END
        return self.ids.stamp(event, self._number + 1, ended=True) if self.ids and final else event


class FlightReader(_Ending):
    """A cursor over a flight: it begins behind ``cursor``, as a reader of the run ``run`` has seen it.

    ``mirrored``: of the log, a run that did not write it has shown so much for certain (as in `Mirrored`); None for all.
    ``writer`` is the run that wrote it when that was told; another one may have taken over since, at an earlier place.
    """

    def __init__(  # noqa: PLR0913  # they are what tells where it begins
        self,
        flight: Flight,
        *,
        usage: bool,
        cursor: Cursor = FROM_START,
        run: str = "",
        mirrored: int | None = None,
        writer: str = "",
        ids: EventIds | None = None,
    ) -> None:
        self.flight = flight
        self.at = flight.count if cursor.ended else flight.base
        self.ids = ids
        self.over = cursor.ended
        self._usage = usage
        self._error: GatewayError | None = None
        self._place: _Place | None = None
        if not self.over and (cursor.after or flight.base):
            self._place = _Place(flight, cursor, run, mirrored, writer, usage=usage)
        self._rest = b""
        flight.join(self)

    async def head(self, within_s: float | None) -> Mapping[str, str] | None:
        """The upstream's headers, or None if they did not come in time. Raises the flight's error, and the cursor's."""
        flight = self.flight
        loop = asyncio.get_running_loop()
        deadline = None if within_s is None else loop.time() + within_s
        while not self.over and (flight.headers is None or self._seeks()):
            if self._error:
                raise self._error
            if flight.error and flight.headers is None:
                raise flight.error
            remaining = None if deadline is None else deadline - loop.time()
            if remaining is not None and remaining <= 0:
                return None
            await flight.changed(remaining)
        if self._error:
            raise self._error
        return {} if flight.headers is None else flight.headers

    def at_once(self) -> bytes | None:
        return None

    async def next(self, idle_s: float, push: Push = takes_nothing) -> bytes | None:  # noqa: ARG002  # for replays
        """What has come since the last call; None after ``idle_s`` without anything; empty at the end."""
        while True:
            if data := self.take():
                return data
            if self.at_end:
                return b""
            if not await self.flight.changed(idle_s):
                return None

    def take(self) -> bytes:
        """What has come since the last call, or a piece of it; empty if there is nothing."""
        if self._seeks() or self._error:  # in this order: who seeks may find an error
            return b""
        data, self._rest = self._rest, b""
        flight, before = self.flight, self.at
        while self.at < flight.count and len(data) < _PIECE_BYTES:
            start = self.at - flight.base
            data += self._rendered(flight.frames[start : start + _PIECE_FRAMES], _PIECE_BYTES - len(data))
        if self.meter and self.at > before:
            self.meter.sent(self.at - before)
        return data

    def _rendered(self, frames: Sequence[Frame], room_bytes: int) -> bytes:
        parts, size = [], 0
        for frame in frames:
            parts.append(self._shown(frame))
            self.at += 1
            size += len(parts[-1])
            if size >= room_bytes:
                break
        return b"".join(parts)

    def _shown(self, frame: Frame) -> bytes:
        if self.ids:
            self.ids.pass_by(frame.payload)
        data = frame.full if self._usage else frame.plain
        if not data:
            return b""
        self._number += 1
        return self.ids.stamp(data, self._number) if self.ids else data

    def _seeks(self) -> bool:
        """Whether it is still unknown where in the log the cursor stands."""
        place = self._place
        if place is None or self._error:
            return False
        try:
            if not place.find():
                self.at = place.at
                return True
        except GatewayError as error:
            self.cut(error)
            return False
        self._place = None
        self.at, self._number, self.over = place.at, place.number, place.over
        if self.ids:
            if self.flight.base:
                self.ids.lose_track()
            for frame in self.flight.frames[: self.at - self.flight.base]:
                self.ids.pass_by(frame.payload)
        if place.rest is not None:
            if not self._usage:
                place.rest.pop("usage", None)
            event = encode(orjson.dumps(place.rest))
            self._rest = self.ids.stamp(event, self._number) if self.ids else event
        return False

    @property
    def at_end(self) -> bool:
        if self._error:
            return True
        flight = self.flight
        return flight.outcome is not None and self._place is None and not self._rest and self.at == flight.count

    @property
    def error(self) -> GatewayError | None:
        """Why the stream ended early, if it did."""
        return self._error or self.flight.error

    def end(self) -> bytes:
        """The event that ends the stream."""
        final = self._error is None and not isinstance(self.error, ShuttingDown)
        return self.end_event(self.error, final=final)

    async def whole(self) -> bytes:
        """The assembled answer, once it is complete. Raises the flight's error."""
        while self.flight.outcome is None and self._error is None:
            await self.flight.changed()
        if self._error and not self.flight.overflowed:
            raise self._error
        body = self.flight.whole()
        if self.meter:
            self.meter.sent_whole(self.flight.count)
        return body

    async def outcome(self, within_s: float) -> tuple[bool | None, str]:
        """Whether the answer is stored, or None where that does not turn out in time; and a word for why not."""
        kept = await self.flight.is_kept(within_s)
        return kept, self.flight.why_not

    def cut(self, error: GatewayError) -> None:
        self._error = error
        self.flight.followers.discard(self)
        self.flight.wake()

    def leave(self) -> None:
        self.flight.leave(self)


class _Place:
    """Finds where a cursor stands in a log.

    Frames that are in the log have their numbers for ever. But who read from the replica that ran the call may have seen
    frames that never got there, if it died: then only the content so far tells where another run's frames go on. So may
    who read from one that only mirrored the log, and has lost it.
    """

    def __init__(  # noqa: PLR0913  # they are what a number may count
        self, flight: Flight, cursor: Cursor, run: str, mirrored: int | None, writer: str, *, usage: bool
    ) -> None:
        self._flight = flight
        self._cursor = cursor
        self._run = run
        self._mirrored = mirrored
        self._writer = writer
        self._usage = usage
        self._skip: Skip | None = None
        self.at = flight.base
        self.number = 0
        """Of the last event that the caller has."""
        self.over = False
        self.rest: dict[str, object] | None = None
        """What is left of a chunk whose beginning the caller has."""

    def find(self) -> bool:
        """Whether it is found. Raises `StreamDiverged` and `StreamLost`; where it is beyond the end, `InvalidRequest`, or
        why the flight has ended so early.
        """
        if self._skip or not self._is_numbered():
            return self._find_by_content()
        if self._find_by_number():
            return self._is_verified() or self._find_by_content()
        return False

    def _is_numbered(self) -> bool:
        """Whether the frame that the cursor counts to may be one of this log."""
        flight, cursor = self._flight, self._cursor
        if cursor.position:
            # Beyond what there is a number says nothing: a log may have been written anew by another run, in other frames.
            # But of one that has let go of its beginning it is all that tells.
            return cursor.after <= self._shown_before(flight.count) or (flight.base > 0 and len(flight.runs) == 1)
        seen = flight.run_ended_at(self._run) if flight.knows(self._run) else self._seen_in_log()
        return seen is None or not cursor.after or cursor.after <= self._shown_before(seen)

    def _seen_in_log(self) -> int | None:
        """How much of the log the readers of a run have seen for certain that did not write it; None for all of it."""
        flight, writer = self._flight, self._writer
        if flight.alone:
            return 0
        if not writer or flight.headers is None:
            return self._mirrored  # who has written it by now is not known yet
        told = self._mirrored, flight.run_ended_at(writer) if flight.knows(writer) else 0
        return min((index for index in told if index is not None), default=None)

    def _is_verified(self) -> bool:
        """Whether the content is what the cursor says, if it says anything."""
        flight, position = self._flight, self._cursor.position
        if not position or flight.base:
            return True
        trace = Trace()
        for frame in flight.frames[: self.at]:
            trace.add(parse_chunk(frame.payload))
        return trace.position() == position

    def _shown_before(self, index: int) -> int:
        """How many of the frames before ``index`` such a caller sees."""
        flight = self._flight
        if self._usage:
            return index
        hidden = sum(frame.about_usage for frame in flight.frames[: max(0, index - flight.base)])
        return index - flight.hidden_before_base - hidden

    def _find_by_number(self) -> bool:
        flight, after = self._flight, self._cursor.after
        number = self._shown_before(flight.base)
        if after < number:
            raise StreamLost("What comes next was too long ago: it is no longer kept.")
        for place, frame in enumerate(flight.frames):
            if number == after:
                self.at, self.number = flight.base + place, number
                return True
            number += self._usage or not frame.about_usage
        if after > number and flight.outcome is None:
            self.at = flight.count  # of what has come, nothing is needed
            return False
        if after > number and self._cursor.position:
            raise flight.error or StreamDiverged(_SAID_LESS)
        if after > number + 1:
            raise flight.error or InvalidRequest(_BEHIND_THE_END, param="after")
        self.at, self.number, self.over = flight.count, after, after > number
        return True

    def _find_by_content(self) -> bool:
        flight = self._flight
        if flight.base > (self.at if self._skip else 0):
            raise StreamLost("What comes next was too long ago: it is no longer kept.")
        if not self._cursor.position:
            raise StreamDiverged(
                "Not all that the caller has seen of this stream is known here, and the cursor does not say what it was."
            )
        if self._skip is None:
            self._skip = Skip(*parse_position(self._cursor.position))
            self.at, self.number, self.over = 0, 0, False
        try:
            while not self._skip.reached and self.at < flight.count:
                frame = flight.frames[self.at - flight.base]
                self.rest = self._skip.feed(parse_chunk(frame.payload))
                self.at += 1
                self.number += self._usage or not frame.about_usage
        except Diverged as error:
            raise StreamDiverged(str(error)) from None
        if not self._skip.reached and flight.outcome is not None:
            raise flight.error or StreamDiverged(_SAID_LESS)
        return self._skip.reached


# Of a pace that never draws: seeding one for each replay would be a fiftieth of what a hit costs.
_NO_CHANCE: Final[Draw] = random.Random(0)  # noqa: S311


class RecordingReader(_Ending):
    """A cursor over a recording, at a pace: it begins behind ``cursor``.

    The schedule counts from ``began_s`` on, by the pacer's clock, so that lateness never adds up.
    """

    def __init__(  # noqa: PLR0913  # they are what a replay is made of
        self,
        recording: Recording,
        identity: Identity | None,
        *,
        usage: bool,
        pacer: Pacer,
        pace: Pace = INSTANT,
        draw: Draw | None = None,
        cursor: Cursor = FROM_START,
        ids: EventIds | None = None,
    ) -> None:
        self.recording = recording
        self.error: GatewayError | None = None
        self.ids = ids
        self.began_s = pacer.now()
        self._identity = identity
        self._usage = usage
        self._pacer = pacer
        self._pace = pace
        self._draw = draw or _NO_CHANCE
        self._behind = cursor
        self._next = 0
        self._frames: list[bytes] | None = None
        self._schedule: list[float] = []
        self._waiter: asyncio.Future[bytes | None] | None = None
        self._push: Push = takes_nothing
        self._idle_s = self._silent_until_s = 0.0

    async def head(self, within_s: float | None) -> Mapping[str, str] | None:  # noqa: ARG002  # a recording's is there
        """Raises `InvalidRequest` where there is no such place to begin, `StreamDiverged` where something else was seen."""
        if self._behind != FROM_START:
            self._load()
        return {}

    def at_once(self) -> bytes | None:
        """The whole stream, where nothing stands against sending it in one write."""
        if (
            self.ids
            or self._behind != FROM_START
            or not self._pace.is_instant
            or len(self.recording.sse or b"") > 4 * _PIECE_BYTES
        ):
            return None
        if self.meter:
            self.meter.sent(self.recording.meta.frames)
        return self.recording.stream(self._identity, usage=self._usage)

    async def next(self, idle_s: float, push: Push = takes_nothing) -> bytes | None:
        """The frames that are due, together; None after ``idle_s`` in which none was; empty at the end.

        What falls due while this waits is pushed, as long as that is taken: then nobody need wake up for it.
        """
        self._load()
        now_s = self._pacer.now()
        data = self._due(now_s)
        if data or self.at_end:
            return data
        self._push, self._idle_s, self._silent_until_s = push, idle_s, now_s + idle_s
        return await self._wait(min(self._next_due_s(), self._silent_until_s))

    def tick(self, now_s: float) -> float | None:
        """See `Paced`."""
        try:
            data = self._due(now_s)
            if data and not self.at_end and self._push(data):
                self._silent_until_s = now_s + self._idle_s
            elif data or self.at_end or now_s >= self._silent_until_s:
                self._settle(data or (b"" if self.at_end else None))
                return None
        except Exception as error:  # noqa: BLE001  # it is for who waits, and stops nobody else
            if self._waiter and not self._waiter.done():
                self._waiter.set_exception(error)
            return None
        return min(self._next_due_s(), self._silent_until_s)

    @property
    def at_end(self) -> bool:
        return self.error is not None or (self._frames is not None and self._next == len(self._frames))

    def end(self) -> bytes:
        """The event that ends the stream."""
        return self.end_event(self.error, final=self.error is None)

    async def whole(self) -> bytes:
        """The assembled body, at the time at which its last frame is due."""
        body = self.recording.whole(self._identity)
        if not self._pace.is_instant and not self.error:
            # One frame, which is due with the last of the stream.
            self._frames, self._schedule, self._silent_until_s = [b""], [self._duration_s()], math.inf
            await self._wait(self._next_due_s())
        if self.error:
            raise self.error
        if self.meter:
            self.meter.sent_whole(self.recording.meta.frames)
        return body

    async def outcome(self, within_s: float) -> tuple[bool | None, str]:  # noqa: ARG002  # a recording's is known
        """Nothing was to be stored."""
        return None, ""

    def cut(self, error: GatewayError) -> None:
        """Ends the replay early, with an error that its caller is told."""
        self.error = error
        self._settle(b"")

    def leave(self) -> None:
        pass

    def _load(self) -> list[bytes]:
        if self._frames is None:
            self._frames = self.recording.frames(self._identity, usage=self._usage)
            self._schedule = self._scheduled(self._frames)
            if self.ids or self._behind != FROM_START:
                self._begin_behind(self._frames)
        return self._frames

    def _scheduled(self, frames: list[bytes]) -> list[float]:
        marks = self.recording.marks
        at_us = marks.at_us if marks else ()
        if not self._pace.counts_tokens:
            return self._pace.schedule(at_us, self._draw)
        speaking = _speaking(frames)
        tokens, spoken = tokens_said(self.recording.meta.usage), sum(speaking)
        return self._pace.schedule(at_us, self._draw, speaking, tokens / spoken if tokens and spoken else 1.0)

    def _begin_behind(self, frames: list[bytes]) -> None:
        """Puts ids on the events, and leaves out those that the caller has."""
        first, rest = self._first_unseen(frames)
        for place, frame in enumerate(frames):
            if not frame:
                continue
            self._number += 1
            if self.ids:
                self.ids.pass_by(payload_of(frame))
            if place < first:
                frames[place] = b""
                continue
            if place == first and rest is not None:
                frame = encode(orjson.dumps(rest))  # noqa: PLW2901  # what is left of it
            frames[place] = self.ids.stamp(frame, self._number) if self.ids else frame

    def _first_unseen(self, frames: list[bytes]) -> tuple[int, dict[str, object] | None]:
        """The place of the first frame that the caller has not, or not all of; and what is left of that."""
        behind, shown = self._behind, [place for place, frame in enumerate(frames) if frame]
        if behind.ended or (behind.after == len(shown) + 1 and not behind.position):
            self.over = True
            return len(frames), None
        if behind.after <= len(shown):
            first = shown[behind.after - 1] + 1 if behind.after else 0
            if not behind.position or _position(frames[:first]) == behind.position:
                return first, None
        elif not behind.position:
            raise InvalidRequest(_BEHIND_THE_END, param="after")
        return _first_unsaid(frames, Skip(*parse_position(behind.position)))

    def _due(self, now_s: float) -> bytes:
        """What is due by now, or a piece of it; the cursor goes on behind it."""
        frames, start, size = self._frames or [], self._next, 0
        if self.error:
            return b""
        end = due_by(self._schedule, start, now_s - self.began_s)
        while self._next < end and size < _PIECE_BYTES:
            size += len(frames[self._next])
            self._next += 1
        if self.meter and self._next > start:
            if not self._pace.is_instant:
                self.meter.late(now_s - self.began_s - self._schedule[start])
            self.meter.sent(self._next - start)
        return frames[start] if self._next == start + 1 else b"".join(frames[start : self._next])

    @property
    def last_due_s(self) -> float:
        """When the last frame was due that was given or pushed, by the pacer's clock."""
        return self.began_s + self._schedule[self._next - 1]

    def _next_due_s(self) -> float:
        return self.began_s + self._schedule[self._next]

    def _duration_s(self) -> float:
        """How long it takes to the last frame."""
        meta, marks = self.recording.meta, self.recording.marks
        if self._pace.counts_tokens:
            return self._pace.schedule([0] * max(1, tokens_said(meta.usage) or meta.frames), self._draw)[-1]
        at_us = marks.at_us if marks and marks.at_us else [meta.duration_us]
        return self._pace.schedule(at_us, self._draw)[-1]

    async def _wait(self, until_s: float) -> bytes | None:
        """What `tick` has not pushed."""
        self._waiter = asyncio.get_running_loop().create_future()
        turn = self._pacer.call(self, until_s)
        try:
            return await self._waiter
        finally:
            self._pacer.forget(turn)
            self._waiter = None

    def _settle(self, data: bytes | None) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(data)


def _position(frames: Iterable[bytes]) -> str:
    """What a caller has seen who has these; those that are empty were not shown."""
    trace = Trace()
    for frame in filter(None, frames):
        trace.add(parse_chunk(payload_of(frame)))
    return trace.position()


def _first_unsaid(frames: Iterable[bytes], skip: Skip) -> tuple[int, dict[str, object] | None]:
    """The place at which the frames of another run go on, and what is left of that one. Raises `StreamDiverged`."""
    try:
        for place, frame in enumerate(frames):
            rest = skip.feed(parse_chunk(payload_of(frame))) if frame and not skip.reached else None
            if skip.reached:
                return (place, rest) if rest is not None else (place + 1, None)
    except Diverged as error:
        raise StreamDiverged(str(error)) from None
    raise StreamDiverged(_SAID_LESS)


def _speaking(frames: Sequence[bytes]) -> list[bool]:
    """Which frames say something. Those between two that do are taken for tokens: a model needed time for them, too, and
    to read all of a long recording would make others late.
    """

    def says(place: int) -> bool:
        return bool(frames[place]) and speaks(parse_chunk(payload_of(frames[place])))

    first = next(filter(says, range(len(frames))), len(frames))
    last = next(filter(says, reversed(range(first, len(frames)))), first)
    return [first <= place <= last for place in range(len(frames))]


class StandIn:
    """A reader in whose place another answer may be read, should this one fail before any of it was shown."""

    def __init__(
        self, reader: FlightReader, instead: Callable[[GatewayError], Awaitable[FlightReader | RecordingReader | None]]
    ) -> None:
        self.reader: FlightReader | RecordingReader = reader
        """Whose answer it is by now."""
        self._instead = instead
        self._shown = False

    @property
    def at_end(self) -> bool:
        return self.reader.at_end

    @property
    def over(self) -> bool:
        return self.reader.over

    @property
    def error(self) -> GatewayError | None:
        """Why the stream ended early, if it did."""
        return self.reader.error

    @property
    def keep_alive(self) -> bytes:
        return self.reader.keep_alive

    def at_once(self) -> bytes | None:
        return None

    async def head(self, within_s: float | None) -> Mapping[str, str] | None:
        """As `FlightReader.head`."""
        try:
            return await self.reader.head(within_s)
        except GatewayError as error:
            await self._stand_in(error)
            return await self.reader.head(within_s)

    async def next(self, idle_s: float, push: Push = takes_nothing) -> bytes | None:
        """As `FlightReader.next`."""
        data = await self.reader.next(idle_s, push)
        if data == b"" and self.reader.error and not self._shown:
            with suppress(GatewayError):  # then the stream ends with it
                await self._stand_in(self.reader.error)
                data = await self.reader.next(idle_s, push)
        self._shown = self._shown or bool(data)
        return data

    def end(self) -> bytes:
        """The event that ends the stream."""
        return self.reader.end()

    async def whole(self) -> bytes:
        """As `FlightReader.whole`."""
        try:
            return await self.reader.whole()
        except GatewayError as error:
            await self._stand_in(error)
            return await self.reader.whole()

    async def outcome(self, within_s: float) -> tuple[bool | None, str]:
        """As `FlightReader.outcome`."""
        return await self.reader.outcome(within_s)

    async def _stand_in(self, error: GatewayError) -> None:
        """From here on another answer is read. Raises ``error`` where there is none."""
        instead = await self._instead(error)
        if instead is None:
            raise error
        self.reader.leave()
        instead.meter = self.reader.meter
        self.reader = instead
        self._shown = True


Reader = FlightReader | RecordingReader | StandIn

"""Cursors over logs: what a request holds of an answer, whoever makes it and however it is paced."""

import asyncio
from collections.abc import Mapping

from gateway.core.pacing import Pace, due_by
from gateway.core.recording import Identity, Recording
from gateway.errors import GatewayError
from gateway.flight import Failed, Flight, settle
from gateway.ports import Clock

# A long recording is written in pieces of about this size, so that a slow client's backlog stays small.
_PIECE_BYTES = 65_536


class FlightReader:
    """A cursor over a flight."""

    def __init__(self, flight: Flight, *, usage: bool) -> None:
        self.flight = flight
        self._usage = usage
        self._cursor = 0
        flight.readers += 1

    async def head(self, within_s: float | None) -> Mapping[str, str] | None:
        """The upstream's headers, or None if they did not come in time. Raises the flight's error."""
        flight = self.flight
        loop = asyncio.get_running_loop()
        deadline = None if within_s is None else loop.time() + within_s
        while flight.headers is None:
            if isinstance(flight.outcome, Failed):
                raise flight.outcome.error
            remaining = None if deadline is None else deadline - loop.time()
            if remaining is not None and remaining <= 0:
                return None
            await flight.changed(remaining)
        return flight.headers

    def at_once(self) -> bytes | None:
        return None

    async def next(self, idle_s: float) -> bytes | None:
        """What has come since the last call; None after ``idle_s`` without anything; empty at the end."""
        flight = self.flight
        while True:
            if self._cursor < len(flight.frames):
                frames = flight.frames[self._cursor :]
                self._cursor += len(frames)
                if data := b"".join([frame.full if self._usage else frame.plain for frame in frames]):
                    return data
            elif flight.outcome:
                return b""
            elif not await flight.changed(idle_s):
                return None

    @property
    def at_end(self) -> bool:
        return self.flight.outcome is not None and self._cursor == len(self.flight.frames)

    @property
    def error(self) -> GatewayError | None:
        """Why the log ended early, if it did."""
        return self.flight.outcome.error if isinstance(self.flight.outcome, Failed) else None

    async def whole(self) -> bytes:
        """The assembled answer, once it is complete. Raises the flight's error."""
        while self.flight.outcome is None:
            await self.flight.changed()
        return self.flight.whole()

    def leave(self) -> None:
        self.flight.leave()


class RecordingReader:
    """A cursor over a recording, at a pace."""

    def __init__(self, recording: Recording, identity: Identity | None, *, usage: bool, pace: Pace, clock: Clock) -> None:
        self.recording = recording
        self.error: GatewayError | None = None
        self._identity = identity
        self._usage = usage
        self._pace = pace
        self._clock = clock
        self._began = clock.monotonic()
        self._cursor = 0
        self._frames: list[bytes] | None = None
        self._schedule: list[float] = []
        self._waiter: asyncio.Future[bool] | None = None

    async def head(self, within_s: float | None) -> Mapping[str, str] | None:  # noqa: ARG002  # a recording's is there
        return {}

    def at_once(self) -> bytes | None:
        """The whole stream, where nothing stands against sending it in one write."""
        if self._pace.kind != "instant" or len(self.recording.sse or b"") > 4 * _PIECE_BYTES:
            return None
        return self.recording.stream(self._identity, usage=self._usage)

    async def next(self, idle_s: float) -> bytes | None:
        """The frames that are due, together; None after ``idle_s`` in which none was; empty at the end."""
        frames = self._load()
        while not self.at_end:
            end = due_by(self._schedule, self._cursor, self._clock.monotonic() - self._began)
            if end > self._cursor:
                if data := self._take(frames, end):
                    return data
                continue
            wait_s = self._began + self._schedule[self._cursor] - self._clock.monotonic()
            interrupted = await self._sleep(min(wait_s, idle_s))
            if not interrupted and wait_s > idle_s:
                return None
        return b""

    @property
    def at_end(self) -> bool:
        return self.error is not None or (self._frames is not None and self._cursor == len(self._frames))

    async def whole(self) -> bytes:
        """The assembled body, at the time at which its last frame is due."""
        body = self.recording.whole(self._identity)
        due_s = self._duration_s()
        while not self.error and (wait_s := self._began + due_s - self._clock.monotonic()) > 0:
            await self._sleep(wait_s)
        if self.error:
            raise self.error
        return body

    def interrupt(self, error: GatewayError) -> None:
        """Ends the replay early, with an error that its caller is told."""
        self.error = error
        if self._waiter:
            settle(self._waiter, True)

    def leave(self) -> None:
        pass

    def _load(self) -> list[bytes]:
        if self._frames is None:
            self._frames = self.recording.frames(self._identity, usage=self._usage)
            marks = self.recording.marks
            self._schedule = self._pace.schedule(marks.at_us if marks else ())
        return self._frames

    def _take(self, frames: list[bytes], end: int) -> bytes:
        start = self._cursor
        size = 0
        while self._cursor < end and size < _PIECE_BYTES:
            size += len(frames[self._cursor])
            self._cursor += 1
        return b"".join(frames[start : self._cursor])

    def _duration_s(self) -> float:
        frames, duration_us = self.recording.meta.frames, self.recording.meta.duration_us
        if self._pace.kind == "fixed":
            return frames / self._pace.frames_per_s
        return self._pace.schedule([duration_us])[-1]

    async def _sleep(self, seconds: float) -> bool:
        """Whether the sleep was interrupted."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(seconds, settle, self._waiter, False)
        try:
            return await self._waiter
        finally:
            timer.cancel()
            self._waiter = None


Reader = FlightReader | RecordingReader

"""A running call and its open log. asyncio, but no sockets, and no tasks of its own.

A flight is owned by the table of flights, never by a request: the first caller is a reader like any other, and a
reader holds nothing but a cursor, so neither a slow nor a vanished one disturbs anybody. Who appends, the pump of an
upstream call or the mirror of another replica's log, is nothing to its readers.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import orjson

from gateway.core.apis import Api, Assembler
from gateway.core.dialects.openai import DONE
from gateway.core.purge import Labels
from gateway.core.recording import Frame, MalformedChunk, Recorder, Recording, first_run, parse_chunk, payload_of
from gateway.errors import (
    AnswerTooLarge,
    GatewayError,
    ReaderTooSlow,
    StreamCancelled,
    UpstreamBroke,
    UpstreamReported,
)
from gateway.limits import Held
from gateway.ports import FlightId, LogName, Served

_MAX_BYTES = 33_554_432


@dataclass(frozen=True, slots=True)
class Complete:
    """The upstream said all it had to say."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer ended early; every reader is told ``error``."""

    error: GatewayError


@dataclass(frozen=True, slots=True)
class Abandoned:
    """Nobody was left to read it, and it was not worth finishing."""

    error: GatewayError


Outcome = Complete | Failed | Abandoned

Resolution = Literal["led", "followed", "landed"]
"""Who makes the answer: this replica, another one, or nobody, since its recording has landed meanwhile."""


class Follower(Protocol):
    """Somebody who still needs a part of the log: all from the frame ``at`` on."""

    at: int

    def cut(self, error: GatewayError) -> None:
        """The log can wait for it no longer, or it was told to stop."""
        ...


class Flight:
    """One running upstream call: an append-only log of frames that any number of readers follow.

    Past ``max_bytes`` it lets go of what all its readers have read, and of readers that are further behind than that.
    """

    def __init__(  # noqa: PLR0913, PLR0915  # they are what a flight is
        self,
        api: Api,
        name: LogName | None,
        run: str,
        *,
        started_at: float,
        max_bytes: int = _MAX_BYTES,
        assemble: bool = True,
        held: Held | None = None,
    ) -> None:
        self.api = api
        self.name = name
        """Where the log is shared; None for one that nobody else may see."""
        self.run = run
        """What this replica's run of the call is, or would be called."""
        self.runs: list[tuple[str, int]] = [(first_run(name.flight) if name else run, 0)]
        """Whose frames these are: each run with the index of its first frame."""
        self.started_at = started_at
        self.outcome: Outcome | None = None
        self.headers: Mapping[str, str] | None = None
        """The upstream's, once its head has come."""
        self.recording: Recording | None = None
        """Set between the end of a storable answer and some time after its arrival in the store."""
        self.why_not = ""
        """A word for why the answer is not stored, once that is known."""
        self.kept: bool | None = None
        """Whether the answer has been stored; None until that is known."""
        self.served: Served | None = None
        """Who has answered, where that is another than was asked."""
        self.labels: Labels | None = None
        """What a purge may know it by."""
        self.purged = False
        """Whether a purge has come since it began: it takes no more readers, and is not stored."""
        self.background = False
        """Whether it was begun for the store, and nobody waits for it."""
        self.replaces = False
        """Whether something was stored that would not do for who began it: for others it may, while this runs."""
        self.retired = False
        self.resolution: Resolution | None = None
        """None until it is known."""
        self.instead: Flight | None = None
        """The flight to join in the place of this one, which was the second of its kind here."""
        self.streamed = True
        self.overflowed = False
        """Whether it has become larger than it may: it takes no more readers, and is not stored."""
        self.in_doubt = False
        """Whether a second run has still to say what the first one had shown: until then nobody joins, since it may not."""
        self.alone = False
        """Whether this replica has gone on with another's log as a run of its own that is not known to be in any log."""
        self.cancelled: set[str] = set()
        """The readers that were cancelled for good."""
        self.dismissed = False
        """Whether the last reader has not just gone, but was cancelled."""
        self.base = 0
        """The index of the first frame that is still there."""
        self.hidden_before_base = 0
        """How many of those that are gone were about usage only."""
        self.followers: set[Follower] = set()
        self.readers = 0
        self.joins = 0
        """How many readers there ever were."""
        self.on_read: Callable[[], object] = _nothing
        """Called when the first reader has come, or come back."""
        self.on_unread: Callable[[], object] = _nothing
        """Called when the last reader has gone."""
        self.max_bytes = max_bytes
        self._dropped_bytes = 0
        self._holding = held.holding() if held else None
        self._assembler = api.assembler() if assemble else None
        self.recorder = Recorder(self._assembler)
        self.frames: list[Frame] = self.recorder.frames
        self._whole: bytes | None = None
        self._waiters: list[asyncio.Future[bool]] = []

    def __repr__(self) -> str:
        state = type(self.outcome).__name__ if self.outcome else "open"
        return f"<Flight {self.api.name} {self.id} frames={self.count} readers={self.readers} {state}>"

    @property
    def id(self) -> FlightId | None:
        return self.name.flight if self.name else None

    @property
    def count(self) -> int:
        """How many frames have come."""
        return self.base + len(self.frames)

    @property
    def is_joinable(self) -> bool:
        """Whether newcomers may still read it from its beginning to a good end."""
        return not (self.error or self.overflowed or self.in_doubt or self.purged)

    @property
    def error(self) -> GatewayError | None:
        """Why it ended early, if it did."""
        return None if self.outcome is None or isinstance(self.outcome, Complete) else self.outcome.error

    def resolve(self, resolution: Resolution) -> None:
        self.resolution = resolution
        self.wake()

    async def resolved(self) -> Resolution:
        """Waits until it is known who makes the answer."""
        while self.resolution is None:
            if self.outcome:
                return "led"
            await self.changed()
        return self.resolution

    def land_head(self, headers: Mapping[str, str]) -> None:
        """The upstream has answered: readers may send their heads."""
        self.headers = headers
        self.wake()

    def append(self, batch: Iterable[bytes], at_us: int) -> bool:
        """Adds the chunks of a batch to the log; tells whether ``[DONE]`` was among them.

        Raises `UpstreamReported` and `UpstreamBroke`; what came before the bad chunk stays in the log.
        """
        done = False
        try:
            for payload in batch:
                if payload.startswith(DONE):
                    if not self.count:
                        raise UpstreamBroke("The upstream's stream ended without an answer.")
                    done = True
                    break
                if payload and (reported := self.recorder.add(payload, at_us)):
                    raise UpstreamReported(reported["error"])
        except MalformedChunk as error:
            raise UpstreamBroke(f"The upstream sent a broken stream: {error}.") from None
        finally:
            if not done:
                self._grew()
        return done

    def copy(self, frames: Sequence[bytes], at_us: Sequence[int]) -> None:
        """Adds frames as another log holds them. Raises `UpstreamBroke` where they are none."""
        try:
            for frame, arrived_us in zip(frames, at_us, strict=True):
                self.recorder.add(payload_of(frame), arrived_us)
        except MalformedChunk:
            raise UpstreamBroke("The shared log is broken.") from None
        finally:
            self._grew()

    def take_whole(self, body: bytes, at_us: int) -> None:
        """Fills the log from an unstreamed answer; the body is kept as it came. Raises `UpstreamBroke`."""
        payloads = self.split(body)
        self.keep_whole(body)
        self.append(payloads, at_us)

    def split(self, body: bytes) -> list[bytes]:
        """The chunks of an unstreamed answer. Raises `UpstreamBroke`."""
        try:
            chunks = self.api.split(orjson.loads(body))
        except (AttributeError, TypeError, ValueError):
            raise UpstreamBroke("The upstream's answer is not of the API's shape.") from None
        if not chunks:
            raise UpstreamBroke("The upstream's answer has no choices.")
        return [_json(chunk) for chunk in chunks]

    def keep_whole(self, body: bytes) -> None:
        """The answer was not streamed, and this is what it was."""
        self._whole = body
        self.streamed = False

    def close(self, outcome: Outcome) -> None:
        """Ends the log; the first outcome holds."""
        if self.outcome is None:
            self.outcome = outcome
            self.wake()

    def seal(self, recording: Recording) -> None:
        """From now on the answer is a recording: newcomers are served from it."""
        self.recording = recording
        self._count_bytes()
        self.wake()

    def retire(self) -> None:
        """The table lets go of this flight, and it of the table: what refers to itself lives on until it is collected."""
        self.retired = True
        self.on_read = self.on_unread = _nothing
        self._count_bytes()
        self.wake()

    def keep(self, *, kept: bool, why_not: str = "") -> None:
        """It is known now whether the answer has been stored."""
        self.kept = kept
        self.why_not = why_not or self.why_not
        self.wake()

    async def is_kept(self, within_s: float) -> bool | None:
        """Whether the answer of a flight that has ended is stored; None where that does not turn out in time."""
        deadline = asyncio.get_running_loop().time() + within_s
        while self.kept is None and not self.retired:
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0 or not await self.changed(left_s):
                break
        return self.kept

    async def sealed(self) -> Recording | None:
        """The recording of a flight that has ended; None if it is not to be stored."""
        while self.recording is None and not self.retired:
            await self.changed()
        return self.recording

    async def changed(self, idle_s: float | None = None) -> bool:
        """Waits for the head, a frame or the end; tells whether one came within ``idle_s``."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        self._waiters.append(waiter)
        if idle_s is None:
            return await waiter
        timer = loop.call_later(idle_s, settle, waiter, False)
        try:
            return await waiter
        finally:
            timer.cancel()

    def wake(self) -> None:
        """Something that somebody may wait for has happened."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            settle(waiter, True)

    def whole(self) -> bytes:
        """The assembled answer of a flight that has ended, or become too large; raises its error."""
        if self.error:
            raise self.error
        if self._whole is None:
            if self.overflowed:
                raise AnswerTooLarge("The answer is too large to be given in one piece; ask for a stream.")
            self._whole = _json((self._assembler or self._assembled()).body())
        return self._whole

    def _assembled(self) -> Assembler:
        """Of all frames, where they were not assembled as they came."""
        assembler = self.api.assembler()
        for frame in self.frames:
            assembler.add(parse_chunk(frame.payload))
        return assembler

    def knows(self, run: str) -> bool:
        """Whether `run_ended_at` tells all about that run: it is this replica's, or one that wrote the log."""
        is_first = self.name is not None and run == first_run(self.name.flight)
        return is_first or run == self.run or any(run == name for name, _ in self.runs)

    def run_ended_at(self, run: str) -> int | None:
        """The index at which another run took over from this one; None where none did, or it has only read here."""
        if self.name and run == first_run(self.name.flight) and all(run != name for name, _ in self.runs):
            return 0  # it never wrote here: what its callers saw is nowhere else
        for (name, _), (_, first_of_next) in zip(self.runs, self.runs[1:], strict=False):
            if name == run:
                return first_of_next
        return None

    def join(self, reader: Follower) -> None:
        self.readers += 1
        self.joins += 1
        self.followers.add(reader)
        if self.readers == 1:
            self._count_bytes()
            self.on_read()

    def leave(self, reader: Follower) -> None:
        self.readers -= 1
        self.followers.discard(reader)
        if not self.readers:
            self._count_bytes()
        self.check_readers(dismissed=getattr(reader, "nonce", None) in self.cancelled)

    def check_readers(self, *, dismissed: bool) -> None:
        """Tells where nobody reads any longer; ``dismissed``: because the last reader was cancelled."""
        if self.readers == 0 and self.outcome is None:
            self.dismissed = dismissed
            self.on_unread()

    def cancel(self, readers: Iterable[str]) -> None:
        """Ends readers for good; nobody else notices."""
        new = set(readers) - self.cancelled
        if not new:
            return
        self.cancelled |= new
        for follower in list(self.followers):
            if getattr(follower, "nonce", None) in new:
                follower.cut(StreamCancelled("The stream was cancelled."))
        self.wake()
        self.check_readers(dismissed=True)

    def _grew(self) -> None:
        if self.recorder.size_bytes - self._dropped_bytes > self.max_bytes:
            self._make_room()
        self._count_bytes()
        self.wake()

    def _count_bytes(self) -> None:
        """What is in memory because of it: nothing once neither the table nor a reader holds it."""
        if self._holding is None:
            return
        size_bytes = 0
        if self.readers or not self.retired:
            size_bytes = self.recorder.size_bytes - self._dropped_bytes + len(self._whole or b"")
            if self.recording:
                size_bytes += self.recording.size_bytes
        self._holding.become(size_bytes)

    def _make_room(self) -> None:
        self.overflowed = True
        if self._whole is not None:
            return  # which is in memory anyway
        self.recorder.stop_assembling()
        self._assembler = None
        self._drop(min((follower.at for follower in self.followers), default=self.count))
        keep_from, excess = self.base, self.recorder.size_bytes - self._dropped_bytes - self.max_bytes
        while excess > 0:
            excess -= len(self.frames[keep_from - self.base].full)
            keep_from += 1
        for follower in [follower for follower in self.followers if follower.at < keep_from]:
            follower.cut(ReaderTooSlow(f"The stream is more than {self.max_bytes} bytes ahead of its reader."))
        self._drop(keep_from)

    def _drop(self, before: int) -> None:
        gone = self.frames[: before - self.base]
        self._dropped_bytes += sum(len(frame.full) for frame in gone)
        self.hidden_before_base += sum(frame.about_usage for frame in gone)
        del self.frames[: len(gone)]
        self.base += len(gone)


def _nothing() -> None:
    """Nobody is to be told."""


def _json(value: object) -> bytes:
    try:
        return orjson.dumps(value)
    except (TypeError, RecursionError):  # what a parser takes may be nested deeper than what a writer gives
        raise UpstreamBroke("The upstream's answer is nested too deeply.") from None


def settle(waiter: "asyncio.Future[bool]", value: bool) -> None:  # noqa: FBT001  # a callback's argument
    if not waiter.done():
        waiter.set_result(value)

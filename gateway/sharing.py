"""The logs that this replica writes for the others: batches of frames, heartbeats, and the end.

Nothing here is on the way of a token to its caller. One task a process sends what is due of all flights in one go, so
that commands to the store do not grow with tokens.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import orjson

from gateway.core.recording import Recording
from gateway.errors import GatewayError, StoreError, StoreFenced, StoreUnavailable, told
from gateway.flight import Abandoned, Complete, Failed, Flight, Outcome
from gateway.ports import Appended, Batch, FlightId, LogName, Store, Writer

log = logging.getLogger(__name__)

# How long frames may wait to be appended. Where another replica reads along, a frame reaches it within the short time;
# where none does, the log serves only those who come later, and fewer, larger batches do as well.
_HEARD_S = 0.01
_UNHEARD_S = 0.1
_AGAIN_S = 0.5
_TIMER_STEP_S = 0.001  # uvloop's timers have no finer one, and may be early by half of it
_HEARTBEATS_PER_LEASE = 4
_MAX_UNTOLD = 1000
_BATCH_BYTES = 1_048_576
# A log that is written anew again and again is one that the store cannot keep.
_MAX_ROUNDS = 1000


@dataclass(frozen=True, slots=True)
class Terms:
    """How long a lease holds without a sign of life, and how much of a flight is kept."""

    lease_s: float = 5.0
    max_flight_bytes: int = 33_554_432


class Shared:
    """A flight's log as this replica writes it. A follower of the flight, since what is not yet shared must not go."""

    def __init__(
        self, flight: Flight, name: LogName, writer: Writer, *, request: Callable[[], bytes], joinable: bool
    ) -> None:
        self.flight = flight
        self.name = name
        self.writer = writer
        self.on_fenced: Callable[[Shared, bool], object] = lambda _, __: None
        """Called when no more can be written; tells of which log, and whether it is still this writer's."""
        self.at = flight.count
        """How many frames the log holds."""
        self.due_s = float("inf")
        self.sent_s = 0.0
        self.listeners = 0
        """Readers in other replicas."""
        self.listened_s = 0.0
        """When there were some, as far as is known."""
        self.called = False
        """Whether another replica has asked to look at the log."""
        self.fenced = False
        self.may_hold = True
        """Whether the store may know of it."""
        self._sent: deque[tuple[int, int]] = deque()
        """The batches in the log: how many frames it had after each, and how many bytes had been appended by then."""
        self._sent_bytes = self._batch_bytes = 0
        self.cut_short = False
        """Whether the last batch had no room for all that was pending."""
        self._request = request
        self._joinable = joinable
        flight.followers.add(self)

    def cut(self, error: GatewayError) -> None:  # noqa: ARG002  # whatever it is, the log cannot go on without a gap
        self._stop(holds_lease=True)

    @property
    def pending(self) -> bool:
        return self.at < self.flight.count

    def batch(self) -> Batch:
        """What is to be appended next."""
        flight = self.flight
        start = self.at - flight.base
        frames, size = [], 0
        for frame in flight.frames[start:]:
            frames.append(frame)
            size += len(frame.full)
            if size >= _BATCH_BYTES:
                break
        self.cut_short = len(frames) < len(flight.frames) - start
        self._batch_bytes = size
        return Batch(
            log=self.name,
            writer=self.writer,
            first=self.at,
            frames=[frame.full for frame in frames],
            at_us=[frame.at_us for frame in frames],
            head=self._head(),
            request=self._request() if self.at == 0 else b"",
            joinable=self._joinable and flight.is_joinable,
            readers=flight.readers,
            trim_to=self._trim_to(),
        )

    def _head(self) -> bytes:
        flight = self.flight
        if flight.headers is None:
            return b""
        head = {
            "api": flight.api.name,
            "headers": dict(flight.headers),
            "started_at": flight.started_at,
            "streamed": flight.streamed,
            "runs": flight.runs,
        }
        return orjson.dumps(head)

    def take(self, result: Appended | StoreError) -> None:
        """Learns what became of a batch. A log that has lost frames is written anew from there."""
        if isinstance(result, StoreFenced):
            self._stop(holds_lease=False)
        elif isinstance(result, Appended):
            self.cut_short = self.cut_short or result.count < self.at
            self.listeners = result.listeners
            if result.listeners:
                self.listened_s = asyncio.get_running_loop().time()
            if self.flight.base <= result.count <= self.flight.count:
                self._moved_to(result.count)
            else:
                self._stop(holds_lease=True)
            self.flight.alone = self.flight.alone and self.fenced
            self.flight.cancel(result.cancelled)

    def _moved_to(self, count: int) -> None:
        if count < self.at:
            self._sent.clear()
        elif count > self.at:
            self._sent_bytes += self._batch_bytes
            self._sent.append((count, self._sent_bytes))
        self.at = count

    def _trim_to(self) -> int:
        """The index before which the log of a flight that has become too large can do without its frames.

        Its readers in other replicas may lag as far as those here.
        """
        if not self.flight.overflowed:
            return 0
        trim_to = 0
        while len(self._sent) > 1 and self._sent_bytes - self._sent[0][1] > self.flight.max_bytes:
            trim_to, _ = self._sent.popleft()
        return trim_to

    def _stop(self, *, holds_lease: bool) -> None:
        self.fenced = True
        self.flight.followers.discard(self)
        self.on_fenced(self, holds_lease)


class Sharing:
    """The logs that this replica writes."""

    def __init__(self, store: Store, terms: Terms) -> None:
        self._store = store
        self._lease_s = terms.lease_s
        self._heartbeat_s = terms.lease_s / _HEARTBEATS_PER_LEASE
        self._shared: dict[FlightId, Shared] = {}
        self._task: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        self._timer: asyncio.Handle | None = None
        self._timer_at_s = 0.0
        self._given_up: list[Shared] = []
        self._untold: deque[tuple[LogName, Writer, float]] = deque(maxlen=_MAX_UNTOLD)
        """The logs whose end the store did not take, and when nobody believes any longer that they go on."""
        self._untold_due_s = 0.0
        store.on_called(self._on_called)

    def writer(self, run: str) -> Writer:
        return Writer(self._store.replica, run)

    def begin(self, flight: Flight, name: LogName, *, request: Callable[[], bytes], joinable: bool) -> Shared:
        """From now on the flight's log is written, by this replica's run of it."""
        shared = Shared(flight, name, self.writer(flight.run), request=request, joinable=joinable)
        shared.on_fenced = self._give_up
        shared.may_hold = self._store.is_writable
        self._shared[name.flight] = shared
        # Not at once: an answer that comes at once need not be told in parts, and the first token is on its way now. A store
        # that takes nothing is not soon to be tried.
        soon_s = _HEARD_S if shared.may_hold else _AGAIN_S
        self._hurry(shared, asyncio.get_running_loop().time() + soon_s)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        return shared

    def grown(self, shared: Shared) -> None:
        """The flight has a head, or more frames."""
        if shared.sent_s and not shared.fenced:
            self._hurry(shared, shared.sent_s + (_HEARD_S if shared.listeners else _UNHEARD_S))

    async def check(self, shared: Shared) -> None:
        """Asks at once how many listeners there are, and who was cancelled."""
        if not shared.fenced:
            self._learn(shared, (await self._append([shared]))[0])

    def check_soon(self, shared: Shared) -> None:
        """The store is to know at once what has changed about the flight."""
        self._hurry(shared, 0.0)

    async def finish(self, shared: Shared, outcome: Outcome, recording: Recording | None = None) -> bool:
        """Ends the log, with all frames in it, together with its recording, if there is one; tells whether that is stored.

        Raises `StoreError`.
        """
        self._forget(shared)
        try:
            return await self._finish(shared, outcome, recording)
        except StoreError as error:
            if not isinstance(error, StoreFenced):
                self._tell_later(shared)
            raise
        finally:
            shared.flight.followers.discard(shared)

    async def _finish(self, shared: Shared, outcome: Outcome, recording: Recording | None) -> bool:
        # Of a flight without frames there is no more to say than the end: where calls are refused, there are many of those.
        if shared.flight.count:
            await self._append_rest(shared, certain=recording is None)
        elif shared.fenced:
            raise _fenced()
        name, writer, end = shared.name, shared.writer, _ended(outcome)
        if recording:
            return await self._store.store(name.key, recording, ends=name, writer=writer, end=end)
        body = shared.flight.whole() if isinstance(outcome, Complete) and not shared.flight.streamed else b""
        await self._store.end(name, writer, end, body=body, unless_read=isinstance(outcome, Abandoned))
        return False

    async def release(self, shared: Shared) -> None:
        """Leaves a log that has not ended to whoever still reads it. Raises `StoreError`."""
        self._forget(shared)
        try:
            await self._append_rest(shared, certain=True)
            await self._store.release(shared.name, shared.writer)
        finally:
            shared.flight.followers.discard(shared)

    async def close(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def _give_up(self, shared: Shared, holds_lease: bool) -> None:  # noqa: FBT001  # a callback's argument
        """The log cannot be gone on with here: others need not wait until its lease runs out."""
        self._forget(shared)
        if holds_lease:
            self._given_up.append(shared)
            self._wake()

    def _tell_later(self, shared: Shared) -> None:
        """Else whoever asks the same once the store is well would wait for the rest of it until its lease runs out."""
        if shared.may_hold:
            now_s = asyncio.get_running_loop().time()
            self._untold.append((shared.name, shared.writer, now_s + self._lease_s))
            self._untold_due_s = now_s + _AGAIN_S
            self._wake_at(self._untold_due_s)

    async def _tell_ends(self) -> None:
        loop = asyncio.get_running_loop()
        self._untold_due_s = loop.time() + _AGAIN_S
        with suppress(StoreError):  # then again
            while self._untold and self._store.available:
                name, writer, until_s = self._untold[0]
                if loop.time() < until_s:
                    await self._store.release(name, writer)
                self._untold.popleft()

    def _forget(self, shared: Shared) -> None:
        if self._shared.get(shared.name.flight) is shared:
            del self._shared[shared.name.flight]

    async def _append_rest(self, shared: Shared, *, certain: bool) -> None:
        """All frames are in the log after it; ``certain``: even if it was lost meanwhile, since nothing else has them."""
        asked = bool(shared.sent_s) and not certain
        for _ in range(_MAX_ROUNDS):
            if shared.fenced:
                raise _fenced()
            if not shared.pending and asked:
                return
            (result,) = await self._append([shared])
            if isinstance(result, StoreError):
                raise result
            shared.take(result)
            asked = True
        raise StoreUnavailable("the log is lost as fast as it is written")

    async def _run(self) -> None:
        while True:
            try:
                await self._send_what_is_due()
            except Exception:  # a bug of ours: without heartbeats every flight of this replica would be taken over
                log.exception("the shared logs could not be written")
                await asyncio.sleep(_AGAIN_S)

    async def _send_what_is_due(self) -> None:
        await self._release_given_up()  # on its own: what is due may be long in coming, and this would hold the last one
        now_s = asyncio.get_running_loop().time()
        if self._untold and self._untold_due_s <= now_s:
            await self._tell_ends()
        due = [shared for shared in self._shared.values() if shared.due_s <= now_s]
        if due:
            for shared, result in zip(due, await self._append(due), strict=True):
                self._learn(shared, result)
            return
        self._woken.clear()
        self._wake_at(min((shared.due_s for shared in self._shared.values()), default=float("inf")))
        if self._untold:
            self._wake_at(self._untold_due_s)
        await self._woken.wait()

    async def _release_given_up(self) -> None:
        while self._given_up:
            shared = self._given_up.pop()
            with suppress(StoreError):
                await self._store.release(shared.name, shared.writer)

    def _wake_at(self, due_s: float) -> None:
        """A timer, and not the task itself, takes note of what is due: a token on its way waits for neither."""
        if self._timer:
            if self._timer_at_s <= due_s:
                return
            self._timer.cancel()
            self._timer = None
        if due_s < float("inf"):
            self._timer_at_s = due_s
            self._timer = asyncio.get_running_loop().call_at(due_s + _TIMER_STEP_S, self._wake)

    def _wake(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._woken.set()

    async def _append(self, due: Sequence[Shared]) -> list[Appended | StoreError]:
        # What will not be taken is not even made. Logs that have begun are to keep their leases.
        store = self._store
        tried = due if store.is_writable else [shared for shared in due if shared.sent_s and store.available]
        for shared in tried:
            shared.may_hold = True
        try:
            results = await store.append([shared.batch() for shared in tried])
        except StoreError as error:
            results = [error] * len(tried)
        by_flight = dict(zip(tried, results, strict=True))
        return [by_flight.get(shared) or StoreUnavailable("the store takes nothing now") for shared in due]

    def _learn(self, shared: Shared, result: Appended | StoreError) -> None:
        if self._shared.get(shared.name.flight) is not shared:
            return  # it was finished meanwhile
        shared.take(result)
        now_s = asyncio.get_running_loop().time()
        if shared.fenced:
            log.debug("another replica has taken over %r", shared.flight)
        elif isinstance(result, StoreError):
            shared.due_s = now_s + _AGAIN_S
        else:
            shared.sent_s = now_s
            shared.due_s = now_s + self._heartbeat_s
            if shared.cut_short:
                self._hurry(shared, now_s)
            elif shared.pending:
                self.grown(shared)
        if isinstance(result, Appended) and shared.called:
            shared.called = False
            if result.cancelled and not result.listeners:
                shared.flight.check_readers(dismissed=True)

    def _hurry(self, shared: Shared, due_s: float) -> None:
        if due_s < shared.due_s:
            shared.due_s = due_s
            self._wake_at(due_s)

    def _on_called(self, flight: FlightId) -> None:
        if shared := self._shared.get(flight):
            shared.called = True
            self._hurry(shared, 0.0)


def _fenced() -> StoreFenced:
    return StoreFenced("the log has another writer")


def _ended(outcome: Outcome) -> bytes:
    if isinstance(outcome, Complete):
        return orjson.dumps({"outcome": "complete"})
    kind = "failed" if isinstance(outcome, Failed) else "abandoned"
    return orjson.dumps({"outcome": kind, **told(outcome.error)})

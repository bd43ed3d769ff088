"""Running upstream calls and their open logs. asyncio, but no sockets.

A flight is owned by the table of flights, never by a request: the first caller is a reader like any other, and a
reader holds nothing but a cursor, so neither a slow nor a vanished one disturbs anybody.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import orjson

from gateway.core.apis import Api
from gateway.core.dialects.openai import DONE
from gateway.core.key import CacheKey
from gateway.core.policy import StoreRules
from gateway.core.recording import Frame, MalformedChunk, Meta, Recorder, Recording, body_spans
from gateway.errors import GatewayError, ShuttingDown, StoreError, UpstreamBroke, UpstreamReported
from gateway.ports import Call, Clock, Store, Upstream

log = logging.getLogger(__name__)

# A stream that has said [DONE] is read to its end for this long, so that its connection can be used again.
_DRAIN_S = 0.5
_CLOSING = "The gateway is shutting down; ask again."
# A sealed flight stays in the table for longer than any lookup takes.
_LINGER_S = 0.25


@dataclass(frozen=True, slots=True)
class Complete:
    """The upstream said all it had to say."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer ended early; every reader is told ``error``."""

    error: GatewayError


Outcome = Complete | Failed


class Flight:
    """One running upstream call: an append-only log of frames that any number of readers follow."""

    def __init__(self, api: Api, *, cacheable: bool, started_at: float, assemble: bool = True) -> None:
        self.api = api
        self.cacheable = cacheable
        self.started_at = started_at
        self.readers = 0
        self.outcome: Outcome | None = None
        self.headers: Mapping[str, str] | None = None
        """The upstream's, once its head has come."""
        self.recording: Recording | None = None
        """Set between the end of a storable answer and some time after its arrival in the store."""
        self.retired = False
        self.streamed = True
        self.on_abandoned: Callable[[], object] = lambda: None
        self._assembler = api.assembler()
        self.recorder = Recorder(self._assembler if assemble else None)
        self.frames: list[Frame] = self.recorder.frames
        self._whole: bytes | None = None
        self._waiters: list[asyncio.Future[bool]] = []

    def __repr__(self) -> str:
        state = type(self.outcome).__name__ if self.outcome else "open"
        return f"<Flight {self.api.name} frames={len(self.frames)} readers={self.readers} {state}>"

    def land_head(self, headers: Mapping[str, str]) -> None:
        """The upstream has answered: readers may send their heads."""
        self.headers = headers
        self._wake()

    def append(self, batch: Iterable[bytes], at_us: int) -> bool:
        """Adds the chunks of a batch to the log; tells whether ``[DONE]`` was among them.

        Raises `UpstreamReported` and `UpstreamBroke`; what came before the bad chunk stays in the log.
        """
        done = False
        try:
            for payload in batch:
                if payload.startswith(DONE):
                    if not self.frames:
                        raise UpstreamBroke("The upstream's stream ended without an answer.")
                    done = True
                    break
                if payload and (reported := self.recorder.add(payload, at_us)):
                    raise UpstreamReported(reported["error"])
        except MalformedChunk as error:
            raise UpstreamBroke(f"The upstream sent a broken stream: {error}.") from None
        finally:
            if not done:
                self._wake()
        return done

    def take_whole(self, body: bytes, at_us: int) -> None:
        """Fills the log from an unstreamed answer; the body is kept as it came. Raises `UpstreamBroke`."""
        try:
            chunks = self.api.split(orjson.loads(body))
        except (AttributeError, TypeError, ValueError):
            raise UpstreamBroke("The upstream's answer is not of the API's shape.") from None
        for chunk in chunks:
            if reported := self.recorder.add(_json(chunk), at_us):
                raise UpstreamReported(reported["error"])
        if not self.frames:
            raise UpstreamBroke("The upstream's answer has no choices.")
        self._whole = body
        self.streamed = False

    def close(self, outcome: Outcome) -> None:
        """Ends the log; the first outcome holds."""
        if self.outcome is None:
            self.outcome = outcome
            self._wake()

    def seal(self, recording: Recording) -> None:
        """From now on the answer is a recording: newcomers are served from it."""
        self.recording = recording
        self._wake()

    def retire(self) -> None:
        """The table lets go of this flight."""
        self.retired = True
        self._wake()

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

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            settle(waiter, True)

    def whole(self) -> bytes:
        """The assembled answer of a flight that has ended; raises its error."""
        if isinstance(self.outcome, Failed):
            raise self.outcome.error
        if self._whole is None:
            self._whole = _json(self._assembler.body())
        return self._whole

    def leave(self) -> None:
        """One reader less. When the last has gone, an answer that will not be stored is not worth finishing."""
        self.readers -= 1
        if self.readers == 0 and self.outcome is None and not self.cacheable:
            self.on_abandoned()


def _json(value: object) -> bytes:
    try:
        return orjson.dumps(value)
    except (TypeError, RecursionError):  # what a parser takes may be nested deeper than what a writer gives
        raise UpstreamBroke("The upstream's answer is nested too deeply.") from None


def settle(waiter: "asyncio.Future[bool]", value: bool) -> None:  # noqa: FBT001  # a callback's argument
    if not waiter.done():
        waiter.set_result(value)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a flight is for: the question, whom to ask, and under which key to keep the answer (None: do not)."""

    call: Call
    upstream: Upstream
    key: CacheKey | None
    joinable: bool
    ttl_s: float


class Flights:
    """The table of flights, and the pump that drives each."""

    def __init__(self, store: Store, rules: StoreRules, clock: Clock) -> None:
        self._store = store
        self._rules = rules
        self._clock = clock
        self._by_key: dict[CacheKey, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def find(self, key: CacheKey) -> Flight | None:
        """The flight that a request of this key may join, or whose recording is on its way to the store."""
        flight = self._by_key.get(key)
        return None if flight is None or isinstance(flight.outcome, Failed) else flight

    def start(self, plan: Plan) -> Flight:
        """Begins an upstream call in a task of its own."""
        cacheable, now = plan.key is not None, self._clock.now()
        # What is not kept, and not joined, is assembled only for a caller who wants it whole.
        flight = Flight(plan.call.api, cacheable=cacheable, started_at=now, assemble=cacheable or not plan.call.streamed)
        if plan.key is not None and plan.joinable:
            self._by_key[plan.key] = flight
        task = asyncio.get_running_loop().create_task(self._fly(flight, plan))
        flight.on_abandoned = task.cancel
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, flight, plan))
        return flight

    def _ended(self, flight: Flight, plan: Plan, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if flight.outcome is None:  # cancelled before its first step: nothing of `_fly` has run
            flight.close(Failed(ShuttingDown(_CLOSING)))
            self._retire(flight, plan.key)

    async def close(self) -> None:
        """Ends every flight: its readers are told that the gateway is shutting down."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fly(self, flight: Flight, plan: Plan) -> None:
        try:
            await self._pump(flight, plan)
        except GatewayError as error:
            flight.close(Failed(error))
        except asyncio.CancelledError:
            flight.close(Failed(ShuttingDown(_CLOSING)))
            raise
        except Exception:  # a bug of ours, or of an upstream's library: no reader may wait for ever because of it
            log.exception("the pump of %r broke", flight)
            flight.close(Failed(GatewayError("The gateway failed to read the answer.")))
        finally:
            self._retire(flight, plan.key)

    def _retire(self, flight: Flight, key: CacheKey | None) -> None:
        if key is None or self._by_key.get(key) is not flight:
            flight.retire()
        elif flight.recording is None:
            self._forget(flight, key)
        else:
            # A lookup that left before the recording landed comes back with nothing and looks here next.
            asyncio.get_running_loop().call_later(_LINGER_S, self._forget, flight, key)

    def _forget(self, flight: Flight, key: CacheKey) -> None:
        if self._by_key.get(key) is flight:
            del self._by_key[key]
        flight.retire()

    async def _pump(self, flight: Flight, plan: Plan) -> None:
        began = self._clock.monotonic()
        async with plan.upstream.ask(plan.call) as answer:
            flight.land_head(answer.headers)
            if answer.batches is None:
                flight.take_whole(answer.whole or b"", self._us_since(began))
                self._complete(flight, plan)
                await self._keep(flight, plan)
                return
            async with aclosing(answer.batches) as batches:
                done = await self._follow(flight, batches, began)
                if not done and not self._finished(flight, plan):
                    raise UpstreamBroke("The upstream's stream ended before the answer was complete.")
                self._complete(flight, plan)
                await asyncio.gather(self._keep(flight, plan), _drain(batches))

    async def _follow(self, flight: Flight, batches: AsyncIterator[list[bytes]], began: float) -> bool:
        """Appends what comes, until ``[DONE]`` (true) or the end."""
        async for batch in batches:
            if flight.append(batch, self._us_since(began)):
                return True
        return False

    def _complete(self, flight: Flight, plan: Plan) -> None:
        """Ends the log. From here on newcomers find this flight, if no later one has taken its place."""
        if plan.key is not None:
            newest = self._by_key.get(plan.key)
            if newest is None or newest.started_at <= flight.started_at:
                self._by_key[plan.key] = flight
        flight.close(Complete())

    def _us_since(self, began: float) -> int:
        return int((self._clock.monotonic() - began) * 1e6)

    @staticmethod
    def _finished(flight: Flight, plan: Plan) -> bool:
        reasons = flight.recorder.finish_reasons
        return all(index in reasons for index in range(plan.call.api.choices(plan.call.body)))

    async def _keep(self, flight: Flight, plan: Plan) -> None:
        """Seals and stores a complete answer, if the rules allow."""
        call, recorder = plan.call, flight.recorder
        if plan.key is None:
            return
        why_not = self._rules.why_not(
            reasons=recorder.finish_reasons,
            choices=call.api.choices(call.body),
            size_bytes=recorder.size_bytes,
            limits_tokens=call.api.limits_tokens(call.body),
        )
        if why_not:
            log.debug("not stored (%s): %r", why_not, flight)
            return
        try:
            body = flight.whole()
        except UpstreamBroke as error:
            log.warning("not stored: %s", error)
            return
        recording = self._recording(flight, plan, body)
        flight.seal(recording)
        try:
            await self._store.store(plan.key, recording)
        except StoreError as error:
            log.debug("not stored: %s", error)

    def _recording(self, flight: Flight, plan: Plan, body: bytes) -> Recording:
        recorder = flight.recorder
        body_id, body_created = body_spans(body)
        meta = Meta(
            api=plan.call.api.name,
            model=str(plan.call.body.get("model")),
            upstream=plan.upstream.name,
            started_at=flight.started_at,
            written_at=self._clock.now(),
            duration_us=flight.frames[-1].at_us,
            ttl_s=plan.ttl_s,
            id=recorder.id,
            frames=len(flight.frames),
            finish_reasons=tuple(reason for _, reason in sorted(recorder.finish_reasons.items())),
            usage=recorder.usage,
            body_id=body_id,
            body_created=body_created,
            whole=not flight.streamed,
        )
        return recorder.recording(meta, body)


async def _drain(batches: AsyncIterator[list[bytes]]) -> None:
    try:
        async with asyncio.timeout(_DRAIN_S):
            async for _ in batches:
                pass
    except (TimeoutError, GatewayError):
        pass  # the answer is complete; only the connection is lost for re-use

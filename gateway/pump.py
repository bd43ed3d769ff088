"""One run of an upstream call into the log of a flight, and what it needs to know."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal, Protocol

from gateway.core.content import Continuation, Diverged
from gateway.core.dialects.openai import DONE
from gateway.core.key import CacheKey
from gateway.core.policy import ModelRules
from gateway.core.purge import Labels
from gateway.errors import GatewayError, StreamDiverged, UpstreamBroke, UpstreamTimeout
from gateway.flight import Flight
from gateway.ports import Call, Clock, Served, Upstream
from gateway.sharing import Terms

# A stream that has said [DONE] is read to its end for this long, so that its connection can be used again.
_DRAIN_S = 0.5
# Of a running idle time-out, so much may pass before it is set anew: that costs more than a token's way to its caller.
_IDLE_STEPS = 20

WhenAbandoned = Literal["finish", "cancel", "finish_if_cacheable"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What the configuration says of flights."""

    terms: Terms = field(default_factory=Terms)
    when_abandoned: WhenAbandoned = "finish_if_cacheable"
    abandon_grace_s: float = 5.0
    idle_timeout_s: float = 600.0
    total_timeout_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a flight is for: the question, whom to ask, and under which key to keep the answer (None: do not)."""

    call: Call
    upstream: Upstream
    key: CacheKey | None
    joinable: bool
    ttl_s: float
    rules: ModelRules
    owner: str = ""
    """Whose answer it is: see `Meta`."""
    namespace: str = ""
    tags: tuple[str, ...] = ()
    sample_of: CacheKey | None = None
    """The key of the question, where the answer is another sample than the first."""
    why_not: str = ""
    """A word for why the answer must not be stored, where that is known from the beginning."""
    tenant: str = ""
    """Whose call it is for ``[limits]``."""
    background: bool = False
    """Whether nobody waits for it: it is to be stored, to replace a stale answer or to be another sample."""
    newer_than_us: int = -1
    """A recording of a flight that began by then was looked at, and would not do."""
    claims: bool = True
    """Whether the store is asked who leads. Not where it has just failed to answer: nobody is to wait for it twice."""
    noted: Callable[[], bytes] = bytes
    """What another replica needs of the request to take the flight over."""
    request: Callable[[], bytes] = bytes
    """What the recording is to keep of the request."""
    key_of: Callable[[Served], CacheKey] | None = None
    """The key of the same question, had it been meant for whoever has served it."""

    @property
    def labels(self) -> Labels | None:
        """What a purge may know it by."""
        if self.key is None:
            return None
        model, sample_of = str(self.call.body.get("model")), self.sample_of or ""
        return Labels(key=self.key, model=model, namespace=self.namespace, tags=self.tags, sample_of=sample_of)


class Table(Protocol):
    """Whose flights are pumped."""

    def grown(self, flight: Flight) -> None:
        """It has a head, or more frames."""
        ...

    def complete(self, flight: Flight, plan: Plan) -> None:
        """All has been said."""
        ...

    async def keep(self, flight: Flight, plan: Plan) -> None:
        """Seals and stores a complete answer, if that is allowed."""
        ...


class Pump:
    """One run of an upstream call into a flight's log, where a ``continuation`` may stand between the two."""

    def __init__(  # noqa: PLR0913, PLR0917  # all that two streams have to do with each other
        self, table: Table, flight: Flight, plan: Plan, rules: Rules, clock: Clock, continuation: Continuation | None
    ) -> None:
        self._table = table
        self._flight = flight
        self._plan = plan
        self._rules = rules
        self._clock = clock
        self._continuation = continuation
        self._idle_s = plan.rules.idle_timeout_s or rules.idle_timeout_s
        self._total_s = plan.rules.total_timeout_s or rules.total_timeout_s
        self._step_s = self._idle_s / _IDLE_STEPS
        # A run that goes on with another's counts its time from when that one began.
        self._began = clock.monotonic() - (max(0.0, clock.now() - flight.started_at) if continuation else 0.0)
        self._latest_us = flight.frames[-1].at_us if flight.frames else 0

    async def run(self) -> None:
        """Raises `GatewayError` where the answer ends early."""
        try:
            async with asyncio.timeout(self._total_s) as total:
                await self._ask(total)
        except TimeoutError:
            raise UpstreamTimeout(f"The upstream took longer than {self._total_s:g} s.") from None
        except Diverged as error:
            raise StreamDiverged(f"The call had to be run again, and went another way: {error}.") from None
        if self._flight.outcome:
            await self._table.keep(self._flight, self._plan)

    async def _ask(self, total: asyncio.Timeout) -> None:
        """How long an upstream may take to begin is its own business; how long it may pause after that is ours.

        Storing has no part in ``total``: cut off there, the shared log would never be told to have ended.
        """
        flight, plan = self._flight, self._plan
        async with plan.upstream.ask(plan.call) as answer:
            flight.served = answer.served
            flight.land_head(answer.headers)
            self._table.grown(self._flight)
            if answer.batches is None:
                self._take_whole(answer.whole or b"")
                return
            async with aclosing(answer.batches) as batches:
                done = await self._copy(batches)
                if not done and not self._finished():
                    raise UpstreamBroke("The upstream's stream ended before the answer was complete.")
                if self._continuation:
                    self._continuation.finish()
                self._table.complete(flight, plan)
                total.reschedule(None)
                await asyncio.gather(self._table.keep(flight, plan), _drain(batches))

    async def _copy(self, batches: AsyncIterator[list[bytes]]) -> bool:
        """Appends what comes, until ``[DONE]`` (true) or the end. Raises `UpstreamTimeout` where it pauses for too long."""
        try:
            async with asyncio.timeout(self._idle_s + self._step_s) as idle:
                return await self._copy_within(batches, idle)
        except TimeoutError:
            raise UpstreamTimeout(f"The upstream sent nothing for {self._idle_s:g} s.") from None

    async def _copy_within(self, batches: AsyncIterator[list[bytes]], idle: asyncio.Timeout) -> bool:
        loop = asyncio.get_running_loop()
        reschedule_at_s = 0.0
        async for batch in batches:
            if (now_s := loop.time()) >= reschedule_at_s:
                idle.reschedule(now_s + self._idle_s + self._step_s)
                reschedule_at_s = now_s + self._step_s
            if self._append(batch):
                return True
        return False

    def _append(self, batch: list[bytes]) -> bool:
        if self._continuation:
            batch = self._continued(batch, self._continuation)
        try:
            return self._flight.append(batch, self._us())
        finally:
            self._table.grown(self._flight)

    def _continued(self, batch: list[bytes], continuation: Continuation) -> list[bytes]:
        fed = [payload if payload.startswith(DONE) else continuation.feed(payload) for payload in batch]
        self._flight.in_doubt = not continuation.is_used_up
        return [payload for payload in fed if payload is not None]

    def _take_whole(self, body: bytes) -> None:
        if self._continuation:
            self._append(self._flight.split(body))
            self._continuation.finish()
        else:
            self._flight.take_whole(body, self._us())
        self._table.complete(self._flight, self._plan)
        self._table.grown(self._flight)

    def _us(self) -> int:
        self._latest_us = max(self._latest_us, int((self._clock.monotonic() - self._began) * 1e6))
        return self._latest_us

    def _finished(self) -> bool:
        """Whether this run has finished each choice: of one that goes on with another's, that run may have done it."""
        reasons, call = self._flight.recorder.finish_reasons, self._plan.call
        is_used_up = self._continuation is None or self._continuation.is_used_up
        return is_used_up and all(index in reasons for index in range(call.api.choices(call.body)))


async def _drain(batches: AsyncIterator[list[bytes]]) -> None:
    try:
        async with asyncio.timeout(_DRAIN_S):
            async for _ in batches:
                pass
    except (TimeoutError, GatewayError):
        pass  # the answer is complete; only the connection is lost for re-use

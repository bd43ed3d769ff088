"""The deployments of one group: what each is doing, how it has done lately, and which is asked next."""

import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager

from gateway.config import UpstreamConfig
from gateway.core.balancing import Candidate, EjectionRules, Health, choose
from gateway.core.retrying import RetryBudget, Verdict, judge
from gateway.errors import GatewayError, UpstreamBusy
from gateway.observe import Calls, UpstreamState
from gateway.ports import Clock
from gateway.upstreams.leased import Leased
from gateway.upstreams.router import own_names
from gateway.upstreams.slots import Slot, Slots

log = logging.getLogger(__name__)

# How long a deployment rests that had enough and did not say for how long.
_REST_S = 1.0
_LONGEST_REST_S = 300.0
_MAX_RESTS = 1024


class Running:
    """A call that a deployment has."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self.spoke: Callable[[], None] = lambda: None
        """To be called once the deployment has begun to answer."""

    def release(self) -> None:
        """Others may have the slot: nothing more comes."""
        self._slot.release()


class Deployment:
    """One ``[[upstreams]]`` entry."""

    def __init__(self, config: UpstreamConfig, upstream: Leased, rules: EjectionRules, clock: Clock) -> None:
        self.name = config.name
        self.upstream = upstream
        self.slots = Slots(config.max_concurrent_calls, config.max_queued_calls, config.queue_timeout_s)
        self.health = Health(rules)
        self.calls = Calls()
        self.config = config
        self._clock = clock
        self._rests: dict[str, float] = {}
        """Until when it is not asked for a model of which it has had enough."""

    def __repr__(self) -> str:
        return f"<Deployment {self.name} {self.slots} {self.health}>"

    def candidate(self, model: str, now: float, *, has_rested: bool) -> Candidate:
        slots = self.slots
        return Candidate(
            slots.load,
            self.config.weight,
            slots.is_free,
            slots.has_room,
            self.health.state(now),
            not has_rested and self._rests.get(model, 0.0) > now,
        )

    def state(self) -> UpstreamState:
        ejected = self.health.state(self._clock.monotonic()) != "well"
        return UpstreamState(self.name, self.calls, self.slots.taken, self.slots.load - self.slots.taken, ejected)

    def judge(self, error: GatewayError) -> Verdict:
        """What a failure means here."""
        return judge(error, self._clock.now(), own_key=not self.upstream.passes_credential)

    def rest(self, model: str, verdict: Verdict) -> None:
        """It has had enough of that model for now. Where callers bring their own credentials, only one of them has."""
        if verdict.is_limit and not self.upstream.passes_credential:
            if len(self._rests) >= _MAX_RESTS:
                self._rests.clear()
            rest_s = _REST_S if verdict.wait_s is None else min(verdict.wait_s, _LONGEST_REST_S)
            self._rests[model] = self._clock.monotonic() + rest_s

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Running]:
        """A call: entering waits for a slot. How it goes is what the deployment is judged by."""
        slot = await self._slot()
        monotonic, health = self._clock.monotonic, self.health
        began_s = monotonic()
        running, ticket, spoke = Running(slot), health.begin(began_s), False
        self.calls.made += 1

        def speak() -> None:
            nonlocal spoke
            spoke, now_s = True, monotonic()
            self.calls.first_token.add(now_s - began_s)
            health.succeed(ticket, now_s)

        running.spoke = speak
        try:
            yield running
        except GatewayError as error:
            self.calls.fail(error)
            if self.judge(error).is_fault:
                left_alone_s = health.fail(ticket, monotonic(), spoke=spoke)
                if left_alone_s:
                    told = "upstream %s fails too often: for %g s it is asked only where nobody else can answer (%r)"
                    log.warning(told, self.name, left_alone_s, error.message)
            raise
        finally:
            health.drop(ticket)
            slot.release()

    async def _slot(self) -> Slot:
        try:
            return await self.slots.take()
        except UpstreamBusy as error:
            self.calls.fail(error)
            raise


Serving = Sequence[tuple[Deployment, str]]
"""Deployments, each with its own name of a model."""


class Pool:
    """The deployments of one group, which answer the same."""

    def __init__(self, name: str, deployments: Sequence[Deployment], budget: RetryBudget, draw: Callable[[], float]) -> None:
        self.name = name
        self.deployments = tuple(deployments)
        self.passes_credential = deployments[0].upstream.passes_credential
        self.budget = budget
        self._draw = draw

    def __repr__(self) -> str:
        return f"<Pool {self.name} {self.deployments} {self.budget}>"

    def serving(self, model: str) -> Serving:
        """The deployments that serve what a route calls by this name."""
        if len(self.deployments) == 1:
            return [(self.deployments[0], model)]
        by_config = {each.config.name: each for each in self.deployments}
        named = own_names([each.config for each in self.deployments], model)
        return [(by_config[name], own) for name, own in named.items()]

    def choose(
        self, serving: Serving, model: str, now: float, *, desperate: bool, rested: Collection[str] = ()
    ) -> tuple[Deployment, str] | None:
        """The one to ask now, of those; whoever is ``rested``, by name, has been waited for."""
        if len(serving) == 1 and desperate:
            return serving[0]
        candidates = [each.candidate(model, now, has_rested=each.name in rested) for each, _ in serving]
        place = choose(candidates, self._draw(), desperate=desperate)
        return None if place is None else serving[place]

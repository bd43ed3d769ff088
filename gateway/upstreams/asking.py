"""One call, until somebody has begun to answer it: retries, other deployments, fallbacks.

What is decided is decided in `gateway.core.retrying` and `gateway.core.balancing`; this does what they say. A call is the
task of the flight that made it, so whoever cancels the flight ends its waits at once.
"""

import asyncio
import logging
import math
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import NamedTuple

from gateway.config import RetriesConfig
from gateway.core.opening import Opening
from gateway.core.policy import ModelRules, RuleBook
from gateway.core.retrying import backoff_s
from gateway.errors import GatewayError, UpstreamBroke, UpstreamBusy, UpstreamTimeout
from gateway.ports import GATEWAY_UPSTREAM, Answer, Call, Clock, Patience, Served
from gateway.questions import CREDENTIAL_HEADERS
from gateway.upstreams.pool import Deployment, Pool, Running, Serving

log = logging.getLogger(__name__)

_TOKEN = re.compile(r"[A-Za-z*][A-Za-z0-9:/!#$%&'*+.^_`|~-]*")


class Target(NamedTuple):
    """Who is asked, and for which model, as the cache key names them."""

    pool: Pool
    model: str


class AskingTerms(NamedTuple):
    """What holds for all calls."""

    models: RuleBook
    retries: RetriesConfig
    first_byte_timeout_s: float
    total_timeout_s: float
    clock: Clock
    draw: Callable[[], float]


class Asking:
    """One call, until somebody has begun to answer it."""

    def __init__(self, terms: AskingTerms, call: Call, stack: AsyncExitStack) -> None:
        self._terms = terms
        self._call = call
        self._stack = stack
        self._chosen = self._attempts = 0
        self._began = terms.clock.monotonic()

    async def answer(self, targets: Iterator[tuple[Target, ModelRules]]) -> Answer:
        """Of the first one that has an answer; where nobody has, the error is that of the model itself."""
        own, rules = next(targets)
        fallbacks = list(targets)
        try:
            return await self._answer_of(own, rules, desperate=not fallbacks)
        except GatewayError as error:
            failure, all_left_alone = error, not self._chosen
            if not own.pool.deployments[0].judge(error).elsewhere:
                raise self._told(error) from None
        for target, target_rules in fallbacks:
            try:
                answer = await self._answer_of(target, target_rules, desperate=True)
            except GatewayError as error:
                log.debug("the fallback %s/%s cannot stand in: %r", target.pool.name, target.model, error.message)
            else:
                return replace(answer, served=Served(target.pool.name, target.model))
        if all_left_alone and fallbacks:
            # Now there is nobody else.
            try:
                return await self._answer_of(own, rules, desperate=True)
            except GatewayError as error:
                failure = error
        try:
            raise self._told(failure) from None
        finally:
            del failure  # its traceback holds this frame

    def _told(self, error: GatewayError) -> GatewayError:
        if self._attempts > 1:
            # Who asked must not multiply what has been multiplied already.
            error.headers["x-should-retry"] = "false"
        return error

    async def _answer_of(self, target: Target, rules: ModelRules, *, desperate: bool) -> Answer:
        """The answer of one of a group's deployments: the next one at once, the same one again after a while."""
        tries = _Tries(target, desperate=desperate)
        now = self._terms.clock.monotonic
        target.pool.budget.count_call(now())
        failure: GatewayError = busy()
        while chosen := tries.choose(now()):
            self._chosen += 1
            deployment, own_name = chosen
            try:
                return await self._attempt(deployment, self._adapted(target, own_name, rules), rules)
            except GatewayError as error:
                verdict = deployment.judge(error)
                deployment.rest(target.model, verdict)
                failure = error
                if not (verdict.again or verdict.elsewhere):
                    break
                if isinstance(error, UpstreamBusy):
                    tries.give_up(deployment)
                    continue
                tries.failed += 1
                wait_s = self._wait_s(tries.failed, verdict.wait_s) if verdict.again else math.inf
                tries.postpone(deployment, now() + wait_s)
            if not await self._may_go_on(tries, rules):
                break
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame

    def _wait_s(self, failed: int, asked_s: float | None) -> float:
        """``asked_s`` is what the upstream asks for: as long at least, and not all of those who wait at the same moment."""
        retries = self._terms.retries
        if asked_s is not None and asked_s > retries.max_wait_s:
            return math.inf
        return (asked_s or 0.0) + backoff_s(failed, retries.backoff_s, retries.max_backoff_s, self._terms.draw())

    async def _may_go_on(self, tries: "_Tries", rules: ModelRules) -> bool:
        """Waits until somebody may be asked again; False where that is not to be."""
        now = self._terms.clock.monotonic()
        due = tries.due(now)
        deadline = self._began + (rules.total_timeout_s or self._terms.total_timeout_s)
        if tries.failed > rules.retries or due >= deadline or not tries.pool.budget.take(now):
            return False
        if due > now:
            await asyncio.sleep(due - now)
            tries.now_due(due)
        return True

    def _adapted(self, target: Target, own_name: str, rules: ModelRules) -> Call:
        """The call as that deployment is to hear it."""
        call = self._call
        headers = call.headers
        if not target.pool.passes_credential and any(name in headers for name in CREDENTIAL_HEADERS):
            headers = {name: value for name, value in headers.items() if name not in CREDENTIAL_HEADERS}
        patience = Patience(rules.connect_timeout_s, rules.first_byte_timeout_s, rules.idle_timeout_s)
        body = call.body if call.body.get("model") == own_name else {**call.body, "model": own_name}
        return replace(call, body=body, headers=headers, patience=patience)

    async def _attempt(self, deployment: Deployment, call: Call, rules: ModelRules) -> Answer:
        """One try; what it has opened is left to the stack if it has begun to answer."""
        first_byte_s = rules.first_byte_timeout_s or self._terms.first_byte_timeout_s
        with named(deployment):
            async with AsyncExitStack() as own:
                running = await own.enter_async_context(deployment.running())
                deployment.calls.retries += self._attempts > 0
                self._attempts += 1
                try:
                    async with asyncio.timeout(first_byte_s):
                        answer = await own.enter_async_context(deployment.upstream.ask(call))
                        answer = await _begun(answer, own, running)
                except TimeoutError:
                    raise UpstreamTimeout(f"The upstream said nothing for {first_byte_s:g} s.") from None
                running.spoke()
                headers = {**answer.headers, GATEWAY_UPSTREAM: shown(deployment.name)}
                self._stack.push_async_exit(own.pop_all())
        return replace(answer, headers=headers)


class _Tries:
    """Which deployments of a target have been asked for one call, and when each may be asked again."""

    def __init__(self, target: Target, *, desperate: bool) -> None:
        self.pool = target.pool
        self.failed = 0
        self._model = target.model
        self._serving = self.pool.serving(target.model)
        self._desperate = desperate
        self._not_before: dict[str, float] = {}

    def choose(self, now: float) -> tuple[Deployment, str] | None:
        if not self._not_before:
            return self._of(self._serving, now, desperate=self._desperate)
        # Who has failed is asked again rather than nobody, however short its wait was drawn.
        fresh = [each for each in self._serving if each[0].name not in self._not_before]
        if chosen := self._of(fresh, now, desperate=False):
            return chosen
        ready = [each for each in self._serving if self._not_before.get(each[0].name, 0.0) <= now]
        return self._of(ready, now, desperate=self._desperate)

    def _of(self, serving: Serving, now: float, *, desperate: bool) -> tuple[Deployment, str] | None:
        return self.pool.choose(serving, self._model, now, desperate=desperate, rested=self._not_before)

    def postpone(self, deployment: Deployment, until: float) -> None:
        self._not_before[deployment.name] = until

    def give_up(self, deployment: Deployment) -> None:
        self.postpone(deployment, math.inf)

    def due(self, now: float) -> float:
        """When the next one may be asked; never, where none may."""
        return max(now, min(self._not_before.get(each.name, 0.0) for each, _ in self._serving))

    def now_due(self, due: float) -> None:
        """That moment has come, whatever a clock of another grain says."""
        for name, at in self._not_before.items():
            if at <= due:
                self._not_before[name] = 0.0


async def _begun(answer: Answer, stack: AsyncExitStack, running: Running) -> Answer:
    """The answer, once it says something. Raises `UpstreamError` where it ends before that."""
    batches = answer.batches
    if batches is None:
        return answer
    stack.push_async_callback(batches.aclose)
    opening = Opening()
    async for batch in batches:
        if opening.feed(batch):
            return replace(answer, batches=_with(opening.held, batches, running))
    raise UpstreamBroke("The upstream's stream ended before the answer was complete.")


async def _with(
    held: list[bytes], batches: AsyncGenerator[list[bytes], None], running: Running
) -> AsyncGenerator[list[bytes], None]:
    yield held
    async for batch in batches:
        yield batch
    running.release()  # its answer may still be on the way to the store


class named:  # noqa: N801  # used as a with statement, like contextlib's
    """Has errors say which deployment they are of."""

    def __init__(self, deployment: Deployment) -> None:
        self._name = deployment.name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, GatewayError):
            error.headers.setdefault(GATEWAY_UPSTREAM, shown(self._name))


def busy() -> UpstreamBusy:
    return UpstreamBusy("Everybody who could answer has all the calls that they may have.")


def shown(name: str) -> str:
    """A Token or a String (RFC 9651), as the members of ``Cache-Status`` are."""
    return name if _TOKEN.fullmatch(name) else f'"{name}"'

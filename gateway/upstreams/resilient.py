"""An upstream that fails as rarely as it can: retries, other deployments, fallbacks, all of it before the first token.

What is decided is decided in `gateway.core.retrying` and `gateway.core.balancing`; this does what they say. A call is the
task of the flight that made it, so whoever cancels the flight ends its waits at once.
"""

import asyncio
import logging
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import orjson

from gateway.config import RetriesConfig
from gateway.core.opening import Opening
from gateway.core.policy import ModelRules, RuleBook
from gateway.core.retrying import backoff_s
from gateway.errors import GatewayError, UpstreamBroke, UpstreamBusy, UpstreamError, UpstreamTimeout
from gateway.ports import GATEWAY_UPSTREAM, Answer, Call, Clock, Patience, Relayed, Served
from gateway.questions import CREDENTIAL_HEADERS
from gateway.upstreams.pool import Deployment, Pool, Running

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


FindFallback = Callable[[str], Target]
"""The target that a name in ``fallbacks`` means."""


class Resilient:
    """A group of deployments as an `Upstream`."""

    def __init__(self, pool: Pool, terms: AskingTerms, find_fallback: FindFallback) -> None:
        self.name = pool.name
        self.passes_credential = pool.passes_credential
        self.pool = pool
        self._terms = terms
        self._find_fallback = find_fallback

    def __repr__(self) -> str:
        return f"<Resilient {self.name} {self.pool.deployments}>"

    @asynccontextmanager
    async def ask(self, call: Call) -> AsyncIterator[Answer]:
        """Entering waits for the first token, or for the whole answer. Raises `GatewayError`."""
        async with AsyncExitStack() as stack:
            answer = await _Asking(self._terms, call, stack).answer(self._targets(call))
            try:
                yield answer
            except GatewayError as error:
                error.headers.setdefault(GATEWAY_UPSTREAM, answer.headers[GATEWAY_UPSTREAM])
                raise

    def _targets(self, call: Call) -> Iterator[tuple[Target, ModelRules]]:
        """Who may answer, in order: the model itself, then those that stand in for it."""
        own = Target(self.pool, str(call.body.get("model")))
        rules = self._terms.models.of(call.asked or own.model, own.model)
        yield own, rules
        known = {own}
        for name in rules.fallbacks:
            target = self._find_fallback(name)
            if target not in known:
                known.add(target)
                yield target, self._terms.models.of(name, target.model)

    async def models(self, headers: Mapping[str, str]) -> list[dict[str, Any]]:
        """What any of the deployments lists. Raises `UpstreamError` where none does."""
        asked = (each.upstream.models(headers) for each in self.pool.deployments)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        listed: dict[str, dict[str, Any]] = {}
        for answer in answers:
            if isinstance(answer, BaseException):
                if len(answers) == 1 or not isinstance(answer, UpstreamError):
                    raise answer
            else:
                listed = {model["id"]: model for model in answer} | listed
        return list(listed.values())

    @asynccontextmanager
    async def relay(
        self, method: str, path: str, headers: Mapping[str, str], body: AsyncIterator[bytes] | bytes | None
    ) -> AsyncIterator[Relayed]:
        """Passes a request on, once: nobody knows what it does where it is sent twice. Raises `GatewayError`."""
        model = _model_of(body) if len(self.pool.deployments) > 1 and isinstance(body, bytes) else ""
        serving = self.pool.serving(model) if model else [(each, "") for each in self.pool.deployments]
        chosen = self.pool.choose(serving, model, self._terms.clock.monotonic(), desperate=True)
        if chosen is None:
            raise _busy()
        deployment, own_name = chosen
        if isinstance(body, bytes) and own_name != model:
            body = orjson.dumps({**orjson.loads(body), "model": own_name})
        with _named(deployment):
            async with deployment.running() as running, deployment.upstream.relay(method, path, headers, body) as relayed:
                if relayed.status < 500:
                    running.spoke()
                yield replace(relayed, headers={**relayed.headers, GATEWAY_UPSTREAM: _shown(deployment.name)})

    async def close(self) -> None:
        for each in self.pool.deployments:
            await each.upstream.close()


class _Asking:
    """One call, until somebody has begun to answer it."""

    def __init__(self, terms: AskingTerms, call: Call, stack: AsyncExitStack) -> None:
        self._terms = terms
        self._call = call
        self._stack = stack
        self._attempts = 0
        self._began = terms.clock.monotonic()

    async def answer(self, targets: Iterator[tuple[Target, ModelRules]]) -> Answer:
        """Of the first one that has an answer; where nobody has, the error is that of the model itself."""
        own, rules = next(targets)
        fallbacks = list(targets)
        try:
            return await self._answer_of(own, rules, desperate=not fallbacks)
        except GatewayError as error:
            failure, asked = error, self._attempts
            if not own.pool.deployments[0].judge(error).elsewhere:
                raise self._told(error) from None
        for target, target_rules in fallbacks:
            try:
                answer = await self._answer_of(target, target_rules, desperate=True)
            except GatewayError as error:
                log.debug("the fallback %s/%s cannot stand in: %s", target.pool.name, target.model, error.message)
            else:
                return replace(answer, served=Served(target.pool.name, target.model))
        if not asked and fallbacks:
            # All of its own were left alone, but now there is nobody else.
            try:
                return await self._answer_of(own, rules, desperate=True)
            except GatewayError as error:
                failure = error
        raise self._told(failure) from None

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
        failure: GatewayError = _busy()
        while chosen := tries.choose(now()):
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
        raise failure

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
        with _named(deployment):
            async with AsyncExitStack() as own:
                running = await own.enter_async_context(deployment.running())
                self._attempts += 1
                try:
                    async with asyncio.timeout(first_byte_s):
                        answer = await own.enter_async_context(deployment.upstream.ask(call))
                        answer = await _begun(answer, own, running)
                except TimeoutError:
                    raise UpstreamTimeout(f"The upstream said nothing for {first_byte_s:g} s.") from None
                running.spoke()
                headers = {**answer.headers, GATEWAY_UPSTREAM: _shown(deployment.name)}
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
        ready = self._serving
        if self._not_before:
            ready = [each for each in ready if self._not_before.get(each[0].name, 0.0) <= now]
            if not ready:
                return None
        return self.pool.choose(ready, self._model, now, desperate=self._desperate, rested=self._not_before)

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


class _named:  # noqa: N801  # used as a with statement, like contextlib's
    """Has errors say which deployment they are of."""

    def __init__(self, deployment: Deployment) -> None:
        self._name = deployment.name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, GatewayError):
            error.headers.setdefault(GATEWAY_UPSTREAM, _shown(self._name))


def _busy() -> UpstreamBusy:
    return UpstreamBusy("Everybody who could answer has all the calls that they may have.")


def _model_of(body: bytes) -> str:
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    model = told.get("model") if isinstance(told, dict) else None
    return model if isinstance(model, str) else ""


def _shown(name: str) -> str:
    """A Token or a String (RFC 9651), as the members of ``Cache-Status`` are."""
    return name if _TOKEN.fullmatch(name) else f'"{name}"'

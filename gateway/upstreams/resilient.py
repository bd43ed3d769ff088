"""An upstream that fails as rarely as it can: a group of deployments, with all that stands in for them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import orjson

from gateway.core.policy import ModelRules
from gateway.errors import GatewayError, UpstreamError
from gateway.ports import GATEWAY_UPSTREAM, Answer, Call, Relayed
from gateway.upstreams.asking import Asking, AskingTerms, Target, busy, named, shown
from gateway.upstreams.pool import Pool

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
            answer = await Asking(self._terms, call, stack).answer(self._targets(call))
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
            raise busy()
        deployment, own_name = chosen
        if isinstance(body, bytes) and own_name != model:
            body = orjson.dumps({**orjson.loads(body), "model": own_name})
        with named(deployment):
            async with deployment.running() as running, deployment.upstream.relay(method, path, headers, body) as relayed:
                if relayed.status < 500:
                    running.spoke()
                yield replace(relayed, headers={**relayed.headers, GATEWAY_UPSTREAM: shown(deployment.name)})

    async def close(self) -> None:
        for each in self.pool.deployments:
            await each.upstream.close()


def _model_of(body: bytes) -> str:
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    model = told.get("model") if isinstance(told, dict) else None
    return model if isinstance(model, str) else ""

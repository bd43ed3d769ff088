"""The upstream side of one configuration: its deployments, in groups, and the router over them."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from gateway.config import (
    FALLBACK_UPSTREAM,
    Config,
    LangChainUpstreamConfig,
    Loaded,
    OpenAIUpstreamConfig,
    SimulatedUpstreamConfig,
    UpstreamConfig,
)
from gateway.core.balancing import EjectionRules
from gateway.core.retrying import RetryBudget
from gateway.errors import ConfigError, ModelNotFound
from gateway.ports import Clock, Upstream
from gateway.upstreams.absent import AbsentUpstream
from gateway.upstreams.asking import AskingTerms, Target
from gateway.upstreams.leased import Leased
from gateway.upstreams.pool import Deployment, Pool
from gateway.upstreams.resilient import Resilient
from gateway.upstreams.router import Router


@dataclass(frozen=True, slots=True)
class Fleet:
    """Who answers: each deployment, and the way to them."""

    deployments: tuple[Deployment, ...]
    router: Router

    async def close(self) -> None:
        for each in self.deployments:
            await each.upstream.close()


def assemble(loaded: Loaded, clock: Clock, known: Sequence[Deployment] = ()) -> Fleet:
    """Of those that are ``known``, the unchanged ones are used again, with their connections and what was learned of them.

    Raises `ConfigError` where an upstream cannot be made, or a fallback means none.
    """
    config, draw = loaded.config, random.Random().random  # noqa: S311  # it spreads load
    deployments = tuple(_deployment(each, loaded, clock, known) for each in config.upstreams or (FALLBACK_UPSTREAM,))
    router = _router(config, deployments, clock, draw)
    router.stand_in = _stand_in(config)
    if problems := list(_wrong_fallbacks(config, router)):
        raise ConfigError(problems)
    return Fleet(deployments, router)


def _deployment(config: UpstreamConfig, loaded: Loaded, clock: Clock, known: Iterable[Deployment]) -> Deployment:
    ejection = EjectionRules(**dict(loaded.config.ejection))
    secrets = [loaded.secrets.get(name) for name in config.secret_names]
    made_of = config, ejection, secrets, loaded.proxies.get(config.name), loaded.config.is_replay
    for deployment in known:
        if deployment.upstream.made_of == made_of:
            return deployment
    return Deployment(config, Leased(partial(_new_upstream, config, loaded), made_of), ejection, clock)


def _new_upstream(config: UpstreamConfig, loaded: Loaded) -> Upstream:
    """Each kind is imported only where it is configured: LangChain must cost a plain start nothing.

    In replay mode none is: what does not exist can ask nobody.
    """
    if loaded.config.is_replay:
        return AbsentUpstream(config, shared=bool(loaded.config.cache.recordings))
    if isinstance(config, OpenAIUpstreamConfig):
        from gateway.upstreams.openai import OpenAIUpstream  # noqa: PLC0415

        keys = [loaded.secrets[name] for name in config.secret_names]
        return OpenAIUpstream(config, keys, loaded.proxies.get(config.name))
    if isinstance(config, LangChainUpstreamConfig):
        from gateway.upstreams.langchain import LangChainUpstream  # noqa: PLC0415

        return LangChainUpstream(config, loaded.secrets)
    from gateway.upstreams.simulated import SimulatedUpstream  # noqa: PLC0415

    return SimulatedUpstream(config)


def _stand_in(config: Config) -> Upstream | None:
    """The simulated model that answers what is not recorded, where that is wanted: the configured one, if there is any."""
    if not config.is_replay or config.replay.on_miss != "simulate":
        return None
    from gateway.upstreams.simulated import SimulatedUpstream  # noqa: PLC0415

    own = [each for each in config.upstreams if isinstance(each, SimulatedUpstreamConfig)]
    return SimulatedUpstream((own or [FALLBACK_UPSTREAM])[0])


def _router(config: Config, deployments: Iterable[Deployment], clock: Clock, draw: Callable[[], float]) -> Router:
    groups: dict[str, list[Deployment]] = {}
    for each in deployments:
        groups.setdefault(each.config.group_name, []).append(each)
    pools = {}
    for name, members in groups.items():
        budget = RetryBudget(config.retries.budget, config.retries.min_per_s, clock.monotonic())
        pools[name] = Pool(name, members, budget, draw)

    def fallback(name: str) -> Target:
        route = router.fallback(name)
        return Target(pools[route.upstream.name], route.model)

    flights = config.flights
    terms = AskingTerms(
        config.rule_book(), config.retries, flights.first_byte_timeout_s, flights.total_timeout_s, clock, draw
    )
    resilient = {name: Resilient(pool, terms, fallback) for name, pool in pools.items()}
    router = Router([(each.config, resilient[each.config.group_name]) for each in deployments])
    return router


def _wrong_fallbacks(config: Config, router: Router) -> Iterator[str]:
    for place, model in enumerate(config.models):
        for name in model.fallbacks or ():
            try:
                upstream = router.fallback(name).upstream
            except ModelNotFound:
                yield f"models.{place}.fallbacks: no upstream serves {name!r}"
                continue
            # A caller's credential is for the upstream that it has asked.
            if upstream.passes_credential and any(_may_ask(router, pattern) is not upstream for pattern in model.names):
                yield f"models.{place}.fallbacks: {upstream.name!r} has no key of its own to stand in with"


def _may_ask(router: Router, name: str) -> Upstream | None:
    try:
        return router.route(name).upstream
    except ModelNotFound:
        return None

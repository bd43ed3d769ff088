"""The composition root: the only file that names concrete classes together."""

import asyncio
import dataclasses
import gc
import logging
import random
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any

from aiohttp import web

from gateway.admin import Admin
from gateway.config import (
    FALLBACK_UPSTREAM,
    Config,
    LangChainUpstreamConfig,
    Loaded,
    OpenAIUpstreamConfig,
    UpstreamConfig,
)
from gateway.core.apis import APIS
from gateway.core.balancing import EjectionRules
from gateway.core.policy import ModelRules, RuleBook
from gateway.core.retrying import RetryBudget
from gateway.eraser import Eraser
from gateway.errors import ConfigError, ModelNotFound, StoreUnavailable
from gateway.flights import Flights
from gateway.http import admin, completions, edge, small, streams
from gateway.http.body import READ_TIMEOUT_S
from gateway.http.connection import Patience, Runner
from gateway.http.relay import Relay
from gateway.observe import AccessLog, Sink
from gateway.ports import Store, Upstream
from gateway.pump import Rules
from gateway.purges import Purges
from gateway.questions import CacheRules, Questions, Tenants
from gateway.service import Service
from gateway.sharing import Terms
from gateway.store.embedded import EmbeddedServer
from gateway.store.in_process import in_process_redis
from gateway.store.redis import RedisStore, connect
from gateway.streams import Streams
from gateway.tally import Tally
from gateway.upstreams.asking import AskingTerms, Target
from gateway.upstreams.pool import Deployment, Pool
from gateway.upstreams.resilient import Resilient
from gateway.upstreams.router import Router

log = logging.getLogger(__name__)

SERVICE = web.AppKey("service", Service)
STREAMS = web.AppKey("streams", Streams)
RUNNING = web.AppKey("running", edge.Running)
# The handler owns nothing but a cursor, so a caller who leaves may take it along: a reader that waits is freed at once.
RUNNER_OPTIONS: dict[str, Any] = {
    "handler_cancellation": True,
    "access_log": None,
    "logger": edge.server_log,
    "keepalive_timeout": 75.0,
}
_BACKLOG = 4096
# A request makes a thousand objects and leaves no cycles behind: by default each would pay for a collection.
_GC_THRESHOLD = 20_000
_LAST_WORDS_S = 2.0


class SystemClock:
    """The real time."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


async def open_store(stack: AsyncExitStack, loaded: Loaded) -> tuple[RedisStore, str]:
    """The configured store, entered on ``stack``, and a word on what it is."""
    config = loaded.config.redis
    url, described = config.url, config.shown_url
    client = None
    if url == "embedded":
        directory = loaded.cache_dir / config.embedded_dir if config.embedded_dir else None
        try:
            server = await stack.enter_async_context(EmbeddedServer(directory, config.embedded_max_bytes))
            url, described = server.url, f"embedded Valkey ({server.described})"
        except StoreUnavailable as error:
            log.warning("%s. The cache is kept in this process, slowly, and is gone when it ends.", error)
            client, described = in_process_redis(), "in this process (fakeredis)"
    secret = loaded.secrets.get(loaded.config.cache.key_secret_env)
    flights = loaded.config.flights
    store = RedisStore(
        client or connect(config, url),
        config,
        secret=secret.encode() if secret else None,
        lease_s=flights.lease_s,
        resume_s=flights.resume_s,
        compress_from_bytes=loaded.config.cache.compress_from_bytes,
    )
    return await stack.enter_async_context(store), described


def build_upstream(config: UpstreamConfig, loaded: Loaded) -> Upstream:
    """Each kind is imported only where it is configured: LangChain must cost a plain start nothing."""
    if isinstance(config, OpenAIUpstreamConfig):
        from gateway.upstreams.openai import OpenAIUpstream  # noqa: PLC0415

        keys = [loaded.secrets[name] for name in config.key_names]
        return OpenAIUpstream(config, keys, loaded.proxies.get(config.name))
    if isinstance(config, LangChainUpstreamConfig):
        from gateway.upstreams.langchain import LangChainUpstream  # noqa: PLC0415

        return LangChainUpstream(config, loaded.secrets)
    from gateway.upstreams.simulated import SimulatedUpstream  # noqa: PLC0415

    return SimulatedUpstream(config)


def build_router(loaded: Loaded) -> Router:
    """Raises `ConfigError` where an upstream cannot be made, or a fallback means none."""
    config, clock, draw = loaded.config, SystemClock(), random.Random().random  # noqa: S311  # it spreads load
    configs = config.upstreams or (FALLBACK_UPSTREAM,)
    ejection = EjectionRules(**dict(config.ejection))
    groups: dict[str, list[Deployment]] = {}
    for each in configs:
        deployment = Deployment(each, build_upstream(each, loaded), ejection, clock)
        groups.setdefault(each.group_name, []).append(deployment)
    terms = AskingTerms(
        rule_book(config), config.retries, config.flights.first_byte_timeout_s, config.flights.total_timeout_s, clock, draw
    )
    pools = {}
    for name, deployments in groups.items():
        budget = RetryBudget(config.retries.budget, config.retries.min_per_s, clock.monotonic())
        pools[name] = Pool(name, deployments, budget, draw)

    def fallback(name: str) -> Target:
        route = router.fallback(name)
        return Target(pools[route.upstream.name], route.model)

    resilient = {name: Resilient(pool, terms, fallback) for name, pool in pools.items()}
    router = Router([(each, resilient[each.group_name]) for each in configs])
    if problems := list(_wrong_fallbacks(config, router)):
        raise ConfigError(problems)
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


def build_app(config: Config, store: RedisStore, router: Router, admin_key: str = "") -> web.Application:
    """The application over a store and upstreams that are open. Without an ``admin_key`` nobody administers it."""
    clock = SystemClock()
    access_log = AccessLog()
    sinks: list[Sink] = [access_log] if config.log.access else []
    running = edge.Running()
    app = web.Application(middlewares=[edge.middleware(sinks, running)], client_max_size=config.server.max_body_bytes)
    app[RUNNING] = running
    app[READ_TIMEOUT_S] = config.server.read_timeout_s
    longest_s = max(config.flights.total_timeout_s, *(model.total_timeout_s or 0.0 for model in config.models), 0.0)
    purges = Purges(store, clock, longest_s=longest_s)
    tally = Tally(store)
    flights = Flights(store, purges, clock, _flight_rules(config), secrets.token_hex, tally)
    tenants, rules = Tenants(store), _cache_rules(config)
    questions = Questions(router, store, tenants, rules)
    app[SERVICE] = Service(questions, store, flights, rules, clock, purges, tally)
    app[STREAMS] = Streams(app[SERVICE], questions, flights, store, tenants, clock, purges)
    eraser = Eraser(store, store, router, purges, clock)
    if admin_key and config.admin.is_open:
        about = Admin(
            store,
            store,
            questions=questions,
            router=router,
            models=rule_book(config),
            purges=purges,
            tally=tally,
            eraser=eraser,
            clock=clock,
        )
        admin.add_routes(app, about, admin_key)
    _add_routes(app, config, store, router)

    async def closing(_: web.Application) -> AsyncIterator[None]:
        await purges.open()
        yield
        await app[SERVICE].close()
        await eraser.close()
        await purges.close()
        await tally.close()
        access_log.flush()

    app.cleanup_ctx.append(closing)
    return app


def _cache_rules(config: Config) -> CacheRules:
    cache = config.cache
    return CacheRules(
        shared=cache.scope == "shared",
        ignored_paths=cache.ignored_paths,
        fresh_identity=config.replay.identity == "fresh",
        pace=config.replay.as_pace(),
        models=rule_book(config),
        keep_requests=cache.keep_requests,
        sample_order=cache.sample_order,
        sample_seed=cache.sample_seed,
    )


def rule_book(config: Config) -> RuleBook:
    """The rules of ``[cache]`` and of ``[[models]]``."""
    names = {field.name for field in dataclasses.fields(ModelRules)}
    cached = {name: value for name, value in config.cache if name in names}
    default = ModelRules(**cached, retries=config.retries.max_retries)
    models = [(model.names, dict(model)) for model in config.models]
    if not config.cache.enabled:
        models = [(names, {**rules, "enabled": False}) for names, rules in models]
    return RuleBook(default, models)


def _flight_rules(config: Config) -> Rules:
    flights = config.flights
    return Rules(
        terms=Terms(flights.lease_s, flights.max_flight_bytes),
        when_abandoned=flights.when_abandoned,
        abandon_grace_s=flights.abandon_grace_s,
        idle_timeout_s=flights.idle_timeout_s,
        total_timeout_s=flights.total_timeout_s,
    )


def _add_routes(app: web.Application, config: Config, store: Store, router: Router) -> None:
    server = config.server
    timing = completions.Timing(
        server.head_after_s, server.keepalive_s, server.write_timeout_s, config.redis.lookup_timeout_s
    )
    own: dict[str, list[str]] = {}
    for api in APIS.values():
        handler = completions.handler(api, app[SERVICE], timing, event_ids=config.flights.event_ids)
        own[api.path] = list(completions.METHODS)
        for method in completions.METHODS:
            app.router.add_route(method, f"/v1/{api.path}", handler)
    app.router.add_get("/v1/streams/{id}", streams.resume(app[STREAMS], app[SERVICE], timing), allow_head=False)
    app.router.add_post("/v1/streams/{id}/cancel", streams.cancel(app[STREAMS]))
    app.router.add_get("/v1/streams/{id}/status", streams.status(app[STREAMS]))
    app.router.add_route("*", "/v1/streams/{rest:.*}", streams.unserved)
    models = small.Models(router, int(time.time()))
    app.router.add_get("/v1/models", models.listing)
    app.router.add_get("/v1/models/{model:.+}", models.one)
    own["models"] = ["GET", "HEAD"]
    app.router.add_get("/healthz", small.health(store))
    app.router.add_get("/openapi.json", small.openapi(server.relay_paths, admin=config.admin.is_open))
    app.router.add_get("/", small.root)
    relay = Relay(router, _relay_upstream(config, router), server.relay_paths, own, server.write_timeout_s)
    app.router.add_route("*", "/v1/{path:.*}", relay.handler())


def _relay_upstream(config: Config, router: Router) -> Upstream | None:
    """Where requests go that name no model: as configured, else to the default upstream, else to the only one."""
    group = {each.name: each.group_name for each in config.upstreams}.get(config.server.relay_upstream)
    named = [upstream for upstream in router.upstreams if upstream.name == group]
    if named:
        return named[0]
    return router.default or (router.upstreams[0] if len(router.upstreams) == 1 else None)


async def rehearse(loaded: Loaded) -> None:
    """Makes all that `serve` would make of the configuration, and opens none of it. Raises `ConfigError`."""
    router = build_router(loaded)
    if loaded.config.redis.url != "embedded":
        await connect(loaded.config.redis, loaded.config.redis.url).aclose()
    for upstream in router.upstreams:
        await upstream.close()


def _on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop.set)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))


async def serve(loaded: Loaded, announce: Callable[[str], None]) -> None:
    """Runs until SIGINT or SIGTERM. Raises `ConfigError`, and `OSError` where it cannot listen."""
    config = loaded.config
    stop = asyncio.Event()
    _on_signals(stop)
    async with AsyncExitStack() as stack:
        router = build_router(loaded)
        for upstream in router.upstreams:
            stack.push_async_callback(upstream.close)
        store, store_described = await open_store(stack, loaded)
        app = build_app(config, store, router, loaded.secrets.get(config.admin.key_env, ""))
        runner = Runner(app, patience(config), shutdown_timeout=_LAST_WORDS_S, **RUNNER_OPTIONS)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, config.server.host, config.server.port, backlog=_BACKLOG)
        await site.start()
        announce(_announcement(runner, config, store_described))
        gc.freeze()  # what is loaded by now stays: the collector need not look at it again
        gc.set_threshold(_GC_THRESHOLD)
        await stop.wait()
        await _drain(site, app[RUNNING], config.server.shutdown_grace_s)
        await app[SERVICE].close()


def patience(config: Config) -> Patience:
    """What `Runner` is to have with callers."""
    return Patience(config.server.read_timeout_s, config.server.write_timeout_s)


async def _drain(site: web.TCPSite, running: edge.Running, grace_s: float) -> None:
    """Takes no more connections, and lets running answers end within the grace."""
    await site.stop()
    with suppress(TimeoutError):
        async with asyncio.timeout(grace_s):
            await running.ended()


def _announcement(runner: web.AppRunner, config: Config, store: str) -> str:
    host, port = next(iter(runner.addresses))[:2]
    base_url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    cache = f"cache: {store if config.cache.enabled else 'off'}"
    administration = ["admin: on at /admin/"] if config.admin.is_open else []
    return "\n".join([f"listening on {base_url}", cache, *administration, describe_upstreams(config)])


def describe_upstreams(config: Config) -> str:
    """One line an upstream."""
    if not config.upstreams:
        return "upstream: none is configured, so a simulated model answers (see [[upstreams]] in config.toml)"
    return "\n".join(f"upstream {upstream.name}: {_described(upstream)}" for upstream in config.upstreams)


def _described(upstream: UpstreamConfig) -> str:
    models = [*upstream.models, *upstream.aliases, *(["any other model"] if upstream.default else [])]
    serves = (", ".join(models) or "no model") + (f", in the group {upstream.group}" if upstream.group else "")
    if isinstance(upstream, OpenAIUpstreamConfig):
        key = f"key from {', '.join(upstream.key_names)}" if upstream.key_names else "the caller's own key"
        return f"{upstream.base_url} ({key}) for {serves}"
    if isinstance(upstream, LangChainUpstreamConfig):
        return f"{upstream.target} for {serves}"
    return f"a simulated model for {serves}"

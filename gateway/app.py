"""The composition root: the only file that names concrete classes together."""

import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from aiohttp import web

from gateway.admin import Admin
from gateway.config import Config, LangChainUpstreamConfig, Loaded, OpenAIUpstreamConfig, UpstreamConfig
from gateway.core.apis import APIS
from gateway.eraser import Eraser
from gateway.errors import CommandFailed, StoreAway, StoreUnavailable
from gateway.faults import Faults
from gateway.flights import Flights
from gateway.http import admin, completions, cors, edge, small, streams
from gateway.http import metrics as metrics_http
from gateway.http.admission import admitted
from gateway.http.body import READ_TIMEOUT_S
from gateway.http.connection import Patience
from gateway.http.relay import Relay
from gateway.limits import Limits
from gateway.metrics import Metrics, Sources
from gateway.missing import Missing
from gateway.nearby import Nearby
from gateway.observe import AccessLog, Sink, UpstreamState
from gateway.ports import Store, Upstream
from gateway.probe import Probe
from gateway.pulse import Pulse, Reporter
from gateway.pump import Rules
from gateway.purges import Purges
from gateway.questions import CacheRules, Questions, Tenants
from gateway.recordings import Recordings, Whose
from gateway.service import Service
from gateway.sharing import Terms
from gateway.store.embedded import EmbeddedServer
from gateway.store.in_process import in_process_redis
from gateway.store.redis import RedisStore, connect
from gateway.streams import Streams
from gateway.tally import Tally
from gateway.upstreams.fleet import assemble
from gateway.upstreams.resilient import Resilient
from gateway.upstreams.router import Router

log = logging.getLogger(__name__)

SERVICE = web.AppKey("service", Service)
STREAMS = web.AppKey("streams", Streams)
RECORDINGS = web.AppKey("recordings", Recordings)
RUNNING = web.AppKey("running", edge.Running)
METRICS = web.AppKey("metrics", Metrics)
ADMIN_APP = web.AppKey("admin_app", web.Application)
"""What is served at ``[admin] listen``, where that is configured."""
LIMITS = web.AppKey("limits", Limits)
# The handler owns nothing but a cursor, so a caller who leaves may take it along: a reader that waits is freed at once.
RUNNER_OPTIONS: dict[str, Any] = {
    "handler_cancellation": True,
    "access_log": None,
    "logger": edge.server_log,
    "keepalive_timeout": 75.0,
}


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
        try:
            server = await stack.enter_async_context(EmbeddedServer(loaded.embedded_dir, config.embedded_max_bytes))
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


class Adjustable:
    """What in a running application follows the configuration."""

    def __init__(self, router: Router, rules: CacheRules, admin_key: str, limits: Limits) -> None:
        self.router = router
        self.limits = limits
        self.probe = Probe(limits.lag)
        self.rules = rules
        self.admin_key = admin_key
        self.relay: Relay | None = None

    def adjust(self, loaded: Loaded, router: Router) -> None:
        """At once, for all requests that come from now on; those before go on as they began."""
        config = loaded.config
        self.router.become(router)
        self.rules.become(_cache_rules(config))
        self.limits.become(config.limits)
        self.probe.adjust()
        self.admin_key = loaded.secrets.get(config.admin.key_name, "")
        if self.relay:
            self.relay.fallback = _relay_upstream(config, router)


ADJUSTABLE = web.AppKey("adjustable", Adjustable)


def build_app(config: Config, store: RedisStore, router: Router, admin_key: str = "") -> web.Application:
    """The application over a store and upstreams that are open. Without an ``admin_key`` nobody administers it.

    What is served elsewhere is its `ADMIN_APP`; it is opened and closed with this one.
    """
    clock = SystemClock()
    access_log = AccessLog()
    limits, running = Limits(config.limits), edge.Running()
    longest_s = max(config.flights.total_timeout_s, *(model.total_timeout_s or 0.0 for model in config.models), 0.0)
    purges = Purges(store, clock, longest_s=longest_s)
    tally = Tally(store)
    flights = Flights(store, purges, clock, _flight_rules(config), secrets.token_hex, tally, limits)
    metrics = Metrics(Sources(running, flights, tally, lambda: store.state, lambda: _states(router), limits.snapshot))
    sinks: list[Sink] = [access_log] if config.log.access else []
    if config.metrics.enabled:
        sinks.append(metrics.requests)
    app = web.Application(middlewares=[edge.middleware(sinks, running)], client_max_size=config.server.max_body_bytes)
    cors.allow(app, config.server.cors_origins)
    app[LIMITS] = limits
    app[RUNNING], app[METRICS], app[READ_TIMEOUT_S] = running, metrics, config.server.read_timeout_s
    tenants, rules = Tenants(store), _cache_rules(config)
    adjustable = app[ADJUSTABLE] = Adjustable(router, rules, admin_key, limits)
    questions = Questions(router, store, tenants, rules)
    missing = Missing(questions, Nearby(store, clock))
    pulse = Pulse(store.replica, clock, tally.totals) if admin_key and config.admin.is_open else None
    app[SERVICE] = Service(questions, store, flights, rules, clock, purges, tally, missing, pulse)
    app[STREAMS] = Streams(app[SERVICE], questions, flights, store, tenants, clock, purges)
    eraser = Eraser(store, store, router, purges, clock)
    app[RECORDINGS] = Recordings(store, store, router=router, tenants=tenants, rules=rules, purges=purges, clock=clock)
    operators = _operators(app, config, store, sinks) if config.admin.listen else app
    reporter = _reporter(pulse, store, running, sinks) if pulse else None
    if reporter:
        about = Admin(
            store,
            store,
            questions=questions,
            router=router,
            models=rules.models,
            purges=purges,
            tally=tally,
            eraser=eraser,
            reporter=reporter,
            clock=clock,
        )
        admin.add_routes(operators, about, app[RECORDINGS], lambda: adjustable.admin_key)
    if config.metrics.enabled:
        operators.router.add_get("/metrics", _metrics_handler(config, metrics, adjustable))
    _add_routes(app, config, router, tenants, Faults(questions, rules))
    _add_health(app, store, running)

    async def closing(_: web.Application) -> AsyncIterator[None]:
        await purges.open()
        metrics.lag.open()
        adjustable.probe.open()
        yield
        adjustable.probe.close()
        metrics.lag.close()
        await app[SERVICE].close()
        if reporter:
            await reporter.close()
        await eraser.close()
        await purges.close()
        await tally.close()
        access_log.flush()

    app.cleanup_ctx.append(closing)
    return app


def _operators(app: web.Application, config: Config, store: Store, sinks: list[Sink]) -> web.Application:
    """What is served at ``[admin] listen``."""
    # Of what runs here nothing is waited for when the process ends, and nothing is refused.
    around = edge.middleware(sinks, edge.Running())
    operators = app[ADMIN_APP] = web.Application(middlewares=[around], client_max_size=config.server.max_body_bytes)
    operators[READ_TIMEOUT_S] = config.server.read_timeout_s
    _add_health(operators, store, app[RUNNING])
    operators.router.add_get("/openapi.json", small.openapi_of_operators(config))
    return operators


def _states(router: Router) -> Iterator[UpstreamState]:
    """Of all deployments, as they are configured by now."""
    for upstream in router.upstreams:
        if isinstance(upstream, Resilient):
            yield from (each.state() for each in upstream.pool.deployments)


def _metrics_handler(config: Config, metrics: Metrics, adjustable: Adjustable) -> edge.Handler:
    """Open at a listener of its own, which an operator has named; else nothing is told to callers unasked."""
    handler = metrics_http.served(metrics)
    if config.admin.listen or config.metrics.public:
        return handler
    return admin.guarded(handler, lambda: adjustable.admin_key) if config.admin.is_open else metrics_http.closed


def _add_health(app: web.Application, store: Store, running: edge.Running) -> None:
    for path in ("/healthz", "/health"):  # vLLM's: tools that drive its server look there first (guidellm)
        app.router.add_get(path, small.health(store))
    app.router.add_get("/readyz", small.readiness(store, running))


async def load_recordings(app: web.Application, config: Config) -> None:
    """What `serve` starts with. Raises `ConfigError`, and `CommandFailed` where the store is away.

    Each worker does it: what is there already is written once more, and changes nothing.
    """
    if not config.cache.recordings:
        return
    path = Path(config.cache.recordings)
    whose: Whose = "everyone" if _is_shared(config) else "recorded"
    try:
        taken = await app[RECORDINGS].take_file(path, whose=whose)
    except StoreAway as error:
        raise CommandFailed(f"{path} cannot be loaded: {error.message}") from None
    log.info("%d recordings of %s can be replayed", taken.counts["imported"] + taken.counts["kept"], path)


def _is_shared(config: Config) -> bool:
    """Whether answers are everybody's. Those of a file that is replayed are: nobody can tell who its tenants were."""
    return config.cache.scope == "shared" or (config.is_replay and bool(config.cache.recordings))


def _reporter(pulse: Pulse, store: RedisStore, running: edge.Running, sinks: list[Sink]) -> Reporter:
    """From now on the pulse is counted, and reported."""
    pulse.open = lambda: running.streams
    sinks.append(pulse)
    return Reporter(pulse, store)


def _cache_rules(config: Config) -> CacheRules:
    cache = config.cache
    return CacheRules(
        shared=_is_shared(config),
        ignored_paths=cache.ignored_paths,
        fresh_identity=config.replay.identity == "fresh",
        pace=config.replay.as_pace(),
        models=config.rule_book(),
        keep_requests=cache.keep_requests,
        sample_order=cache.sample_order,
        sample_seed=cache.sample_seed,
        mode=cache.mode,
        faults_allowed=config.faults.allowed,
        fault_seed=config.faults.seed,
    )


def _flight_rules(config: Config) -> Rules:
    flights = config.flights
    return Rules(
        terms=Terms(flights.lease_s, flights.max_flight_bytes),
        when_abandoned=flights.when_abandoned,
        abandon_grace_s=flights.abandon_grace_s,
        idle_timeout_s=flights.idle_timeout_s,
        total_timeout_s=flights.total_timeout_s,
    )


def _add_routes(app: web.Application, config: Config, router: Router, tenants: Tenants, faults: Faults) -> None:
    server, limits, running = config.server, app[LIMITS], app[RUNNING]
    timing = completions.Timing(
        server.head_after_s, server.keepalive_s, server.write_timeout_s, config.redis.lookup_timeout_s
    )
    own: dict[str, list[str]] = {}
    for api in APIS.values():
        handler = completions.handler(api, app[SERVICE], timing, faults, event_ids=config.flights.event_ids)
        handler = admitted(handler, limits, tenants, running)
        own[api.path] = list(completions.METHODS)
        for method in completions.METHODS:
            app.router.add_route(method, f"/v1/{api.path}", handler)
    resume = admitted(streams.resume(app[STREAMS], app[SERVICE], timing), limits, tenants, running, resumes=True)
    app.router.add_get("/v1/streams/{id}", resume, allow_head=False)
    app.router.add_post("/v1/streams/{id}/cancel", streams.cancel(app[STREAMS]))
    app.router.add_get("/v1/streams/{id}/status", streams.status(app[STREAMS]))
    app.router.add_route("*", "/v1/streams/{rest:.*}", streams.unserved)
    own["models"] = ["GET", "HEAD"]
    relay = app[ADJUSTABLE].relay = Relay(
        router, _relay_upstream(config, router), server.relay_paths, own, server.write_timeout_s
    )
    models = small.Models(router, relay, int(time.time()))
    app.router.add_get("/v1/models", models.listing)
    app.router.add_get("/v1/models/{model:.+}", models.one)
    app.router.add_get("/openapi.json", small.openapi(config))
    app.router.add_get("/", small.root)
    app.router.add_route("*", "/v1/{path:.*}", admitted(relay.handler(), limits, tenants, running))


def _relay_upstream(config: Config, router: Router) -> Upstream | None:
    """Where requests go that name no model: as configured, else to the default upstream, else to the only one."""
    group = {each.name: each.group_name for each in config.upstreams}.get(config.server.relay_upstream)
    named = [upstream for upstream in router.upstreams if upstream.name == group]
    if named:
        return named[0]
    return router.default or (router.upstreams[0] if len(router.upstreams) == 1 else None)


async def rehearse(loaded: Loaded) -> None:
    """Makes all that `serve` would make of the configuration, and opens none of it. Raises `ConfigError`."""
    fleet = assemble(loaded, SystemClock())
    if loaded.config.redis.url != "embedded":
        await connect(loaded.config.redis, loaded.config.redis.url).aclose()
    await fleet.close()


def patience(config: Config) -> Patience:
    """What `Runner` is to have with callers."""
    return Patience(config.server.read_timeout_s, config.server.write_timeout_s)


MODES = {"record": "; record mode: every answer is asked for anew", "replay": "; replay mode: no model is asked"}


def announcement(address: Any, admin_address: Any, config: Config, store: str) -> str:
    """Where it listens, where it keeps what, and whom it asks."""
    cache = f"cache: {store if config.cache.mode != 'off' else 'off'}{MODES.get(config.cache.mode, '')}"
    at = _origin(admin_address) if admin_address else ""
    operators = [f"admin: on at {at}/admin/"] if config.admin.is_open else []
    if config.metrics.enabled and (admin_address or config.metrics.public or config.admin.is_open):
        guarded = not (admin_address or config.metrics.public)
        operators.append(f"metrics: on at {at}/metrics{', with the admin key' if guarded else ''}")
    return "\n".join([f"listening on {_origin(address)}/v1", cache, *operators, describe_upstreams(config)])


def _origin(address: Any) -> str:
    host, port = address[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def describe_upstreams(config: Config) -> str:
    """One line an upstream."""
    if config.is_replay:
        return f"upstream: none, since this is replay mode; what is not recorded: {config.replay.on_miss}"
    if not config.upstreams:
        return "upstream: none is configured, so a simulated model answers (see [[upstreams]] in config.toml)"
    return "\n".join(f"upstream {upstream.name}: {_described(upstream)}" for upstream in config.upstreams)


def _described(upstream: UpstreamConfig) -> str:
    models = [*upstream.models, *upstream.aliases, *(["any other model"] if upstream.default else [])]
    serves = (", ".join(models) or "no model") + (f", in the group {upstream.group}" if upstream.group else "")
    if isinstance(upstream, OpenAIUpstreamConfig):
        key = f"key from {', '.join(upstream.secret_names)}" if upstream.secret_names else "the caller's own key"
        return f"{upstream.base_url} ({key}) for {serves}"
    if isinstance(upstream, LangChainUpstreamConfig):
        return f"{upstream.target} for {serves}"
    return f"a simulated model for {serves}"

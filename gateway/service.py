"""One verb: `Service.open` turns a request into a reader and a disposition: key → policy → store → flight → upstream."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from gateway.core.apis import Api, RequestProblem
from gateway.core.key import CacheKey, cache_key, tenant_of
from gateway.core.pacing import Pace
from gateway.core.policy import NO_DIRECTIVES, Directives, Disposition, age_s, remaining_s
from gateway.core.recording import Identity, Recording
from gateway.errors import InvalidRequest, NotCached, ShuttingDown, StoreAway, StoreError, StoreUnavailable
from gateway.flight import Flight, Flights, Plan
from gateway.ports import Call, Clock, Store, Upstream
from gateway.reader import FlightReader, Reader, RecordingReader

# What a caller identifies itself with. It goes upstream only where the upstream has no key of its own.
CREDENTIAL_HEADERS = ("authorization", "api-key", "x-api-key", "openai-organization", "openai-project")
# What may always go upstream: none of it changes the answer.
FORWARDED_HEADERS = ("traceparent", "tracestate", "x-client-request-id")


class Route(Protocol):
    """Where a request goes."""

    @property
    def upstream(self) -> Upstream: ...

    @property
    def model(self) -> str: ...

    @property
    def ignored_paths(self) -> tuple[str, ...]: ...


class Router(Protocol):
    """Knows which upstream serves a model."""

    def route(self, model: str) -> Route: ...


_MISS = Disposition("miss")
_MAX_TENANTS = 4096


@dataclass(frozen=True, slots=True)
class CacheRules:
    """What the configuration says of the cache."""

    enabled: bool
    shared: bool
    ttl_s: float
    ignored_paths: tuple[str, ...]
    fresh_identity: bool
    pace: Pace


class Request(NamedTuple):
    """A caller's request, read. ``headers`` are found by their names in lower case."""

    api: Api
    body: dict[str, Any]
    headers: Mapping[str, str]
    directives: Directives = NO_DIRECTIVES

    @property
    def streamed(self) -> bool:
        return self.body.get("stream") is True

    @property
    def usage(self) -> bool:
        """Whether the caller asked for usage in the stream."""
        options = self.body.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True


class Opened(NamedTuple):
    """A reader over the answer, and what was done to find it."""

    reader: Reader
    disposition: Disposition
    model: str
    upstream: str


class Service:
    """Answers requests from the store, from a running flight, or from a new one."""

    def __init__(self, router: Router, store: Store, flights: Flights, rules: CacheRules, clock: Clock) -> None:
        self._router = router
        self._store = store
        self._flights = flights
        self._rules = rules
        self._clock = clock
        self._replays: set[RecordingReader] = set()
        self._tenants: dict[tuple[bytes, tuple[str, ...]], str] = {}
        # An id must be unlike any other, not hard to guess; asking the system for each would cost a tenth of a hit.
        self._random = random.Random()  # noqa: S311

    async def open(self, request: Request) -> Opened:
        """Finds the answer, or begins it. The reader must be given back to `leave`. Raises `GatewayError`."""
        route = self._route(request)
        directives = request.directives
        if not self._rules.enabled or directives.no_store:
            reason = Disposition("bypass", "disabled", fwd="bypass")
            if self._rules.enabled:
                reason = Disposition("bypass", "no-store", fwd="request")
            return self._begin(request, route, None, reason)
        key = self._key(request, route)
        if directives.no_cache:
            return self._begin(request, route, key, Disposition("miss", "no-cache", fwd="request"))
        # A flight knows better than the store: it is newer, or its recording is still on the way there.
        if flight := self._flights.find(key):
            return await self._join(request, route, key, flight, _MISS)
        recording, miss = await self._lookup(key, request)
        if recording:
            return self._replay(request, route, recording)
        # Another caller may have begun while this one looked; nothing is awaited between here and the start.
        if flight := self._flights.find(key):
            return await self._join(request, route, key, flight, miss)
        return self._begin(request, route, key, miss)

    def leave(self, opened: Opened) -> None:
        """The caller has done with its reader."""
        opened.reader.leave()
        if isinstance(opened.reader, RecordingReader):
            self._replays.discard(opened.reader)

    async def close(self) -> None:
        """Ends all running answers with an error that their callers are told."""
        for reader in list(self._replays):
            reader.interrupt(ShuttingDown("The gateway is shutting down; ask again."))
        await self._flights.close()

    def _route(self, request: Request) -> Route:
        try:
            request.api.validate(request.body)
        except RequestProblem as problem:
            raise InvalidRequest(str(problem), param=problem.param) from None
        return self._router.route(request.body["model"])

    def _key(self, request: Request, route: Route) -> CacheKey:
        upstream = route.upstream
        owner = "shared"
        if upstream.passes_credential or not self._rules.shared:
            owner = self._tenant(tuple([request.headers.get(name, "") for name in CREDENTIAL_HEADERS]))
        try:
            return cache_key(
                self._store.secret,
                owner=owner,
                api=request.api,
                route=(upstream.name, route.model),
                body=request.body,
                ignored=(*self._rules.ignored_paths, *route.ignored_paths),
            )
        except RequestProblem as problem:
            raise InvalidRequest(str(problem), param=problem.param) from None

    def _tenant(self, credential: tuple[str, ...]) -> str:
        known = self._store.secret, credential
        tenant = self._tenants.get(known)
        if tenant is None:
            if len(self._tenants) >= _MAX_TENANTS:
                self._tenants.clear()
            tenant = self._tenants[known] = tenant_of(*known)
        return tenant

    async def _lookup(self, key: CacheKey, request: Request) -> tuple[Recording | None, Disposition]:
        directives = request.directives
        want = "stream" if request.streamed else "whole"
        try:
            recording = await self._store.lookup(key, want, patient=directives.only_if_cached)  # type: ignore[arg-type]
        except StoreUnavailable:
            if directives.only_if_cached:
                raise StoreAway("The store cannot be reached, so nobody can say whether the answer is there.") from None
            return None, Disposition("miss", "store-unavailable")
        except StoreError:
            return None, Disposition("miss", "store-corrupt")
        if recording and directives.accept(recording.meta, self._clock.now()):
            return recording, _MISS
        if directives.only_if_cached and not self._flights.find(key):
            raise NotCached("The answer is not in the cache, and only-if-cached forbids to ask the model.")
        return None, Disposition("miss", fwd="request" if recording else "miss")

    def _replay(self, request: Request, route: Route, recording: Recording) -> Opened:
        meta, now = recording.meta, self._clock.now()
        identity = None
        if self._rules.fresh_identity:
            identity = Identity.fresh(meta.id or request.api.id_prefix, f"{self._random.getrandbits(256):064x}", now)
        reader = RecordingReader(recording, identity, usage=request.usage, pace=self._rules.pace, clock=self._clock)
        self._replays.add(reader)
        disposition = Disposition("hit", age_s=age_s(meta, now), ttl_s=remaining_s(meta, now))
        return Opened(reader, disposition, route.model, route.upstream.name)

    async def _join(self, request: Request, route: Route, key: CacheKey, flight: Flight, miss: Disposition) -> Opened:
        if flight.outcome and (recording := await flight.sealed()):
            if request.directives.accept(recording.meta, self._clock.now()):
                return self._replay(request, route, recording)
            return self._begin(request, route, key, Disposition("miss", fwd="request"))
        reader = FlightReader(flight, usage=request.usage)
        return Opened(reader, Disposition("collapsed", miss.detail), route.model, route.upstream.name)

    def _begin(self, request: Request, route: Route, key: CacheKey | None, disposition: Disposition) -> Opened:
        if request.directives.only_if_cached:
            raise NotCached("The answer is not in the cache, and only-if-cached forbids to ask the model.")
        upstream = route.upstream
        names: Sequence[str] = FORWARDED_HEADERS
        if upstream.passes_credential:
            names = (*FORWARDED_HEADERS, *CREDENTIAL_HEADERS)
        headers = {name: request.headers[name] for name in names if name in request.headers}
        call = Call(request.api, {**request.body, "model": route.model}, request.streamed, headers)
        joinable = not request.directives.no_cache
        flight = self._flights.start(Plan(call, upstream, key, joinable=joinable, ttl_s=self._rules.ttl_s))
        return Opened(FlightReader(flight, usage=request.usage), disposition, route.model, upstream.name)

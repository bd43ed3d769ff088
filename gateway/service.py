"""One verb: `Service.open` turns a request into a reader and a disposition: key → policy → store → flight → upstream."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import orjson

from gateway.core.apis import APIS, Api, RequestProblem
from gateway.core.apis.base import IGNORED
from gateway.core.key import CacheKey, cache_key, tenant_of
from gateway.core.pacing import Pace
from gateway.core.policy import NO_DIRECTIVES, Directives, Disposition, age_s, remaining_s
from gateway.core.recording import Identity, Recording
from gateway.core.stream_id import NO_RUN, StreamId, mint
from gateway.errors import InvalidRequest, NotCached, ShuttingDown, StoreAway, StoreError, StoreUnavailable, StreamCancelled
from gateway.flight import Flight
from gateway.flights import Flights
from gateway.ports import Call, Clock, FlightId, LogName, Store, Upstream
from gateway.pump import Plan
from gateway.reader import EventIds, FlightReader, Reader, RecordingReader

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
_NOT_GOOD_ENOUGH = Disposition("miss", fwd="request")
"""What is stored is not what the caller's directives ask for."""
_MAX_TENANTS = 4096
_ANY_TIME_US = 1 << 62
StreamKind = Literal["flight", "hit"]


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
    event_ids: bool = False
    """Whether each event of a stream is to say from where to resume after it."""

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
    model: str = ""
    upstream: str = ""
    stream_id: str = ""
    """By which the stream can be resumed; empty where it cannot."""


class Tenants:
    """Whose entries those of a caller are."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[tuple[bytes, tuple[str, ...]], str] = {}

    def owner(self, headers: Mapping[str, str], *, shared: bool) -> str:
        """A digest of what the caller identified itself with, or a word for all callers together."""
        if shared:
            return "shared"
        asked = self._store.secret, tuple([headers.get(name, "") for name in CREDENTIAL_HEADERS])
        tenant = self._known.get(asked)
        if tenant is None:
            if len(self._known) >= _MAX_TENANTS:
                self._known.clear()
            tenant = self._known[asked] = tenant_of(*asked)
        return tenant


class _Question(NamedTuple):
    """A request that may be answered from the cache: where it goes, whose it is, and its key."""

    request: Request
    route: Route
    shared: bool
    owner: str
    key: CacheKey


class Service:
    """Answers requests from the store, from a running flight, or from a new one."""

    def __init__(  # noqa: PLR0913, PLR0917  # all that an answer may come from
        self, router: Router, store: Store, flights: Flights, tenants: Tenants, rules: CacheRules, clock: Clock
    ) -> None:
        self._router = router
        self._store = store
        self._flights = flights
        self._tenants = tenants
        self._rules = rules
        self._clock = clock
        self.replays: set[RecordingReader] = set()
        """Those that go on."""
        self._watches: dict[RecordingReader, asyncio.Task[None]] = {}
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
            return self._bypass(request, route, reason)
        question = self._question(request, route)
        if directives.no_cache:
            _check_that_asking_is_allowed(request)
            flight = self._flights.start(self._plan(question, joinable=False))
            return self._opened(question, flight, Disposition("miss", "no-cache", fwd="request"))
        return await self._find(question)

    def leave(self, opened: Opened) -> None:
        """The caller has done with its reader."""
        opened.reader.leave()
        if isinstance(opened.reader, RecordingReader):
            self.replays.discard(opened.reader)
            if watch := self._watches.pop(opened.reader, None):
                watch.cancel()

    async def close(self) -> None:
        """Ends all running answers with an error that their callers are told."""
        for reader in list(self.replays):
            reader.cut(ShuttingDown("The gateway is shutting down; ask again."))
        for watch in self._watches.values():
            watch.cancel()
        await asyncio.gather(*self._watches.values(), return_exceptions=True)
        await self._flights.close()

    def plan_of(self, noted: bytes, headers: Mapping[str, str], key: CacheKey) -> Plan:
        """How to run a call again, from what was noted of its request. Raises `GatewayError`."""
        told = orjson.loads(noted)
        api = APIS[told["api"]]
        request = Request(api, told["body"], headers)
        route = self._route(request)
        return self._plan(_Question(request, route, shared=False, owner="", key=key))

    def _route(self, request: Request) -> Route:
        try:
            request.api.validate(request.body)
        except RequestProblem as problem:
            raise InvalidRequest(str(problem), param=problem.param) from None
        return self._router.route(request.body["model"])

    def _question(self, request: Request, route: Route) -> _Question:
        upstream = route.upstream
        shared = self._rules.shared and not upstream.passes_credential
        owner = self._tenants.owner(request.headers, shared=shared)
        try:
            key = cache_key(
                self._store.secret,
                owner=owner,
                api=request.api,
                route=(upstream.name, route.model),
                body=request.body,
                ignored=(*self._rules.ignored_paths, *route.ignored_paths),
            )
        except RequestProblem as problem:
            raise InvalidRequest(str(problem), param=problem.param) from None
        return _Question(request, route, shared, owner, key)

    async def _find(self, question: _Question) -> Opened:
        """In this replica's flights, in the store, or in another replica's flights; else begins one."""
        key, miss, seen_us, tries = question.key, _MISS, -1, 0
        while True:
            # A flight knows better than the store: it is newer, or its recording is still on the way there.
            flight = self._flights.find(key)
            if flight is None:
                recording, miss = await self._lookup(question)
                if recording and question.request.directives.accept(recording.meta, self._clock.now()):
                    return self._replay(question, recording)
                if recording:
                    seen_us = int(recording.meta.started_at * 1e6)
                # Another caller may have begun while this one looked; nothing is awaited between here and the start.
                flight = self._flights.find(key)
            opened = await (self._join(question, flight, miss) if flight else self._start(question, miss, seen_us))
            if opened:
                return opened
            tries += 1
            if tries > 1 or miss.detail:
                seen_us = _ANY_TIME_US  # what is there cannot be read

    async def _lookup(self, question: _Question) -> tuple[Recording | None, Disposition]:
        """What is stored, and what to say where it will not do."""
        directives = question.request.directives
        want: Literal["stream", "whole"] = "stream" if question.request.streamed else "whole"
        try:
            recording = await self._store.lookup(question.key, want, patient=directives.only_if_cached)
        except StoreUnavailable:
            if directives.only_if_cached:
                raise StoreAway("The store cannot be reached, so nobody can say whether the answer is there.") from None
            return None, Disposition("miss", "store-unavailable")
        except StoreError:
            return None, Disposition("miss", "store-corrupt")
        return recording, _MISS if recording is None else _NOT_GOOD_ENOUGH

    async def _start(self, question: _Question, miss: Disposition, seen_us: int) -> Opened | None:
        """Begins a flight, which may turn out to follow another replica's; None where its recording has landed meanwhile."""
        _check_that_asking_is_allowed(question.request)
        flight = self._flights.start(self._plan(question, newer_than_us=seen_us))
        return await self._opened_when_resolved(question, flight, miss)

    async def _join(self, question: _Question, flight: Flight, miss: Disposition) -> Opened | None:
        if flight.outcome and (recording := await flight.sealed()):
            if question.request.directives.accept(recording.meta, self._clock.now()):
                return self._replay(question, recording)
            return await self._start(question, _NOT_GOOD_ENOUGH, int(recording.meta.started_at * 1e6))
        return await self._opened_when_resolved(question, flight, Disposition("collapsed", miss.detail))

    async def _opened_when_resolved(self, question: _Question, flight: Flight, disposition: Disposition) -> Opened | None:
        """A reader from the first moment, so that nobody takes the flight for abandoned while this caller waits."""
        reader = FlightReader(flight, usage=question.request.usage)
        try:
            resolution = await flight.resolved()
        except BaseException:
            reader.leave()
            raise
        if resolution == "landed" or flight.instead:
            reader.leave()
            if not flight.instead:
                return None
            return await self._opened_when_resolved(question, flight.instead, Disposition("collapsed", disposition.detail))
        if resolution == "followed":
            disposition = Disposition("collapsed", disposition.detail)
        return self._with_id(question, Opened(reader, disposition, question.route.model, question.route.upstream.name))

    def _opened(self, question: _Question, flight: Flight, disposition: Disposition) -> Opened:
        reader = FlightReader(flight, usage=question.request.usage)
        return self._with_id(question, Opened(reader, disposition, question.route.model, question.route.upstream.name))

    def _with_id(self, question: _Question, opened: Opened) -> Opened:
        """The same, with an id by which it can be resumed, if it is a stream of a flight that others may see."""
        request, reader = question.request, opened.reader
        if not (request.streamed and isinstance(reader, FlightReader) and reader.flight.name):
            return opened
        flight = reader.flight
        token, _, reader.nonce = self._mint(question, "flight", reader.flight.name.flight, run=flight.run)
        if request.event_ids:
            reader.ids = EventIds(token)
        return opened._replace(stream_id=token)

    def _replay(self, question: _Question, recording: Recording) -> Opened:
        request, meta, now = question.request, recording.meta, self._clock.now()
        token = nonce = digits = ""
        if request.streamed and meta.flight:
            token, digits, nonce = self._mint(question, "hit", FlightId(meta.flight), created=int(now))
        identity = None
        if self._rules.fresh_identity:
            digits = digits or f"{self._random.getrandbits(256):064x}"
            identity = Identity.fresh(meta.id or request.api.id_prefix, digits, now)
        ids = EventIds(token) if request.event_ids and token else None
        reader = RecordingReader(recording, identity, usage=request.usage, pace=self._rules.pace, clock=self._clock, ids=ids)
        reader.nonce = nonce
        self.replays.add(reader)
        if token and self._rules.pace.kind != "instant":
            name = LogName(question.key, FlightId(meta.flight))
            self._watches[reader] = asyncio.get_running_loop().create_task(self._cut_when_cancelled(reader, name))
        disposition = Disposition("hit", age_s=age_s(meta, now), ttl_s=remaining_s(meta, now))
        return Opened(reader, disposition, question.route.model, question.route.upstream.name, token)

    async def _cut_when_cancelled(self, reader: RecordingReader, name: LogName) -> None:
        """A replay that takes its time may be cancelled in another replica."""
        rung = asyncio.Event()
        try:
            await self._store.listen(name.flight, rung.set)
            while reader.nonce not in (await self._store.peek(name)).cancelled:
                await rung.wait()
                rung.clear()
            reader.cut(StreamCancelled("The stream was cancelled."))
        except StoreError:
            pass  # then nobody can have cancelled it there
        finally:
            self._store.stop_listening(name.flight, rung.set)

    def _mint(
        self, question: _Question, kind: StreamKind, flight: FlightId, *, run: str = NO_RUN, created: int = 0
    ) -> tuple[str, str, str]:
        """A new stream's id, the digits from which its fresh identity follows, and the reader's name."""
        request, nonce = question.request, self._random.randbytes(8)
        fresh = kind == "hit" and self._rules.fresh_identity
        stream = StreamId(  # by place: it is on the way of every hit
            kind, request.usage, request.event_ids, question.shared, fresh,
            request.api.name, question.key, flight, run, created, nonce,
        )  # fmt: skip
        token, digits = mint(self._store.secret, question.owner, stream)
        return token, digits, nonce.hex()

    def _bypass(self, request: Request, route: Route, disposition: Disposition) -> Opened:
        _check_that_asking_is_allowed(request)
        plan = Plan(self._call(request, route), route.upstream, None, joinable=False, ttl_s=self._rules.ttl_s)
        reader = FlightReader(self._flights.start(plan), usage=request.usage)
        return Opened(reader, disposition, route.model, route.upstream.name)

    def _plan(self, question: _Question, *, joinable: bool = True, newer_than_us: int = -1) -> Plan:
        request, route = question.request, question.route
        return Plan(
            self._call(request, route),
            route.upstream,
            question.key,
            joinable=joinable,
            ttl_s=self._rules.ttl_s,
            newer_than_us=newer_than_us,
            noted=partial(_noted, request),
        )

    @staticmethod
    def _call(request: Request, route: Route) -> Call:
        names: Sequence[str] = FORWARDED_HEADERS
        if route.upstream.passes_credential:
            names = (*FORWARDED_HEADERS, *CREDENTIAL_HEADERS)
        headers = {name: request.headers[name] for name in names if name in request.headers}
        return Call(request.api, {**request.body, "model": route.model}, request.streamed, headers)


def _check_that_asking_is_allowed(request: Request) -> None:
    if request.directives.only_if_cached:
        raise NotCached("The answer is not in the cache, and only-if-cached forbids to ask the model.")


def _noted(request: Request) -> bytes:
    """What another replica needs to run the call again: nothing that is the caller's own business, and no credential."""
    body = {name: value for name, value in request.body.items() if name not in IGNORED}
    return orjson.dumps({"api": request.api.name, "body": body})

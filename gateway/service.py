"""One verb: `Service.open` turns a request into a reader and a disposition: key → policy → store → flight → upstream."""

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from gateway.core.key import CacheKey
from gateway.core.pacing import Draw, Pace
from gateway.core.policy import Disposition, ModelRules, age_s, remaining_s, staleness_s
from gateway.core.recording import Identity, Meta, Recording
from gateway.core.stream_id import StreamId, mint, traceable_digits
from gateway.errors import (
    GatewayError,
    NotCached,
    Overloaded,
    ShuttingDown,
    StoreAway,
    StoreError,
    StoreUnavailable,
    StreamCancelled,
    TenantOverloaded,
    UpstreamRefused,
    forget_traces,
    is_broken_off,
    is_outage,
)
from gateway.flight import Flight
from gateway.flights import Flights
from gateway.limits import Holding
from gateway.missing import Missing
from gateway.pacer import Pacer
from gateway.ports import Clock, FlightId, LogName, Store, Want
from gateway.pulse import Pulse
from gateway.pump import Plan
from gateway.purges import Purges
from gateway.questions import CacheRules, Question, Questions, Request, Route, of_sample
from gateway.reader import EventIds, FlightReader, Reader, RecordingReader, StandIn
from gateway.samples import Samples
from gateway.tally import Tally

_MISS = Disposition("miss")
_DISABLED = Disposition("bypass", "disabled", fwd="bypass")
_SIMULATED = Disposition("miss", "simulated")
_MAX_REFRESHED = 4096
_MAX_TURNS = 4096
_ANY_TIME_US = 1 << 62
# A stale answer asks for a fresh one at most so often, in each replica: the model may be down, or another one is at it.
_REFRESH_EVERY_S = 1.0
StreamKind = Literal["flight", "hit"]


@dataclass(slots=True)
class Opened:
    """A reader over the answer, and what was done to find it: that may still change until the head is there."""

    reader: Reader
    disposition: Disposition
    model: str = ""
    upstream: str = ""
    stream_id: str = ""
    """By which the stream can be resumed; empty where it cannot."""
    ttl_s: float = 0.0
    """For how long others may keep the answer, once it is stored; 0 where the next caller is to get another one."""
    simulated: bool = False
    """Whether the simulated model stands in for a recording that is missing."""


class Service:
    """Answers requests from the store, from a running flight, or from a new one."""

    def __init__(  # noqa: PLR0913, PLR0917  # all that an answer may come from
        self,
        questions: Questions,
        store: Store,
        flights: Flights,
        rules: CacheRules,
        clock: Clock,
        purges: Purges,
        tally: Tally,
        missing: Missing,
        pulse: Pulse | None = None,
    ) -> None:
        self._questions = questions
        self._missing = missing
        self._store = store
        self._flights = flights
        self._rules = rules
        self._clock = clock
        self._purges = purges
        self._tally = tally
        self.pacer = Pacer(clock)
        self._pulse = pulse
        self.replays: dict[RecordingReader, Holding] = {}
        """Those that go on."""
        self._watches: dict[RecordingReader, asyncio.Task[None]] = {}
        self._samples = Samples(store, purges, clock, order=rules.sample_order, seed=rules.sample_seed)
        self._refreshed: dict[CacheKey, float] = {}
        """When an answer was last fetched in the background."""
        self._turns: dict[str, int] = {}
        """How many times recordings, by their flights, were replayed at a pace that is drawn anew each time."""
        # An id must be unlike any other, not hard to guess; asking the system for each would cost a tenth of a hit.
        self._random = random.Random()  # noqa: S311

    async def open(self, request: Request) -> Opened:
        """Finds the answer, or begins it. The reader must be given back to `leave`. Raises `GatewayError`."""
        if self._pulse is None:
            return await self._open(request)
        began_s = self._clock.monotonic()
        opened = await self._open(request)
        reader = opened.reader.reader if isinstance(opened.reader, StandIn) else opened.reader
        reader.meter = self._pulse.meter(began_s, opened.disposition.kind)
        return opened

    async def _open(self, request: Request) -> Opened:
        route = self._questions.route(request)
        rules = self._questions.rules(request, route)
        if self.replays_only:
            return await self._recorded(self._questions.question(request, route, rules))
        if request.directives.no_store or not rules.enabled:
            return self._bypass(request, route, rules)
        question = self._questions.question(request, route, rules)
        if why_not := rules.why_not_ask(request.body):
            return self._ask(question, Disposition("bypass", why_not, fwd="bypass"), why_not)
        if rules.samples > 1:
            question = await self._sample(question)
        if request.directives.no_cache:
            return self._ask(question, Disposition("miss", "no-cache", fwd="request"))
        if self._records(request):
            return self._ask(question, Disposition("miss", "record", fwd="bypass"))
        return await self._find(question)

    def _records(self, request: Request) -> bool:
        """Whether a new answer is recorded, whatever is stored."""
        return self._rules.mode == "record" and not request.directives.only_if_cached

    async def _recorded(self, question: Question) -> Opened:
        """In replay mode: the recording, however old, and whatever the caller says of a cache. Nothing here asks a model."""
        began_s, stand_in = self._clock.monotonic(), None
        if question.rules.samples > 1:
            question = await self._sample(question)
        recording, disposition = await self._lookup(question)
        if recording and disposition.kind == "hit":
            return self._replay(question, recording, disposition, began_s)
        request, route = question.request, question.route
        if not request.directives.only_if_cached:
            stand_in = self._questions.stand_in(request, route, question.rules)
        if stand_in is None:
            self._tally.add(route.model, "misses")
            raise await self._missing.error(request)
        reader = FlightReader(self._flights.start(stand_in), usage=request.usage)
        return Opened(reader, _SIMULATED, route.model, stand_in.upstream.name, simulated=True)

    @property
    def replays_only(self) -> bool:
        """Whether no model is ever asked."""
        return self._rules.mode == "replay"

    def leave(self, opened: Opened) -> None:
        """The caller has done with its reader."""
        if isinstance(opened.reader, StandIn):
            opened.reader = opened.reader.reader  # what stood in for it knows what was opened: neither would ever be freed
        reader = opened.reader
        reader.leave()
        forget_traces(reader.error)
        if isinstance(reader, RecordingReader):
            if holding := self.replays.pop(reader, None):
                holding.become(0)
            if watch := self._watches.pop(reader, None):
                watch.cancel()
        if opened.model:  # a resumed stream was counted when it was asked for
            self._count(reader, opened)

    def begin_replay(self, reader: RecordingReader) -> None:
        """From now on it goes on, until it is given back to `leave`."""
        holding = self.replays[reader] = self._flights.limits.held.holding()
        holding.become(reader.recording.size_bytes)

    async def ended(self) -> None:
        """Returns when no call runs, and all answers are stored that are to be."""
        await self._flights.ended()

    async def close(self) -> None:
        """Ends all running answers with an error that their callers are told."""
        for reader in list(self.replays):
            reader.cut(ShuttingDown("The gateway is shutting down; resume this stream, or ask again."))
        for watch in self._watches.values():
            watch.cancel()
        await asyncio.gather(*self._watches.values(), return_exceptions=True)
        await self._flights.close()

    async def _find(self, question: Question) -> Opened:
        """In this replica's flights, in the store, or in another replica's flights; else begins one."""
        key, miss, seen_us, tries, began_s = question.key, _MISS, -1, 0, self._clock.monotonic()
        only_if_cached = question.request.directives.only_if_cached
        while True:
            # A flight knows better than the store: it is newer, or its recording is still on the way there.
            flight = self._flights.find(key)
            if flight is None or (flight.outcome is None and (flight.replaces or only_if_cached)):
                recording, miss = await self._lookup(question)
                if recording and miss.kind == "hit":
                    return self._replay_and_refresh(question, recording, miss, began_s)
                if recording:
                    seen_us = int(recording.meta.started_at * 1e6)
                # Another caller may have begun while this one looked; nothing is awaited between here and the start.
                flight = self._flights.find(key)
            if flight and flight.outcome is None:
                _check_that_asking_is_allowed(question.request)  # what is still being made is not stored
            opened = await (self._join(question, flight, miss) if flight else self._start(question, miss, seen_us))
            if opened:
                return opened
            tries += 1
            if tries > 1 or miss.detail:
                seen_us = _ANY_TIME_US  # what is there cannot be read

    async def _lookup(self, question: Question) -> tuple[Recording | None, Disposition]:
        """What is stored, and a hit, or what to say where it will not do."""
        request = question.request
        needed = request.directives.only_if_cached or self.replays_only
        want: Want = "stream" if request.streamed else "whole" if self._pace(request).is_instant else "timed"
        try:
            recording = await self._store.lookup(question.key, want, patient=needed)
        except StoreUnavailable:
            if needed:
                raise StoreAway("The store cannot be reached, so nobody can say whether the answer is there.") from None
            return None, Disposition("miss", "store-unavailable")
        except StoreError:
            return None, Disposition("miss", "store-corrupt")
        return (recording, self._judged(question, recording)) if recording else (None, _MISS)

    def _judged(self, question: Question, recording: Recording) -> Disposition:
        """A hit, or what to say of a stored answer that will not do."""
        meta, now = recording.meta, self._clock.now()
        if self._purges.covers(question.key, meta):
            return Disposition("miss", "purged")
        directives, ttl_s = question.request.directives, remaining_s(meta, now)
        if self.replays_only:
            return Disposition("hit", age_s=age_s(meta, now), ttl_s=ttl_s)
        if refusal := directives.refusal(meta, now, question.rules.stale_s):
            return Disposition("miss", "" if refusal == "stale" else refusal, fwd="stale" if ttl_s < 0 else "request")
        detail = ""
        if ttl_s < 0:
            detail = "stale-while-revalidate" if directives.max_stale_s is None else "max-stale"
        return Disposition("hit", detail, age_s=age_s(meta, now), ttl_s=ttl_s)

    def _replay_and_refresh(
        self, question: Question, recording: Recording, hit: Disposition, began_s: float | None = None
    ) -> Opened:
        if hit.ttl_s < 0 and staleness_s(recording.meta, self._clock.now()) <= question.rules.stale_s:
            # By what tags it can be purged was said when it was stored: who only reads it need not say it again.
            tags = question.request.controls.tags or recording.meta.tags
            self._fetch(question.tagged(tags), int(recording.meta.started_at * 1e6))
        return self._replay(question, recording, hit, began_s)

    def _fetch(self, question: Question, seen_us: int = -1) -> None:
        """Begins a call in the background whose answer is stored; over all replicas one at a time."""
        key, now_s = question.key, self._clock.monotonic()
        if question.request.directives.only_if_cached or not self._questions.ttl_s(question) or self.replays_only:
            return
        running = self._flights.find(key)
        if running and running.outcome is None:
            return
        if now_s - self._refreshed.get(key, -_REFRESH_EVERY_S) < _REFRESH_EVERY_S:
            return
        if len(self._refreshed) >= _MAX_REFRESHED:
            self._refreshed.clear()
        plan = self._questions.plan(question, background=True, newer_than_us=seen_us)
        if self._flights.limits.check_call(plan.tenant):  # else what is needed now has the place
            self._refreshed[key] = now_s
            self._flights.start(plan)

    async def _sample(self, question: Question) -> Question:
        """The sample whose turn it is; where there are fewer than there may be, one more is fetched."""
        directives, rules = question.request.directives, question.rules
        replaces = directives.no_cache or self._records(question.request)
        replays = self.replays_only
        chosen = await self._samples.choose(
            question.key,
            rules.samples,
            accept=lambda meta, now: replays or not directives.refusal(meta, now, rules.stale_s),
            stale_s=rules.stale_s,
            replace=replaces and not replays,
        )
        if chosen.missing is not None and not replaces:
            self._fetch(of_sample(question, chosen.missing), chosen.seen_us)
        return of_sample(question, chosen.sample)

    async def _start(self, question: Question, miss: Disposition, seen_us: int) -> Opened | None:
        """Begins a flight, which may turn out to follow another replica's; None where its recording has landed meanwhile."""
        _check_that_asking_is_allowed(question.request)
        plan = self._questions.plan(question, newer_than_us=seen_us)
        if miss.detail == "store-unavailable":
            plan = replace(plan, claims=False)
        try:
            flight = self._flights.start(plan)
        except (Overloaded, TenantOverloaded) as error:
            return await self._stale_or_none(question, error)
        return await self._opened_when_resolved(question, flight, miss)

    async def _stale_or_none(self, question: Question, error: GatewayError) -> Opened:
        """A stored answer in the place of a call that may not begin. Raises ``error`` where none will do."""
        window_s = question.request.directives.error_window_s(question.rules.stale_if_error_s)
        if window_s > 0 and (found := await self._stale(question, window_s, error)):
            return self._replay(question, *found)
        raise error

    async def _join(self, question: Question, flight: Flight, miss: Disposition) -> Opened | None:
        if flight.outcome and (recording := await flight.sealed()):
            judged = self._judged(question, recording)
            if judged.kind == "hit":
                return self._replay_and_refresh(question, recording, judged)
            return await self._start(question, judged, int(recording.meta.started_at * 1e6))
        return await self._opened_when_resolved(question, flight, Disposition("collapsed", miss.detail, fwd=miss.fwd))

    async def _opened_when_resolved(self, question: Question, flight: Flight, disposition: Disposition) -> Opened | None:
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
            return await self._opened_when_resolved(question, flight.instead, disposition._replace(kind="collapsed"))
        if resolution == "followed":
            disposition = disposition._replace(kind="collapsed")
        return self._unless_it_fails(question, self._opened(question, reader, disposition))

    def _unless_it_fails(self, question: Question, opened: Opened) -> Opened:
        """The same; but where another answer may stand in for one that fails before any of it was shown, one does."""
        window_s = question.request.directives.error_window_s(question.rules.stale_if_error_s)
        if isinstance(opened.reader, FlightReader) and (window_s > 0 or not question.request.streamed):
            opened.reader = StandIn(opened.reader, partial(self._instead, question, opened, window_s))
        return opened

    async def _instead(
        self, question: Question, opened: Opened, window_s: float, error: GatewayError
    ) -> FlightReader | RecordingReader | None:
        """Another reader in the place of one that failed; None where none will do."""
        if is_broken_off(error) and not question.request.streamed:
            return await self._once_more(question, opened)
        if window_s > 0 and is_outage(error):
            return await self._stale_instead(question, opened, window_s, error)
        return None

    async def _once_more(self, question: Question, opened: Opened) -> FlightReader | RecordingReader:
        """Another replica's death is no reason that a caller fails who wanted the answer whole."""
        again = await self._find(question)
        opened.disposition, opened.ttl_s = again.disposition, again.ttl_s
        return again.reader.reader if isinstance(again.reader, StandIn) else again.reader

    async def _stale_instead(
        self, question: Question, opened: Opened, window_s: float, error: GatewayError
    ) -> RecordingReader | None:
        """A stored answer in the place of an upstream's failure; None where none will do."""
        found = await self._stale(question, window_s, error)
        if found is None:
            return None
        recording, opened.disposition = found
        reader, opened.stream_id = self._reader(question, recording)
        return reader

    async def _stale(self, question: Question, window_s: float, error: GatewayError) -> tuple[Recording, Disposition] | None:
        """What is stored, where it may stand in for a failure, and what to say of it."""
        if not is_outage(error):
            return None
        recording, _ = await self._lookup(question)
        if recording is None or self._purges.covers(question.key, recording.meta):
            return None
        meta, now = recording.meta, self._clock.now()
        if staleness_s(meta, now) > window_s:
            return None
        status = error.status if isinstance(error, UpstreamRefused) else 0  # else the upstream has not answered
        told = Disposition("stale", "stale-if-error", age_s(meta, now), remaining_s(meta, now), "stale", status=status)
        return recording, told

    def _opened(self, question: Question, reader: FlightReader, disposition: Disposition) -> Opened:
        """With an id by which it can be resumed, if it is a stream of a flight that others may see."""
        request, flight, route = question.request, reader.flight, question.route
        opened = Opened(reader, disposition, route.model, route.upstream.name)
        opened.ttl_s = 0.0 if question.rules.samples > 1 else self._questions.ttl_s(question)
        if request.streamed and flight.name:
            opened.stream_id, _, reader.nonce = self._mint(question, "flight", flight.name.flight, run=flight.run)
            if request.event_ids:
                reader.ids = EventIds(opened.stream_id)
        return opened

    def _replay(
        self, question: Question, recording: Recording, disposition: Disposition, began_s: float | None = None
    ) -> Opened:
        """``began_s`` is when the request came, from when on it is paced, unless something else was waited for."""
        reader, token = self._reader(question, recording)
        reader.began_s = began_s if began_s is not None else reader.began_s
        route = question.route
        ttl_s = 0.0 if question.rules.samples > 1 else recording.meta.ttl_s
        return Opened(reader, disposition, route.model, route.upstream.name, token, ttl_s)

    def _reader(self, question: Question, recording: Recording) -> tuple[RecordingReader, str]:
        """A reader over a recording, and the id by which its stream can be resumed."""
        request, meta, now = question.request, recording.meta, self._clock.now()
        token = nonce = digits = ""
        if request.streamed and meta.flight:
            token, digits, nonce = self._mint(question, "hit", FlightId(meta.flight), run=meta.run, created=int(now))
        identity = None
        if self._rules.fresh_identity:
            digits = digits or self._digits(meta)
            identity = Identity.fresh(meta.id or request.api.id_prefix, digits, now)
        ids, pace = EventIds(token) if request.event_ids and token else None, self._pace(request)
        draw = self._draw(pace, meta) if pace.draws else None
        reader = RecordingReader(recording, identity, usage=request.usage, pacer=self.pacer, pace=pace, draw=draw, ids=ids)
        reader.nonce = nonce
        self.begin_replay(reader)
        if token and not pace.is_instant:
            name = LogName(question.key, FlightId(meta.flight))
            self._watches[reader] = asyncio.get_running_loop().create_task(self._cut_when_cancelled(reader, name))
        return reader, token

    def _pace(self, request: Request) -> Pace:
        return self._rules.pace.with_wish(request.pace)

    def _draw(self, pace: Pace, meta: Meta) -> Draw:
        """The chance of one replay. It hangs on nothing that another run of the same recordings has not, too."""
        turn, name = 0, meta.flight or f"{meta.id}@{meta.started_at}"
        if pace.turns:
            if len(self._turns) >= _MAX_TURNS:
                self._turns.clear()
            turn = self._turns[name] = self._turns.get(name, -1) + 1
        return random.Random(f"{pace.seed}:{name}:{turn}")  # noqa: S311  # to be repeated, not to be safe

    def _digits(self, meta: Meta) -> str:
        """What the fresh id of an answer is made of that cannot be resumed."""
        if meta.flight:
            return traceable_digits(self._store.secret, meta.flight, self._random.randbytes(8))
        return f"{self._random.getrandbits(256):064x}"

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
        self, question: Question, kind: StreamKind, flight: FlightId, *, run: str, created: int = 0
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

    def _bypass(self, request: Request, route: Route, rules: ModelRules) -> Opened:
        """Asks the model, and leaves nothing behind."""
        _check_that_asking_is_allowed(request)
        told = Disposition("bypass", "no-store", fwd="request") if rules.enabled else _DISABLED
        call, tenant = self._questions.call(request, route), self._questions.tenant(request)
        plan = Plan(call, route.upstream, None, joinable=False, ttl_s=0.0, rules=rules, tenant=tenant)
        reader = FlightReader(self._flights.start(plan), usage=request.usage)
        return Opened(reader, told, route.model, route.upstream.name)

    def _ask(self, question: Question, disposition: Disposition, why_not: str = "") -> Opened:
        """Asks the model, whatever is stored; others neither join nor get the answer where there is a reason why not."""
        _check_that_asking_is_allowed(question.request)
        flight = self._flights.start(self._questions.plan(question, joinable=False, why_not=why_not))
        return self._opened(question, FlightReader(flight, usage=question.request.usage), disposition)

    def _count(self, reader: FlightReader | RecordingReader, opened: Opened) -> None:
        """Adds to what the administrator is told of a model."""
        disposition, model, add = opened.disposition, opened.model, self._tally.add
        add(model, _COUNTED[disposition.kind])
        if isinstance(reader, RecordingReader):
            meta = reader.recording.meta
            if disposition.ttl_s < 0:
                add(model, "stale")
            _add_saved(add, model, meta.usage, meta.duration_us)
        elif reader.error:
            add(model, "errors")
        elif disposition.kind == "collapsed" and reader.flight.frames:
            _add_saved(add, model, reader.flight.recorder.usage, reader.flight.frames[-1].at_us)


_COUNTED = {"hit": "hits", "miss": "misses", "collapsed": "collapsed", "bypass": "bypassed", "stale": "hits"}


_SAVED = (("saved_prompt_tokens", "prompt_tokens"), ("saved_completion_tokens", "completion_tokens"))


def _add_saved(
    add: Callable[[str, str, float], None], model: str, usage: Mapping[str, Any] | None, duration_us: int
) -> None:
    """What a caller got without a call of its own."""
    add(model, "saved_seconds", duration_us / 1e6)
    for counted, name in _SAVED if usage else ():
        if isinstance(tokens := (usage or {}).get(name), int):
            add(model, counted, tokens)


def _check_that_asking_is_allowed(request: Request) -> None:
    if request.directives.only_if_cached:
        raise NotCached("The answer is not in the cache, and only-if-cached forbids to ask the model.")

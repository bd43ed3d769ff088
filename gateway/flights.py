"""The table of flights, and what drives each: the claim, the pump of an upstream call, the mirror of another's log."""

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import orjson

from gateway.core.apis import Api
from gateway.core.content import Continuation
from gateway.core.key import CacheKey
from gateway.core.purge import Labels, Purge
from gateway.core.recording import Recording, first_run, parse_chunk
from gateway.errors import (
    GatewayError,
    ShuttingDown,
    StoreError,
    StreamCancelled,
    StreamLost,
    forget_traces,
)
from gateway.flight import Abandoned, Complete, Failed, Flight, Outcome
from gateway.keeping import may_be_kept, recorded
from gateway.limits import Limits, Place
from gateway.mirror import Mirror
from gateway.ports import Clock, FlightId, LogName, Store
from gateway.pump import Plan, Pump, Rules
from gateway.purges import Purges
from gateway.sharing import Shared, Sharing
from gateway.tally import Tally

log = logging.getLogger(__name__)

_CLOSING = "The gateway is shutting down; resume this stream, or ask again."
# A sealed flight stays in the table for longer than any lookup takes.
_LINGER_S = 0.25
_TIMER_STEP_S = 0.002  # a timer may be early by so much
# How long a process that ends may take to hand its flights over.
_LAST_WORDS_S = 1.0
# How much of a lease a resumer waits for a writer whose lease it has never seen: it may only have been evicted.
_PATIENT_LEASES = 0.5
# A caller waits for it.
_PEEK_S = 0.05

NewId = Callable[[int], str]
"""So many random bytes, as hexadecimal digits."""
Run = Callable[[], Coroutine[Any, Any, None]]


def _labels(flight: Flight) -> Labels:
    """What a purge may know it by now: its flight and the answer's id have come since it was begun."""
    assert flight.labels  # noqa: S101  # what has none is not asked
    return flight.labels._replace(flight=flight.id or "", id=flight.recorder.id)


def _abandoned() -> Abandoned:
    return Abandoned(StreamCancelled("The stream was ended because nobody was left to read it."))


class Flights:
    """The table of flights."""

    def __init__(  # noqa: PLR0913, PLR0917  # all that a flight touches
        self,
        store: Store,
        purges: Purges,
        clock: Clock,
        rules: Rules,
        new_id: NewId,
        tally: Tally,
        limits: Limits | None = None,
    ) -> None:
        self._store = store
        self.limits = limits or Limits()
        self._tally = tally
        self._purges = purges
        purges.on_learned = self.purge
        self._clock = clock
        self._rules = rules
        self._new_id = new_id
        self._sharing = Sharing(store, rules.terms)
        self._by_key: dict[CacheKey, Flight] = {}
        self._by_name: dict[LogName, Flight] = {}
        self._shared: dict[Flight, Shared] = {}
        self._tasks: dict[Flight, asyncio.Task[None]] = {}
        self._places: dict[Flight, Place] = {}
        """Of those that call an upstream, or are about to: who only reads another replica's log has none."""
        self._endings: dict[Flight, Outcome] = {}
        self._graces: dict[Flight, asyncio.TimerHandle] = {}
        self._unread_since: dict[Flight, tuple[int, float]] = {}
        """How many readers had come until then, and when the last one left."""
        self._checks: dict[Flight, asyncio.Task[None]] = {}

        self.takeovers = 0
        """How many flights this replica has gone on with in the place of another one."""

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def running(self) -> Collection[Flight]:
        """Those that this replica runs, or follows in another one."""
        return self._tasks.keys()

    def find(self, key: CacheKey) -> Flight | None:
        """The flight that a request of this key may join, or whose recording is on its way to the store."""
        flight = self._by_key.get(key)
        return flight if flight and flight.is_joinable else None

    def named(self, name: LogName, run: str, writer: str = "") -> Flight | None:
        """The flight of that log that this replica writes or reads, as a reader of the run ``run`` knows it; ``writer`` is
        whose the log is by now, where that is known.
        """
        flight = self._by_name.get(name)
        if flight is None or flight.run == run or flight.resolution != "led":
            return flight
        # A log that others have taken over is another's: here is only what the callers of this replica's run have seen.
        is_ours = writer in ("", str(self._sharing.writer(flight.run)))
        return flight if is_ours and not self._is_fenced(flight) else None

    def start(self, plan: Plan) -> Flight:
        """Begins an upstream call in a task of its own, or follows the one that another replica has begun.

        Raises `Overloaded` and `TenantOverloaded`.
        """
        place = self.limits.begin_call(plan.tenant)
        name = None if plan.key is None else LogName(plan.key, FlightId(self._new_id(8)))
        # What is not kept is assembled only for a caller who wants it whole.
        kept = name is not None and self._store.is_writable
        run = first_run(name.flight) if name else self._new_id(4)
        flight = self._flight(plan.call.api, name, run, assemble=kept or not plan.call.streamed)
        flight.labels, flight.background = plan.labels, plan.background
        flight.replaces = plan.background or plan.newer_than_us >= 0
        if plan.key is not None and plan.joinable:
            self._by_key[plan.key] = flight
        self._places[flight] = place
        self._drive(flight, plan, partial(self._fly, flight, plan))
        return flight

    def follow(self, api: Api, name: LogName, plan: Callable[[], Plan]) -> Flight:
        """Reads the log of another replica's flight, for those who resume it. ``plan`` tells how to take it over."""
        flight = self._flight(api, name, self._new_id(4))
        flight.resolve("followed")
        self._by_name[name] = flight
        self._drive(flight, None, partial(self._follow, flight, plan, self._rules.terms.lease_s * _PATIENT_LEASES))
        return flight

    def replay(self, api: Api, name: LogName, recording: Recording) -> Flight:
        """A closed flight that says what a recording holds."""
        flight = self._flight(api, name, self._new_id(4))
        flight.runs = list(recording.meta.runs) or flight.runs
        flight.run = flight.runs[-1][0]  # who reads it here sees what that one's readers have seen
        marks = recording.marks
        flight.copy(recording.frames(None, usage=True), marks.at_us if marks else ())
        flight.land_head({})
        flight.close(Complete())
        flight.retire()
        return flight

    def purge(self, purge: Purge) -> None:
        """What runs and is meant is not stored, and joined by nobody any more. Its readers have it to its end.

        All of it, whatever the clocks of the replicas say: it began before the purge was known here.
        """
        for flight in [*self._tasks, *self._by_key.values()]:
            if flight.labels and purge.selector.matches(_labels(flight)):
                flight.purged = True
                self._forget_key(flight)
                if shared := self._shared.get(flight):
                    self._sharing.check_soon(shared)

    def listeners(self, flight: Flight) -> int:
        """Readers in other replicas, as far as this one knows."""
        shared = self._shared.get(flight)
        return shared.listeners if shared else 0

    async def ended(self) -> None:
        """Returns when none runs, and all is stored that is to be."""
        while self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    async def close(self) -> None:
        """Ends every flight: its readers are told that the gateway is shutting down, other replicas that they may go on.

        What has been said to its end is stored first, if the store does not take long.
        """
        # A claim that is cancelled may reach the store after all, and nobody would give it back.
        claiming = [flight.resolved() for flight in self._tasks if flight.name and flight.resolution is None]
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await asyncio.gather(*claiming)
        storing = [task for flight, task in self._tasks.items() if flight.outcome]
        tasks = [*self._tasks.values(), *self._checks.values()]
        for task in tasks:
            if task not in storing:
                task.cancel()
        if storing:
            _, late = await asyncio.wait(storing, timeout=_LAST_WORDS_S)
            for task in late:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._sharing.close()

    def _flight(self, api: Api, name: LogName | None, run: str, *, assemble: bool = True) -> Flight:
        terms = self._rules.terms
        return Flight(
            api,
            name,
            run,
            started_at=self._clock.now(),
            max_bytes=terms.max_flight_bytes,
            assemble=assemble,
            held=self.limits.held,
        )

    # What drives a flight

    def _drive(self, flight: Flight, plan: Plan | None, run: Run) -> None:
        task = asyncio.get_running_loop().create_task(self._driven(flight, run))
        flight.on_unread = partial(self._unread, flight, plan)
        self._tasks[flight] = task
        task.add_done_callback(partial(self._landed, flight))

    def _landed(self, flight: Flight, task: asyncio.Task[None]) -> None:  # noqa: ARG002  # a callback's argument
        del self._tasks[flight]
        self._give_place_back(flight)
        self._endings.pop(flight, None)
        if flight.outcome is None and flight.resolution != "landed":  # cancelled before its first step: nothing has run
            flight.close(Failed(ShuttingDown(_CLOSING)))
            self._retire(flight)

    async def _driven(self, flight: Flight, run: Run) -> None:
        try:
            await run()
        except GatewayError as error:
            flight.close(Failed(error))
        except asyncio.CancelledError:
            if flight not in self._endings:
                await self._hand_over(flight)  # before its readers are told, who then resume elsewhere at once
            flight.close(self._endings.get(flight) or Failed(ShuttingDown(_CLOSING)))
        except Exception:  # a bug of ours, or of an upstream's library: no reader may wait for ever because of it
            log.exception("what drives %r broke", flight)
            flight.close(Failed(GatewayError("The gateway failed to read the answer.")))
        forget_traces(flight.error)
        try:
            await self._end_log(flight)
        finally:
            self._retire(flight)

    async def _fly(self, flight: Flight, plan: Plan) -> None:
        if plan.key is None or not (plan.joinable and plan.claims) or await self._claims(flight, plan):
            flight.resolve("led")
            await self._lead(flight, plan)
        elif flight.resolution == "followed":
            await self._follow(flight, lambda: plan, self._rules.terms.lease_s, goes_on=True)

    async def _claims(self, flight: Flight, plan: Plan) -> bool:
        """Whether this replica leads. If not, there is a recording, or another flight to follow."""
        name = flight.name
        assert name  # noqa: S101  # only what has a key is claimed
        try:
            claimed = await self._store.claim(name, self._sharing.writer(flight.run), newer_than_us=plan.newer_than_us)
        except StoreError as error:
            log.debug("%r is not claimed: %s", flight, error)
            forget_traces(error)
            return True
        if claimed.landed or (claimed.follow and plan.background and not flight.readers):
            self._forget(flight)  # what it would say is there, or another replica is at it
            self._give_place_back(flight)
            flight.resolve("landed")
            return False
        if claimed.follow is None or claimed.follow == name.flight:
            return True
        there = LogName(name.key, claimed.follow)
        purged, known = await self._was_purged(there, plan), self._by_name.get(there)
        if purged or (known and (known.outcome or not known.is_joinable)):
            return True
        self._give_place_back(flight)
        if known:
            flight.instead = known
            self._by_key[name.key] = known
            flight.resolve("followed")
            return False
        flight.name, flight.background = there, False
        flight.runs = [(first_run(there.flight), 0)]
        self._by_name[there] = flight
        flight.resolve("followed")
        return False

    async def _was_purged(self, there: LogName, plan: Plan) -> bool:
        """Whether another replica's flight began before a purge that is known here. Its replica keeps newcomers away, but
        not one that has just died, or hangs.
        """
        labels = plan.labels and plan.labels._replace(flight=there.flight)
        if labels is None or not self._purges.cover(labels, 0.0):
            return False
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(_PEEK_S):
                head = (await self._store.peek(there)).head
            return bool(head) and self._purges.cover(labels, orjson.loads(head)["started_at"])
        return False

    def _give_place_back(self, flight: Flight) -> None:
        if place := self._places.pop(flight, None):
            place.release()

    async def _lead(self, flight: Flight, plan: Plan, continuation: Continuation | None = None) -> None:
        if flight not in self._places:  # a stream that has begun goes on, however many there are
            self._places[flight] = self.limits.flights.take_anyway(plan.tenant)
        flight.on_unread = partial(self._unread, flight, plan)
        flight.labels = flight.labels or plan.labels  # who only resumed it did not know them
        if flight.name:
            flight.in_doubt = continuation is not None
            self._by_name[flight.name] = flight
            self._shared[flight] = self._sharing.begin(flight, flight.name, request=plan.noted, joinable=plan.joinable)
        await Pump(self, flight, plan, self._rules, self._clock, continuation).run()

    async def _follow(self, flight: Flight, plan: Callable[[], Plan], trust_s: float, *, goes_on: bool = False) -> None:
        """Mirrors another replica's log, and goes on with the call where that replica does not.

        ``goes_on``: even where it was given up for want of readers, since these had come just then.
        """
        name = flight.name
        if flight.instead or name is None:
            return
        lease_s = self._rules.terms.lease_s
        mirror = Mirror(self._store, flight, name, lease_s=lease_s, trust_s=trust_s, goes_on=goes_on)
        own_plan = None
        try:
            while own_plan is None and (end := await mirror.run()) != "ended":
                if not flight.readers:
                    flight.close(_abandoned())
                    return
                ready = plan()
                flight.alone = end == "lost"
                if flight.alone or await self._takes_over(flight, name, mirror):
                    own_plan = ready
        finally:
            # Not where this replica reads on: what it now writes itself, or by a mirror that has taken this one's place.
            if own_plan is None and self._by_name.get(name) in (None, flight):
                await mirror.leave()
        if own_plan:
            self.takeovers += 1
            flight.resolve("led")
            await self._lead(flight, own_plan, self._continuation(flight))

    async def _takes_over(self, flight: Flight, name: LogName, mirror: Mirror) -> bool:
        writer = self._sharing.writer(flight.run)
        try:
            joinable = self._by_key.get(name.key) is flight
            if not await self._store.take_over(name, writer, behind=flight.runs[-1][0], joinable=joinable):
                return False  # another one was faster, or it has ended
            await mirror.catch_up()
        except StoreError as error:
            log.debug("%r is not taken over: %s", flight, error)
            forget_traces(error)
            flight.alone = await mirror.may_go_alone()
            return flight.alone
        return True

    def _continuation(self, flight: Flight) -> Continuation | None:
        """What makes another run the same stream; None where nothing was shown. Raises `StreamLost`."""
        if flight.base:
            raise StreamLost("Who ran the call is gone, and not all that was shown of it is still known.")
        if flight.runs[-1][0] != flight.run:
            flight.runs.append((flight.run, flight.count))
        if not flight.count:
            flight.runs = [(flight.run, 0)]
            return None
        log.info("going on with %r, whose replica is gone", flight)
        return Continuation(parse_chunk(frame.payload) for frame in flight.frames)

    async def _hand_over(self, flight: Flight) -> None:
        """Leaves a flight that is only interrupted, and all that is known of it, to the other replicas."""
        shared = self._shared.pop(flight, None)
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                if shared and not shared.fenced:
                    await self._sharing.release(shared)
                elif flight.name:  # which may have been claimed, or taken over, just now
                    await self._store.release(flight.name, self._sharing.writer(flight.run))
        except (StoreError, TimeoutError) as error:
            log.debug("%r is not handed over: %s", flight, error)
            forget_traces(error)

    async def _end_log(self, flight: Flight) -> None:
        """Tells the other replicas how it ended."""
        shared = self._shared.pop(flight, None)
        if shared is None or shared.fenced or flight.outcome is None:
            return
        try:
            await self._sharing.finish(shared, flight.outcome)
        except StoreError as error:
            log.debug("the end of %r is not shared: %s", flight, error)
            forget_traces(error)

    # Where nobody reads

    def _unread(self, flight: Flight, plan: Plan | None) -> None:
        if flight.retired:
            return  # it was over before its readers had left, since they got their answer elsewhere
        if self._unread_since.get(flight, (0, 0.0))[0] != flight.joins:
            self._unread_since[flight] = flight.joins, asyncio.get_running_loop().time()
        if flight.background and plan:
            return
        if flight.dismissed:
            self._check(flight, plan)
        elif flight not in self._graces and not self._worth_finishing(flight, plan):
            self._wait(flight, plan, self._grace_left_s(flight))

    def _grace_left_s(self, flight: Flight) -> float:
        """How long the last reader, here or in another replica, may still take to come back."""
        if not flight.name:
            return 0.0
        shared = self._shared.get(flight)
        left_s = max(self._unread_since.get(flight, (0, 0.0))[1], shared.listened_s if shared else 0.0)
        return max(0.0, left_s + self._rules.abandon_grace_s - asyncio.get_running_loop().time())

    def _wait(self, flight: Flight, plan: Plan | None, grace_s: float) -> None:
        if flight in self._graces:
            self._graces[flight].cancel()
        timer = asyncio.get_running_loop().call_later(grace_s, self._still_unread, flight, plan)
        self._graces[flight] = timer

    def _worth_finishing(self, flight: Flight, plan: Plan | None) -> bool:
        if plan is None or flight.resolution == "followed":
            return False  # somebody else finishes it
        if self._rules.when_abandoned == "finish_if_cacheable":
            return may_be_kept(flight, plan)
        return self._rules.when_abandoned == "finish"

    def _still_unread(self, flight: Flight, plan: Plan | None) -> None:
        del self._graces[flight]
        if flight.readers or flight.outcome or self._worth_finishing(flight, plan):
            return
        if (left_s := self._grace_left_s(flight)) > _TIMER_STEP_S:
            self._wait(flight, plan, left_s)
        else:
            self._check(flight, plan)

    def _check(self, flight: Flight, plan: Plan | None) -> None:
        if flight not in self._checks:
            self._checks[flight] = task = asyncio.get_running_loop().create_task(self._end_if_unheard(flight, plan))
            task.add_done_callback(lambda _: self._checks.pop(flight))

    async def _end_if_unheard(self, flight: Flight, plan: Plan | None) -> None:
        """Ends it, unless somebody reads it in another replica: then that is looked at again."""
        if shared := self._shared.get(flight):
            await self._sharing.check(shared)
        if flight.readers or flight.outcome:
            return
        if self.listeners(flight):
            flight.dismissed = False
            self._wait(flight, plan, max(self._rules.abandon_grace_s, self._rules.terms.lease_s))
        elif not flight.dismissed and (left_s := self._grace_left_s(flight)) > _TIMER_STEP_S:
            self._wait(flight, plan, left_s)
        else:
            self._end(flight, _abandoned())

    def _end(self, flight: Flight, outcome: Outcome) -> None:
        if task := self._tasks.get(flight):
            self._endings[flight] = outcome
            self._forget(flight)  # it takes a moment to end, in which nobody must join it
            task.cancel()

    # What its pump tells

    def grown(self, flight: Flight) -> None:
        """It has a head, or more frames."""
        if shared := self._shared.get(flight):
            self._sharing.grown(shared)
        if not flight.readers:
            flight.on_unread()  # it may have become too large to be worth finishing

    def complete(self, flight: Flight, plan: Plan) -> None:
        """Ends the log, and seals a recording if the rules allow. From here on newcomers find this flight, if no later one
        has taken its place.
        """
        recording = recorded(flight, plan, self._clock.now(), writable=self._store.is_writable)
        if recording is None:
            flight.close(Complete())
            flight.kept = False
            self._forget(flight)  # nobody who comes now need wait until the others are told
            return
        if flight.served:
            self._forget_key(flight)
        elif plan.key and not self._is_fenced(flight):
            newest = self._by_key.get(plan.key)
            if newest is None or newest.started_at <= flight.started_at:
                self._by_key[plan.key] = flight
        flight.seal(recording)
        flight.close(Complete())

    async def keep(self, flight: Flight, plan: Plan) -> None:
        """Stores the recording of a complete answer, if there is one, and ends the shared log."""
        shared = self._shared.pop(flight, None)
        if shared is None:
            return
        recording = flight.recording if await self._is_still_wanted(flight, plan) else None
        try:
            if recording and flight.served and plan.key_of:
                await self._sharing.finish(shared, Complete())
                kept = await self._store.store(plan.key_of(flight.served), recording)
            else:
                kept = await self._sharing.finish(shared, Complete(), recording)
        except StoreError as error:
            log.debug("not stored: %s", error)
            forget_traces(error)
            flight.keep(kept=False, why_not="store-unavailable")
            return
        flight.keep(kept=kept)
        if kept and recording:
            self._tally.add(recording.meta.model, "stored")

    async def _is_still_wanted(self, flight: Flight, plan: Plan) -> bool:
        """Whether no purge has come meanwhile."""
        if flight.recording and not flight.purged:
            with suppress(StoreError):
                await self._purges.refresh()
            # One that was known here before the flight was, or is about who has served it.
            key = plan.key_of(flight.served) if flight.served and plan.key_of else plan.key
            flight.purged |= key is not None and self._purges.covers(key, flight.recording.meta)
        if flight.recording and flight.purged:
            flight.recording = None
            flight.keep(kept=False, why_not="purged")
            self._forget(flight)
        return not flight.purged

    def _is_fenced(self, flight: Flight) -> bool:
        """Whether others have taken its log over: then what they say is what newcomers get."""
        shared = self._shared.get(flight)
        return shared is not None and shared.fenced

    def _retire(self, flight: Flight) -> None:
        self._unread_since.pop(flight, None)
        if grace := self._graces.pop(flight, None):
            grace.cancel()
        if flight.recording is None:
            self._forget(flight)
        else:
            # A lookup that left before the recording landed comes back with nothing and looks here next.
            asyncio.get_running_loop().call_later(_LINGER_S, self._forget, flight)

    def _forget_key(self, flight: Flight) -> None:
        """Nobody finds it by its key any longer."""
        if flight.name and self._by_key.get(flight.name.key) is flight:
            del self._by_key[flight.name.key]

    def _forget(self, flight: Flight) -> None:
        self._forget_key(flight)
        if flight.name and self._by_name.get(flight.name) is flight:
            del self._by_name[flight.name]
        flight.retire()

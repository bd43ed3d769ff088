"""Several replicas on one store, interleaved by hand: no sockets, no sleeps. Leases end when the test says so."""

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from unittest.mock import AsyncMock

import pytest
from cores import Core
from fakes import FakeClock, FakeLog, FakeStore
from scripted import USAGE, chunk

from gateway import mirror, sharing
from gateway.core.apis import CHAT
from gateway.core.content import Trace
from gateway.core.controls import Controls
from gateway.core.dialects.openai import END
from gateway.core.policy import Directives
from gateway.core.recording import Recorder, Recording
from gateway.core.stream_id import Cursor
from gateway.errors import (
    GatewayError,
    ShuttingDown,
    StoreUnavailable,
    StreamCancelled,
    StreamDiverged,
    UpstreamRefused,
    UpstreamReported,
)
from gateway.flight import Abandoned, Flight
from gateway.flights import Rules
from gateway.ports import LogName
from gateway.questions import Request
from gateway.reader import FlightReader
from gateway.service import Opened
from gateway.sharing import Terms

# Nothing takes that long: it is what tells a hang from a slow machine.
IDLE_S = 5.0
DONE = b"[DONE]"
OPENING = chunk({"role": "assistant", "content": ""})
HELLO = chunk({"content": "Hello"})
WORLD = chunk({"content": " world"})
STOP = chunk({}, "stop")
TAIL = {**chunk({}), "choices": [], "usage": USAGE}
SECOND = {"id": "chatcmpl-second", "created": 1700000777, "model": "model-1-of-june"}
NOBODY: dict[str, str] = {}
MODES = pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
# A lease that is absent is then taken for one that has run out, not for one that its holder will renew.
RUNS_OUT_S = 1e-6


class Replica:
    """A gateway on a store that it shares with others, and an upstream that only it asks."""

    def __init__(self, store: FakeStore, clock: FakeClock, rules: Rules, *, shared: bool) -> None:
        self.store, self.clock = store, clock
        self.core = core = Core(store, clock, rules=rules, cache={"shared": shared})
        self.flights, self.service, self.streams, self.upstream = core.flights, core.service, core.streams, core.upstream
        self.upstream.passes_credential = not shared

    async def open(
        self, *, stream: bool = True, control: str = "", headers: dict[str, str] | None = None, **members: object
    ) -> Opened:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **members}
        return await self.service.open(Request(CHAT, body, headers or {}, Controls(Directives.parse(control))))

    def leave(self, opened: Opened) -> None:
        self.service.leave(opened)

    async def resume(self, token: str, after: int = 0, headers: dict[str, str] = NOBODY) -> Opened | None:
        return await self.streams.resume(token, Cursor(after), headers)

    async def status(self, opened: Opened) -> dict[str, Any]:
        return await self.streams.status(opened.stream_id, NOBODY)

    async def asked(self, calls: int = 1) -> None:
        await come(lambda: len(self.upstream.calls) >= calls)


class Replicas:
    """Three of them: ``a`` mostly leads."""

    def __init__(self) -> None:
        self.store, self.clock = FakeStore("a"), FakeClock()
        self.all: list[Replica] = []

    def start(self, *, lease_s: float = 60.0, shared: bool = True, **rules: Any) -> "tuple[Replica, Replica, Replica]":
        for name in "abc":
            store = self.store if name == "a" else self.store.replica_of(name)
            store.lease_s = lease_s
            self.all.append(Replica(store, self.clock, Rules(**rules), shared=shared))
        a, b, c = self.all
        return a, b, c

    @property
    def calls(self) -> list[int]:
        return [len(replica.upstream.calls) for replica in self.all]

    def log(self, opened: Opened) -> FakeLog:
        return self.store.logs[named(opened)]

    def die(self, replica: Replica, opened: Opened) -> None:
        """The replica is cut off from the others, and its lease of this flight runs out."""
        replica.store.broken = True
        self.store.expire(named(opened))

    async def new_leader(self, *replicas: Replica) -> tuple[Replica, Replica]:
        """Which of two followers has taken over, and the other one."""
        await come(lambda: any(replica.upstream.calls for replica in replicas))
        one, other = replicas
        return (one, other) if one.upstream.calls else (other, one)

    async def landed(self) -> None:
        """No flight is left anywhere."""
        await come(lambda: not any(len(replica.flights) for replica in self.all))

    @property
    def is_idle(self) -> bool:
        """Whether no lease is held, and no flight is there for newcomers."""
        return not self.store.now and not any(log.owner for log in self.store.logs.values())


async def come(condition: Callable[[], object]) -> None:
    """Lets all run until it is so."""
    async with asyncio.timeout(IDLE_S):
        while not condition():
            await asyncio.sleep(0)


async def some_turns() -> None:
    """As many as anything takes that happens without a timer."""
    for _ in range(50):
        await asyncio.sleep(0)


def flight_of(opened: Opened) -> Flight:
    assert isinstance(opened.reader, FlightReader)
    return opened.reader.flight


def named(opened: Opened) -> LogName:
    name = flight_of(opened).name
    assert name
    return name


async def read_all(opened: Opened) -> bytes:
    parts = []
    while data := await opened.reader.next(IDLE_S):
        parts.append(data)
    return b"".join(parts)


async def whole_stream(opened: Opened) -> bytes:
    return await read_all(opened) + opened.reader.end()


async def read_until(opened: Opened, text: str) -> bytes:
    data = b""
    while text.encode() not in data:
        assert not opened.reader.at_end, opened.reader.error
        data += await opened.reader.next(IDLE_S) or b""
    return data


def chunks_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(event.removeprefix(b"data: ")) for event in data.split(b"\n\n")[:-1] if not event.endswith(DONE)]


def text_of(data: bytes) -> str:
    return "".join(choice["delta"].get("content") or "" for each in chunks_of(data) for choice in each["choices"])


def envelopes(data: bytes) -> set[tuple[Any, ...]]:
    return {(each["id"], each["created"], each["model"]) for each in chunks_of(data)}


FIRST_ENVELOPE = {(OPENING["id"], OPENING["created"], OPENING["model"])}


def second(*contents: str) -> list[dict[str, Any]]:
    """What another run says: a chunk for each."""
    return [chunk({"content": content}, **SECOND) for content in contents]


SECOND_STOP = chunk({}, "stop", **SECOND)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """What is due after some milliseconds is due now."""
    monkeypatch.setattr(sharing, "_HEARD_S", 0.0)
    monkeypatch.setattr(sharing, "_UNHEARD_S", 0.0)
    monkeypatch.setattr(sharing, "_AGAIN_S", 0.001)
    monkeypatch.setattr(mirror, "_AGAIN_S", 0.001)


@pytest.fixture
async def replicas(no_task_is_left: None) -> AsyncIterator[Replicas]:
    replicas = Replicas()
    yield replicas
    for replica in replicas.all:
        await replica.core.close()


async def together(*waiting: Awaitable[Any]) -> list[Any]:
    return await asyncio.gather(*waiting)


# One call for all


async def test_requests_on_all_replicas_are_one_call_and_each_gets_all_of_it(replicas):
    a, b, c = replicas.start()
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING, HELLO)
    seen = await read_until(first, "Hello")
    second, third, whole = await together(b.open(), c.open(), c.open(stream=False))
    assert [each.disposition.cache_status() for each in (second, third, whole)] == ["gateway; fwd=miss; collapsed"] * 3
    assert await read_until(second, "Hello") == await read_until(third, "Hello") == seen
    a.upstream.say(WORLD)
    assert await first.reader.next(IDLE_S) == await second.reader.next(IDLE_S) == await third.reader.next(IDLE_S)
    a.upstream.say(STOP, TAIL, DONE)
    assert await read_all(first) == await read_all(second) == await read_all(third)
    assert orjson_text(await whole.reader.whole()) == "Hello world"
    assert replicas.calls == [1, 0, 0]
    assert not any(each.reader.error for each in (first, second, third, whole))


def orjson_text(body: bytes) -> str:
    return json.loads(body)["choices"][0]["message"]["content"]


async def test_requests_that_meet_before_the_upstreams_head_are_one_call(replicas):
    a, b, c = replicas.start()
    for replica in (a, b, c):
        replica.upstream.headless = True
    opened = await together(*(replica.open(stream=place < 3) for place, replica in enumerate((a, b, c, a, b, c))))
    assert sorted(each.disposition.kind for each in opened) == ["collapsed"] * 5 + ["miss"]
    await come(lambda: any(replicas.calls))
    [leader] = [replica for replica in (a, b, c) if replica.upstream.calls]
    leader.upstream.land()
    leader.upstream.say(OPENING, HELLO, STOP, DONE)
    assert {text_of(await read_all(each)) for each in opened[:3]} == {"Hello"}
    assert {orjson_text(await each.reader.whole()) for each in opened[3:]} == {"Hello"}
    assert sum(replicas.calls) == 1


async def test_a_replica_reads_a_foreign_flight_once_however_many_follow_it(replicas):
    a, b, _ = replicas.start()
    first = await a.open()
    await a.asked()
    followers = await together(*(b.open(stream=place % 2 == 0) for place in range(20)))
    assert len(b.flights) == 1
    assert len(b.store.rings[named(first).flight]) == 1
    reads = b.store.reads
    a.upstream.say(OPENING, HELLO)
    for follower in followers[::2]:
        await read_until(follower, "Hello")
    await some_turns()
    assert b.store.reads - reads < 4  # head and frames, however the pump cut them
    await come(lambda: a.flights.listeners(flight_of(first)) == 20)


async def test_who_follows_leaves_no_trace_when_the_flight_has_ended(replicas):
    a, b, _ = replicas.start()
    first = await a.open()
    await a.asked()
    follower = await b.open()
    a.upstream.say(HELLO, STOP, DONE)
    assert await read_all(follower) == await read_all(first)
    await replicas.landed()
    assert replicas.is_idle
    assert not b.store.rings[named(first).flight]
    assert (await b.open()).disposition.kind == "hit"


@pytest.mark.parametrize("control", ["no-store", "no-cache"])
async def test_who_asks_for_an_answer_of_its_own_joins_nobody_and_disturbs_nobody(replicas, control):
    a, b, c = replicas.start()
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING, HELLO)
    follower = await c.open()
    replicas.clock.time_s += 1
    claims, lookups = b.store.claims, b.store.lookups
    own = await b.open(control=control)
    await b.asked()
    assert own.disposition.kind != "collapsed"
    assert (b.store.claims, b.store.lookups) == (claims, lookups)
    assert bool(own.stream_id) == (control == "no-cache")
    b.upstream.say(*second("Other"), SECOND_STOP, DONE)
    assert text_of(await read_all(own)) == "Other"
    a.upstream.say(WORLD, STOP, DONE)
    assert text_of(await read_all(first)) == text_of(await read_all(follower)) == "Hello world"
    await replicas.landed()
    assert replicas.calls == [1, 1, 0]
    newcomer = await c.open()
    assert text_of(await read_all(newcomer)) == ("Other" if control == "no-cache" else "Hello world")


async def test_what_lands_between_a_lookup_and_its_claim_is_a_hit(replicas):
    a, b, _ = replicas.start()
    first = await a.open()
    await a.asked()
    b.store.claim_gate = asyncio.Event()
    asking = asyncio.ensure_future(b.open())
    await come(lambda: b.store.claims)
    a.upstream.say(HELLO, STOP, DONE)
    a.upstream.end()
    stream = await whole_stream(first)
    await come(lambda: not len(a.flights))
    b.store.claim_gate.set()
    late = await asking
    assert late.disposition.kind == "hit"
    assert await whole_stream(late) == stream
    assert replicas.calls == [1, 0, 0]


async def test_nothing_is_kept_of_a_flight_whose_answer_had_landed_before_it_began(replicas):
    """Its reader goes on to what is stored when the flight is over already."""
    a, b, _ = replicas.start()
    await a.open()
    await a.asked()
    b.store.claim_gate = asyncio.Event()
    asking = asyncio.ensure_future(b.open())
    await come(lambda: b.store.claims)
    a.upstream.say(HELLO, STOP, DONE)
    await come(lambda: replicas.store.recordings)
    [flight] = b.flights._tasks
    flight = weakref.ref(flight)
    b.store.claim_gate.set()
    b.leave(await asking)
    await replicas.landed()
    await some_turns()
    gc.collect()
    assert flight() is None


async def test_all_who_wait_for_a_claim_get_what_has_landed(replicas):
    a, b, _ = replicas.start()
    await a.open()
    await a.asked()
    b.store.claim_gate = asyncio.Event()
    asking = [asyncio.ensure_future(b.open(stream=place % 2 == 0)) for place in range(4)]
    await come(lambda: b.store.claims)
    await some_turns()
    a.upstream.say(HELLO, STOP, DONE)
    await come(lambda: replicas.store.recordings)
    b.store.claim_gate.set()
    assert [each.disposition.kind for each in await together(*asking)] == ["hit"] * 4
    assert replicas.calls == [1, 0, 0]


async def test_what_begins_between_a_lookup_and_its_claim_is_followed(replicas):
    a, b, _ = replicas.start()
    b.store.claim_gate = asyncio.Event()
    asking = asyncio.ensure_future(b.open())
    await come(lambda: b.store.claims)
    await a.open()
    await a.asked()
    b.store.claim_gate.set()
    follower = await asking
    assert follower.disposition.kind == "collapsed"
    a.upstream.say(HELLO, STOP, DONE)
    assert text_of(await read_all(follower)) == "Hello"
    assert replicas.calls == [1, 0, 0]


async def test_a_recording_that_would_not_do_is_no_reason_not_to_ask(replicas):
    a, b, _ = replicas.start()
    await a.open()
    await a.asked()
    a.upstream.say(HELLO, STOP, DONE)
    await come(lambda: replicas.store.recordings)
    replicas.clock.time_s += 5
    opened = await b.open(control="max-age=1")
    assert opened.disposition.fwd == "request"
    await b.asked()
    b.upstream.say(WORLD, STOP, DONE)
    assert text_of(await read_all(opened)) == " world"


# Errors


@pytest.mark.parametrize("begun", [False, True], ids=["before anybody reads", "while all wait"])
async def test_a_refusal_reaches_the_followers_on_other_replicas_as_what_it_is(replicas, begun):
    a, b, _ = replicas.start()
    a.upstream.headless = True
    first = await a.open()
    followers = await together(b.open(), b.open(stream=False))
    await a.asked()
    heads = [asyncio.ensure_future(each.reader.head(None)) for each in (first, *followers)] if begun else []
    await some_turns()
    a.upstream.land(UpstreamRefused(429, b'{"error": {"message": "slow\xff"}}', "application/json", {"retry-after": "3"}))
    heads = heads or [asyncio.ensure_future(each.reader.head(None)) for each in (first, *followers)]
    for error in await asyncio.gather(*heads, return_exceptions=True):
        assert isinstance(error, UpstreamRefused)
        told = error.status, error.content, error.content_type, error.headers
        assert told == (429, b'{"error": {"message": "slow\xff"}}', "application/json", {"retry-after": "3"})
    with pytest.raises(UpstreamRefused):
        await followers[1].reader.whole()
    await replicas.landed()
    assert replicas.is_idle
    assert (await b.open()).disposition.kind == "miss"


async def test_an_error_in_mid_stream_reaches_all_and_is_told_by_every_replica(replicas):
    a, b, c = replicas.start()
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING, HELLO)
    follower, whole = await together(b.open(), b.open(stream=False))
    a.upstream.say({"error": {"message": "It broke.", "code": "overloaded"}})
    assert await whole_stream(follower) == await whole_stream(first)
    assert isinstance(first.reader.error, UpstreamReported)
    with pytest.raises(GatewayError, match="It broke"):
        await whole.reader.whole()
    await replicas.landed()
    for replica in (a, b, c):
        told = await replica.status(first)
        assert (told["state"], told["frames"], told["error"]["code"]) == ("failed", 2, "overloaded")
    assert replicas.is_idle
    assert not replicas.store.recordings


# Over the bound


BOUND = 2000
TEXT = chunk({"content": "x" * 900})


async def test_newcomers_of_a_flight_over_the_bound_make_one_new_call_together(replicas):
    a, b, c = replicas.start(terms=Terms(max_flight_bytes=BOUND))
    first = await a.open()
    await a.asked()
    follower = await b.open()
    data, followed = b"", b""
    for _ in range(3):
        a.upstream.say(TEXT)
        data += await first.reader.next(IDLE_S) or b""
        followed += await follower.reader.next(IDLE_S) or b""
    assert flight_of(first).overflowed
    assert flight_of(follower).overflowed
    await come(lambda: not replicas.store.now)
    newcomers = await together(*(replica.open() for replica in (a, b, c, a, b, c)))
    assert sorted(each.disposition.kind for each in newcomers) == ["collapsed"] * 5 + ["miss"]
    await come(lambda: sum(replicas.calls) == 2)
    a.upstream.say(STOP, DONE, at=0)
    assert data + await read_all(first) == followed + await read_all(follower)
    await come(lambda: named(first) not in a.flights._by_name)
    assert sum(replicas.calls) == 2
    assert not replicas.store.recordings
    [leader] = [each for each in newcomers if each.disposition.kind == "miss"]
    speaker = next(each for each in (a, b, c) if flight_of(leader) in each.flights._tasks)
    speaker.upstream.say(HELLO, STOP, DONE)
    assert {text_of(await read_all(each)) for each in newcomers} == {"Hello"}


async def test_a_flight_over_the_bound_is_not_found_and_not_stored(replicas):
    a, _, _ = replicas.start(terms=Terms(max_flight_bytes=BOUND))
    first = await a.open()
    await a.asked()
    key = named(first).key
    a.upstream.say(TEXT)
    await read_until(first, "x")
    assert a.flights.find(key) is flight_of(first)
    await come(lambda: replicas.log(first).count)
    a.upstream.say(TEXT)
    await read_until(first, "x")
    assert a.flights.find(key) is None
    a.upstream.say(STOP, DONE)
    await read_all(first)
    await replicas.landed()
    assert replicas.is_idle
    assert not replicas.store.recordings


async def test_a_whole_answer_over_the_bound_is_refused_and_its_stream_is_not(replicas):
    a, b, _ = replicas.start(terms=Terms(max_flight_bytes=BOUND))
    streamed = await a.open()
    await a.asked()
    wholes = await together(a.open(stream=False), b.open(stream=False))
    waiting = [asyncio.ensure_future(each.reader.whole()) for each in wholes]
    data = b""
    for place in range(3):
        a.upstream.say(TEXT)
        data += await read_until(streamed, "x")
        await come(lambda place=place: replicas.log(streamed).count == place + 1)
    a.upstream.say(STOP, DONE)
    data += await read_all(streamed)
    assert text_of(data) == "x" * 2700
    for error in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(error, GatewayError)
        assert error.body()["error"]["code"] == "answer_too_large"


async def test_a_log_that_cannot_keep_up_with_a_flight_over_the_bound_is_given_up_at_once(replicas, monkeypatch):
    a, b, _ = replicas.start(terms=Terms(max_flight_bytes=BOUND))
    first = await a.open()
    await a.asked()
    monkeypatch.setattr(a.store, "append", AsyncMock(side_effect=StoreUnavailable("too slow")))
    data = b""
    for _ in range(3):
        a.upstream.say(TEXT)
        data += await read_until(first, "x")
    await come(lambda: replicas.is_idle)
    follower = await b.open()
    await b.asked()
    b.upstream.say(HELLO, STOP, DONE)
    assert text_of(await read_all(follower)) == "Hello"
    a.upstream.say(STOP, DONE)
    assert text_of(data + await read_all(first)) == "x" * 2700


@pytest.mark.parametrize("since", range(3, 9))
async def test_a_replica_that_lags_by_less_than_the_bound_loses_nothing(replicas, since):
    a, b, _ = replicas.start(terms=Terms(max_flight_bytes=BOUND))
    first = await a.open()
    await a.asked()
    follower = await b.open()
    data, followed = b"", b""
    for place in range(12):
        b.store.broken = since <= place < since + 2
        a.upstream.say(chunk({"content": f"<{place}>" + "x" * 200}))
        data += await read_until(first, f"<{place}>")
        await come(lambda place=place: replicas.log(first).count == place + 1)
        if not b.store.broken:
            followed += await read_until(follower, f"<{place}>")
    assert flight_of(first).overflowed
    assert followed == data


async def test_a_reader_that_is_left_behind_is_told_and_the_others_read_on(replicas):
    a, b, _ = replicas.start(terms=Terms(max_flight_bytes=BOUND))
    first, slow = await a.open(), await a.open()
    await a.asked()
    follower, slow_follower = await b.open(), await b.open()
    data, followed = b"", b""
    for _ in range(5):
        a.upstream.say(TEXT)
        data += await read_until(first, "x")
        followed += await read_until(follower, "x")
    a.upstream.say(STOP, DONE)
    assert data + await read_all(first) == followed + await read_all(follower)
    for each in (slow, slow_follower):
        assert b'"reader_too_slow"' in await whole_stream(each)
    assert not first.reader.error
    assert not follower.reader.error


# Callers who leave, and slow ones


async def test_nobody_notices_that_the_leaders_own_caller_leaves(replicas):
    a, b, _ = replicas.start()
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING, HELLO)
    follower = await b.open()
    a.leave(first)
    a.upstream.say(WORLD, STOP, DONE)
    assert text_of(await read_all(follower)) == "Hello world"
    await replicas.landed()
    assert len(replicas.store.recordings) == 1


async def test_nobody_notices_that_a_follower_leaves(replicas):
    a, b, _ = replicas.start()
    first = await a.open()
    await a.asked()
    leaving, staying = await together(b.open(), b.open())
    a.upstream.say(OPENING, HELLO)
    waiting = asyncio.ensure_future(leaving.reader.next(IDLE_S))
    await asyncio.sleep(0)
    waiting.cancel()
    b.leave(leaving)
    a.upstream.say(WORLD, STOP, DONE)
    assert await read_all(staying) == await read_all(first)


async def test_a_slow_reader_slows_nobody_and_loses_nothing(replicas):
    a, b, _ = replicas.start()
    first, slow = await a.open(), await a.open()
    await a.asked()
    slow_follower = await b.open()
    a.upstream.say(OPENING, HELLO)
    a.upstream.say(WORLD, STOP, DONE)
    stream = await whole_stream(first)
    await replicas.landed()
    assert await whole_stream(slow) == await whole_stream(slow_follower) == stream


# Where nobody reads


@pytest.mark.parametrize(
    ("when", "control", "is_closed"),
    [
        ("finish", "", False),
        ("cancel", "", True),
        ("finish_if_cacheable", "", False),
        ("finish", "no-store", False),
        ("finish_if_cacheable", "no-store", True),
    ],
)
async def test_what_nobody_reads_any_more_ends_as_is_configured(replicas, when, control, is_closed):
    a, _, _ = replicas.start(when_abandoned=when, abandon_grace_s=0.0)
    first = await a.open(control=control)
    await a.asked()
    a.upstream.say(OPENING)
    await read_until(first, "assistant")
    a.leave(first)
    if is_closed:
        await replicas.landed()
    else:
        await some_turns()
        assert a.upstream.closed == 0
        a.upstream.say(HELLO, STOP, DONE)
        a.upstream.end()
        await replicas.landed()
    assert a.upstream.closed == 1
    assert replicas.is_idle
    assert len(replicas.store.recordings) == (not is_closed and not control)


async def test_an_abandoned_stream_says_so_when_it_is_resumed(replicas):
    a, b, _ = replicas.start(when_abandoned="cancel", abandon_grace_s=0.0)
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING, HELLO)
    await read_until(first, "Hello")
    a.leave(first)
    await replicas.landed()
    assert (await b.status(first))["state"] == "abandoned"
    again = await b.resume(first.stream_id, 1)
    data = await whole_stream(again)
    assert [each.get("error", {}).get("code") for each in chunks_of(data)] == [None, "stream_cancelled"]


async def test_who_joins_elsewhere_just_when_a_stream_is_abandoned_gets_the_answer_all_the_same(replicas):
    a, b, _ = replicas.start(when_abandoned="cancel", abandon_grace_s=0.0)
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING, HELLO)
    await read_until(first, "Hello")
    await come(lambda: replicas.log(first).count == 2)
    b.store.broken = True
    a.leave(first)
    await come(lambda: replicas.log(first).ended)
    replicas.store.now[named(first).key] = named(first).flight  # as it was a moment ago
    b.store.broken = False
    late = await b.open()
    await b.asked()
    b.upstream.say(HELLO, WORLD, STOP, DONE)
    assert text_of(await read_all(late)) == "Hello world"
    assert late.reader.error is None


async def test_who_resumes_elsewhere_just_when_a_stream_is_abandoned_gets_the_rest_all_the_same(replicas):
    """Its replica has begun to read the log when the other one, which does not know it yet, gives it up."""
    a, b, _ = replicas.start(when_abandoned="cancel", abandon_grace_s=IDLE_S)
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING, HELLO)
    await read_until(first, "Hello")
    await come(lambda: replicas.log(first).count == 2)
    a.leave(first)
    again = await b.resume(first.stream_id, 1)
    await read_until(again, "Hello")
    a.flights._end(flight_of(first), Abandoned(StreamCancelled("Nobody is left.")))
    await b.asked()
    b.upstream.say(OPENING, HELLO, WORLD, STOP, DONE)
    assert text_of(await read_all(again)) == " world"
    assert again.reader.error is None


async def test_who_came_back_and_left_again_has_the_whole_grace_once_more(replicas):
    a, _, _ = replicas.start(when_abandoned="cancel", abandon_grace_s=IDLE_S)
    first = await a.open()
    await a.asked()
    flight = flight_of(first)
    a.leave(first)
    a.leave(await a.resume(first.stream_id))
    a.flights._graces[flight].cancel()
    a.flights._still_unread(flight, None)  # as when the grace of the first time is over
    await some_turns()
    assert flight.outcome is None
    assert not a.upstream.closed


async def test_who_comes_back_in_time_finds_the_stream_running(replicas):
    a, _, _ = replicas.start(when_abandoned="cancel", abandon_grace_s=IDLE_S)
    first = await a.open()
    await a.asked()
    a.leave(first)
    await some_turns()
    again = await a.resume(first.stream_id)
    a.upstream.say(HELLO, STOP, DONE)
    assert text_of(await read_all(again)) == "Hello"
    assert replicas.calls == [1, 0, 0]


@pytest.mark.parametrize("is_known", [True, False], ids=["a follower that the leader knows", "one that has just come"])
async def test_a_follower_elsewhere_keeps_a_flight_alive_that_nobody_reads_here(replicas, is_known):
    a, b, _ = replicas.start(when_abandoned="cancel", abandon_grace_s=0.0, terms=Terms(lease_s=0.02))
    first = await a.open()
    await a.asked()
    await come(lambda: flight_of(first).headers is not None and replicas.log(first).entries)
    follower = await b.open()
    await come(lambda: replicas.log(first).readers.get("b"))
    if is_known:
        await come(lambda: a.flights.listeners(flight_of(first)))
    a.leave(first)
    for text in ("one", "two", "three"):
        a.upstream.say(chunk({"content": text}))
        await read_until(follower, text)
    assert a.upstream.closed == 0
    b.leave(follower)
    await replicas.landed()
    assert a.upstream.closed == 1
    assert replicas.is_idle


# A hit whose recording another run of the same flight has replaced

SAID = (OPENING, chunk({"content": "Hel"}), chunk({"content": "lo"}), WORLD, STOP)
SAID_OTHERWISE = (OPENING, chunk({"content": "Hello wor"}), chunk({"content": "ld"}), STOP)


def recorded_anew(recording: Recording, *chunks: dict[str, Any]) -> Recording:
    recorder = Recorder()
    for each in chunks:
        recorder.add(json.dumps(each).encode(), 0)
    return recorder.recording(recording.meta._replace(runs=(("5ec0d111", 0),)), b"{}")


def position_after(*chunks: dict[str, Any]) -> str:
    trace = Trace()
    for each in chunks:
        trace.add(json.loads(json.dumps(each)))
    return trace.position()


async def a_hit_recorded_anew(replicas: "Replicas", *chunks: dict[str, Any]) -> tuple[Replica, str]:
    """Where it can be resumed, and by which id."""
    a, b, _ = replicas.start()
    first = await a.open()
    await a.asked()
    a.upstream.say(*SAID, DONE)
    await read_all(first)
    await replicas.landed()
    hit = await a.open()
    assert hit.disposition.kind == "hit"
    assert text_of(hit.reader.at_once() or b"") == "Hello world"
    [key] = replicas.store.recordings
    replicas.store.recordings[key] = recorded_anew(replicas.store.recordings[key], *chunks)
    return b, hit.stream_id


@pytest.mark.parametrize("seen", range(1, len(SAID) + 1))
async def test_a_hit_is_resumed_by_what_was_seen_of_it_whoever_has_recorded_it_meanwhile(replicas, seen):
    b, token = await a_hit_recorded_anew(replicas, *SAID_OTHERWISE)
    again = await b.streams.resume(token, Cursor(seen, position_after(*SAID[:seen])), NOBODY)
    assert await again.reader.head(None) == {}
    rest = await whole_stream(again)
    assert "".join(each["choices"][0]["delta"].get("content") or "" for each in SAID[:seen]) + text_of(rest) == "Hello world"
    assert rest.endswith(END)


async def test_a_hit_that_was_seen_to_its_end_has_no_more_whoever_has_recorded_it_meanwhile(replicas):
    b, token = await a_hit_recorded_anew(replicas, *SAID_OTHERWISE)
    again = await b.streams.resume(token, Cursor(len(SAID) + 1, position_after(*SAID), ended=True), NOBODY)
    await again.reader.head(None)
    assert again.reader.over


@pytest.mark.parametrize("text", ["Help me", "Hell"], ids=["another text", "less text"])
async def test_a_hit_of_which_something_else_was_seen_is_not_gone_on_with(replicas, text):
    b, token = await a_hit_recorded_anew(replicas, OPENING, chunk({"content": text}), STOP)
    again = await b.streams.resume(token, Cursor(3, position_after(*SAID[:3])), NOBODY)
    with pytest.raises(StreamDiverged):
        await again.reader.head(None)


async def test_a_number_alone_resumes_a_hit_only_as_long_as_it_is_that_recording(replicas):
    b, token = await a_hit_recorded_anew(replicas, *SAID_OTHERWISE)
    with pytest.raises(StreamDiverged):
        await b.resume(token, 3)
    again = await b.resume(token)
    assert text_of(await read_all(again)) == "Hello world"


# The leader is gone


@pytest.mark.parametrize("has_head", [False, True])
async def test_where_nothing_was_shown_nobody_notices_that_the_leader_is_gone(replicas, has_head):
    a, b, c = replicas.start(lease_s=RUNS_OUT_S)
    a.upstream.headless = not has_head
    first = await a.open()
    await a.asked()
    await come(lambda: bool(replicas.log(first).entries) == has_head and replicas.store.appends)
    followers = await together(b.open(), c.open(), b.open(stream=False), c.open(stream=False))
    await some_turns()
    replicas.die(a, first)
    leader, _ = await replicas.new_leader(b, c)
    leader.upstream.say(*second("Hello", " world"), SECOND_STOP, DONE)
    streams = [await whole_stream(each) for each in followers[:2]]
    assert streams[0] == streams[1]
    assert (text_of(streams[0]), envelopes(streams[0])) == ("Hello world", {tuple(SECOND.values())})
    assert [orjson_text(await each.reader.whole()) for each in followers[2:]] == ["Hello world"] * 2
    assert sorted(replicas.calls) == [0, 1, 1]
    await come(lambda: len(replicas.store.recordings) == 1)


async def begun_and_dead(replicas, **rules):
    """A stream that has said something, whose leader is gone; two followers who have seen it, and who leads now."""
    a, b, c = replicas.start(lease_s=RUNS_OUT_S, **rules)
    first = await a.open()
    await a.asked()
    followers = await together(b.open(), c.open())
    a.upstream.say(OPENING, HELLO, WORLD)
    seen = [await read_until(each, "world") for each in followers]
    replicas.die(a, first)
    leader, other = await replicas.new_leader(b, c)
    return first, followers, seen, leader, other


CONTINUATIONS = {
    "the same chunks": ["Hello", " world", "!", " Bye"],
    "a border in the middle of a chunk": ["Hello w", "orld! B", "ye"],
    "one chunk": ["Hello world! Bye"],
    "a character at a time": list("Hello world! Bye"),
}


@pytest.mark.parametrize("contents", CONTINUATIONS.values(), ids=CONTINUATIONS.keys())
async def test_a_stream_goes_on_from_the_exact_character_under_its_first_envelope(replicas, contents):
    _, followers, seen, leader, _ = await begun_and_dead(replicas)
    role = chunk({"role": "assistant", "content": ""}, **SECOND)
    leader.upstream.say(role, *second(*contents), SECOND_STOP, {**TAIL, **SECOND}, DONE)
    streams = [before + await whole_stream(each) for before, each in zip(seen, followers, strict=True)]
    assert streams[0] == streams[1]
    assert streams[0].endswith(END)
    assert text_of(streams[0]) == "Hello world! Bye"
    assert envelopes(streams[0]) == FIRST_ENVELOPE
    assert sorted(replicas.calls) == [0, 1, 1]
    await come(lambda: replicas.store.recordings)
    hit = await leader.open()
    assert hit.disposition.kind == "hit"
    assert await whole_stream(hit) == streams[0]
    whole = json.loads(await (await leader.open(stream=False)).reader.whole())
    assert (whole["id"], whole["created"], whole["model"]) in FIRST_ENVELOPE
    assert whole["choices"][0]["message"]["content"] == "Hello world! Bye"
    assert whole["usage"] == USAGE


async def test_who_comes_when_a_take_over_has_said_again_what_was_shown_joins_it(replicas):
    _, followers, seen, leader, other = await begun_and_dead(replicas)
    leader.upstream.say(*second("Hello world!"))
    told = seen[0] + await read_until(followers[0], "!")
    await come(lambda: replicas.store.now)
    late = await together(leader.open(), other.open())
    assert [each.disposition.kind for each in late] == ["collapsed"] * 2
    leader.upstream.say(SECOND_STOP, DONE)
    stream = told + await whole_stream(followers[0])
    assert await whole_stream(late[0]) == await whole_stream(late[1]) == stream
    assert sorted(replicas.calls) == [0, 1, 1]


async def test_who_comes_while_it_is_open_whether_a_take_over_says_the_same_is_no_victim_of_it(replicas):
    _, followers, _, leader, other = await begun_and_dead(replicas)
    newcomers = await together(leader.open(), other.open())
    assert sorted(each.disposition.kind for each in newcomers) == ["collapsed", "miss"]
    await come(lambda: sum(replicas.calls) == 3)
    leader.upstream.say(*second("Good bye"), SECOND_STOP, DONE, at=0)
    assert b"stream_diverged" in await whole_stream(followers[0])
    began = leader if len(leader.upstream.calls) == 2 else other
    began.upstream.say(HELLO, STOP, DONE)
    assert [text_of(await read_all(each)) for each in newcomers] == ["Hello"] * 2


DIFFERENT = {
    "another text": [*second("Hello", " moon"), SECOND_STOP],
    "too little": [*second("Hello"), SECOND_STOP],
    "nothing": [SECOND_STOP],
}


@pytest.mark.parametrize("chunks", DIFFERENT.values(), ids=DIFFERENT.keys())
async def test_a_run_that_says_something_else_ends_the_stream_with_an_error(replicas, chunks):
    first, followers, _, leader, other = await begun_and_dead(replicas)
    leader.upstream.say(*chunks, DONE)
    for each in followers:
        [error] = chunks_of(await whole_stream(each))
        assert error["error"]["code"] == "stream_diverged"
    await come(lambda: not len(leader.flights) and not len(other.flights))
    for replica in (leader, other):
        told = await replica.status(first)
        assert (told["state"], told["error"]["code"]) == ("failed", "stream_diverged")
        assert told["error"]["message"]
    assert not replicas.store.recordings
    assert replicas.is_idle


async def test_a_run_that_breaks_off_before_it_has_said_what_was_shown_is_no_other_way(replicas):
    """Even where the first one had come to its finish reason: the second one has not."""
    a, b, _ = replicas.start(lease_s=RUNS_OUT_S)
    first = await a.open()
    await a.asked()
    follower = await b.open()
    a.upstream.say(OPENING, HELLO, STOP)
    await read_until(follower, '"stop"')
    replicas.die(a, first)
    await b.asked()
    b.upstream.say(*second("Hel"))
    b.upstream.end()
    await read_all(follower)
    assert follower.reader.error.code == "upstream_broke"


async def test_a_second_leader_that_fails_is_an_error_for_all(replicas):
    _, followers, _, leader, _ = await begun_and_dead(replicas)
    leader.upstream.say(*second("Hello"), {"error": {"message": "It broke."}})
    for each in followers:
        [error] = chunks_of(await whole_stream(each))
        assert error["error"]["message"] == "It broke."
    assert not replicas.store.recordings


async def test_a_stream_outlives_its_second_leader_too(replicas):
    first, followers, seen, leader, other = await begun_and_dead(replicas)
    at = 1 if leader is replicas.all[2] else 0
    survivor, before = followers[1 - at], seen[1 - at]
    leader.upstream.say(*second("Hello world", "!"))
    before += await read_until(survivor, "!")
    replicas.die(leader, first)
    await other.asked()
    other.upstream.say(chunk({"content": "Hello world! Bye"}, id="third", created=3, model="third"), STOP, DONE)
    stream = before + await whole_stream(survivor)
    assert text_of(stream) == "Hello world! Bye"
    assert envelopes(stream) == FIRST_ENVELOPE
    assert replicas.calls == [1, 1, 1]
    await come(lambda: replicas.store.recordings)


@pytest.mark.parametrize("old_ends_first", [True, False])
async def test_of_two_leaders_the_old_one_serves_its_own_readers_and_writes_nothing(replicas, old_ends_first):
    first, followers, seen, leader, _ = await begun_and_dead(replicas)
    old = replicas.all[0]
    log = replicas.log(first)
    leader.upstream.say(*second("Hello world", "!"))
    after = [await read_until(each, "!") for each in followers]
    old.store.broken = False
    entries = len(log.entries)
    old.upstream.say(chunk({"content": " of mine"}))
    shown = await read_until(first, "of mine")
    await come(lambda: flight_of(first) not in old.flights._shared or old.flights._shared[flight_of(first)].fenced)
    assert len(log.entries) == entries

    async def old_ends():
        old.upstream.say(STOP, DONE)
        assert text_of(shown + await read_all(first)) == "Hello world of mine"
        await come(lambda: not len(old.flights))

    async def new_ends():
        leader.upstream.say(SECOND_STOP, DONE)
        streams = [s + t + await whole_stream(each) for s, t, each in zip(seen, after, followers, strict=True)]
        assert {text_of(each) for each in streams} == {"Hello world!"}
        await come(lambda: replicas.store.recordings)

    for end in (old_ends, new_ends) if old_ends_first else (new_ends, old_ends):
        await end()
    [recording] = replicas.store.recordings.values()
    assert text_of(recording.stream(None, usage=True)) == "Hello world!"
    assert b"of mine" not in log.frames


@pytest.mark.parametrize("ended", [False, True], ids=["has not heard of it", "has just ended"])
async def test_who_reads_from_the_new_leader_gets_nothing_of_an_old_one(replicas, ended):
    first, followers, _, leader, _ = await begun_and_dead(replicas)
    old = replicas.all[0]
    reads_at_leader = next(each for each in followers if flight_of(each).resolution == "led")
    leader.upstream.say(*second("Hello world", "!"))
    await read_until(reads_at_leader, "!")
    old.upstream.say(chunk({"content": " of mine"}), chunk({"content": ", and more"}))
    await read_until(first, "more")
    old.store.broken = False
    if ended:
        old.upstream.say(STOP, DONE)
        await whole_stream(first)
        await come(lambda: not len(old.flights))
    leader.upstream.say(*second(" Bye."), SECOND_STOP, DONE)
    resumed = await old.resume(reads_at_leader.stream_id, flight_of(reads_at_leader).count)
    assert resumed
    assert text_of(await whole_stream(resumed)) == " Bye."


async def test_who_got_the_answer_of_an_old_leader_goes_on_with_no_other_one(replicas):
    """It had ended before it heard of the new one, and gives what it has to who comes in that moment."""
    first, _, _, leader, other = await begun_and_dead(replicas)
    old = replicas.all[0]
    leader.upstream.say(*second("Hello world", "!", " Bye."), SECOND_STOP, DONE)
    await come(lambda: replicas.store.recordings)
    old.upstream.say(chunk({"content": " of mine"}), STOP, DONE)
    await whole_stream(first)
    hit = await old.open()
    assert hit.disposition.kind == "hit"
    assert text_of(await whole_stream(hit)) == "Hello world of mine"
    with pytest.raises(StreamDiverged):
        await other.resume(hit.stream_id, 3)


async def test_a_lease_that_is_lost_while_its_holder_lives_is_taken_again(replicas):
    a, b, _ = replicas.start()
    first = await a.open()
    await a.asked()
    follower = await b.open()
    a.upstream.say(OPENING, HELLO)
    seen = await read_until(follower, "Hello")
    replicas.store.expire(named(first))
    a.upstream.say(WORLD)
    seen += await read_until(follower, "world")
    assert replicas.log(first).owner.startswith("a.")
    assert (await b.open()).disposition.kind == "collapsed"
    a.upstream.say(STOP, DONE)
    assert seen + await whole_stream(follower) == await whole_stream(first)
    assert replicas.calls == [1, 0, 0]


async def test_a_log_that_is_lost_is_written_anew(replicas):
    a, b, c = replicas.start()
    first = await a.open()
    await a.asked()
    follower = await b.open()
    for each in (OPENING, HELLO):
        a.upstream.say(each)
    seen = await read_until(follower, "Hello")
    replicas.store.lose()
    a.upstream.say(WORLD)
    seen += await read_until(follower, "world")
    late = await c.open()
    assert late.disposition.kind == "collapsed"
    a.upstream.say(STOP, DONE)
    assert await whole_stream(first) == await whole_stream(late) == seen + await whole_stream(follower)
    assert replicas.calls == [1, 0, 0]
    await come(lambda: replicas.store.recordings)


async def test_a_log_that_is_lost_and_then_its_writer_too_is_gone_on_with_from_what_the_followers_have(replicas):
    a, b, _ = replicas.start(lease_s=RUNS_OUT_S)
    first = await a.open()
    await a.asked()
    follower = await b.open()
    a.upstream.say(OPENING, HELLO)
    seen = await read_until(follower, "Hello")
    a.store.broken = True
    replicas.store.lose()
    replicas.store.ring(named(first).flight)
    await b.asked()
    b.upstream.say(*second("Hello world"), SECOND_STOP, DONE)
    assert text_of(seen + await whole_stream(follower)) == "Hello world"
    assert follower.reader.error is None


async def written_anew(replicas: Replicas) -> tuple[Opened, tuple[Opened, bytes], tuple[Opened, bytes]]:
    """The first caller, and those behind and ahead with what they have seen: the log is lost, and the replica of the one
    behind, which goes on alone, writes it anew as far as "Hello there". That of the one ahead has seen none of it.
    """
    a, b, c = replicas.start(lease_s=RUNS_OUT_S)
    c.store.lease_s = 60.0
    first = await a.open()
    await a.asked()
    behind, ahead = await b.open(), await c.open()
    a.upstream.say(OPENING, HELLO)
    seen_behind, seen_ahead = await read_until(behind, "Hello"), await read_until(ahead, "Hello")
    b.store.broken = True
    a.upstream.say(WORLD)
    seen_ahead += await read_until(ahead, "world")
    a.store.broken = c.store.broken = True
    replicas.store.lose()
    b.store.broken = False
    replicas.store.ring(named(first).flight)
    await b.asked()
    b.upstream.say(*second("Hello", " the", "re"))
    await come(lambda: replicas.log(first).count == 4)
    return first, (behind, seen_behind), (ahead, seen_ahead)


@pytest.mark.parametrize("ended", [False, True], ids=["runs", "has ended"])
async def test_a_log_that_another_run_has_written_anew_is_no_continuation_of_what_was_seen_of_the_first(replicas, ended):
    """It begins as the first one did, as far as its writer had seen it; who has seen more would get a mixture."""
    first, (behind, seen_behind), (ahead, seen_ahead) = await written_anew(replicas)
    a, b, c = replicas.all
    if ended:
        b.upstream.say(SECOND_STOP, DONE)
        await come(lambda: replicas.log(first).ended)
    c.store.broken = False
    replicas.store.ring(named(first).flight)
    await c.asked()
    c.upstream.say(*second("Hello world."), SECOND_STOP, DONE)
    assert text_of(seen_ahead + await whole_stream(ahead)) == "Hello world."
    if not ended:
        b.upstream.say(SECOND_STOP, DONE)
    assert text_of(seen_behind + await whole_stream(behind)) == "Hello there"
    a.upstream.say(STOP, DONE)
    assert text_of(await whole_stream(first)) == "Hello world"
    assert replicas.calls == [1, 1, 1]


async def test_a_log_that_another_run_has_written_anew_is_read_on_by_who_had_seen_no_more_than_it(replicas):
    a, b, c = replicas.start(lease_s=RUNS_OUT_S)
    c.store.lease_s = 60.0
    first = await a.open()
    await a.asked()
    followers = [await b.open(), await c.open()]
    a.upstream.say(OPENING, HELLO)
    seen = [await read_until(each, "Hello") for each in followers]
    a.store.broken = c.store.broken = True
    replicas.store.lose()
    replicas.store.ring(named(first).flight)
    await b.asked()
    b.upstream.say(*second("Hello", " the", "re"))
    await come(lambda: replicas.log(first).count == 4)
    c.store.broken = False
    replicas.store.ring(named(first).flight)
    b.upstream.say(SECOND_STOP, DONE)
    for before, each in zip(seen, followers, strict=True):
        assert text_of(before + await whole_stream(each)) == "Hello there"
    assert replicas.calls == [1, 1, 0]
    assert flight_of(followers[1]).runs == flight_of(followers[0]).runs


async def test_a_log_that_another_run_has_written_anew_is_not_taken_over(replicas, monkeypatch):
    first, (behind, seen_behind), (ahead, seen_ahead) = await written_anew(replicas)
    _, b, c = replicas.all
    b.store.broken = True
    log, read = replicas.log(first), c.store.read
    entries = log.entries

    async def sees_nothing_yet(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(log, "entries", [])
        try:
            return await read(*args, **options)
        finally:
            monkeypatch.setattr(log, "entries", entries)

    monkeypatch.setattr(c.store, "read", sees_nothing_yet)
    take_over = AsyncMock(side_effect=c.store.take_over)
    monkeypatch.setattr(c.store, "take_over", take_over)
    monkeypatch.setattr(mirror.Mirror, "_expired", lambda _: True)
    log.owner, c.store.broken = "", False
    replicas.store.expire(named(first))
    await come(lambda: take_over.await_count)
    assert not log.owner
    monkeypatch.setattr(c.store, "read", read)
    await c.asked()
    c.upstream.say(*second("Hello world."), SECOND_STOP, DONE)
    assert text_of(seen_ahead + await whole_stream(ahead)) == "Hello world."
    assert log.entries == entries
    b.upstream.say(SECOND_STOP, DONE)
    assert text_of(seen_behind + await whole_stream(behind)) == "Hello there"


async def test_a_store_that_falls_silent_is_not_waited_for_beyond_the_lease(replicas, monkeypatch):
    a, b, _ = replicas.start(lease_s=RUNS_OUT_S, terms=Terms(lease_s=0.02))
    first = await a.open()
    await a.asked()
    follower = await b.open()
    a.upstream.say(OPENING, HELLO)
    seen = await read_until(follower, "Hello")

    async def silent(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    for command in ("read", "take_over"):
        monkeypatch.setattr(b.store, command, silent)
    await b.asked()
    b.upstream.say(*second("Hello world"), SECOND_STOP, DONE)
    assert text_of(seen + await whole_stream(follower)) == "Hello world"
    a.upstream.say(WORLD, STOP, DONE)
    assert text_of(await read_all(first)) == "Hello world"


@pytest.mark.parametrize("said", [[], [OPENING, HELLO]], ids=["before the first frame", "in the middle"])
async def test_a_leader_that_shuts_down_leaves_its_stream_to_its_followers_at_once(replicas, said):
    a, b, _ = replicas.start()
    first = await a.open()
    await a.asked()
    follower = await b.open()
    seen = b""
    if said:
        a.upstream.say(*said)
        seen = await read_until(follower, "Hello")
        await read_until(first, "Hello")
    await a.service.close()
    assert await first.reader.next(IDLE_S) == b""
    assert isinstance(first.reader.error, ShuttingDown)
    await b.asked()
    b.upstream.say(*second("Hello", " world"), SECOND_STOP, DONE)
    stream = seen + await whole_stream(follower)
    assert text_of(stream) == "Hello world"
    assert follower.reader.error is None


async def test_a_leader_that_shuts_down_before_the_upstreams_head_leaves_its_call_to_its_followers_at_once(replicas):
    a, b, _ = replicas.start()
    a.upstream.headless = True
    await a.open()
    await a.asked()
    await come(lambda: replicas.store.appends)
    follower = await b.open()
    await a.service.close()
    await b.asked()
    b.upstream.say(*second("Hello"), SECOND_STOP, DONE)
    assert text_of(await read_all(follower)) == "Hello"


async def test_a_caller_of_a_leader_that_shut_down_goes_on_elsewhere(replicas):
    a, b, _ = replicas.start()
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING, HELLO)
    seen = await read_until(first, "Hello")
    await a.service.close()
    assert b"shutting_down" in first.reader.end()
    again = await b.resume(first.stream_id, 2)
    await b.asked()
    b.upstream.say(*second("Hello", " world"), SECOND_STOP, DONE)
    stream = seen + await whole_stream(again)
    assert (text_of(stream), envelopes(stream)) == ("Hello world", FIRST_ENVELOPE)


async def test_the_callers_of_a_leader_that_shuts_down_are_told_when_others_can_go_on_and_not_before(replicas, monkeypatch):
    a, _, _ = replicas.start()
    first = await a.open()
    await a.asked()
    told: list[object] = []
    release = a.store.release

    async def watched(*arguments: Any) -> None:
        told.append(first.reader.error)
        await release(*arguments)
        told.append(first.reader.error)

    monkeypatch.setattr(a.store, "release", watched)
    await a.service.close()
    assert told == [None, None]
    assert isinstance(first.reader.error, ShuttingDown)


async def test_an_answer_that_is_complete_is_stored_though_its_replica_shuts_down(replicas):
    a, b, _ = replicas.start()
    a.store.write_gate = asyncio.Event()
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING, HELLO, STOP, DONE)
    assert text_of(await whole_stream(first)) == "Hello"
    closing = asyncio.create_task(a.service.close())
    await some_turns()
    a.store.write_gate.set()
    await closing
    assert replicas.is_idle
    assert (await b.open()).disposition.kind == "hit"


async def test_a_claim_that_reaches_the_store_while_its_replica_shuts_down_is_given_back(replicas, monkeypatch):
    a, b, _ = replicas.start()
    a.store.claim_gate = asyncio.Event()
    claim = a.store.claim
    # To give a command up is not to take it back.
    monkeypatch.setattr(a.store, "claim", lambda *args, **more: asyncio.shield(claim(*args, **more)))
    opening = asyncio.create_task(a.open())
    await come(lambda: a.store.claims)
    closing = asyncio.create_task(a.service.close())
    await some_turns()
    a.store.claim_gate.set()
    await closing
    await some_turns()
    assert replicas.is_idle
    assert b"shutting_down" in await whole_stream(await opening)
    await b.open()
    await b.asked()


MINE = {"authorization": "Bearer mine", "x-client-request-id": "first", "cookie": "no"}
MINE_AGAIN = {"authorization": "Bearer mine", "x-client-request-id": "second", "cookie": "no"}


async def test_a_mere_resumer_has_the_call_run_again_with_nothing_but_its_own_credential(replicas):
    a, _, c = replicas.start(lease_s=RUNS_OUT_S, shared=False)
    first = await a.open(headers=MINE, temperature=0, user="me", metadata={"secret": "x"})
    await a.asked()
    a.upstream.say(OPENING, HELLO)
    seen = await read_until(first, "Hello")
    await come(lambda: replicas.log(first).count == 2)
    assert b"mine" not in replicas.log(first).request
    replicas.die(a, first)
    again = await c.resume(first.stream_id, 2, MINE_AGAIN)
    await c.asked()
    [call] = c.upstream.calls
    assert call.headers == {"authorization": "Bearer mine", "x-client-request-id": "second"}
    assert call.body.items() >= {"model": "m", "temperature": 0}.items()
    assert not call.body.keys() & {"user", "metadata"}
    c.upstream.say(*second("Hello world"), SECOND_STOP, DONE)
    stream = seen + await whole_stream(again)
    assert (text_of(stream), envelopes(stream)) == ("Hello world", FIRST_ENVELOPE)
    assert replicas.calls == [1, 0, 1]


@pytest.mark.slow
async def test_a_resumer_of_a_shared_stream_takes_no_credential_along(replicas):
    a, _, c = replicas.start(lease_s=RUNS_OUT_S)
    first = await a.open(headers=MINE)
    await a.asked()
    a.upstream.say(OPENING, HELLO)
    await come(lambda: replicas.log(first).count == 2)
    replicas.die(a, first)
    again = await c.resume(first.stream_id, 0, {"authorization": "Bearer another"})
    await c.asked()
    assert c.upstream.calls[0].headers == {}
    c.upstream.say(*second("Hello"), SECOND_STOP, DONE)
    assert text_of(await read_all(again)) == "Hello"


async def test_newcomers_join_the_flight_that_a_resumer_reads_here(replicas):
    a, b, _ = replicas.start()
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING, HELLO)
    await read_until(first, "Hello")
    await come(lambda: replicas.log(first).count == 2)
    again = await b.resume(first.stream_id, 1)
    await some_turns()
    newcomer, whole = await together(b.open(), b.open(stream=False))
    assert newcomer.disposition.kind == whole.disposition.kind == "collapsed"
    a.upstream.say(STOP, DONE)
    stream = await whole_stream(newcomer)
    assert stream.endswith(await whole_stream(again))
    assert orjson_text(await whole.reader.whole()) == "Hello"
    assert len(b.store.rings[named(first).flight]) <= 1
    assert replicas.calls == [1, 0, 0]


async def test_a_resumer_who_is_ahead_of_what_this_replica_has_read_waits_for_what_comes_next(replicas):
    a, b, _ = replicas.start()
    first = await a.open()
    await a.asked()
    follower = await b.open()
    a.upstream.say(OPENING)
    await read_until(first, "assistant")
    await read_until(follower, "assistant")
    b.store.broken = True
    a.upstream.say(HELLO)
    await read_until(first, "Hello")
    again = await b.resume(first.stream_id, 2)
    waiting = asyncio.ensure_future(again.reader.next(IDLE_S))
    await some_turns()
    b.store.broken = False
    a.upstream.say(WORLD, STOP, DONE)
    data = (await waiting or b"") + await read_all(again)
    assert text_of(data) == " world"
    assert not again.reader.over
    assert again.reader.end() == END


# The watchdog


@pytest.mark.parametrize("rules", [{"idle_timeout_s": 0.02}, {"total_timeout_s": 0.05}], ids=["idle", "total"])
async def test_an_upstream_that_takes_too_long_fails_for_all_and_leaves_nothing_behind(replicas, rules):
    a, b, c = replicas.start(**rules)
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING)
    follower, whole = await together(b.open(), c.open(stream=False))
    for each in (first, follower):
        assert b'"upstream_timeout"' in (await whole_stream(each)).split(b"\n\n")[-2]
    with pytest.raises(GatewayError) as raised:
        await whole.reader.whole()
    assert raised.value.status == 504
    await replicas.landed()
    for replica in (a, b, c):
        told = await replica.status(first)
        assert (told["state"], told["error"]["code"]) == ("failed", "upstream_timeout")
    assert replicas.is_idle
    assert a.upstream.closed == 1
    assert not replicas.store.recordings


# The store is away


async def test_nobody_notices_that_the_store_is_away_for_a_while_and_the_log_is_complete_again(replicas):
    a, b, c = replicas.start()
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING)
    follower = await b.open()
    seen = await read_until(follower, "assistant")
    for replica in (a, b, c):
        replica.store.broken = True
    a.upstream.say(HELLO)
    assert text_of(await read_until(first, "Hello")) == "Hello"
    assert (await a.open()).disposition.kind == "collapsed"
    for replica in (a, b, c):
        replica.store.broken = False
    a.upstream.say(WORLD)
    seen += await read_until(follower, "world")
    late = await c.open()
    a.upstream.say(STOP, DONE)
    assert seen + await whole_stream(follower) == await whole_stream(late)
    assert text_of(replicas.log(first).frames) == "Hello world"
    await replicas.landed()
    assert replicas.is_idle
    assert len(replicas.store.recordings) == 1


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_store_that_is_away_at_the_end_costs_the_recording_and_nothing_else(replicas, comes_back):
    a, _, _ = replicas.start()
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING)
    await come(lambda: replicas.log(first).count == 1)
    a.store.broken = True
    a.upstream.say(HELLO, STOP, DONE)
    a.upstream.end()
    assert text_of(await read_all(first)) == "Hello"
    await replicas.landed()
    a.store.broken = not comes_back
    assert (await a.open()).disposition.kind in {"hit", "collapsed", "miss"}


async def test_the_time_that_a_call_may_take_does_not_cut_off_its_storing(replicas):
    total_s = 0.02
    a, _, _ = replicas.start(total_timeout_s=total_s)
    a.store.write_gate = asyncio.Event()
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING, HELLO, STOP, DONE)
    assert text_of(await read_all(first)) == "Hello"
    loop, ended_s = asyncio.get_running_loop(), asyncio.get_running_loop().time()
    await come(lambda: loop.time() > ended_s + 2 * total_s)
    a.store.write_gate.set()
    await come(lambda: replicas.store.recordings)
    assert replicas.log(first).ended


async def test_nobody_waits_for_the_rest_of_what_ended_while_the_store_was_away(replicas, monkeypatch):
    """Though its lease still holds by then: who held it says that it is over."""
    monkeypatch.setattr("gateway.sharing._AGAIN_S", 0.01)
    a, b, _ = replicas.start()
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING)
    await come(lambda: replicas.log(first).count == 1)
    a.store.broken = True
    a.upstream.say(HELLO, STOP, DONE)
    a.upstream.end()
    assert text_of(await read_all(first)) == "Hello"
    await replicas.landed()
    assert replicas.store.now
    a.store.broken = False
    await come(lambda: not replicas.store.now)
    second = await b.open()
    await b.asked()
    b.upstream.say(WORLD, STOP, DONE)
    b.upstream.end()
    assert text_of(await read_all(second)) == " world"


async def test_a_flight_that_began_while_the_store_was_away_is_shared_when_it_is_back(replicas):
    a, b, _ = replicas.start()
    a.store.broken = True
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING, HELLO)
    seen = await read_until(first, "Hello")
    a.store.broken = False
    await come(lambda: replicas.store.now)
    follower = await b.open()
    assert follower.disposition.kind == "collapsed"
    a.upstream.say(WORLD, STOP, DONE)
    assert await whole_stream(follower) == seen + await whole_stream(first)
    assert replicas.calls == [1, 0, 0]


# Cancelled by their callers


async def test_who_is_cancelled_is_told_and_strangers_never_notice(replicas):
    a, b, _ = replicas.start()
    first, other = await together(a.open(), a.open())
    await a.asked()
    follower, other_follower = await together(b.open(), b.open())
    a.upstream.say(OPENING, HELLO)
    for each in (first, other, follower, other_follower):
        await read_until(each, "Hello")
    await a.streams.cancel(first.stream_id, NOBODY)
    await a.streams.cancel(follower.stream_id, NOBODY)
    for each in (first, follower):
        assert b'"stream_cancelled"' in await whole_stream(each)
        assert isinstance(each.reader.error, StreamCancelled)
    a.upstream.say(WORLD, STOP, DONE)
    assert await read_all(other) == await read_all(other_follower)
    assert other.reader.error is other_follower.reader.error is None
    assert replicas.calls == [1, 0, 0]


@pytest.mark.parametrize("by", [0, 1, 2], ids=["where it is led", "where it is read", "elsewhere"])
@pytest.mark.parametrize("when", ["finish", "cancel", "finish_if_cacheable"])
async def test_a_cancelled_reader_gets_nothing_any_more_and_every_replica_knows(replicas, when, by):
    a, b, c = replicas.start(when_abandoned=when)
    first, stays = await together(a.open(), a.open())
    await a.asked()
    follower = await b.open()
    a.upstream.say(OPENING, HELLO)
    await read_until(follower, "Hello")
    await replicas.all[by].streams.cancel(follower.stream_id, NOBODY)
    assert b'"stream_cancelled"' in await whole_stream(follower)
    b.leave(follower)
    await come(lambda: follower.reader.nonce in flight_of(first).cancelled)
    for replica in (a, b, c):
        assert await replica.resume(follower.stream_id, 1) is None
        assert (await replica.status(follower))["cancelled"]
        assert not (await replica.status(first))["cancelled"]
    a.upstream.say(STOP, DONE)
    assert text_of(await read_all(stays)) == "Hello"
    await replicas.landed()
    for replica in (a, b, c):
        assert await replica.resume(follower.stream_id, 1) is None
        assert (await replica.status(follower))["cancelled"]


@pytest.mark.parametrize("by", [0, 1], ids=["here", "elsewhere"])
@pytest.mark.parametrize("when", ["finish", "cancel", "finish_if_cacheable"])
async def test_when_the_last_reader_is_cancelled_the_upstream_is_closed_at_once(replicas, when, by):
    a, _, _ = replicas.start(when_abandoned=when, abandon_grace_s=IDLE_S)
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING, HELLO)
    await read_until(first, "Hello")
    await come(lambda: replicas.log(first).count == 2)
    await replicas.all[by].streams.cancel(first.stream_id, NOBODY)
    assert b'"stream_cancelled"' in await whole_stream(first)
    a.leave(first)
    await replicas.landed()
    assert a.upstream.closed == 1
    assert replicas.is_idle
    assert not replicas.store.recordings
    assert (await a.status(first))["state"] == "abandoned"


@pytest.mark.parametrize("by", [0, 1, 2], ids=["where it is led", "where it is read", "elsewhere"])
@pytest.mark.parametrize("when", ["finish", "finish_if_cacheable"])
async def test_when_the_last_reader_is_a_cancelled_follower_the_upstream_is_closed_at_once(replicas, when, by):
    a, b, _ = replicas.start(when_abandoned=when, abandon_grace_s=IDLE_S)
    first = await a.open()
    await a.asked()
    follower = await b.open()
    a.upstream.say(OPENING, HELLO)
    await read_until(follower, "Hello")
    a.leave(first)
    await replicas.all[by].streams.cancel(follower.stream_id, NOBODY)
    assert b'"stream_cancelled"' in await whole_stream(follower)
    b.leave(follower)
    await replicas.landed()
    assert a.upstream.closed == 1
    assert replicas.is_idle
    assert not replicas.store.recordings


async def test_a_reader_who_was_cut_off_can_be_cancelled_and_ends_the_flight(replicas):
    """It is no reader any more, but nobody else is one either."""
    a, b, _ = replicas.start(when_abandoned="finish")
    first = await a.open()
    await a.asked()
    a.upstream.say(OPENING, HELLO)
    await read_until(first, "Hello")
    a.leave(first)
    await some_turns()
    assert a.upstream.closed == 0
    await b.streams.cancel(first.stream_id, NOBODY)
    await replicas.landed()
    assert a.upstream.closed == 1
    assert not replicas.store.recordings


async def test_a_whole_answers_reader_keeps_a_flight_that_a_cancelled_stream_began(replicas):
    a, b, _ = replicas.start(when_abandoned="cancel", abandon_grace_s=0.0)
    first = await a.open()
    await a.asked()
    whole = await b.open(stream=False)
    await come(lambda: replicas.log(first).readers.get("b"))
    await a.streams.cancel(first.stream_id, NOBODY)
    a.leave(first)
    await some_turns()
    a.upstream.say(HELLO, STOP, DONE)
    assert orjson_text(await whole.reader.whole()) == "Hello"

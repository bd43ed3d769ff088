"""What a process takes on at a time: at each limit, for all and for one tenant; and that every end gives its place back."""

import asyncio
import errno
import json
import os
import resource
import socket
import subprocess
import sys
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError

import aiohttp
import openai
import pytest
from cores import Core
from fakes import FakeClock, FakeStore
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI
from running import next_block
from scripted import chunk, say_hello
from served import ENVIRON, Served

from gateway.config import LimitsConfig, load
from gateway.core.apis import CHAT
from gateway.errors import Overloaded, TenantOverloaded
from gateway.http import door
from gateway.limits import Limits
from gateway.questions import Request
from gateway.sockets import bind

WITHIN_S = 10.0
HELLO = chunk({"role": "assistant", "content": "Hello"})
NO_STORE = {"Cache-Control": "no-store"}
LONG = "a long one: "
ANY = dict.fromkeys(LimitsConfig.model_fields, 0)
JSON_HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def as_tenant(name):
    return {"Authorization": f"Bearer {name}", **NO_STORE}


async def until(condition):
    """Gives others their turn until it is so."""
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.001)


def taken(gateway):
    found = gateway.limits.snapshot()
    return {name: found[name]["now"] for name in ("streams", "flights", "held_bytes")}


async def nothing_is_left(gateway):
    await until(lambda: not any(taken(gateway).values()))
    assert not gateway.limits.streams._by_tenant
    assert not gateway.limits.flights._by_tenant


async def waits(asked):
    """To whom asks for a long one: a word, then nothing until the test says so, then the rest."""
    if asked.method == "GET" or not asked.json["messages"][0]["content"].startswith(LONG):
        await say_hello(asked)
        return
    await asked.head()
    await asked.event(HELLO)
    await asked.gate("rest")
    await asked.event(chunk({"content": " world"}))
    await asked.event(chunk({}, "stop"))
    await asked.done()


def is_overloaded(got):
    assert got.status == 503, got.body
    assert got.json["error"]["code"] == "overloaded"
    assert 1 <= int(got.headers["Retry-After"]) <= 3
    return True


def is_over_the_tenants_rate(got):
    assert got.status == 429, got.body
    assert (got.json["error"]["type"], got.json["error"]["code"]) == ("requests", "rate_limit_exceeded")
    assert 1 <= int(got.headers["Retry-After"]) <= 3
    return True


class Streams:
    """Streams that have begun, and wait for their rest."""

    def __init__(self, gateway, upstream):
        self.gateway = gateway
        self.upstream = upstream
        self.stack = AsyncExitStack()
        self.answers = []
        upstream.script = waits

    async def begin(self, content, headers=NO_STORE):
        response = await self.stack.enter_async_context(self.gateway.opened(LONG + content, headers=headers, stream=True))
        assert response.status == 200
        await next_block(response)
        self.answers.append(response)

    async def end(self):
        """All of them are whole."""
        self.upstream.gate("rest").released.set()
        for response in self.answers:
            assert (await response.text()).endswith("data: [DONE]\n\n")
        self.answers.clear()
        await self.stack.aclose()


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """Nobody is idle, or takes too long, because this machine is slow."""
    monkeypatch.setattr(door, "_IDLE_S", 1000.0)
    monkeypatch.setattr(door, "_GOING_WITHIN_S", 1000.0)


@pytest.fixture
async def start(start_gateway, upstream):
    """A gateway with those limits, and no others; and streams of it."""
    begun = []

    async def start(limits, **sections):
        gateway = await start_gateway(limits={**ANY, **limits}, **sections)
        begun.append(streams := Streams(gateway, upstream))
        return gateway, streams

    yield start
    for streams in begun:
        upstream.gate("rest").released.set()
        await streams.stack.aclose()
        await nothing_is_left(streams.gateway)


# At the limit


@pytest.mark.parametrize("limit", ["max_streams", "max_flights"])
async def test_beyond_the_limit_newcomers_are_refused_and_what_runs_goes_on(start, limit):
    gateway, streams = await start({limit: 2})
    await streams.begin("one")
    await streams.begin("two")
    for _ in range(3):
        assert is_overloaded(await gateway.chat("three", headers=NO_STORE))
    assert len(gateway.limits.snapshot()[limit.removeprefix("max_")]) == 5
    assert gateway.limits.snapshot()[limit.removeprefix("max_")]["refused"] == 3
    await streams.end()
    await nothing_is_left(gateway)
    assert (await gateway.chat("three", headers=NO_STORE)).status == 200


@pytest.mark.parametrize("limit", ["max_streams_per_tenant", "max_flights_per_tenant"])
async def test_a_tenant_with_too_much_is_refused_alone_and_in_openais_form(start, limit):
    gateway, streams = await start({limit: 1})
    await streams.begin("one", as_tenant("a"))
    assert is_over_the_tenants_rate(await gateway.chat("two", headers=as_tenant("a")))
    await streams.begin("two", as_tenant("b"))
    assert is_over_the_tenants_rate(await gateway.chat("three", headers=as_tenant("b")))
    assert (await gateway.chat("three")).status == 200  # whoever has no credential is a tenant, too
    await streams.end()
    await nothing_is_left(gateway)
    assert (await gateway.chat("four", headers=as_tenant("a"))).status == 200


async def test_openais_client_takes_the_refusals_for_what_they_are(start):
    gateway, streams = await start({"max_streams": 2, "max_streams_per_tenant": 1})
    await streams.begin("one", as_tenant("a"))
    for key, error in (("a", openai.RateLimitError), ("b", openai.InternalServerError)):
        if key == "b":
            await streams.begin("two", as_tenant("c"))
        async with AsyncOpenAI(base_url=gateway.base_url, api_key=key, max_retries=0) as client:
            with pytest.raises(error) as refused:
                await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
        assert refused.value.code in ("rate_limit_exceeded", "overloaded")
        assert refused.value.response.headers["retry-after"]
    await streams.end()


async def test_a_client_that_comes_again_when_it_is_told_to_is_served(start):
    gateway, streams = await start({"max_flights": 1})
    gateway.limits.flights._draw = lambda: 0.0
    await streams.begin("one")
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="k", max_retries=3) as client:
        asking = asyncio.ensure_future(
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
        )
        await until(lambda: gateway.limits.flights.refused.count)
        await streams.end()
        assert (await asking).choices[0].message.content == "Hello world"


async def test_a_refusal_does_not_wait_for_the_body(start):
    gateway, streams = await start({"max_streams": 1})
    await streams.begin("one")
    host, port = gateway.origin.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"{JSON_HEAD}Content-Length: 9999\r\n\r\n".encode())
    async with asyncio.timeout(WITHIN_S):
        assert (await reader.readline()).startswith(b"HTTP/1.1 503")
    writer.close()
    await streams.end()


async def test_who_watches_is_served_whatever_is_full(start):
    gateway, streams = await start({"max_streams": 1, "max_flights": 1, "max_held_bytes": 1})
    with suppress(AssertionError):
        await streams.begin("one")
    assert is_overloaded(await gateway.chat("two", headers=NO_STORE))
    for path in ("/healthz", "/readyz", "/openapi.json", "/", "/v1/models"):
        async with gateway.session.get(f"{gateway.origin}{path}") as response:
            assert response.status == 200


async def test_new_limits_hold_at_once_and_end_nothing(start):
    gateway, streams = await start({})
    await streams.begin("one")
    await streams.begin("two")
    for limits, may in (({"max_streams": 1}, False), ({"max_streams": 3}, True), ({"max_flights_per_tenant": 2}, False)):
        environ = {f"GATEWAY_LIMITS_{name.upper()}": str(value) for name, value in {**ANY, **limits}.items()}
        gateway.adjustable.limits.become(load(None, environ).config.limits)
        assert (await gateway.chat("three", headers=NO_STORE)).status == 200 if may else not may
        if not may:
            assert (await gateway.chat("three", headers=NO_STORE)).status in (429, 503)
    await streams.end()


# Where a place is given back


async def completes(gateway, upstream):
    upstream.script = say_hello
    assert (await gateway.chat(stream=True)).status == 200


async def is_given_whole(gateway, upstream):
    upstream.script = say_hello
    assert (await gateway.chat()).status == 200


async def is_a_hit(gateway, upstream):
    upstream.script = say_hello
    await gateway.chat("twice")
    await gateway.landed()
    assert "hit" in (await gateway.chat("twice", stream=True)).cache_status


async def is_wrong(gateway, upstream):
    assert (await gateway.post("/v1/chat/completions", {"model": 5})).status == 400


async def leaves(gateway, upstream):
    upstream.script = waits
    async with gateway.opened(LONG, headers=NO_STORE, stream=True) as response:
        await next_block(response)
        response.close()
    upstream.gate("rest").released.set()


async def leaves_before_the_head(gateway, upstream):
    async def script(asked):
        await asked.gate("before the head")

    upstream.script = script
    asking = asyncio.ensure_future(gateway.chat(headers=NO_STORE))
    await upstream.gate("before the head").reached.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def leaves_in_the_body(gateway, upstream):
    host, port = gateway.origin.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, port)
    writer.write(f"{JSON_HEAD}Content-Length: 9999\r\n\r\n{{".encode())
    await until(lambda: gateway.limits.streams.taken)
    writer.transport.abort()


async def is_refused_by_the_upstream(gateway, upstream):
    upstream.script = lambda asked: asked.answer({"error": {"message": "no"}}, 400)
    assert (await gateway.chat(stream=True)).status == 400


async def breaks(gateway, upstream):
    async def script(asked):
        await asked.head()
        await asked.event(HELLO)
        asked.reset()

    upstream.script = script
    assert "error" in (await gateway.chat(stream=True)).events[-1]


async def leaves_the_queue(gateway, upstream):
    async def script(asked):
        await asked.gate("holds the slot")

    upstream.script = script
    first = asyncio.ensure_future(gateway.chat("first", headers=NO_STORE))
    await upstream.gate("holds the slot").reached.wait()
    queued = asyncio.ensure_future(gateway.chat("queued", headers=NO_STORE))
    await until(lambda: gateway.limits.flights.taken == 2)
    queued.cancel()
    await until(lambda: gateway.limits.flights.taken == 1)
    first.cancel()
    await asyncio.gather(first, queued, return_exceptions=True)


async def is_shut_down(gateway, upstream):
    upstream.script = waits
    async with gateway.opened(LONG, stream=True) as response:
        await next_block(response)
        await gateway.service.close()
        assert "shutting_down" in await response.text()


async def is_relayed(gateway, upstream):
    upstream.script = lambda asked: asked.answer({"data": []})
    assert (await gateway.post("/v1/embeddings", {"model": "m", "input": "x"})).status == 200


@pytest.mark.parametrize(
    "end",
    [
        completes, is_given_whole, is_a_hit, is_wrong, leaves, leaves_before_the_head, leaves_in_the_body,
        is_refused_by_the_upstream, breaks, leaves_the_queue, is_shut_down, is_relayed,
    ],
)  # fmt: skip
async def test_every_end_gives_all_back(start_gateway, upstream, end):
    one_call = {
        "name": "scripted",
        "kind": "openai",
        "base_url": upstream.base_url,
        "models": ["*"],
        "max_concurrent_calls": 1,
    }
    gateway = await start_gateway(flights={"abandon_grace_s": 0.0}, upstreams=[one_call])
    await end(gateway, upstream)
    await nothing_is_left(gateway)


KINDS = st.sampled_from(["a", "b", "c"])


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), KINDS),
            st.tuples(st.just("take anyway"), KINDS),
            st.tuples(st.just("release"), st.integers(0, 50)),
            st.tuples(st.just("release twice"), st.integers(0, 50)),
            st.tuples(st.just("limits"), st.tuples(st.integers(0, 4), st.integers(0, 3))),
        )
    )
)
def test_no_beginning_exceeds_a_limit_and_no_end_loses_a_place(steps):
    limits = Limits(LimitsConfig(max_flights=3, max_flights_per_tenant=2), clock=lambda: 0.0)
    places, live = limits.flights, []
    for what, value in steps:
        if what == "take":
            take(places, value, live)
        elif what == "take anyway":
            live.append((value, places.take_anyway(value)))
        elif what == "limits":
            limits.become(LimitsConfig(max_flights=value[0], max_flights_per_tenant=value[1]))
        elif live:
            _, place = live.pop(value % len(live))
            place.release()
            if what == "release twice":
                place.release()
        assert places.taken == len(live)
        assert [places.of_tenant(tenant) for tenant in "abc"] == [count(live, tenant) for tenant in "abc"]
    for _, place in live:
        place.release()
    assert (places.taken, places._by_tenant) == (0, {})


def take(places, tenant, live):
    of_all, of_tenant = len(live), count(live, tenant)
    try:
        live.append((tenant, places.take(tenant)))
    except TenantOverloaded:
        assert 0 < places.limit_per_tenant <= of_tenant
    except Overloaded:
        assert 0 < places.limit <= of_all
    else:
        assert not places.limit or of_all < places.limit
        assert not places.limit_per_tenant or of_tenant < places.limit_per_tenant


def count(live, tenant):
    return sum(each == tenant for each, _ in live)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1000))))
def test_what_is_held_is_the_sum_of_what_each_holds(steps):
    limits = Limits(LimitsConfig(max_held_bytes=1000))
    holdings = [limits.held.holding() for _ in range(4)]
    sizes = [0] * 4
    for place, size in steps:
        holdings[place].become(size)
        sizes[place] = size
        assert limits.held.size_bytes == sum(sizes)
        assert limits.held.has_room_for_call() == (sum(sizes) <= 750)
        with suppress(Overloaded):
            limits.held.check()
            assert sum(sizes) <= 1000


# Flights that are full


async def test_hits_and_followers_are_served_though_flights_are_full(start):
    gateway, streams = await start({"max_flights": 1})
    await gateway.chat("stored")
    await gateway.landed()
    await streams.begin("running", {})
    assert is_overloaded(await gateway.chat("another"))
    assert is_overloaded(await gateway.chat("stored", headers={"Cache-Control": "no-cache"}))
    assert "hit" in (await gateway.chat("stored")).cache_status
    assert "hit" in (await gateway.chat("stored", stream=True)).cache_status
    follower = asyncio.ensure_future(gateway.chat(f"{LONG}running", stream=True))
    await until(lambda: gateway.limits.streams.taken == 2)
    await streams.end()
    assert "collapsed" in (await follower).cache_status
    assert (await follower).events[-1] == "[DONE]"


async def test_hits_are_served_though_the_upstreams_queue_is_full(start, upstream):
    one = {"name": "scripted", "kind": "openai", "base_url": upstream.base_url, "models": ["*"]}
    gateway, streams = await start({}, upstreams=[{**one, "max_concurrent_calls": 1, "max_queued_calls": 0}])
    await gateway.chat("stored")
    await gateway.landed()
    await streams.begin("running")
    assert (await gateway.chat("another")).json["error"]["code"] == "upstream_busy"
    assert "hit" in (await gateway.chat("stored")).cache_status
    await streams.end()


async def test_calls_that_wait_for_an_upstream_are_flights(start, upstream):
    one = {"name": "scripted", "kind": "openai", "base_url": upstream.base_url, "models": ["*"], "max_concurrent_calls": 1}
    gateway, streams = await start({"max_flights": 2}, upstreams=[one])
    await streams.begin("running")
    queued = asyncio.ensure_future(gateway.chat("queued", headers=NO_STORE))
    await until(lambda: gateway.limits.flights.taken == 2)
    assert is_overloaded(await gateway.chat("third", headers=NO_STORE))
    await streams.end()
    assert (await queued).status == 200


@pytest.fixture
async def stale(start, monkeypatch):
    """A stored answer that is no longer fresh, and a gateway that is full."""

    async def stale(**cache):
        gateway, streams = await start({"max_flights": 1}, cache={"ttl_s": 0.05, **cache})
        await gateway.chat("stale")
        await gateway.landed()
        clock = gateway.service._clock
        later_s = clock.now() + 10.0
        monkeypatch.setattr(clock, "now", lambda: later_s, raising=False)
        await streams.begin("running")
        return gateway, streams

    return stale


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
async def test_a_stale_answer_stands_in_for_a_call_that_may_not_begin(stale, streamed):
    gateway, streams = await stale(stale_if_error_s=100.0)
    got = await gateway.chat("stale", stream=streamed)
    assert got.status == 200
    assert got.cache_status.startswith("gateway; fwd=stale; ttl=-")
    assert got.cache_status.endswith("; detail=stale-if-error")
    assert is_overloaded(await gateway.chat("never stored", stream=streamed))
    await streams.end()


async def test_where_none_may_stand_in_the_refusal_is_told(stale):
    gateway, streams = await stale()
    assert is_overloaded(await gateway.chat("stale"))
    await streams.end()


async def test_no_refresh_is_begun_where_flights_are_full(stale, upstream):
    gateway, streams = await stale(stale_s=100.0)
    calls = len(upstream.asked)
    got = await gateway.chat("stale")
    assert "stale-while-revalidate" in got.cache_status
    assert (len(upstream.asked), gateway.limits.flights.taken) == (calls, 1)
    assert gateway.limits.flights.refused.count == 0
    await streams.end()
    await gateway.landed()
    await gateway.chat("stale")  # now there is room
    await until(lambda: len(upstream.asked) == calls + 1)
    await gateway.landed()


async def test_who_reads_another_replicas_log_has_no_place_until_it_goes_on_with_the_call(no_task_is_left):
    store, clock = FakeStore("a"), FakeClock()
    leader, follower = Core(store, clock), Core(store.replica_of("b"), clock)
    request = Request(CHAT, {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}, {})
    first, second = await leader.service.open(request), await follower.service.open(request)
    assert second.disposition.kind == "collapsed"
    assert (leader.flights.limits.flights.taken, follower.flights.limits.flights.taken) == (1, 0)
    follower.flights.limits.become(LimitsConfig(max_flights=1))
    follower.flights.limits.flights.take_anyway("somebody")
    await leader.close()  # hands the call over: what has begun goes on, however many there are
    await until(lambda: follower.upstream.calls)
    assert follower.flights.limits.flights.taken == 2
    leader.service.leave(first)
    await follower.close()
    follower.service.leave(second)
    assert follower.flights.limits.flights.taken == 1


# Bytes


async def test_a_body_is_counted_as_it_comes_and_refused_where_it_is_too_much(start):
    gateway, _ = await start({"max_held_bytes": 10_000})
    host, port = gateway.origin.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, port)
    head = f"{JSON_HEAD}Transfer-Encoding: chunked\r\n\r\n"
    writer.write(head.encode() + b"1000\r\n" + b" " * 0x1000 + b"\r\n")
    await until(lambda: taken(gateway)["held_bytes"] == 0x1000)
    assert is_overloaded(await gateway.chat("x" * 8000, headers=NO_STORE))  # its length says so
    writer.write(b"2000\r\n" + b" " * 0x2000 + b"\r\n")
    async with asyncio.timeout(WITHIN_S):
        assert (await reader.readline()).startswith(b"HTTP/1.1 503")
    writer.close()


async def test_running_and_stored_answers_are_counted_and_calls_are_refused_before_hits(start):
    gateway, streams = await start({})
    await gateway.chat("stored")
    await gateway.landed()
    await nothing_is_left(gateway)
    await streams.begin("running")
    held = taken(gateway)["held_bytes"]
    assert held > len(json.dumps(HELLO))
    gateway.limits.become(LimitsConfig(**{**ANY, "max_held_bytes": int(held * 1.2) + 200}))
    other = gateway.limits.held.holding()
    other.become(150)
    assert is_overloaded(await gateway.chat("a"))
    assert "hit" in (await gateway.chat("stored")).cache_status
    other.become(10_000)
    assert is_overloaded(await gateway.chat("stored"))
    other.become(0)
    await streams.end()


async def test_a_replay_is_counted_while_it_goes_on(start_gateway, upstream):
    gateway = await start_gateway(replay={"pace": "fixed", "tokens_per_s": 10.0})
    await gateway.chat()
    await gateway.landed()
    await nothing_is_left(gateway)
    async with gateway.opened(stream=True) as response:
        await next_block(response)
        assert taken(gateway)["held_bytes"] > 500
        response.close()
    await nothing_is_left(gateway)


async def test_what_a_caller_does_not_take_is_counted(start, upstream):
    async def talks(asked):
        await asked.head()
        with suppress(ConnectionError):
            while True:
                await asked.event(chunk({"content": "x" * 50_000}))

    gateway, _ = await start({}, flights={"max_flight_bytes": 1_000_000, "abandon_grace_s": 0.0})
    upstream.script = talks
    host, port = gateway.origin.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)))
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True})
    sock.sendall(f"{JSON_HEAD}Cache-Control: no-store\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    await until(lambda: gateway.limits.held.unsent_bytes() > 60_000)
    sock.close()
    await nothing_is_left(gateway)


# Connections


class Caller:
    """One connection."""

    def __init__(self, gateway):
        host, port = gateway.origin.removeprefix("http://").split(":")
        self.opening = asyncio.open_connection(host, port)

    async def __aenter__(self):
        self.reader, self.writer = await self.opening
        return self

    async def __aexit__(self, *_):
        self.writer.transport.abort()

    async def get(self, path="/v1/models"):
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return await self.read()

    async def read(self):
        """The status, the fields, and the body."""
        async with asyncio.timeout(WITHIN_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
            first, *lines = head.strip().split("\r\n")
            fields = dict(line.split(": ", 1) for line in lines)
            return int(first.split()[1]), fields, await self.reader.readexactly(int(fields["content-length"]))

    async def is_closed(self):
        async with asyncio.timeout(WITHIN_S):
            with suppress(ConnectionError):
                return await self.reader.read() == b""
            return True


async def test_beyond_the_limit_of_connections_newcomers_are_told_and_closed(start):
    gateway, _ = await start({"max_connections": 2})
    async with Caller(gateway) as one, Caller(gateway) as two, Caller(gateway) as three:
        assert (await one.get())[0] == (await two.get())[0] == 200
        status, fields, body = await three.get()
        assert status == 503
        assert json.loads(body)["error"]["code"] == "overloaded"
        assert fields["connection"] == "close"
        assert 1 <= int(fields["retry-after"]) <= 3
        assert await three.is_closed()
        assert (await one.get())[0] == (await two.get())[0] == 200
        one.writer.close()
        await until(lambda: gateway.limits.connections.taken == 1)
        async with Caller(gateway) as four:
            assert (await four.get())[0] == 200
    await until(lambda: gateway.limits.connections.taken == 0)
    assert gateway.limits.connections.refused.count == 1


async def test_an_answer_reaches_who_still_sends(start):
    gateway, _ = await start({"max_connections": 1})
    async with Caller(gateway) as one, Caller(gateway) as two:
        assert (await one.get())[0] == 200
        length = 8_000_000
        two.writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        two.writer.write(b" " * length)
        assert (await two.read())[0] == 503


async def test_idle_connections_make_room_and_those_in_use_do_not(start, monkeypatch):
    monkeypatch.setattr(door, "_IDLE_S", 0.0)
    gateway, streams = await start({"max_connections": 3})
    await streams.begin("running")
    async with Caller(gateway) as first, Caller(gateway) as second:
        assert (await first.get())[0] == (await second.get())[0] == 200
        assert (await first.get())[0] == 200  # so the second one has been idle for longer
        async with Caller(gateway) as third:
            assert (await third.get())[0] == 200
            assert await second.is_closed()
            async with Caller(gateway) as fourth:
                assert (await fourth.get())[0] == 200
                assert await first.is_closed()
    assert gateway.limits.evicted == 2
    await streams.end()


async def test_a_lower_limit_closes_idle_connections_as_soon_as_somebody_comes(start, monkeypatch):
    monkeypatch.setattr(door, "_IDLE_S", 0.0)
    gateway, _ = await start({})
    async with AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(Caller(gateway)) for _ in range(5)]
        assert [(await caller.get())[0] for caller in callers] == [200] * 5
        gateway.limits.become(LimitsConfig(**{**ANY, "max_connections": 2}))
        async with Caller(gateway) as newcomer:
            assert (await newcomer.get())[0] == 200
            assert gateway.limits.connections.taken == 2
            assert all([await caller.is_closed() for caller in callers[:4]])
            assert (await callers[4].get())[0] == 200


async def test_who_only_seems_to_watch_makes_no_room_that_it_does_not_have(start, monkeypatch):
    gateway, streams = await start({"max_connections": 1})
    await streams.begin("running")
    async with Caller(gateway) as silent:
        silent.writer.write(b"GET /healthz HTTP/1.1\r\n")  # and no more
        await until(lambda: extras(gateway))
        monkeypatch.setattr(door, "_IDLE_S", 0.0)
        async with Caller(gateway) as newcomer:
            assert (await newcomer.get())[0] == 503
        assert await silent.is_closed()
    assert gateway.limits.evicted == 0
    await streams.end()


def extras(gateway):
    return gateway.limits.held.unsent_bytes.__self__._extras


async def test_who_has_just_come_or_asked_is_not_closed_for_others(start):
    gateway, _ = await start({"max_connections": 1})
    async with Caller(gateway) as one:
        await until(lambda: gateway.limits.connections.taken == 1)
        async with Caller(gateway) as two:
            assert (await two.get())[0] == 503
        assert (await one.get())[0] == 200


async def test_who_says_nothing_keeps_nobody_out_and_takes_no_more_than_there_is_for_them(start, monkeypatch):
    monkeypatch.setattr(door, "_MAX_TURNED_AWAY", 3)
    gateway, _ = await start({"max_connections": 1})
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(Caller(gateway))
        assert (await one.get())[0] == 200
        silent = [await stack.enter_async_context(Caller(gateway)) for _ in range(6)]
        loud = await stack.enter_async_context(Caller(gateway))
        assert (await loud.get())[0] == 503
        assert all([await each.is_closed() for each in silent[:3]])
        assert (await one.get())[0] == 200
    await until(lambda: gateway.limits.connections.refused.count == 7)


async def test_who_watches_is_served_beyond_the_limit_of_connections(start):
    gateway, _ = await start({"max_connections": 1})
    async with Caller(gateway) as one:
        assert (await one.get())[0] == 200
        for path in ("/healthz", "/readyz"):
            async with Caller(gateway) as probe:
                status, fields, _ = await probe.get(path)
                assert (status, fields["connection"]) == (200, "close")
                assert await probe.is_closed()
        async with Caller(gateway) as other:
            assert (await other.get("/healthzz"))[0] in (404, 503)
    await until(lambda: gateway.limits.connections.taken == 0)


async def test_a_process_that_shares_its_socket_leaves_what_waits_to_others_first(start):
    gateway, _ = await start({"max_connections": 1})
    acceptor = door.Acceptor(bind("127.0.0.1", 0)[0], None, gateway.limits, shared=True)
    paused, took = [], []
    acceptor._pause, acceptor._take_some = paused.append, lambda: took.append(1)
    acceptor._door = SimpleNamespace(has_room=lambda: not gateway.limits.connections.taken)
    acceptor._ready()
    with gateway.limits.connections.take_anyway(""):
        acceptor._ready()
    assert (len(took), len(paused)) == (1, 1)
    await acceptor.stop()


@pytest.mark.parametrize(
    ("error", "told"),
    [(FileExistsError(errno.EEXIST, "File exists"), ["WARNING"]), (ConnectionResetError(errno.ECONNRESET, "reset"), [])],
)
async def test_a_caller_who_is_closed_unserved_is_told_of_unless_it_has_left(error, told, caplog):
    caplog.set_level("INFO")
    limits = Limits(LimitsConfig())
    acceptor = door.Acceptor(bind("127.0.0.1", 0)[0], door.Door(asyncio.Protocol, limits), limits, shared=False)

    async def connect_accepted_socket(_, connection):
        raise error

    acceptor._loop = SimpleNamespace(connect_accepted_socket=connect_accepted_socket)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        await acceptor._connect(theirs, b"", is_let_in=False)
        assert ours.recv(1) == b""
    assert [record.levelname for record in caplog.records] == told
    assert limits.connections.taken == 0
    acceptor._loop = asyncio.get_running_loop()
    await acceptor.stop()


# File descriptors


def open_sockets(pid):
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of another process can be set")
def test_without_file_descriptors_the_process_waits_and_serves_again(tmp_path):
    with Served(tmp_path, GATEWAY_LIMITS_MAX_CONNECTIONS="0") as served:
        served.chat("before")
        pid = served.process.pid
        room = 4
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_sockets(pid) + room, 20_000))
        host, port = served.base_url.removeprefix("http://").removesuffix("/v1").split(":")
        callers = [socket.create_connection((host, int(port))) for _ in range(30)]
        told = served.hear("file descriptors")
        assert "refused" in told
        answers = [answer for caller in callers if (answer := heard(caller))]
        assert answers
        assert all(answer.startswith(b"HTTP/1.1 503") and b"overloaded" in answer for answer in answers)
        for caller in callers:
            caller.close()
        assert answered(served, "before").startswith("gateway; hit")
        assert served.end() == 0
        assert "Traceback" not in served.said


def answered(served, content):
    """The ``Cache-Status``, once there is room again: that connections are gone takes the server a moment to hear."""
    for _ in range(200):
        try:
            return served.chat(content)[0]
        except HTTPError as refusal:
            refusal.close()
            if refusal.code != 503:
                raise
            time.sleep(0.05)
    raise AssertionError("it refuses everybody")


def heard(caller):
    caller.settimeout(0.05)
    with suppress(OSError):
        return caller.recv(1000)
    return b""


class NoDescriptors:
    """A socket on which no connection can be accepted."""

    def __init__(self):
        self.tries = 0

    def accept(self):
        self.tries += 1
        raise OSError(errno.EMFILE, "Too many open files")


async def test_where_nothing_can_be_accepted_it_is_not_tried_all_the_time(monkeypatch):
    limits = Limits(LimitsConfig())
    acceptor = door.Acceptor(NoDescriptors(), door.Door(asyncio.Protocol, limits), limits, shared=False)
    paused = []
    monkeypatch.setattr(acceptor, "_pause", paused.append)
    acceptor._ready()
    assert acceptor._socket.tries <= 2  # with the descriptor that was kept for this, and without
    monkeypatch.setattr(acceptor, "_hold_reserve", lambda: False)
    acceptor._reserve.close()
    acceptor._reserve = None
    acceptor._ready()
    assert acceptor._socket.tries <= 3
    assert paused == [door._ACCEPT_AGAIN_S] * 2


@pytest.mark.slow
def test_calls_that_are_given_up_while_they_connect_close_no_connection_of_anybody_else():
    """uvloop did before 0.23: a caller's kept connection, or one that was just accepted, broke without a word."""
    uvloop = pytest.importorskip("uvloop")
    others: list[tuple[socket.socket, os.stat_result]] = []

    def open_another() -> None:
        others.append((opened := socket.socket(), os.fstat(opened.fileno())))

    def count_lost() -> int:
        """How many of their descriptors are not theirs any more."""
        lost = 0
        while others:
            opened, status = others.pop()
            try:
                lost += not os.path.samestat(os.fstat(opened.fileno()), status)
                opened.close()
            except OSError:
                lost += 1
        return lost

    async def give_up_many() -> int:
        lost = 0
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
            for number in range(1000):
                call = asyncio.ensure_future(session.get(url))
                for _ in range(number % 8):
                    await asyncio.sleep(0)
                call.cancel()
                open_another()
                await asyncio.gather(call, return_exceptions=True)
                for _ in range(4):
                    open_another()
                    await asyncio.sleep(0)
                if number % 5 == 0:
                    lost += count_lost()
            await asyncio.sleep(0.05)
            return lost + count_lost()

    assert uvloop.run(give_up_many()) == 0


@pytest.mark.parametrize(("connections", "warned"), [(8192, True), (100, False)])
def test_the_soft_limit_of_descriptors_is_raised_and_what_does_not_fit_is_warned_of(connections, warned):
    program = f"""
import resource, logging
from gateway.config import LimitsConfig
from gateway.descriptors import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))
logging.basicConfig()
print(raise_descriptor_limit(LimitsConfig(max_connections={connections})), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRON, check=True)
    assert run.stdout.split() == ["300", "300"]
    assert ("limits.max_connections" in run.stderr) == warned

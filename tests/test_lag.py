"""Newcomers are refused while the event loop is late: how late, a script says; that it is measured, virtual time shows."""

import asyncio
import json
import socket
from contextlib import asynccontextmanager
from itertools import repeat

import pytest
from fakes import FakeClock
from running import next_block
from scripted import chunk, say_hello
from virtual import VirtualLoop

from gateway.config import LimitsConfig
from gateway.http import door
from gateway.limits import Limits, Shedder
from gateway.probe import Probe
from gateway.sockets import bind

WITHIN_S = 10.0
MAX_LAG_S = 0.005
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


class Script:
    """Says how late the loop of a gateway is, in the place of its probe."""

    def __init__(self, gateway):
        gateway.adjustable.probe.close()
        self.shedder = gateway.limits.lag
        self.now_s = 0.0

    def late(self, times=3, lag_s=1.0):
        for _ in range(times):
            self.now_s += lag_s
            self.shedder.add(lag_s, self.now_s)

    def in_time(self):
        self.late(10_000, 0.001)


@pytest.fixture
async def start(start_gateway, upstream):
    async def start(**sections):
        gateway = await start_gateway(**{"limits": {"max_lag_s": MAX_LAG_S}, **sections})
        return gateway, Script(gateway)

    upstream.script = say_hello
    return start


@asynccontextmanager
async def connected(gateway):
    host, port = gateway.origin.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def raw(path="/v1/chat/completions", body=CHAT, method="POST"):
    content = json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n"
    return head.encode() + (b"Content-Length: %d\r\n\r\n%b" % (len(content), content) if method == "POST" else b"\r\n")


async def read(reader):
    """The status, the fields, and the body."""
    async with asyncio.timeout(WITHIN_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        first, *lines = head.strip().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines)
        return int(first.split()[1]), fields, await reader.readexactly(int(fields["content-length"]))


async def asked(gateway, sent):
    """The answer to who has a connection, and then asks at once."""
    async with connected(gateway) as (reader, writer):
        writer.write(sent)
        return await read(reader)


def is_refusal(status, fields, body):
    assert status == 503, body
    assert json.loads(body)["error"]["code"] == "overloaded"
    assert 1 <= int(fields["retry-after"]) <= 3
    return True


def refused(gateway):
    return gateway.limits.snapshot()["lag"]["refused"]


async def until(condition):
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def comes_with_its_request(gateway, sent):
    """Both wait for the gateway when it looks: as it is where the loop is late."""
    host, port = gateway.origin.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)))
    sock.sendall(sent)
    sock.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        yield reader
    finally:
        writer.transport.abort()


# Who is refused


async def test_whoever_comes_while_the_loop_is_late_is_refused_and_nothing_is_made_for_it(start, upstream):
    gateway, script = await start()
    script.late()
    async with comes_with_its_request(gateway, raw()) as reader:
        status, fields, body = await read(reader)
        assert is_refusal(status, fields, body)
        assert fields["connection"] == "close"
        assert gateway.limits.snapshot()["connections"]["now"] == 0
        async with asyncio.timeout(WITHIN_S):
            assert await reader.read() == b""
    assert refused(gateway) == 1
    assert not upstream.asked


async def test_whoever_asks_later_than_it_comes_is_refused_too(start, upstream):
    gateway, script = await start()
    script.late()
    for sent in ([raw()], [raw()[:9], raw()[9:]], [raw()[:60], raw()[60:]]):
        async with connected(gateway) as (reader, writer):
            await until(lambda: gateway.limits.snapshot()["connections"]["now"])
            for part in sent:
                writer.write(part)
            assert is_refusal(*await read(reader))
        await until(lambda: not gateway.limits.snapshot()["connections"]["now"])
    assert refused(gateway) == 3
    assert not upstream.asked


async def test_a_part_of_a_request_line_is_waited_for(start):
    gateway, script = await start()
    script.late()
    async with comes_with_its_request(gateway, b"GET /v1/mod") as reader:
        await until(lambda: gateway.limits.snapshot()["connections"]["now"])
        writer = reader._transport
        writer.write(b"els HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await read(reader))[0] == 200


async def test_whoever_keeps_its_connection_is_refused_before_its_body_is_read_and_may_ask_again_there(start, upstream):
    gateway, script = await start()
    async with connected(gateway) as (reader, writer):
        writer.write(raw("/v1/models", method="GET"))
        assert (await read(reader))[0] == 200
        script.late()
        head, blank, body = raw().partition(b"\r\n\r\n")
        writer.write(head + blank)
        status, fields, told = await read(reader)
        assert is_refusal(status, fields, told)
        assert "connection" not in fields
        script.in_time()
        writer.write(body + raw())
        assert (await read(reader))[0] == 200
    assert [asked.method for asked in upstream.asked] == ["GET", "POST"]


async def test_hits_are_refused_with_all_others(start):
    gateway, script = await start()
    await gateway.chat("stored")
    await gateway.landed()
    script.late()
    assert (await gateway.chat("stored")).status == 503
    script.in_time()
    assert "hit" in (await gateway.chat("stored")).cache_status


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
async def test_all_that_takes_a_place_is_refused(start, path):
    gateway, script = await start()
    script.late()
    assert is_refusal(*await asked(gateway, raw(path)))


async def test_everybody_is_let_in_while_it_is_in_time_and_when_it_is_again(start):
    gateway, script = await start()
    script.late(1000, MAX_LAG_S)
    assert (await asked(gateway, raw()))[0] == 200
    script.late()
    assert (await asked(gateway, raw()))[0] == 503
    script.in_time()
    assert (await asked(gateway, raw()))[0] == 200
    assert refused(gateway) == 1


async def test_an_answer_reaches_who_still_sends(start, monkeypatch):
    monkeypatch.setattr(door, "_GOING_WITHIN_S", 1000.0)
    gateway, script = await start()
    script.late()
    length = 8_000_000
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()
    async with connected(gateway) as (reader, writer):
        writer.write(head)
        writer.write(b" " * length)
        assert is_refusal(*await read(reader))
        async with asyncio.timeout(WITHIN_S):
            await writer.drain()


async def test_a_reset_while_it_is_refused_harms_nobody(start):
    gateway, script = await start()
    script.late()
    for _ in range(20):
        async with comes_with_its_request(gateway, raw()):
            pass
    assert is_refusal(*await asked(gateway, raw()))


async def test_the_share_is_drawn_once_for_each(start):
    gateway, _ = await start()
    lag = gateway.limits.lag
    lag._shedding.share = 0.5
    drawn = [0.6, 0.4]
    lag._draw = lambda: drawn.pop(0) if drawn else 0.0
    async with comes_with_its_request(gateway, raw()) as reader:
        assert (await read(reader))[0] == 200
        assert len(drawn) == 1, "for this one nothing is drawn after the door"
        drawn.insert(0, 0.6)
        reader._transport.write(raw())
        assert (await read(reader))[0] == 200
        assert len(drawn) == 1
        reader._transport.write(raw())
        assert (await read(reader))[0] == 503


# Who is not


@pytest.mark.parametrize(
    "path",
    ["/healthz", "/health", "/readyz", "/v1/models", "/openapi.json", "/", "/metrics", "/admin/stats"],
)
async def test_who_watches_and_what_costs_little_is_served(start, path):
    gateway, script = await start(metrics={"public": True})
    script.late(1000)
    status, _, _ = await asked(gateway, raw(path, method="GET"))
    assert status == (404 if path.startswith("/admin") else 200)
    assert refused(gateway) == 0


async def test_running_streams_go_on_and_can_be_cancelled_and_resumed(start, upstream):
    async def waits(asked):
        await asked.head()
        await asked.event(chunk({"role": "assistant", "content": "Hello"}))
        await asked.gate("rest")
        await asked.event(chunk({"content": " world"}))
        await asked.event(chunk({}, "stop"))
        await asked.done()

    upstream.script = waits
    gateway, script = await start()
    async with gateway.opened(stream=True) as response:
        stream = response.headers["Gateway-Stream-Id"]
        await next_block(response)
        script.late()
        assert (await gateway.chat("another")).status == 503
        assert (await asked(gateway, raw(f"/v1/streams/{stream}/status", method="GET")))[0] == 200
        upstream.gate("rest").released.set()
        whole = await response.text()
        assert whole.endswith("data: [DONE]\n\n")
        async with gateway.session.get(f"{gateway.base_url}/streams/{stream}?after=1") as resumed:
            assert resumed.status == 200
            assert whole.endswith(await resumed.text())
        assert (await asked(gateway, raw(f"/v1/streams/{stream}/cancel")))[0] in (200, 404)


async def test_who_resumes_is_refused_where_it_did_not_help_to_refuse_all_others(start):
    gateway, script = await start()
    script.late(1000)
    assert gateway.limits.lag._shedding.share_of_resumed == 1
    assert is_refusal(*await asked(gateway, raw("/v1/streams/s", method="GET")))
    async with connected(gateway) as (reader, writer):
        writer.write(raw("/v1/models", method="GET"))
        assert (await read(reader))[0] == 200
        writer.write(raw("/v1/streams/s", method="GET"))
        assert is_refusal(*await read(reader))


@pytest.mark.parametrize(
    ("head", "wanted"),
    [
        (b"POST /v1/chat/completions HTTP/1.1\r\n", "answer"),
        (b"QUERY /v1/chat/completions?x=/ HTTP/1.1\n", "answer"),
        (b"GET /v1/anything HTTP/1.1\r\n", "answer"),
        (b"GET /v1/streams/s HTTP/1.1\r\n", "stream"),
        (b"GET /v1/streams/s?after=/3 HTTP/1.1\r\n", "stream"),
        (b"GET /v1/streams/s/status HTTP/1.1\r\n", ""),
        (b"POST /v1/streams/s/cancel HTTP/1.1\r\n", ""),
        (b"POST /v1/streams/s HTTP/1.1\r\n", ""),
        (b"GET /v1/models HTTP/1.1\r\n", ""),
        (b"GET /v1/models/m HTTP/1.1\r\n", ""),
        (b"GET /healthz HTTP/1.1\r\n", ""),
        (b"GET http://x/v1/chat/completions HTTP/1.1\r\n", ""),
        (b"POST /v1/chat/completions HTTP/1.1", ""),
        (b"POST\n", ""),
        (b"\r\n", ""),
        (b"\x16\x03\x01\x02", ""),
        (b"", ""),
    ],
)
def test_what_a_request_asks_for_is_in_its_first_line(head, wanted):
    assert door.wants(head) == wanted


# Those who were told


async def test_no_more_are_kept_than_there_is_room_for_and_none_for_long(monkeypatch):
    monkeypatch.setattr(door, "_MAX_LEAVING", 2)
    monkeypatch.setattr(door, "_GOING_WITHIN_S", 1000.0)
    leaving = door.Leaving()
    pairs = [socket.socketpair() for _ in range(4)]
    for ours, _ in pairs:
        ours.setblocking(False)
        leaving.add(ours)
    assert [ours.fileno() < 0 for ours, _ in pairs] == [True, True, False, False]
    pairs[2][1].close()
    await until(lambda: pairs[2][0].fileno() < 0)
    assert pairs[3][0].fileno() >= 0
    leaving._until_s[pairs[3][0]] = 0.0
    await until(lambda: pairs[3][0].fileno() < 0 and leaving._timer is None)
    leaving.add(pairs[3][1])
    leaving.close()
    assert pairs[3][1].fileno() < 0
    for _, theirs in pairs:
        theirs.close()


# What waits for the process


async def test_newcomers_who_are_left_waiting_are_lag_until_nobody_is(monkeypatch):
    limits = Limits(LimitsConfig(max_lag_s=MAX_LAG_S), clock := FakeClock().monotonic)
    (sock,) = bind("127.0.0.1", 0)
    acceptor = door.Acceptor(sock, None, limits, shared=False)
    served = []
    monkeypatch.setattr(acceptor, "_serve", lambda connection: served.append(connection) or True)
    callers = [socket.create_connection(sock.getsockname()) for _ in range(door._LET_IN_A_TURN + 1)]
    acceptor._take_some()
    assert len(served) == door._LET_IN_A_TURN
    for _ in range(3):
        limits.lag.add(0.0, clock() + 2 * MAX_LAG_S)
    assert limits.lag.is_shedding
    acceptor._take_some()
    assert len(served) == len(callers)
    for _ in range(3):
        limits.lag.add(0.0, clock() + 2 * MAX_LAG_S)
    assert limits.lag.snapshot()["now"] == 0
    for each in (*callers, *served):
        each.close()
    acceptor._loop = SilentLoop()
    await acceptor.stop()


class SilentLoop:
    def remove_reader(self, _):
        pass


async def test_refusals_do_not_count_as_those_who_may_be_let_in_in_one_turn(monkeypatch):
    limits = Limits(LimitsConfig(max_lag_s=MAX_LAG_S))
    for _ in range(3):
        limits.lag.add(1.0, 1.0)
    (sock,) = bind("127.0.0.1", 0)
    acceptor = door.Acceptor(sock, None, limits, shared=False)
    served = []
    monkeypatch.setattr(acceptor, "_serve", lambda connection: bool(served.append(connection)))
    callers = [socket.create_connection(sock.getsockname()) for _ in range(20)]
    acceptor._take_some()
    assert len(served) == 20
    for each in (*callers, *served):
        each.close()
    acceptor._loop = SilentLoop()
    await acceptor.stop()


# How late the loop is


def measured(seconds, work_s, max_lag_s=MAX_LAG_S, change=lambda *_: None):
    """What is measured in a loop each of whose turns takes ``work_s``; None: that sleeps."""

    class Told(Shedder):
        def add(self, lag_s, now_s):
            lags.append(lag_s)

    async def main():
        loop = asyncio.get_running_loop()
        shedder = Told(loop.time, lambda: 0.0)
        shedder.become(max_lag_s)
        probe = Probe(shedder, loop.time)
        probe.open()
        end_s = loop.time() + seconds
        while loop.time() < end_s:
            if work_s is None:
                await asyncio.sleep(0.001)
                continue
            loop._now_s += work_s
            await asyncio.sleep(0)
        change(shedder, probe)
        probe.close()
        probe.close()

    lags = []
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
    return lags


def test_a_loop_that_sleeps_is_in_time():
    lags = measured(1.0, None)
    assert len(lags) > 100
    assert max(lags) < 0.0001


@pytest.mark.parametrize("work_s", [0.002, 0.02, 0.3])
def test_a_loop_is_as_late_as_some_turns_of_it_take(work_s):
    lags = measured(work_s * 50, work_s)
    assert len(lags) > 5
    assert all(work_s <= lag_s <= 4 * work_s for lag_s in lags)  # asyncio's loop takes a turn more than uvloop


def test_nothing_is_measured_without_a_limit_and_it_is_as_soon_as_there_is_one():
    assert not measured(1.0, None, 0.0)

    def become(shedder, probe):
        assert probe._handle is None
        shedder.become(MAX_LAG_S)
        probe.adjust()
        handle = probe._handle
        probe.adjust()
        assert probe._handle is handle
        assert handle

    measured(0.1, None, 0.0, become)


async def test_a_new_limit_holds_at_once_and_none_lets_all_in(start_gateway):
    gateway = await start_gateway()
    probe, lag = gateway.adjustable.probe, gateway.limits.lag
    assert probe._handle is None
    gateway.limits.become(LimitsConfig(max_lag_s=1e-9))
    probe.adjust()
    await until(lambda: lag.is_shedding)  # no loop is that punctual
    gateway.limits.become(LimitsConfig(max_lag_s=0.0))
    assert (await asked(gateway, raw()))[0] == 200
    await until(lambda: probe._handle is None)
    assert not lag.is_shedding


# What is told of it


async def test_refusals_are_counted_and_told_once_in_a_while(start, caplog):
    gateway, script = await start()
    script.late()
    for _ in repeat(None, 3):
        assert (await asked(gateway, raw()))[0] == 503
    told = [record.message for record in caplog.records if "max_lag_s" in record.message]
    assert told == ["limits.max_lag_s is reached: 1 refused"]
    found = gateway.limits.snapshot()["lag"]
    assert (found["refused"], found["limit"], found["refused_share"], found["now"]) == (3, MAX_LAG_S, 1.0, 1.0)

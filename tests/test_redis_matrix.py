"""Every fault of Redis in every phase of a request, through a gateway: what callers, operators and the log must see.

TLS, sentinels and clusters have files of their own.
"""

import asyncio
import json
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from redis.asyncio import Redis
from running import Gateway, RedisServer, next_block
from scripted import Asked, ScriptedUpstream, chunk
from stores import Proxy, until

from gateway.flight import Flight
from gateway.store import scripts

pytestmark = pytest.mark.usefixtures("nothing_goes_wrong_unnoticed")

# Each command of a request that waited for a Redis that takes 5 s would pass it.
WITHIN_S = 4.0
BACK_WITHIN_S = 2.0 + 2.0  # what is promised, and as much for a machine that is busy
SETTINGS = {"lookup_timeout_s": 0.1, "command_timeout_s": 0.5, "connect_timeout_s": 0.5, "cooldown_s": 0.2}
AWAY = "Redis does not serve"
REFUSES = "Redis refuses to store"
CORRUPT = "do not load"
UNAVAILABLE = "detail=store-unavailable"
TEXT = "Hello world"


@dataclass
class Rig:
    """A Redis to ill-treat, and what stands before it."""

    server: RedisServer
    proxy: Proxy

    async def tell(self, *command: Any, password: str | None = None) -> Any:
        async with Redis.from_url(self.server.url, password=password) as redis:
            return await redis.execute_command(*command)

    async def names(self) -> list[bytes]:
        """Of what is about some cache key."""
        async with Redis.from_url(self.server.url) as redis:
            return [name async for name in redis.scan_iter(match="*:{*}:*")]


async def kill(rig: Rig) -> None:
    rig.server.stop()


async def start(rig: Rig) -> None:
    rig.server.start()


async def freeze(rig: Rig) -> None:
    rig.server.signal(signal.SIGSTOP)


async def thaw(rig: Rig) -> None:
    rig.server.signal(signal.SIGCONT)


def late(delay_s: float) -> Callable[[Rig], Awaitable[None]]:
    async def take_time(rig: Rig) -> None:
        rig.proxy.delay_s = delay_s

    return take_time


async def restart(rig: Rig) -> None:
    rig.server.stop()
    rig.server.start()


async def read_only(rig: Rig) -> None:
    await rig.tell("REPLICAOF", "127.0.0.1", 1)


async def writable(rig: Rig) -> None:
    await rig.tell("REPLICAOF", "NO", "ONE")


async def full(rig: Rig) -> None:
    await rig.tell("CONFIG", "SET", "maxmemory", 1)


async def roomy(rig: Rig) -> None:
    await rig.tell("CONFIG", "SET", "maxmemory", 0)


async def lock(rig: Rig) -> None:
    """Whoever is connected stays so: they are thrown out."""
    await rig.tell("CONFIG", "SET", "requirepass", "another")
    await rig.tell("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no", password="another")


async def unlock(rig: Rig) -> None:
    await rig.tell("CONFIG", "SET", "requirepass", "", password="another")


async def replace_by_others(rig: Rig) -> None:
    """Whatever is ours is of another type by now."""
    for name in await rig.names():
        kind = await rig.tell("TYPE", name)
        await rig.tell("DEL", name)
        await (rig.tell("SADD", name, "x") if kind in {b"string", b"stream", b"hash"} else rig.tell("SET", name, "x"))


async def garble(rig: Rig) -> None:
    for name in await rig.names():
        if await rig.tell("TYPE", name) == b"hash" and b":rec" in name:
            await rig.tell("HSET", name, "meta", b"\x00garbage", "marks", b"x")


async def nothing(rig: Rig) -> None:
    """It mends itself."""


@dataclass(frozen=True)
class Fault:
    """How it is caused and mended; what ``Cache-Status`` and the log say of it."""

    name: str
    cause: Callable[[Rig], Awaitable[None]]
    mend: Callable[[Rig], Awaitable[None]]
    told: str = ""
    """In the one line of the log."""
    seen: str = UNAVAILABLE
    """Of a lookup in ``Cache-Status``."""
    away: bool = True
    """Whether Redis counts as away before long."""
    of_entries: bool = False
    """Whether it hurts what is stored, and not the server: at the start there is nothing to hurt."""


FAULTS = [
    Fault("refused", kill, start, AWAY),
    Fault("silent", freeze, thaw, AWAY),
    Fault("late by 200 ms", late(0.2), late(0), AWAY),
    Fault("late by 5 s", late(5), late(0), AWAY),
    Fault("restarted empty", restart, nothing, "", "fwd=miss", away=False),
    Fault("read-only", read_only, writable, REFUSES, "fwd=miss", away=False),
    Fault("out of memory", full, roomy, REFUSES, "fwd=miss", away=False),
    Fault("wrong password", lock, unlock, AWAY),
    Fault("wrong type", replace_by_others, nothing, CORRUPT, "detail=store-corrupt", away=False, of_entries=True),
    Fault("corrupt entry", garble, nothing, CORRUPT, "detail=store-corrupt", away=False, of_entries=True),
]
each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
each_fault_of_a_server = pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if not fault.of_entries], ids=lambda fault: fault.name
)


@pytest.fixture
async def rig(own_redis: RedisServer, proxy: Proxy) -> AsyncIterator[Rig]:
    yield Rig(own_redis, proxy)
    proxy.delay_s = 0
    with suppress(AssertionError, ProcessLookupError):
        own_redis.signal(signal.SIGCONT)


@pytest.fixture(autouse=True)
def _quick_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come from Redis at once, not from the flight that has just ended."""
    monkeypatch.setattr("gateway.flights._LINGER_S", 0.0)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def is_told_once(fault: Fault, caplog: pytest.LogCaptureFixture) -> bool:
    """One line in the interval, and one when it is over."""
    said = [text for text in warnings(caplog) if text != "Redis is back"]
    assert not [text for text in said if fault.told not in text or not fault.told]
    assert len(said) <= 1
    return bool(said) or not fault.told


async def shown(gateway: Gateway) -> str:
    """What those who watch over the gateway are shown of its store."""
    async with gateway.session.get(f"{gateway.origin}/healthz") as response:
        return (await response.json())["store"]


async def is_served(gateway: Gateway, content: str, *, stream: bool) -> str:
    """Asks, has the whole answer within the time, and tells what ``Cache-Status`` said."""
    async with asyncio.timeout(WITHIN_S):
        answer = await gateway.chat(content, stream=stream)
    assert answer.status == 200
    assert text_of(answer.body.decode(), stream=stream) == TEXT
    return answer.cache_status


def text_of(body: str, *, stream: bool) -> str:
    if not stream:
        return json.loads(body)["choices"][0]["message"]["content"]
    *events, last = [block.removeprefix("data: ") for block in body.strip().split("\n\n")]
    assert last == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    return "".join(delta.get("content", "") for delta in deltas)


async def are_served(gateway: Gateway, content: str) -> list[str]:
    """Both kinds of callers, each with a question of its own."""
    return [await is_served(gateway, f"{content}, stream: {stream}", stream=stream) for stream in (True, False)]


async def hits(gateway: Gateway, content: str) -> bool:
    """Whether it hits again before long, with nothing done."""
    async with asyncio.timeout(BACK_WITHIN_S):
        for stream in (True, False):
            while "; hit" not in await is_served(gateway, content, stream=stream):
                await gateway.landed()
    return True


async def recovers(gateway: Gateway, rig: Rig, fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
    await fault.mend(rig)
    await hits(gateway, "asked after it")
    assert gateway.store.available
    assert await shown(gateway) == "ok"
    if fault.away:
        # Who asked long enough for it to count as away is told of both; a short fault may pass unnoticed.
        assert warnings(caplog).count("Redis is back") == len([text for text in warnings(caplog) if AWAY in text])
    is_told_once(fault, caplog)


def settings(rig: Rig, fault: Fault | None = None, **more: Any) -> dict[str, Any]:
    """Where Redis answers, with whatever fault, the gateway waits for it, also on a machine that stalls."""
    patience = {} if fault is None or fault.away else {"lookup_timeout_s": 2, "command_timeout_s": 5, "connect_timeout_s": 5}
    return {"redis": {"url": rig.proxy.url, **SETTINGS, **patience}, **more}


@each_fault_of_a_server
async def test_at_the_start(start_gateway, rig, fault, caplog):
    await fault.cause(rig)
    gateway = await start_gateway(**settings(rig, fault))
    assert await shown(gateway) == ("unavailable" if fault.away else "ok")
    for told in await are_served(gateway, "asked during it"):
        assert fault.seen in told
    await gateway.landed()
    assert is_told_once(fault, caplog)
    await recovers(gateway, rig, fault, caplog)


@pytest.mark.slow
@each_fault
async def test_before_the_lookup(start_gateway, rig, fault, caplog):
    gateway = await start_gateway(**settings(rig, fault))
    for stream in (True, False):
        await hits(gateway, f"asked before, stream: {stream}")
    await fault.cause(rig)
    for number in range(3):
        if number == 0 and fault.told != REFUSES:  # which has all that it had
            for told in await are_served(gateway, "asked before"):
                assert fault.seen in told
        for told in await are_served(gateway, f"asked during it {number}"):
            assert UNAVAILABLE in told if fault.away else "fwd=miss" in told
        await gateway.landed()
    assert is_told_once(fault, caplog)
    assert await shown(gateway) == ("unavailable" if fault.away else "ok")
    await recovers(gateway, rig, fault, caplog)


@each_fault
async def test_in_the_middle_of_an_answer(start_gateway, rig, fault, caplog, upstream: ScriptedUpstream):
    async def talk(asked: Asked) -> None:
        await asked.head()
        await asked.event(chunk({"role": "assistant", "content": "Hello"}))
        await asked.gate("middle")
        await asked.event(chunk({"content": " world"}, "stop"))
        await asked.done()

    gateway = await start_gateway(**settings(rig, fault))
    hello, upstream.script = upstream.script, talk
    asking = [asyncio.create_task(is_served(gateway, f"stream: {stream}", stream=stream)) for stream in (True, False)]
    await upstream.gate("middle").reached.wait()
    await until(lambda: len(upstream.asked) == 2)
    await until(lambda: rig.proxy.asked.count(b":log:") >= 2)
    await fault.cause(rig)
    upstream.gate("middle").released.set()
    for told in await asyncio.gather(*asking):
        assert "fwd=miss" in told
    await gateway.landed()
    upstream.script = hello
    await recovers(gateway, rig, fault, caplog)
    await hits(gateway, "stream: True")


STORES = scripts.STORE.digest.encode()


@pytest.mark.slow
@each_fault
async def test_while_it_is_stored(start_gateway, rig, fault, caplog):
    gateway = await start_gateway(**settings(rig, fault))
    caused = asyncio.Event()

    async def cause(data: bytes) -> None:
        if STORES in data and not caused.is_set():
            caused.set()
            await fault.cause(rig)

    rig.proxy.on_asked = cause
    for told in await are_served(gateway, "asked"):
        assert "fwd=miss" in told
    await gateway.landed()
    assert caused.is_set()
    rig.proxy.on_asked = None
    await recovers(gateway, rig, fault, caplog)
    for stream in (True, False):
        await hits(gateway, f"asked, stream: {stream}")


@pytest.mark.slow
@each_fault
async def test_in_the_middle_of_a_replay(start_gateway, rig, fault, caplog):
    gateway = await start_gateway(**settings(rig, fault, replay={"pace": "fixed", "tokens_per_s": 20.0}))
    await hits(gateway, "asked")
    async with asyncio.timeout(WITHIN_S), gateway.opened("asked", stream=True) as response:
        assert "; hit" in response.headers["Cache-Status"]
        first = await next_block(response)
        await fault.cause(rig)
        rest = (await response.read()).decode()
    assert text_of(f"{first}\n\n{rest}", stream=True) == TEXT
    await recovers(gateway, rig, fault, caplog)


async def test_the_default_notices_within_two_seconds_that_it_is_back(start_gateway, rig, caplog):
    gateway = await start_gateway(redis={"url": rig.proxy.url, "lookup_timeout_s": 0.05})
    await kill(rig)
    while gateway.store.available:
        await are_served(gateway, "asked during it")
    await start(rig)
    await hits(gateway, "asked after it")


async def test_no_token_is_held_up_by_a_redis_that_takes_seconds(start_gateway, rig, upstream: ScriptedUpstream):
    """Nor by any of what flights share: the claim, the appends of their logs, and the bell."""

    async def talk(asked: Asked) -> None:
        await asked.head()
        for number in range(6):
            await asked.event(chunk({"content": str(number)}))
            await asked.gate(f"after {number}")
        await asked.event(chunk({}, "stop"))
        await asked.done()

    upstream.script = talk
    gateway = await start_gateway(**settings(rig))
    rig.proxy.delay_s = 5
    async with gateway.opened("asked", stream=True) as response, gateway.opened("asked", stream=True) as follower:
        for number in range(6):
            for each in (response, follower):
                async with asyncio.timeout(WITHIN_S):
                    block = await next_block(each)
                assert f'"content":"{number}"' in block.replace(": ", ":")
            upstream.gate(f"after {number}").released.set()
        assert (await response.read()).endswith(b"[DONE]\n\n")
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_who_has_waited_for_a_lookup_does_not_wait_for_redis_again(start_gateway, rig, monkeypatch, stream):
    """Not for a claim, and not for the news that the answer is stored."""
    waits, is_kept = [], Flight.is_kept

    async def noted(self: Flight, within_s: float) -> bool | None:
        waits.append(within_s)
        return await is_kept(self, within_s)

    monkeypatch.setattr(Flight, "is_kept", noted)
    only_lookups_fail = {**SETTINGS, "command_timeout_s": 60, "connect_timeout_s": 60}
    gateway = await start_gateway(redis={"url": rig.proxy.url, **only_lookups_fail})
    rig.proxy.delay_s = 60
    assert UNAVAILABLE in await is_served(gateway, "asked", stream=stream)
    assert gateway.store.available
    assert scripts.CLAIM.digest.encode() not in rig.proxy.asked
    assert waits == ([] if stream else [0.0])


async def test_a_redis_that_is_away_is_asked_nothing_by_requests(start_gateway, rig):
    """So none can wait for it: only the watch looks, once in a while."""
    gateway = await start_gateway(redis={"url": rig.proxy.url, **SETTINGS, "cooldown_s": 60.0})
    rig.proxy.delay_s = 0.2
    while gateway.store.available:
        await are_served(gateway, "asked until it counts as away")
    await gateway.landed()
    paces = gateway.store._server._paces.values()
    await until(lambda: not any(lookups._running for lookups in paces))
    before = rig.proxy.asked
    for number in range(20):
        await are_served(gateway, f"asked {number}")
    await gateway.landed()
    asked = rig.proxy.asked[len(before) :]
    assert b"HMGET" not in asked
    assert scripts.CLAIM.digest.encode() not in asked

"""How a process ends: what it is asked for meanwhile, what becomes of what it serves, and its exit code."""

import asyncio
import fcntl
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from redis import Redis
from running import RedisServer, next_block
from scripted import ScriptedUpstream, chunk, two_parts
from served import Served, asking
from stores import until

pytestmark = pytest.mark.usefixtures("no_task_is_left")
PATIENCE_S = 15.0
# Nobody waits that long: what ends does so for another reason.
LONG_S = "50"


Start = Callable[..., Served]


@pytest.fixture
def start(shared_redis: RedisServer, upstream: ScriptedUpstream, tmp_path: Path) -> Iterator[Start]:
    """Starts a gateway: ``server_shutdown_grace_s="1"`` is ``[server] shutdown_grace_s``."""
    with ExitStack() as stack:

        def start(*arguments: str, wait: bool = True, **settings: str) -> Served:
            values = {"redis_prefix": f"t{tmp_path.name}", "log_access": "false", "log_level": "warning", **settings}
            environ = asking(upstream, shared_redis, **values)
            return stack.enter_context(Served(tmp_path, *arguments, wait=wait, **environ))

        yield start


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session:
        yield session


def asks(session: aiohttp.ClientSession, served: Served, content: str = "hi", **members: Any) -> Any:
    body = {"model": "model-1", "messages": [{"role": "user", "content": content}], **members}
    return session.post(f"{served.base_url}/chat/completions", json=body)


async def readiness(session: aiohttp.ClientSession, served: Served) -> tuple[int, str, str | None]:
    """The status, the word for it, and what is said of the connection."""
    async with session.get(f"{served.base_url.removesuffix('/v1')}/readyz") as response:
        return response.status, (await response.json())["status"], response.headers.get("Connection")


async def until_it_drains(session: aiohttp.ClientSession, served: Served) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (told := await readiness(session, served)) == (200, "ready", None):
            pass
    assert told == (503, "draining", "close")


async def ends(served: Served) -> str:
    """What was said until it had ended by itself, without a fault."""
    assert served.process.stderr
    async with asyncio.timeout(PATIENCE_S):
        served.said += await asyncio.to_thread(served.process.stderr.read)
    assert served.process.wait(PATIENCE_S) == 0
    assert "Traceback" not in served.said
    return served.said


async def test_who_is_told_to_end_is_not_ready_at_once_and_finishes_what_was_begun(start, session, upstream):
    served = start(server_shutdown_grace_s=LONG_S)
    upstream.script = two_parts
    async with asks(session, served, stream=True) as response:
        await next_block(response)
        assert await readiness(session, served) == (200, "ready", None)
        served.process.send_signal(signal.SIGTERM)
        await until_it_drains(session, served)  # on the connection that is open
        async with aiohttp.ClientSession() as newcomer:
            with pytest.raises(aiohttp.ClientConnectorError):
                await readiness(newcomer, served)
        upstream.gate("second part").released.set()
        assert (await response.text()).endswith("data: [DONE]\n\n")
    await ends(served)


async def test_for_a_while_newcomers_are_served_but_told_to_go_elsewhere_next_time(start, session, upstream):
    served = start(server_shutdown_delay_s=LONG_S, server_shutdown_grace_s=LONG_S)
    served.process.send_signal(signal.SIGTERM)
    await until_it_drains(session, served)
    for stream in (False, True):
        async with asks(session, served, stream=stream) as response:  # a new connection each
            assert response.status == 200
            assert response.headers["Connection"] == "close"
            assert "world" in await response.text()
    assert served.process.poll() is None
    served.process.send_signal(signal.SIGTERM)
    await ends(served)


@pytest.mark.slow
async def test_who_asks_twice_does_not_wait_for_the_grace(start, session, upstream):
    served = start(server_shutdown_grace_s=LONG_S)
    upstream.script = two_parts
    async with asks(session, served, stream=True) as response:
        await next_block(response)
        assert await readiness(session, served) == (200, "ready", None)
        served.process.send_signal(signal.SIGINT)
        await until_it_drains(session, served)
        served.process.send_signal(signal.SIGINT)
        last = json.loads((await response.text()).removeprefix("data: "))
    assert last["error"]["code"] == "shutting_down"
    assert "resume" in last["error"]["message"]
    await ends(served)


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
async def test_who_is_told_to_end_while_it_starts_does_not_finish_that(start, shared_redis, tmp_path, workers):
    (tmp_path / "many.jsonl").write_text("".join(f"{recording_of(f'question {number}')}\n" for number in range(100_000)))
    replay = ("--workers", workers, "--mode", "replay", "--recordings", "many.jsonl")
    served = start(*replay, wait=False, server_shutdown_grace_s=LONG_S)
    with Redis.from_url(shared_redis.url) as redis:
        await until(lambda: next(redis.scan_iter(f"t{tmp_path.name}:*:rec"), None) is not None, PATIENCE_S)
    served.process.send_signal(signal.SIGTERM)
    assert "listening" not in await ends(served)


def recording_of(content: str) -> str:
    """A line of a file of recordings."""
    request = {"api": "chat", "body": {"model": "model-1", "messages": [{"role": "user", "content": content}]}}
    return json.dumps({"v": 1, "request": request, "answer": {"frames": [chunk({"content": "Hello"}, "stop")]}})


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pipes are as large as they are")
async def test_a_log_that_nobody_reads_stops_nothing(start, session):
    served = start(log_access="true")
    fcntl.fcntl(served.process.stderr, fcntl.F_SETPIPE_SZ, 4096)
    for _ in range(200):
        assert (await readiness(session, served))[0] == 200
    served.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(served.process.wait, PATIENCE_S) == 0


async def test_no_connection_that_the_system_has_taken_is_lost(start, upstream):
    served = start(server_shutdown_grace_s=LONG_S)
    served.process.send_signal(signal.SIGSTOP)
    # Each has a connection of its own, which nobody accepts for now.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        asked = [asyncio.ensure_future(readiness(session, served)) for _ in range(100)]
        connected = session.connector
        assert connected
        async with asyncio.timeout(PATIENCE_S):
            while len(connected._acquired) < len(asked) or any(
                each is None for each in map(_transport, connected._acquired)
            ):
                await asyncio.sleep(0.001)
        served.process.send_signal(signal.SIGTERM)
        served.process.send_signal(signal.SIGCONT)
        told = await asyncio.gather(*asked)
    assert {status for status, *_ in told} <= {200, 503}
    await ends(served)


def _transport(protocol: Any) -> Any:
    return getattr(protocol, "transport", None)

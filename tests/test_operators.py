"""A listener for operators: the administration and the metrics are there, and nowhere else, to the very end."""

import asyncio
import json
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import pytest
from prometheus import Samples
from running import RedisServer, next_block
from scripted import ScriptedUpstream, two_parts
from served import ENVIRON, PROGRAM, Served, asking

PATIENCE_S = 15.0
KEY = "open-sesame"
Start = Callable[..., Served]


@pytest.fixture
def start(shared_redis: RedisServer, upstream: ScriptedUpstream, tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(*arguments: str, listen: str = "127.0.0.1:0", **settings: str) -> Served:
            (tmp_path / "config.toml").write_text(f'[admin]\nlisten = "{listen}"\nkey_env = "ADMIN"\n')
            environ = asking(upstream, shared_redis, **settings)
            served = stack.enter_context(Served(tmp_path, *arguments, wait=False, ADMIN=KEY, **environ))
            served.announce()
            return served

        yield start


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A connection a request: each may be any worker's."""
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session:
        yield session


def operators_url(served: Served) -> str:
    """Where it has said that operators are served."""
    [line] = [line for line in served.said.splitlines() if line.startswith("admin: on at http")]
    return line.split()[-1].removesuffix("/admin/")


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_each_listener_serves_its_own_and_operators_are_served_to_the_end(start, session, upstream, workers):
    served = start("--workers", workers, server_shutdown_grace_s="50")
    callers, operators = served.base_url.removesuffix("/v1"), operators_url(served)
    assert f"metrics: on at {operators}/metrics\n" in served.said

    async def status(origin: str, path: str, **headers: str) -> int:
        async with session.get(origin + path, headers=headers) as response:
            await response.read()
            return response.status

    opened = {"Authorization": f"Bearer {KEY}"}
    for path in ("/admin", "/admin/", "/admin/stats", "/metrics"):
        assert await status(callers, path, **opened) == 404
        assert await status(operators, path, **opened) == 200
    assert await status(operators, "/admin/stats") == 401
    assert await status(operators, "/metrics") == 200
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert await status(callers, path) == await status(operators, path) == 200
    assert await status(callers, "/v1/models") == 200
    assert await status(operators, "/v1/models") == 404

    upstream.script = two_parts
    body = {"model": "model-1", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with session.post(f"{served.base_url}/chat/completions", json=body) as response:
        await next_block(response)
        served.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            # Workers without a stream end at once, and what one of them was about to answer is cut.
            while await readiness(session, operators) != (503, "draining", None):
                pass
            while not await is_refused(session, callers):  # the other worker may take a moment longer
                pass
            # To its very end, the other one tells of this one too.
            while (samples := await metrics(session, operators)) is None or samples("gateway_draining") != 1:
                assert samples is None or samples("gateway_streams_open") == 1
        assert samples("gateway_streams_open") == 1
        upstream.gate("second part").released.set()
        assert (await response.text()).endswith("data: [DONE]\n\n")
    assert served.process.stderr
    said = await asyncio.to_thread(served.process.stderr.read)
    assert await asyncio.to_thread(served.process.wait, PATIENCE_S) == 0
    assert "Traceback" not in said
    with pytest.raises(aiohttp.ClientConnectorError):
        await status(operators, "/readyz")


async def readiness(session: aiohttp.ClientSession, origin: str) -> tuple[int, str, str | None] | None:
    try:
        async with session.get(f"{origin}/readyz") as response:
            return response.status, (await response.json())["status"], None
    except (aiohttp.ServerDisconnectedError, ConnectionResetError):
        return None


async def metrics(session: aiohttp.ClientSession, origin: str) -> Samples | None:
    try:
        async with session.get(f"{origin}/metrics") as response:
            return Samples(await response.text())
    except (aiohttp.ServerDisconnectedError, ConnectionResetError):
        return None


async def is_refused(session: aiohttp.ClientSession, origin: str) -> bool:
    try:
        await readiness(session, origin)
    except aiohttp.ClientConnectorError:
        return True
    return False


async def test_each_listener_describes_what_it_serves(start, session):
    served = start()
    documents = []
    for origin in (served.base_url.removesuffix("/v1"), operators_url(served)):
        async with session.get(f"{origin}/openapi.json") as response:
            documents.append(await response.json())
    callers, operators = (set(document["paths"]) for document in documents)
    assert "/v1/chat/completions" in callers
    assert not {path for path in callers if path.startswith(("/admin", "/metrics"))}
    assert {"/metrics", "/healthz", "/readyz", "/openapi.json", "/admin/", "/admin/stats"} <= operators
    assert not {path for path in operators if path.startswith("/v1")}


@pytest.mark.slow
def test_commands_find_it_by_the_configuration(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start(listen=f"127.0.0.1:{port}")
    environ = {**ENVIRON, "ADMIN": KEY}
    command = [*PROGRAM, "stats", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["object"] == "cache.stats"


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_address_that_is_taken_is_named(start, workers):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AssertionError, match=f"code 1: error: .*cannot listen on {listen}"):
            start("--workers", workers, listen=listen)


@pytest.mark.slow
def test_it_does_not_move_while_the_gateway_runs(start, tmp_path):
    served = start()

    (tmp_path / "config.toml").write_text('[admin]\nlisten = "127.0.0.1:1"\nkey_env = "ADMIN"\n')
    served.process.send_signal(signal.SIGHUP)
    assert "admin.listen: cannot change while the gateway runs: restart it" in served.hear("stays as it was")


def test_a_free_port_is_nobodys_to_find(tmp_path):
    (tmp_path / "config.toml").write_text('[admin]\nlisten = "127.0.0.1:0"\nkey_env = "ADMIN"\n')
    environ = {**ENVIRON, "ADMIN": KEY}
    done = subprocess.run(
        [*PROGRAM, "stats"], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2
    assert "[admin] listen is 0" in done.stderr

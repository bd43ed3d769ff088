"""Several workers on one port: whichever of them dies, and however, nobody loses more than it was serving."""

import asyncio
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from running import RedisServer, next_block
from scripted import ScriptedUpstream, two_parts
from served import ENVIRON, Served, asking, gone
from stores import until

from gateway.channel import Channel
from gateway.config import load
from gateway.errors import StoreUnavailable
from gateway.store import embedded
from gateway.supervisor import Worker, pause_s, supervise
from gateway.watching import Source

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="which worker serves whom is found in /proc")

PATIENCE_S = 20.0
LONG_S = "50"
by_then = partial(until, within_s=PATIENCE_S)
Start = Callable[..., Awaitable[Served]]


@pytest.fixture(params=["uvloop", pytest.param("asyncio", marks=pytest.mark.slow)])
def loop_environ(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment of a process with that kind of event loop."""
    if request.param == "uvloop":
        return {}
    (without := tmp_path / "without").mkdir()
    (without / "uvloop.py").write_text("raise ImportError\n")
    return {"PYTHONPATH": f"{without}{os.pathsep}{ENVIRON['PYTHONPATH']}"}


@pytest.fixture
async def start(shared_redis: RedisServer, upstream: ScriptedUpstream, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a gateway with workers on a file of its own."""
    with ExitStack() as stack:
        running: list[Served] = []

        async def start(workers: int = 2, environ: dict[str, str] | None = None, **settings: str | None) -> Served:
            values = asking(upstream, shared_redis, flights_lease_s="0.5", log_access="false", **settings)
            served = Served(tmp_path, "--workers", str(workers), wait=False, **values, **(environ or {}))
            running.append(stack.enter_context(served))
            await asyncio.to_thread(served.announce)
            return served

        yield start
        for served in running:
            if served.process.poll() is None:
                assert await asyncio.to_thread(served.end) == 0
            assert "Traceback" not in served.said


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A connection a request: each may be any worker's."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session:
        yield session


def asks(session: aiohttp.ClientSession, served: Served, content: str = "hi", **members: Any) -> Any:
    body = {"model": "model-1", "messages": [{"role": "user", "content": content}], **members}
    return session.post(f"{served.base_url}/chat/completions", json=body)


def port_of(served: Served) -> int:
    return int(served.base_url.rsplit(":")[-1].removesuffix("/v1"))


def owner(served: Served, client_port: int) -> int:
    """The worker that has accepted the connection from that port."""
    ends = [f"0100007F:{port_of(served):04X}", f"0100007F:{client_port:04X}"]
    inode = ""
    while not inode:  # the kernel tells the table in pieces, and leaves out rows where others come and go meanwhile
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        inode = next((row[9] for row in rows if row[1:3] == ends), "")
    for worker in served.workers:
        for descriptor in Path(f"/proc/{worker}/fd").iterdir():
            with suppress(FileNotFoundError):
                if str(descriptor.readlink()) == f"socket:[{inode}]":
                    return worker
    raise AssertionError("nobody has it")


class Caller:
    """A stream that is open: its first words are there."""

    def __init__(self, response: aiohttp.ClientResponse, worker: int, begun: str) -> None:
        self.response = response
        self.worker = worker
        self.seen = begun

    @classmethod
    async def open(cls, session: aiohttp.ClientSession, served: Served, content: str) -> "Caller":
        response = await asks(session, served, content, stream=True)
        begun = await next_block(response)
        assert response.connection
        assert response.connection.transport
        return cls(response, owner(served, response.connection.transport.get_extra_info("sockname")[1]), begun)

    async def rest(self) -> str:
        """All that came; what was cut off in the middle ends there."""
        with suppress(aiohttp.ClientError):
            async for data in self.response.content.iter_any():
                self.seen += data.decode()
        self.response.close()
        return self.seen


async def callers_of_all(session: aiohttp.ClientSession, served: Served) -> list[Caller]:
    """As many as it takes for each worker to have one."""
    callers: list[Caller] = []
    async with asyncio.timeout(PATIENCE_S):
        while {caller.worker for caller in callers} != set(served.workers) or len(callers) < 10:
            callers.append(await Caller.open(session, served, f"prompt {len(callers)}"))
    return callers


async def test_a_killed_worker_loses_nobodys_stream_but_its_own_and_those_go_on_elsewhere(
    start, session, upstream, loop_environ
):
    served = await start(environ=loop_environ)
    upstream.script = two_parts
    callers = await callers_of_all(session, served)
    victim = callers[0].worker
    asked: list[int] = []

    async def keeps_asking() -> None:
        while True:
            async with asks(session, served, "load", stream=True) as response:
                asked.append(response.status)
                await next_block(response)

    load_ = [asyncio.create_task(keeps_asking()) for _ in range(4)]
    await by_then(lambda: len(asked) > 20)
    for task in load_:  # what is asked of the victim just now is its own to lose
        task.cancel()
    await asyncio.gather(*load_, return_exceptions=True)
    os.kill(victim, signal.SIGKILL)
    # From the very moment on, every request is served.
    for number in range(50):
        async with asks(session, served, "load", stream=True) as response:
            assert response.status == 200, number
            assert "Hello" in await next_block(response)
    upstream.gate("second part").released.set()
    for caller in callers:
        text = await caller.rest()
        if caller.worker == victim:
            assert "[DONE]" not in text
            url = f"{served.base_url}/streams/{caller.response.headers['Gateway-Stream-Id']}"
            async with session.get(url, params={"after": "1"}) as response:
                text += await response.text()
        assert text.count("Hello") == text.count(" world") == text.count("data: [DONE]") == 1
    assert set(asked) == {200}
    await by_then(lambda: len(served.workers) == 2)
    assert victim not in served.workers


@pytest.mark.slow
async def test_a_worker_that_hangs_is_killed_and_replaced(start, session, upstream):
    served = await start(server_worker_timeout_s="0.5")
    upstream.script = two_parts
    upstream.gate("second part").released.set()
    hanging, other = served.workers
    os.kill(hanging, signal.SIGSTOP)
    assert f"worker {hanging} has not answered" in await hears(served, "has not answered")
    await by_then(lambda: len(served.workers) == 2 and hanging not in served.workers)
    assert other in served.workers
    async with asks(session, served) as response:
        assert response.status == 200


async def test_a_connection_that_waits_is_not_lost_with_a_worker(start, session, upstream):
    served = await start()
    first, second = served.workers
    for worker in (first, second):
        os.kill(worker, signal.SIGSTOP)
    waiting = [await asyncio.open_connection("127.0.0.1", port_of(served)) for _ in range(50)]
    for _, writer in waiting:
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n")
    os.kill(first, signal.SIGKILL)
    os.kill(second, signal.SIGCONT)
    async with asyncio.timeout(PATIENCE_S):
        for reader, writer in waiting:
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            await writer.wait_closed()


async def test_a_supervisor_that_is_told_to_end_has_its_workers_finish_what_they_serve(start, session, upstream):
    served = await start(server_shutdown_grace_s=LONG_S)
    upstream.script = two_parts
    callers = await callers_of_all(session, served)
    workers = served.workers
    served.process.send_signal(signal.SIGTERM)
    await by_then(lambda: is_refused(served))
    upstream.gate("second part").released.set()
    for caller in callers:
        assert (await caller.rest()).endswith("data: [DONE]\n\n")
    assert await asyncio.to_thread(served.process.wait, PATIENCE_S) == 0
    assert all(gone(worker) for worker in workers)


@pytest.mark.slow
async def test_after_the_grace_streams_end_with_the_advice_to_resume(start, session, upstream):
    served = await start(server_shutdown_grace_s="0.2")
    upstream.script = two_parts
    callers = await callers_of_all(session, served)
    served.process.send_signal(signal.SIGTERM)
    for caller in callers:
        last = json.loads((await caller.rest()).rstrip("\n").rpartition("data: ")[2])
        assert last["error"]["code"] == "shutting_down"
        assert "resume" in last["error"]["message"]
    assert await asyncio.to_thread(served.process.wait, PATIENCE_S) == 0


async def test_workers_end_when_their_supervisor_is_killed_and_say_so_to_their_callers(start, session, upstream):
    served = await start(server_shutdown_grace_s=LONG_S)
    upstream.script = two_parts
    callers = await callers_of_all(session, served)
    workers = served.workers
    served.process.kill()
    for caller in callers:
        assert "resume" in await caller.rest()
    assert all(gone(worker) for worker in workers)
    assert is_refused(served)


@pytest.mark.slow
async def test_a_worker_that_is_told_to_end_finishes_what_it_serves_and_is_replaced(start, session, upstream):
    served = await start(server_shutdown_grace_s=LONG_S)
    upstream.script = two_parts
    callers = await callers_of_all(session, served)
    chosen = callers[0].worker
    os.kill(chosen, signal.SIGTERM)
    os.kill(chosen, signal.SIGTERM)  # by systemd, and by a supervisor that knows nothing of that: it is no hurry
    async with asks(session, served, "another", stream=True) as response:
        assert response.status == 200
    upstream.gate("second part").released.set()
    for caller in callers:
        assert (await caller.rest()).endswith("data: [DONE]\n\n")
    await by_then(lambda: len(served.workers) == 2 and chosen not in served.workers)


def is_refused(served: Served) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port_of(served))).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it closed in the middle of the handshake
        return False
    return False


# Configurations


async def statuses(served: Served, model: str) -> set[str]:
    """What the workers answer to a request for that model, once each has been asked."""
    found: dict[int, str] = {}
    async with asyncio.timeout(PATIENCE_S):
        while set(found) != set(served.workers):
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(served))
            with closing(writer):
                writer.write(f"GET /v1/models/{model} HTTP/1.1\r\nHost: gateway\r\n\r\n".encode())
                status = (await reader.readline()).split()[1].decode()
                found[owner(served, writer.get_extra_info("sockname")[1])] = status
            await writer.wait_closed()
    return set(found.values())


async def hears(served: Served, text: str) -> str:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.to_thread(served.hear, text)


async def test_all_workers_take_a_new_configuration_and_a_wrong_one_harms_neither_them_nor_who_replaces_them(
    start, upstream, tmp_path
):
    simulated = '[[upstreams]]\nname = "s"\nkind = "simulated"\nttft_s = 0.0\nmodels = ["{}"]\n'
    (file := tmp_path / "config.toml").write_text(simulated.format("old"))
    served = await start(upstreams=None)
    assert await statuses(served, "new") == {"404"}
    file.write_text(simulated.format("new"))
    served.process.send_signal(signal.SIGHUP)
    assert "new: upstreams" in await hears(served, "is read again")
    assert await statuses(served, "new") == {"200"}
    # The second one is found to be wrong by workers only.
    for wrong in ("[server", '[[upstreams]]\nname = "l"\nkind = "langchain"\ntarget = "no_such.Model"\n'):
        file.write_text(wrong)
        served.process.send_signal(signal.SIGHUP)
        await hears(served, "the configuration stays as it was")
    victim = served.workers[0]
    os.kill(victim, signal.SIGKILL)
    await by_then(lambda: len(served.workers) == 2 and victim not in served.workers)
    assert await statuses(served, "new") == {"200"}
    assert await asyncio.to_thread(served.end) == 0
    assert served.said.count("the configuration stays as it was") == 2


@pytest.mark.parametrize("target", ["no_such.Model", ""])
def test_who_cannot_start_is_told_of_once_and_ends_with_the_workers_code(tmp_path, target):
    upstream = {"name": "l", "kind": "langchain", "target": target}
    environ = {"GATEWAY_REDIS_URL": "redis://127.0.0.1:1", "GATEWAY_UPSTREAMS": json.dumps([upstream])}
    with Served(tmp_path, "--workers", "3", wait=False, **environ) as served:
        assert served.process.stderr
        said = served.process.stderr.read()
        assert served.process.wait(PATIENCE_S) == 2
    assert len([line for line in said.splitlines() if line.startswith("error: upstreams.")]) == 1


def test_a_port_in_use_is_told_of_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = ("--workers", "3", "--port", str(taken.getsockname()[1]))
        with Served(tmp_path, *flags, wait=False, GATEWAY_REDIS_URL="redis://127.0.0.1:1") as served:
            assert served.process.stderr
            [line] = served.process.stderr.read().splitlines()
            assert served.process.wait(PATIENCE_S) == 1
    assert line.startswith("error: ")


@pytest.mark.slow
def test_workers_share_the_embedded_server_which_ends_with_their_supervisor(tmp_path):
    with Served(tmp_path, "--workers", "2") as served:
        assert "workers: 2" in served.said
        assert "embedded Valkey" in served.said
        [store] = set(served.children) - set(served.workers)
        assert "fwd=miss" in served.chat()[0]
        for _ in range(10):
            assert "gateway; hit" in served.chat()[0]
        assert served.end() == 0
        assert gone(store)


async def test_without_a_store_to_share_one_process_serves_and_says_so(tmp_path, monkeypatch, caplog):
    def fail() -> Path:
        raise StoreUnavailable("no embedded server for this platform")

    monkeypatch.setattr(embedded, "server_binary", fail)
    (tmp_path / "config.toml").touch()
    source = Source(tmp_path / "config.toml", {}, {"server": {"workers": 4, "port": 0}})
    with caplog.at_level(logging.WARNING):
        assert await supervise(source, load(None, {}, {"server": {"workers": 4, "port": 0}}), print) is None
    assert "only one serves" in caplog.text


async def test_a_worker_that_cannot_be_started_is_tried_again(start, session, upstream):
    served = await start()
    supervisor, [killed, _] = served.process.pid, served.workers
    soft, hard = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
    resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (3, hard))
    os.kill(killed, signal.SIGKILL)
    await hears(served, "no worker can be started")
    resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (soft, hard))
    await by_then(lambda: len(served.workers) == 2)


async def test_nobody_waits_for_the_answer_of_a_worker_that_is_gone():
    ours, theirs = socket.socketpair()
    theirs.close()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    loaded = load(None, {}, {})
    worker = Worker(process, await Channel.over(ours), loaded)
    assert await worker.ended() == 0
    async with asyncio.timeout(PATIENCE_S):
        assert await worker.take(loaded) is None


def test_workers_that_die_again_and_again_are_not_replaced_in_a_spin():
    pauses = [pause_s(failures) for failures in range(20)]
    assert pauses[:2] == [0.0, 0.0]
    assert pauses[2:] == sorted(pauses[2:])
    assert pauses[2] > 0
    assert pauses[-1] == 15.0

"""What the fixtures hand to tests: a Redis to ill-treat, a running gateway, and its answers."""

import asyncio
import json
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from gateway.app import (
    ADJUSTABLE,
    LIMITS,
    RUNNER_OPTIONS,
    RUNNING,
    SERVICE,
    Adjustable,
    SystemClock,
    build_app,
    open_store,
    patience,
)
from gateway.errors import StoreUnavailable
from gateway.http.server import HttpServer
from gateway.limits import Limits
from gateway.service import Service
from gateway.sockets import bind
from gateway.store.embedded import server_binary
from gateway.store.redis import RedisStore
from gateway.upstreams.fleet import assemble


def find_redis() -> str | None:
    """A server that is not the embedded one where there is one: both are what users run."""
    if found := shutil.which("redis-server") or shutil.which("valkey-server"):
        return found
    try:
        return str(server_binary())
    except StoreUnavailable:
        return None


class RedisServer:
    """A real server on a unix socket, to be killed, frozen and restarted by tests."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{directory}/redis.sock"

    def start(self) -> None:
        program = find_redis()
        assert program
        arguments = [
            "--port",
            "0",
            "--unixsocket",
            f"{self._directory}/redis.sock",
            "--save",
            "",
            "--dir",
            str(self._directory),
        ]
        self._process = subprocess.Popen([program, *arguments], stdout=subprocess.PIPE)
        assert self._process.stdout
        for line in self._process.stdout:
            if b"ready to accept connections" in line.lower():
                return
        raise AssertionError("the Redis server did not start")

    def signal(self, number: int) -> None:
        assert self._process
        self._process.send_signal(number)

    def stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout
            self._process.stdout.close()
            self._process = None


_STARTS = 5


class PortedRedis:
    """A server on a port of the loopback, or with a ``config`` a sentinel."""

    def __init__(self, directory: Path, *options: str, config: str = "") -> None:
        directory.mkdir()
        self._directory = directory
        self._options = options
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self) -> None:
        """On the same port as before, else on one that is free."""
        for _ in range(_STARTS):
            self.port = self.port or _free_ports()[0]
            if self._run():
                return
            self.port = 0
        raise AssertionError("the server did not start")

    def _run(self) -> bool:
        program, file = find_redis(), self._directory / "server.conf"
        assert program
        options = [option.replace("PORT", str(self.port)) for option in self._options or ("--port", "PORT")]
        if self._config:
            file.write_text(self._config)
        arguments = [str(file), "--sentinel"] if self._config else ["--save", ""]
        arguments += [*options, "--bind", "127.0.0.1", "--dir", str(self._directory)]
        self._process = subprocess.Popen([program, *arguments], stdout=subprocess.PIPE)
        assert self._process.stdout
        for line in self._process.stdout:
            if b"ready to accept connections" in line.lower() or b"Sentinel ID is" in line:
                return True
        self.stop()
        return False

    def signal(self, number: int) -> None:
        assert self._process
        self._process.send_signal(number)

    def stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout
            self._process.stdout.close()
            self._process = None


class RedisNodes:
    """A Redis Cluster on the loopback: three masters, without replicas. ``tls`` are options that name its files."""

    def __init__(self, directory: Path, tls: Sequence[str] = (), **client: Any) -> None:
        self._directory = directory
        self._tls = tls
        self._client = client
        self._processes: list[subprocess.Popen[bytes]] = []
        self.ports: list[int] = []

    @property
    def url(self) -> str:
        return f"redis{'s' if self._tls else ''}://127.0.0.1:{self.ports[0]}"

    def start(self) -> None:
        buses = [self._start_node(number) for number in range(3)]
        clients = [Redis(port=port, **self._client) for port in self.ports]
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            client.execute_command("CLUSTER ADDSLOTSRANGE", 16384 * number // 3, 16384 * (number + 1) // 3 - 1)
            client.execute_command("CLUSTER MEET", "127.0.0.1", self.ports[0], buses[0])
        for client in clients:
            _until(lambda client=client: _is_complete(client.execute_command("CLUSTER INFO")))
            client.close()

    def _start_node(self, number: int) -> int:
        """Starts a node, on other ports where somebody was faster; tells the port of its bus."""
        for _ in range(_STARTS):
            port, bus = _free_ports()
            process = self._run_node(number, port, bus)
            if _answers(process, port, **self._client):
                self._processes.append(process)
                self.ports.append(port)
                return bus
        raise AssertionError("a node of the cluster did not start")

    def _run_node(self, number: int, port: int, bus: int) -> "subprocess.Popen[bytes]":
        program, directory = find_redis(), self._directory / f"node-{number}"
        assert program
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        options = f"--port {port} --cluster-port {bus} --bind 127.0.0.1 --cluster-enabled yes --dir {directory} --save"
        # With part of the slots lost, the others go on: what a node that dies means to our keys is what is tested.
        options = f"--cluster-require-full-coverage no --cluster-node-timeout 1000 {options}"
        tls = [*self._tls, "--port", "0", "--tls-port", str(port), "--tls-cluster", "yes"] if self._tls else []
        return subprocess.Popen([program, *options.split(), "", *tls], stdout=subprocess.DEVNULL)

    def stop(self, number: int | None = None) -> None:
        """Kills one node, or all."""
        for process in self._processes if number is None else [self._processes[number]]:
            process.kill()
            process.wait()


def _free_ports() -> tuple[int, int]:
    """Two that nobody has now, below those that systems give to clients, so that nobody gets them by accident."""
    found: dict[int, None] = {}
    while len(found) < 2:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found[port] = None
    one, other = found
    return one, other


def _answers(process: "subprocess.Popen[bytes]", port: int, **client: Any) -> bool:
    """Whether a server comes up, and not another one in its place."""
    deadline = time.monotonic() + 10
    with Redis(port=port, **client) as redis:
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(RedisConnectionError):
                if redis.info("server")["process_id"] == process.pid:
                    return True
            time.sleep(0.01)
    process.kill()
    process.wait()
    return False


def _is_complete(info: dict[str, str]) -> bool:
    return info["cluster_state"] == "ok" and info["cluster_size"] == "3" and info["cluster_slots_ok"] == "16384"


def _until(condition: Callable[[], Any], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while True:
        with suppress(RedisConnectionError):
            if condition():
                return
        assert time.monotonic() < deadline
        time.sleep(0.01)


@dataclass
class Gateway:
    """A running gateway, and a session to talk to it."""

    origin: str
    session: aiohttp.ClientSession
    service: Service
    store: RedisStore
    server: HttpServer
    limits: Limits
    adjustable: Adjustable

    @property
    def runner(self) -> web.AppRunner:
        return self.server._runner

    @property
    def base_url(self) -> str:
        return f"{self.origin}/v1"

    async def post(self, path: str, body: Any, **headers: str) -> "Got":
        """Posts JSON and reads the answer to its end; ``cache_control="no-store"`` becomes a header."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post(f"{self.origin}{path}", json=body, headers=sent) as response:
            return Got(response.status, response.headers, await response.read())

    async def chat(self, content: str = "hi", *, headers: dict[str, str] | None = None, **members: Any) -> "Got":
        async with self.opened(content, headers=headers, **members) as response:
            return Got(response.status, response.headers, await response.read())

    def opened(self, content: str = "hi", *, headers: dict[str, str] | None = None, **members: Any) -> Any:
        """The same, as a context: the answer is there as soon as its head is."""
        body = {"model": "model-1", "messages": [{"role": "user", "content": content}], **members}
        return self.session.post(f"{self.base_url}/chat/completions", json=body, headers=headers)

    async def landed(self) -> None:
        """Waits until no upstream call is running, and all that is to be stored is."""
        await asyncio.gather(*self.service._flights._tasks.values(), return_exceptions=True)

    async def stores(self, content: str = "hi", *, headers: dict[str, str] | None = None, **members: Any) -> bool:
        """Whether the answer to this is stored."""
        await self.landed()
        got = await self.chat(content, headers={**(headers or {}), "Cache-Control": "only-if-cached"}, **members)
        assert got.status in (200, 504)
        return got.status == 200


async def next_block(response: aiohttp.ClientResponse) -> str:
    """The next event or comment of a stream, as soon as it is there; empty at the end."""
    block = b""
    while line := await response.content.readline():
        if line == b"\n":
            break
        block += line
    return block.decode().rstrip("\n")


@dataclass
class Got:
    """An answer, read to its end."""

    status: int
    headers: Any
    body: bytes

    @property
    def cache_status(self) -> str:
        return self.headers["Cache-Status"]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """The data of the stream's events."""
        return [block.removeprefix("data: ") for block in self.body.decode().split("\n\n") if block.startswith("data:")]


async def run_gateway(stack: AsyncExitStack, loaded: Any) -> Gateway:
    """The application as `gateway.life.serve` runs it, but for its signals."""
    fleet = assemble(loaded, SystemClock())
    stack.push_async_callback(fleet.close)
    store, _ = await open_store(stack, loaded)
    app = build_app(loaded.config, store, fleet.router, loaded.secrets.get(loaded.config.admin.key_name, ""))
    server = HttpServer(app, app[RUNNING], patience(loaded.config), app[LIMITS], RUNNER_OPTIONS)
    stack.push_async_callback(server.close)
    await server.open()
    (sock,) = bind("127.0.0.1", 0)
    await server.listen([sock])
    session = await stack.enter_async_context(aiohttp.ClientSession())
    origin = f"http://127.0.0.1:{sock.getsockname()[1]}"
    return Gateway(origin, session, app[SERVICE], store, server, app[LIMITS], app[ADJUSTABLE])

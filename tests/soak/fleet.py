"""The processes of a soak: a Redis to ill-treat, replicas of the gateway, and a wire between each of them and Redis."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
from models import Model
from questions import OWN, SHARED, WEAK
from redis import asyncio as aioredis
from redis.exceptions import RedisError
from running import find_redis

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ADMIN_KEY = "soak-admin-key"
PREFIX = "soak"
LEASE_S = 2.0
GRACE_S = 2.0
RESUME_S = 6.0
ABANDON_GRACE_S = 3.0
"""Those who come back do so sooner."""
TTL_S, STALE_S, STALE_IF_ERROR_S = 4.0, 2.0, 2.0
UPSTREAM_SILENCE_S = 4.0
"""How long a replica waits for an upstream that is silent. All that pauses but is no fault is shorter."""
_STARTS_WITHIN_S = 30.0
_ENDS_WITHIN_S = GRACE_S + 15.0


class SoakFailed(Exception):
    """The soak itself cannot go on, so it says nothing about the gateway."""


async def by_then(condition: Callable[[], Awaitable[bool]], within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not await condition():
        if time.monotonic() > deadline:
            raise SoakFailed(f"{what} within {within_s:g} s")
        await asyncio.sleep(0.05)


def _spawn(command: list[str], output: Any, **options: Any) -> "subprocess.Popen[bytes]":
    # A session of its own: a Ctrl-C in the terminal is for the soak, which then ends its children in order.
    return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, **options)


class RedisProcess:
    """A Redis server on a unix socket, with or without a memory of what was before it was killed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = directory / "redis.sock"
        self.client = aioredis.Redis(unix_socket_path=str(self.socket), socket_timeout=5.0)

    async def start(self) -> None:
        program = find_redis()
        if program is None:
            raise SoakFailed("there is no Redis server here")
        options = ["--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir", str(self._directory)]
        self._process = _spawn([program, *options], subprocess.DEVNULL)
        await by_then(self._answers, 10.0, "Redis does not start")

    async def _answers(self) -> bool:
        try:
            return bool(await self.client.ping())
        except RedisError:
            return False

    async def save(self) -> None:
        await self.client.save()

    def forget(self) -> None:
        (self._directory / "dump.rdb").unlink(missing_ok=True)

    def signal(self, number: int) -> None:
        if self._process:
            self._process.send_signal(number)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def close(self) -> None:
        self.kill()
        await self.client.aclose()


class Wire:
    """A network between one replica and Redis: it can be cut, and it can swallow."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open = asyncio.Event()
        self._open.set()
        self._cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Resets all connections, and every new one until it is mended."""
        self._cut = True
        self.reset()

    def reset(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def swallow(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        """What was swallowed arrives after all."""
        self._cut = False
        self._open.set()

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            writer.transport.abort()
            return
        try:
            theirs, ours = await asyncio.open_unix_connection(str(self._path))
        except OSError:
            writer.transport.abort()
            return
        for source, sink in ((reader, ours), (theirs, writer)):
            self._writers.add(sink)
            task = asyncio.create_task(self._copy(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


class Replica:
    """A ``gateway serve`` that keeps its port over all its lives."""

    def __init__(self, number: int, directory: Path, environ: dict[str, str], session: aiohttp.ClientSession) -> None:
        self.number = number
        self.name = f"replica {number}"
        self.port = _free_port()
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        self.origin = f"http://127.0.0.1:{self.port}"
        self.log = directory / f"replica-{number}.log"
        self.listed = True
        """Whether a balancer would send callers there."""
        self.lives = 0
        """How many processes it has had; counted once the one before is gone."""
        self._directory = directory
        self._environ = environ
        self._session = session
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self.lives += 1
        command = [sys.executable, "-m", "gateway", "serve", "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = _spawn(command, log, cwd=self._directory, env=self._environ)
        await by_then(self._listens, _STARTS_WITHIN_S, f"{self.name} does not start")
        self.listed = True

    async def _listens(self) -> bool:
        assert self.process
        if self.process.poll() is not None:
            raise SoakFailed(f"{self.name} ended with code {self.process.returncode}: {self.log.read_text()[-2000:]}")
        return await self.status("/healthz") == 200

    async def status(self, path: str) -> int:
        """0 where it does not answer."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError, TimeoutError):
            async with self._session.get(f"{self.origin}{path}", timeout=aiohttp.ClientTimeout(total=5)) as response:
                return response.status
        return 0

    def signal(self, number: int) -> None:
        assert self.process
        self.process.send_signal(number)

    async def kill(self) -> None:
        assert self.process
        self.listed = False
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(self.process.wait)

    async def end(self) -> int | None:
        """The exit code after SIGTERM; None where it does not end."""
        assert self.process
        self.listed = False
        self.process.send_signal(signal.SIGTERM)
        try:
            return await asyncio.to_thread(self.process.wait, _ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            await self.kill()
            return None

    @property
    def pids(self) -> list[int]:
        """Of the process, and of all that it has started."""
        assert self.process
        return _with_children(self.process.pid)


def _with_children(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(each for child in children for each in _with_children(int(child)))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def settings(wire: Wire, models: list[Model], counts: Path) -> dict[str, str]:
    """The environment of a replica: lives so short that a soak sees each thing live and die."""
    values: dict[str, Any] = {
        "redis_url": f"redis://127.0.0.1:{wire.port}",
        "redis_prefix": PREFIX,
        "redis_lookup_timeout_s": 0.5,
        "redis_cooldown_s": 0.5,
        "server_head_after_s": 1.0,
        "server_keepalive_s": 1.0,
        "server_shutdown_grace_s": GRACE_S,
        "cache_ttl_s": TTL_S,
        "cache_stale_s": STALE_S,
        "cache_stale_if_error_s": STALE_IF_ERROR_S,
        "flights_lease_s": LEASE_S,
        "flights_abandon_grace_s": ABANDON_GRACE_S,
        "flights_resume_s": RESUME_S,
        "flights_first_byte_timeout_s": UPSTREAM_SILENCE_S,
        "flights_idle_timeout_s": UPSTREAM_SILENCE_S,
        "flights_total_timeout_s": 30.0,
        "retries_backoff_s": 0.05,
        "retries_max_backoff_s": 0.5,
        "retries_min_per_s": 20.0,
        "ejection_first_s": 1.0,
        "ejection_longest_s": 4.0,
        "admin_key_env": "SOAK_ADMIN_KEY",
        "log_access": "false",
        "log_level": "warning",
        "upstreams": json.dumps([_entry(model) for model in models]),
        "models": json.dumps([{"names": [WEAK], "fallbacks": [SHARED]}]),
    }
    ours = {f"GATEWAY_{name.upper()}": str(value) for name, value in values.items()}
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    return {
        **inherited,
        **ours,
        "PYTHONPATH": f"{HERE / 'inside'}{os.pathsep}{ROOT}",
        "SOAK_COUNTS": str(counts),
        "SOAK_ADMIN_KEY": ADMIN_KEY,
        "SOAK_KEY": "soak-upstream-key",
    }


def _entry(model: Model) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": model.name,
        "kind": "openai",
        "base_url": model.base_url,
        "idle_timeout_s": UPSTREAM_SILENCE_S,
        "connect_timeout_s": 2.0,
    }
    if model.name == "own":
        return {**entry, "models": [OWN]}
    if model.name == "weak":
        return {**entry, "models": [WEAK], "api_key_env": "SOAK_KEY"}
    return {**entry, "models": [SHARED], "group": "world", "api_key_env": "SOAK_KEY"}

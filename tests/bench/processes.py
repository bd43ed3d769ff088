"""The processes of a run: each started on a core of its own choice, watched from outside, and ended whatever happens."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from gateway.errors import StoreUnavailable
from gateway.store.embedded import server_binary

HERE = Path(__file__).parent
_START_WITHIN_S = 20.0
_END_WITHIN_S = 15.0
_POLL_S = 0.002


class BenchFailed(Exception):
    """Something is not as it has to be, so there is nothing to report."""


@dataclass(frozen=True)
class Cores:
    """Where processes run: None where the system cannot pin them, and the same where there is only one core."""

    server: int | None
    others: int | None

    @classmethod
    def of_this_machine(cls) -> "Cores":
        if not hasattr(os, "sched_setaffinity"):
            return cls(None, None)
        allowed = sorted(os.sched_getaffinity(0))
        return cls(allowed[0], allowed[1] if len(allowed) > 1 else allowed[0])


@dataclass(frozen=True)
class Server:
    """A server under test, or the upstream."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    start_s: float
    """From exec until it listened."""

    def cpu_s(self) -> float | None:
        """The processor time that it has taken; None where the system does not tell (it tells in /proc on Linux)."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text("ascii")
        except OSError:
            return None
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float | None:
        """Its resident memory in 10⁶ bytes. Not the proportional one, which falls when other Pythons run beside it."""
        try:
            rollup = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text("ascii")
        except OSError:
            return None
        resident_kib = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Rss:"))
        return resident_kib * 1024 / 1e6


@contextmanager
def child(command: Sequence[str], core: int | None, output: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    """A process on ``core`` from its first instruction on; it is ended at the end. ``output`` is for both streams."""
    before = _pin(core)
    try:
        # A session of its own: a Ctrl-C in the terminal is for the benchmark, which then ends its children in order.
        process = subprocess.Popen(
            command,
            env={name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    finally:
        _restore(before)
    try:
        yield process
    finally:
        _end(process)


def _pin(core: int | None) -> set[int] | None:
    """A child inherits the cores of its parent. Returns the ones before."""
    if core is None:
        return None
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    return before


def _restore(cores: set[int] | None) -> None:
    if cores:
        os.sched_setaffinity(0, cores)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def server(name: str, command: Sequence[str], port: int, core: int | None) -> Iterator[Server]:
    """A process that listens on ``port``. Raises `BenchFailed`."""
    began_at = time.perf_counter()
    with child(command, core) as process:
        while not _accepts(port):
            if process.poll() is not None:
                raise BenchFailed(f"{name} ended with code {process.returncode} before it listened: {' '.join(command)}")
            if time.perf_counter() - began_at > _START_WITHIN_S:
                raise BenchFailed(f"{name} does not listen after {_START_WITHIN_S:g} s")
            time.sleep(_POLL_S)
        yield Server(name, port, process, time.perf_counter() - began_at)


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def redis_server(directory: Path, core: int | None) -> Iterator[Path]:
    """A Redis server in memory; yields its unix socket. Raises `BenchFailed`."""
    path = directory / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no", "--dir", str(directory)]
    with child([_redis_binary(), *options], core) as process, redis.Redis(unix_socket_path=str(path)) as client:
        began_at = time.perf_counter()
        while not _answers(client):
            if process.poll() is not None or time.perf_counter() - began_at > _START_WITHIN_S:
                raise BenchFailed("the Redis server does not start")
            time.sleep(_POLL_S)
        yield path


def _redis_binary() -> str:
    try:
        return str(server_binary())
    except StoreUnavailable as error:
        found = shutil.which("redis-server") or shutil.which("valkey-server")
        if not found:
            raise BenchFailed(f"there is no Redis server: {error}") from None
        return found


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def script(name: str, *arguments: object) -> list[str]:
    """The command that runs one of this folder's files."""
    return [sys.executable, str(HERE / name), *map(str, arguments)]

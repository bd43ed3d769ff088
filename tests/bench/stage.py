"""What stands around a server under test: Redis, the upstream and the load generator, on the other core."""

import http.client
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

import orjson
import readers
import redis
from load import IDENTITY, PROMPTS, Plan, body
from processes import BenchFailed, Cores, Server, child, free_port, redis_server, script, server

Measured = dict[str, float | None]

_LOAD_WITHIN_S = 150.0


class Stage:
    """Starts servers under test, sets the upstream's pace and sends load."""

    def __init__(self, cores: Cores, directory: Path, redis_socket: Path, upstream: Server) -> None:
        self.upstream = upstream
        self.cores = cores
        self.directory = directory
        self.redis_socket = redis_socket

    def gateway(
        self, redis_url: str = "", *, lookup_timeout_s: float = 2.0, more: str = "", upstream: str = ""
    ) -> AbstractContextManager[Server]:
        """The real command at its default configuration, but for the addresses, and for the patience with Redis:

        where other work stalls the machine for longer than a lookup may take, a hit would become a miss.
        ``more`` is more of its configuration, ``upstream`` of its upstream's.
        """
        port = free_port()
        config = self.directory / f"{port}.toml"
        config.write_text(
            f"{more}[server]\nport = {port}\n"
            f'[redis]\nurl = "{redis_url or f"unix://{self.redis_socket}"}"\nlookup_timeout_s = {lookup_timeout_s}\n'
            f'[[upstreams]]\nname = "scripted"\nkind = "openai"\nmodels = ["scripted"]\n'
            f'base_url = "http://127.0.0.1:{self.upstream.port}/v1"\n{upstream}',
            "utf-8",
        )
        command = [sys.executable, "-m", "gateway", "serve", "--config", str(config)]
        return server("gateway", command, port, self.cores.server)

    def bare(self) -> AbstractContextManager[Server]:
        """The comparator."""
        port = free_port()
        command = script("bare.py", port, self.redis_socket, f"http://127.0.0.1:{self.upstream.port}")
        return server("bare", command, port, self.cores.server)

    def empty_store(self) -> None:
        with redis.Redis(unix_socket_path=str(self.redis_socket)) as client:
            client.flushall()

    def set_pace(self, ttft_s: float, gap_s: float) -> None:
        """How long the upstream waits before its first token, and before each of the others."""
        _fetch(self.upstream, "/settings", orjson.dumps({"ttft_s": ttft_s, "gap_s": gap_s}))

    def upstream_stats(self) -> dict[str, int]:
        """``calls`` so far, and how many of them are ``open``."""
        _, data = _fetch(self.upstream, "/stats")
        stats: dict[str, int] = orjson.loads(data)
        return stats

    def load(self, target: Server, plan: Plan) -> Measured:
        """Runs the load generator to its end. Raises `BenchFailed`."""
        cpu_s = target.cpu_s()
        with self.running_load(target, plan) as process:
            measured = finish(process, target)
        cpu_after_s = target.cpu_s()
        if cpu_s is not None and cpu_after_s is not None:
            cpu_us = (cpu_after_s - cpu_s) * 1e6
            measured["cpu_us_a_request"] = cpu_us / measured["all_requests"]
            if plan.streamed:
                measured["cpu_us_a_frame"] = cpu_us / measured["all_frames"]
        return measured

    @contextmanager
    def running_load(self, target: Server, plan: Plan) -> Iterator[subprocess.Popen[bytes]]:
        """The load generator at work; `finish` waits for it. Raises `BenchFailed` if the upstream was asked too often."""
        calls = self.upstream_stats()["calls"]
        with child(script("load.py", orjson.dumps(asdict(plan)).decode()), self.cores.others, subprocess.PIPE) as process:
            yield process
        calls = self.upstream_stats()["calls"] - calls
        if plan.expect == "hit" and calls:
            raise BenchFailed(f"{target.name}: the upstream was asked {calls} times in a run of hits")

    def running(self, name: str, plan: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """Another kind of load; `finish` waits for it."""
        return child(script(name, plan), self.cores.others, subprocess.PIPE)

    def running_readers(self, plan: readers.Plan) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """The readers of one answer; `finish` waits for them."""
        return child(script("readers.py", orjson.dumps(asdict(plan)).decode()), self.cores.others, subprocess.PIPE)

    def check_hits(self, target: Server, *, streamed: bool, tokens: int) -> int:
        """Asks for each prompt once: all must be hits that say what the upstream says. Returns their length in bytes."""
        lengths = set()
        for number in range(PROMPTS):
            request = body(number, streamed=streamed, tokens=tokens)
            _, expected = _fetch(self.upstream, "/v1/chat/completions", request)
            status, answer = _fetch(target, "/v1/chat/completions", request)
            if "; hit" not in status:
                raise BenchFailed(f"{target.name}: prompt {number} is not stored: Cache-Status is {status!r}")
            if _said(answer, streamed=streamed) != _said(expected, streamed=streamed):
                raise BenchFailed(f"{target.name}: a hit differs from the upstream's answer:\n{answer!r}\n{expected!r}")
            lengths.add(len(answer))
        if len(lengths) > 1:
            raise BenchFailed(f"{target.name}: hits of the same text have different lengths: {sorted(lengths)}")
        return lengths.pop()


def _fetch(target: Server, path: str, data: bytes | None = None) -> tuple[str, bytes]:
    """The ``Cache-Status`` and the body of an answer. Raises `BenchFailed`."""
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=10)
    headers = {"Authorization": "Bearer sk-bench", "Content-Type": "application/json"}
    try:
        connection.request("POST" if data else "GET", path, data, headers)
        response = connection.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise BenchFailed(f"{target.name} does not answer: {error!r}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise BenchFailed(f"{target.name} answers {path} with {response.status}: {answer!r}")
    return response.headers.get("Cache-Status", ""), answer


def _said(answer: bytes, *, streamed: bool) -> object:
    """An answer without its identity, which is new with each reply. The order of members is free where it is one object."""
    without_identity = IDENTITY.sub(b'"identity":0', answer)
    return without_identity if streamed else orjson.loads(without_identity)


def finish(process: subprocess.Popen[bytes], target: Server) -> Measured:
    """What a load generator has measured. Raises `BenchFailed` with what it has to say."""
    try:
        output, errors = process.communicate(timeout=_LOAD_WITHIN_S)
    except subprocess.TimeoutExpired:
        raise BenchFailed(f"{target.name}: the load generator does not end") from None
    if process.returncode:
        raise BenchFailed(f"{target.name}: {errors.decode(errors='replace').strip()}")
    measured: Measured = orjson.loads(output)
    return measured


@contextmanager
def stage(cores: Cores, directory: Path) -> Iterator[Stage]:
    """Redis and the upstream, running. Raises `BenchFailed`."""
    port = free_port()
    with (
        redis_server(directory, cores.others) as redis_socket,
        server("upstream", script("upstream.py", port), port, cores.others) as upstream,
    ):
        yield Stage(cores, directory, redis_socket, upstream)

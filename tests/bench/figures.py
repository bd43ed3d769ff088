"""What is measured. Every figure is taken of all servers right after each other, since the machine's speed drifts."""

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from statistics import median

from load import PROMPTS, Plan
from processes import BenchFailed, Server
from stage import Measured, Stage, finish

Figures = dict[str, dict[str, Measured]]
"""By the name of the figure, then by the name of the server."""

MANY_CONNECTIONS = 64
RELAY_CONNECTIONS = 16
_HIT_TOKENS = 64
_RELAY_TOKENS = 512
_PACED_TTFT_S, _PACED_GAP_S, _PACED_TOKENS = 0.02, 0.002, 16
_OPEN_STREAM_GAP_S = 0.02
# The aftermath of one answer, its storing, is over before the next is asked for: a first token is a lone caller's.
_PAUSE_S = 0.01
# An answer is in the store, and its flight forgotten, by then.
_STORED_WITHIN_S = 0.6
FIRST_REQUESTS = 8
# What a fresh process does after it has begun to listen is over by then.
_SETTLED_WITHIN_S = 1.0
_ALL_OPEN_WITHIN_S = 20.0


@dataclass(frozen=True)
class Extent:
    """How much is measured. The open streams last long enough for all to be open at one time, and are then half done.

    ``fan_out_ttft_s`` is long enough for all readers to wait for the first token.
    """

    rounds: int = 3
    seconds: float = 3.0
    warm_up_s: float = 0.5
    first_tokens: int = 200
    paced_first_tokens: int = 40
    open_streams: int = 256
    open_stream_tokens: int = 512
    starts: int = 3
    flood_requests: int = 1000
    followed_tokens: int = 128
    readers: int = 500
    fan_out_ttft_s: float = 3.0
    fan_out_tokens: int = 1024
    crowd_tokens: int = 128
    pace_streams: int = 2000
    pace_rate: float = 5.0
    pace_ramp_s: float = 10.0
    pace_seconds: float = 4.0
    pace_steps: int = 6
    overloaded_streams: int = 60
    overloaded_s: float = 8.0
    saturating: int = 6
    """How many times as many streams the processor just about carries."""
    saturates: bool = True
    """Whether that is so."""


QUICK = Extent(
    rounds=1,
    seconds=0.3,
    warm_up_s=0.1,
    first_tokens=10,
    paced_first_tokens=5,
    open_streams=16,
    open_stream_tokens=64,
    starts=1,
    flood_requests=60,
    followed_tokens=64,
    readers=16,
    fan_out_ttft_s=1.0,
    fan_out_tokens=64,
    crowd_tokens=40,
    pace_streams=50,
    pace_ramp_s=0.3,
    pace_seconds=0.5,
    pace_steps=1,
    overloaded_streams=6,
    overloaded_s=1.5,
    saturating=2,
    saturates=False,
)

Say = Callable[[str], None]


def one_round(stage: Stage, extent: Extent, servers: Sequence[Server], say: Say) -> Figures:
    """All figures of running servers, once. Raises `BenchFailed`."""
    figures: Figures = {}
    stage.set_pace(0, 0)
    stage.empty_store()
    for streamed in (True, False):
        figures |= _hits(stage, extent, servers, say, streamed=streamed)
    figures["first_token"] = _first_tokens(stage, servers, Plan(0, requests=extent.first_tokens), say)
    stage.set_pace(_PACED_TTFT_S, _PACED_GAP_S)
    plan = Plan(0, requests=extent.paced_first_tokens, tokens=_PACED_TOKENS)
    figures["first_token_paced"] = _first_tokens(stage, servers, plan, say)
    stage.set_pace(0, 0)
    figures["relay"] = _relayed(stage, extent, servers, say)
    return figures


def _hits(stage: Stage, extent: Extent, servers: Sequence[Server], say: Say, *, streamed: bool) -> Figures:
    kind = "stream" if streamed else "whole"
    lengths = {server.name: _fill(stage, server, streamed=streamed) for server in servers}
    figures: Figures = {}
    for connections in (1, MANY_CONNECTIONS):
        say(f"hits, {kind}, {connections} at a time")
        plan = Plan(0, connections, streamed, _HIT_TOKENS, seconds=extent.seconds, warm_up_s=extent.warm_up_s, expect="hit")
        figures[f"hit_{kind}_{connections}"] = {
            server.name: stage.load(server, replace(plan, port=server.port, body_bytes=lengths[server.name]))
            for server in servers
        }
    return figures


def _fill(stage: Stage, server: Server, *, streamed: bool) -> int:
    """Has every prompt stored, and checked; returns the length of each answer."""
    stage.load(server, Plan(server.port, streamed=streamed, tokens=_HIT_TOKENS, requests=PROMPTS))
    time.sleep(_STORED_WITHIN_S)
    return stage.check_hits(server, streamed=streamed, tokens=_HIT_TOKENS)


def _first_tokens(stage: Stage, servers: Sequence[Server], plan: Plan, say: Say) -> dict[str, Measured]:
    """The time to the first token of a miss, one request at a time, and how much of it the upstream does not take."""
    say(f"first tokens, streams of {plan.tokens} tokens")
    plan = replace(plan, unique=True, pause_s=_PAUSE_S)
    direct = stage.load(stage.upstream, replace(plan, port=stage.upstream.port))
    measured = {server.name: stage.load(server, replace(plan, port=server.port, expect="miss")) for server in servers}
    for values in measured.values():
        values["added_ms"] = values["first_p50_ms"] - direct["first_p50_ms"]
    return {**measured, "upstream": direct}


def _relayed(stage: Stage, extent: Extent, servers: Sequence[Server], say: Say) -> dict[str, Measured]:
    say("frames relayed")
    plan = Plan(
        0,
        RELAY_CONNECTIONS,
        tokens=_RELAY_TOKENS,
        unique=True,
        seconds=extent.seconds,
        warm_up_s=extent.warm_up_s,
        expect="miss",
    )
    measured = {}
    for server in servers:
        measured[server.name] = stage.load(server, replace(plan, port=server.port))
        stage.empty_store()
    return measured


Start = Callable[[], AbstractContextManager[Server]]


def fresh_process(stage: Stage, extent: Extent, start: Start, say: Say) -> Measured:
    """The figures of a process that has done nothing yet: its start, and the memory that it takes. Raises `BenchFailed`."""
    starts_s = []
    for _ in range(extent.starts - 1):
        with start() as server:
            starts_s.append(server.start_s)
    with start() as server:
        say(f"{server.name}: starts and memory")
        starts_s.append(server.start_s)
        time.sleep(_SETTLED_WITHIN_S)
        measured: Measured = {"start_s": median(starts_s), "idle_mb": server.memory_mb()}
        measured |= _open_streams(stage, extent, server)
    stage.empty_store()
    return measured


def _wait_until_open(stage: Stage, streams: int, load: subprocess.Popen[bytes]) -> None:
    """Or until the load generator has given up; why, it says at its end."""
    began_at = time.perf_counter()
    while stage.upstream_stats()["open"] < streams and load.poll() is None:
        if time.perf_counter() - began_at > _ALL_OPEN_WITHIN_S:
            raise BenchFailed(f"{streams} streams are never open at one time")
        time.sleep(0.02)


def _open_streams(stage: Stage, extent: Extent, server: Server) -> Measured:
    """What memory and time a process takes while many streams are open, each with a token every 20 ms."""
    stage.set_pace(0, 0)
    # What the first requests load and cache once belongs to no stream.
    stage.load(server, Plan(server.port, requests=FIRST_REQUESTS, unique=True))
    before_mb, cpu_s = server.memory_mb(), server.cpu_s()
    stage.set_pace(_OPEN_STREAM_GAP_S, _OPEN_STREAM_GAP_S)
    streams = extent.open_streams
    plan = Plan(server.port, streams, tokens=extent.open_stream_tokens, unique=True, requests=streams, expect="miss")
    with stage.running_load(server, plan) as process:
        _wait_until_open(stage, streams, process)
        time.sleep(extent.open_stream_tokens * _OPEN_STREAM_GAP_S / 2)
        open_mb, still_open = server.memory_mb(), stage.upstream_stats()["open"]
        measured = finish(process, server)
    if still_open != streams:
        raise BenchFailed(f"only {still_open} of {streams} streams were open when the memory of {server.name} was read")
    if open_mb is not None and before_mb is not None:
        measured["open_mb"] = open_mb
        measured["stream_kib"] = (open_mb - before_mb) * 1e6 / 1024 / streams
    if (cpu_after_s := server.cpu_s()) is not None and cpu_s is not None:
        measured["cpu_us_a_frame"] = (cpu_after_s - cpu_s) * 1e6 / measured["all_frames"]
    return measured

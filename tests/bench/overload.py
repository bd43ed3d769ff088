"""What newcomers, running streams and hits notice where three times as many streams are asked for as there is room for.

The bare server has no limits, so each figure is compared with one of the same gateway that has room for all who come.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import orjson
from arrivals import Plan
from figures import Extent, Figures, Say
from load import PROMPTS
from load import Plan as Warmup
from processes import BenchFailed, Server
from stage import Measured, Stage, finish

_TOKENS = 40
_GAP_S = 0.05
_STREAM_S = _TOKENS * _GAP_S
_STORED_WITHIN_S = 0.6
_HIT_TOKENS = 64
TIMES = 3
_MAX_LAG_S = 0.005
# Of what fits, so that by chance none is refused.
_CALM = 0.6


@dataclass(frozen=True)
class Case:
    """What is full, and how the gateway is told so."""

    name: str
    config: Callable[[int], str]
    """By how many streams there is room for."""
    upstream: Callable[[int], str] = lambda _: ""
    hits: bool = True
    """Whether hits are served though it is full."""
    lag: bool = False
    """Whether the lag is limited: so one request after the other, to have answers stored, may be too much already."""


CASES = (
    Case("flights", lambda room: f"[limits]\nmax_flights = {room}\n"),
    Case("streams", lambda room: f"[limits]\nmax_streams = {room}\n", hits=False),
    Case("connections", lambda room: f"[limits]\nmax_connections = {room}\n", hits=False),
    Case(
        "queue",
        lambda _: "",
        lambda room: f"max_concurrent_calls = {room * 2 // 3}\nmax_queued_calls = {room - room * 2 // 3}\n",
    ),
    Case("processor", lambda _: "[limits]\nmax_flights = 0\nmax_streams = 0\n"),
    Case("limited", lambda room: f"[limits]\nmax_flights = {room}\n"),
    Case("lag", lambda _: f"[limits]\nmax_flights = 0\nmax_streams = 0\nmax_lag_s = {_MAX_LAG_S}\n", hits=False, lag=True),
)
LIMITS = ("flights", "streams", "connections", "queue", "limited", "lag")
ON_THE_PROCESSOR = ("processor", "limited", "lag")


def figure(case: str) -> str:
    return f"overload_{case}"


def overload(stage: Stage, extent: Extent, say: Say) -> list[Figures]:
    """One entry. Raises `BenchFailed`."""
    figures: Figures = {}
    for case in CASES:
        if case.lag and not extent.saturates:
            continue
        room = extent.overloaded_streams * (extent.saturating if case.name in ON_THE_PROCESSOR else 1)
        say(f"{TIMES} times what there is room for: {case.name}")
        stage.empty_store()
        with stage.gateway(more=case.config(room), upstream=case.upstream(room)) as gateway:
            if not case.lag:
                _fill(stage, gateway)
            stage.set_pace(_GAP_S, _GAP_S)
            # By Little's law so many come in a second where so many run at a time.
            rate_per_s = room / _STREAM_S
            calm = _arrive(stage, extent, gateway, rate_per_s * _CALM, hits=case.hits)
            full = _arrive(stage, extent, gateway, rate_per_s * TIMES, hits=case.hits)
        if case.name in LIMITS and not full["refused"]:
            raise BenchFailed(f"nobody was refused at {TIMES} times what there is room for: {case.name}")
        figures[figure(case.name)] = {"gateway": full, "bare": calm}
    stage.empty_store()
    return [figures]


def _fill(stage: Stage, server: Server) -> None:
    stage.set_pace(0, 0)
    stage.load(server, Warmup(server.port, tokens=_HIT_TOKENS, requests=PROMPTS))
    time.sleep(_STORED_WITHIN_S)


def _arrive(stage: Stage, extent: Extent, server: Server, rate_per_s: float, *, hits: bool) -> Measured:
    plan = Plan(server.port, rate_per_s, extent.overloaded_s, _TOKENS, hits, stage.upstream.port, _HIT_TOKENS)
    cpu_s, began_s = server.cpu_s(), time.perf_counter()
    with stage.running("arrivals.py", orjson.dumps(asdict(plan)).decode()) as process:
        measured = finish(process, server)
    cpu_after_s = server.cpu_s()
    if cpu_s is not None and cpu_after_s is not None:
        measured["busy"] = (cpu_after_s - cpu_s) / (time.perf_counter() - began_s)
    return measured

"""How well a replay keeps time: how late its frames come, how even its gaps are, and from what rate on it falls behind."""

import math
from collections.abc import Callable

from figures import Extent, Figures, Say
from load import Plan as Fill
from paced import PROMPTS, Plan
from processes import Server
from stage import Measured, Stage

LATE_MS = 10.0
"""What 99 of 100 frames may be late by."""

Measure = Callable[[float], Measured]


def pace(stage: Stage, extent: Extent, say: Say) -> list[Figures]:
    """One entry a round, and one for the rates at which they fall behind. Raises `BenchFailed`."""
    measurements: list[Figures] = []
    with stage.gateway() as gateway, stage.bare_upstream() as bare:
        servers = {"gateway": _measure(stage, extent, gateway), "bare": _measure(stage, extent, bare, hits=False)}
        for number in range(extent.rounds):
            say(f"paced replays, round {number + 1} of {extent.rounds}")
            measurements.append({"pace": {name: measure(extent.pace_rate) for name, measure in servers.items()}})
        limits: dict[str, Measured] = {}
        for name, measure in servers.items():
            say(f"{name}: the rate at which it falls behind")
            limits[name] = {"frames_per_s": _limit(measure, extent, say)}
        measurements.append({"pace_limit": limits})
    stage.empty_store()
    return measurements


def _measure(stage: Stage, extent: Extent, server: Server, *, hits: bool = True) -> Measure:
    def measure(rate: float) -> Measured:
        tokens = math.ceil((extent.pace_ramp_s + extent.pace_seconds) * rate) + 4
        if hits:
            stage.set_pace(0, 0)
            stage.load(server, Fill(server.port, requests=PROMPTS, tokens=tokens))
        else:
            stage.set_pace(1 / rate, 1 / rate, server)
        plan = Plan(
            server.port,
            extent.pace_streams,
            rate,
            tokens,
            extent.pace_ramp_s,
            extent.pace_seconds,
            silent_frames=1 if hits else 0,
            hits=hits,
        )
        return stage.paced(server, plan)

    return measure


def _limit(measure: Measure, extent: Extent, say: Say) -> float:
    """The rate of all frames together at which too many are too late: between two that were measured."""
    good, rate, bad = 0.0, extent.pace_rate, math.inf
    for _ in range(extent.pace_steps):
        late_ms = measure(rate)["late_p99_ms"] or 0.0
        say(f"  {extent.pace_streams * rate:,.0f} frames/s: {late_ms:.1f} ms late")
        good, bad = (good, rate) if late_ms > LATE_MS else (rate, bad)
        rate = 2 * good if math.isinf(bad) else (good + bad) / 2
    return extent.pace_streams * (good if math.isinf(bad) else (good + bad) / 2)

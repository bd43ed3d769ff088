"""What is measured of flights: how many calls they save, how soon each reader has a frame, and what a reader costs.

The bare server has none, so there is nothing to compare with.
"""

import os
import select
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack

from figures import FIRST_REQUESTS, Extent, Figures, Say
from load import Plan as Warmup
from processes import BenchFailed, Server
from readers import Plan
from stage import Measured, Stage, finish

REPLICAS = 3

# When a flood's answer comes: while requests still do, so that some join it, here or there, and some find it; and later.
_FLOOD_PACES_S = ((0, 0), (0.2, 0.002), (0.5, 0.005))
_FLOOD_TOKENS = 64
_FOLLOWERS = 8
_FOLLOWED_GAP_S = 0.02
_JOIN_AFTER = 4
# So slow that a core writes each frame to each of the readers before the next one comes.
_CROWD_GAP_S = 0.05
_ALL_READ_WITHIN_S = 20.0
# Of the time to the first token: by then all readers have asked for it.
_ALL_WAIT_AFTER = 0.8
# What the first frames of a new reader take is taken by then.
_SETTLED_WITHIN_S = 0.5


def flights(stage: Stage, extent: Extent, say: Say) -> list[Figures]:
    """One entry a round, and one for the figures that are taken once. Raises `BenchFailed`."""
    with ExitStack() as running:
        replicas = [running.enter_context(stage.gateway()) for _ in range(REPLICAS)]
        leader, other = replicas[:2]
        # The memory first: later the process has some to reuse.
        crowd = _crowd(stage, extent, leader, say)
        flood = _floods(stage, extent, replicas, say)
        measurements: list[Figures] = [{"crowd": {"gateway": crowd}, "flood": {"gateway": flood}}]
        for number in range(extent.rounds):
            say(f"flights, round {number + 1} of {extent.rounds}")
            figures = {
                "local": _followed(stage, extent, leader, leader),
                "remote": _followed(stage, extent, leader, other),
                "fan_out": _fan_out(stage, extent, leader),
            }
            measurements.append({name: {"gateway": measured} for name, measured in figures.items()})
    stage.empty_store()
    return measurements


def _floods(stage: Stage, extent: Extent, replicas: Sequence[Server], say: Say) -> Measured:
    """Identical requests to all replicas at once: the most upstream calls that it ever took."""
    say(f"{extent.flood_requests} identical requests to {len(replicas)} replicas")
    ports = [replica.port for replica in replicas]
    plan = Plan(ports[0], [*ports[1:], ports[0]], extent.flood_requests, _FLOOD_TOKENS, live=False)
    floods = []
    for ttft_s, gap_s in _FLOOD_PACES_S:
        stage.set_pace(ttft_s, gap_s)
        calls = stage.upstream_stats()["calls"]
        measured = _read(stage, replicas[0], plan)
        measured["calls"] = stage.upstream_stats()["calls"] - calls
        floods.append(measured)
    return max(floods, key=lambda measured: measured["calls"] or 0)


def _followed(stage: Stage, extent: Extent, leader: Server, followed_at: Server) -> Measured:
    """How much later than the leader's first reader the followers have each frame."""
    stage.set_pace(_FOLLOWED_GAP_S, _FOLLOWED_GAP_S)
    plan = Plan(leader.port, [followed_at.port], 1 + _FOLLOWERS, extent.followed_tokens, join_after=_JOIN_AFTER)
    return _read(stage, leader, plan)


def _fan_out(stage: Stage, extent: Extent, server: Server) -> Measured:
    """All readers are there before the first token, then it goes as fast as it can. The CPU is that from then on."""
    stage.set_pace(extent.fan_out_ttft_s, 0)
    plan = Plan(server.port, [server.port], extent.readers, extent.fan_out_tokens)
    with stage.running_readers(plan) as process:
        time.sleep(extent.fan_out_ttft_s * _ALL_WAIT_AFTER)
        cpu_s = server.cpu_s()
        measured = finish(process, server)
    return measured | _cpu_a_frame(server, cpu_s, measured)


def _crowd(stage: Stage, extent: Extent, server: Server, say: Say) -> Measured:
    """What memory and time a process takes for the followers of one flight, of which each gets each frame by itself."""
    say(f"{extent.readers} followers of one flight")
    stage.set_pace(0, 0)
    # What the first requests load and cache once belongs to no follower.
    stage.load(server, Warmup(server.port, requests=FIRST_REQUESTS, unique=True))
    stage.set_pace(_CROWD_GAP_S, _CROWD_GAP_S)
    one_mb, _ = _open_followers(stage, extent, server, 1)
    many_mb, measured = _open_followers(stage, extent, server, extent.readers)
    if one_mb is not None and many_mb is not None:
        measured["open_mb"] = many_mb
        measured["follower_kib"] = (many_mb - one_mb) * 1e6 / 1024 / (extent.readers - 1)
    return measured


def _open_followers(stage: Stage, extent: Extent, server: Server, followers: int) -> tuple[float | None, Measured]:
    """The memory while so many followers read, and what they tell at the end."""
    plan = Plan(server.port, [server.port], 1 + followers, extent.crowd_tokens, join_after=_JOIN_AFTER)
    cpu_s = server.cpu_s()
    with stage.running_readers(plan) as process:
        _wait_until_all_read(process)
        time.sleep(_SETTLED_WITHIN_S)
        memory_mb, calls_open = server.memory_mb(), stage.upstream_stats()["open"]
        measured = finish(process, server)
    if not calls_open:
        raise BenchFailed(f"the flight had ended when the memory of {followers} followers was read")
    return memory_mb, measured | _cpu_a_frame(server, cpu_s, measured)


def _wait_until_all_read(process: subprocess.Popen[bytes]) -> None:
    """Or until the readers' process has given up; why, it says at its end. Raises `BenchFailed`."""
    assert process.stdout
    if not select.select([process.stdout], [], [], _ALL_READ_WITHIN_S)[0]:
        raise BenchFailed(f"not all readers have their first frame within {_ALL_READ_WITHIN_S:g} s")
    os.read(process.stdout.fileno(), 1)


def _read(stage: Stage, server: Server, plan: Plan) -> Measured:
    with stage.running_readers(plan) as process:
        return finish(process, server)


def _cpu_a_frame(server: Server, before_s: float | None, measured: Measured) -> Measured:
    """Of each frame to each reader."""
    after_s, frames = server.cpu_s(), measured["all_frames"]
    if before_s is None or after_s is None or not frames:
        return {}
    return {"cpu_us_a_frame": (after_s - before_s) * 1e6 / frames}

"""What is left over once nobody asks any more: tasks, flights, connections, memory, and keys in Redis."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from chaos import Stage
from fleet import PREFIX, RESUME_S, STALE_IF_ERROR_S, STALE_S, TTL_S, Replica, SoakFailed

# Whatever has a life is gone by then; connections that are kept for a next call, too.
QUIET_WITHIN_S = TTL_S + max(STALE_S, STALE_IF_ERROR_S) + RESUME_S + 30.0
# These outlive all answers (`gateway/store/keys.py`).
LASTING_KEYS = frozenset(f"{PREFIX}:{name}" for name in ("secret", "stats", "recent", "purges", "pulse"))
# What nobody holds once all is quiet.
TRANSIENT = ("Flight", "FlightReader", "RecordingReader", "Opened", "Exchange", "Pump", "Recording", "Running")
_ESTABLISHED, _CLOSE_WAIT = "01", "08"
_COUNTED_WITHIN_S = 10.0
# Of what the process has asked for, so much may have come into its caches, which are bounded. What it has from the system
# says less: allocators give back what they like, and a page with one live byte stays.
IN_USE_SLACK_MB = 8.0
BLOCKS_SLACK = 25_000
RESIDENT_SLACK_MB = 64.0
OBJECTS_SLACK = 5000
# `[redis] max_connections`, the bell's, and one that is just being replaced.
STORE_CONNECTIONS = 18


@dataclass(frozen=True)
class Held:
    """What one replica holds."""

    tasks: dict[str, int]
    kinds: dict[str, int]
    flights: list[str]
    """Each with what keeps it."""
    objects: int
    """Those of the garbage collector."""
    blocks: int
    """Pieces of memory that Python has given out, of up to 512 bytes each."""
    in_use_mb: float
    """All that is larger, and what libraries hold: what the C library has given out."""
    callers: int
    """Connections of callers."""
    half_closed: int
    """Connections that the other side has closed, and it has not."""
    store: int
    """Connections to Redis."""
    upstreams: int
    """Connections to upstreams, kept for a next call."""
    descriptors: int
    """All others, and files."""
    resident_mb: float
    """What it has from the system, used or not."""

    @property
    def transient(self) -> dict[str, int]:
        return {name: count for name, count in self.kinds.items() if name in TRANSIENT}

    @property
    def is_quiet(self) -> bool:
        return not (self.transient or self.callers or self.half_closed)


async def held(replica: Replica, store_port: int, upstream_ports: set[int], counts: Path) -> Held:
    """Over all its processes. Raises `SoakFailed`."""
    told = [await _counted(pid, counts) for pid in replica.pids]
    sockets = [each for pid in replica.pids for each in _sockets(pid)]
    store = sum(each.remote_port == store_port for each in sockets)
    upstreams = sum(each.remote_port in upstream_ports for each in sockets)
    return Held(
        tasks=dict(sum((Counter(each["tasks"]) for each in told), Counter())),
        kinds=dict(sum((Counter(each["kinds"]) for each in told), Counter())),
        flights=[flight for each in told for flight in each["flights"]],
        objects=sum(each["objects"] for each in told),
        blocks=sum(each["blocks"] for each in told),
        in_use_mb=round(sum(each["in_use_bytes"] for each in told) / 1e6, 1),
        callers=sum(each.local_port == replica.port and each.state == _ESTABLISHED for each in sockets),
        half_closed=sum(each.state == _CLOSE_WAIT for each in sockets),
        store=store,
        upstreams=upstreams,
        descriptors=sum(len(_descriptors(pid)) for pid in replica.pids) - store - upstreams,
        resident_mb=round(sum(resident_bytes(pid) for pid in replica.pids) / 1e6, 1),
    )


async def _counted(pid: int, counts: Path) -> dict[str, Any]:
    """What `inside/sitecustomize.py` counts."""
    path = counts / f"{pid}.json"
    path.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR2)
    deadline = time.monotonic() + _COUNTED_WITHIN_S
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            told: dict[str, Any] = json.loads(path.read_text())
            return told
        await asyncio.sleep(0.02)
    raise SoakFailed(f"process {pid} does not count what it holds")


class _Socket(NamedTuple):
    local_port: int
    remote_port: int
    state: str


def _sockets(pid: int) -> list[_Socket]:
    """Its TCP connections (proc(5))."""
    own = {link[8:-1] for link in _descriptors(pid) if link.startswith("socket:[")}
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [_Socket(_port(line[1]), _port(line[2]), line[3]) for line in lines if line[9] in own]


def _descriptors(pid: int) -> list[str]:
    links = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(each.readlink()))
    return links


def _port(address: str) -> int:
    return int(address.partition(":")[2], 16)


def resident_bytes(pid: int) -> int:
    """The memory that it has now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def keys_left(stage: Stage) -> dict[str, int]:
    """Keys that should be gone, with their lives in milliseconds."""
    client = stage.redis.client
    names = [name.decode() async for name in client.scan_iter(f"{PREFIX}:*", count=1000)]
    return {name: await client.pttl(name) for name in names if name not in LASTING_KEYS}


async def undying_keys(stage: Stage) -> list[str]:
    """Keys without a life, other than the secret."""
    client = stage.redis.client
    names = [name.decode() async for name in client.scan_iter(f"{PREFIX}:*", count=1000)]
    return [name for name in names if name != f"{PREFIX}:secret" and await client.pttl(name) == -1]


@dataclass
class Left:
    """What is held after a quiet while."""

    replicas: dict[str, Held]
    keys: dict[str, int]
    calls: int
    """Calls that upstreams still answer."""

    @property
    def is_quiet(self) -> bool:
        return not self.keys and not self.calls and all(each.is_quiet for each in self.replicas.values())


async def look(stage: Stage, counts: Path) -> Left:
    """What is held now."""
    replicas = {
        replica.name: await held(replica, wire.port, {model.port for model in stage.models}, counts)
        for replica, wire in zip(stage.replicas, stage.wires, strict=True)
    }
    return Left(replicas, await keys_left(stage), sum(model.running for model in stage.models))


async def once_quiet(stage: Stage, counts: Path, before: Left | None = None) -> tuple[Left, list[str]]:
    """What is held as soon as nothing is left over, and what has grown; or once all patience is at its end."""
    deadline = time.monotonic() + QUIET_WITHIN_S
    while True:
        left = await look(stage, counts)
        grown = growth(before, left, stage.replicas[0].name) if before else []
        if (left.is_quiet and not grown) or time.monotonic() > deadline:
            return left, grown
        await asyncio.sleep(1.0)


def growth(before: Left, after: Left, lasting: str) -> list[str]:
    """What has grown, in words. ``lasting`` is the replica that has been one process all the time."""
    found = [f"{name} lives on for {life_ms} ms in Redis" for name, life_ms in after.keys.items()]
    if after.calls:
        found.append(f"{after.calls} calls are still running at the upstreams")
    tasks = max(sum(each.tasks.values()) for each in before.replicas.values())
    descriptors = max(each.descriptors for each in before.replicas.values())
    for name, now in after.replicas.items():
        found += [f"{name} {what}" for what in _beyond(now, tasks, descriptors)]
    return found + [f"{lasting} {what}" for what in _grown(before.replicas[lasting], after.replicas[lasting])]


def _beyond(now: Held, tasks: int, descriptors: int) -> Iterator[str]:
    """``tasks`` and ``descriptors`` are what a replica may have."""
    if now.transient:
        yield f"holds {now.transient}: {now.flights}"
    if now.callers or now.half_closed:
        yield f"has {now.callers} connections of callers and {now.half_closed} half closed ones"
    if now.store > STORE_CONNECTIONS:
        yield f"has {now.store} connections to Redis"
    if sum(now.tasks.values()) > tasks:
        yield f"has more than {tasks} tasks: {now.tasks}"
    if now.descriptors > descriptors:
        yield f"has {now.descriptors} descriptors, and no replica had more than {descriptors}"


def _grown(before: Held, after: Held) -> Iterator[str]:
    if after.objects > before.objects + OBJECTS_SLACK:
        kinds = Counter(after.kinds) - Counter(before.kinds)
        yield f"has {after.objects} objects, and had {before.objects}; of ours there are more: {dict(kinds)}"
    if after.blocks > before.blocks + BLOCKS_SLACK or after.in_use_mb > before.in_use_mb + IN_USE_SLACK_MB:
        then, now = [f"{each.blocks} blocks and {each.in_use_mb} MB" for each in (before, after)]
        yield f"uses {now}, and used {then}"
    if after.resident_mb > before.resident_mb + RESIDENT_SLACK_MB:
        yield f"takes {after.resident_mb} MB, and took {before.resident_mb}"

"""What a Redis that fails costs those who need none: misses a second, beside a gateway whose cache is off, in turn."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import redis
from figures import Extent, Figures, Say
from load import Plan
from processes import Server, free_port, redis_server, script, server
from stage import Stage

_CONNECTIONS = 16
_TOKENS = 64
_OFF = '[cache]\nmode = "off"\n'

Fault = Callable[[Stage], AbstractContextManager[str]]
"""Yields the URL of a Redis that has it."""


@contextmanager
def _fine(stage: Stage) -> Iterator[str]:
    yield f"unix://{stage.redis_socket}"


@contextmanager
def _refused(_: Stage) -> Iterator[str]:
    yield f"redis://127.0.0.1:{free_port()}"


def _late(*delay_s: float) -> Fault:
    @contextmanager
    def late(stage: Stage) -> Iterator[str]:
        port = free_port()
        with server("late", script("late.py", port, stage.redis_socket, *delay_s), port, stage.cores.others):
            yield f"redis://127.0.0.1:{port}"

    return late


@contextmanager
def _own(stage: Stage, *command: object) -> Iterator[str]:
    """A server of its own, which got a command."""
    directory = Path(mkdtemp(dir=stage.directory))
    with redis_server(directory, stage.cores.others) as path, redis.Redis(unix_socket_path=str(path)) as client:
        client.execute_command(*command)
        yield f"unix://{path}"


FAULTS: dict[str, tuple[str, Fault]] = {
    "fine": ("Redis is well", _fine),
    "refused": ("it refuses connections", _refused),
    "silent": ("it never answers", _late()),
    "late_200": ("it takes 200 ms for each answer", _late(0.2)),
    "late_5000": ("it takes 5 s for each answer", _late(5.0)),
    "read_only": ("it is read-only", lambda stage: _own(stage, "REPLICAOF", "127.0.0.1", free_port())),
    "full": ("it is out of memory", lambda stage: _own(stage, "CONFIG", "SET", "maxmemory", 1)),
}
"""By the name of the figure: what the fault is, and how it is caused."""


def figure(fault: str) -> str:
    return f"outage_{fault}"


def outage(stage: Stage, extent: Extent, say: Say) -> list[Figures]:
    """An entry a round. Raises `BenchFailed`."""
    stage.set_pace(0, 0)
    measurements: list[Figures] = []
    with ExitStack() as running:
        off = running.enter_context(stage.gateway(more=_OFF))
        servers = {
            name: running.enter_context(stage.gateway(running.enter_context(cause(stage)), lookup_timeout_s=0.05))
            for name, (_, cause) in FAULTS.items()
        }
        for number in range(extent.rounds):
            say(f"misses in an outage, round {number + 1} of {extent.rounds}")
            figures: Figures = {}
            for place, (name, gateway) in enumerate(servers.items()):
                figures[figure(name)] = _beside(stage, extent, gateway, off, first=(place + number) % 2 == 0)
            measurements.append(figures)
    return measurements


def _beside(
    stage: Stage, extent: Extent, gateway: Server, off: Server, *, first: bool
) -> dict[str, dict[str, float | None]]:
    """Right after each other, since the machine's speed drifts; which is the first alternates."""
    plan = Plan(0, _CONNECTIONS, True, _TOKENS, unique=True, seconds=extent.seconds, warm_up_s=extent.warm_up_s)
    pairs = [("gateway", gateway), ("bare", off)]
    measured = {}
    for name, target in pairs if first else reversed(pairs):
        measured[name] = stage.load(target, replace(plan, port=target.port))
        stage.empty_store()
    return measured

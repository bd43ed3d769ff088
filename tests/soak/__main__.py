"""The soak: `.venv/bin/python tests/soak [--minutes 10] [--replicas 3] [--seed N] [--json]`.

Replicas of the gateway as processes, a Redis and upstreams of its own; callers of many kinds; and meanwhile everything
breaks that can. Each answer is compared with what it must be; each error must follow from a fault (`excuses.py` says
which); and in the end nothing may be left over. The report goes to standard output, progress to standard error.
"""

import argparse
import asyncio
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

# What the tests share, and the gateway of this tree.
sys.path.insert(1, str(Path(__file__).parents[1]))
sys.path.insert(2, str(Path(__file__).parents[2]))

import aiohttp
import orjson
from attempts import Asker
from callers import Callers
from chaos import Chaos, Stage
from connections import Connector
from fleet import RedisProcess, Replica, SoakFailed, Wire, settings
from journal import Journal
from leftovers import once_quiet, resident_bytes, undying_keys
from models import Model
from report import report, show
from rich.console import Console

_CALLERS = 24
_EACH_S = 5.0
_NOT_IN_LOGS = re.compile(r"Traceback|ERROR|CRITICAL|Unclosed|was never|Exception ignored|closed before it could")


def main() -> int:
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    seed = options.seed if options.seed is not None else random.randrange(10**6)
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        told = asyncio.run(Soak(options, seed, directory).run())
    except SoakFailed as error:
        _say(f"failed: {error} (logs: {directory})")
        return 1
    except KeyboardInterrupt:
        shutil.rmtree(directory, ignore_errors=True)
        return 130
    if options.json:
        print(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode())
    else:
        show(told, Console())
    if not told["passed"]:
        _say(f"the replicas' logs: {directory}")
        return 1
    shutil.rmtree(directory, ignore_errors=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "tests/soak",
        description="Lets replicas of the gateway run under a mixed load while Redis, upstreams, replicas and callers "
        "break, and checks every answer. Exit code 0: all invariants held.",
        epilog="A run of a few seconds: tests/soak --seconds 20 --seed 1",
    )
    long = parser.add_mutually_exclusive_group()
    long.add_argument("--minutes", type=float, default=10.0, help="how long everything breaks (default: %(default)g)")
    long.add_argument("--seconds", type=float, help="the same in seconds")
    parser.add_argument("--replicas", type=_at_least_two, default=3, help="how many, at least 2 (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=_CALLERS, help="how many ask at a time (default: %(default)s)")
    parser.add_argument(
        "--by-number",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="of the streams that are resumed by ?after=n and not by an event id; such a number does not say what was seen, "
        "so that after a fault some may end with stream_diverged (default: %(default)g)",
    )
    parser.add_argument("--seed", type=int, help="of what is asked and of what breaks (default: drawn, and told)")
    parser.add_argument("--json", action="store_true", help="the report as JSON, instead of tables")
    return parser


def _at_least_two(text: str) -> int:
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError("the first replica is never killed, so there must be another one")
    return number


class Soak:
    """One run."""

    def __init__(self, options: argparse.Namespace, seed: int, directory: Path) -> None:
        self._replicas: int = options.replicas
        self._callers: int = options.callers
        self._by_number: float = options.by_number
        self._duration_s: float = options.seconds if options.seconds is not None else options.minutes * 60
        self._seed = seed
        self._directory = directory
        self._counts = directory / "counts"
        self._journal = Journal()

    async def run(self) -> dict[str, Any]:
        """The report. Raises `SoakFailed`."""
        self._counts.mkdir()
        warm_up_s = min(30.0, max(5.0, self._duration_s / 10))
        _say(f"seed {self._seed}: {self._replicas} replicas start")
        async with self._stage() as stage:
            _say(f"warming up for {warm_up_s:g} s, and a quiet while to see what is held then")
            await self._load(stage, warm_up_s, None)
            before, _ = await once_quiet(stage, self._counts)
            _say(f"breaking things for {self._duration_s:g} s")
            pause_s = 1.5 if self._duration_s < 60 else 4.0
            began_at = self._journal.now()
            await self._load(stage, self._duration_s, Chaos(stage, self._journal, self._seed, pause_s))
            minutes = (self._journal.now() - began_at) / 60
            await self._all_answer(stage)
            _say("a quiet while to see what is left over")
            after, grown = await once_quiet(stage, self._counts, before)
            for what in grown:
                self._journal.violate("left over", what)
            await self._end(stage)
        requests = sum(self._journal.outcomes.values())
        about = {"seed": self._seed, "replicas": self._replicas, "minutes": minutes, "requests": requests}
        return report(self._journal, before, after, grown, about)

    @asynccontextmanager
    async def _stage(self) -> AsyncIterator[Stage]:
        async with AsyncExitStack() as stack:
            models = [Model(name, self._journal, self._seed, rate) for name, rate in _MODELS.items()]
            for model in models:
                await model.start()
                stack.push_async_callback(model.stop)
            redis = RedisProcess(self._directory)
            stack.push_async_callback(redis.close)
            await redis.start()
            session = await stack.enter_async_context(aiohttp.ClientSession())
            wires, replicas = [], []
            for number in range(self._replicas):
                wires.append(Wire(redis.socket))
                await wires[-1].start()
                stack.push_async_callback(wires[-1].stop)
                replicas.append(Replica(number, self._directory, settings(wires[-1], models, self._counts), session))
                stack.push_async_callback(_kill, replicas[-1])
            await asyncio.gather(*[replica.start() for replica in replicas])
            yield Stage(redis, wires, replicas, models)

    async def _load(self, stage: Stage, duration_s: float, chaos: Chaos | None) -> None:
        """Callers for a while; with chaos, while everything breaks."""
        connector = Connector(stage.replicas, self._journal.now)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:
            asker = Asker(session, self._journal)
            seed = self._seed * 2 + bool(chaos)
            callers = Callers(asker, session, stage.replicas, self._journal, seed=seed, by_number=self._by_number)
            watch = group.create_task(self._journal.watch())
            load = group.create_task(callers.run(self._callers))
            breaking = group.create_task(chaos.run()) if chaos else None
            await self._watch(stage, duration_s)
            if chaos and breaking:
                chaos.stop()
                await breaking
            callers.stop()
            await load
            watch.cancel()

    async def _watch(self, stage: Stage, duration_s: float) -> None:
        """Tells how it goes, and looks for keys that would live for ever."""
        ends_at = self._journal.now() + duration_s
        while (left_s := ends_at - self._journal.now()) > 0:
            await asyncio.sleep(min(_EACH_S, left_s))
            self._tell(stage, max(0.0, ends_at - self._journal.now()))
            with suppress(Exception):  # it may be away now
                undying = await undying_keys(stage)
                self._journal.check("each key has a life", holds=not undying, detail=str(undying))

    def _tell(self, stage: Stage, left_s: float) -> None:
        journal = self._journal
        requests, excused = sum(journal.outcomes.values()), sum(journal.excused.values())
        faults, violations = sum(journal.injected.values()), sum(journal.violations.values())
        memory_mb = resident_bytes(stage.replicas[0].pids[0]) / 1e6
        counted = f"{requests} requests, {faults} faults, {excused} errors excused, {violations} violations"
        _say(f"{left_s:4.0f} s left: {counted}; {stage.replicas[0].name} takes {memory_mb:.0f} MB")

    async def _all_answer(self, stage: Stage) -> None:
        """All that was broken is whole again."""
        for replica in stage.replicas:
            for path in ("/healthz", "/readyz"):
                status = await replica.status(path)
                self._journal.check(
                    "replicas are well in the end", holds=status in (200, 404), detail=f"{replica.name} {path} {status}"
                )

    async def _end(self, stage: Stage) -> None:
        for replica in stage.replicas:
            code = await replica.end()
            self._journal.check("SIGTERM ends a replica with code 0", holds=code == 0, detail=f"{replica.name}: {code}")
            for line in replica.log.read_text(errors="replace").splitlines():
                if _NOT_IN_LOGS.search(line):
                    self._journal.violate("what should not be in a log", f"{replica.name}: {line}")
        for model in stage.models:
            for error in model.errors:
                raise SoakFailed(f"the upstream {model.name} is broken itself: {error!r}")


_MODELS = {"one": 0.08, "two": 0.08, "own": 0.08, "weak": 0.5}
"""The deployments, and the share of their calls that fail."""


async def _kill(replica: Replica) -> None:
    if replica.process:
        await replica.kill()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

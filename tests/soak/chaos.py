"""What breaks, and when: drawn from the seed, in three lanes that do not wait for each other."""

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from fleet import LEASE_S, RedisProcess, Replica, SoakFailed, Wire
from journal import Journal
from models import Model

# Until a replica that is back is found to be so by those who ask it.
_SETTLES_S = 0.5
_SPARED = 0
"""This replica is never ended, so that what it holds can be compared with what it held."""

Break = Callable[[], Awaitable[None]]


class Stage(NamedTuple):
    """All that can be broken."""

    redis: RedisProcess
    wires: list[Wire]
    replicas: list[Replica]
    models: list[Model]


class Chaos:
    """Breaks things until it is stopped; whatever it has broken by then it mends."""

    def __init__(self, stage: Stage, journal: Journal, seed: int, pause_s: float) -> None:
        self._stage = stage
        self._journal = journal
        self._pause_s = pause_s
        self._stop = asyncio.Event()
        self._lanes: dict[str, list[tuple[int, Break]]] = {
            "replicas": [
                (4, self._kill),
                (2, self._roll),
                (3, self._freeze_replica),
                (3, self._cut_wire),
                (3, self._silence_wire),
            ],
            "redis": [
                (3, self._freeze_redis),
                (2, self._empty_redis),
                (2, self._restart_redis),
                (2, self._refuse_writes),
            ],
            "upstreams": [
                (3, self._take_away_one),
                (1, self._take_away_all),
                (3, self._cut_upstream),
            ],
        }
        self._draws = {name: random.Random(f"{name} {seed}") for name in self._lanes}
        self._draw = random.Random(f"chaos {seed}")

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for name in self._lanes:
                group.create_task(self._lane(name))

    def stop(self) -> None:
        self._stop.set()

    async def _lane(self, name: str) -> None:
        draw, lane = self._draws[name], self._lanes[name]
        weights, breaks = zip(*lane, strict=True)
        while not await self._stopped(self._pause_s * (0.5 + draw.random())):
            [break_it] = draw.choices(breaks, weights)
            await break_it()

    async def _stopped(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self._stop.wait()
        except TimeoutError:
            return False
        return True

    # Replicas

    def _mortal(self) -> Replica:
        return self._draw.choice(self._stage.replicas[_SPARED + 1 :])

    async def _kill(self) -> None:
        replica = self._mortal()
        with self._journal.fault("killed", replica.name, _SETTLES_S):
            await replica.kill()
            await asyncio.sleep(self._draw.uniform(0.1, 1.5))
            await replica.start()

    async def _roll(self) -> None:
        """Ends and restarts them one after the other, as an update does."""
        for replica in self._stage.replicas[_SPARED + 1 :]:
            with self._journal.fault("ended", replica.name, _SETTLES_S):
                code = await replica.end()
                self._journal.check("SIGTERM ends a replica with code 0", holds=code == 0, detail=f"{replica.name}: {code}")
                await replica.start()

    async def _freeze_replica(self) -> None:
        replica = self._draw.choice(self._stage.replicas)
        with self._journal.fault("frozen", replica.name):
            replica.signal(signal.SIGSTOP)
            await asyncio.sleep(self._draw.uniform(0.3, 1.6 * LEASE_S))
            replica.signal(signal.SIGCONT)

    async def _cut_wire(self) -> None:
        place, wire = self._wire()
        with self._journal.fault("wire cut", place):
            wire.cut()
            await asyncio.sleep(self._draw.uniform(0.0, 2.0))
            wire.mend()

    async def _silence_wire(self) -> None:
        place, wire = self._wire()
        with self._journal.fault("wire silent", place):
            wire.swallow()
            await asyncio.sleep(self._draw.uniform(0.2, 1.6 * LEASE_S))
            wire.mend()

    def _wire(self) -> tuple[str, Wire]:
        place = self._draw.randrange(len(self._stage.wires))
        return self._stage.replicas[place].name, self._stage.wires[place]

    # Redis

    async def _freeze_redis(self) -> None:
        with self._journal.fault("Redis frozen"):
            self._stage.redis.signal(signal.SIGSTOP)
            await asyncio.sleep(self._draw.uniform(0.1, 1.6 * LEASE_S))
            self._stage.redis.signal(signal.SIGCONT)

    async def _empty_redis(self) -> None:
        with self._journal.fault("Redis killed"):
            self._stage.redis.forget()
            await self._kill_redis()

    async def _restart_redis(self) -> None:
        """It comes back with what it had."""
        with self._journal.fault("Redis killed"):
            await self._stage.redis.save()
            await self._kill_redis()

    async def _kill_redis(self) -> None:
        self._stage.redis.kill()
        await asyncio.sleep(self._draw.uniform(0.0, 2.0))
        await self._stage.redis.start()

    async def _refuse_writes(self) -> None:
        client = self._stage.redis.client
        with self._journal.fault("Redis read-only"):
            await client.config_set("min-replicas-to-write", 1)
            await asyncio.sleep(self._draw.uniform(0.2, 3.0))
            await client.config_set("min-replicas-to-write", 0)

    # Upstreams

    async def _take_away_one(self) -> None:
        await self._take_away([self._draw.choice(self._stage.models)])

    async def _take_away_all(self) -> None:
        await self._take_away(self._stage.models)

    async def _take_away(self, models: list[Model]) -> None:
        # Who was ejected, or is being waited for, is asked again a little later.
        with self._journal.fault("upstream away", " ".join(model.name for model in models), _SETTLES_S):
            for model in models:
                model.close()
            await asyncio.sleep(self._draw.uniform(0.2, 2.0))
            for model in models:
                await _listen(model)

    async def _cut_upstream(self) -> None:
        model = self._draw.choice(self._stage.models)
        with self._journal.fault("upstream away", model.name, _SETTLES_S):
            model.cut()


async def _listen(model: Model) -> None:
    for _ in range(100):
        try:
            await model.start()
        except OSError:
            await asyncio.sleep(0.05)
        else:
            return
    raise SoakFailed(f"the port of the upstream {model.name} is taken")

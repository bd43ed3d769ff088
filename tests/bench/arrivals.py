"""Streams that are asked for at a steady rate, whether the earlier ones have ended or not, beside hits, one after the other:
a process of its own, which runs one `Plan`, given as JSON, and prints what it measured as JSON.

Each stream has a connection of its own, as a flood of callers has. An answer that is neither a whole stream nor a refusal
with ``Retry-After`` ends the run, with a word on standard error and exit code 1.
"""

import asyncio
import random
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, pairwise

import orjson
import uvloop
from load import END_OF_CHUNKS, EXTRA_FRAMES, LENGTH, PROMPTS, WrongAnswer, percentile, request_bytes
from load import Plan as Prompt

_PATIENCE_S = 60.0
_EVERY_S = 0.02
_REFUSALS = (b"HTTP/1.1 503 ", b"HTTP/1.1 429 ")
_RETRY_AFTER = re.compile(rb"\r\nretry-after: *[1-9]", re.IGNORECASE)


@dataclass(frozen=True)
class Plan:
    """How many come, for how long, and what they ask for."""

    port: int
    rate_per_s: float
    seconds: float
    tokens: int
    hits: bool
    """Whether hits are asked for, too, at the same time."""
    upstream: int
    """The port of the upstream: how long that takes for next to nothing tells what the machine adds to all figures."""
    hit_tokens: int = 64
    ends_within_s: float = _PATIENCE_S


class Caller(asyncio.Protocol):
    """One connection, one request."""

    def __init__(self, request: bytes) -> None:
        self.began_s = time.perf_counter()
        self.arrived_s: list[float] = []
        """When each event came."""
        self.ended_s = 0.0
        self.received = bytearray()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._ends_at: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        transport.write(self._request)

    def connection_lost(self, _error: Exception | None) -> None:
        self._end()

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        in_head = b"\r\n\r\n" not in self.received
        cut_in_two = data.startswith(b"\n") and self.received.endswith(b"\n")
        if events := data.count(b"\n\n") + cut_in_two:
            self.arrived_s += [now_s] * events
        self.received += data
        if in_head:
            head, blank, _ = self.received.partition(b"\r\n\r\n")
            if blank and (length := LENGTH.search(head)):
                self._ends_at = len(head) + len(blank) + int(length[1])
        if len(self.received) >= self._ends_at if self._ends_at else self.received.endswith(END_OF_CHUNKS):
            self.ended_s = now_s
            self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
            self.transport.close()

    @property
    def is_refused(self) -> bool:
        return self.received.startswith(_REFUSALS)


class Arrivals:
    """All who come, and what became of them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._numbers = count(time.time_ns() // 1000)
        self.callers: list[Caller] = []
        self.hits_s: list[float] = []
        self.pings_s: list[float] = []

    async def run(self) -> None:
        """Raises `WrongAnswer`, `OSError`, and `TimeoutError` where answers stay away."""
        beside = [asyncio.create_task(self._ping())]
        if self._plan.hits:
            beside.append(asyncio.create_task(self._ask_for_hits()))
        draw, loop = random.Random(5), asyncio.get_running_loop()
        asking: list[asyncio.Task[None]] = []
        due_s, end_s = loop.time(), loop.time() + self._plan.seconds
        while due_s < end_s:
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            asking.append(asyncio.create_task(self._ask()))
            due_s += draw.expovariate(self._plan.rate_per_s)
        for task in beside:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        async with asyncio.timeout(self._plan.ends_within_s):
            await asyncio.gather(*asking)

    async def _ask(self) -> None:
        request = request_bytes(Prompt(self._plan.port, tokens=self._plan.tokens), next(self._numbers))
        self.callers.append(await self._answered(request, self._plan.port))

    async def _answered(self, request: bytes, port: int) -> Caller:
        caller = Caller(request)
        await asyncio.get_running_loop().create_connection(lambda: caller, "127.0.0.1", port)
        await caller.ended
        return caller

    async def _ask_for_hits(self) -> None:
        for number in count():
            request = request_bytes(Prompt(self._plan.port, tokens=self._plan.hit_tokens), number % PROMPTS)
            caller = await self._answered(request, self._plan.port)
            if b"gateway; hit" not in caller.received:
                raise WrongAnswer(f"no hit: {bytes(caller.received[:600])!r}")
            self.hits_s.append(caller.ended_s - caller.began_s)
            await asyncio.sleep(_EVERY_S)

    async def _ping(self) -> None:
        while True:
            caller = await self._answered(b"GET /stats HTTP/1.1\r\n\r\n", self._plan.upstream)
            self.pings_s.append(caller.ended_s - caller.began_s)
            await asyncio.sleep(_EVERY_S)

    def measured(self) -> dict[str, float]:
        """Raises `WrongAnswer`."""
        refused = [caller for caller in self.callers if caller.is_refused]
        served = [caller for caller in self.callers if not caller.is_refused]
        for caller in refused:
            if not _RETRY_AFTER.search(caller.received):
                raise WrongAnswer(f"a refusal is {bytes(caller.received)!r}")
        for caller in served:
            if len(caller.arrived_s) != self._plan.tokens + EXTRA_FRAMES:
                raise WrongAnswer(f"an answer has {len(caller.arrived_s)} events: {bytes(caller.received[-600:])!r}")
        # The first event comes together with the second: an upstream's first token is what the head waits for.
        gaps_s = [later - earlier for caller in served for earlier, later in pairwise(caller.arrived_s[2:-2])]
        times = {
            "refused": [caller.ended_s - caller.began_s for caller in refused],
            "gap": gaps_s,
            "hit": self.hits_s,
            "ping": self.pings_s,
            "first": [caller.arrived_s[0] - caller.began_s for caller in served],
        }
        figures: dict[str, float] = {"asked": len(self.callers), "refused": len(refused), "served": len(served)}
        if served:
            ends_s = [caller.ended_s for caller in served]
            figures["served_per_s"] = len(served) / (max(ends_s) - min(caller.began_s for caller in served))
        for name, values in times.items():
            if values:
                for percent in (50, 99):
                    figures[f"{name}_p{percent}_ms"] = percentile(values, percent) * 1000
                figures[f"{name}_max_ms"] = max(values) * 1000
        return figures


async def run(plan: Plan) -> dict[str, float]:
    """Raises `WrongAnswer`, `OSError` and `TimeoutError`."""
    arrivals = Arrivals(plan)
    await arrivals.run()
    return arrivals.measured()


def main() -> None:
    plan = Plan(**orjson.loads(sys.argv[1]))
    try:
        figures = uvloop.run(run(plan))
    except (WrongAnswer, TimeoutError, OSError) as error:
        sys.exit(str(error) or type(error).__name__)
    sys.stdout.write(orjson.dumps(figures).decode())


if __name__ == "__main__":
    main()

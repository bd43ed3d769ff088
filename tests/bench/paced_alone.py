"""How late paced frames are on a core of their own: a process which runs one `Plan`, given as JSON, and prints the figures.

On a machine that does other work the clock on the wall tells of that. Here the clock is the processor time of this process,
and time in which nothing is due is passed over. What runs is the gateway's own pacer, readers and writer, on real sockets
whose other ends another process reads; what it does not have is requests.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import ceil
from types import SimpleNamespace
from typing import Any

import orjson
import uvloop
from aiohttp.http_writer import StreamWriter
from load import percentile
from recordings import recording

from gateway.core.pacing import Pace
from gateway.http.completions import pusher
from gateway.pacer import Pacer
from gateway.reader import Push, RecordingReader

_IDLE_S = 1000.0
_BEGINS_IN_S = 3.0
_TIMER_STEPS_PER_S = 1000


@dataclass(frozen=True)
class Plan:
    streams: int
    rate: float
    seconds: float


class Clock:
    """The processor time that this process has taken, and what was passed over."""

    def __init__(self) -> None:
        self.passed_over_s = 0.0

    def now(self) -> float:
        return time.process_time() + self.passed_over_s

    monotonic = now


class HandPacer(Pacer):
    """One that is rung by hand."""

    def _set(self) -> None:
        pass

    def due_s(self) -> float:
        return self._heap[0][0]

    def ring(self) -> None:
        self._ring()


@asynccontextmanager
async def drain() -> AsyncIterator[int]:
    """The port of a process that reads all that it is sent."""
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, "drain", stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout
        yield int(await process.stdout.readline())
    finally:
        process.kill()
        await process.wait()


async def serve_drain() -> None:
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def run(plan: Plan) -> dict[str, float]:
    clock = Clock()
    pacer, sent_due_s = HandPacer(clock), []
    replayed = recording(ceil(plan.rate * (plan.seconds + 2)) + 8)
    async with drain() as port:
        readers = [_reader(pacer, replayed, plan.rate) for _ in range(plan.streams)]
        transports = [await _connected(port) for _ in readers]
        began_s = clock.now() + _BEGINS_IN_S
        waiting = []
        for number, (reader, transport) in enumerate(zip(readers, transports, strict=True)):
            reader.began_s = began_s + number / plan.streams / plan.rate
            push = _noting(pusher(*_as_answer(transport)), reader, sent_due_s)
            waiting.append(asyncio.ensure_future(reader.next(_IDLE_S, push)))
        await asyncio.sleep(0)
        late_ms, cpu_s = await _rung(pacer, clock, began_s + plan.seconds, sent_due_s)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for transport in transports:
            transport.abort()
    settled = late_ms[len(late_ms) // 5 :]
    return {
        "late_p50_ms": percentile(settled, 50),
        "late_p99_ms": percentile(settled, 99),
        "cpu_us_a_frame": cpu_s * 1e6 / len(late_ms),
    }


async def _rung(pacer: HandPacer, clock: Clock, until_s: float, sent_due_s: list[float]) -> tuple[list[float], float]:
    """How late each frame has left, and the processor time that all took."""
    late_ms: list[float] = []
    cpu_s = time.process_time()
    while clock.now() < until_s:
        if (early_s := pacer.due_s() - clock.now()) > 0:
            clock.passed_over_s += ceil(early_s * _TIMER_STEPS_PER_S) / _TIMER_STEPS_PER_S  # as a timer would
        pacer.ring()
        await asyncio.sleep(0)  # in which the loop writes
        now_s = clock.now()
        late_ms += [(now_s - due_s) * 1000 for due_s in sent_due_s]
        sent_due_s.clear()
    return late_ms, time.process_time() - cpu_s


def _reader(pacer: Pacer, replayed: Any, rate: float) -> RecordingReader:
    return RecordingReader(replayed, None, usage=True, pacer=pacer, pace=Pace("fixed", tokens_per_s=rate))


async def _connected(port: int) -> asyncio.Transport:
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, "127.0.0.1", port)
    return transport


def _as_answer(transport: asyncio.Transport) -> tuple[Any, StreamWriter]:
    """What a handler writes an answer to."""
    protocol: Any = SimpleNamespace(transport=transport)
    writer = StreamWriter(protocol, asyncio.get_running_loop())
    writer.enable_chunking()
    return protocol, writer


def _noting(push: Push, reader: RecordingReader, sent_due_s: list[float]) -> Push:
    def noting(data: bytes) -> bool:
        sent_due_s.append(reader.last_due_s)
        return push(data)

    return noting


def main() -> None:
    if sys.argv[1] == "drain":
        uvloop.run(serve_drain())
    sys.stdout.write(orjson.dumps(uvloop.run(run(Plan(**orjson.loads(sys.argv[1]))))).decode())


if __name__ == "__main__":
    main()

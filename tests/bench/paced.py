"""Readers of paced replays: a process of its own, which runs one `Plan`, given as JSON, and prints what it measured.

A frame is late by how much later it comes than the schedule says, counted from the moment at which its request was
sent: the way there, and the lookup, count too. Any answer that is not as the plan expects ends the run, with a word on
standard error and exit code 1.
"""

import asyncio
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import orjson
import uvloop
from load import END_OF_CHUNKS, EXTRA_FRAMES, WrongAnswer, body, percentile

PROMPTS = 16
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Plan:
    """How many streams there are, and at what rate each is to come."""

    port: int
    streams: int
    rate: float
    tokens: int
    ramp_s: float
    """In which time they begin, one after the other: so their frames are spread over all times."""
    seconds: float
    """How long is measured, once all have begun."""
    silent_frames: int = 1
    """Those before the first token that come with it: 0 where each has a time of its own, as the bare server's have."""
    hits: bool = True


class Reader(asyncio.Protocol):
    """One connection, one request; all is looked at in the end."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sent_s = 0.0
        self.arrivals: list[tuple[float, int]] = []
        """When frames came, and how many."""
        self.head = b""
        self._tail = b""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def connection_lost(self, _error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def ask(self, request: bytes) -> None:
        self.sent_s = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if not self.head:
            self.head, _, data = data.partition(b"\r\n\r\n")
        if frames := data.count(b"\n\n") + (self._tail.endswith(b"\n") and data.startswith(b"\n")):
            self.arrivals.append((now_s, frames))
        self._tail = (self._tail + data)[-len(END_OF_CHUNKS) :]
        if self._tail == END_OF_CHUNKS and not self.ended.done():
            self.ended.set_result(None)

    def tokens(self, plan: Plan) -> list[float]:
        """When each token came. Raises `WrongAnswer`."""
        if not self.head.startswith(b"HTTP/1.1 200 ") or (plan.hits and b"; hit" not in self.head):
            raise WrongAnswer(f"an answer is no hit: {self.head!r}")
        arrived_s = [at_s for at_s, frames in self.arrivals for _ in range(frames)]
        if len(arrived_s) != plan.tokens + EXTRA_FRAMES:
            raise WrongAnswer(f"an answer has {len(arrived_s)} frames, not {plan.tokens + EXTRA_FRAMES}")
        return arrived_s[plan.silent_frames : plan.tokens]


async def run(plan: Plan) -> dict[str, float]:
    """Raises `WrongAnswer`, and `TimeoutError` where answers stay away."""
    loop = asyncio.get_running_loop()
    requests = [_request(plan, number) for number in range(PROMPTS)]
    readers: list[Reader] = []
    for _ in range(plan.streams):
        _, reader = await loop.create_connection(Reader, "127.0.0.1", plan.port)
        readers.append(reader)
    began = loop.time() + 0.1
    for number, reader in enumerate(readers):
        loop.call_at(began + plan.ramp_s * number / plan.streams, reader.ask, requests[number % PROMPTS])
    async with asyncio.timeout(_PATIENCE_S + plan.tokens / plan.rate):
        await asyncio.gather(*[reader.ended for reader in readers])
    for reader in readers:
        reader.transport.close()
    return _measured(plan, readers)


def _request(plan: Plan, number: int) -> bytes:
    data = body(number, streamed=True, tokens=plan.tokens)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{plan.port}\r\nAuthorization: Bearer sk-bench\r\n"
        f"Content-Type: application/json\r\nGateway-Replay: rate={plan.rate:.3f}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def _measured(plan: Plan, readers: list[Reader]) -> dict[str, float]:
    """Of the tokens that were due while all streams were running. Raises `WrongAnswer`."""
    gap_s = 1 / plan.rate
    from_s = max(reader.sent_s for reader in readers) + gap_s
    late_ms: list[float] = []
    gap_errors: list[float] = []
    for reader in readers:
        due = [(reader.sent_s + (place + 1) * gap_s, at_s) for place, at_s in enumerate(reader.tokens(plan))]
        seen = [(due_s, at_s) for due_s, at_s in due if from_s <= due_s <= from_s + plan.seconds]
        late_ms += [(at_s - due_s) * 1000 for due_s, at_s in seen]
        gap_errors += [abs(later - earlier - gap_s) / gap_s for (_, earlier), (_, later) in pairwise(seen)]
    if not gap_errors:
        raise WrongAnswer("no frame was due while all streams were running")
    return {
        "all_frames": sum(frames for reader in readers for _, frames in reader.arrivals),
        "frames_per_s": plan.streams * plan.rate,
        "late_p50_ms": percentile(late_ms, 50),
        "late_p99_ms": percentile(late_ms, 99),
        "late_max_ms": max(late_ms),
        "early_max_ms": -min(late_ms),
        "gap_error_p50_percent": median(gap_errors) * 100,
        "gap_error_p99_percent": percentile(gap_errors, 99) * 100,
    }


def main() -> None:
    plan = Plan(**orjson.loads(sys.argv[1]))
    try:
        figures = uvloop.run(run(plan))
    except (WrongAnswer, TimeoutError, OSError) as error:
        sys.exit(str(error) or type(error).__name__)
    sys.stdout.write(orjson.dumps(figures).decode())


if __name__ == "__main__":
    main()

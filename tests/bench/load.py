"""The load generator: a process of its own, which runs one `Plan`, given as JSON, and prints what it measured as JSON.

Its requests are ready-made bytes, and of an answer it reads no more than tells where it ends and whether it is right.
Any answer that is not as the plan expects ends the run, with a word on standard error and exit code 1.
"""

import asyncio
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, cycle, islice
from statistics import quantiles
from typing import Literal

import orjson
import uvloop

PROMPTS = 64
# Beside its tokens a stream has the role, the finish reason and [DONE].
EXTRA_FRAMES = 3

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
IDENTITY = re.compile(rb'"id":"[^"]*"|"created":\d+')
_CACHE_STATUS = re.compile(rb"\r\ncache-status: *[^;\r]*; *([a-z=]+)", re.IGNORECASE)
_CACHE_STATUS_OF = {"hit": b"hit", "miss": b"fwd=miss"}
END_OF_CHUNKS = b"\r\n0\r\n\r\n"
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Plan:
    """What to send, how often, and what must come back."""

    port: int
    connections: int = 1
    streamed: bool = True
    tokens: int = 64
    unique: bool = False
    """Whether every prompt is a new one, that no cache can know; else there are `PROMPTS`, in turn."""
    requests: int = 0
    """How many to send in all; 0: as many as there is time for."""
    seconds: float = 0.0
    """How long to measure; 0: until all requests are answered."""
    warm_up_s: float = 0.0
    """How long to send before measuring."""
    pause_s: float = 0.0
    """Between an answer and the next request of the same connection."""
    expect: Literal["hit", "miss", "any"] = "any"
    body_bytes: int = 0
    """The length of each answer's body; 0: not known."""


class WrongAnswer(Exception):
    """An answer that is not what the plan expects: whatever was measured says nothing."""


def body(number: int, *, streamed: bool, tokens: int) -> bytes:
    """A chat request of about 600 bytes; those of two numbers differ in nothing else, not even in length."""
    rules = "You help the people who run a web shop. Be brief, name the page that you mean, and admit what you do not know."
    return orjson.dumps({
        "model": "scripted",
        "messages": [
            {"role": "system", "content": rules},
            {"role": "user", "content": "A customer says that the voucher which we sent to her last week is refused."},
            {"role": "assistant", "content": "Vouchers end after thirty days: see the page Vouchers, column Valid until."},
            {"role": "user", "content": f"Order {number:016d}: it is valid until next month. What else can it be?"},
        ],
        "temperature": 0.2,
        "max_tokens": tokens,
        "user": "customer-service-desk-4",
        "stream": streamed,
    })  # fmt: skip


def request_bytes(plan: Plan, number: int) -> bytes:
    data = body(number, streamed=plan.streamed, tokens=plan.tokens)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{plan.port}\r\nAuthorization: Bearer sk-bench\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def requests(plan: Plan) -> Iterator[bytes]:
    if plan.unique:
        # Microseconds: a later run begins at a higher number, and no run sends a million requests a second.
        endless = (request_bytes(plan, number) for number in count(time.time_ns() // 1000))
    else:
        endless = cycle([request_bytes(plan, number) for number in range(PROMPTS)])
    return islice(endless, plan.requests or None)


class Load:
    """What the connections share: the requests that are left, and the tally."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ended = asyncio.get_running_loop().create_future()
        self.all_requests = 0
        self.all_frames = 0
        self._requests = requests(plan)
        self._open = plan.connections
        self._latencies_s: list[float] = []
        self._firsts_s: list[float] = []
        self._began_at = time.perf_counter()
        self._frames_before = 0
        self._is_over = False
        self._measured: dict[str, float] | None = None

    def next_request(self) -> bytes | None:
        return None if self._measured else next(self._requests, None)

    def add(self, latency_s: float, first_s: float) -> None:
        """An answer has come; its first token (or its body, where it is no stream) came ``first_s`` after the request."""
        self.all_requests += 1
        self._latencies_s.append(latency_s)
        self._firsts_s.append(first_s)
        if self._is_over and self._measured is None:
            self.end()

    def begin(self) -> None:
        """Forgets the warm-up."""
        self._latencies_s.clear()
        self._firsts_s.clear()
        self._frames_before = self.all_frames
        self._began_at = time.perf_counter()

    def end(self) -> None:
        """What comes from now on is not counted, but for the first answer where none has come yet; no more is sent."""
        self._is_over = True
        if not self._latencies_s:
            return
        seconds = time.perf_counter() - self._began_at
        self._measured = {
            "requests_per_s": len(self._latencies_s) / seconds,
            "frames_per_s": (self.all_frames - self._frames_before) / seconds,
            "latency_p50_ms": percentile(self._latencies_s, 50) * 1000,
            "latency_p99_ms": percentile(self._latencies_s, 99) * 1000,
            "first_p50_ms": percentile(self._firsts_s, 50) * 1000,
            "first_p99_ms": percentile(self._firsts_s, 99) * 1000,
        }

    def closed(self) -> None:
        self._open -= 1
        if self._open == 0 and not self.ended.done():
            self.ended.set_result(None)

    def fail(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(WrongAnswer(why))

    def result(self) -> dict[str, float]:
        if self._measured is None:
            self.end()
        assert self._measured, "whoever has ended has been answered"
        return {**self._measured, "all_requests": self.all_requests, "all_frames": self.all_frames}


def percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


class Connection(asyncio.Protocol):
    """Sends a request, reads its answer, sends the next; closes when none is left."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._plan = load.plan
        self._closing = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._closing:
            self._load.fail(f"the connection was closed in an answer: {error or 'by the server'}")
        self._load.closed()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._in_body:
            head, blank, data = (self._head + data).partition(b"\r\n\r\n")
            self._head = head
            if not blank:
                return
            self._in_body = True
            self._read_head(head + b"\r\n")
        if data:
            self._read_body(data, now)

    def _ask(self) -> None:
        request = self._load.next_request()
        if request is None:
            self._closing = True
            self._transport.close()
            return
        self._head = self._tail = b""
        self._in_body = False
        self._length: int | None = None
        self._frames = self._received = 0
        self._first_at = 0.0
        self._asked_at = time.perf_counter()
        self._transport.write(request)

    def _read_head(self, head: bytes) -> None:
        length = LENGTH.search(head)
        self._length = int(length[1]) if length else None
        plan, status = self._plan, _CACHE_STATUS.search(head)
        if not head.startswith(b"HTTP/1.1 200 "):
            self._load.fail(f"the answer is {head.splitlines()[0].decode()}")
        elif plan.expect != "any" and (not status or status[1] != _CACHE_STATUS_OF[plan.expect]):
            self._load.fail(f"the answer is no {plan.expect}: {head.decode()}")
        elif plan.body_bytes and self._length != plan.body_bytes:
            self._load.fail(f"the answer has {self._length} bytes, not {plan.body_bytes}")

    def _read_body(self, data: bytes, now: float) -> None:
        self._received += len(data)
        if self._plan.streamed:
            cut_in_two = self._tail.endswith(b"\n") and data.startswith(b"\n")
            frames = data.count(b"\n\n") + cut_in_two
            self._frames += frames
            self._load.all_frames += frames
        if not self._first_at and (self._frames > 1 or not self._plan.streamed):
            self._first_at = now  # the frame before says a role only, and may as well come with this one
        self._tail = (self._tail + data[-len(END_OF_CHUNKS) :])[-len(END_OF_CHUNKS) :]
        if self._tail == END_OF_CHUNKS if self._length is None else self._received >= self._length:
            self._end(now)

    def _end(self, now: float) -> None:
        expected = self._plan.tokens + EXTRA_FRAMES
        if self._plan.streamed and self._frames != expected:
            self._load.fail(f"the answer has {self._frames} frames, not {expected}")
            return
        self._load.add(now - self._asked_at, self._first_at - self._asked_at)
        if self._plan.pause_s:
            asyncio.get_running_loop().call_later(self._plan.pause_s, self._ask)
        else:
            self._ask()


async def run(plan: Plan) -> dict[str, float]:
    """Raises `WrongAnswer`, and `TimeoutError` where answers stay away."""
    loop = asyncio.get_running_loop()
    load = Load(plan)
    for _ in range(plan.connections):
        await loop.create_connection(lambda: Connection(load), "127.0.0.1", plan.port)
    load.begin()
    if plan.seconds:
        loop.call_later(plan.warm_up_s, load.begin)
        loop.call_later(plan.warm_up_s + plan.seconds, load.end)
    async with asyncio.timeout(plan.warm_up_s + plan.seconds + _PATIENCE_S):
        await load.ended
    return load.result()


def main() -> None:
    plan = Plan(**orjson.loads(sys.argv[1]))
    try:
        measured = uvloop.run(run(plan))
    except (WrongAnswer, TimeoutError, OSError) as error:
        sys.exit(str(error) or type(error).__name__)
    sys.stdout.write(orjson.dumps(measured).decode())


if __name__ == "__main__":
    main()

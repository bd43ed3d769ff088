"""Many readers of one answer: a process of its own, which runs one `Plan`, given as JSON, and prints what it measured.

All of them ask for the same, a prompt that nobody has asked for before, and note when each event came, by one clock.
Once all are reading, an empty line goes before the JSON on standard output. Any answer that is not as the plan expects
ends the run, with a word on standard error and exit code 1.
"""

import asyncio
import re
import sys
import time
from dataclasses import dataclass
from hashlib import blake2b
from itertools import cycle, islice

import orjson
import uvloop
from load import END_OF_CHUNKS, EXTRA_FRAMES, IDENTITY, LENGTH, WrongAnswer, percentile, request_bytes
from load import Plan as Prompt

_CACHE_STATUS = re.compile(rb"\r\ncache-status: *([^\r]*)", re.IGNORECASE)
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Plan:
    """Who asks whom, and when."""

    leader: int
    """The port that the first reader asks."""
    followers: list[int]
    """The ports that the others ask, in turn."""
    readers: int
    """How many there are, the first included."""
    tokens: int
    join_after: int = 0
    """How many events the first one has when the others ask; 0: all ask at once."""
    live: bool = True
    """Whether all have to read the running answer; else its recording will do for those who come late."""


class Reader(asyncio.Protocol):
    """One connection, one request. The answer is looked at when all is over, so that looking delays nobody."""

    def __init__(self, mark: int) -> None:
        loop = asyncio.get_running_loop()
        self.marked: asyncio.Future[None] = loop.create_future()
        """Whether ``mark`` events have come."""
        self.ended: asyncio.Future[None] = loop.create_future()
        self.arrived_s: list[float] = []
        """When each event came."""
        self.received = bytearray()
        self._mark = mark
        self._length: int | None = None
        self._in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def connection_lost(self, _error: Exception | None) -> None:
        self._settle(self.marked, self.ended)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        cut_in_two = data.startswith(b"\n") and self.received.endswith(b"\n")
        # Neither a head nor the frame of a chunk has two line feeds in a row.
        if events := data.count(b"\n\n") + cut_in_two:
            self.arrived_s += [now_s] * events
        self.received += data
        if not self._in_body:
            self._read_head()
        if len(self.arrived_s) >= self._mark:
            self._settle(self.marked)
        if len(self.received) >= self._length if self._length else self.received.endswith(END_OF_CHUNKS):
            self._settle(self.marked, self.ended)

    def _read_head(self) -> None:
        head, blank, _ = self.received.partition(b"\r\n\r\n")
        self._in_body = bool(blank)
        if blank and (length := LENGTH.search(head)):
            self._length = len(head) + len(blank) + int(length[1])

    @staticmethod
    def _settle(*futures: "asyncio.Future[None]") -> None:
        for future in futures:
            if not future.done():
                future.set_result(None)


@dataclass(frozen=True)
class Answer:
    """What a reader has got. ``came_from``: "hit", "miss" or "collapsed"; ``digest``: of the body without its identity."""

    came_from: str
    length: int
    digest: bytes

    @classmethod
    def of(cls, reader: Reader, tokens: int) -> "Answer":
        """Raises `WrongAnswer`."""
        head, _, body = bytes(reader.received).partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise WrongAnswer(f"an answer is {bytes(reader.received[:500])!r}")
        if len(reader.arrived_s) != tokens + EXTRA_FRAMES:
            raise WrongAnswer(
                f"an answer has {len(reader.arrived_s)} events, not {tokens + EXTRA_FRAMES}; its end is {body[-300:]!r}"
            )
        status = _CACHE_STATUS.search(head)
        words = status[1].split(b"; ") if status else []
        came_from = "hit" if b"hit" in words else "collapsed" if b"collapsed" in words else "miss"
        if not LENGTH.search(head):
            body = _joined(body)
        # A recording is told under a new identity; nothing else may differ.
        return cls(came_from, len(body), blake2b(IDENTITY.sub(b"", body)).digest())


def _joined(chunks: bytes) -> bytes:
    """A chunked body in one piece. Raises `WrongAnswer`."""
    pieces, at = [], 0
    try:
        while size := int(chunks[at : (line_end := chunks.index(b"\r\n", at))], 16):
            at = line_end + 2 + size + 2
            pieces.append(chunks[line_end + 2 : at - 2])
    except ValueError:
        raise WrongAnswer(f"an answer's chunks end at {at} of {len(chunks)} bytes: {chunks[at : at + 20]!r}") from None
    return b"".join(pieces)


async def run(plan: Plan) -> list[Reader]:
    """All readers with all that came. Raises `TimeoutError` where answers stay away."""
    loop = asyncio.get_running_loop()
    number = time.time_ns() // 1000
    ports = [plan.leader, *islice(cycle(plan.followers), plan.readers - 1)]
    requests = [request_bytes(Prompt(port, tokens=plan.tokens), number) for port in ports]
    readers: list[Reader] = []
    for port in ports:
        mark = 1 if readers else max(1, plan.join_after)
        _, reader = await loop.create_connection(lambda mark=mark: Reader(mark), "127.0.0.1", port)
        readers.append(reader)
    async with asyncio.timeout(_PATIENCE_S):
        readers[0].transport.write(requests[0])
        if plan.join_after:
            await readers[0].marked
        for reader, request in zip(readers[1:], requests[1:], strict=True):
            reader.transport.write(request)
        await asyncio.gather(*[reader.marked for reader in readers])
        sys.stdout.write("\n")
        sys.stdout.flush()
        await asyncio.gather(*[reader.ended for reader in readers])
    for reader in readers:
        reader.transport.close()
    return readers


def measured(plan: Plan, readers: list[Reader]) -> dict[str, float]:
    """Raises `WrongAnswer`."""
    answers = [Answer.of(reader, plan.tokens) for reader in readers]
    if len(lengths := {answer.length for answer in answers}) > 1:
        raise WrongAnswer(f"the answers have different lengths: {sorted(lengths)}")
    if len({answer.digest for answer in answers}) > 1:
        raise WrongAnswer("the answers differ")
    came_from = [answer.came_from for answer in answers]
    counts = {kind: came_from.count(kind) for kind in ("miss", "collapsed", "hit")}
    if plan.live and (counts["miss"], counts["hit"]) != (1, 0):
        raise WrongAnswer(f"not all readers are of one flight: {counts}")
    frames = sum(len(reader.arrived_s) for reader in readers)
    seconds = max(reader.arrived_s[-1] for reader in readers) - min(reader.arrived_s[0] for reader in readers)
    measured = {"all_frames": frames, "frames_per_s": frames / seconds, **counts}
    return {**measured, **_delays(readers)} if plan.join_after else measured


def _delays(readers: list[Reader]) -> dict[str, float]:
    """How much later than the first reader the others have an event that came after their first. Raises `WrongAnswer`."""
    leader, *followers = readers
    delays_ms = [
        (at_s - leader_s) * 1000
        for follower in followers
        for leader_s, at_s in zip(leader.arrived_s, follower.arrived_s, strict=True)
        if leader_s > follower.arrived_s[0]
    ]
    if not delays_ms:
        raise WrongAnswer("no follower was there before the end")
    return {
        "followed_frames": len(delays_ms),
        "delay_p50_ms": percentile(delays_ms, 50),
        "delay_p99_ms": percentile(delays_ms, 99),
        "delay_max_ms": max(delays_ms),
    }


def main() -> None:
    plan = Plan(**orjson.loads(sys.argv[1]))
    try:
        figures = measured(plan, uvloop.run(run(plan)))
    except (WrongAnswer, TimeoutError, OSError) as error:
        sys.exit(str(error) or type(error).__name__)
    sys.stdout.write(orjson.dumps(figures).decode())


if __name__ == "__main__":
    main()

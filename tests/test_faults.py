"""The fault matrix: what breaks × when it breaks, and what each of those concerned must see of it.

`TABLE` is the overview, and complete: a cell that cannot be says why. Each cell is played for real. Three callers share one
upstream call: who began it and a follower read the stream, and one wants the answer whole. Then it is seen what each was
told, whether the answer is stored, how many calls the upstream had, and that nothing is left over. Other tests look closer
at single cells: streams in every shape in `test_streams.py`, retries in `test_resilience.py`, Redis in
`test_redis_faults.py`, replicas in `test_replicas.py`.
"""

import asyncio
import gzip
import json
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import aiohttp
import pytest
from redis.asyncio import Redis
from running import Gateway
from scripted import Asked, chunk, whole_answer
from stores import until
from test_redis_faults import freeze, kill, thaw
from test_replicas import FIRST, PATIENCE_S, SECOND, Caller, Replicas, in_turn, says

by_then = partial(until, within_s=PATIENCE_S)


class Phase(StrEnum):
    HEADERS = "before headers"
    TOKEN = "before first token"
    MIDDLE = "mid-stream"
    END = "at the end"
    REPLAY = "while replaying"


HEADERS, TOKEN, MIDDLE, END, REPLAY = Phase


class Seen(NamedTuple):
    """What a caller was told: the status, all text, whether its end was a good one, and the code of its error."""

    status: int
    text: str = ""
    done: bool = False
    code: str | None = None


@dataclass(frozen=True)
class Cell:
    """What must be seen. ``own`` began the call, ``follower`` joined it; ``whole`` joined it too, and wants no stream."""

    own: Seen | None
    whole: Seen
    follower: Seen
    stored: bool | None
    """None: either, since a write that was on its way to Redis may arrive or not."""
    calls: int
    """Of the upstream, for all three."""
    resumed: Seen | None = None
    """What ``own`` gets when it goes on elsewhere, where it was cut off with a part of its stream."""


@dataclass(frozen=True)
class Never:
    """A cell that cannot be."""

    reason: str


AWAY = "upstream_unreachable or upstream_broke"
"""One or the other: what came just before a connection broke may be lost with it, the head too."""
SAID = "Hello"
"""The whole answer; ``Hel`` of it is said by mid-stream."""
TOLD = {"error": {"message": "Overloaded.", "type": "server_error", "param": None, "code": "overloaded"}}


def good(calls: int = 1, *, stored: bool | None = True, text: str = SAID) -> Cell:
    """Nobody notices."""
    seen = Seen(200, text, done=True)
    return Cell(seen, seen, seen, stored, calls)


def refused(status: int, code: str | None, calls: int = 2) -> Cell:
    """All are told by the status. What may help is tried once more, so that there are two calls."""
    seen = Seen(status, code=code)
    return Cell(seen, seen, seen, stored=False, calls=calls)


def broken(code: str | None, status: int = 502, text: str = "Hel") -> Cell:
    """Streams end with an error event, without [DONE]; who has nothing yet is told by the status. There is one call only."""
    seen = Seen(200, text, code=code)
    return Cell(seen, Seen(status, code=code), seen, stored=False, calls=1)


def left(cell: Cell) -> Cell:
    """The one who began it has gone; nobody else notices."""
    return replace(cell, own=None)


def lost(own: Seen, rest: str | None = None, calls: int = 2) -> Cell:
    """The replica is gone that ran the call, or replayed. Another one goes on, where it was."""
    return replace(good(calls), own=own, resumed=None if rest is None else Seen(200, rest, done=True))


REPLAYED = good(calls=0)
NO_LATER = Never("there is no connection, so it has no later")
SPENT = Never("the status is spent once the head has come")
AT_FIRST = Never("what kind of answer it is, its head says")
HAS_ENDED = Never("the answer has ended by then: it is what MIDDLE shows, or no fault")


# Upstreams. Each gets the connection at its phase, with all that came before sent


async def resets(asked: Asked, _: Phase) -> None:
    asked.reset()


async def hangs_up(asked: Asked, _: Phase) -> None:
    asked.writer.close()


async def closes_cleanly(asked: Asked, phase: Phase) -> None:
    if phase is HEADERS:
        await asked.head()
    await asked.end()


async def stalls(asked: Asked, _: Phase) -> None:
    await asked.gone.wait()


async def trickles(asked: Asked, phase: Phase) -> None:
    """A byte at a time: no silence, so no time-out."""
    if phase is HEADERS:
        await asked.head()
    for byte in after(phase):
        await asked.send(bytes([byte]))
        await asyncio.sleep(0)
    await asked.end()


def refuses(status: int, **headers: str) -> "Act":
    async def act(asked: Asked, _: Phase) -> None:
        await asked.answer(TOLD, status, **headers)

    return act


async def reports_an_error(asked: Asked, phase: Phase) -> None:
    if phase is HEADERS:
        await asked.head()
    await asked.event(TOLD)
    await asked.end()


async def errs_as_200(asked: Asked, _: Phase) -> None:
    await asked.answer(TOLD)


async def sends_a_page(asked: Asked, _: Phase) -> None:
    await asked.answer(b"<html>Log in</html>", content_type="text/html")


async def sends_json(asked: Asked, _: Phase) -> None:
    await asked.answer(whole_answer(SAID))


async def cuts_json(asked: Asked, phase: Phase) -> None:
    if phase is HEADERS:
        await asked.answer(b'{"id": "x", "choi')
        return
    await asked.send(b'data: {"id": "x", "choi\n\n')
    await asked.end()


async def omits_done(asked: Asked, _: Phase) -> None:
    await asked.end()


async def omits_the_reason(asked: Asked, _: Phase) -> None:
    await asked.event(chunk({"content": "lo"}))
    await asked.done()


async def sends_garbage(asked: Asked, phase: Phase) -> None:
    if phase is HEADERS:
        await asked.raw(b"\x00\xff\xfegarbage\r\n\r\n")
    else:
        await asked.raw(b"zz\r\n\x00\xff\xfegarbage\r\n")
    asked.writer.close()


async def sends_garbage_events(asked: Asked, phase: Phase) -> None:
    if phase is HEADERS:
        await asked.head()
    await asked.send(b"\xff\xfe\x00\n\ndata: \xff\xfe\n\n")
    await asked.end()


async def compresses(asked: Asked, _: Phase) -> None:
    await asked.head(content_encoding="gzip")
    await asked.send(gzip.compress(after(HEADERS)))
    await asked.end()


async def compresses_half(asked: Asked, _: Phase) -> None:
    await asked.head(content_encoding="gzip")
    await asked.send(gzip.compress(after(HEADERS))[:60])
    await asked.end()


BIG = "x" * 1_000_000


async def sends_a_megabyte(asked: Asked, phase: Phase) -> None:
    if phase is HEADERS:
        await asked.head()
    await asked.event(chunk({"content": BIG}))
    await asked.event(chunk({}, "stop"))
    await asked.done()


async def never_ends(asked: Asked, phase: Phase) -> None:
    if phase is HEADERS:
        await asked.head()
    while not asked.gone.is_set():
        await asked.event(chunk({"content": ""}))
        await asyncio.sleep(0.005)


def after(phase: Phase) -> bytes:
    """What is still to be said."""
    events = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "Hel"}),
        chunk({"content": "lo"}),
        chunk({}, "stop"),
    ]
    told = {HEADERS: 0, TOKEN: 1, MIDDLE: 2, END: 4}[phase]
    return b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events[told:]) + b"data: [DONE]\n\n"


async def goes_on(asked: Asked, phase: Phase) -> None:
    """As if nothing had happened: the fault is another's."""
    if phase is HEADERS:
        await asked.head()
    await asked.send(after(phase))
    await asked.end()


Act = Callable[[Asked, Phase], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """What is done to whom at a phase. ``upstream`` does it itself, ``cause`` is done beside it, and ``mend`` afterwards."""

    upstream: Act = goes_on
    cause: Callable[["Play"], Awaitable[None]] | None = None
    mend: Callable[["Play"], Awaitable[None]] | None = None
    sections: dict[str, Any] = field(default_factory=dict)
    needs_redis: bool = False
    needs_replicas: bool = False
    listens: bool = True


# Callers


async def leaves(play: "Play") -> None:
    await play.callers[0].leave()


async def stops_reading(play: "Play") -> None:
    play.callers[0].pause()


async def closes_its_half(play: "Play") -> None:
    play.callers[0].close_half()


# Redis


async def kills_redis(play: "Play") -> None:
    kill(play.redis)


async def restarts_redis(play: "Play") -> None:
    play.redis.start()
    await until(lambda: play.gateway.store.available)


async def freezes_redis(play: "Play") -> None:
    freeze(play.redis)


async def thaws_redis(play: "Play") -> None:
    thaw(play.redis)
    await until(lambda: play.gateway.store.available)


async def forbids_writes(play: "Play") -> None:
    async with Redis.from_url(play.redis.url) as client:
        await client.replicaof("127.0.0.1", 1)


async def allows_writes(play: "Play") -> None:
    async with Redis.from_url(play.redis.url) as client:
        await client.replicaof("NO", "ONE")
    await until(lambda: play.gateway.store.available)


# Replicas: ``own`` asks the one that breaks, ``follower`` and ``whole`` another one


async def kills_replica(play: "ReplicasPlay") -> None:
    play.replicas.kill(0)


async def shuts_replica_down(play: "ReplicasPlay") -> None:
    await play.replicas.terminate(0)


# The table

QUIET = {"flights": {"first_byte_timeout_s": 0.7, "idle_timeout_s": 0.7}}
SHORT = {"flights": {"total_timeout_s": 1.0}}
PACED = {"replay": {"pace": "fixed", "frames_per_s": 20.0}}
IMPATIENT = {"server": {"write_timeout_s": 0.2}}
REDIS = {"redis": {"lookup_timeout_s": 0.3, "command_timeout_s": 0.5, "connect_timeout_s": 0.5, "cooldown_s": 0.1}}

FAULTS: dict[str, Fault] = {
    "the upstream refuses the connection": Fault(listens=False),
    "it resets": Fault(resets),
    "it hangs up": Fault(hangs_up),
    "it closes cleanly": Fault(closes_cleanly),
    "it falls silent": Fault(stalls, sections=QUIET),
    "it trickles": Fault(trickles),
    "it refuses with 400": Fault(refuses(400)),
    "it refuses with 401": Fault(refuses(401)),
    "it refuses with 500": Fault(refuses(500)),
    "it refuses with 503": Fault(refuses(503)),
    "it refuses with 429 and a short Retry-After": Fault(refuses(429, retry_after="0")),
    "it refuses with 429 and a long Retry-After": Fault(refuses(429, retry_after="3600")),
    "it sends an error as a 200": Fault(errs_as_200),
    "it sends an error event": Fault(reports_an_error),
    "it sends a page": Fault(sends_a_page),
    "it sends JSON in place of a stream": Fault(sends_json),
    "it cuts JSON in half": Fault(cuts_json),
    "it omits [DONE]": Fault(omits_done),
    "it omits the finish reason": Fault(omits_the_reason),
    "it sends garbage": Fault(sends_garbage),
    "it sends events of garbage": Fault(sends_garbage_events),
    "it compresses": Fault(compresses),
    "it compresses, and breaks off": Fault(compresses_half),
    "it sends a frame of a megabyte": Fault(sends_a_megabyte),
    "it never ends": Fault(never_ends, sections=SHORT),
    "the caller leaves": Fault(cause=leaves, sections=PACED),
    "the caller stops reading": Fault(sends_a_megabyte, cause=stops_reading, sections=IMPATIENT),
    "the caller closes its half": Fault(cause=closes_its_half, sections=PACED),
    "Redis is killed": Fault(cause=kills_redis, mend=restarts_redis, sections=REDIS | PACED, needs_redis=True),
    "Redis is frozen": Fault(cause=freezes_redis, mend=thaws_redis, sections=REDIS | PACED, needs_redis=True),
    "Redis is read-only": Fault(cause=forbids_writes, mend=allows_writes, sections=REDIS | PACED, needs_redis=True),
    "the replica is killed": Fault(cause=kills_replica, needs_replicas=True),
    "the replica is shut down": Fault(cause=shuts_replica_down, needs_replicas=True),
}

TABLE: dict[str, dict[Phase, Cell | Never]] = {
    "the upstream refuses the connection": {
        HEADERS: refused(502, "upstream_unreachable", calls=0),
        TOKEN: NO_LATER, MIDDLE: NO_LATER, END: NO_LATER,
    },
    "it resets": {
        HEADERS: refused(502, "upstream_unreachable"),
        TOKEN: refused(502, AWAY),
        MIDDLE: broken("upstream_broke"),
        END: broken("upstream_broke", text=SAID),
    },
    "it hangs up": {
        HEADERS: refused(502, "upstream_unreachable"),
        TOKEN: refused(502, AWAY),
        MIDDLE: broken("upstream_broke"),
        END: broken("upstream_broke", text=SAID),
    },
    "it closes cleanly": {
        HEADERS: refused(502, "upstream_broke"),
        TOKEN: refused(502, "upstream_broke"),
        MIDDLE: broken("upstream_broke"),
        END: good(),
    },
    "it falls silent": {
        HEADERS: refused(504, "upstream_timeout"),
        TOKEN: refused(504, "upstream_timeout"),
        MIDDLE: broken("upstream_timeout", 504),
        END: broken("upstream_timeout", 504, text=SAID),
    },
    "it trickles": {HEADERS: good(), TOKEN: good(), MIDDLE: good(), END: good()},
    "it refuses with 400": {HEADERS: refused(400, "overloaded", calls=1), TOKEN: SPENT, MIDDLE: SPENT, END: SPENT},
    "it refuses with 401": {HEADERS: refused(401, "overloaded", calls=1), TOKEN: SPENT, MIDDLE: SPENT, END: SPENT},
    "it refuses with 500": {HEADERS: refused(500, "overloaded"), TOKEN: SPENT, MIDDLE: SPENT, END: SPENT},
    "it refuses with 503": {HEADERS: refused(503, "overloaded"), TOKEN: SPENT, MIDDLE: SPENT, END: SPENT},
    "it refuses with 429 and a short Retry-After": {
        HEADERS: refused(429, "overloaded"), TOKEN: SPENT, MIDDLE: SPENT, END: SPENT,
    },
    "it refuses with 429 and a long Retry-After": {
        HEADERS: refused(429, "overloaded", calls=1), TOKEN: SPENT, MIDDLE: SPENT, END: SPENT,
    },
    "it sends an error as a 200": {HEADERS: refused(502, "overloaded"), TOKEN: AT_FIRST, MIDDLE: AT_FIRST, END: AT_FIRST},
    "it sends an error event": {
        HEADERS: refused(502, "overloaded"),
        TOKEN: refused(502, "overloaded"),
        MIDDLE: broken("overloaded"),
        END: broken("overloaded", text=SAID),
    },
    "it sends a page": {HEADERS: refused(502, "upstream_broke"), TOKEN: AT_FIRST, MIDDLE: AT_FIRST, END: AT_FIRST},
    "it sends JSON in place of a stream": {HEADERS: good(), TOKEN: AT_FIRST, MIDDLE: AT_FIRST, END: AT_FIRST},
    "it cuts JSON in half": {
        HEADERS: refused(502, "upstream_broke"),
        TOKEN: refused(502, "upstream_broke"),
        MIDDLE: broken("upstream_broke"),
        END: broken("upstream_broke", text=SAID),
    },
    "it omits [DONE]": {HEADERS: HAS_ENDED, TOKEN: HAS_ENDED, MIDDLE: HAS_ENDED, END: good()},
    "it omits the finish reason": {HEADERS: HAS_ENDED, TOKEN: HAS_ENDED, MIDDLE: good(stored=False), END: HAS_ENDED},
    "it sends garbage": {
        HEADERS: refused(502, "upstream_unreachable"),
        TOKEN: refused(502, AWAY),
        MIDDLE: broken("upstream_broke"),
        END: broken("upstream_broke", text=SAID),
    },
    "it sends events of garbage": {
        HEADERS: refused(502, "upstream_broke"),
        TOKEN: refused(502, "upstream_broke"),
        MIDDLE: broken("upstream_broke"),
        END: broken("upstream_broke", text=SAID),
    },
    "it compresses": {HEADERS: good(), TOKEN: AT_FIRST, MIDDLE: AT_FIRST, END: AT_FIRST},
    "it compresses, and breaks off": {
        HEADERS: refused(502, "upstream_broke"), TOKEN: AT_FIRST, MIDDLE: AT_FIRST, END: AT_FIRST,
    },
    "it sends a frame of a megabyte": {
        HEADERS: good(text=BIG), TOKEN: good(text=BIG), MIDDLE: good(text=f"Hel{BIG}"), END: HAS_ENDED,
    },
    "it never ends": {
        HEADERS: broken("upstream_timeout", 504, text=""),
        TOKEN: broken("upstream_timeout", 504, text=""),
        MIDDLE: broken("upstream_timeout", 504),
        END: broken("upstream_timeout", 504, text=SAID),
    },
    "the caller leaves": {
        HEADERS: left(good()), TOKEN: left(good()), MIDDLE: left(good()), END: left(good()), REPLAY: left(REPLAYED),
    },
    "the caller stops reading": {
        HEADERS: left(good(text=BIG)), TOKEN: left(good(text=BIG)), MIDDLE: left(good(text=f"Hel{BIG}")),
        END: HAS_ENDED, REPLAY: left(REPLAYED),
    },
    # As with most servers: whoever says that nothing more comes of it is taken for gone.
    "the caller closes its half": {
        HEADERS: replace(good(), own=Seen(0)),
        TOKEN: replace(good(), own=Seen(0)),
        MIDDLE: replace(good(), own=Seen(200, "Hel")),
        END: replace(good(), own=Seen(200, SAID)),
        REPLAY: left(REPLAYED),
    },
    "Redis is killed": {
        HEADERS: good(stored=False), TOKEN: good(stored=False), MIDDLE: good(stored=False), END: good(stored=False),
        REPLAY: good(calls=0, stored=False),
    },
    "Redis is frozen": {
        HEADERS: good(stored=None), TOKEN: good(stored=None), MIDDLE: good(stored=None), END: good(stored=None),
        REPLAY: REPLAYED,
    },
    "Redis is read-only": {
        HEADERS: good(stored=False), TOKEN: good(stored=False), MIDDLE: good(stored=False), END: good(stored=False),
        REPLAY: REPLAYED,
    },
    "the replica is killed": {
        HEADERS: lost(Seen(0)),
        TOKEN: lost(Seen(0)),
        MIDDLE: lost(Seen(200, "Hel"), "lo"),
        END: lost(Seen(200, SAID), ""),
        REPLAY: lost(Seen(200, "Hel"), "lo", calls=0),
    },
    "the replica is shut down": {
        HEADERS: lost(Seen(503, code="shutting_down")),
        TOKEN: lost(Seen(503, code="shutting_down")),
        MIDDLE: lost(Seen(200, "Hel", code="shutting_down"), "lo"),
        END: lost(Seen(200, SAID, code="shutting_down"), ""),
        REPLAY: lost(Seen(200, "Hel", code="shutting_down"), "lo", calls=0),
    },
}  # fmt: skip
for row in TABLE.values():
    row.setdefault(REPLAY, REPLAYED)  # whatever an upstream does: a replay asks none


# The driver


class Client:
    """A caller on a socket of its own, which it can close by halves, or leave unread."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._raw = b""
        self.task = asyncio.create_task(self._read())

    @classmethod
    async def ask(cls, origin: str, *, streamed: bool) -> "Client":
        host, port = origin.removeprefix("http://").split(":")
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
        body = json.dumps({"model": "model-1", "messages": [{"role": "user", "content": "hi"}], "stream": streamed}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return cls(reader, writer)

    async def _read(self) -> None:
        with suppress(ConnectionError):
            while data := await self._reader.read(65536):
                self._raw += data
        self._writer.close()

    async def leave(self) -> None:
        self._writer.transport.abort()
        await self.task

    def pause(self) -> None:
        self.task.cancel()

    def close_half(self) -> None:
        self._writer.write_eof()

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self._writer.close()

    @property
    def _body(self) -> bytes:
        head, _, rest = self._raw.partition(b"\r\n\r\n")
        if b"chunked" not in head.lower():
            return rest
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        return body

    @property
    def events(self) -> list[str]:
        *blocks, _ = self._body.decode().split("\n\n")
        return [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]

    @property
    def seen(self) -> Seen:
        if not self._raw:
            return Seen(0)
        status = int(self._raw.split()[1])
        if b"text/event-stream" in self._raw.partition(b"\r\n\r\n")[0]:
            return _seen_of_events(status, self.events)
        told = json.loads(self._body)
        if "error" in told:
            return Seen(status, code=told["error"]["code"])
        return Seen(status, told["choices"][0]["message"]["content"], done=True)


def _seen_of_events(status: int, events: list[str]) -> Seen:
    text, code = "", None
    for event in events:
        told = {} if event == "[DONE]" else json.loads(event)
        code = told["error"]["code"] if "error" in told else code
        text += "".join(choice["delta"].get("content") or "" for choice in told.get("choices", ()))
    return Seen(status, text, events[-1:] == ["[DONE]"], code)


class Play:
    """One cell: three callers, and one fault at one phase."""

    def __init__(self, gateway: Gateway, upstream: Any, redis: Any, fault: Fault, phase: Phase) -> None:
        self.gateway = gateway
        self.redis = redis
        self.callers: list[Client] = []
        self._upstream = upstream
        self._fault = fault
        self._phase = phase

    async def live(self) -> Cell:
        self._upstream.script = self._script
        gate = self._upstream.gate("fault")
        if self._fault.listens:
            await self._ask(streamed=True)
            await gate.reached.wait()
            await self._ask(streamed=True)
            await self._ask(streamed=False)
            await by_then(lambda: [flight.readers for flight in self._flights] == [3])
            await by_then(lambda: all(len(caller.events) == _SHOWN[self._phase] for caller in self.callers[:2]))
            await self._cause()
        else:
            self._upstream._server.close()
            for streamed in (True, True, False):
                await self._ask(streamed=streamed)
        gate.released.set()
        return await self._outcome(0)

    async def replay(self) -> Cell:
        """The answer is stored; then the fault comes in the middle of its replay, or is the upstream's for ever."""
        self._upstream.script = partial(goes_on, phase=HEADERS)
        await self.gateway.chat()
        await self.gateway.landed()
        self._upstream.script = self._script
        self._upstream.gate("fault").released.set()
        calls = len(self._upstream.asked)
        for streamed in (True, True, False):
            await self._ask(streamed=streamed)
        if self._fault.cause:
            await by_then(lambda: all(len(caller.events) >= 2 for caller in self.callers[:2]))
            await self._cause()
        return await self._outcome(calls)

    @property
    def _flights(self) -> list[Any]:
        return list(self.gateway.service._flights._by_key.values())

    async def _ask(self, *, streamed: bool) -> None:
        self.callers.append(await Client.ask(self.gateway.origin, streamed=streamed))

    async def _cause(self) -> None:
        if self._fault.cause:
            await self._fault.cause(self)

    async def _script(self, asked: Asked) -> None:
        phase = self._phase
        if phase not in (HEADERS, REPLAY):
            await asked.head()
            await asked.send(after(HEADERS).removesuffix(after(phase)))
        await asked.gate("fault")
        await self._fault.upstream(asked, phase)

    async def _outcome(self, calls_before: int) -> Cell:
        own, follower, whole = self.callers
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(follower.task, whole.task)
            await asyncio.gather(own.task, return_exceptions=True)
        calls = len(self._upstream.asked) - calls_before
        if self._fault.mend:
            await self._fault.mend(self)
        stored = await self.gateway.stores()
        # Nothing is left over: nobody reads any more, no call runs, and who was let go has been let go.
        await by_then(lambda: not self._flights and not self.gateway.service._flights._tasks)
        await by_then(lambda: not self.gateway.service.replays)
        for caller in self.callers:
            await caller.close()
        return Cell(own.seen, whole.seen, follower.seen, stored, calls)


class ReplicasPlay:
    """One cell with replicas as processes: `Replicas` says how they are asked."""

    def __init__(self, replicas: Replicas, upstream: Any, fault: Fault, phase: Phase) -> None:
        self.replicas = replicas
        self._upstream = upstream
        self._fault = fault
        self._phase = phase

    async def play(self) -> Cell:
        replicas, replayed = self.replicas, self._phase is REPLAY
        if replayed:
            self._upstream.script = says(FIRST, "Hel", "lo")
            await replicas.ask(1, stream=False).end()
            await by_then(lambda: replicas.keys("}:rec") != [])
        else:
            self._upstream.script = in_turn(self._first, says(SECOND, "H", "ello"))
        calls = len(self._upstream.asked)
        own = replicas.ask(0, ids=True)
        if not replayed:
            await by_then(lambda: sum(replicas.readers) == 1)
        follower, whole = replicas.ask(1), replicas.ask(1, stream=False)
        if not replayed:
            await by_then(lambda: sum(replicas.readers) == 3)
        for caller in (own,) if replayed else (own, follower):
            await caller.sees({HEADERS: "", TOKEN: "", END: SAID}.get(self._phase, "Hel"))
        assert self._fault.cause
        await self._fault.cause(self)
        for caller in (own, follower, whole):
            await caller.end()
        rest = await replicas.resume(1, own).end() if own.status == 200 else None
        await replicas.hit(1)
        seen = [_seen_of(caller) for caller in (own, whole, follower)]
        return Cell(*seen, stored=True, calls=len(self._upstream.asked) - calls, resumed=rest and _seen_of(rest))

    async def _first(self, asked: Asked) -> None:
        """All that is said before the phase, and nothing more."""
        if self._phase is not HEADERS:
            await asked.head()
            for event in after(HEADERS).removesuffix(after(self._phase)).split(b"\n\n")[:-1]:
                await asked.send(event + b"\n\n")
        await asked.gone.wait()


def _seen_of(caller: Caller) -> Seen:
    if caller.headers.get("Content-Type", "").startswith("text/event-stream"):
        return _seen_of_events(caller.status, caller.events)
    if not caller.body:
        return Seen(caller.status)
    told = caller.json
    return (
        Seen(caller.status, code=told["error"]["code"]) if "error" in told else Seen(caller.status, caller.text, done=True)
    )


_SHOWN = {HEADERS: 0, TOKEN: 0, MIDDLE: 2, END: 4}
"""How many events the callers have at a phase: the head waits for the first token."""
CELLS = [(name, phase) for name, row in TABLE.items() for phase, cell in row.items() if isinstance(cell, Cell)]
IN_PROCESS = [cell for cell in CELLS if not FAULTS[cell[0]].needs_replicas]
IN_REPLICAS = [cell for cell in CELLS if FAULTS[cell[0]].needs_replicas]


@pytest.fixture(autouse=True)
def quick_to_forget(monkeypatch):
    """Answers come from Redis at once, not from the flight that has just ended."""
    monkeypatch.setattr("gateway.flights._LINGER_S", 0.0)


def as_expected(got: Cell, expected: Cell) -> Cell:
    """Without what the cell leaves open."""
    if expected.follower.code == AWAY:
        told = {"upstream_unreachable": AWAY, "upstream_broke": AWAY}
        seen = {name: getattr(got, name) for name in ("own", "whole", "follower")}
        got = replace(got, **{name: each._replace(code=told.get(each.code, each.code)) for name, each in seen.items()})
    own = None if expected.own is None else got.own
    return replace(got, own=own, stored=None if expected.stored is None else got.stored)


@pytest.mark.parametrize(("name", "phase"), IN_PROCESS, ids=[f"{name}, {phase}" for name, phase in IN_PROCESS])
async def test_what_is_seen_of_a_fault(start_gateway, upstream, request, name, phase):
    fault, expected = FAULTS[name], TABLE[name][phase]
    redis = request.getfixturevalue("own_redis") if fault.needs_redis else None
    sections = {**fault.sections, "retries": {"max_retries": 1, "backoff_s": 0.001, "min_per_s": 100.0}}
    if redis:
        sections["redis"] = {**sections["redis"], "url": redis.url}
    gateway = await start_gateway(**sections)
    play = Play(gateway, upstream, redis, fault, phase)
    got = await (play.replay() if phase is REPLAY else play.live())
    assert as_expected(got, expected) == expected


@pytest.mark.slow  # each starts processes; test_replicas.py has the same in the small
@pytest.mark.parametrize(("name", "phase"), IN_REPLICAS, ids=[f"{name}, {phase}" for name, phase in IN_REPLICAS])
async def test_what_is_seen_of_a_replica_that_goes(shared_redis, upstream, tmp_path, name, phase):
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        replicas = Replicas(session, upstream, tmp_path)
        paced = {"replay_pace": "fixed", "replay_frames_per_s": 2.0} if phase is REPLAY else {}
        try:
            await replicas.start(shared_redis, count=2, server_shutdown_grace_s=0, **paced)
            got = await ReplicasPlay(replicas, upstream, FAULTS[name], phase).play()
        finally:
            await replicas.stop()
    assert as_expected(got, TABLE[name][phase]) == TABLE[name][phase]


def test_the_table_is_complete():
    assert TABLE.keys() == FAULTS.keys()
    assert all(row.keys() == set(Phase) for row in TABLE.values())

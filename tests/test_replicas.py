"""Several replicas on one Redis, each a process of its own: one call for all, whoever is killed, hangs or is cut off."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from redis import Redis
from running import RedisServer
from scripted import USAGE, Asked, Script, ScriptedUpstream, chunk
from served import Served, asking
from stores import until

from gateway.store.scripts import READ

# Nobody waits that long: it is what tells a hang from a slow machine.
PATIENCE_S = 15.0
LEASE_S = 0.8
# For the tests in which no lease may run out: whatever goes on then does so for another reason.
LONG_LEASE_S = 30.0
DONE = "[DONE]"
NOBODY: dict[str, str] = {}
ONLY_IF_CACHED = {"Cache-Control": "only-if-cached"}
by_then = partial(until, within_s=PATIENCE_S)


# What the model says


class Hold(str):
    """A gate in what a run says."""

    __slots__ = ()


FIRST = {"id": "chatcmpl-first", "created": 1700000001, "model": "model-1-of-may"}
SECOND = {"id": "chatcmpl-second", "created": 1700000002, "model": "model-1-of-june"}
THIRD = {"id": "chatcmpl-third", "created": 1700000003, "model": "model-1-of-june"}


def says(envelope: dict[str, Any], *words: str) -> Script:
    """A run of the call: a chunk a word, a gate where one says `Hold`."""

    async def script(asked: Asked) -> None:
        await asked.head(x_request_id="req_upstream")
        await asked.event(chunk({"role": "assistant", "content": ""}, **envelope))
        for word in words:
            await (holds(asked, word) if isinstance(word, Hold) else asked.event(chunk({"content": word}, **envelope)))
        await asked.event(chunk({}, "stop", **envelope))
        await asked.event({**chunk({}, **envelope), "choices": [], "usage": USAGE})
        await asked.done()

    return script


async def holds(asked: Asked, gate: str) -> None:
    """Waits for the gate, or until nobody listens any more."""
    waits = [asyncio.ensure_future(each) for each in (asked.gate(gate), asked.gone.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waits:
            each.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
    if asked.gone.is_set():
        raise ConnectionResetError


async def holds_the_head_back(asked: Asked) -> None:
    await holds(asked, "for ever")


async def sends_a_head_only(asked: Asked) -> None:
    await asked.head()
    await holds(asked, "for ever")


def in_turn(*scripts: Script) -> Script:
    """The first call is answered by the first script, and so on; whatever comes after the last, by the last."""
    left = list(scripts)

    async def script(asked: Asked) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(asked)

    return script


# Who asks


class Caller:
    """One answer as its caller gets it, while it comes."""

    def __init__(self, request: "aiohttp.client._RequestContextManager") -> None:
        self.status = 0
        self.headers: Any = NOBODY
        self.body = b""
        self.cut = False
        """Whether the connection broke before the answer had ended."""
        self._task = asyncio.create_task(self._read(request))

    def __repr__(self) -> str:
        return f"<Caller {self.status} cut={self.cut} ended={self.ended} {self.body!r}>"

    async def _read(self, request: "aiohttp.client._RequestContextManager") -> None:
        try:
            async with request as response:
                self.status, self.headers = response.status, response.headers
                async for data in response.content.iter_any():
                    self.body += data
        except (aiohttp.ClientError, ConnectionError):
            self.cut = True

    async def end(self) -> "Caller":
        async with asyncio.timeout(PATIENCE_S):
            await self._task
        return self

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def sees(self, text: str) -> None:
        """Waits for exactly that text."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.text) < len(text):
                assert not self._task.done(), self.body
                await asyncio.sleep(0.002)
        assert self.text == text

    @property
    def ended(self) -> bool:
        return self._task.done()

    @property
    def cache_status(self) -> str:
        return self.headers["Cache-Status"]

    @property
    def stream_id(self) -> str:
        return self.headers["Gateway-Stream-Id"]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def _lines(self, name: bytes) -> list[str]:
        *whole, _ = self.body.split(b"\n\n")
        lines = [line for block in whole for line in block.split(b"\n")]
        return [line.removeprefix(name + b": ").decode() for line in lines if line.startswith(name + b": ")]

    @property
    def events(self) -> list[str]:
        """The data of a stream's events."""
        return self._lines(b"data")

    @property
    def ids(self) -> list[str]:
        return self._lines(b"id")

    @property
    def chunks(self) -> list[dict[str, Any]]:
        parsed = [json.loads(event) for event in self.events if event != DONE]
        return [each for each in parsed if "error" not in each]

    @property
    def text(self) -> str:
        if self.headers.get("Content-Type", "").startswith("application/json"):
            return self.json["choices"][0]["message"]["content"]
        return "".join(each["choices"][0]["delta"].get("content", "") for each in self.chunks if each["choices"])

    @property
    def error(self) -> dict[str, Any]:
        """What it was told at the end: as the last event of a stream, or instead of an answer."""
        if self.headers["Content-Type"].startswith("application/json"):
            return self.json["error"]
        return json.loads(self.events[-1])["error"]

    @property
    def is_whole(self) -> bool:
        """Whether nothing went wrong, as far as this caller can tell."""
        if self.cut or self.status != 200:
            return False
        return self.headers["Content-Type"].startswith("application/json") or self.events[-1] == DONE


class Wire:
    """Stands between one replica and Redis, and can hold back what it says."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._open = asyncio.Event()
        self._open.set()
        self.freezes_at = b""
        """It freezes when this comes, if it is anything."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def freeze(self) -> None:
        """From now on nothing passes, in either direction."""
        self._open.clear()

    def thaw(self) -> None:
        """What was held back passes, and all else."""
        self._open.set()

    async def stop(self) -> None:
        """What was held back is lost."""
        if self._server:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_unix_connection(self._path)
        for source, sink in ((reader, ours), (theirs, writer)):
            task = asyncio.create_task(self._copy(source, sink))
            self._tasks.add(task)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            try:
                while data := await reader.read(65536):
                    if self.freezes_at and self.freezes_at in data:
                        self.freezes_at = b""
                        self.freeze()
                    await self._open.wait()
                    writer.write(data)
            except ConnectionError:
                pass


class Replicas:
    """Some ``gateway serve`` on one Redis, those who ask them, and a look at what is in Redis."""

    def __init__(self, session: aiohttp.ClientSession, upstream: ScriptedUpstream, directory: Path) -> None:
        self.prefix = f"t{os.urandom(6).hex()}"
        self.served: list[Served] = []
        self.wires: list[Wire] = []
        self._session = session
        self._upstream = upstream
        self._directory = directory
        self._callers: list[Caller] = []
        self._redis: Redis | None = None

    async def start(self, redis: RedisServer, count: int = 3, *, wired: bool = False, **settings: Any) -> None:
        """``flights_lease_s=1`` is ``[flights] lease_s``. With ``wired``, the first one reaches Redis by a wire only."""
        values = {
            "flights_lease_s": LEASE_S,
            "redis_prefix": self.prefix,
            "redis_cooldown_s": 0.1,
            "replay_identity": "original",  # so that a hit is, byte for byte, what those saw who were there
            "log_access": "false",
            "log_level": "warning",
            **settings,
        }
        environ = asking(self._upstream, redis, **values)
        self._redis = self._redis or Redis.from_url(redis.url)
        started: list[Served] = []
        urls = [redis.url] * count
        if wired:
            self.wires.append(Wire(redis.url.removeprefix("unix://")))
            await self.wires[0].start()
            urls[0] = self.wires[0].url
        for url in urls:
            started.append(Served(self._directory, wait=False, **environ | {"GATEWAY_REDIS_URL": url}))
            self.served.append(started[-1])
        await asyncio.gather(*[asyncio.to_thread(served.announce) for served in started])

    async def stop(self) -> None:
        """Ends all processes, and fails on what none of them should have said."""
        for caller in self._callers:
            await caller.stop()
        for wire in self.wires:
            await wire.stop()
        for served in self.served:
            with served:
                served.end(signal.SIGKILL)
        if self._redis:
            self._redis.close()
        for served in self.served:
            assert "Traceback" not in served.said
            assert "ERROR" not in served.said

    # Those who ask

    def ask(self, replica: int, *, headers: dict[str, str] = NOBODY, ids: bool = False, **members: Any) -> Caller:
        body = {"model": "model-1", "messages": [{"role": "user", "content": "hi"}], "stream": True, **members}
        if ids:
            headers = {**headers, "Gateway-Event-Ids": "?1"}
        url = f"{self.served[replica].base_url}/chat/completions"
        return self._caller(self._session.post(url, json=body, headers=headers))

    def resume(self, replica: int, caller: Caller, headers: dict[str, str] = NOBODY, *, after: int | None = None) -> Caller:
        """Goes on with what that caller has; ``after`` tells how many events that is, where they have no ids."""
        url = f"{self.served[replica].base_url}/streams/{caller.stream_id}"
        if after is not None:
            return self._caller(self._session.get(url, params={"after": after}, headers=headers))
        return self._caller(self._session.get(url, headers={**headers, "Last-Event-ID": caller.ids[-1]}))

    async def state(self, replica: int, caller: Caller) -> dict[str, Any]:
        url = f"{self.served[replica].base_url}/streams/{caller.stream_id}/status"
        return (await self._caller(self._session.get(url)).end()).json

    async def hit(self, replica: int) -> Caller:
        """What a newcomer gets once the answer is stored: it must not make the model work."""
        await by_then(lambda: self.keys("}:rec") != [])
        hit = await self.ask(replica, headers=ONLY_IF_CACHED).end()
        assert "hit" in hit.cache_status
        return hit

    def _caller(self, request: "aiohttp.client._RequestContextManager") -> Caller:
        caller = Caller(request)
        self._callers.append(caller)
        return caller

    # What happens to replicas

    def kill(self, replica: int) -> None:
        assert self.served[replica].end(signal.SIGKILL) == -signal.SIGKILL

    def signal(self, replica: int, number: int) -> None:
        self.served[replica].process.send_signal(number)

    async def terminate(self, replica: int) -> None:
        """Returns when it has ended by itself: after that it does nothing more to Redis."""
        assert await asyncio.to_thread(self.served[replica].end, signal.SIGTERM) == 0

    # What is in Redis

    @property
    def redis(self) -> Redis:
        assert self._redis
        return self._redis

    def keys(self, what: str = "") -> list[str]:
        return sorted(key.decode() for key in self.redis.scan_iter(f"{self.prefix}:*{what}*", count=1000))

    @property
    def now_s(self) -> float:
        seconds, microseconds = self.redis.time()
        return seconds + microseconds / 1e6

    @property
    def readers(self) -> list[int]:
        """Those of each replica that has any, as they last told each other, some times a lease."""
        told = [value for key in self.keys("}:readers:") for value in self.redis.hvals(key)]
        return sorted(int(value.partition(b":")[0]) for value in told)

    @property
    def mirrored(self) -> list[bytes]:
        """How much of the log each follower has told that it has read, and until when it does not go on alone."""
        return [told for key in self.keys("}:mirrored:") for told in self.redis.hvals(key)]

    @property
    def promised_until_s(self) -> float:
        return max(int(told.partition(b":")[2]) for told in self.mirrored) / 1000

    @property
    def shared(self) -> int:
        """How many frames the log has, if there is one."""
        counts = [self.redis.xrevrange(key, count=1)[0][0].partition(b"-")[0] for key in self.keys("}:log:")]
        return int(counts[0]) if counts else 0

    def kept(self) -> dict[str, Any]:
        """Recordings and logs, as they are now."""
        return {key: self.redis.dump(key) for key in self.keys() if "}:rec" in key or "}:log:" in key}

    def everything(self) -> bytes:
        return b"".join(self.redis.dump(key) or b"" for key in self.keys())

    def evict(self) -> None:
        self.redis.delete(*self.keys())


@pytest.fixture
async def replicas(upstream: ScriptedUpstream, tmp_path: Path) -> AsyncIterator[Replicas]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        replicas = Replicas(session, upstream, tmp_path)
        try:
            yield replicas
        finally:
            await replicas.stop()


def envelopes(*callers: Caller) -> list[dict[str, Any]]:
    """Whose the chunks are that these callers got: no two alike."""
    found = [{name: each[name] for name in FIRST} for caller in callers for each in caller.chunks]
    return [each for place, each in enumerate(found) if each not in found[:place]]


# One call for all


async def test_identical_requests_on_three_replicas_are_one_call_and_one_answer(replicas, shared_redis, upstream):
    await replicas.start(shared_redis)
    upstream.script = says(FIRST, "Hello", Hold("all are there"), " world")
    callers = [replicas.ask(number % 3, stream=number % 2 == 0) for number in range(300)]
    await by_then(lambda: sum(replicas.readers) == 300)
    upstream.gate("all are there").released.set()
    for caller in callers:
        assert (await caller.end()).is_whole
    assert len(upstream.asked) == 1
    bodies = {caller.body for caller in callers}
    assert len(bodies) == 2  # one for streams, one for those who wanted it whole
    assert {caller.text for caller in callers} == {"Hello world"}
    told = [caller.cache_status for caller in callers]
    collapsed = [each for each in told if "; collapsed" in each]
    assert set(collapsed) <= {"gateway; fwd=miss; collapsed", "gateway; fwd=miss; collapsed; stored"}
    assert len(collapsed) == 299
    assert all("fwd=miss" in each for each in told)


# A leader is killed


@pytest.mark.parametrize("begins", [holds_the_head_back, sends_a_head_only], ids=["no-head", "head-only"])
async def test_nobody_else_notices_that_a_leader_is_killed_before_the_first_token(replicas, shared_redis, upstream, begins):
    await replicas.start(shared_redis)
    upstream.script = in_turn(begins, says(SECOND, "Hello", " world"))
    own = replicas.ask(0)
    await by_then(lambda: sum(replicas.readers) == 1)
    followers = [replicas.ask(1 + number % 2, stream=number < 4) for number in range(8)]
    await by_then(lambda: sum(replicas.readers) == 9)
    await by_then(lambda: len(upstream.asked) == 1)
    replicas.kill(0)
    for follower in followers:
        assert (await follower.end()).is_whole
        assert follower.text == "Hello world"
    assert (await own.end()).cut
    assert len(upstream.asked) == 2
    assert envelopes(*followers[:4]) == [SECOND]
    assert (await replicas.hit(1)).body == followers[0].body


async def test_a_stream_goes_on_from_the_exact_character_when_its_leader_is_killed(replicas, shared_redis, upstream):
    await replicas.start(shared_redis)
    upstream.script = in_turn(
        says(FIRST, "Hel", "lo", Hold("kill"), " never"),
        says(SECOND, "H", "ello wo", Hold("resume"), "rl", "d"),
    )
    own, own_numbered = replicas.ask(0, ids=True), replicas.ask(0)
    await own.sees("Hello")
    followers = [
        replicas.ask(1),
        replicas.ask(2, ids=True),
        replicas.ask(2, stream_options={"include_usage": True}),
        replicas.ask(1, stream=False),
    ]
    streams = followers[:3]
    for caller in (own_numbered, *streams):
        await caller.sees("Hello")
    await by_then(lambda: sum(replicas.readers) == 6)
    replicas.kill(0)
    for caller in (own, own_numbered):
        assert (await caller.end()).cut
    for follower in streams:
        await follower.sees("Hello wo")

    live = [replicas.resume(2, own), replicas.resume(1, own_numbered, after=len(own_numbered.events))]
    for caller in live:
        await caller.sees(" wo")
    upstream.gate("resume").released.set()
    for caller in (*followers, *live):
        assert (await caller.end()).is_whole
    assert len(upstream.asked) == 2

    whole_story = streams[0].events
    assert streams[0].text == "Hello world"
    assert streams[1].events == whole_story
    assert [event for event in streams[2].events if '"choices": []' not in event] == whole_story
    assert len(streams[2].events) == len(whole_story) + 1
    assert envelopes(own, *streams, *live) == [FIRST]
    late = [replicas.resume(1, own), replicas.resume(2, own_numbered, after=len(own_numbered.events))]
    for first, *rests in zip((own, own_numbered), live, late, strict=True):
        for rest in rests:
            assert (await rest.end()).is_whole
            assert first.events + rest.events == whole_story

    assert (await replicas.hit(2)).body == streams[0].body
    whole = followers[3].json
    assert whole["choices"][0]["message"]["content"] == "Hello world"
    assert {name: whole[name] for name in FIRST} == FIRST


@pytest.mark.slow
async def test_a_stream_ends_as_it_would_have_when_its_leader_is_killed_after_the_last_token(
    replicas, shared_redis, upstream
):
    async def says_all_but_the_end(asked: Asked) -> None:
        await asked.head()
        for delta, finish in (({"role": "assistant", "content": ""}, None), ({"content": "Hello"}, None), ({}, "stop")):
            await asked.event(chunk(delta, finish, **FIRST))
        await asked.event({**chunk({}, **FIRST), "choices": [], "usage": USAGE})
        await holds(asked, "kill")

    await replicas.start(shared_redis)
    upstream.script = in_turn(says_all_but_the_end, says(SECOND, "Hel", "lo"))
    own = replicas.ask(0, ids=True, stream_options={"include_usage": True})
    await by_then(lambda: len(own.events) == 4)
    follower, other = replicas.ask(1), replicas.ask(2, stream_options={"include_usage": True})
    await by_then(lambda: (len(follower.events), len(other.events)) == (3, 4))
    await by_then(lambda: sum(replicas.readers) == 3)
    replicas.kill(0)
    for caller in (follower, other):
        assert (await caller.end()).is_whole
    assert other.events == [*own.events, DONE]
    assert len(follower.events) == 4
    assert (await replicas.resume(2, own).end()).events == [DONE]
    assert (await replicas.hit(2)).body == follower.body
    assert len(upstream.asked) == 2


@pytest.mark.slow
async def test_a_stream_outlives_one_leader_after_the_other(replicas, shared_redis, upstream):
    await replicas.start(shared_redis)
    upstream.script = in_turn(
        says(FIRST, "Hello", Hold("kill")),
        says(SECOND, "Hel", "lo world", Hold("kill again")),
        says(THIRD, "Hello wor", "ld!"),
    )
    own = replicas.ask(0, ids=True)
    await own.sees("Hello")
    # The third replica reads nothing yet: so it is known who goes on first.
    second = replicas.ask(1, ids=True)
    await second.sees("Hello")
    await by_then(lambda: sum(replicas.readers) == 2)
    replicas.kill(0)
    await second.sees("Hello world")
    third = replicas.ask(2)
    await third.sees("Hello world")
    replicas.kill(1)
    assert (await third.end()).is_whole
    assert third.text == "Hello world!"
    assert envelopes(own, second, third) == [FIRST]
    for first in (own, second):
        rest = await replicas.resume(2, first).end()
        assert first.events + rest.events == third.events
    assert len(upstream.asked) == 3


async def test_a_caller_that_saw_what_was_never_shared_goes_on_where_another_run_says_it_too(
    replicas, shared_redis, upstream
):
    own, numbered, follower = await seen_but_not_shared(
        replicas, shared_redis, upstream, says(SECOND, "H", "ello wo", Hold("resume"), "rld", "!")
    )
    await follower.sees("Hello wo")
    resumed = replicas.resume(2, own)
    await by_then(lambda: resumed.status == 200)  # it waits for what it has seen to be said again
    assert resumed.events == []
    upstream.gate("resume").released.set()
    for caller in (follower, resumed):
        assert (await caller.end()).is_whole
    assert resumed.text == "ld!"
    assert own.text + resumed.text == follower.text == "Hello world!"
    assert envelopes(own, follower, resumed) == [FIRST]
    # What it resumed can be resumed once more, and what has ended too.
    again = await replicas.resume(1, resumed).end()
    assert (again.status, again.body) == (204, b"")
    for replica in (1, 2):
        late = await replicas.resume(replica, own).end()
        assert (late.events, late.ids) == (resumed.events, resumed.ids)
    # A number alone does not tell what was seen of a run that is gone.
    lost = await replicas.resume(1, numbered, after=len(numbered.events)).end()
    assert lost.error["code"] == "stream_diverged"
    assert len(upstream.asked) == 2


async def test_a_caller_that_saw_what_was_never_shared_is_told_where_another_run_says_otherwise(
    replicas, shared_redis, upstream
):
    own, numbered, follower = await seen_but_not_shared(
        replicas, shared_redis, upstream, says(SECOND, "Hello", Hold("resume"), " there", "!")
    )
    resumed = replicas.resume(2, own)
    await by_then(lambda: resumed.status == 200)
    upstream.gate("resume").released.set()
    assert (await follower.end()).is_whole
    assert follower.text == "Hello there!"
    for told in (await resumed.end(), await replicas.resume(1, own).end()):
        assert told.error["code"] == "stream_diverged"
        assert told.chunks == []
        assert DONE not in told.events
    lost = await replicas.resume(1, numbered, after=len(numbered.events)).end()
    assert lost.error["code"] == "stream_diverged"
    assert (await replicas.hit(1)).events == follower.events


async def test_events_of_a_run_that_never_wrote_a_frame_are_not_counted_in_the_run_that_goes_on(
    replicas, shared_redis, upstream
):
    """Else its callers would be shown some of it twice, or not at all."""
    await replicas.start(shared_redis, wired=True, server_head_after_s=0.05)

    async def first(asked: Asked) -> None:
        await holds(asked, "cut off")
        await says(FIRST, "Hello wor", Hold("kill"))(asked)

    upstream.script = in_turn(first, says(SECOND, "H", "ello", " world"))
    own, numbered = replicas.ask(0, ids=True), replicas.ask(0)
    await by_then(lambda: sum(replicas.readers) == 2)
    follower = replicas.ask(1)
    await by_then(lambda: sum(replicas.readers) == 3)
    replicas.wires[0].freeze()
    upstream.gate("cut off").released.set()
    for caller in (own, numbered):
        await caller.sees("Hello wor")
    replicas.kill(0)
    await replicas.wires[0].stop()
    assert (await follower.end()).text == "Hello world"
    for replica in (1, 2):
        rest = await replicas.resume(replica, own).end()
        assert own.text + rest.text == "Hello world"
        lost = await replicas.resume(replica, numbered, after=len(numbered.events)).end()
        assert (lost.error["code"], lost.chunks) == ("stream_diverged", [])
    rest = await replicas.resume(2, follower, after=len(follower.events) - 2).end()
    assert (rest.events, rest.is_whole) == (follower.events[-2:], True)
    await by_then(lambda: replicas.keys("}:rec") != [])
    replicas.redis.delete(*replicas.keys("}:log:"))
    lost = await replicas.resume(2, numbered, after=len(numbered.events)).end()
    assert lost.error["code"] == "stream_diverged"


@pytest.mark.slow
async def test_events_of_a_replica_that_went_on_alone_are_not_counted_in_the_log(replicas, shared_redis, upstream):
    """It could not reach Redis, so it asked the model itself: what its callers saw since then is in no log."""
    await replicas.start(shared_redis, wired=True)
    upstream.script = in_turn(
        says(FIRST, "Hel", Hold("go on"), "l", "o wor", "ld"), says(SECOND, "Hel", "lo", Hold("for ever"))
    )
    leader = replicas.ask(1)
    await leader.sees("Hel")
    numbered = replicas.ask(0)
    await numbered.sees("Hel")
    replicas.wires[0].freeze()
    await numbered.sees("Hello")
    upstream.gate("go on").released.set()
    assert (await leader.end()).text == "Hello world"
    lost = await replicas.resume(2, numbered, after=len(numbered.events)).end()
    assert (lost.error["code"], lost.chunks) == ("stream_diverged", [])


@pytest.mark.slow
@pytest.mark.parametrize("when", ["promptly", "late", "after a leader's end"])
async def test_who_read_from_a_follower_that_was_killed_resumes_by_number(replicas, shared_redis, upstream, when: str):
    """Promptly whatever came, since the follower cannot have gone on alone; late as far as it had told what it has read."""
    await replicas.start(shared_redis, flights_lease_s=LEASE_S if when == "late" else LONG_LEASE_S)
    upstream.script = says(FIRST, "Hel", Hold("follow"), "lo", Hold("kill"), " world")
    leader = replicas.ask(1)
    await leader.sees("Hel")
    numbered = replicas.ask(0)
    await numbered.sees("Hel")
    await by_then(lambda: any(not told.endswith(b":0") for told in replicas.mirrored))
    upstream.gate("follow").released.set()
    await numbered.sees("Hello")
    if when == "late":
        await by_then(lambda: [told.partition(b":")[0] for told in replicas.mirrored] == [b"3"])
    replicas.kill(0)
    seen = len(numbered.events)
    if when == "late":
        await by_then(lambda: replicas.promised_until_s < replicas.now_s)
    if when == "after a leader's end":
        upstream.gate("kill").released.set()
        assert (await leader.end()).is_whole
    rest = replicas.resume(2, numbered, after=seen)
    upstream.gate("kill").released.set()
    assert (await rest.end()).is_whole
    assert rest.text == " world"
    assert numbered.events + rest.events == (await leader.end()).events
    if when == "late":
        beyond = await replicas.resume(1, numbered, after=seen + 1).end()
        assert (beyond.error["code"], beyond.chunks) == ("stream_diverged", [])
    assert len(upstream.asked) == 1


async def seen_but_not_shared(
    replicas: Replicas, redis: RedisServer, upstream: ScriptedUpstream, second: Script
) -> tuple[Caller, Caller, Caller]:
    """The leader is killed when its own two callers, one with event ids, have seen more than it could share."""
    await replicas.start(redis, wired=True, server_head_after_s=0.05)
    upstream.script = in_turn(says(FIRST, "Hello", Hold("cut off"), " w", "or", Hold("kill")), second)
    own, numbered = replicas.ask(0, ids=True), replicas.ask(0)
    await own.sees("Hello")
    follower = replicas.ask(1)
    for caller in (numbered, follower):
        await caller.sees("Hello")
    await by_then(lambda: sum(replicas.readers) == 3)
    replicas.wires[0].freeze()
    upstream.gate("cut off").released.set()
    for caller in (own, numbered):
        await caller.sees("Hello wor")
    replicas.kill(0)
    await replicas.wires[0].stop()
    for caller in (own, numbered):
        assert (await caller.end()).cut
    return own, numbered, follower


async def test_a_stream_ends_with_an_error_where_another_run_says_something_else(replicas, shared_redis, upstream):
    await replicas.start(shared_redis)
    upstream.script = in_turn(says(FIRST, "Hello", Hold("kill")), says(SECOND, "Hel", "p!", " More."))
    own = replicas.ask(0, ids=True)
    await own.sees("Hello")
    streams = [replicas.ask(1), replicas.ask(2), replicas.ask(2, ids=True)]
    wholes = [replicas.ask(1, stream=False), replicas.ask(2, stream=False)]
    for follower in streams:
        await follower.sees("Hello")
    await by_then(lambda: sum(replicas.readers) == 6)
    replicas.kill(0)
    for follower in streams:
        await follower.end()
        assert not follower.cut
        assert follower.error["code"] == "stream_diverged"
        assert follower.text == "Hello"
        assert DONE not in follower.events
    for follower in wholes:  # they were shown nothing that another answer could contradict
        assert (await follower.end()).is_whole
        assert follower.text == "Help! More."
    assert len(upstream.asked) == 3

    for replica in (1, 2):
        state = await replicas.state(replica, streams[0])
        assert (state["state"], state["error"]["code"]) == ("failed", "stream_diverged")
        resumed = await replicas.resume(replica, own).end()
        assert resumed.error["code"] == "stream_diverged"
        assert own.events + resumed.events == streams[0].events
        assert (await replicas.hit(replica)).text == "Help! More."
    assert replicas.keys("}:lease:") == replicas.keys("}:now") == []


@pytest.mark.slow
async def test_a_stream_ends_with_an_error_where_another_run_is_refused(replicas, shared_redis, upstream):
    async def refuses(asked: Asked) -> None:
        await asked.answer({"error": {"message": "Slow down.", "type": "requests", "code": "rate_limited"}}, 429)

    await replicas.start(shared_redis, retries_max_retries=0)
    upstream.script = in_turn(says(FIRST, "Hello", Hold("kill")), refuses)
    own = replicas.ask(0)
    await own.sees("Hello")
    streams = [replicas.ask(1), replicas.ask(2)]
    wholes = [replicas.ask(1, stream=False), replicas.ask(2, stream=False)]
    for follower in streams:
        await follower.sees("Hello")
    await by_then(lambda: sum(replicas.readers) == 5)
    replicas.kill(0)
    for follower in (*streams, *wholes):
        await follower.end()
        assert not follower.cut
        assert follower.error["code"] == "rate_limited"
    for follower in streams:
        assert follower.text == "Hello"
        assert DONE not in follower.events
    assert {follower.status for follower in wholes} == {429}
    for replica in (1, 2):
        assert (await replicas.state(replica, streams[0]))["state"] == "failed"
    assert replicas.keys("}:rec") == []
    assert len(upstream.asked) == 2


# A leader hangs, or is cut off from Redis


@pytest.mark.slow
@pytest.mark.parametrize("words", [(Hold("think"), "Hello"), ("Hel", Hold("think"), "lo")], ids=["at first", "later"])
async def test_a_leader_that_waits_for_the_model_is_not_given_up(replicas, shared_redis, upstream, words):
    async def script(asked: Asked) -> None:
        if words[0] == "think":
            await holds(asked, "think")
        await says(FIRST, *words)(asked)

    await replicas.start(shared_redis, count=2)
    upstream.script = script
    callers = [replicas.ask(0), replicas.ask(1), replicas.ask(1, stream=False)]
    await by_then(lambda: sum(replicas.readers) == 3)
    [lease] = replicas.keys("}:lease:")
    owner, until_s = replicas.redis.get(lease), replicas.now_s + 3 * LEASE_S
    await by_then(lambda: replicas.now_s > until_s)
    assert replicas.redis.get(lease) == owner
    upstream.gate("think").released.set()
    for caller in callers:
        assert (await caller.end()).is_whole
        assert caller.text == "Hello"
    assert len(upstream.asked) == 1


def hang(replicas: Replicas) -> None:
    replicas.signal(0, signal.SIGSTOP)


def wake(replicas: Replicas) -> None:
    replicas.signal(0, signal.SIGCONT)


def cut_off(replicas: Replicas) -> None:
    replicas.wires[0].freeze()


def connect_again(replicas: Replicas) -> None:
    replicas.wires[0].thaw()


Fault = Callable[[Replicas], None]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while another writes", "after another has ended"])
@pytest.mark.parametrize(
    ("fail", "mend"),
    [pytest.param(hang, wake, id="hangs"), pytest.param(cut_off, connect_again, id="loses Redis")],
)
async def test_the_late_writes_of_a_leader_that_was_given_up_change_nothing(
    replicas, shared_redis, upstream, fail: Fault, mend: Fault, when: str
):
    await replicas.start(shared_redis, wired=True)
    late, last = Hold("late"), Hold("last")
    upstream.script = in_turn(
        says(FIRST, "Hello", late, " from", " the", " old", " one"), says(SECOND, "Hello", " the", last, "re")
    )
    own = replicas.ask(0)
    await own.sees("Hello")
    follower = replicas.ask(1)
    await follower.sees("Hello")
    await by_then(lambda: sum(replicas.readers) == 2)
    fail(replicas)
    await follower.sees("Hello the")
    if when == "after another has ended":
        upstream.gate(last).released.set()
        assert (await follower.end()).is_whole
        await by_then(lambda: replicas.keys("}:lease:") == [])
    else:
        await by_then(lambda: replicas.shared == 3)  # a role and two words
    before = replicas.kept()
    upstream.gate(late).released.set()
    mend(replicas)
    assert (await own.end()).is_whole
    assert own.text == "Hello from the old one"  # its own callers see its own run, and only that
    await replicas.terminate(0)
    assert replicas.kept() == before
    upstream.gate(last).released.set()
    assert (await follower.end()).is_whole
    assert follower.text == "Hello there"
    assert (await replicas.hit(2)).body == follower.body
    assert len(upstream.asked) == 2


@pytest.mark.slow
async def test_a_follower_that_was_frozen_for_longer_than_a_lease_reads_on(replicas, shared_redis, upstream):
    """Its read was on its way: the answer lies there when it wakes, and all its timers are due."""
    await replicas.start(shared_redis, count=2, wired=True)
    last = Hold("last")
    upstream.script = in_turn(says(FIRST, "Hello", last, " there"), says(SECOND, "Hello", " from", " another", " call"))
    own = replicas.ask(1)
    await own.sees("Hello")
    follower = replicas.ask(0)
    await follower.sees("Hello")
    await by_then(lambda: sum(replicas.readers) == 2)
    replicas.wires[0].freezes_at = READ.digest.encode()
    await by_then(lambda: not replicas.wires[0].freezes_at)
    hang(replicas)
    connect_again(replicas)
    until_s = replicas.now_s + 2 * LEASE_S
    await by_then(lambda: replicas.now_s > until_s)
    wake(replicas)
    await by_then(lambda: replicas.now_s > until_s + LEASE_S)
    upstream.gate(last).released.set()
    assert (await own.end()).text == (await follower.end()).text == "Hello there"
    assert len(upstream.asked) == 1


# Redis forgets


async def killed_and_restarted(replicas: Replicas, redis: RedisServer, meanwhile: Callable[[], Awaitable[None]]) -> None:
    redis.stop()
    await meanwhile()
    redis.start()


async def evicted(replicas: Replicas, redis: RedisServer, meanwhile: Callable[[], Awaitable[None]]) -> None:
    replicas.evict()
    await meanwhile()
    await by_then(lambda: replicas.shared == 4)  # a role and three words: it is there again, to be lost once more
    replicas.evict()


@pytest.mark.parametrize("forget", [killed_and_restarted, evicted])
async def test_a_stream_survives_that_redis_forgets_it(replicas, own_redis, upstream, forget):
    await replicas.start(own_redis, flights_lease_s=LONG_LEASE_S)
    upstream.script = says(FIRST, "Hel", "lo", Hold("forgotten"), " wor", Hold("back"), "ld")
    own = replicas.ask(0, ids=True)
    await own.sees("Hello")
    follower, whole = replicas.ask(1), replicas.ask(1, stream=False)
    await follower.sees("Hello")
    await by_then(lambda: len(replicas.readers) == 2)

    async def meanwhile() -> None:
        upstream.gate("forgotten").released.set()
        await own.sees("Hello wor")

    await forget(replicas, own_redis, meanwhile)
    upstream.gate("back").released.set()
    for caller in (own, follower, whole):
        assert (await caller.end()).is_whole
        assert caller.text == "Hello world"
    assert follower.events == own.events
    # The log is there anew, from its beginning, for those who have lost their streams.
    for replica in (1, 2):
        for caller in (own, follower):
            again = await replicas.resume(replica, caller, after=0).end()
            assert again.events == own.events
    assert (await replicas.hit(2)).body == follower.body
    assert len(upstream.asked) == 1


@pytest.mark.slow
async def test_a_stream_survives_that_its_leader_and_its_log_are_lost_together(replicas, shared_redis, upstream):
    await replicas.start(shared_redis)
    upstream.script = in_turn(says(FIRST, "Hello", Hold("kill")), says(SECOND, "Hel", "lo wor", "ld"))
    own = replicas.ask(0, ids=True)
    await own.sees("Hello")
    followers = [replicas.ask(1), replicas.ask(2), replicas.ask(1, stream=False)]
    for follower in followers[:2]:
        await follower.sees("Hello")
    await by_then(lambda: sum(replicas.readers) == 4)
    replicas.kill(0)
    replicas.evict()
    for follower in followers:
        assert (await follower.end()).is_whole
        assert follower.text == "Hello world"
    assert envelopes(*followers[:2]) == [FIRST]
    assert len(upstream.asked) == 2
    rest = await replicas.resume(2, own).end()
    assert own.events + rest.events == followers[0].events
    assert (await replicas.hit(2)).body == followers[0].body


@pytest.mark.slow
async def test_streams_survive_that_their_leader_and_redis_are_lost_together(replicas, own_redis, upstream):
    await replicas.start(own_redis)
    upstream.script = in_turn(says(FIRST, "Hello", Hold("kill")), says(SECOND, "Hel", "lo wor", "ld"))
    own = replicas.ask(0)
    await own.sees("Hello")
    followers = [replicas.ask(1), replicas.ask(2), replicas.ask(1), replicas.ask(2, stream=False)]
    for follower in followers[:3]:
        await follower.sees("Hello")
    await by_then(lambda: sum(replicas.readers) == 5)
    own_redis.stop()
    replicas.kill(0)
    for follower in followers:
        assert (await follower.end()).is_whole
        assert follower.text == "Hello world"
    assert envelopes(*followers[:3]) == [FIRST]
    assert len(upstream.asked) == 3  # each replica for its own callers: they cannot know of each other


# A leader is shut down


async def test_a_leader_that_is_shut_down_leaves_its_stream_to_its_followers(replicas, shared_redis, upstream):
    # Were it not for the leader's word, they would wait for its lease.
    await replicas.start(shared_redis, flights_lease_s=LONG_LEASE_S, server_shutdown_grace_s=0)
    upstream.script = in_turn(says(FIRST, "Hello", Hold("shut down")), says(SECOND, "Hel", "lo wor", "ld"))
    own, own_numbered = replicas.ask(0, ids=True), replicas.ask(0)
    await own.sees("Hello")
    followers = [replicas.ask(1), replicas.ask(2), replicas.ask(2, stream=False)]
    for caller in (own_numbered, *followers[:2]):
        await caller.sees("Hello")
    await by_then(lambda: len(replicas.readers) == 3)
    await replicas.terminate(0)
    for caller in (own, own_numbered):
        await caller.end()
        assert not caller.cut
        assert caller.text == "Hello"
        assert caller.error["code"] == "shutting_down"
        assert "resume" in caller.error["message"]
    for follower in followers:
        assert (await follower.end()).is_whole
        assert follower.text == "Hello world"
    seen = len(own.events) - 1  # the error is no place in the stream
    assert len(own.ids) == seen
    for rest in (replicas.resume(2, own), replicas.resume(1, own_numbered, after=seen)):
        assert (await rest.end()).is_whole
        assert own.events[:seen] + rest.events == followers[0].events
    assert envelopes(own, *followers[:2]) == [FIRST]
    assert len(upstream.asked) == 2


@pytest.mark.parametrize("begins", [holds_the_head_back, sends_a_head_only], ids=["no-head", "head-only"])
async def test_nobody_else_notices_that_a_leader_is_shut_down_before_the_first_token(
    replicas, shared_redis, upstream, begins
):
    await replicas.start(shared_redis, flights_lease_s=LONG_LEASE_S, server_shutdown_grace_s=0)
    upstream.script = in_turn(begins, says(SECOND, "Hello", " world"))
    replicas.ask(0)
    await by_then(lambda: sum(replicas.readers) == 1)
    followers = [replicas.ask(1 + number % 2, stream=number < 2) for number in range(4)]
    await by_then(lambda: len(replicas.readers) == 3)
    await by_then(lambda: len(upstream.asked) == 1)
    await replicas.terminate(0)
    for follower in followers:
        assert (await follower.end()).is_whole
        assert follower.text == "Hello world"
    assert envelopes(*followers[:2]) == [SECOND]
    assert len(upstream.asked) == 2


async def test_the_callers_of_a_leader_that_is_shut_down_resume_elsewhere_at_once(replicas, shared_redis, upstream):
    await replicas.start(shared_redis, count=2, flights_lease_s=LONG_LEASE_S, server_shutdown_grace_s=0)
    upstream.script = in_turn(says(FIRST, "Hello", Hold("shut down")), says(SECOND, "Hel", "lo wor", "ld"))
    own = replicas.ask(0, ids=True)
    await own.sees("Hello")
    await replicas.terminate(0)
    assert (await own.end()).error["code"] == "shutting_down"
    rest = await replicas.resume(1, own).end()
    assert rest.is_whole
    assert own.text + rest.text == "Hello world"
    assert envelopes(own, rest) == [FIRST]
    assert len(upstream.asked) == 2


# What is left


@pytest.mark.slow
async def test_a_deployment_that_is_killed_leaves_nothing_in_redis_but_the_secret(replicas, shared_redis, upstream):
    await replicas.start(shared_redis, flights_resume_s=1)
    upstream.script = says(FIRST, "Hello", Hold("kill"))
    callers = [replicas.ask(0, ids=True)]
    await callers[0].sees("Hello")
    callers += [replicas.ask(1, ids=True), replicas.ask(2)]
    for caller in callers:
        await caller.sees("Hello")
    await by_then(lambda: sum(replicas.readers) == 3)
    assert len(replicas.keys()) > 1
    for replica in range(3):
        replicas.kill(replica)
    await by_then(lambda: replicas.keys() == [f"{replicas.prefix}:secret"])


# A resumer alone


@pytest.mark.slow
async def test_a_stream_outlives_all_replicas(replicas, shared_redis, upstream):
    await replicas.start(shared_redis, count=2)
    upstream.script = in_turn(says(FIRST, "Hello", Hold("kill")), says(SECOND, "Hel", "lo wor", "ld"))
    callers = [replicas.ask(0, ids=True)]
    await callers[0].sees("Hello")
    callers.append(replicas.ask(1, ids=True))
    await callers[1].sees("Hello")
    for replica in (0, 1):
        replicas.kill(replica)
    await replicas.start(shared_redis, count=1)
    rests = [replicas.resume(2, await caller.end()) for caller in callers]
    for caller, rest in zip(callers, rests, strict=True):
        assert (await rest.end()).is_whole
        assert caller.text + rest.text == "Hello world"
    assert envelopes(*callers, *rests) == [FIRST]
    assert len(upstream.asked) == 2


async def test_a_resumer_alone_has_a_dead_replicas_call_run_again_with_its_own_credential(replicas, shared_redis, upstream):
    mine, yours = {"Authorization": "Bearer sk-mine"}, {"Authorization": "Bearer sk-yours"}
    await replicas.start(shared_redis, count=2)
    upstream.script = in_turn(says(FIRST, "Hello", Hold("kill")), says(SECOND, "Hel", "lo world"))
    own = replicas.ask(0, headers=mine, ids=True)
    await own.sees("Hello")
    await by_then(lambda: replicas.shared == 2)
    replicas.kill(0)
    await own.end()
    assert b"sk-mine" not in replicas.everything()
    for stranger in (yours, NOBODY):
        refused = await replicas.resume(1, own, stranger).end()
        assert (refused.status, refused.error["code"]) == (404, "stream_not_found")
    assert len(upstream.asked) == 1
    rest = await replicas.resume(1, own, mine).end()
    assert rest.is_whole
    assert own.text + rest.text == "Hello world"
    assert envelopes(own, rest) == [FIRST]
    assert [asked.headers["authorization"] for asked in upstream.asked] == ["Bearer sk-mine"] * 2
    bodies = [asked.json for asked in upstream.asked]
    assert bodies[0] == bodies[1]
    refused = await replicas.resume(1, own, yours).end()
    assert (refused.status, refused.error["code"]) == (404, "stream_not_found")
    assert b"sk-mine" not in replicas.everything()

"""What the tests of the store share: servers to run on, recordings and logs, and patience."""

import asyncio
import gc
import os
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from fakeredis import FakeServer
from fakeredis.aioredis import FakeRedis
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from running import RedisNodes, RedisServer

from gateway.config import RedisConfig
from gateway.core.key import CacheKey
from gateway.core.recording import Marks, Meta, Recording
from gateway.errors import StoreUnavailable
from gateway.ports import Batch, FlightId, LogName, Writer
from gateway.store.embedded import server_binary
from gateway.store.redis import RedisStore, connect

KEY = CacheKey("0123456789abcdef0123456789abcdef01234567")
META = Meta(
    api="chat",
    model="model-1",
    upstream="scripted",
    started_at=1_700_000_000.25,
    written_at=1_700_000_001.5,
    duration_us=900,
    ttl_s=60.0,
    id="chatcmpl-1",
    frames=2,
    finish_reasons=("stop",),
    usage={"total_tokens": 5},
    body_id=(6, 18),
    body_created=None,
)
RECORDING = Recording(
    META,
    b'data: {"id":"chatcmpl-1"}\n\ndata: {"id":"chatcmpl-1"}\n\n',
    Marks(54, 54, array("Q", (400, 900))),
    b'{"id":"chatcmpl-1"}',
)


def begun(seconds_later: float, body: bytes) -> Recording:
    return replace(RECORDING, meta=META._replace(started_at=META.started_at + seconds_later), body=body)


def large(size_bytes: int) -> Recording:
    sse = b"data: " + b"x" * size_bytes + b"\n\n"
    return replace(RECORDING, sse=sse, marks=Marks(len(sse), len(sse), array("Q", [1])), body=sse)


LOG = LogName(KEY, FlightId("f" * 16))
OTHER_LOG = LogName(KEY, FlightId("e" * 16))


def frame(text: str) -> bytes:
    return f"data: {text}\n\n".encode()


def batch(writer: Writer, first: int, texts: str = "", *, log: LogName = LOG, **more: Any) -> Batch:
    """A frame for each letter."""
    at_us = [1000 * (first + place) for place in range(len(texts))]
    return Batch(log, writer, first, [frame(text) for text in texts], at_us, **{"joinable": True, **more})


def of_flight(log: LogName, seconds_later: float = 0, **members: Any) -> Recording:
    """A recording that this flight left."""
    started_at = META.started_at + seconds_later
    return replace(RECORDING, meta=META._replace(flight=log.flight, started_at=started_at, **members))


@dataclass
class Backend:
    """A server, the prefix that is this test's there, and stores on it."""

    make_client: Callable[[RedisConfig], Any]
    raw: Any
    prefix: str
    stack: AsyncExitStack

    async def store(
        self, *, secret: bytes | None = None, lease_s: float = 5.0, resume_s: float = 300.0, **settings: Any
    ) -> RedisStore:
        patience = {"lookup_timeout_s": 2.0, "command_timeout_s": 5.0, "connect_timeout_s": 5.0}
        config = RedisConfig(**{"prefix": self.prefix, **patience, **settings})
        store = RedisStore(self.make_client(config), config, secret=secret, lease_s=lease_s, resume_s=resume_s)
        return await self.stack.enter_async_context(store)

    @property
    def name(self) -> str:
        return self.key("rec")

    def key(self, what: str, log: LogName | None = None) -> str:
        name = f"{self.prefix}:{{{KEY}}}:{what}"
        return f"{name}:{log.flight}" if log else name


@contextmanager
def nothing_unnoticed() -> Iterator[None]:
    """Fails on what asyncio would only have logged: exceptions that nobody fetched, broken callbacks."""
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    yield
    gc.collect(1)
    assert told == []


@asynccontextmanager
async def on_fakeredis() -> AsyncIterator[Backend]:
    async with AsyncExitStack() as stack:
        fake = FakeServer()
        raw = await stack.enter_async_context(FakeRedis(server=fake))
        yield Backend(lambda config: FakeRedis(server=fake, protocol=config.protocol), raw, "t", stack)


@asynccontextmanager
async def on_server(server: RedisServer | RedisNodes) -> AsyncIterator[Backend]:
    cluster = isinstance(server, RedisNodes)
    async with AsyncExitStack() as stack:
        raw = await stack.enter_async_context((RedisCluster if cluster else Redis).from_url(server.url))

        def make_client(config: RedisConfig) -> Any:
            return connect(config.model_copy(update={"cluster": cluster}), server.url)

        yield Backend(make_client, raw, f"t{os.urandom(6).hex()}", stack)


def on_any(request: pytest.FixtureRequest) -> AbstractAsyncContextManager[Backend]:
    """On the imitation, or on what the fixture of this name is."""
    return on_fakeredis() if request.param == "fakeredis" else on_server(request.getfixturevalue(request.param))


@contextmanager
def embedded_server(directories: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The server that the embedded store is, where the other one is Redis itself."""
    try:
        binary = str(server_binary())
    except StoreUnavailable:
        pytest.skip("there is no embedded server here")
    server = RedisServer(directories.mktemp("valkey"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("running.find_redis", lambda: binary)
        server.start()
    yield server
    server.stop()


class Proxy:
    """Stands between the store and a server, and takes its time with answers."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.connections = 0
        self.asked = b""
        self.url = ""
        self.on_asked: Callable[[bytes], Awaitable[None]] | None = None
        """Called with what is asked before the server has it."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, socket: str) -> None:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            try:
                theirs, ours = await asyncio.open_unix_connection(socket)
            except OSError:
                writer.close()
                return
            for task in (self._ask(reader, ours), self._answer(theirs, writer)):
                self._tasks.add(asyncio.create_task(task))

        self._server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            while data := await reader.read(65536):
                self.asked += data
                if self.on_asked:
                    await self.on_asked(data)
                writer.write(data)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            while data := await reader.read(65536):
                await asyncio.sleep(self.delay_s)
                writer.write(data)

    async def stop(self) -> None:
        assert self._server
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def commands_about(backend: Backend, act: Callable[[], Any]) -> list[str]:
    """The commands that the server got meanwhile, of this prefix."""
    async with backend.raw.monitor() as monitor:
        await act()
        await backend.raw.echo("that is all")
        commands = []
        async for seen in monitor.listen():
            if seen["command"] == "ECHO that is all":
                return [command for command in commands if backend.prefix in command]
            commands.append(seen["command"])
    return []


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    """Waits for what another process must do first."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)

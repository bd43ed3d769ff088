"""Ports without sockets: a store in a dict, an upstream in the test's hand, a clock that stands still."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson

from gateway.core.recording import Recording
from gateway.errors import GatewayError, StoreUnavailable
from gateway.ports import Answer, Call


class FakeClock:
    def __init__(self) -> None:
        self.time_s = 1_800_000_000.0

    def now(self) -> float:
        return self.time_s

    def monotonic(self) -> float:
        return self.time_s


class FakeStore:
    """``gate`` holds every lookup back while it is set."""

    secret = b"0123456789abcdef"
    available = True

    def __init__(self) -> None:
        self.recordings: dict[str, Recording] = {}
        self.lookups = 0
        self.broken = False
        self.gate: asyncio.Event | None = None
        self.write_gate: asyncio.Event | None = None

    async def lookup(self, key: str, want: str, *, patient: bool = False) -> Recording | None:
        self.lookups += 1
        found = self.recordings.get(key)
        if self.gate:
            await self.gate.wait()
        if self.broken:
            raise StoreUnavailable("broken")
        return found

    async def store(self, key: str, recording: Recording) -> bool:
        if self.write_gate:
            await self.write_gate.wait()
        if self.broken:
            raise StoreUnavailable("broken")
        self.recordings[key] = recording
        return True

    async def delete(self, key: str) -> None:
        self.recordings.pop(key, None)

    async def close(self) -> None:
        pass


class HandUpstream:
    """Every call waits for the test: `say` gives a batch to the newest, `end` ends it, `fail` breaks it."""

    name = "hand"
    passes_credential = False

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.closed = 0
        self.headless = False
        self._heads: list[asyncio.Future[None]] = []
        self._queues: list[asyncio.Queue[list[bytes] | BaseException | None]] = []

    def say(self, *chunks: Any, at: int = -1) -> None:
        self._queues[at].put_nowait([chunk if isinstance(chunk, bytes) else orjson.dumps(chunk) for chunk in chunks])

    def end(self, at: int = -1) -> None:
        self._queues[at].put_nowait(None)

    def fail(self, error: BaseException, at: int = -1) -> None:
        self._queues[at].put_nowait(error)

    def land(self, error: GatewayError | None = None, at: int = -1) -> None:
        """Lets a head come, where ``headless`` holds heads back."""
        if error:
            self._heads[at].set_exception(error)
        else:
            self._heads[at].set_result(None)

    @asynccontextmanager
    async def ask(self, call: Call) -> AsyncIterator[Answer]:
        self.calls.append(call)
        queue: asyncio.Queue[list[bytes] | BaseException | None] = asyncio.Queue()
        head: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.append(queue)
        self._heads.append(head)
        try:
            if self.headless:
                await head
            yield Answer({}, batches=self._batches(queue))
        finally:
            self.closed += 1

    async def models(self, headers: Mapping[str, str]) -> list[dict[str, Any]]:
        return []

    def relay(self, method: str, path: str, headers: Mapping[str, str], body: Any) -> Any:
        raise AssertionError("not asked for here")

    async def close(self) -> None:
        pass

    @staticmethod
    async def _batches(queue: "asyncio.Queue[list[bytes] | BaseException | None]") -> AsyncGenerator[list[bytes], None]:
        while (batch := await queue.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch

"""Lookups of one turn of the loop leave in one pipeline, and come back by a deadline."""

import asyncio
from collections.abc import Sequence
from typing import Any

import redis.asyncio as aioredis

from gateway.errors import StoreUnavailable
from gateway.store.client import as_store_error

Fields = list[bytes | None]

# The deadline is Redis' time, not ours: it passes in ticks, and a stall of the loop counts as one, however long it is.
# Between two ticks the loop looks at its sockets, so an answer that lies there is never given up.
_TICKS = 10
_SHORTEST_TICK_S = 0.001  # uvloop's clock has no finer one


class _Batch:
    """Lookups that leave together."""

    __slots__ = ("task", "ticks", "timer", "wanted")

    def __init__(self) -> None:
        self.wanted: list[tuple[str, Sequence[str], asyncio.Future[Fields]]] = []
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.ticks = 0

    def settle(self, results: Sequence[Any]) -> None:
        for (_, _, found), result in zip(self.wanted, results, strict=True):
            if found.done():
                continue
            if isinstance(result, Exception):
                found.set_exception(as_store_error(result))
            else:
                found.set_result(result)

    def fail(self, error: Exception) -> None:
        self.settle([error] * len(self.wanted))


class Lookups:
    """Batches of lookups, at most ``places`` at once; each takes a connection.

    A lookup waits for ``wait_s``. Its batch goes on for ``limit_s``: reading a late answer costs less than a new connection.
    """

    def __init__(self, client: aioredis.Redis, *, places: int, wait_s: float, limit_s: float) -> None:
        self._client = client
        self._places = places
        self._tick_s = max(wait_s / _TICKS, _SHORTEST_TICK_S)
        self._linger_s = max(limit_s - wait_s, 0)
        self._next = _Batch()
        self._scheduled = False
        self._running: set[_Batch] = set()

    async def get(self, name: str, fields: Sequence[str]) -> Fields:
        """The hash's fields. Raises `StoreUnavailable`, and `StoreCorrupt` where the key is of another type."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Fields] = loop.create_future()
        batch = self._next
        batch.wanted.append((name, fields, found))
        if batch.timer is None:
            batch.timer = loop.call_later(self._tick_s, self._tick, batch)
        if not self._scheduled and len(self._running) < self._places:
            self._scheduled = True
            loop.call_soon(self._send)
        return await found

    async def close(self) -> None:
        """Ends all lookups; they fail."""
        for batch in (self._next, *self._running):
            self._abandon(batch)
        tasks = [batch.task for batch in self._running if batch.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _send(self) -> None:
        self._scheduled = False
        if not self._next.wanted:
            return
        batch, self._next = self._next, _Batch()
        self._running.add(batch)
        batch.task = asyncio.get_running_loop().create_task(self._run(batch))

    async def _run(self, batch: _Batch) -> None:
        try:
            results = await self._fetch(batch)
        except Exception as error:  # noqa: BLE001  # whatever it is, nobody may wait for ever because of it
            batch.fail(error)
        else:
            batch.settle(results)
        finally:
            if batch.timer:
                batch.timer.cancel()
            self._running.discard(batch)
            if not self._scheduled:
                self._send()

    async def _fetch(self, batch: _Batch) -> list[Any]:
        if len(batch.wanted) == 1:
            name, fields, _ = batch.wanted[0]
            return [await self._client.execute_command("HMGET", name, *fields)]  # type: ignore[no-untyped-call]
        pipeline = self._client.pipeline(transaction=False)
        for name, fields, _ in batch.wanted:
            pipeline.execute_command("HMGET", name, *fields)
        return await pipeline.execute(raise_on_error=False)

    def _tick(self, batch: _Batch) -> None:
        loop = asyncio.get_running_loop()
        batch.ticks += 1
        if batch.ticks < _TICKS:
            batch.timer = loop.call_later(self._tick_s, self._tick, batch)
            return
        self._abandon(batch)
        if batch.task:
            batch.timer = loop.call_later(self._linger_s, batch.task.cancel)

    def _abandon(self, batch: _Batch) -> None:
        """Nobody waits any longer for what has not come."""
        batch.fail(StoreUnavailable("no answer in time"))
        if batch.timer:
            batch.timer.cancel()
        if batch is self._next:
            self._next = _Batch()

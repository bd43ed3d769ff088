"""What is asked in one turn of the loop leaves in one pipeline, and comes back by a deadline."""

import asyncio
from collections.abc import Sequence
from typing import Any

from gateway.errors import StoreUnavailable
from gateway.store.client import Command, Wire, as_store_error, send

# The deadline is Redis' time, not ours: it passes in ticks, and a stall of the loop counts as one, however long it is.
# Between two ticks the loop looks at its sockets, so an answer that lies there is never given up.
_TICKS = 10
_SHORTEST_TICK_S = 0.001  # uvloop's clock has no finer one


class _Batch:
    """Commands that leave together."""

    __slots__ = ("task", "ticks", "timer", "wanted")

    def __init__(self) -> None:
        self.wanted: list[tuple[Command, asyncio.Future[Any]]] = []
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.ticks = 0

    def settle(self, results: Sequence[Any]) -> None:
        for (_, found), result in zip(self.wanted, results, strict=True):
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

    def __init__(self, wire: Wire, *, places: int, wait_s: float, limit_s: float) -> None:
        self._wire = wire
        self._places = places
        self._tick_s = max(wait_s / _TICKS, _SHORTEST_TICK_S)
        self._linger_s = max(limit_s - wait_s, 0)
        self._next = _Batch()
        self._scheduled = False
        self._closed = False
        self._running: set[_Batch] = set()
        self.late = 0
        """How many were given up because no answer had come in time."""

    async def run(self, command: Command) -> Any:
        """The answer to a command. Raises `StoreUnavailable`, and `StoreCorrupt` where a key is of another type."""
        if self._closed:
            raise StoreUnavailable("the store is closed")
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Any] = loop.create_future()
        batch = self._next
        batch.wanted.append((command, found))
        if batch.timer is None:
            batch.timer = loop.call_later(self._tick_s, self._tick, batch)
        if not self._scheduled and len(self._running) < self._places:
            self._scheduled = True
            loop.call_soon(self._send)
        try:
            return await found
        finally:
            del batch, found  # else an error, by its trace, keeps what keeps the error

    async def close(self) -> None:
        """Ends all lookups; they fail."""
        self._closed = True
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
            results = await send(self._wire, [command for command, _ in batch.wanted])
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

    def _tick(self, batch: _Batch) -> None:
        loop = asyncio.get_running_loop()
        batch.ticks += 1
        if batch.ticks < _TICKS:
            batch.timer = loop.call_later(self._tick_s, self._tick, batch)
            return
        self.late += len(batch.wanted)
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

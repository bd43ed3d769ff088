"""What was answered how, by model: counted in this process, and added to what all replicas count about once a second.

A counter is called ``{name}|{model}``: the model comes last, since it may hold anything.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol

from gateway.errors import StoreError

OTHER = "other"
"""What models are counted as that are too many, or whose names are too long: callers choose them where patterns route."""

_FLUSH_S = 1.0
_LAST_FLUSH_S = 0.5
_MAX_MODELS = 256
_LONGEST_NAME = 200


class Counters(Protocol):
    """What the store does here."""

    async def count(self, counts: Mapping[str, float]) -> None: ...


class Tally:
    """Counts by model.

    A store that is away loses nothing: what was not taken is kept and goes with the next. So what a store took without
    being able to say so counts twice.
    """

    def __init__(self, store: Counters) -> None:
        self._store = store
        self._known: set[str] = set()
        self._counts: dict[str, dict[str, float]] = {}
        self._writing: dict[str, dict[str, float]] = {}
        self._written: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def add(self, model: str, name: str, amount: float = 1.0) -> None:
        """Counts; on the way of every hit."""
        counts = self._counts.get(model)
        if counts is None:
            counts = self._of(model)
        counts[name] = counts.get(name, 0.0) + amount
        if self._timer is None:
            self._schedule()

    def totals(self) -> dict[str, float]:
        """All that this process has counted, by name."""
        found = dict(self._written)
        for counts in (self._counts, self._writing):
            for names in counts.values():
                _add(found, names)
        return found

    async def flush(self) -> None:
        """Writes what was counted until now, if the store can take it."""
        while self._task:
            await asyncio.shield(self._task)
        if self._counts:
            # In a task of its own: whoever waits may give up in the middle, and what was taken out must not be lost.
            await asyncio.shield(self._start())

    async def close(self) -> None:
        """Writes what is left, if that can be done in a moment."""
        self._closed = True
        if self._timer:
            self._timer.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_FLUSH_S):
                await self.flush()
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _of(self, model: str) -> dict[str, float]:
        if model not in self._known:
            if len(self._known) < _MAX_MODELS and len(model) <= _LONGEST_NAME:
                self._known.add(model)
            else:
                model = OTHER
        return self._counts.setdefault(model, {})

    def _schedule(self) -> None:
        if not self._closed:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_S, self._flush_now)

    def _flush_now(self) -> None:
        self._timer = None
        if self._task:
            self._schedule()  # the store is slow: what has come meanwhile waits
        elif self._counts:
            self._start()

    def _start(self) -> "asyncio.Task[None]":
        counts, self._counts = self._counts, {}
        self._writing = counts
        self._task = task = asyncio.get_running_loop().create_task(self._write(counts))
        return task

    async def _write(self, counts: dict[str, dict[str, float]]) -> None:
        try:
            await self._store.count({f"{name}|{model}": n for model, names in counts.items() for name, n in names.items()})
        except StoreError:
            self._put_back(counts)
        else:
            for names in counts.values():
                _add(self._written, names)
        finally:
            self._writing = {}
            self._task = None

    def _put_back(self, counts: dict[str, dict[str, float]]) -> None:
        for model, names in counts.items():
            _add(self._counts.setdefault(model, {}), names)
        if self._timer is None:
            self._schedule()


def _add(to: dict[str, float], counts: Mapping[str, float]) -> None:
    for name, amount in counts.items():
        to[name] = to.get(name, 0.0) + amount

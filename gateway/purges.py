"""The purges that this replica obeys: which stored answers it must not serve, and which running ones it must not store.

Whoever purges leaves a mark in the store first, and deletes after that. Each replica looks for new marks a few times a
second, and once more before it stores anything; from then on what a mark covers is not served, whether it is deleted
already, still to be deleted, or was on its way while others were deleted.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from gateway.core.key import CacheKey
from gateway.core.purge import Labels, Marks, Purge
from gateway.core.recording import Meta
from gateway.errors import StoreError
from gateway.ports import LOG_START, Clock, Store

log = logging.getLogger(__name__)

_LOOK_S = 0.4
# Beyond the longest answer: the clocks of replicas differ, and what was to be deleted may be deleted late.
_MARGIN_S = 300.0
_AT_START_S = 1.0


def labels_of(key: CacheKey, meta: Meta) -> Labels:
    """What purges may know a recording by."""
    return Labels(
        key=key,
        model=meta.model,
        namespace=meta.namespace,
        tags=meta.tags,
        flight=meta.flight,
        id=meta.id,
        sample_of=meta.sample_of,
    )


class Purges:
    """The marks that still count. ``longest_s`` is how long an answer may take to be made."""

    def __init__(self, store: Store, clock: Clock, *, longest_s: float) -> None:
        self.life_s = longest_s + _MARGIN_S
        """How long a mark must stay known: any answer that was begun before it has ended by then."""
        self.on_learned: Callable[[Purge], object] = lambda _: None
        """Called with each mark that is new here."""
        self._store = store
        self._clock = clock
        self._cursor = LOG_START
        self._marks = Marks()
        self._task: asyncio.Task[None] | None = None
        self._reading = asyncio.Lock()
        self._reads = self._last_read = 0
        """How many looks were begun, and which of them was the last that found what there was."""

    async def open(self) -> None:
        """From now on marks are looked for; those that are there are known, if the store can be reached."""
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(_AT_START_S):
                await self.refresh()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def learn(self, purge: Purge) -> None:
        """From now on this replica obeys it."""
        if self._marks.add(purge):
            self.on_learned(purge)

    async def refresh(self) -> None:
        """Learns what is new. Raises `StoreError`."""
        begun = self._reads
        async with self._reading:
            if self._last_read > begun:
                return  # many answers may end at once: a look that began after this one was asked for will do
            self._reads = this = self._reads + 1
            found, self._cursor = await self._store.purges(self._cursor)
            self._last_read = this
            for purge in found:
                self.learn(purge)

    def covers(self, key: CacheKey, meta: Meta) -> bool:
        """Whether a recording must not be served. On the way of every hit."""
        return bool(self._marks) and self._marks.cover(labels_of(key, meta), meta.started_at)

    def cover(self, labels: Labels, started_at: float) -> bool:
        """Whether an answer that was begun at that time was purged; 0: whether one may have been."""
        return self._marks.cover(labels, started_at)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self.refresh()
            except StoreError as error:
                log.debug("no purges can be learned: %s", error)
            self._forget_old()

    def _forget_old(self) -> None:
        self._marks.forget((self._clock.now() - self.life_s) * 1e6)

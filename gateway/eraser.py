"""Purges as they are asked for: marked first, so that no replica serves what is meant, and then deleted, entry by entry."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from itertools import product
from typing import Any, NamedTuple

from gateway.core.key import MAX_SAMPLES, CacheKey, sample_key
from gateway.core.purge import Purge, Selector
from gateway.core.stream_id import StreamId, UnknownStream, flight_of, read_token
from gateway.errors import InvalidRequest, ModelNotFound, PurgeUnfinished, StoreAway, StoreCorrupt, StoreError, UnknownCursor
from gateway.ports import Clock, FlightId, Inventory, Listed, Store
from gateway.purges import Purges, labels_of
from gateway.questions import Router

log = logging.getLogger(__name__)

Tell = Callable[[int, int], object]
"""Told now and then how many entries were looked at, and how many of them went."""

# What was on its way to the store while we looked is there by then.
_AGAIN_S = 5.0
# How many entries a scan remembers, so as to take none for two that comes twice.
_MAX_REMEMBERED = 100_000


class Wanted(NamedTuple):
    """What is to be purged: all that is set has to fit, and something must be set, or ``all``.

    ``id`` is a response's, the upstream's own or the fresh one of a hit; ``stream`` a ``Gateway-Stream-Id``; ``model`` a
    pattern or an alias.
    """

    key: str | None = None
    id: str | None = None
    stream: str | None = None
    namespace: str | None = None
    model: str | None = None
    tag: str | None = None
    all: bool = False
    dry_run: bool = False
    """Whether it is only told how many entries are meant."""

    @property
    def selects(self) -> bool:
        return any(value is not None for value in self[:6])


class Progress:
    """How far a purge has come."""

    def __init__(self, tell: Tell) -> None:
        self.marked = False
        self.scanned = 0
        self.purged = 0
        self._tell = tell

    def add(self, *, scanned: int = 0, purged: int = 0) -> None:
        self.scanned += scanned
        self.purged += purged
        self._tell(self.scanned, self.purged)


class Once:
    """Tells what has come already: a scan may give an entry twice. It remembers a bounded number."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def __call__(self, listed: Listed) -> bool:
        """Whether this entry comes for the first time."""
        mark = hash((listed.key, listed.meta.flight))
        if mark in self._seen:
            return False
        if len(self._seen) < _MAX_REMEMBERED:
            self._seen.add(mark)
        return True


@contextmanager
def store_is_needed() -> Iterator[None]:
    """Without the store there is nothing to say: raises `StoreAway` for its errors."""
    try:
        yield
    except UnknownCursor:
        raise InvalidRequest("'cursor' must be that of an answer before.", param="cursor") from None
    except StoreError as error:
        raise StoreAway(f"The store cannot be asked: {error}.") from None


def models_meant(router: Router, model: str | None) -> list[str | None]:
    """The patterns that a model's name stands for: itself, and the upstream's own name where it is an alias."""
    if model is None:
        return [None]
    try:
        own = router.route(model).model
    except ModelNotFound:
        own = model
    return [model] if own == model else [model, escape(own)]


class Eraser:
    """Purges. A purge that has begun goes on when its caller leaves."""

    def __init__(  # noqa: PLR0913  # what it asks, and how long it waits
        self,
        store: Store,
        inventory: Inventory,
        router: Router,
        purges: Purges,
        clock: Clock,
        *,
        again_s: float = _AGAIN_S,
    ) -> None:
        self._store = store
        self._inventory = inventory
        self._router = router
        self._purges = purges
        self._clock = clock
        self._again_s = again_s
        self._running: set[asyncio.Task[Any]] = set()
        self._late: list[Purge] = []
        self._later: asyncio.Task[None] | None = None
        self._closed = False

    async def purge(self, wanted: Wanted, tell: Tell = lambda *_: None) -> dict[str, Any]:
        """Returns when all that is meant is gone. Raises `InvalidRequest`, and `PurgeUnfinished` where the store fails."""
        stream = _check(wanted)
        purges = self._purges_of(wanted, stream)
        progress = Progress(tell)
        if wanted.dry_run:
            with store_is_needed():
                await self._count(purges, progress)
        else:
            task = asyncio.get_running_loop().create_task(self._erase(purges, _places(wanted, stream), progress))
            self._running.add(task)
            task.add_done_callback(self._ended)
            await asyncio.shield(task)
        return {
            "object": "cache.purge",
            "dry_run": wanted.dry_run,
            "marked": progress.marked,
            "scanned": progress.scanned,
            "purged": progress.purged,
            "message": _message(wanted, progress.purged),
        }

    async def close(self) -> None:
        """What still runs is given up; its marks stay."""
        self._closed = True
        tasks = [*self._running, *([self._later] if self._later else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _purges_of(self, wanted: Wanted, stream: StreamId | None) -> list[Purge]:
        """Together they mean what is wanted: a model may have two names, a response two ids."""
        at_us = int(self._clock.now() * 1e6)
        flights = [stream.flight if stream else None]
        ids: list[tuple[str | None, str | None]] = [(wanted.id, flights[0])]
        if wanted.id and (flight := flight_of(self._store.secret, wanted.id)) and flights[0] in (None, flight):
            ids.append((None, flight))
        return [
            Purge(at_us, Selector(wanted.key, flight, response_id, wanted.namespace, model, wanted.tag))
            for (response_id, flight), model in product(ids, models_meant(self._router, wanted.model))
        ]

    async def _erase(self, purges: Sequence[Purge], places: Sequence[CacheKey], progress: Progress) -> None:
        try:
            for purge in purges:
                await self._inventory.mark(purge, life_s=self._purges.life_s)
            progress.marked = True
            for purge in purges:
                self._purges.learn(purge)
            await self._erase_at(places, purges, progress)
            await self._sweep(purges, progress)
        except StoreError as error:
            raise _unfinished(error, progress) from None
        finally:
            if progress.marked:
                self._erase_later(purges)

    async def _erase_at(self, places: Sequence[CacheKey], purges: Sequence[Purge], progress: Progress) -> None:
        """Deletes what is known by its key before anybody looks through all the others."""
        listed = [found for found in await asyncio.gather(*map(self._listed, places)) if found]
        await self._erase_covered(listed, purges, progress)

    async def _listed(self, key: CacheKey) -> Listed | None:
        try:
            recording = await self._store.lookup(key, "meta", patient=True)
        except StoreCorrupt:
            return None
        return Listed(key, recording.meta, 0.0) if recording else None

    async def _sweep(self, purges: Sequence[Purge], progress: Progress) -> None:
        """Looks at every entry, and deletes those that are meant."""
        cursor = ""
        while True:
            page, cursor = await self._inventory.page(cursor)
            await self._erase_covered(page, purges, progress)
            progress.add(scanned=len(page))
            if not cursor:
                return

    async def _erase_covered(self, page: Sequence[Listed], purges: Sequence[Purge], progress: Progress) -> None:
        covered = [(listed.key, FlightId(listed.meta.flight)) for listed in page if _is_covered(listed, purges)]
        if covered:
            progress.add(purged=await self._inventory.erase(covered, began_by_us=max(purge.at_us for purge in purges)))

    async def _count(self, purges: Sequence[Purge], progress: Progress) -> None:
        first_time, cursor = Once(), ""
        while True:
            page, cursor = await self._inventory.page(cursor)
            meant = [listed for listed in page if _is_covered(listed, purges) and first_time(listed)]
            progress.add(scanned=len(page), purged=len(meant))
            if not cursor:
                return

    def _erase_later(self, purges: Sequence[Purge]) -> None:
        """Once more in a while, for what was on its way to the store; purges that come meanwhile share that look."""
        self._late += purges
        if self._later is None and not self._closed:
            self._later = asyncio.get_running_loop().create_task(self._sweep_later())

    async def _sweep_later(self) -> None:
        while self._late:
            await asyncio.sleep(self._again_s)
            purges, self._late = self._late, []
            try:
                await self._sweep(purges, Progress(lambda *_: None))
            except StoreError as error:
                log.warning("What was purged is not served, but may not all be deleted before it expires: %s", error)
        self._later = None

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.warning("A purge did not come to its end: %s", error)


def _check(wanted: Wanted) -> StreamId | None:
    """The stream that is meant, if one is. Raises `InvalidRequest`."""
    for name, value in wanted._asdict().items():
        if value == "":
            raise InvalidRequest(f"'{name}' must not be empty.", param=name)
    if wanted.all and wanted.selects:
        raise InvalidRequest("'all' goes with no selector: leave it out, or the others.", param="all")
    if not (wanted.all or wanted.selects):
        raise InvalidRequest("Say what to purge: a selector, or 'all': true for everything.")
    try:
        return read_token(wanted.stream) if wanted.stream else None
    except UnknownStream:
        raise InvalidRequest("'stream' is not a Gateway-Stream-Id.", param="stream") from None


def _places(wanted: Wanted, stream: StreamId | None) -> list[CacheKey]:
    """The keys under which it must be, where they are known."""
    if stream:
        return [stream.key]
    return [sample_key(CacheKey(wanted.key), sample) for sample in range(MAX_SAMPLES)] if wanted.key else []


def _is_covered(listed: Listed, purges: Sequence[Purge]) -> bool:
    labels = labels_of(listed.key, listed.meta)
    return any(purge.covers(labels, listed.meta.started_at) for purge in purges)


def _message(wanted: Wanted, purged: int) -> str:
    if purged:
        return ""
    if wanted.id or wanted.stream:
        return "Nothing is stored from that response: it is unknown, was not stored, has expired, or was replaced."
    return "Nothing that is stored fits."


def _unfinished(error: StoreError, progress: Progress) -> PurgeUnfinished:
    marked = (
        "The purge is marked, so nothing of what is meant is served any more, but the store went away before all of it was "
        "deleted: ask again."
    )
    text = marked if progress.marked else "The store cannot be asked, and the purge is not marked: ask again."
    return PurgeUnfinished(f"{text} ({error})", marked=progress.marked, scanned=progress.scanned, purged=progress.purged)

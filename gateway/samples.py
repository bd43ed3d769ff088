"""Several answers of one question: which of them a request gets, and which are still to be fetched."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from gateway.core.key import CacheKey, sample_key
from gateway.core.policy import staleness_s
from gateway.core.recording import Meta
from gateway.errors import StoreError
from gateway.ports import Clock, Store
from gateway.purges import Purges

_MAX_TURNS = 4096


class Chosen(NamedTuple):
    """The sample that is a request's, and one that is still missing, or too old, if any is."""

    sample: int
    missing: int | None = None
    seen_us: int = -1
    """When the flight of that one began, where it is too old."""


class Samples:
    """Picks samples in turn, or at random by a seed; each replica takes turns of its own."""

    def __init__(self, store: Store, purges: Purges, clock: Clock, *, order: Literal["turn", "random"], seed: int) -> None:
        self._store = store
        self._purges = purges
        self._clock = clock
        self._order = order
        self._seed = seed
        self._turns: dict[CacheKey, int] = {}

    async def choose(
        self, key: CacheKey, samples: int, *, accept: Callable[[Meta, float], bool], stale_s: float, replace: bool
    ) -> Chosen:
        """``accept`` tells whether a stored answer will do, ``stale_s`` for how long a stale one does where a caller says
        nothing, ``replace`` that the chosen one will be written anew.
        """
        metas = await asyncio.gather(*(self._meta(sample_key(key, sample)) for sample in range(samples)))
        now = self._clock.now()
        # What is kept for errors only, nobody would ask for: it would stay until its end.
        lacking = [
            sample
            for sample, meta in enumerate(metas)
            if meta is None or (staleness_s(meta, now) > stale_s and not accept(meta, now))
        ]
        if replace:
            return Chosen(lacking[0] if lacking else _oldest(metas))
        # What the model said twice is one answer.
        different = {meta.content or str(sample): sample for sample, meta in enumerate(metas) if meta and accept(meta, now)}
        if not different:
            # All who come before there is an answer share one call. One that is there may stand in for an error.
            return Chosen(_oldest(metas))
        missing = lacking[0] if lacking else None
        seen = metas[missing] if missing is not None else None
        return Chosen(self._pick(key, sorted(different.values())), missing, int(seen.started_at * 1e6) if seen else -1)

    async def _meta(self, key: CacheKey) -> Meta | None:
        try:
            recording = await self._store.lookup(key, "meta")
        except StoreError:
            return None
        return recording.meta if recording and not self._purges.covers(key, recording.meta) else None

    def _pick(self, key: CacheKey, samples: Sequence[int]) -> int:
        if len(self._turns) >= _MAX_TURNS:
            self._turns.clear()
        turn = self._turns[key] = self._turns.get(key, -1) + 1
        if self._order == "turn":
            return samples[turn % len(samples)]
        return random.Random(f"{self._seed}:{key}:{turn}").choice(samples)  # noqa: S311  # to be repeated, not to be safe


def _oldest(metas: Sequence[Meta | None]) -> int:
    """The oldest of those that are there; the first where none is."""
    return min((meta.written_at, sample) for sample, meta in enumerate(metas) if meta)[1] if any(metas) else 0

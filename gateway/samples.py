"""Several answers of one question: which of them a request gets, and which are still to be fetched."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from gateway.core.key import CacheKey, sample_key
from gateway.core.recording import Meta
from gateway.errors import StoreError
from gateway.ports import Clock, Store
from gateway.purges import Purges

_MAX_TURNS = 4096


class Chosen(NamedTuple):
    """The sample that is a request's, and one that is still missing, if any is."""

    sample: int
    missing: int | None = None


class Samples:
    """Picks samples in turn, or at random by a seed; each replica takes turns of its own."""

    def __init__(self, store: Store, purges: Purges, clock: Clock, *, order: Literal["turn", "random"], seed: int) -> None:
        self._store = store
        self._purges = purges
        self._clock = clock
        self._order = order
        self._seed = seed
        self._turns: dict[CacheKey, int] = {}

    async def choose(self, key: CacheKey, samples: int, *, accept: Callable[[Meta, float], bool], replace: bool) -> Chosen:
        """``accept`` tells whether a stored answer will do, ``replace`` that the chosen one will be written anew."""
        metas = await asyncio.gather(*(self._meta(sample_key(key, sample)) for sample in range(samples)))
        missing = next((sample for sample, meta in enumerate(metas) if meta is None), None)
        if replace:
            return Chosen(missing if missing is not None else _oldest(metas))
        now = self._clock.now()
        # What the model said twice is one answer.
        different = {meta.content or str(sample): sample for sample, meta in enumerate(metas) if meta and accept(meta, now)}
        if not different:
            # All who come before there is an answer share one call.
            return Chosen(0 if metas[0] is None else _oldest(metas))
        return Chosen(self._pick(key, sorted(different.values())), missing)

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
    return min(range(len(metas)), key=lambda sample: _written_at(metas[sample]))


def _written_at(meta: Meta | None) -> float:
    return meta.written_at if meta else float("-inf")

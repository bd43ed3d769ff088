"""How the models of stored recordings behave, from a sample of them: one recording is in memory at a time."""

import asyncio
from collections.abc import Callable
from typing import Any

from gateway.core.histogram import Histogram
from gateway.core.profile import Observed, Profile, observe
from gateway.core.recording import CorruptRecording
from gateway.eraser import Tell
from gateway.errors import StoreCorrupt
from gateway.ports import Clock, Inventory, Listed, Store
from gateway.tally import OTHER

# No profile takes longer, however many recordings there are.
_LONGEST_S = 60.0
_MAX_MODELS = 256
_SHARES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}


class Profiler:
    """Looks at recordings in the order of the store, which is none: so the first ones are a fair sample."""

    def __init__(self, store: Store, inventory: Inventory, clock: Clock) -> None:
        self._store = store
        self._inventory = inventory
        self._clock = clock

    async def profile(self, is_wanted: Callable[[Listed], bool], limit: int, tell: Tell) -> dict[str, Any]:
        """The profiles of up to ``limit`` recordings, by model. Raises `StoreError`."""
        profiles: dict[str, Profile] = {}
        scanned, looked_at, cursor, complete, began = 0, 0, "", False, self._clock.monotonic()
        while not complete and looked_at < limit and self._clock.monotonic() - began < _LONGEST_S:
            page, cursor = await self._inventory.page(cursor)
            scanned += len(page)
            wanted = [each for each in page if is_wanted(each)]
            complete = not cursor and len(wanted) <= limit - looked_at
            for listed in wanted[: limit - looked_at]:
                if observed := await self._observed(listed):
                    looked_at += 1
                    _of(profiles, listed.meta.model).add(observed)
            tell(looked_at, 0)
        models = [{"model": model} | _told(profile) for model, profile in profiles.items()]
        models.sort(key=lambda row: -row["recordings"])
        found = {"object": "cache.profile", "scanned": scanned, "recordings": looked_at, "complete": complete}
        return found | {"models": models}

    async def _observed(self, listed: Listed) -> Observed | None:
        """None where it is gone by now, or does not load."""
        try:
            recording = await self._store.lookup(listed.key, "stream", patient=True)
            # Reading all frames of a long one would hold everything else up.
            return await asyncio.to_thread(observe, recording) if recording else None
        except (StoreCorrupt, CorruptRecording):
            return None


def _of(profiles: dict[str, Profile], model: str) -> Profile:
    if model not in profiles and len(profiles) >= _MAX_MODELS:
        model = OTHER
    return profiles.setdefault(model, Profile())


def _told(profile: Profile) -> dict[str, Any]:
    return {
        "recordings": profile.recordings,
        "timed": profile.timed,
        "ttft_us": _distribution(profile.ttft_us),
        "gaps_us": _distribution(profile.gaps_us),
        "fitted": profile.fitted(),
    }


def _distribution(histogram: Histogram) -> dict[str, Any]:
    """Percentiles, and the histogram itself: where each bucket begins and ends, and how many are in it."""
    quantiles = {name: histogram.quantile(share) for name, share in _SHARES.items()}
    return quantiles | {"histogram": list(histogram.spans())}

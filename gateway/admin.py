"""The administration of the cache: what is in it, what it has saved, and why a request is or is not answered from it.

Nothing here is on the way of a request. `gateway.eraser` is how to be rid of it.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import orjson

from gateway.core.explain import left_out
from gateway.core.key import MAX_SAMPLES, CacheKey, sample_key
from gateway.core.policy import RuleBook, age_s, remaining_s
from gateway.core.purge import Selector
from gateway.core.recording import Meta, Recording
from gateway.eraser import Eraser, Once, Tell, Wanted, models_meant, store_is_needed
from gateway.errors import EntryNotFound, StoreCorrupt
from gateway.nearby import Nearby
from gateway.ports import Clock, Inventory, Listed, Store
from gateway.profiling import Profiler
from gateway.pulse import Reporter
from gateway.purges import Purges, labels_of
from gateway.questions import Questions, Request, Router
from gateway.tally import Tally

# No listing takes longer, however few of the entries it is about.
_LISTING_S = 1.0
_LISTING_PAGES = 1000
_ASKED = ("hits", "misses", "collapsed")
"""The requests that the cache could have answered."""
_COUNTED = (*_ASKED, "stale", "bypassed", "errors", "stored")
"""``stale`` are those of the hits that were not fresh any more, ``errors`` those of all requests that failed."""
_PRICED = {"saved_prompt_tokens": "input_usd_per_million", "saved_completion_tokens": "output_usd_per_million"}
_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class Filters(NamedTuple):
    """Which entries a listing is about: all that is set has to fit. ``model`` may be a pattern or an alias."""

    namespace: str | None = None
    model: str | None = None
    tag: str | None = None
    min_age_s: float = 0.0
    max_age_s: float = math.inf
    min_bytes: int = 0
    stale: bool = False
    """Only those that are not fresh any more."""

    def selectors(self, router: Router) -> list[Selector]:
        """Of which one has to fit: a model may have two names."""
        names = models_meant(router, self.model)
        return [Selector(namespace=self.namespace, model=name, tag=self.tag) for name in names]


class Listing(NamedTuple):
    """Some entries, and the cursor of those that follow: empty behind the last one."""

    entries: list[dict[str, Any]]
    cursor: str
    scanned: int


class Entry(NamedTuple):
    """One entry: what is known of it, how it was timed, and the recording itself."""

    about: dict[str, Any]
    timing: dict[str, Any]
    recording: Recording


class Admin:
    """What those who run the cache can ask of it. Every method raises `GatewayError` only."""

    def __init__(  # noqa: PLR0913  # the cache has many sides
        self,
        store: Store,
        inventory: Inventory,
        *,
        questions: Questions,
        router: Router,
        models: RuleBook,
        purges: Purges,
        tally: Tally,
        eraser: Eraser,
        reporter: Reporter,
        clock: Clock,
    ) -> None:
        self._store = store
        self._inventory = inventory
        self._nearby = Nearby(inventory, clock)
        self._questions = questions
        self._router = router
        self._models = models
        self._purges = purges
        self._tally = tally
        self._eraser = eraser
        self._reporter = reporter
        self._clock = clock

    async def entries(self, filters: Filters, cursor: str = "", limit: int = 100) -> Listing:
        """Entries from ``cursor`` on: at least ``limit`` of them where there are so many and a second is enough.

        The store's pages are given in full: it cannot go on in the middle of one without missing some.
        """
        selectors = filters.selectors(self._router)
        found, first_time, scanned, began = [], Once(), 0, self._clock.monotonic()
        with store_is_needed():
            for _ in range(_LISTING_PAGES):
                page, cursor = await self._inventory.page(cursor)
                now = self._clock.now()
                scanned += len(page)
                found += [self._row(each, now) for each in page if fits(each, filters, selectors, now) and first_time(each)]
                if not cursor or len(found) >= limit or self._clock.monotonic() - began > _LISTING_S:
                    break
        return Listing(found, cursor, scanned)

    async def entry(self, key: CacheKey) -> Entry:
        """Raises `EntryNotFound`."""
        with store_is_needed():
            try:
                inspected = await self._inventory.inspect(key)
            except StoreCorrupt as error:
                raise EntryNotFound(f"What is stored under this key does not load: {error}.", param="key") from None
            if inspected is None:
                raise EntryNotFound("Nothing is stored under this key.", param="key")
            recording = inspected.recording
            samples = await self._stored_samples(CacheKey(recording.meta.sample_of or key))
        about = self._row(Listed(key, recording.meta, inspected.life_s), self._clock.now())
        about |= {"stored_bytes": inspected.stored_bytes, "samples": samples}
        return Entry(about, _timing(recording), recording)

    async def stats(self, *, scan: bool = False, tell: Tell = lambda *_: None) -> dict[str, Any]:
        """What all replicas have counted; with ``scan`` also what is stored, which takes as long as there are entries."""
        with store_is_needed():
            await self._tally.flush()
            counts = await self._inventory.counts()
            stored = await self._count_entries(tell) if scan else None
        since = counts.pop("since", None)
        by_model: dict[str, dict[str, float]] = {}
        for field, amount in counts.items():
            name, _, model = field.partition("|")
            by_model.setdefault(model, {})[name] = amount
        models = [{"model": model} | self._saved(model, names) for model, names in by_model.items()]
        models.sort(key=lambda model: -sum(model[name] for name in _ASKED))
        found = {"object": "cache.stats", "since": since, "total": _total(models), "models": models}
        return found | ({"stored": stored} if scan else {})

    async def live(self) -> dict[str, Any]:
        """What each process of all replicas has counted since it began, as it has told last: see `core.rates`."""
        return {"object": "cache.live", "at": self._clock.now(), "reports": await self._reporter.collect()}

    async def profile(self, filters: Filters, limit: int, tell: Tell = lambda *_: None) -> dict[str, Any]:
        """When the tokens of each model came, in up to ``limit`` of the recordings; bounded in time and memory."""
        selectors, first_time, now = filters.selectors(self._router), Once(), self._clock.now()

        def is_wanted(listed: Listed) -> bool:
            meant = not listed.replaced and fits(listed, filters, selectors, now)
            return meant and not self._purges.covers(listed.key, listed.meta) and first_time(listed)

        with store_is_needed():
            return await Profiler(self._store, self._inventory, self._clock).profile(is_wanted, limit, tell)

    async def explain(self, request: Request) -> dict[str, Any]:
        """Where a request leads, what is there, and if nothing is, which recent one it nearly was."""
        asked = self._questions.asked(request)
        with store_is_needed():
            entry = await self._meta(asked.key)
            samples = await self._stored_samples(asked.key)
            near = None if samples or asked.why_not else await self._nearby.nearest(asked, request.api)
        now = self._clock.now()
        return {
            "object": "cache.explanation",
            "api": request.api.name,
            "key": asked.key,
            "upstream": asked.upstream,
            "model": asked.model,
            "owner": _kind_of_owner(asked.owner),
            "namespace": asked.namespace,
            "why_not": asked.why_not,
            "canonical": orjson.Fragment(asked.canonical),
            "left_out": left_out(request.api, request.body, asked.ignored),
            "samples_wanted": asked.samples,
            "samples": samples,
            "entry": self._row(_as_listed(asked.key, entry, now), now) if entry else None,
            "nearest": near,
        }

    async def purge(self, wanted: Wanted, tell: Tell = lambda *_: None) -> dict[str, Any]:
        """See `Eraser.purge`."""
        return await self._eraser.purge(wanted, tell)

    # Rows

    def _row(self, listed: Listed, now: float) -> dict[str, Any]:
        """What a listing says of an entry."""
        meta = listed.meta
        return {
            "object": "cache.entry",
            "key": listed.key,
            "state": self._state(listed, now),
            "api": meta.api,
            "upstream": meta.upstream,
            "model": meta.model,
            "owner": meta.owner,
            "namespace": meta.namespace,
            "tags": meta.tags,
            "id": meta.id,
            "flight": meta.flight,
            "sample_of": meta.sample_of,
            "written_at": meta.written_at,
            "age_s": age_s(meta, now),
            "ttl_s": remaining_s(meta, now),
            "life_s": round(listed.life_s, 3),
            "size_bytes": meta.size_bytes,
            "frames": meta.frames,
            "duration_us": meta.duration_us,
            "finish_reasons": meta.finish_reasons,
            "usage": meta.usage,
        }

    def _state(self, listed: Listed, now: float) -> str:
        if self._purges.covers(listed.key, listed.meta):
            return "purged"
        if listed.replaced:
            return "replaced"
        return "fresh" if _is_fresh(listed.meta, now) else "stale"

    async def _meta(self, key: CacheKey) -> Meta | None:
        try:
            recording = await self._store.lookup(key, "meta", patient=True)
        except StoreCorrupt:
            return None
        return recording.meta if recording else None

    async def _stored_samples(self, key: CacheKey) -> list[CacheKey]:
        """The keys of all samples that are stored."""
        keys = [sample_key(key, sample) for sample in range(MAX_SAMPLES)]
        metas = await asyncio.gather(*map(self._meta, keys))
        return [key for key, meta in zip(keys, metas, strict=True) if meta]

    # Statistics

    def _saved(self, model: str, counts: Mapping[str, float]) -> dict[str, Any]:
        """The counters of one model, and what they come to."""
        rules, dollars, priced = self._models.of(model), 0.0, False
        found: dict[str, Any] = {name: int(counts.get(name, 0)) for name in (*_COUNTED, *_PRICED)}
        for tokens, price in _PRICED.items():
            usd_per_million = getattr(rules, price)
            found[f"unpriced_{tokens.removeprefix('saved_')}"] = 0 if usd_per_million is not None else found[tokens]
            if usd_per_million is not None:
                priced = True
                dollars += found[tokens] * usd_per_million / 1e6
        found |= {"saved_seconds": round(counts.get("saved_seconds", 0.0), 3), "saved_usd": dollars if priced else None}
        return found | {"hit_rate": _hit_rate(found)}

    async def _count_entries(self, tell: Tell) -> dict[str, Any]:
        """Entries and bytes by model, from a look at each of them."""
        first_time, scanned, replaced, cursor = Once(), 0, 0, ""
        models: dict[str, dict[str, Any]] = {}
        while True:
            page, cursor = await self._inventory.page(cursor)
            for listed in filter(first_time, page):
                replaced += listed.replaced
                if not listed.replaced:
                    model = models.setdefault(listed.meta.model, {"entries": 0, "size_bytes": 0})
                    model["entries"] += 1
                    model["size_bytes"] += listed.meta.size_bytes
            scanned += len(page)
            tell(scanned, 0)
            if not cursor:
                break
        rows = [{"model": name, **model} for name, model in models.items()]
        rows.sort(key=lambda row: -row["size_bytes"])
        total = {name: sum(row[name] for row in rows) for name in ("entries", "size_bytes")}
        return {"total": total | {"replaced": replaced}, "models": rows}


def fits(listed: Listed, filters: Filters, selectors: Sequence[Selector], now: float) -> bool:
    """Whether an entry is one of those; ``selectors`` are `Filters.selectors`."""
    meta, labels = listed.meta, labels_of(listed.key, listed.meta)
    return (
        any(selector.matches(labels) for selector in selectors)
        and filters.min_age_s <= max(0.0, now - meta.written_at) <= filters.max_age_s
        and meta.size_bytes >= filters.min_bytes
        and not (filters.stale and (listed.replaced or _is_fresh(meta, now)))
    )


def _is_fresh(meta: Meta, now: float) -> bool:
    return remaining_s(meta, now) >= 0


def _as_listed(key: CacheKey, meta: Meta, now: float) -> Listed:
    return Listed(key, meta, max(0.0, meta.written_at + meta.ttl_s + meta.stale_s - now))


def _timing(recording: Recording) -> dict[str, Any]:
    """When the frames arrived, in microseconds after the model was asked."""
    at_us = list(recording.marks.at_us) if recording.marks else []
    gaps = sorted(later - earlier for earlier, later in pairwise(at_us))
    return {
        "ttft_us": at_us[0] if at_us else None,
        "duration_us": recording.meta.duration_us,
        "gaps_us": {name: gaps[math.ceil(share * len(gaps)) - 1] for name, share in _PERCENTILES.items() if gaps},
        "at_us": at_us,
    }


def _hit_rate(counts: Mapping[str, Any]) -> float | None:
    asked = sum(counts[name] for name in _ASKED)
    return round(counts["hits"] / asked, 4) if asked else None


def _total(models: list[dict[str, Any]]) -> dict[str, Any]:
    """All models together; what is saved is the money of those that have a price, and it says what has none."""
    names = (*_COUNTED, *_PRICED, "unpriced_prompt_tokens", "unpriced_completion_tokens", "saved_seconds")
    total: dict[str, Any] = {name: sum(model[name] for model in models) for name in names}
    dollars = [model["saved_usd"] for model in models if model["saved_usd"] is not None]
    total["saved_seconds"] = round(total["saved_seconds"], 3)
    return total | {"saved_usd": sum(dollars) if dollars else None, "hit_rate": _hit_rate(total)}


def _kind_of_owner(owner: str) -> str:
    """Whose an answer is, without saying who that is."""
    if owner == "shared":
        return owner
    return "namespace" if owner.startswith("ns:") else "tenant"

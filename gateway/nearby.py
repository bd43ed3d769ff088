"""Which of the recent recordings is most like a request that has none, and how the two differ."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import orjson

from gateway.core.apis import Api, RequestProblem
from gateway.core.explain import Nearest, nearest
from gateway.core.key import CacheKey, canonical_text
from gateway.core.policy import age_s
from gateway.core.recording import Meta
from gateway.errors import StoreCorrupt
from gateway.ports import Clock, Inventory
from gateway.questions import Asked

_MAX_CANDIDATES = 100
_MAX_CANDIDATES_BYTES = 20_000_000

_Candidate = tuple[Meta, dict[str, Any]]
"""What is known of a recording, and the body of the request that it answers."""


class Nearby:
    """Looks among the recordings whose requests are kept."""

    def __init__(self, inventory: Inventory, clock: Clock) -> None:
        self._inventory = inventory
        self._clock = clock

    async def nearest(self, asked: Asked, api: Api, *, own: bool = False) -> dict[str, Any] | None:
        """The one whose request is most like this one, and the first thing that tells them apart; None where there is none.

        ``own``: only among those that are meant for whoever asks: for others' eyes a request is not. Raises `StoreError`.
        """
        candidates = await self._recent(api, asked.owner if own else None)
        # Comparing takes long enough to hold all else up.
        found = await asyncio.to_thread(_nearest_of, asked, api, candidates)
        if found is None:
            return None
        meta = candidates[found.candidate][0]
        return {
            "key": found.candidate,
            "age_s": age_s(meta, self._clock.now()),
            "compared": len(candidates),
            "differences": found.differing,
            "first": found.first._asdict() if found.first else None,
            "differs_in": [] if found.differing else _differences_beside(asked, meta),
        }

    async def _recent(self, api: Api, owner: str | None) -> dict[CacheKey, _Candidate]:
        """The recent recordings of this API: what is known of each, and its request's body."""
        found: dict[CacheKey, _Candidate] = {}
        size_bytes = 0
        for key in await self._inventory.recent(_MAX_CANDIDATES):
            try:
                inspected = await self._inventory.inspect(key)
            except StoreCorrupt:
                continue
            if inspected is None or not inspected.recording.request:
                continue
            if owner is not None and inspected.recording.meta.owner != owner:
                continue
            size_bytes += inspected.recording.size_bytes
            if size_bytes > _MAX_CANDIDATES_BYTES:
                break
            asked = orjson.loads(inspected.recording.request)
            if asked["api"] == api.name:
                found[key] = inspected.recording.meta, asked["body"]
        return found


def _nearest_of(asked: Asked, api: Api, candidates: Mapping[CacheKey, _Candidate]) -> Nearest[CacheKey] | None:
    texts = []
    for key, (_, body) in candidates.items():
        with suppress(RequestProblem):  # of another version's request
            texts.append((key, canonical_text(api, body, asked.ignored)))
    return nearest(asked.canonical, texts)


def _differences_beside(asked: Asked, meta: Meta) -> list[str]:
    """What tells two keys apart whose requests are the same."""
    found = [name for name in ("namespace", "upstream", "model") if getattr(asked, name) != getattr(meta, name)]
    tenants = {_tenant_in(asked.owner, asked.namespace), _tenant_in(meta.owner, meta.namespace)}
    if len(tenants - {""}) > 1:
        found.insert(0, "tenant")
    return found or ["the secret of the keys, or the version of their scheme"]


def _tenant_in(owner: str, namespace: str) -> str:
    """An owner without its namespace."""
    return owner.removesuffix(f"ns:{namespace}").removesuffix("/") if namespace else owner

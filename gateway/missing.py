"""What a caller is told in replay mode whose request is not recorded: its key, and the nearest recording's difference."""

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.errors import NotRecorded, StoreError
from gateway.nearby import Nearby
from gateway.questions import Asked, Questions, Request

# Looking for the nearest takes a hundred lookups: a load test that misses must not bring everything to a stop.
_AT_ONCE = 2
_MAX_WAITING = 32


class Missing:
    """Makes the errors of requests that are not recorded."""

    def __init__(self, questions: Questions, nearby: Nearby) -> None:
        self._questions = questions
        self._nearby = nearby
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0

    async def error(self, request: Request) -> NotRecorded:
        """What to raise. Nothing is told of others' recordings."""
        asked = self._questions.asked(request)
        nearest = await self._nearest(asked, request)
        return NotRecorded(_words(asked, nearest), key=asked.key, nearest=nearest, request=request.body)

    async def _nearest(self, asked: Asked, request: Request) -> dict[str, Any] | None:
        """None also where too many wait for theirs, or the store has gone."""
        if self._waiting >= _MAX_WAITING:
            return None
        self._waiting += 1
        try:
            async with self._turns:
                return await self._nearby.nearest(asked, request.api, own=True)
        except StoreError:
            return None
        finally:
            self._waiting -= 1


def _words(asked: Asked, nearest: Mapping[str, Any] | None) -> str:
    told = f"The gateway is in replay mode, and this request is not recorded (its key: {asked.key})."
    if nearest is None:
        shared = "each credential has its own, unless [cache] scope is shared"
        return f"{told} None of this caller's recordings is like it; {shared}."
    key, first, differing = nearest["key"], nearest["first"], nearest["differences"]
    if first is None:
        return f"{told} The recording {key} of the same request differs in: {', '.join(nearest['differs_in'])}."
    ours, theirs = (orjson.dumps(first[name]).decode() for name in ("ours", "theirs"))
    places = "" if differing == 1 else f"{differing} places, the first of them "
    return f"{told} The nearest recording, {key}, differs in {places}{first['path']}: {ours} here, {theirs} there."

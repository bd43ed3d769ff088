"""What compressing recordings costs a lookup and saves in Redis: every size is looked up compressed and plain in turn."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop
from figures import Extent, Figures
from recordings import recording
from stage import Measured

from gateway.config import RedisConfig
from gateway.core.key import CacheKey
from gateway.core.recording import Recording
from gateway.store.redis import RedisStore, connect

SIZES_TOKENS = (64, 256, 1024)
_KEY = CacheKey("c" * 40)
_AT_ONCE = 16
_ALWAYS, _NEVER = 1, 0


def compression(redis_socket: Path, extent: Extent) -> list[Figures]:
    """For each size: microseconds a lookup, of many at once and of one, and the bytes that Redis holds."""
    return [uvloop.run(_round(f"unix://{redis_socket}", extent.seconds / 3)) for _ in range(extent.rounds)]


def figure(tokens: int) -> str:
    return f"compressed_{tokens}"


async def _round(url: str, seconds: float) -> Figures:
    figures: Figures = {}
    for tokens in SIZES_TOKENS:
        looked_up = recording(tokens)
        figures[figure(tokens)] = {
            "gateway": await _looked_up(url, looked_up, _ALWAYS, seconds),
            "bare": await _looked_up(url, looked_up, _NEVER, seconds),
        }
    return figures


async def _looked_up(url: str, recording: Recording, compress_from_bytes: int, seconds: float) -> Measured:
    config = RedisConfig(url=url, prefix=f"bench{compress_from_bytes}")
    store = RedisStore(connect(config, url), config, secret=b"s" * 32, compress_from_bytes=compress_from_bytes)
    async with store:
        await store.store(_KEY, recording)
        inspected = await store.inspect(_KEY)
        return {
            "lookup_us": await _time_us(store, 1, seconds),
            "many_us": await _time_us(store, _AT_ONCE, seconds),
            "stored_bytes": inspected.stored_bytes if inspected else None,
        }


async def _time_us(store: RedisStore, at_once: int, seconds: float) -> float:
    """How long a lookup takes, of so many at once."""
    done, began = 0, time.perf_counter()
    while (passed_s := time.perf_counter() - began) < seconds:
        found: Sequence[Recording | None] = await asyncio.gather(*(store.lookup(_KEY, "stream") for _ in range(at_once)))
        assert all(found)
        done += at_once
    return passed_s / done * 1e6

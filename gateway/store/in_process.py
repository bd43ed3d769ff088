"""The store of last resort: an imitation of Redis in this process, for where there is no server to spawn."""

from typing import Any


def in_process_redis() -> Any:
    """A client of its own little server. Imported late: it is slow to load, and seldom needed."""
    from fakeredis.aioredis import FakeRedis  # noqa: PLC0415

    return FakeRedis(socket_timeout=None)  # with one, Python 3.11's `asyncio.wait_for` may lose a cancellation

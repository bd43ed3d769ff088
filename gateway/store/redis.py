"""Recordings in Redis (7.0 or later, Valkey, Dragonfly, hosted ones; Cluster by the hash tag).

Keys, all under ``[redis] prefix`` (``gw``):

| key            | type   | holds                                                                            | lives      |
|----------------|--------|----------------------------------------------------------------------------------|------------|
| `gw:{K}:rec`   | hash   | `v` schema version, `at` start of the flight (µs), `meta` (JSON), `sse` (all     | `ttl_s`    |
|                |        | frames, marked where a reply differs), `marks` (arrivals, and what stood there), |            |
|                |        | `body` (JSON)                                                                    |            |
| `gw:secret`    | string | the secret of the cache keys, where the configuration names none                 | for ever   |

``{K}`` is the cache key, so all keys of one cache key share a slot.

A lookup is one ``HMGET`` under a hard deadline. After a few failures in a row the store counts as away: nobody waits
for it, until a watch sees that it answers in time again.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, Self

import redis.asyncio as aioredis

from gateway.config import RedisConfig
from gateway.core.key import CacheKey
from gateway.core.recording import SCHEMA_VERSION, CorruptRecording, Marks, Meta, Recording
from gateway.errors import StoreCorrupt, StoreError, StoreUnavailable
from gateway.store.client import FEWEST_CONNECTIONS, StoreRefused, connect, store_errors_only
from gateway.store.lookups import Lookups

__all__ = ["RedisStore", "connect"]

log = logging.getLogger(__name__)

_FIELDS = {"stream": ("v", "meta", "sse", "marks"), "whole": ("v", "meta", "body")}
_VERSION = b"%d" % SCHEMA_VERSION

# KEYS: the recording. ARGV: v, at, meta, sse, marks, body, life in ms. A recording of a later-started flight stays.
# The first write is one that a server without memory refuses: after any other it would let this one pass.
_STORE = """
local at = redis.pcall('HGET', KEYS[1], 'at')
if type(at) == 'table' then
  redis.call('DEL', KEYS[1])
elseif at and (tonumber(at) or 0) > tonumber(ARGV[2]) then
  return 0
end
redis.call('HSET', KEYS[1], 'v', ARGV[1], 'at', ARGV[2], 'meta', ARGV[3], 'sse', ARGV[4], 'marks', ARGV[5], 'body', ARGV[6])
redis.call('PEXPIRE', KEYS[1], ARGV[7])
return 1
"""

_PATIENT_S = 5.0
_FAILURES_TO_DOWN = 3
_WATCH_UP_S = 10.0
_LOG_INTERVAL_S = 30.0
# No server refuses such a life: some count it in nanoseconds, one in 28 bits of seconds.
_LONGEST_LIFE_S = 2**28 - 1
# Recordings that wait to be written, together. What is beyond is not stored.
_MAX_UNWRITTEN_BYTES = 67_108_864


class RedisStore:
    """The `Store` on a Redis client. An async context: entering agrees on the secret, if the server can be reached."""

    def __init__(self, client: aioredis.Redis, config: RedisConfig, *, secret: bytes | None = None) -> None:
        self._client = client
        self._config = config
        self._secret = secret or secrets.token_bytes(32)
        self._agree = secret is None
        self._prefix = config.prefix
        connections = max(FEWEST_CONNECTIONS, config.max_connections)
        quick, patient = connections // 4, max(1, connections // 8)
        limit_s = config.command_timeout_s
        self._lookups = Lookups(client, places=quick, wait_s=config.lookup_timeout_s, limit_s=limit_s)
        self._patient_lookups = Lookups(client, places=patient, wait_s=_PATIENT_S, limit_s=limit_s)
        self._writes = asyncio.Semaphore(connections - quick - patient - 1)
        self._unwritten_bytes = 0
        self._store = client.register_script(_STORE)
        self._deletions: dict[CacheKey, asyncio.Task[None]] = {}
        self._failures = 0
        self._failed_at = 0.0
        self._available = False
        self._closed = False
        self._fell = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._told_at: dict[str, float] = {}
        self._told_away = False

    @property
    def secret(self) -> bytes:
        return self._secret

    @property
    def available(self) -> bool:
        return self._available

    async def __aenter__(self) -> Self:
        await self._look()
        self._watch = asyncio.create_task(self._keep_watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def lookup(self, key: CacheKey, want: Literal["stream", "whole"], *, patient: bool = False) -> Recording | None:
        if not (self._available or patient):
            raise StoreUnavailable("the store is away")
        began = _now()
        lookups = self._patient_lookups if patient else self._lookups
        try:
            fields = await lookups.get(self._key(key), _FIELDS[want])
            self._failures = 0
            return _load(want, fields)
        except StoreUnavailable as error:
            self._failed(error, began)
            raise
        except StoreCorrupt as error:
            self._discard(key, error)
            raise

    async def store(self, key: CacheKey, recording: Recording) -> bool:
        meta, marks = recording.meta, recording.marks or Marks()
        at_us, life_ms = int(meta.started_at * 1e6), max(1, int(min(meta.ttl_s, _LONGEST_LIFE_S) * 1000))
        parts = (_VERSION, at_us, meta.dumps(), recording.sse or b"", marks.pack(), recording.body or b"", life_ms)
        with self._room_for(recording.size_bytes):
            async with self._writes:
                return bool(await self._command(lambda: self._store(keys=[self._key(key)], args=parts)))

    async def delete(self, key: CacheKey) -> None:
        async with self._writes:
            await self._command(lambda: self._client.unlink(self._key(key)))

    async def close(self) -> None:
        self._closed = True  # Python 3.11's `asyncio.wait_for`, which clients use, may lose a cancellation
        tasks = [*self._deletions.values(), *([self._watch] if self._watch else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(self._lookups.close(), self._patient_lookups.close())
        with suppress(StoreError), store_errors_only():
            await self._client.aclose()

    def _key(self, key: CacheKey) -> str:
        return f"{self._prefix}:{{{key}}}:rec"

    @contextmanager
    def _room_for(self, size_bytes: int) -> Iterator[None]:
        """A Redis that takes less than models say must not fill our memory."""
        if self._unwritten_bytes and self._unwritten_bytes + size_bytes > _MAX_UNWRITTEN_BYTES:
            raise StoreUnavailable("too much waits to be written")
        self._unwritten_bytes += size_bytes
        try:
            yield
        finally:
            self._unwritten_bytes -= size_bytes

    async def _command(self, call: Callable[[], Awaitable[Any]]) -> Any:
        if not self._available:
            raise StoreUnavailable("the store is away")
        began = _now()
        try:
            with store_errors_only():
                async with asyncio.timeout(self._config.command_timeout_s):
                    return await call()
        except StoreRefused as error:
            # No reason to stop looking things up.
            self._tell("Redis refuses to store: %s", error)
            raise
        except StoreUnavailable as error:
            self._failed(error, began)
            raise

    def _discard(self, key: CacheKey, why: StoreCorrupt) -> None:
        """Deletes what does not load; the caller does not wait for it."""
        if key in self._deletions:
            return
        self._tell("Stored recordings do not load and are deleted: %s", why)
        self._deletions[key] = task = asyncio.create_task(self._delete_quietly(key))
        task.add_done_callback(lambda _: self._deletions.pop(key))

    async def _delete_quietly(self, key: CacheKey) -> None:
        with suppress(StoreError):
            await self.delete(key)

    def _failed(self, error: StoreError, began: float) -> None:
        """Failures count as in a row only if each call began after the last had failed: one hiccup hits many calls."""
        if began >= self._failed_at:
            self._failures += 1
            self._failed_at = _now()
        if self._available and self._failures >= _FAILURES_TO_DOWN:
            self._available = False
            self._fell.set()
        if not self._available and self._tell("Redis does not serve, requests go on without the cache: %s", error):
            self._told_away = True

    def _tell(self, text: str, error: StoreError) -> bool:
        """One line of a kind an interval: an outage must not fill the log."""
        now = _now()
        if now - self._told_at.get(text, float("-inf")) < _LOG_INTERVAL_S:
            return False
        self._told_at[text] = now
        log.warning(text, error)
        return True

    async def _keep_watch(self) -> None:
        """Notices that the store is back, and that it came back empty."""
        while not self._closed:
            self._fell.clear()
            try:
                async with asyncio.timeout(_WATCH_UP_S if self._available else self._config.cooldown_s):
                    await self._fell.wait()
            except TimeoutError:
                await self._look()

    async def _look(self) -> None:
        began = _now()
        try:
            with store_errors_only():
                async with asyncio.timeout(
                    self._config.command_timeout_s if self._available else self._config.connect_timeout_s
                ):
                    await self._agree_on_secret()
            if not self._available:
                # Slow is no better than gone: it is back when a lookup is answered in time.
                await self._lookups.get(f"{self._prefix}:probe", ("v",))
        except StoreError as error:
            self._failed(error, began)
            return
        if not self._available:
            self._available = True
            self._failures = 0
            if self._told_away:
                self._told_away = False
                log.warning("Redis is back")

    async def _agree_on_secret(self) -> None:
        """All replicas take the secret that the first of them wrote; it is written again where it was lost."""
        if not self._agree:
            await self._client.ping()
            return
        name = f"{self._prefix}:secret"
        try:
            with store_errors_only():
                await self._client.set(name, self._secret, nx=True)
        except StoreRefused as error:
            # One that is there already will do.
            self._tell("Redis refuses to store: %s", error)
        agreed = await self._client.get(name)
        if isinstance(agreed, bytes) and 16 <= len(agreed) <= 64:
            self._secret = agreed


def _now() -> float:
    return asyncio.get_running_loop().time()


def _load(want: str, fields: Sequence[bytes | None]) -> Recording | None:
    """The recording, or None if there is none. Raises `StoreCorrupt`."""
    version, meta, *parts = fields
    if version is None and all(field is None for field in fields):
        return None
    if version != _VERSION:
        raise StoreCorrupt(f"its schema is {version!r}, not {_VERSION!r}")
    if meta is None or None in parts:
        raise StoreCorrupt("a field is missing")
    try:
        if want == "whole":
            return Recording(Meta.loads(meta), body=parts[0])
        sse, marks = parts[0] or b"", Marks.unpack(parts[1] or b"")
        if marks.size != len(sse):
            raise StoreCorrupt("the marks are of other frames")
        return Recording(Meta.loads(meta), sse=sse, marks=marks)
    except CorruptRecording as error:
        raise StoreCorrupt(str(error)) from None

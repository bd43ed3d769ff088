"""Recordings in Redis (7.0 or later, Valkey, Dragonfly, hosted ones; Cluster by the hash tag).

Keys, all under ``[redis] prefix`` (``gw``):

| key            | type   | holds                                                                            | lives      |
|----------------|--------|----------------------------------------------------------------------------------|------------|
| `gw:{K}:rec`   | hash   | `v` schema version, `at` start of the flight (µs), `meta` (JSON), `sse` (all     | `ttl_s`    |
|                |        | frames, ready to write), `marks` (frame ends, arrivals, spans), `body` (JSON)    |            |
| `gw:secret`    | string | the secret of the cache keys, where the configuration names none                 | for ever   |

``{K}`` is the cache key, so all keys of one cache key share a slot.

A lookup is one ``HMGET`` under a hard deadline; lookups of one turn of the loop leave in one pipeline. After a few
failures in a row the store counts as away, nobody waits for it, and a watch on it notices its return.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Sequence
from typing import Any, Literal, Self

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from gateway.config import RedisConfig
from gateway.core.key import CacheKey
from gateway.core.recording import SCHEMA_VERSION, CorruptRecording, Marks, Meta, Recording
from gateway.errors import StoreCorrupt, StoreError, StoreUnavailable

log = logging.getLogger(__name__)

_FIELDS = {"stream": ("v", "meta", "sse", "marks"), "whole": ("v", "meta", "body")}
_VERSION = b"%d" % SCHEMA_VERSION

# KEYS: the recording. ARGV: v, at, meta, sse, marks, body, life in ms. A recording of a later-started flight stays.
_STORE = """
local at = redis.pcall('HGET', KEYS[1], 'at')
if type(at) == 'string' and tonumber(at) > tonumber(ARGV[2]) then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'v', ARGV[1], 'at', ARGV[2], 'meta', ARGV[3], 'sse', ARGV[4], 'marks', ARGV[5], 'body', ARGV[6])
redis.call('PEXPIRE', KEYS[1], ARGV[7])
return 1
"""

_PATIENT_S = 5.0
_FAILURES_TO_DOWN = 3
_WATCH_UP_S = 10.0
_MAX_BATCHES = 4
# Below this a late timer is the loop's usual business; above it the loop was stalled, and Redis may have answered.
_STALL_S = 0.005
_MAX_EXTENSIONS = 20
_LOG_INTERVAL_S = 30.0


def connect(config: RedisConfig, url: str) -> aioredis.Redis:
    """A client without the library's retries: a dead cache must cost one time-out, not ten."""
    return aioredis.Redis.from_url(
        url,
        protocol=config.protocol,
        socket_timeout=config.command_timeout_s,
        socket_connect_timeout=config.connect_timeout_s,
        max_connections=config.max_connections,
        retry=Retry(NoBackoff(), 0),
    )


class RedisStore:
    """The `Store` on a Redis client. An async context: entering agrees on the secret, if the server can be reached."""

    def __init__(self, client: aioredis.Redis, config: RedisConfig, *, secret: bytes | None = None) -> None:
        self._client = client
        self._config = config
        self._secret = secret or secrets.token_bytes(32)
        self._agree = secret is None
        self._prefix = config.prefix
        self._lookups = _Lookups(client, config.lookup_timeout_s)
        self._store = client.register_script(_STORE)
        self._writes = asyncio.Semaphore(max(1, config.max_connections - _MAX_BATCHES - 1))
        self._failures = 0
        self._available = False
        self._told_at = float("-inf")
        self._watch: asyncio.Task[None] | None = None
        self._fell = asyncio.Event()

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
        try:
            fields = await self._lookups.get(self._key(key), _FIELDS[want], _PATIENT_S if patient else None)
        except StoreUnavailable as error:
            self._failed(error)
            raise
        except ResponseError as error:
            raise await self._corrupt(key, str(error)) from None
        self._failures = 0
        if fields[0] is None:
            return None
        try:
            return _load(want, fields)
        except CorruptRecording as error:
            raise await self._corrupt(key, str(error)) from None

    async def store(self, key: CacheKey, recording: Recording) -> bool:
        if not self._available:
            raise StoreUnavailable("the store is away")
        meta, marks = recording.meta, recording.marks or Marks()
        at_us, life_ms = int(meta.started_at * 1e6), max(1, int(meta.ttl_s * 1000))
        parts = (_VERSION, at_us, meta.dumps(), recording.sse or b"", marks.pack(), recording.body or b"", life_ms)
        async with self._writes:
            return bool(await self._command(self._store(keys=[self._key(key)], args=parts)))

    async def delete(self, key: CacheKey) -> None:
        await self._command(self._client.unlink(self._key(key)))

    async def close(self) -> None:
        if self._watch:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self._lookups.close()
        await self._client.aclose()

    def _key(self, key: CacheKey) -> str:
        return f"{self._prefix}:{{{key}}}:rec"

    async def _corrupt(self, key: CacheKey, why: str) -> StoreCorrupt:
        log.warning("a stored recording does not load and is deleted: %s", why)
        try:
            await self.delete(key)
        except StoreError:
            log.debug("it could not be deleted")
        return StoreCorrupt(why)

    async def _command(self, command: Awaitable[Any]) -> Any:
        try:
            result = await command
        except ResponseError as error:
            # The server answered, and refused: read-only, out of memory. The lookups may still work.
            self._tell("Redis refuses to store: %s", error)
            raise StoreUnavailable(str(error)) from error
        except (RedisError, OSError) as error:
            self._failed(error)
            raise StoreUnavailable(str(error)) from error
        self._failures = 0
        return result

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._available and self._failures >= _FAILURES_TO_DOWN:
            self._available = False
            self._fell.set()
            self._tell("Redis is away, requests go on without the cache: %s", error)

    def _tell(self, text: str, error: Exception) -> None:
        """One line an interval: an outage must not fill the log."""
        now = asyncio.get_running_loop().time()
        if now - self._told_at >= _LOG_INTERVAL_S:
            self._told_at = now
            log.warning(text, error)

    async def _keep_watch(self) -> None:
        """Notices that the store is back, and that it came back empty."""
        while True:
            self._fell.clear()
            try:
                async with asyncio.timeout(_WATCH_UP_S if self._available else self._config.cooldown_s):
                    await self._fell.wait()
            except TimeoutError:
                await self._look()

    async def _look(self) -> None:
        try:
            # While it is away a look must be as quick as a lookup has to be: slow is no better than gone.
            limit_s = self._config.command_timeout_s if self._available else max(0.25, self._config.lookup_timeout_s)
            async with asyncio.timeout(limit_s):
                await self._agree_on_secret()
        except (RedisError, OSError) as error:
            if self._available:
                self._failed(error)
            else:
                self._tell("Redis cannot be reached, requests go on without the cache: %s", error)
            return
        self._failures = 0
        if not self._available:
            self._available = True
            if self._told_at > 0:
                log.warning("Redis is back")
                self._told_at = float("-inf")

    async def _agree_on_secret(self) -> None:
        """All replicas take the secret that the first of them wrote; it is written again where it was lost."""
        if not self._agree:
            await self._client.ping()
            return
        name = f"{self._prefix}:secret"
        try:
            await self._client.set(name, self._secret, nx=True)
        except ResponseError as error:
            # Read-only, or out of memory: one that is there already will do.
            self._tell("Redis refuses to store: %s", error)
        agreed = await self._client.get(name)
        if isinstance(agreed, bytes) and 16 <= len(agreed) <= 64:
            self._secret = agreed


def _load(want: str, fields: Sequence[bytes | None]) -> Recording:
    version, meta, *parts = fields
    if version != _VERSION:
        raise CorruptRecording(f"its schema is {version!r}, not {_VERSION!r}")
    if meta is None or None in parts:
        raise CorruptRecording("a field is missing")
    if want == "whole":
        return Recording(Meta.loads(meta), body=parts[0])
    sse, marks = parts
    return Recording(Meta.loads(meta), sse=sse, marks=Marks.unpack(marks or b""))


class _Batch:
    """Lookups that leave together, and the time by which they must be back."""

    __slots__ = ("deadline", "extensions", "task", "timer", "wanted")

    def __init__(self) -> None:
        self.wanted: list[tuple[str, Sequence[str], asyncio.Future[list[bytes | None]]]] = []
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.deadline = 0.0
        self.extensions = 0


class _Lookups:
    """Joins the lookups of one turn of the loop in one pipeline; at most a few are on their way at once."""

    def __init__(self, client: aioredis.Redis, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._next = _Batch()
        self._scheduled = False
        self._running: set[_Batch] = set()

    async def get(self, name: str, fields: Sequence[str], timeout_s: float | None) -> list[bytes | None]:
        """The hash's fields. Raises `StoreUnavailable`, and `ResponseError` where the key is of another type."""
        if timeout_s is not None:
            return await self._get_patiently(name, fields, timeout_s)
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[bytes | None]] = loop.create_future()
        self._next.wanted.append((name, fields, found))
        # Each lookup has its own right to the deadline: one that waits for a place in a batch is timed as well.
        if self._next.timer is None:
            self._start_timer(self._next, loop)
        if not self._scheduled and len(self._running) < _MAX_BATCHES:
            self._scheduled = True
            loop.call_soon(self._send)
        return await found

    async def close(self) -> None:
        tasks = [batch.task for batch in self._running if batch.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._next.timer:
            self._next.timer.cancel()

    async def _get_patiently(self, name: str, fields: Sequence[str], timeout_s: float) -> list[bytes | None]:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._hmget(name, fields)
        except ResponseError:
            raise
        except (RedisError, OSError) as error:
            raise StoreUnavailable(str(error)) from error

    async def _hmget(self, name: str, fields: Sequence[str]) -> list[bytes | None]:
        found: list[bytes | None] = await self._client.execute_command("HMGET", name, *fields)  # type: ignore[no-untyped-call]
        return found

    def _send(self) -> None:
        self._scheduled = False
        batch, self._next = self._next, _Batch()
        if not batch.wanted:
            return
        self._running.add(batch)
        batch.task = asyncio.get_running_loop().create_task(self._run(batch))

    async def _run(self, batch: _Batch) -> None:
        try:
            results = await self._fetch(batch)
        except (RedisError, OSError) as error:
            _fail(batch, StoreUnavailable(str(error) or type(error).__name__))
        except asyncio.CancelledError:
            _fail(batch, StoreUnavailable("no answer in time"))
            raise
        else:
            for (_, _, found), result in zip(batch.wanted, results, strict=True):
                _settle(found, result)
        finally:
            if batch.timer:
                batch.timer.cancel()
            self._running.discard(batch)
            if self._next.wanted and not self._scheduled:
                self._send()

    async def _fetch(self, batch: _Batch) -> list[Any]:
        if len(batch.wanted) == 1:
            name, fields, _ = batch.wanted[0]
            try:
                return [await self._hmget(name, fields)]
            except ResponseError as error:
                return [error]
        pipeline = self._client.pipeline(transaction=False)
        for name, fields, _ in batch.wanted:
            pipeline.execute_command("HMGET", name, *fields)
        return await pipeline.execute(raise_on_error=False)

    def _start_timer(self, batch: _Batch, loop: asyncio.AbstractEventLoop) -> None:
        batch.deadline = loop.time() + self._timeout_s
        batch.timer = loop.call_at(batch.deadline, self._expire, batch)

    def _expire(self, batch: _Batch) -> None:
        """The time is over, unless it was the loop that was late: then an answer may lie in the socket, unread."""
        loop = asyncio.get_running_loop()
        late_s = loop.time() - batch.deadline
        if late_s > _STALL_S and batch.extensions < _MAX_EXTENSIONS:
            batch.extensions += 1
            batch.deadline = loop.time() + min(late_s, self._timeout_s)
            batch.timer = loop.call_at(batch.deadline, self._expire, batch)
            return
        _fail(batch, StoreUnavailable("no answer in time"))
        if batch.task:
            batch.task.cancel()  # drops the connection, and with it the late answer
        elif batch is self._next:
            self._next = _Batch()


def _fail(batch: _Batch, error: StoreUnavailable) -> None:
    for _, _, found in batch.wanted:
        if not found.done():
            found.set_exception(error)


def _settle(found: "asyncio.Future[list[bytes | None]]", result: Any) -> None:
    if found.done():
        return
    if isinstance(result, Exception):
        found.set_exception(result if isinstance(result, ResponseError) else StoreUnavailable(str(result)))
    else:
        found.set_result(result)

"""The store on Redis (7.0 or later, Valkey, Dragonfly, hosted ones; Cluster by the hash tag). `keys` has the schema.

A lookup is one ``HMGET`` under a hard deadline.
"""

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, Self

from gateway.config import RedisConfig
from gateway.core.key import CacheKey
from gateway.core.recording import SCHEMA_VERSION, CorruptRecording, Marks, Meta, Recording
from gateway.errors import StoreCorrupt, StoreError, StoreUnavailable
from gateway.ports import FlightId, LogName, Writer
from gateway.store import scripts
from gateway.store.client import Client, StoreRefused, connect
from gateway.store.keys import Keys
from gateway.store.logs import Logs, fenced
from gateway.store.server import Server

__all__ = ["RedisStore", "connect"]

_FIELDS = {"stream": ("v", "meta", "sse", "marks"), "whole": ("v", "meta", "body")}
_VERSION = b"%d" % SCHEMA_VERSION

# No server refuses such a life: some count it in nanoseconds, one in 28 bits of seconds.
_LONGEST_LIFE_S = 2**28 - 1
# Recordings that wait to be written, together. What is beyond is not stored.
_MAX_UNWRITTEN_BYTES = 67_108_864
# How often a recording that makes way may turn out to be another one than was thought.
_STORE_TRIES = 4


class RedisStore(Logs):
    """The `Store` on a Redis client. An async context: entering agrees on the secret, if the server can be reached."""

    def __init__(
        self,
        client: Client,
        config: RedisConfig,
        *,
        secret: bytes | None = None,
        lease_s: float = 5.0,
        resume_s: float = 300.0,
    ) -> None:
        keys = Keys(config.prefix)
        server = Server(client, config, self._agree_on_secret, ("HMGET", keys.probe, "v"))
        super().__init__(server, keys, lease_s=lease_s, resume_s=resume_s)
        self._secret = secret or secrets.token_bytes(32)
        self._agree = secret is None
        self._unwritten_bytes = 0
        self._deletions: dict[CacheKey, asyncio.Task[None]] = {}

    @property
    def secret(self) -> bytes:
        return self._secret

    @property
    def available(self) -> bool:
        return self._server.available

    async def __aenter__(self) -> Self:
        self._bell.open()
        try:
            await self._server.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def lookup(self, key: CacheKey, want: Literal["stream", "whole"], *, patient: bool = False) -> Recording | None:
        try:
            fields = await self._server.look_up(("HMGET", self._keys.recording(key), *_FIELDS[want]), patient=patient)
            return _load(want, fields)
        except StoreCorrupt as error:
            self._discard(key, error)
            raise

    async def recording_of(self, log: LogName) -> Recording | None:
        """The recording that this flight left, for a stream, if it is still kept."""
        keys = [self._keys.recording(log.key), self._keys.replaced(log)]
        command = scripts.RECORDING_OF.call(keys, log.flight, *_FIELDS["stream"])
        return _load("stream", await self._server.run(command, "patient"))

    async def store(
        self,
        key: CacheKey,
        recording: Recording,
        *,
        ends: LogName | None = None,
        writer: Writer | None = None,
        end: bytes = b"",
    ) -> bool:
        with self._room_for(recording.size_bytes):
            own = replaced = LogName(key, FlightId(recording.meta.flight))
            for attempt in range(_STORE_TRIES):
                names = [self._keys.recording(key), self._keys.replaced(replaced), self._keys.replaced(own)]
                args = [*self._recorded(recording), int(attempt == _STORE_TRIES - 1)]
                if ends:
                    names += self._ownership(ends)
                    args += [ends.flight, str(writer), self._keys.bell(ends.flight), end, recording.meta.frames]
                answer = await self._server.write(scripts.STORE.call(names, *args))
                if not isinstance(answer, bytes):
                    break
                replaced = LogName(key, FlightId(answer.decode()))
        if answer < 0:
            raise fenced()
        return bool(answer)

    async def delete(self, key: CacheKey) -> None:
        await self._server.write(("UNLINK", self._keys.recording(key)))

    async def close(self) -> None:
        tasks = list(self._deletions.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(self._bell.close(), self._server.close())

    def _recorded(self, recording: Recording) -> list[Any]:
        meta, marks = recording.meta, recording.marks or Marks()
        at_us, life_ms = int(meta.started_at * 1e6), max(1, int(min(meta.ttl_s, _LONGEST_LIFE_S) * 1000))
        parts = (meta.dumps(), recording.sse or b"", marks.pack(), recording.body or b"")
        return [_VERSION, at_us, *parts, meta.flight, life_ms, self._resume_ms]

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

    def _discard(self, key: CacheKey, why: StoreCorrupt) -> None:
        """Deletes what does not load; the caller does not wait for it."""
        if key in self._deletions:
            return
        self._server.warn("Stored recordings do not load and are deleted: %s", why)
        self._deletions[key] = task = asyncio.create_task(self._delete_quietly(key))
        task.add_done_callback(lambda _: self._deletions.pop(key))

    async def _delete_quietly(self, key: CacheKey) -> None:
        with suppress(StoreError):
            await self.delete(key)

    async def _agree_on_secret(self) -> None:
        """All replicas take the secret that the first of them wrote; it is written again where it was lost."""
        if not self._agree:
            await self._server.ask(("EXISTS", self._keys.probe))
            return
        try:
            await self._server.ask(("SET", self._keys.secret, self._secret, "NX"))
        except StoreRefused as error:
            # One that is there already will do.
            self._server.warn("Redis refuses to store: %s", error)
        agreed = await self._server.ask(("GET", self._keys.secret))
        if isinstance(agreed, bytes) and 16 <= len(agreed) <= 64:
            self._secret = agreed


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

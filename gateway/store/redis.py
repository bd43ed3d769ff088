"""The store on Redis (7.0 or later, Valkey, Dragonfly, hosted ones; Cluster by the hash tag). `keys` has the schema.

A lookup is one ``HMGET`` under a hard deadline.
"""

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

from gateway.config import RedisConfig
from gateway.core.key import CacheKey
from gateway.core.recording import Marks, Recording
from gateway.errors import StoreCorrupt, StoreError, StoreUnavailable
from gateway.observe import StoreState
from gateway.ports import FlightId, LogName, Want, Writer
from gateway.store import scripts
from gateway.store.client import Client, Command, StoreRefused, connect
from gateway.store.inventory import MOST_RECENT, RedisInventory, milliseconds
from gateway.store.keys import Keys
from gateway.store.logs import Logs, fenced
from gateway.store.packing import FIELDS, VERSION, Packer
from gateway.store.server import Server

__all__ = ["RedisStore", "connect"]

# Recordings that wait to be written, together. What is beyond is not stored.
_MAX_UNWRITTEN_BYTES = 67_108_864
# How often a recording that makes way may turn out to be another one than was thought.
_STORE_TRIES = 4


class RedisStore(Logs, RedisInventory):
    """The `Store` and its `Inventory` on a Redis client.

    An async context: entering agrees on the secret, if the server can be reached.
    """

    def __init__(  # noqa: PLR0913  # by keyword, and each with a default
        self,
        client: Client,
        config: RedisConfig,
        *,
        secret: bytes | None = None,
        lease_s: float = 5.0,
        resume_s: float = 300.0,
        compress_from_bytes: int = 32_768,
    ) -> None:
        keys = Keys(config.prefix)
        server = Server(client, config, self._agree_on_secret, ("HMGET", keys.probe, "v"))
        super().__init__(server, keys, lease_s=lease_s, resume_s=resume_s)
        self._secret = secret or secrets.token_bytes(32)
        self._agree = secret is None
        self._packer = Packer(compress_from_bytes)
        self._unwritten_bytes = 0
        self._deletions: dict[str, asyncio.Task[None]] = {}
        """By the key that is deleted, or the first of them."""
        server.on_corrupt = self._mend
        self._to_note: dict[CacheKey, None] = {}
        self._notes: asyncio.Task[None] | None = None

    @property
    def secret(self) -> bytes:
        return self._secret

    @property
    def available(self) -> bool:
        return self._server.available

    @property
    def is_writable(self) -> bool:
        return self._server.is_writable

    @property
    def state(self) -> StoreState:
        return self._server.state

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

    async def lookup(self, key: CacheKey, want: Want, *, patient: bool = False) -> Recording | None:
        try:
            fields = await self._server.look_up(("HMGET", self._keys.recording(key), *FIELDS[want]), patient=patient)
            return await self._packer.load(want, fields)
        except StoreCorrupt as error:
            self._server.count_corrupt()
            self._discard(key, error)
            raise

    async def recording_of(self, log: LogName) -> Recording | None:
        """The recording that this flight left, for a stream, if it is still kept."""
        keys = [self._keys.recording(log.key), self._keys.replaced(log)]
        command = scripts.RECORDING_OF.call(keys, log.flight, *FIELDS["stream"])
        return await self._packer.load("stream", await self._server.run(command, "patient"))

    async def store(
        self,
        key: CacheKey,
        recording: Recording,
        *,
        ends: LogName | None = None,
        writer: Writer | None = None,
        end: bytes = b"",
    ) -> bool:
        with self._server.writing(), self._room_for(recording.size_bytes):
            recorded = await self._recorded(recording)
            own = replaced = LogName(key, FlightId(recording.meta.flight))
            for attempt in range(_STORE_TRIES):
                names = [self._keys.recording(key), self._keys.replaced(replaced), self._keys.replaced(own)]
                args = [*recorded, int(attempt == _STORE_TRIES - 1)]
                if ends:
                    names += self._ownership(ends)
                    args += [ends.flight, str(writer), self._keys.bell(ends.flight), end, recording.meta.frames]
                answer = await self._write(scripts.STORE.call(names, *args), key)
                if not isinstance(answer, bytes):
                    break
                replaced = LogName(key, FlightId(answer.decode()))
        if answer < 0:
            raise fenced()
        return bool(answer)

    async def delete(self, key: CacheKey) -> None:
        await self._server.write(("UNLINK", self._keys.recording(key)))

    async def close(self) -> None:
        tasks = [*self._deletions.values(), *filter(None, [self._notes])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(self._bell.close(), self._server.close())
        self._packer.close()

    async def _recorded(self, recording: Recording) -> list[Any]:
        meta, marks = recording.meta, recording.marks or Marks()
        at_us, life_ms = int(meta.started_at * 1e6), milliseconds(meta.ttl_s + meta.stale_s)
        sse, body, request = await self._packer.pack_all([recording.sse or b"", recording.body or b"", recording.request])
        parts = (meta.dumps(), sse, marks.pack(), body, request)
        return [VERSION, at_us, *parts, meta.flight, life_ms, self._resume_ms]

    async def _write(self, store: Command, key: CacheKey) -> Any:
        """Writes a recording, and notes beside it that its key has a recent one, which never fails the write.

        Where the recording gave way to a later one that is true as well.
        """
        if self._server.has_nodes:
            # Another node may have the list: it must not hold this up.
            answer = await self._server.write(store)
            self._note(key)
            return answer
        answer, *_ = await self._server.write_all([store, *self._noting(key)])
        if isinstance(answer, StoreError):
            raise answer
        return answer

    def _note(self, key: CacheKey) -> None:
        self._to_note.pop(key, None)
        self._to_note[key] = None
        if self._notes is None or self._notes.done():
            self._notes = asyncio.create_task(self._keep_noting())

    async def _keep_noting(self) -> None:
        """One after the other, so that a node that is late holds up nothing else."""
        while self._to_note:
            keys, self._to_note = list(self._to_note), {}
            with suppress(StoreError):
                await self._server.write_all(self._noting(*keys[-MOST_RECENT:]))

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
        """Deletes what does not load."""
        self._delete_quietly(("UNLINK", self._keys.recording(key)), self._keys.recording(key), why)

    def _mend(self, script: Command, why: StoreCorrupt) -> None:
        """Deletes what has another type than ours among the keys of a script."""
        names = [name for name in script[3 : 3 + script[2]] if self._keys.type_of(name)] if script[0] == "EVALSHA" else []
        if names and script[1] != scripts.MEND.digest:
            self._delete_quietly(scripts.MEND.call(names, *map(self._keys.type_of, names)), names[0], why)

    def _delete_quietly(self, command: Command, name: str, why: StoreCorrupt) -> None:
        """The caller does not wait for it."""

        async def delete() -> None:
            with suppress(StoreError):
                await self._server.write(command)

        if name not in self._deletions:
            self._server.warn("Stored entries do not load and are deleted: %s", why)
            self._deletions[name] = task = asyncio.create_task(delete())
            task.add_done_callback(lambda _: self._deletions.pop(name))

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
        try:
            agreed = await self._server.ask(("GET", self._keys.secret))
        except StoreCorrupt as error:
            self._server.warn("Stored entries do not load and are deleted: %s", error)
            await self._server.ask(("SET", self._keys.secret, self._secret))
            return
        if isinstance(agreed, bytes) and 16 <= len(agreed) <= 64:
            self._secret = agreed

"""Ports without sockets: a store in a dict, an upstream in the test's hand, a clock that stands still."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from gateway.core.key import CacheKey
from gateway.core.purge import Purge
from gateway.core.recording import Recording
from gateway.errors import GatewayError, StoreError, StoreFenced, StoreUnavailable
from gateway.ports import (
    Answer,
    Appended,
    Batch,
    Call,
    Claimed,
    Entry,
    FlightId,
    Inspected,
    Listed,
    LogName,
    Mirrored,
    Page,
    Peeked,
    Served,
    Writer,
)


class FakeClock:
    def __init__(self) -> None:
        self.time_s = 1_800_000_000.0

    def now(self) -> float:
        return self.time_s

    def monotonic(self) -> float:
        return self.time_s


EntryId = tuple[int, int]


@dataclass
class FakeLog:
    """One flight's log, with what belongs to it: entries have ids, so that a log that is written anew keeps its cursors."""

    entries: list[tuple[EntryId, Entry]] = field(default_factory=list)
    owner: str = ""
    last_writer: str = ""
    request: bytes = b""
    readers: dict[str, int] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    mirrored: dict[str, Mirrored] = field(default_factory=dict)

    @property
    def last(self) -> Entry:
        return self.entries[-1][1] if self.entries else Entry(0)

    @property
    def count(self) -> int:
        return self.last.count

    @property
    def ended(self) -> bool:
        return bool(self.last.end)

    @property
    def frames(self) -> bytes:
        """All that it holds."""
        return b"".join(frame for _, entry in self.entries for frame in entry.frames)

    def fenced(self, writer: Writer) -> bool:
        if self.owner:
            return self.owner != str(writer)
        return bool(self.entries) and (self.ended or self.last.released or self.last_writer != str(writer))

    def write(self, writer: Writer, entry: Entry) -> None:
        last = self.entries[-1][0] if self.entries else (0, 0)
        entry = replace(entry, by=writer.run)
        self.entries.append(((entry.count, last[1] + 1 if entry.count == last[0] else 1), entry))
        self.last_writer = str(writer)

    def trim(self, before: int) -> None:
        self.entries = [each for each in self.entries if each[0] >= (min(before + 1, self.count), 0)]

    def lose(self) -> None:
        """As Redis may, if it has no room, or is restarted."""
        self.entries, self.owner, self.request, self.mirrored = [], "", b"", {}


def now_ms() -> int:
    return int(asyncio.get_running_loop().time() * 1000)


class FakeStore:
    """What all replicas see, as one of them sees it: `replica_of` gives another one's view.

    ``gate`` holds every lookup back while it is set, ``write_gate`` every recording, ``claim_gate`` every claim.
    Leases end when the test says so: `expire`. ``lease_s`` is what readers are told of them: until it is over, they take
    an absent lease for one that its holder will renew.
    """

    secret = b"0123456789abcdef"
    available = True
    is_writable = True

    def __init__(self, replica: str = "a") -> None:
        self.replica = replica
        self.recordings: dict[str, Recording] = {}
        self.replaced: dict[LogName, Recording] = {}
        self.logs: dict[LogName, FakeLog] = {}
        self.now: dict[str, FlightId] = {}
        self.rings: dict[FlightId, list[Callable[[], object]]] = {}
        self.told: dict[str, Callable[[FlightId], object]] = {}
        self.marked: list[Purge] = []
        self.counted: dict[str, float] = {}
        self.reported: dict[str, bytes] = {}
        self.noted: dict[str, None] = {}
        self.page_size = 100
        self.lookups = self.claims = self.appends = self.reads = 0
        self.broken = False
        self.lease_s = 60.0
        self.gate: asyncio.Event | None = None
        self.write_gate: asyncio.Event | None = None
        self.claim_gate: asyncio.Event | None = None

    def replica_of(self, replica: str) -> "FakeStore":
        other = FakeStore(replica)
        for shared in ("recordings", "replaced", "logs", "now", "rings", "told", "marked", "counted", "reported", "noted"):
            setattr(other, shared, getattr(self, shared))
        return other

    def expire(self, name: LogName) -> None:
        """The writer's lease runs out."""
        self.logs[name].owner = ""
        if self.now.get(name.key) == name.flight:
            del self.now[name.key]
        self.ring(name.flight)

    def lose(self) -> None:
        """All is gone, as in a Redis that was restarted."""
        self.recordings.clear()
        self.replaced.clear()
        self.now.clear()
        for log in self.logs.values():
            log.lose()

    def ring(self, flight: FlightId) -> None:
        for ring in self.rings.get(flight, []):
            ring()

    def _check(self) -> None:
        if self.broken:
            raise StoreUnavailable("broken")

    async def lookup(self, key: str, want: str, *, patient: bool = False) -> Recording | None:
        self.lookups += 1
        found = self.recordings.get(key)
        if self.gate:
            await self.gate.wait()
        self._check()
        return found

    async def store(
        self,
        key: str,
        recording: Recording,
        *,
        ends: Any = None,
        writer: Any = None,
        end: bytes = b"",
        life_s: float | None = None,
    ) -> bool:
        if self.write_gate:
            await self.write_gate.wait()
        self._check()
        if ends:
            await self.end(ends, writer, end)
        old = self.recordings.get(key)
        if old and old.meta.started_at > recording.meta.started_at:
            return False
        if old:
            self.replaced[LogName(CacheKey(key), FlightId(old.meta.flight))] = old
        self.recordings[key] = recording
        self.noted.pop(key, None)
        self.noted[key] = None
        return True

    async def delete(self, key: str) -> None:
        self.recordings.pop(key, None)

    async def purges(self, after: str) -> tuple[list[Purge], str]:
        self._check()
        return self.marked[int(after.partition("-")[0]) :], f"{len(self.marked)}-0"

    async def mark(self, purge: Purge, *, life_s: float) -> None:
        self._check()
        self.marked.append(purge)

    async def count(self, counts: Mapping[str, float]) -> None:
        self._check()
        for name, by in counts.items():
            self.counted[name] = self.counted.get(name, 0) + by

    async def counts(self) -> dict[str, float]:
        self._check()
        return {"since": FakeClock().now(), **self.counted} if self.counted else {}

    async def report(self, process: str, report: bytes) -> None:
        self._check()
        self.reported[process] = report

    async def reports(self) -> list[bytes]:
        self._check()
        return list(self.reported.values())

    async def forget(self, processes: Sequence[str]) -> None:
        self._check()
        for process in processes:
            self.reported.pop(process, None)

    async def recent(self, limit: int) -> list[CacheKey]:
        self._check()
        return [CacheKey(key) for key in reversed(self.noted)][:limit]

    async def page(self, cursor: str = "") -> tuple[list[Listed], str]:
        """In the order of names, so that what comes and goes between pages moves nothing else."""
        self._check()
        found = [(key, recording, False) for key, recording in self.recordings.items()]
        found += [(log.key, recording, True) for log, recording in self.replaced.items()]
        named = {f"{key} {recording.meta.flight}": (key, recording.meta, replaced) for key, recording, replaced in found}
        names = [name for name in sorted(named) if name > cursor]
        listed = [
            Listed(CacheKey(key), meta, meta.ttl_s + meta.stale_s, replaced)
            for key, meta, replaced in map(named.__getitem__, names[: self.page_size])
        ]
        return listed, names[self.page_size - 1] if len(names) > self.page_size else ""

    async def inspect(self, key: CacheKey) -> Inspected | None:
        self._check()
        found = self.recordings.get(key)
        return found and Inspected(key, found, found.meta.ttl_s + found.meta.stale_s, found.size_bytes)

    async def erase(self, listed: Sequence[tuple[CacheKey, FlightId]], *, began_by_us: int) -> int:
        self._check()
        return sum(self._erase(LogName(*each), began_by_us) for each in listed)

    def _erase(self, log: LogName, began_by_us: int) -> int:
        stored = self.recordings.get(log.key)
        if stored and not log.flight:
            log = log._replace(flight=FlightId(stored.meta.flight))
        found = [stored] if stored and stored.meta.flight == log.flight else []
        found += [self.replaced[log]] if log in self.replaced else []
        if any(int(recording.meta.started_at * 1e6) > began_by_us for recording in found):
            return 0
        if stored in found:
            del self.recordings[log.key]
        self.replaced.pop(log, None)
        left = self.logs.get(log)
        if left and left.ended and not left.owner:
            left.lose()
        return len(found)

    async def claim(self, log: LogName, writer: Writer, *, newer_than_us: int = -1) -> Claimed:
        self.claims += 1
        if self.claim_gate:
            await self.claim_gate.wait()
        self._check()
        stored = self.recordings.get(log.key)
        if stored and int(stored.meta.started_at * 1e6) > newer_than_us:
            return Claimed(landed=True)
        if self.now.setdefault(log.key, log.flight) != log.flight:
            return Claimed(follow=self.now[log.key])
        self.logs.setdefault(log, FakeLog()).owner = str(writer)
        return Claimed()

    async def append(self, batches: Sequence[Batch]) -> list[Appended | StoreError]:
        self._check()
        return [self._append(batch) for batch in batches]

    def _append(self, batch: Batch) -> Appended | StoreError:
        self.appends += 1
        log = self.logs.setdefault(batch.log, FakeLog())
        if log.fenced(batch.writer):
            return StoreFenced("fenced")
        log.owner = str(batch.writer)
        if batch.joinable:
            self.now.setdefault(batch.log.key, batch.log.flight)
        elif self.now.get(batch.log.key) == batch.log.flight:
            del self.now[batch.log.key]
        if log.count == batch.first:
            log.request = log.request or batch.request
            if batch.head and not log.count and not log.last.head:
                log.write(batch.writer, Entry(0, head=batch.head))
            if batch.frames:
                entry = Entry(batch.first + len(batch.frames), tuple(batch.frames), tuple(batch.at_us))
                log.write(batch.writer, entry)
            if batch.trim_to:
                log.trim(batch.trim_to)
            self.ring(batch.log.flight)
        log.readers[self.replica] = batch.readers
        others = sum(count for replica, count in log.readers.items() if replica != self.replica)
        return Appended(log.count, others, frozenset(log.cancelled))

    async def read(self, log: LogName, cursor: str, *, readers: int, mirrored: Mirrored | None = None) -> Page:
        await asyncio.sleep(0)  # as any answer takes: who asks again and again must not stop all else
        self._check()
        self.reads += 1
        found = self.logs.get(log, FakeLog())
        found.readers[self.replica] = readers
        if mirrored and found.last.by == mirrored.behind:
            found.mirrored[mirrored.run] = mirrored
        after: EntryId = tuple(map(int, cursor.split("-")))
        entries = [each for each in found.entries if each[0] > after]
        if not entries and not found.owner and found.ended and found.entries[-1][0] != after:
            entries = found.entries[-1:]
        return Page(
            entries=tuple(entry for _, entry in entries),
            cursor="{}-{}".format(*entries[-1][0]) if entries else cursor,
            exists=bool(found.entries),
            lease_s=self.lease_s if found.owner else 0.0,
            writer=found.owner,
            cancelled=frozenset(found.cancelled),
            at_ms=now_ms(),
        )

    async def take_over(self, log: LogName, writer: Writer, *, behind: str, joinable: bool) -> bool:
        self._check()
        found = self.logs.setdefault(log, FakeLog())
        if found.owner or found.ended:
            return found.owner == str(writer)
        if found.entries and found.last.by != behind:
            return False
        found.owner = str(writer)
        if joinable:
            self.now.setdefault(log.key, log.flight)
        if found.entries:
            found.write(writer, Entry(found.count, run=writer.run))
        found.mirrored[writer.run] = Mirrored(writer.run, behind, found.count, 1 << 60)
        self.ring(log.flight)
        return True

    async def release(self, log: LogName, writer: Writer) -> None:
        self._check()
        found = self.logs[log]
        if found.owner == str(writer):
            found.write(writer, Entry(found.count, released=True))
            self.expire(log)

    async def end(self, log: LogName, writer: Writer, end: bytes, *, body: bytes = b"", unless_read: bool = False) -> None:
        self._check()
        found = self.logs.setdefault(log, FakeLog())
        if found.fenced(writer):
            raise StoreFenced("fenced")
        if unless_read and any(count for replica, count in found.readers.items() if replica != self.replica):
            found.write(writer, Entry(found.count, released=True))
        else:
            found.write(writer, Entry(found.count, end=end, body=body))
        self.expire(log)

    async def peek(self, log: LogName, run: str = "") -> Peeked:
        self._check()
        found = self.logs.get(log)
        stored = self.recordings.get(log.key)
        recorded = log in self.replaced or (stored is not None and stored.meta.flight == log.flight)
        if found is None:
            return Peeked(recording=recorded)
        mirrored = found.mirrored.get(run, Mirrored(run, "", 0, 0))
        return Peeked(
            log=bool(found.entries),
            count=found.count,
            head=found.entries[0][1].head if found.entries else b"",
            end=found.last.end,
            lease_s=self.lease_s if found.owner else 0.0,
            recording=recorded,
            request=found.request,
            cancelled=frozenset(found.cancelled),
            readers=sum(found.readers.values()),
            mirrored=mirrored.seen,
            promised=mirrored.until_ms > now_ms(),
            writer=found.owner or (found.last_writer if found.entries else ""),
        )

    async def recording_of(self, log: LogName) -> Recording | None:
        self._check()
        stored = self.recordings.get(log.key)
        return stored if stored and stored.meta.flight == log.flight else self.replaced.get(log)

    async def cancel(self, log: LogName, reader: str) -> None:
        self._check()
        found = self.logs.setdefault(log, FakeLog())
        found.cancelled.add(reader)
        self.ring(log.flight)
        if told := self.told.get(found.owner.partition(".")[0]):
            told(log.flight)

    async def listen(self, flight: FlightId, ring: Callable[[], object]) -> None:
        self._check()
        self.rings.setdefault(flight, []).append(ring)

    def stop_listening(self, flight: FlightId, ring: Callable[[], object]) -> None:
        if ring in self.rings.get(flight, []):
            self.rings[flight].remove(ring)

    def on_called(self, told: Callable[[FlightId], object]) -> None:
        self.told[self.replica] = told

    async def close(self) -> None:
        pass


class HandUpstream:
    """Every call waits for the test: `say` gives a batch to the newest, `end` ends it, `fail` breaks it."""

    name = "hand"
    passes_credential = False

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.closed = 0
        self.headless = False
        self.served: Served | None = None
        self._heads: list[asyncio.Future[None]] = []
        self._queues: list[asyncio.Queue[list[bytes] | BaseException | None]] = []

    def say(self, *chunks: Any, at: int = -1) -> None:
        self._queues[at].put_nowait([chunk if isinstance(chunk, bytes) else orjson.dumps(chunk) for chunk in chunks])

    def end(self, at: int = -1) -> None:
        self._queues[at].put_nowait(None)

    def fail(self, error: BaseException, at: int = -1) -> None:
        self._queues[at].put_nowait(error)

    def land(self, error: GatewayError | None = None, at: int = -1) -> None:
        """Lets a head come, where ``headless`` holds heads back."""
        if error:
            self._heads[at].set_exception(error)
        else:
            self._heads[at].set_result(None)

    @asynccontextmanager
    async def ask(self, call: Call) -> AsyncIterator[Answer]:
        self.calls.append(call)
        queue: asyncio.Queue[list[bytes] | BaseException | None] = asyncio.Queue()
        head: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.append(queue)
        self._heads.append(head)
        try:
            if self.headless:
                await head
            yield Answer({}, batches=self._batches(queue), served=self.served)
        finally:
            self.closed += 1

    async def models(self, headers: Mapping[str, str]) -> list[dict[str, Any]]:
        return []

    def relay(self, method: str, path: str, headers: Mapping[str, str], body: Any) -> Any:
        raise AssertionError("not asked for here")

    async def close(self) -> None:
        pass

    @staticmethod
    async def _batches(queue: "asyncio.Queue[list[bytes] | BaseException | None]") -> AsyncGenerator[list[bytes], None]:
        while (batch := await queue.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch

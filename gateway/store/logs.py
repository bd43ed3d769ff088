"""The logs of running flights: who leads, what was appended, who takes over."""

import secrets
import sys
from array import array
from collections.abc import Callable, Sequence

from gateway.errors import StoreCorrupt, StoreError, StoreFenced
from gateway.ports import Appended, Batch, Claimed, Entry, FlightId, LogName, Mirrored, Page, Peeked, Writer
from gateway.store import scripts
from gateway.store.bell import Bell
from gateway.store.client import Command
from gateway.store.keys import Keys
from gateway.store.server import Server

# Of a lease: a writer that died is then missed before the lease is over.
_LEASE_SHARE = 0.8
# Readers are told anew with every page, at least a few times in a lease.
_READERS_LEASES = 3
_PAGE_ENTRIES = 256
_PAGE_BYTES = 1_048_576
_FRAME_END = b"\n\n"
_NOT_MIRRORED = Mirrored("", "", 0, 0)


class Logs:
    """The part of the `Store` that is about logs."""

    def __init__(self, server: Server, keys: Keys, *, lease_s: float, resume_s: float) -> None:
        self.replica = secrets.token_hex(6)
        """What this process is called among the replicas."""
        self._server = server
        self._keys = keys
        self._lease_ms = max(1, int(lease_s * _LEASE_SHARE * 1000))
        self._readers_ms = max(1, int(lease_s * _READERS_LEASES * 1000))
        self._resume_ms = max(1, int(resume_s * 1000))
        self._bell = Bell(server.wire, server.config, keys, self.replica, server.warn)

    async def claim(self, log: LogName, writer: Writer, *, newer_than_us: int = -1) -> Claimed:
        """Looks again, and leads where there is nothing."""
        keys = [self._keys.recording(log.key), self._keys.now(log), self._keys.lease(log)]
        command = scripts.CLAIM.call(keys, log.flight, str(writer), newer_than_us, self._lease_ms)
        with self._server.writing():
            found = await self._server.run(command, "quick")
        if isinstance(found, bytes):
            return Claimed(follow=FlightId(found.decode()))
        return Claimed(landed=bool(found))

    async def append(self, batches: Sequence[Batch]) -> list[Appended | StoreError]:
        """Appends to several logs in one go. Each result stands for its batch."""
        if not batches:
            return []
        answers = await self._server.write_all([self._append(batch) for batch in batches])
        return [_appended(answer) for answer in answers]

    async def read(self, log: LogName, cursor: str, *, readers: int, mirrored: Mirrored | None = None) -> Page:
        """The entries after the cursor."""
        keys = [self._keys.log(log), self._keys.lease(log), self._keys.readers(log), self._keys.cancelled(log)]
        keys.append(self._keys.mirrored(log))
        limits = (self._readers_ms, _PAGE_ENTRIES, _PAGE_BYTES)
        seen = (*(mirrored or _NOT_MIRRORED), self._resume_ms)
        command = scripts.READ.call(keys, cursor, self.replica, readers, *limits, log.flight, self._keys.bells, *seen)
        entries, exists, lease_ms, owner, more, cancelled, at_ms = await self._server.run(command, "steady")
        return Page(
            entries=tuple(_entry(id_, fields) for id_, fields in entries),
            cursor=entries[-1][0].decode() if entries else cursor,
            exists=bool(exists),
            lease_s=max(lease_ms, 0) / 1000,
            writer=owner.decode(),
            more=bool(more),
            cancelled=_names(cancelled),
            at_ms=at_ms,
        )

    async def take_over(self, log: LogName, writer: Writer, *, behind: str, joinable: bool) -> bool:
        """Takes the lease of a log whose writer has lost it."""
        keys = [*self._ownership(log), self._keys.request(log), self._keys.cancelled(log), self._keys.mirrored(log)]
        args = (
            log.flight,
            str(writer),
            writer.run,
            behind,
            self._keys.bell(log.flight),
            int(joinable),
            self._lease_ms,
            self._resume_ms,
        )
        return bool(await self._server.write(scripts.TAKE_OVER.call(keys, *args)))

    async def release(self, log: LogName, writer: Writer) -> None:
        """Gives a log up that has not ended."""
        args = (log.flight, str(writer), self._keys.bell(log.flight), self._resume_ms)
        await self._server.write(scripts.RELEASE.call(self._ownership(log), *args))

    async def end(self, log: LogName, writer: Writer, end: bytes, *, body: bytes = b"", unless_read: bool = False) -> None:
        """Ends a log without a recording; ``unless_read``: gives it up where others read it. Raises `StoreFenced`."""
        keys = [*self._ownership(log), self._keys.readers(log)]
        replica = self.replica if unless_read else ""
        args = (log.flight, str(writer), self._keys.bell(log.flight), end, body, self._resume_ms, replica)
        if await self._server.write(scripts.END.call(keys, *args)) < 0:
            raise fenced()

    async def peek(self, log: LogName, run: str = "") -> Peeked:
        """What is left of a flight, and what readers of the run ``run`` have seen of it."""
        keys = self._keys
        names = [keys.log(log), keys.lease(log), keys.recording(log.key), keys.replaced(log)]
        names += [keys.request(log), keys.readers(log), keys.cancelled(log), keys.mirrored(log)]
        answer = await self._server.run(scripts.PEEK.call(names, log.flight, run), "steady")
        exists, count, head, end, lease_ms, recorded, request, cancelled, readers, mirrored, promised, writer = answer
        return Peeked(
            log=bool(exists),
            count=count,
            head=head,
            end=end,
            lease_s=max(lease_ms, 0) / 1000,
            recording=bool(recorded),
            request=request,
            cancelled=_names(cancelled),
            readers=readers,
            mirrored=mirrored,
            promised=bool(promised),
            writer=writer.decode(),
        )

    async def cancel(self, log: LogName, reader: str) -> None:
        """Remembers that this reader was cancelled, and tells the log's writer and its readers."""
        keys = [self._keys.cancelled(log), self._keys.lease(log)]
        await self._server.write(scripts.CANCEL.call(keys, reader, log.flight, self._keys.bells, self._resume_ms))

    async def listen(self, flight: FlightId, ring: Callable[[], object]) -> None:
        """Has ``ring`` called whenever a log may have grown."""
        await self._bell.listen(flight, ring)

    def stop_listening(self, flight: FlightId, ring: Callable[[], object]) -> None:
        self._bell.stop_listening(flight, ring)

    def on_called(self, told: Callable[[FlightId], object]) -> None:
        """Has ``told`` called when a log that this replica writes wants looking at."""
        self._bell.on_called(told)

    def _ownership(self, log: LogName) -> list[str]:
        """The keys that say whose a log is."""
        return [self._keys.lease(log), self._keys.log(log), self._keys.now(log)]

    def _append(self, batch: Batch) -> Command:
        log = batch.log
        keys = [*self._ownership(log), self._keys.request(log), self._keys.readers(log), self._keys.cancelled(log)]
        keys.append(self._keys.mirrored(log))
        return scripts.APPEND.call(
            keys,
            self.replica,
            log.flight,
            str(batch.writer),
            self._keys.bell(log.flight),
            self._lease_ms,
            self._resume_ms,
            self._readers_ms,
            batch.first,
            batch.first + len(batch.frames),
            batch.trim_to,
            int(batch.joinable),
            batch.readers,
            batch.head,
            b"" if batch.first else batch.request,
            b"".join(batch.frames),
            _little_endian(array("Q", batch.at_us)).tobytes(),
        )


def fenced() -> StoreFenced:
    return StoreFenced("the log is another's, or has ended")


def _appended(answer: object) -> Appended | StoreError:
    if isinstance(answer, StoreError):
        return answer
    if not isinstance(answer, list):
        return fenced()
    count, listeners, cancelled = answer
    return Appended(count, listeners, _names(cancelled))


def _names(members: Sequence[bytes]) -> frozenset[str]:
    return frozenset(member.decode() for member in members)


def _entry(id_: bytes, pairs: Sequence[bytes]) -> Entry:
    """Raises `StoreCorrupt`."""
    fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
    data = fields.get(b"d", b"")
    try:
        return Entry(
            count=int(id_.partition(b"-")[0]),
            frames=tuple(frame + _FRAME_END for frame in data.split(_FRAME_END)[:-1]),
            at_us=_little_endian(array("Q", fields.get(b"t", b""))),
            head=fields.get(b"h", b""),
            run=fields.get(b"run", b"").decode(),
            end=fields.get(b"end", b""),
            body=fields.get(b"body", b""),
            released=b"rel" in fields,
            by=fields.get(b"w", b"").decode().rpartition(".")[2],
        )
    except ValueError as error:
        raise StoreCorrupt(f"an entry of a log does not load: {error}") from None


def _little_endian(numbers: "array[int]") -> "array[int]":
    """From the machine's order, or back; in place."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers

"""The seams: what the service needs of a clock, a store and an upstream, and nothing of how they do it."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NewType, Protocol

from gateway.core.apis import Api
from gateway.core.key import CacheKey
from gateway.core.purge import Purge
from gateway.core.recording import Meta, Recording
from gateway.errors import StoreError


class Clock(Protocol):
    """Time. Wall clock for what is written down, monotonic for what is measured; both in seconds."""

    def now(self) -> float: ...

    def monotonic(self) -> float: ...


class Patience(NamedTuple):
    """How long an upstream may take, in seconds; None: as it is configured itself."""

    connect_s: float | None = None
    first_byte_s: float | None = None
    idle_s: float | None = None


AS_CONFIGURED = Patience()


@dataclass(frozen=True, slots=True)
class Call:
    """One question to an upstream. ``body`` is the caller's, with the upstream's own name of the model."""

    api: Api
    body: dict[str, Any]
    streamed: bool
    """Whether the caller asked for a stream. The upstream is asked for one wherever it can give one (DESIGN 2.3)."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of the caller's headers, those that may go upstream; its credential is among them only where it is meant to be."""
    asked: str = ""
    """What the caller calls the model."""
    patience: Patience = AS_CONFIGURED


GATEWAY_UPSTREAM = "gateway-upstream"
"""The header of answers and errors that names the ``[[upstreams]]`` entry which has given them."""


class Served(NamedTuple):
    """Who has answered: an upstream and its own name of the model."""

    upstream: str
    model: str


@dataclass(frozen=True, slots=True)
class Answer:
    """An upstream's answer, once its head is there."""

    headers: Mapping[str, str]
    """Those that may reach the caller: names in lower case."""
    batches: AsyncGenerator[list[bytes], None] | None = None
    """The data of the stream's events, as many at a time as came together; ``[DONE]`` included where it came.

    Iterating raises `UpstreamError`.
    """
    whole: bytes | None = None
    """The JSON body, where the upstream did not stream."""
    served: Served | None = None
    """Who has answered, where that is another than was asked."""


@dataclass(frozen=True, slots=True)
class Relayed:
    """An uncached answer of the upstream, head first: passed on as it comes, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]


class Upstream(Protocol):
    """A configured origin of answers."""

    name: str
    passes_credential: bool
    """Whether the caller's own credential goes upstream, and so is its tenant."""

    def ask(self, call: Call) -> AbstractAsyncContextManager[Answer]:
        """Entering waits for the head; leaving closes the connection. Raises `UpstreamError`."""
        ...

    async def models(self, headers: Mapping[str, str]) -> list[dict[str, Any]]:
        """OpenAI's model objects that the upstream lists itself; empty where it lists none. Raises `UpstreamError`."""
        ...

    def relay(
        self, method: str, path: str, headers: Mapping[str, str], body: AsyncIterator[bytes] | bytes | None
    ) -> AbstractAsyncContextManager[Relayed]:
        """Passes a request on to ``path`` (below ``/v1``, with its query). Raises `UpstreamError`."""
        ...

    async def close(self) -> None: ...


FlightId = NewType("FlightId", str)
"""16 hexadecimal digits, drawn at random."""


class LogName(NamedTuple):
    """Which log: that of one flight, under the key that it answers."""

    key: CacheKey
    flight: FlightId


class Writer(NamedTuple):
    """Who writes a log: one run of an upstream call, in one replica. A log that is taken over gets another writer."""

    replica: str
    run: str
    """8 hexadecimal digits."""

    def __str__(self) -> str:
        return f"{self.replica}.{self.run}"


class Claimed(NamedTuple):
    """What a newcomer found when it looked again: a recording, a flight to follow, or nothing, so that it leads."""

    landed: bool = False
    follow: FlightId | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One append: frames that follow those which the log is thought to hold. Without frames it is a heartbeat."""

    log: LogName
    writer: Writer
    first: int
    """How many frames the writer believes to be in the log; the first of ``frames`` has this index."""
    frames: Sequence[bytes] = ()
    """Each as it is written to a client: ``data: …`` and an empty line; it holds no other line end."""
    at_us: Sequence[int] = ()
    """When each arrived, in microseconds after the flight began."""
    head: bytes = b""
    """What readers must know before the first frame, once it is known; written where the log has none."""
    request: bytes = b""
    """What a take-over needs of the request; written where ``first`` is 0."""
    joinable: bool = False
    """Whether newcomers of this key may join the flight."""
    readers: int = 0
    """How many readers the flight has in this replica."""
    trim_to: int = 0
    """Frames before this index are no longer needed."""


@dataclass(frozen=True, slots=True)
class Appended:
    """What the log is like after an append. Where ``count`` is not what was expected, nothing was appended."""

    count: int
    """How many frames the log has: the writer goes on from there."""
    listeners: int = 0
    """Readers in other replicas."""
    cancelled: frozenset[str] = frozenset()
    """The readers that were cancelled for good."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a log: a head, a batch of frames, a take-over, or the end."""

    count: int
    """How many frames the log has after this entry."""
    frames: tuple[bytes, ...] = ()
    at_us: Sequence[int] = ()
    head: bytes = b""
    run: str = ""
    """The run that goes on from here, where a writer took the log over."""
    end: bytes = b""
    """How the flight ended."""
    body: bytes = b""
    """With the end: the answer as it came, where the upstream did not stream."""
    released: bool = False
    """The writer has given the log up, and whoever still reads it may take it over at once."""
    by: str = ""
    """The run that wrote it."""


class Page(NamedTuple):
    """What a reader of a log found after its cursor."""

    entries: tuple[Entry, ...]
    cursor: str
    """Where the next page begins."""
    exists: bool
    """Whether the log is there at all."""
    lease_s: float
    """For how long the writer's lease holds on; 0 where there is none."""
    writer: str = ""
    """The holder of the lease."""
    more: bool = False
    """Whether there are entries that this page had no room for."""
    cancelled: frozenset[str] = frozenset()
    at_ms: int = 0
    """When the store answered, by its own clock."""


class Mirrored(NamedTuple):
    """What a replica tells of a log that it shows to its readers: it may have to go on alone, which is in no log."""

    run: str
    """What its readers' cursors call it."""
    behind: str
    """The run whose frames it follows: of a log that another one has written anew it has seen nothing."""
    seen: int
    """So much of the log they have got: frames, and the end as one more."""
    until_ms: int
    """Until then, by the store's clock, it goes on alone in no case."""


LOG_START = "0-0"
"""The cursor before a log's first entry."""


@dataclass(frozen=True, slots=True)
class Peeked:
    """What is left of a flight for those who want to resume it."""

    log: bool = False
    count: int = 0
    """How many frames the log has."""
    head: bytes = b""
    end: bytes = b""
    """How the flight ended, if it has."""
    lease_s: float = 0.0
    recording: bool = False
    """Whether its recording is there: the current one of its key, or one that was replaced and is kept for a while."""
    request: bytes = b""
    cancelled: frozenset[str] = frozenset()
    readers: int = 0
    """In all replicas together."""
    mirrored: int = 0
    """How much of the log readers of the run that was asked for have seen for certain, as in `Mirrored`."""
    promised: bool = False
    """Whether they have seen nothing else: that run has promised so, or has taken the log over."""
    writer: str = ""
    """Whose the log is: the holder of its lease, or who wrote last."""


Want = Literal["stream", "whole", "timed", "meta"]
"""Which parts of a recording are needed: frames and marks, the body, the body and marks, or none."""


class Store(Protocol):
    """Where recordings, logs and leases live. Every method raises `StoreError` only.

    A log has one writer at a time, who holds its lease: `StoreFenced` tells a writer that the log is another's now.
    Leases live for ``lease_s`` unless an append renews them; a log, once nothing is appended, for ``resume_s``.
    """

    @property
    def secret(self) -> bytes:
        """The secret that all replicas on this store share: of this process alone until the store is first reached."""
        ...

    @property
    def replica(self) -> str:
        """What this process is called among the replicas."""
        ...

    @property
    def available(self) -> bool:
        """Whether the store answered when it was last asked."""
        ...

    @property
    def is_writable(self) -> bool:
        """Whether it took what was last written, too: what is made only to be written can be spared otherwise."""
        ...

    async def lookup(self, key: CacheKey, want: Want, *, patient: bool = False) -> Recording | None:
        """The recording's parts that such a reply needs, or None. ``patient`` waits seconds, not milliseconds."""
        ...

    async def store(  # noqa: PLR0913  # by keyword, and each with a default
        self,
        key: CacheKey,
        recording: Recording,
        *,
        ends: LogName | None = None,
        writer: Writer | None = None,
        end: bytes = b"",
        life_s: float | None = None,
    ) -> bool:
        """Writes a recording for its ``ttl_s`` and ``stale_s``, or for ``life_s``; tells whether it did: one of a
        later-started flight stays.

        With ``ends``, the same step ends that log, as `end` does; raises `StoreFenced` and writes nothing where the log
        is another's. A recording that is replaced can still be had by `recording_of`, for ``resume_s``.
        """
        ...

    async def delete(self, key: CacheKey) -> None: ...

    async def purges(self, after: str) -> tuple[list[Purge], str]:
        """The purges that were marked after that cursor (`LOG_START`: all that still count), and the cursor behind them."""
        ...

    async def count(self, counts: Mapping[str, float]) -> None:
        """Adds to the counters that all replicas share."""
        ...

    async def claim(self, log: LogName, writer: Writer, *, newer_than_us: int = -1) -> Claimed:
        """Looks again, and leads where there is nothing: as hard a deadline as `lookup`.

        A recording counts only if its flight began later than ``newer_than_us`` (Unix time): an older one was looked at.
        """
        ...

    async def append(self, batches: Sequence[Batch]) -> list[Appended | StoreError]:
        """Appends to several logs in one go. Each result stands for its batch: a `StoreFenced` means stop.

        A lease that is absent is taken again, unless the log has grown or ended without this writer.
        """
        ...

    async def read(self, log: LogName, cursor: str, *, readers: int, mirrored: Mirrored | None = None) -> Page:
        """The entries after the cursor; says how many readers this replica has (0: no more), and what they have seen."""
        ...

    async def take_over(self, log: LogName, writer: Writer, *, behind: str, joinable: bool) -> bool:
        """Takes the lease of a log whose writer has lost it; False where it has a writer, has ended, or was last written by
        another run than ``behind``, the last one whose frames are known.
        """
        ...

    async def release(self, log: LogName, writer: Writer) -> None:
        """Gives a log up that has not ended: another replica may go on with it at once."""
        ...

    async def end(self, log: LogName, writer: Writer, end: bytes, *, body: bytes = b"", unless_read: bool = False) -> None:
        """Ends a log without a recording; ``unless_read``: gives it up where others read it. Raises `StoreFenced`."""
        ...

    async def peek(self, log: LogName, run: str = "") -> Peeked:
        """What is left of a flight, and what readers of the run ``run`` have seen of it."""
        ...

    async def recording_of(self, log: LogName) -> Recording | None:
        """The recording that this flight left, for a stream, if it is still kept."""
        ...

    async def cancel(self, log: LogName, reader: str) -> None:
        """Remembers that this reader was cancelled, and tells the log's writer and its readers."""
        ...

    async def listen(self, flight: FlightId, ring: Callable[[], object]) -> None:
        """Has ``ring`` called whenever a log may have grown, or a reader of it was cancelled; and now and then for nothing.

        It returns once no ring can be missed. A store that cannot be reached rings when it is back.
        """
        ...

    def stop_listening(self, flight: FlightId, ring: Callable[[], object]) -> None: ...

    def on_called(self, told: Callable[[FlightId], object]) -> None:
        """Has ``told`` called when a log that this replica writes wants looking at: a reader was cancelled, or the first one
        has come in another replica.
        """
        ...

    async def close(self) -> None: ...


class Listed(NamedTuple):
    """A stored recording, as a listing shows it."""

    key: CacheKey
    meta: Meta
    life_s: float
    """Until the store lets go of it."""
    replaced: bool = False
    """Whether another one has taken its place, and it is kept only for those who resume it."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """One stored recording with all its parts."""

    key: CacheKey
    recording: Recording
    life_s: float
    stored_bytes: int
    """What it takes in the store, compressed as it is."""


class Inventory(Protocol):
    """The recordings of a store as a whole: for those who run it, never on the way of a request.

    Every method raises `StoreError` only.
    """

    async def page(self, cursor: str = "") -> tuple[list[Listed], str]:
        """Some of the recordings, and the cursor of the next page; empty behind the last one.

        Over all pages, what is there all the time comes at least once, on every node of a cluster; a page may be empty.
        What does not load is left out.
        """
        ...

    async def inspect(self, key: CacheKey) -> Inspected | None:
        """Everything of the current recording of a key. Raises `StoreCorrupt`."""
        ...

    async def erase(self, listed: Sequence[tuple[CacheKey, FlightId]], *, began_by_us: int) -> int:
        """Deletes recordings, the replaced ones too, and their logs; tells how many recordings went.

        One whose flight began after ``began_by_us`` (Unix time) stays. An empty flight stands for the key's current one.
        """
        ...

    async def mark(self, purge: Purge, *, life_s: float) -> None:
        """Makes a purge known to all replicas, and keeps it known for ``life_s``."""
        ...

    async def recent(self, limit: int) -> list[CacheKey]:
        """The keys under which something was stored most recently, the latest first, each once."""
        ...

    async def counts(self) -> dict[str, float]:
        """The counters that all replicas share; ``since`` is when the first of them began (Unix seconds)."""
        ...

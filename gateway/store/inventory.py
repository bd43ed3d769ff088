"""The store as a whole: what is in it, what was purged, what was counted. Never on the way of a request."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from gateway.core.key import CacheKey
from gateway.core.purge import Purge
from gateway.core.recording import CorruptRecording, Meta
from gateway.errors import StoreCorrupt, StoreError
from gateway.ports import FlightId, Inspected, Listed, LogName
from gateway.store import scripts
from gateway.store.client import Command
from gateway.store.keys import Keys
from gateway.store.packing import FIELDS, VERSION, Packer
from gateway.store.server import Server

_PAGE_NAMES = 200
_ERASED_AT_ONCE = 100
_PURGES_AT_ONCE = 1000
MOST_RECENT = 256
_RECENT_MS = 30 * 86_400_000
_STATS_MS = 365 * 86_400_000
_PULSE_MS = 86_400_000
# No server refuses such a life: some count it in nanoseconds, one in 28 bits of seconds.
_LONGEST_LIFE_S = 2**28 - 1
_NO_END = -1  # as PTTL says it


class RedisInventory:
    """The `Inventory`, and the parts of the `Store` that are about purges and counters."""

    _server: Server
    _keys: Keys
    _packer: Packer

    async def page(self, cursor: str = "") -> tuple[list[Listed], str]:
        """Some of the recordings, and the cursor of the next page; empty behind the last one."""
        names, cursor = await self._server.scan(self._keys.recordings, cursor, _PAGE_NAMES)
        found = {name: whose for name in names if (whose := self._keys.key_of(name))}
        answers = await self._ask_all([command for name in found for command in _listing(name)])
        if failed := _failed(answers):
            raise failed[0]
        listed = map(_listed, found.values(), answers[::2], answers[1::2])
        return [each for each in listed if each], cursor

    async def inspect(self, key: CacheKey) -> Inspected | None:
        """Everything of the current recording of a key. Raises `StoreCorrupt`."""
        name = self._keys.recording(key)
        fields = await self._server.run(("HMGET", name, *FIELDS["all"]), "steady")
        life_ms = await self._server.run(("PTTL", name), "steady")
        recording = await self._packer.load("all", fields)
        if recording is None:
            return None
        return Inspected(key, recording, _life_s(life_ms), sum(len(field or b"") for field in fields))

    async def erase(self, listed: Sequence[tuple[CacheKey, FlightId]], *, began_by_us: int) -> int:
        """Deletes recordings, the replaced ones too, and their logs; tells how many recordings went.

        Where some cannot be reached all others are gone when it raises.
        """
        answers: list[Any] = []
        for at in range(0, len(listed), _ERASED_AT_ONCE):
            named = await self._named([LogName(*each) for each in listed[at : at + _ERASED_AT_ONCE]])
            answers += _failed(named)
            answers += await self._ask_all([self._erase(log, began_by_us) for log in named if isinstance(log, LogName)])
        for answer in answers:
            if isinstance(answer, StoreError):
                raise answer
        return sum(answers)

    async def mark(self, purge: Purge, *, life_s: float) -> None:
        """Makes a purge known to all replicas, and keeps it known for ``life_s``."""
        await self._server.write(scripts.MARK.call([self._keys.purges], purge.dumps(), milliseconds(life_s)))

    async def purges(self, after: str) -> tuple[list[Purge], str]:
        """The purges that were marked after that cursor, and the cursor behind them."""
        purges = []
        more = True
        while more:
            command = scripts.PURGES.call([self._keys.purges], f"({after}", _PURGES_AT_ONCE)
            entries = await self._server.run(command, "steady")
            for id_, fields in entries:
                after = id_.decode()
                purges += self._loaded(fields)
            more = len(entries) == _PURGES_AT_ONCE
        return purges, after

    async def recent(self, limit: int) -> list[CacheKey]:
        """The keys under which something was stored most recently, the latest first, each once."""
        keys = await self._server.run(("LRANGE", self._keys.recent, 0, -1), "steady")
        # Two replicas that store at once may note the same key twice.
        return [CacheKey(key.decode(errors="replace")) for key in dict.fromkeys(keys)][:limit]

    async def count(self, counts: Mapping[str, float]) -> None:
        """Adds to the counters that all replicas share."""
        if counts:
            pairs = [part for pair in counts.items() for part in pair]
            await self._server.write(scripts.COUNT.call([self._keys.stats], _STATS_MS, *pairs))

    async def counts(self) -> dict[str, float]:
        """The counters that all replicas share; ``since`` is when the first of them began (Unix seconds)."""
        pairs = await self._server.run(scripts.COUNTS.call([self._keys.stats]), "steady")
        try:
            return {name.decode(): float(count) for name, count in zip(pairs[::2], pairs[1::2], strict=True)}
        except ValueError as error:
            raise StoreCorrupt(f"a counter does not load: {error}") from None

    async def report(self, process: str, report: bytes) -> None:
        """Keeps what a process has to tell, in the place of what it told before."""
        name = self._keys.pulse
        for answer in await self._ask_all([("HSET", name, process, report), ("PEXPIRE", name, _PULSE_MS)]):
            if isinstance(answer, StoreError):
                raise answer

    async def reports(self) -> list[bytes]:
        """What each process has told last."""
        return list(await self._server.run(("HVALS", self._keys.pulse), "steady"))

    async def forget(self, processes: Sequence[str]) -> None:
        """Lets go of what these have told."""
        await self._server.write(("HDEL", self._keys.pulse, *processes))

    def _noting(self, *keys: CacheKey) -> list[Command]:
        """What makes them the most recent ones."""
        name = self._keys.recent
        each = [command for key in keys for command in (("LREM", name, 0, key), ("LPUSH", name, key))]
        return [*each, ("LTRIM", name, 0, MOST_RECENT - 1), ("PEXPIRE", name, _RECENT_MS)]

    async def _named(self, logs: Sequence[LogName]) -> list[LogName | StoreError]:
        """Those without a flight with the current one of their key: a script has to be told all names of keys.

        It stays empty where there is none, or what is there is no recording.
        """
        unnamed = [log for log in logs if not log.flight]
        flights = await self._ask_all([("HGET", self._keys.recording(log.key), "flight") for log in unnamed])
        found = map(_with_flight, unnamed, flights)
        return [*found, *(log for log in logs if log.flight)]

    def _erase(self, log: LogName, began_by_us: int) -> Command:
        keys = self._keys
        names = [keys.recording(log.key), keys.replaced(log), keys.log(log), keys.request(log), keys.lease(log)]
        return scripts.ERASE.call(names, log.flight, began_by_us)

    async def _ask_all(self, commands: Sequence[Command]) -> list[Any]:
        """As `Server.write_all`: in one pipeline, among the writes, which nobody waits for."""
        return await self._server.write_all(commands) if commands else []

    def _loaded(self, fields: Sequence[bytes]) -> list[Purge]:
        """The purge of an entry, if it is one."""
        try:
            return [Purge.loads(dict(zip(fields[::2], fields[1::2], strict=True))[b"purge"])]
        except (ValueError, KeyError) as error:
            # One of a later version's: the others still count.
            self._server.warn("Purges do not load and are left out: %s", StoreCorrupt(str(error)))
            return []


def milliseconds(life_s: float) -> int:
    """A life as every server takes it."""
    return max(1, int(min(life_s, _LONGEST_LIFE_S) * 1000))


def _listing(name: bytes) -> tuple[Command, Command]:
    return ("HMGET", name, *FIELDS["meta"]), ("PTTL", name)


def _listed(whose: tuple[CacheKey, bool], fields: Any, life_ms: Any) -> Listed | None:
    """None where it is gone by now, or does not load."""
    key, replaced = whose
    if isinstance(fields, StoreCorrupt) or fields[0] != VERSION or fields[1] is None:
        return None
    try:
        return Listed(key, Meta.loads(fields[1]), _life_s(life_ms), replaced)
    except CorruptRecording:
        return None


def _life_s(life_ms: int) -> float:
    """Without a life, which none of ours is, it has no end; what is gone has none left."""
    return inf if life_ms == _NO_END else max(life_ms, 0) / 1000


def _with_flight(log: LogName, flight: Any) -> LogName | StoreError:
    """``flight`` is what the recording of the key says: nothing, where it is of another type."""
    if _failed([flight]):
        return flight  # type: ignore[no-any-return]
    return log._replace(flight=FlightId(flight.decode(errors="replace"))) if isinstance(flight, bytes) else log


def _failed(answers: Sequence[Any]) -> list[StoreError]:
    """Why some could not be asked, which says nothing of what they would have answered."""
    return [answer for answer in answers if isinstance(answer, StoreError) and not isinstance(answer, StoreCorrupt)]

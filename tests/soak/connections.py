"""Which connection a request took: one to a process that has gone since may break as it is used (RFC 9112 9.5)."""

import asyncio
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import aiohttp
from fleet import Replica


@dataclass
class Connection:
    """Times are the journal's."""

    replica: Replica
    life: int
    """Of the replica, once it was open: so it is never told too low."""
    port: int
    """The caller's."""
    opened_at: float
    uses: int = 0
    closed_at: float | None = None
    error: str = ""
    """Why it was closed; empty where one side has closed it in order."""

    @property
    def is_to_a_process_that_is_gone(self) -> bool:
        return self.life < self.replica.lives

    def __str__(self) -> str:
        kept = f"use {self.uses} of" if self.uses > 1 else "the first use of"
        closed = "" if self.closed_at is None else f", closed at {self.closed_at:.3f} s ({self.error or 'in order'})"
        lives = f"life {self.life} of {self.replica.lives}"
        return f"{kept} the connection from port {self.port}, opened at {self.opened_at:.3f} s{closed}, {lives}"


class Takes(Protocol):
    """Who sends a request."""

    connection: Connection | None


ASKING: ContextVar[Takes | None] = ContextVar("asking", default=None)
"""Is told which connection its requests take."""


class Connector(aiohttp.TCPConnector):
    """Keeps connections as any client does, and a note on each."""

    def __init__(self, replicas: Sequence[Replica], now: Callable[[], float]) -> None:
        super().__init__(limit=0)
        self._replica_at = {replica.port: replica for replica in replicas}
        self._now = now
        self._notes: WeakKeyDictionary[Any, Connection] = WeakKeyDictionary()

    async def connect(self, req: Any, *args: Any, **options: Any) -> Any:
        asking = ASKING.get()
        if asking:
            asking.connection = None
        taken = await super().connect(req, *args, **options)
        protocol = taken.protocol
        note = self._notes.get(protocol)
        if note is None:
            port = protocol.transport.get_extra_info("sockname")[1]
            replica = self._replica_at[req.url.port]
            note = self._notes[protocol] = Connection(replica, replica.lives, port, self._now())
            if closed := protocol.closed:
                closed.add_done_callback(partial(self._note_end, note))
            else:
                note.closed_at = note.opened_at
        note.uses += 1
        if asking:
            asking.connection = note
        return taken

    def _note_end(self, note: Connection, closed: "asyncio.Future[None]") -> None:
        note.closed_at = self._now()
        note.error = "" if closed.cancelled() else str(closed.exception() or "")

"""The connections of a process: who is served of those who connect, who is told that there is no room, who makes room."""

import asyncio
import errno
import logging
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import cast

import orjson

from gateway.core.policy import NOT_FORWARDED
from gateway.errors import Overloaded
from gateway.limits import Limits, Place, retry_after_s
from gateway.sockets import BACKLOG, accept_all

log = logging.getLogger(__name__)

# Beyond the limit so many are kept until they are told, and have gone.
_MAX_TURNED_AWAY = 128
# How long these may take to ask, and then to read the answer.
_GOING_WITHIN_S = 1.0
# Who has asked nothing for so long makes room for others: a request follows its connection, or another request, sooner.
_IDLE_S = 1.0
_MAX_LOOKS = 8
_MAX_HEAD_BYTES = 8192
# Those who watch over the process must not take it for dead because it is full.
_ALWAYS_SERVED = (b"/healthz", b"/health", b"/readyz", b"/metrics", b"/admin/")
_ACCEPTS_A_TURN = 32
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_GONE = (errno.ENOTCONN, errno.EINVAL)  # of what is set or asked on a socket whose peer has left
_ACCEPT_AGAIN_S = 0.05
# A full process leaves what waits to the others on the same socket for so long.
_OTHERS_FIRST_S = 0.003
_COUNT_UNSENT_EVERY_S = 0.05


class Guest(asyncio.Protocol):
    """A connection that is served: what the server's own protocol is told, with an eye on whether it is in use."""

    __slots__ = ("_door", "_place", "_protocol", "has_asked", "is_extra", "transport")

    def __init__(self, door: "Door", protocol: asyncio.Protocol, place: Place | None) -> None:
        self._door = door
        self._protocol = protocol
        self._place = place
        self.is_extra = place is None
        """Whether it is beyond the limit, and ends with its first answer."""
        self.has_asked = False
        """Whether something of a request has come that is not being served yet."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # which uvloop's do not inherit from
        self._door.came(self)
        self._protocol.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.give_place_back()
        self._door.went(self)
        self._protocol.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.has_asked:
            self.has_asked = True
            self._door.asked(self)
        self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def pause_writing(self) -> None:
        self._door.paused.add(self)
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._door.paused.discard(self)
        self._protocol.resume_writing()

    def give_place_back(self) -> bool:
        """Tells whether it had one."""
        if self._place:
            self._place.release()
        return not self.is_extra


class TurnedAway(asyncio.Protocol):
    """A connection beyond the limit: it is told so as soon as it asks, and then closed.

    What it still sends is read: closing with unread bytes resets a connection, and that could overtake the answer.
    """

    def __init__(self, door: "Door") -> None:
        self._door = door
        self._head = b""
        self._told = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # which uvloop's do not inherit from
        self._timer = asyncio.get_running_loop().call_later(_GOING_WITHIN_S, self.transport.abort)
        self._door.turned_away(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # it is over anyway
        self._leave()
        self._door.count_refused()

    def give_place_back(self) -> bool:
        return False

    def data_received(self, data: bytes) -> None:
        if self._told:
            return
        self._head += data
        if b"\n" not in self._head and len(self._head) < _MAX_HEAD_BYTES:
            return
        if self._door.always_serves(self._head):
            self._leave()
            self._door.let_in_anyway(self.transport, self._head)
            return
        self._told = True
        self.transport.write(self._door.refusal())
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def _leave(self) -> None:
        self._timer.cancel()
        self._door.on_their_way.pop(self, None)


class Door:
    """Makes the protocol of each new connection: the server's own for those for whom there is room."""

    def __init__(self, serve: Callable[[], asyncio.Protocol], limits: Limits) -> None:
        self._serve = serve
        self._limits = limits
        self._guests: dict[asyncio.BaseTransport, Guest] = {}
        self._unused: dict[Guest, float] = {}
        """Those that are not being served, with since when: who has been there for longest comes first."""
        self.paused: set[Guest] = set()
        """Those that take what is written more slowly than it is."""
        self.on_their_way: dict[TurnedAway, None] = {}
        self._extras: set[Guest] = set()
        """Beyond the limit."""
        self._draw = random.Random()  # noqa: S311  # an id must be unlike any other, not hard to guess
        self._unsent = 0
        self._unsent_until_s = 0.0
        limits.held.unsent_bytes = self._unsent_bytes

    def __call__(self) -> Guest | TurnedAway:
        while not self.has_room():  # more than one may be too much, where the limit was lowered
            if not self.make_room():
                return TurnedAway(self)
        return Guest(self, self._serve(), self._limits.connections.take_anyway(""))

    def has_room(self) -> bool:
        return self._limits.connections.has_room("")

    def make_room(self) -> bool:
        """Closes the connection that has been idle for longest, if there is one; tells whether there was."""
        now_s = asyncio.get_running_loop().time()
        for _ in range(_MAX_LOOKS):
            guest, since_s = next(iter(self._unused.items()), (None, 0.0))
            if guest is None or now_s - since_s < _IDLE_S:
                return False
            del self._unused[guest]
            if guest.transport.get_write_buffer_size():  # its last answer is still on the way
                self._unused[guest] = now_s
                continue
            guest.transport.close()
            if guest.give_place_back():
                self._limits.evicted += 1
                return True
        return False

    # What connections tell

    def came(self, guest: Guest) -> None:
        self._guests[guest.transport] = guest
        self._wait(guest)

    def went(self, guest: Guest) -> None:
        self._guests.pop(guest.transport, None)
        self._unused.pop(guest, None)
        self.paused.discard(guest)
        self._extras.discard(guest)

    def asked(self, guest: Guest) -> None:
        """A request has begun to come: the rest should follow soon."""
        if guest in self._unused:
            self._wait(guest)

    def begin(self, transport: asyncio.BaseTransport | None) -> bool:
        """A request is being served; tells whether it has to be the connection's last one."""
        guest = self._guests.get(transport) if transport else None
        if guest is None:
            return False
        self._unused.pop(guest, None)
        return guest.is_extra

    def end(self, transport: asyncio.BaseTransport | None) -> None:
        guest = self._guests.get(transport) if transport else None
        if guest:
            guest.has_asked = False
            self._wait(guest)

    def _wait(self, guest: Guest) -> None:
        self._unused.pop(guest, None)
        self._unused[guest] = asyncio.get_running_loop().time()

    def _unsent_bytes(self) -> int:
        """What was written and is not taken, but for the little that each may have."""
        if not self.paused:
            return 0
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._unsent_until_s:
            self._unsent = sum(guest.transport.get_write_buffer_size() for guest in self.paused)
            self._unsent_until_s = now_s + _COUNT_UNSENT_EVERY_S
        return self._unsent

    # Those for whom there is no room

    def turned_away(self, connection: TurnedAway) -> None:
        if len(self.on_their_way) >= _MAX_TURNED_AWAY:  # whoever has said nothing for longest says nothing soon
            oldest = next(iter(self.on_their_way))
            del self.on_their_way[oldest]
            oldest.transport.abort()
        self.on_their_way[connection] = None

    def always_serves(self, head: bytes) -> bool:
        method, _, rest = head.partition(b" ")
        return method in (b"GET", b"HEAD") and rest.startswith(_ALWAYS_SERVED) and len(self._extras) < _MAX_TURNED_AWAY

    def let_in_anyway(self, transport: asyncio.Transport, head: bytes) -> None:
        guest = Guest(self, self._serve(), None)
        self._extras.add(guest)
        transport.set_protocol(guest)
        guest.connection_made(transport)
        guest.data_received(head)

    def count_refused(self) -> None:
        self._limits.connections.refused.add()

    def refusal(self) -> bytes:
        """The whole answer."""
        message = "The gateway has all the connections that it can have."
        error = Overloaded(message, retry_after_s=retry_after_s(self._limits.draw()))
        body = orjson.dumps(error.body())
        fields = {
            **error.headers,
            "Content-Type": "application/json; charset=utf-8",
            "Content-Length": str(len(body)),
            "Connection": "close",
            "Cache-Control": "no-store",
            "Cache-Status": NOT_FORWARDED,
            "X-Request-Id": f"req_{self._draw.getrandbits(96):024x}",
            "Server": "gateway",
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"HTTP/1.1 {error.status} Service Unavailable\r\n{lines}\r\n".encode() + body

    def close(self) -> None:
        """Nobody else is told anything."""
        for connection in list(self.on_their_way):
            connection.transport.abort()


class Acceptor:
    """Takes the connections that come to a socket. ``shared``: other processes take some of them, too."""

    def __init__(self, sock: socket.socket, door: Door, limits: Limits, *, shared: bool) -> None:
        self._socket = sock
        self._door = door
        self._limits = limits
        self._shared = shared
        self._loop = asyncio.get_running_loop()
        self._server: asyncio.Server | None = None
        self._again: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._reserve: socket.socket | None = None
        self._hold_reserve()

    async def start(self) -> None:
        try:
            self._watch()
        except NotImplementedError:  # asyncio's loop on Windows watches no sockets; its own way to accept has to do
            self._server = await self._loop.create_server(self._door, sock=self._socket, backlog=BACKLOG)

    async def stop(self) -> None:
        """Closes the socket; connections that the system has taken for us are served."""
        if self._again:
            self._again.cancel()
        if self._reserve:
            self._reserve.close()
        accepted = accept_all([self._socket])
        if self._server:
            self._server.close()
        else:
            self._loop.remove_reader(self._socket)
        self._socket.close()
        for connection in accepted:
            self._serve(connection)
        await asyncio.gather(*self._tasks)

    def _watch(self) -> None:
        self._loop.add_reader(self._socket, self._ready)

    def _ready(self) -> None:
        if self._shared and not self._door.has_room():
            self._pause(_OTHERS_FIRST_S)
        else:
            self._take_some()

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._socket)
        self._again = self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._again = None
        self._watch()
        self._take_some()

    def _take_some(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if not (error.errno in _NO_DESCRIPTORS and self._turn_one_away()):
                    log.debug("no connection can be accepted: %s", error)
                    self._pause(_ACCEPT_AGAIN_S)
                    return
            else:
                self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        task = self._loop.create_task(self._connect(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, connection: socket.socket) -> None:
        protocol = self._door()
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, connection)
        except OSError as error:
            protocol.give_place_back()
            # Its caller hears nothing: where that has not left, somebody has to be told.
            level = logging.DEBUG if isinstance(error, ConnectionError) or error.errno in _GONE else logging.WARNING
            log.log(level, "a connection was closed before it could be served: %r", error)
            connection.close()

    def _turn_one_away(self) -> bool:
        """Where no descriptor is left; tells whether more of those who wait can be taken at once."""
        if self._door.make_room() or self._reserve is None:
            self._hold_reserve()
            return False  # a moment later there may be one
        self._reserve.close()
        self._reserve = None
        try:
            connection = self._socket.accept()[0]
        except OSError:
            return False  # nobody waits: without a descriptor the system does not even say that
        finally:
            self._hold_reserve()
        self._limits.unaccepted.add()
        with connection, suppress(OSError):
            connection.setblocking(False)
            with suppress(BlockingIOError):
                connection.recv(_MAX_HEAD_BYTES)
            connection.send(self._door.refusal())
        return self._hold_reserve()

    def _hold_reserve(self) -> bool:
        """A descriptor to give up where there is no other, so that who comes then hears why. Tells whether it is held."""
        if self._reserve is None:
            with suppress(OSError):
                self._reserve = socket.socket()
        return self._reserve is not None

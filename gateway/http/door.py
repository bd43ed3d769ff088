"""The connections of a process: who is served of those who connect, who is told that there is no room, who makes room."""

import asyncio
import errno
import logging
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, cast

import orjson

from gateway.core.policy import NOT_FORWARDED
from gateway.errors import Overloaded
from gateway.limits import Limits, Place, retry_after_s
from gateway.sockets import BACKLOG, accept_all

log = logging.getLogger(__name__)

# Beyond the limit so many are kept until they are told, and have gone.
_MAX_TURNED_AWAY = 128
# How many were told, and have not gone yet; how often to look whether they have.
_MAX_LEAVING = 512
_LOOK_AFTER_S = 0.05
_READ_BYTES = 1_048_576
_SLASHES_OF_A_STREAM = 3
# How long these may take to ask, and then to read the answer.
_GOING_WITHIN_S = 1.0
# Who has asked nothing for so long makes room for others: a request follows its connection, or another request, sooner.
_IDLE_S = 1.0
_MAX_LOOKS = 8
_MAX_HEAD_BYTES = 8192
# Those who watch over the process must not take it for dead because it is full.
_ALWAYS_SERVED = (b"/healthz", b"/health", b"/readyz", b"/metrics", b"/admin/")
_ACCEPTS_A_TURN = 32
# Where the lag of the loop is limited, a burst of newcomers is not to make a long turn of it. It costs little to refuse one.
_LET_IN_A_TURN = 2
_REFUSALS_A_TURN = 128
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_GONE = (errno.ENOTCONN, errno.EINVAL)  # of what is set or asked on a socket whose peer has left
_ACCEPT_AGAIN_S = 0.05
# A full process leaves what waits to the others on the same socket for so long.
_OTHERS_FIRST_S = 0.003
_COUNT_UNSENT_EVERY_S = 0.05


class Guest(asyncio.Protocol):
    """A connection that is served: what the server's own protocol is told, with an eye on whether it is in use."""

    __slots__ = ("_door", "_head", "_place", "_protocol", "has_asked", "is_extra", "is_let_in", "transport")

    def __init__(self, door: "Door", protocol: asyncio.Protocol, place: Place | None, head: bytes = b"") -> None:
        """``head`` has been read already."""
        self._door = door
        self._protocol = protocol
        self._place = place
        self._head = head
        self.is_let_in = False
        """Whether the first request, which has not ended yet, was looked at, and not refused."""
        self.is_extra = place is None
        """Whether it is beyond the limit, and ends with its first answer."""
        self.has_asked = False
        """Whether something of a request has come that is not being served yet."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # which uvloop's do not inherit from
        self._door.came(self)
        self._protocol.connection_made(transport)
        if self._head:
            head, self._head = self._head, b""
            self.data_received(head)

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

    def __init__(self, door: "Door", head: bytes = b"") -> None:
        """``head`` has been read already."""
        self._door = door
        self._head = head
        self._told = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # which uvloop's do not inherit from
        self._timer = asyncio.get_running_loop().call_later(_GOING_WITHIN_S, self.transport.abort)
        self._door.turned_away(self)
        if self._head:
            self.data_received(b"")

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
        self.transport.write(self._door.refusal(self._door.full()))
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

    def __call__(self, head: bytes = b"", *, is_let_in: bool = False) -> Guest | TurnedAway:
        """``head`` is what it has read already; ``is_let_in``: and somebody has looked at it."""
        while not self.has_room():  # more than one may be too much, where the limit was lowered
            if not self.make_room():
                return TurnedAway(self, head)
        guest = Guest(self, self._serve(), self._limits.connections.take_anyway(""), head)
        guest.is_let_in = is_let_in
        return guest

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
            guest.has_asked = guest.is_let_in = False
            self._wait(guest)

    def was_let_in(self, transport: asyncio.BaseTransport | None) -> bool:
        """Whether its request, which is being served, is the first one of a connection, and was looked at as that came."""
        guest = self._guests.get(transport) if transport else None
        return guest is not None and guest.is_let_in

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
        guest = Guest(self, self._serve(), None, head)
        self._extras.add(guest)
        transport.set_protocol(guest)
        guest.connection_made(transport)

    def count_refused(self) -> None:
        self._limits.connections.refused.add()

    def full(self) -> Overloaded:
        message = "The gateway has all the connections that it can have."
        return Overloaded(message, retry_after_s=retry_after_s(self._limits.draw()))

    def refusal(self, error: Overloaded) -> bytes:
        """The whole answer."""
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


class Leaving:
    """Connections that were refused: closed when their callers have gone, or were given the time to.

    What they still send is read, for the reason that `TurnedAway` has.
    """

    def __init__(self) -> None:
        self._until_s: dict[socket.socket, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: socket.socket) -> None:
        if len(self._until_s) >= _MAX_LEAVING:  # whoever was told first has had the most time to read it
            self._close(next(iter(self._until_s)))
        loop = asyncio.get_running_loop()
        self._until_s[connection] = loop.time() + _GOING_WITHIN_S
        if self._timer is None:
            self._timer = loop.call_later(_LOOK_AFTER_S, self._look)

    def close(self) -> None:
        """Nobody is waited for any more."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        for connection in list(self._until_s):
            self._close(connection)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        for connection, until_s in list(self._until_s.items()):
            if now_s >= until_s or _has_gone(connection):
                self._close(connection)
        self._timer = loop.call_later(_LOOK_AFTER_S, self._look) if self._until_s else None

    def _close(self, connection: socket.socket) -> None:
        del self._until_s[connection]
        connection.close()


def _has_gone(connection: socket.socket) -> bool:
    """Reads some of what has come."""
    try:
        return not connection.recv(_READ_BYTES)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _read(connection: socket.socket) -> bytes:
    """What has come by now: a request follows its connection at once, so all of its head, as a rule."""
    with suppress(OSError):
        return connection.recv(_MAX_HEAD_BYTES)
    return b""


def wants(head: bytes) -> Literal["answer", "stream", ""]:
    """What a request begins to ask for: an answer that is to be made, or the rest of a stream; "" where that is not sure,
    and where it is neither.
    """
    line, newline, _ = head.partition(b"\n")
    method, _, rest = line.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if not newline or not path.startswith(b"/v1/") or path.startswith(b"/v1/models"):
        return ""
    if path.startswith(b"/v1/streams/"):
        return "stream" if method == b"GET" and path.count(b"/") == _SLASHES_OF_A_STREAM else ""
    return "answer"


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
        self._leaving = Leaving()
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
        self._limits.lag.nobody_waits(self)
        accepted = accept_all([self._socket])
        if self._server:
            self._server.close()
        else:
            self._loop.remove_reader(self._socket)
        self._socket.close()
        for connection in accepted:
            self._serve(connection)
        await asyncio.gather(*self._tasks)
        self._leaving.close()

    def _watch(self) -> None:
        self._loop.add_reader(self._socket, self._ready)

    def _ready(self) -> None:
        if self._shared and not self._door.has_room():
            self._pause(_OTHERS_FIRST_S)
        else:
            self._take_some()

    def _pause(self, seconds: float) -> None:
        self._limits.lag.nobody_waits(self)
        self._loop.remove_reader(self._socket)
        self._again = self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._again = None
        self._watch()
        self._take_some()

    def _take_some(self) -> None:
        if self._take():
            self._limits.lag.nobody_waits(self)
        else:
            self._limits.lag.newcomers_wait(self)

    def _take(self) -> bool:
        """Takes as many as may be in one turn of the loop; tells whether nobody was left waiting."""
        lag = self._limits.lag
        let_in, most = 0, _LET_IN_A_TURN if lag.max_lag_s else _ACCEPTS_A_TURN
        for _ in range(_REFUSALS_A_TURN if lag.is_shedding else most):
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return True
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if not (error.errno in _NO_DESCRIPTORS and self._turn_one_away()):
                    log.debug("no connection can be accepted: %s", error)
                    self._pause(_ACCEPT_AGAIN_S)
                    return True  # what they wait for is no processor
            else:
                let_in += self._serve(connection)
                if let_in == most:
                    return False
        return False

    def _serve(self, connection: socket.socket) -> bool:
        """Tells whether it was not refused at once."""
        connection.setblocking(False)
        head, is_let_in = b"", False
        if self._limits.lag.is_shedding:
            head = _read(connection)
            if wanted := wants(head):
                is_let_in = not self._limits.lag.refuses(resumes=wanted == "stream")
                if not is_let_in:
                    self._refuse(connection)
                    return False
        task = self._loop.create_task(self._connect(connection, head, is_let_in=is_let_in))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    def _refuse(self, connection: socket.socket) -> None:
        """Nothing is made for it, and no turn of the loop passes: of all ways this takes the least time."""
        with suppress(OSError):
            connection.send(self._door.refusal(self._limits.lag.refusal()))
            connection.shutdown(socket.SHUT_WR)
        self._leaving.add(connection)

    async def _connect(self, connection: socket.socket, head: bytes, *, is_let_in: bool) -> None:
        protocol = self._door(head, is_let_in=is_let_in)
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
            connection.send(self._door.refusal(self._door.full()))
        return self._hold_reserve()

    def _hold_reserve(self) -> bool:
        """A descriptor to give up where there is no other, so that who comes then hears why. Tells whether it is held."""
        if self._reserve is None:
            with suppress(OSError):
                self._reserve = socket.socket()
        return self._reserve is not None

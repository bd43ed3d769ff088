"""The bell: one pub/sub connection that tells of logs that grew, so that nobody has to poll.

A ring may get lost with a connection, so everybody is rung once the subscriptions stand again. Failures of the server
are the store's to tell; here they only mean to try again.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from redis.asyncio.connection import AbstractConnection

from gateway.config import RedisConfig
from gateway.errors import StoreError, StoreUnavailable
from gateway.ports import FlightId
from gateway.store.client import StoreRefused, Wire, drop, store_errors_only, transport_of
from gateway.store.keys import Keys

log = logging.getLogger(__name__)

_PING_EVERY_S = 10.0
_REFUSED_COOLDOWN_S = 10.0

Ring = Callable[[], object]
Told = Callable[[FlightId], object]


class _Channel:
    """Who listens on a channel, and how far the server knows."""

    __slots__ = ("asked", "missed", "rings", "unanswered", "waiting")

    def __init__(self) -> None:
        self.rings: list[Ring] = []
        self.asked = False
        """Whether the last command about it was to subscribe."""
        self.unanswered = 0
        """How many commands about it are not answered yet."""
        self.missed = False
        """Whether somebody listens who may have missed a ring."""
        self.waiting: set[asyncio.Future[None]] = set()

    @property
    def stands(self) -> bool:
        return self.asked and not self.unanswered

    def go_on(self) -> None:
        for waiter in self.waiting:
            if not waiter.done():
                waiter.set_result(None)


class Bell:
    """Listens on the channels of flights, and on that of this replica."""

    def __init__(
        self, wire: Wire, config: RedisConfig, keys: Keys, replica: str, warn: Callable[[str, StoreError], object]
    ) -> None:
        self._wire = wire
        self._config = config
        self._keys = keys
        self._control = keys.bell(replica)
        self._warn = warn
        self._channels: dict[str, _Channel] = {}
        self._told: list[Told] = []
        self._changed: set[str] = set()
        self._to_change = asyncio.Event()
        self._heard = False
        self._away = False
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._task = asyncio.create_task(self._keep_connected())

    async def close(self) -> None:
        self._closed = True  # Python 3.11's `asyncio.wait_for`, which clients use, may lose a cancellation
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._lose()

    def on_called(self, told: Told) -> None:
        self._told.append(told)

    async def listen(self, flight: FlightId, ring: Ring) -> None:
        """Returns once the subscription stands, or it is clear that this takes longer. Raises nothing."""
        name = self._keys.bell(flight)
        channel = self._channels.setdefault(name, _Channel())
        channel.rings.append(ring)
        self._change(name)
        try:
            await self._subscribed(channel)
        except BaseException:
            self.stop_listening(flight, ring)
            raise

    def stop_listening(self, flight: FlightId, ring: Ring) -> None:
        name = self._keys.bell(flight)
        channel = self._channels.get(name)
        if channel and ring in channel.rings:
            channel.rings.remove(ring)
            self._change(name)
            self._forget_unless_used(name, channel)

    async def _subscribed(self, channel: _Channel) -> None:
        if not (channel.stands or self._away):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            channel.waiting.add(waiter)
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._config.command_timeout_s):
                        await waiter
            finally:
                channel.waiting.discard(waiter)
        channel.missed |= not channel.stands

    def _change(self, name: str) -> None:
        self._changed.add(name)
        self._to_change.set()

    async def _keep_connected(self) -> None:
        turn = 0
        while True:
            cooldown_s = self._config.cooldown_s
            try:
                with store_errors_only():
                    await self._connect(turn)
            except StoreRefused as error:
                self._warn("Redis refuses to ring, so other replicas' streams are late: %s", error)
                cooldown_s = max(cooldown_s, _REFUSED_COOLDOWN_S)
            except StoreError as error:
                log.debug("the bell's connection is lost: %s", error)
            self._lose()
            if self._closed:  # a client that loses the cancellation must not cost the end another cooldown
                return
            turn += 1
            await asyncio.sleep(cooldown_s)

    async def _connect(self, turn: int) -> None:
        """Connects, and listens until the connection is lost, which raises."""
        async with asyncio.timeout(self._config.connect_timeout_s) as connecting:
            connection = await self._wire.extra_connection(turn)
            try:
                await connection.connect()  # type: ignore[no-untyped-call]
                connecting.reschedule(None)
                self._away, self._heard = False, True
                self._changed.update(self._channels)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._keep_hearing(connection))
                    group.create_task(self._keep_asking(connection))
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            finally:
                await drop(connection, transport_of(connection))

    def _lose(self) -> None:
        """No subscription stands any longer."""
        self._away = True
        self._channels = {name: channel for name, channel in self._channels.items() if channel.rings}
        for channel in self._channels.values():
            channel.asked, channel.unanswered, channel.missed = False, 0, True
            channel.go_on()

    async def _keep_asking(self, connection: AbstractConnection) -> None:
        """Subscribes and unsubscribes as listeners come and go, and looks whether the server still answers."""
        now = asyncio.get_running_loop().time
        ping_at = now() + _PING_EVERY_S
        await connection.send_command("SUBSCRIBE", self._control, check_health=False)
        while not self._closed:
            self._to_change.clear()
            changed, self._changed = self._changed, set()
            for command, to in (("SUBSCRIBE", True), ("UNSUBSCRIBE", False)):
                if names := [name for name in changed if self._turn(name, to)]:
                    await connection.send_command(command, *names, check_health=False)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(ping_at):
                    await self._to_change.wait()
            if now() >= ping_at:
                if not self._heard:
                    raise StoreUnavailable("the bell is silent")
                self._heard = False
                await connection.send_command("PING", check_health=False)
                ping_at = now() + _PING_EVERY_S

    def _turn(self, name: str, to: bool) -> bool:  # noqa: FBT001  # the state that it is to be in
        """Whether the channel has to be turned on, or off."""
        channel = self._channels.get(name)
        if channel is None or bool(channel.rings) is not to or channel.asked is to:
            return False
        channel.asked = to
        channel.unanswered += 1
        return True

    async def _keep_hearing(self, connection: AbstractConnection) -> None:
        while not self._closed:
            message = await connection.read_response(disconnect_on_error=False, push_request=True)
            self._heard = True
            if isinstance(message, list) and len(message) == 3:
                self._hear(*message)

    def _hear(self, kind: bytes, name: bytes, what: Any) -> None:
        on = name.decode()
        channel = self._channels.get(on)
        if kind == b"message" and on == self._control:
            for told in list(self._told):
                _call(told, FlightId(what.decode()))
        elif channel and kind == b"message":
            self._ring(channel)
        elif channel:
            self._answered(on, channel)

    def _answered(self, name: str, channel: _Channel) -> None:
        channel.unanswered -= 1
        if channel.stands:
            channel.go_on()
            if channel.missed:
                channel.missed = False
                self._ring(channel)
        self._forget_unless_used(name, channel)

    def _forget_unless_used(self, name: str, channel: _Channel) -> None:
        if not (channel.asked or channel.unanswered or channel.rings):
            del self._channels[name]

    @staticmethod
    def _ring(channel: _Channel) -> None:
        for ring in list(channel.rings):
            _call(ring)


def _call(told: Callable[..., object], *what: object) -> None:
    try:
        told(*what)
    except Exception:  # a bug of a listener's: the others are still to be told
        log.exception("a listener of the bell broke")

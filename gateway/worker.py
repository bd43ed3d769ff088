"""What a worker listens to: its supervisor."""

import asyncio
import signal
import socket
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from gateway.channel import Channel, receive_first
from gateway.config import AdminConfig, ServerConfig
from gateway.life import take
from gateway.live import Live
from gateway.metrics import Metrics
from gateway.metrics import Worker as Told
from gateway.signals import Stop, on_signal
from gateway.watching import Source

# Longer than the supervisor waits for the others.
_METRICS_WITHIN_S = 3.0


class Employed:
    """A worker's side of the channel that its supervisor has opened, as file descriptor ``channel``.

    What it serves on, its store, and the text of its configuration come from there: a file that has become wrong
    meanwhile must not keep a dead worker from being replaced. Raises `ConfigError`, and `OSError`.
    """

    def __init__(
        self, channel: int, path: Path | None, environ: Mapping[str, str], flags: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._socket = socket.socket(fileno=channel)
        self._socket.set_inheritable(False)
        told = receive_first(self._socket)
        self._sockets, self._admin_sockets = (
            [socket.socket(fileno=descriptor) for descriptor in told[what]] for what in ("listening", "admin_listening")
        )
        for sock in (*self._sockets, *self._admin_sockets):
            sock.set_inheritable(False)
        self.store: str = told["store"]
        self._source = Source(path, environ, {**flags, "redis": {"url": told["url"]}} if told["url"] else flags)
        self.loaded = self._source.load(told["text"])
        self._announced = ""
        self._channel: Channel | None = None
        self._metrics: Metrics | None = None
        self._numbers = count()
        self._asked: dict[int, asyncio.Future[Collection[Told]]] = {}

    def start(self, stop: Stop) -> None:
        """From now on signals are understood. Those of a terminal are the supervisor's."""
        self._stop = stop
        for number in (signal.SIGINT, signal.SIGTERM):
            on_signal(number, stop.ask)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def sockets(self, _: ServerConfig) -> list[socket.socket]:
        return self._sockets

    def admin_sockets(self, _: AdminConfig) -> list[socket.socket]:
        return self._admin_sockets

    def share(self, metrics: Metrics) -> None:
        """Others serve the same port: who asks this worker is told of all."""
        self._metrics = metrics
        metrics.of_workers = self._of_workers

    def announce(self, text: str) -> None:
        self._announced = text

    async def obey(self, live: Live) -> None:
        """Does what the supervisor says, until that is gone: then this process ends, and its callers resume elsewhere."""
        channel = self._channel = await Channel.over(self._socket)
        channel.send({"serves": self._announced})
        try:
            await self._hear(channel, live)
        finally:
            self._channel = None
        self._stop.hurry()

    async def _hear(self, channel: Channel, live: Live) -> None:
        while (message := await channel.receive()) is not None:
            if message.get("stop") == "now":
                self._stop.hurry()
            elif "stop" in message:
                self._stop.ask()
            elif "ping" in message:
                channel.send({"pong": message["ping"]})
            elif "workers" in message:
                if (asked := self._asked.get(message["asked"])) and not asked.done():
                    asked.set_result([Told(*worker) for worker in message["workers"]])
            elif "measure" in message:
                channel.send({"number": message["number"], "snapshot": self._metrics.snapshot() if self._metrics else []})
            else:
                _, _, problems = await take(live, partial(self._source.load, message["text"]))
                channel.send({"number": message["number"], "problems": problems})

    async def _of_workers(self) -> Collection[Told]:
        """By way of the supervisor; none where that does not answer."""
        number = next(self._numbers)
        asked: asyncio.Future[Collection[Told]] = asyncio.get_running_loop().create_future()
        if self._channel is None:
            return ()
        self._asked[number] = asked
        self._channel.send({"asked": number})
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_METRICS_WITHIN_S):
                    return await asked
            return ()
        finally:
            del self._asked[number]

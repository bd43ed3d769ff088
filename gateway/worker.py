"""What a worker listens to: its supervisor."""

import signal
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gateway.channel import Channel, receive_first
from gateway.config import ServerConfig
from gateway.life import take
from gateway.live import Live
from gateway.signals import Stop, on_signal
from gateway.watching import Source


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
        self._sockets = [socket.socket(fileno=listening) for listening in told["listening"]]
        for sock in self._sockets:
            sock.set_inheritable(False)
        self.store: str = told["store"]
        self._source = Source(path, environ, {**flags, "redis": {"url": told["url"]}} if told["url"] else flags)
        self.loaded = self._source.load(told["text"])
        self._announced = ""

    def start(self, stop: Stop) -> None:
        """From now on signals are understood. Those of a terminal are the supervisor's."""
        self._stop = stop
        for number in (signal.SIGINT, signal.SIGTERM):
            on_signal(number, stop.ask)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def sockets(self, _: ServerConfig) -> list[socket.socket]:
        return self._sockets

    def announce(self, text: str) -> None:
        self._announced = text

    async def obey(self, live: Live) -> None:
        """Does what the supervisor says, until that is gone: then this process ends, and its callers resume elsewhere."""
        channel = await Channel.over(self._socket)
        channel.send({"serves": self._announced})
        while (message := await channel.receive()) is not None:
            if message.get("stop") == "now":
                self._stop.hurry()
            elif "stop" in message:
                self._stop.ask()
            elif "ping" in message:
                channel.send({"pong": message["ping"]})
            else:
                _, _, problems = await take(live, partial(self._source.load, message["text"]))
                channel.send({"number": message["number"], "problems": problems})
        self._stop.hurry()

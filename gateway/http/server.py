"""The server under the application: it takes connections, and ends without losing one."""

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from aiohttp import web

from gateway.http.connection import Patience, Runner
from gateway.http.door import Acceptor, Door
from gateway.http.edge import Running
from gateway.limits import Limits

# How long handlers have to write their last words, once they were told that it is over.
_LAST_WORDS_S = 2.0
# How long connections that are open, but idle, are waited for: their callers may just be sending a request.
_LINGER_S = 0.3
_POLL_S = 0.01


class HttpServer:
    """Serves an application on sockets that listen already, and closes them in the end.

    ``shared``: other processes listen to the same sockets.
    """

    def __init__(  # noqa: PLR0913  # all that a server is made of
        self,
        app: web.Application,
        running: Running,
        patience: Patience,
        limits: Limits,
        options: dict[str, Any],
        *,
        shared: bool = False,
    ) -> None:
        self._runner = Runner(app, patience, shutdown_timeout=_LAST_WORDS_S, **options)
        self._running = running
        self._limits = limits
        self._shared = shared
        self._door: Door | None = None
        self._acceptors: list[Acceptor] = []

    async def open(self) -> None:
        """Everything is made, and nobody served yet."""
        await self._runner.setup()

    async def listen(self, sockets: Sequence[socket.socket]) -> None:
        server = self._runner.server
        assert server  # noqa: S101  # it is open
        self._running.connections = self._door = Door(server, self._limits)
        for sock in sockets:
            self._acceptors.append(acceptor := Acceptor(sock, self._door, self._limits, shared=self._shared))
            await acceptor.start()

    async def stop_listening(self) -> None:
        """No more connections are taken; those that the system has taken for us are served."""
        acceptors, self._acceptors = self._acceptors, []
        for acceptor in acceptors:
            await acceptor.stop()

    async def ended(self) -> None:
        """Returns when nothing is being served, and nobody is about to ask."""
        loop = asyncio.get_running_loop()
        server = self._runner.server
        linger_until_s = loop.time() + _LINGER_S
        while True:
            await self._running.ended()
            if not (server and server.connections) or loop.time() >= linger_until_s:
                return
            await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        await self.stop_listening()
        if self._door:
            self._door.close()
        with suppress(OSError):
            await self._runner.cleanup()

"""The server under the application: it takes connections, and ends without losing one."""

import asyncio
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from aiohttp import web

from gateway.http.connection import Patience, Runner
from gateway.http.edge import Running
from gateway.sockets import BACKLOG, accept_all

log = logging.getLogger(__name__)

# How long handlers have to write their last words, once they were told that it is over.
_LAST_WORDS_S = 2.0
# How long connections that are open, but idle, are waited for: their callers may just be sending a request.
_LINGER_S = 0.3
_POLL_S = 0.01


class HttpServer:
    """Serves an application on sockets that listen already, and closes them in the end."""

    def __init__(self, app: web.Application, running: Running, patience: Patience, options: dict[str, Any]) -> None:
        self._runner = Runner(app, patience, shutdown_timeout=_LAST_WORDS_S, **options)
        self._running = running
        self._sockets: list[socket.socket] = []
        self._sites: list[web.SockSite] = []

    async def open(self) -> None:
        """Everything is made, and nobody served yet."""
        await self._runner.setup()

    async def listen(self, sockets: Sequence[socket.socket]) -> None:
        self._sockets = list(sockets)
        for sock in sockets:
            self._sites.append(site := web.SockSite(self._runner, sock, backlog=BACKLOG))
            await site.start()

    async def stop_listening(self) -> None:
        """No more connections are taken; those that the system has taken for us are served."""
        accepted = accept_all(self._sockets)
        self._sockets = []
        for site in self._sites:
            await site.stop()
        server = self._runner.server
        assert server  # noqa: S101  # it is open
        loop = asyncio.get_running_loop()
        for connection in accepted:
            connection.setblocking(False)
            try:
                await loop.connect_accepted_socket(server, connection)
            except OSError as error:
                log.debug("a connection is gone before it was served: %s", error)
                connection.close()

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
        with suppress(OSError):
            await self._runner.cleanup()

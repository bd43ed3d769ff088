"""One caller's connection: what aiohttp leaves open of slow, silent, vanished and unintelligible peers.

aiohttp's protocol and server are subclassed in the few places where they have no option for it. What they call by a
private name here (`_make_server`, `_ErrInfo`, `_messages`, `_waiter`) is held in place by ``tests/test_callers.py``.
"""

import asyncio
import contextlib
import math
import socket
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, ContentEncodingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import _ErrInfo

from gateway.errors import GatewayError, HeadTooLarge, InvalidRequest, RequestTooSlow
from gateway.http import edge
from gateway.http.body import too_slow, wrong_coding


class Patience(NamedTuple):
    """How long a caller may take, in seconds."""

    read_timeout_s: float
    """To send the head of a request, from its first byte."""
    write_timeout_s: float
    """To take what has been written, or to show that it is there at all."""


class Runner(web.AppRunner):
    """Runs an application on connections that have `Patience`."""

    def __init__(self, app: web.Application, patience: Patience, **options: Any) -> None:
        super().__init__(app, **options)
        self._patience = patience

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(self._patience, _served(made.request_handler), request_factory=made.request_factory, **self._kwargs)


class _Server(web.Server):
    def __init__(self, patience: Patience, handler: Any, **options: Any) -> None:
        super().__init__(handler, **options)
        self._patience = patience

    def __call__(self) -> web.RequestHandler:
        return Connection(self._patience, self, loop=self._loop, **self._kwargs)


_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _served(handler: _Handler) -> _Handler:
    """The application, but for what aiohttp leaves open before any middleware."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            if request.version < (1, 0):
                raise web.HTTPBadRequest(reason="Only HTTP/1.0 and HTTP/1.1 are served.")  # 505 is for 2 and up
            return await handler(request)
        except web.HTTPException as error:  # an `Expect` that nobody knows, too
            return edge.refusal(request, edge.translated(error, request))

    return handle


class Connection(web.RequestHandler):
    """aiohttp's protocol, with a time-out for heads, errors as OpenAI's object, and an eye on whether the peer is there."""

    __slots__ = ("_late", "_patience")

    def __init__(self, patience: Patience, manager: web.Server, **options: Any) -> None:
        super().__init__(manager, **options)
        self._patience = patience
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        watch(transport.get_extra_info("socket"), self._patience.write_timeout_s)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages or self._current_request is not None:
            self._stop_timer()
        elif data and self._late is None and self._is_idle:
            self._late = self._loop.call_later(self._patience.read_timeout_s, self._head_is_late)
            # aiohttp would close it in silence.
            self._next_keepalive_close_time = self._loop.time() + self._patience.read_timeout_s + 1.0

    @property
    def _is_idle(self) -> bool:
        """Whether it waits for a request, and not for the rest of one that was answered before it had all come."""
        return self._waiter is not None or not self._request_count

    def _stop_timer(self) -> None:
        if self._late:
            self._late.cancel()
            self._late = None

    def _head_is_late(self) -> None:
        self._late = None
        if self._messages or self._waiter is None or self._waiter.done():
            return
        error = _HeadLate("The head did not come in time.")
        self._messages.append((_ErrInfo(error.code, error, error.message), EMPTY_PAYLOAD))
        self._waiter.set_result(None)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp itself refuses; it logs it, and raises `ConnectionError` where an answer has begun."""
        super().handle_error(request, status, exc, message)
        response = edge.refusal(request, _refused(status, exc))
        response.force_close()
        return response


class _HeadLate(BadHttpMessage):
    code = RequestTooSlow.status


def _refused(status: int, error: BaseException | None) -> GatewayError:
    if isinstance(error, _HeadLate):
        return too_slow()
    if isinstance(error, LineTooLong) or "Too many headers" in str(error):
        return HeadTooLarge("The request's head has too many fields, or a line that is too long.")
    if isinstance(error, ContentEncodingError) and "Brotli" in str(error):
        return wrong_coding("br")  # there is no library for it
    if status == 400:
        return InvalidRequest("The request is not HTTP as RFC 9112 has it.")
    return GatewayError("The gateway failed.")


def watch(sock: socket.socket | None, gone_after_s: float) -> None:
    """Lets the kernel close the connection of a peer that has vanished, or takes nothing, for ``gone_after_s``.

    Only data that is sent tells: so the kernel asks, too, where nothing is (tcp(7): TCP_KEEPIDLE, TCP_USER_TIMEOUT).
    """
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    options = {
        "TCP_KEEPIDLE": max(1, math.ceil(gone_after_s / 2)),
        "TCP_KEEPINTVL": max(1, math.ceil(gone_after_s / 6)),
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": math.ceil(gone_after_s * 1000),
    }
    with contextlib.suppress(OSError):  # it may be closed already
        for name, value in options.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

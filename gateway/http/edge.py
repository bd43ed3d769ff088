"""The outermost layer: request ids, errors as OpenAI's object, and the record of each request."""

import asyncio
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Middleware

from gateway.core.policy import NOT_FORWARDED, only_detail
from gateway.errors import (
    BodyTooLarge,
    GatewayError,
    InvalidRequest,
    MethodNotAllowed,
    PathNotFound,
    ShuttingDown,
    UpstreamRefused,
    forget_traces,
)
from gateway.observe import RequestDetails, Sink
from gateway.ports import GATEWAY_UPSTREAM
from gateway.questions import CREDENTIAL_HEADERS

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_SANE_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")
_CLIENT_CLOSED = 499  # nginx's word for a caller who left


def _told_in_full(record: logging.LogRecord) -> bool:
    """Whether the server has failed; of a request that cannot be parsed or decoded there is one line, and none of its bytes:
    a key may be among them.
    """
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, HttpProcessingError | web.RequestPayloadError):
        return True
    log.info("%s: %s", record.getMessage(), type(error).__name__)
    return False


server_log = log.getChild("server")
"""Where aiohttp tells of what never came to a handler."""
server_log.addFilter(_told_in_full)


class Exchange:
    """What is known of one request while it is served."""

    __slots__ = (
        "began", "cache_status", "caller_id", "closes", "error", "first_token_at", "head_sent", "left", "model",
        "request_id", "running", "upstream",
    )  # fmt: skip

    def __init__(self, request: web.BaseRequest, own_id: int, running: "Running") -> None:
        self.began = time.perf_counter()
        self.running = running
        self.closes = False
        """Whether the caller was told that its connection ends with this answer."""
        given = request.headers.get("X-Request-Id", "")
        self.caller_id = given if _SANE_ID.fullmatch(given) else ""
        self.request_id = self.caller_id or f"req_{own_id:024x}"
        self.cache_status = NOT_FORWARDED
        self.model = self.upstream = self.error = ""
        self.left = self.head_sent = False
        self.first_token_at = 0.0
        """When the first token of a stream was written, as `began`."""

    def take_upstream_id(self, upstream_id: str | None) -> None:
        """The upstream's id of the request serves the caller too, who may have to quote it, unless it chose its own."""
        if upstream_id and not self.caller_id and _SANE_ID.fullmatch(upstream_id):
            self.request_id = upstream_id

    def headers(self) -> dict[str, str]:
        headers = {"X-Request-Id": self.request_id, "Cache-Status": self.cache_status, "Server": "gateway"}
        if self.running.draining:
            self.closes = True
        if self.closes:
            headers["Connection"] = "close"
        return headers


EXCHANGE: web.RequestKey[Exchange] = web.RequestKey("exchange", Exchange)


class Connections(Protocol):
    """Who keeps the connections, and has to know which are in use."""

    def begin(self, transport: asyncio.BaseTransport | None) -> bool:
        """A request is being served; tells whether it has to be the connection's last one."""
        ...

    def end(self, transport: asyncio.BaseTransport | None) -> None: ...

    def was_let_in(self, transport: asyncio.BaseTransport | None) -> bool:
        """Whether somebody has drawn already, for the request that is being served, that it is not refused for lag."""
        ...


class Running:
    """How many requests are being served, and whether more are wanted."""

    connections: Connections | None = None

    def __init__(self) -> None:
        self.draining = False
        """The process is to end: what comes is served, but whoever can ask another one should."""
        self.over = False
        """The time for that is over: what comes is refused."""
        self.streams = 0
        """Those of them that are streams whose head has been sent."""
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    @property
    def count(self) -> int:
        """How many requests are being served."""
        return self._count

    def begin(self, transport: asyncio.BaseTransport | None) -> bool:
        """Tells whether the request has to be the last one of its connection."""
        self._count += 1
        self._none.clear()
        return self.connections is not None and self.connections.begin(transport)

    def end(self, transport: asyncio.BaseTransport | None) -> None:
        if self.connections:
            self.connections.end(transport)
        self._count -= 1
        if not self._count:
            self._none.set()

    def was_let_in(self, transport: asyncio.BaseTransport | None) -> bool:
        """As `Connections` have it."""
        return self.connections is not None and self.connections.was_let_in(transport)

    async def ended(self) -> None:
        """Returns when none is being served."""
        await self._none.wait()


def middleware(sinks: Sequence[Sink], running: Running) -> Middleware:
    """Wraps every handler, those for unknown paths and methods included."""
    draw = random.Random()  # noqa: S311  # an id must be unlike any other, not hard to guess

    @web.middleware
    async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
        exchange = request[EXCHANGE] = Exchange(request, draw.getrandbits(96), running)
        status, sent = _CLIENT_CLOSED, 0
        transport = request.transport
        exchange.closes = running.begin(transport)
        try:
            response = await _answer(request, handler, exchange)
            status, sent = (_CLIENT_CLOSED if exchange.left else response.status), _bytes_sent(response)
            if exchange.closes:
                response.force_close()
            return response
        finally:
            running.end(transport)
            details = RequestDetails(
                request_id=exchange.request_id,
                method=request.method,
                path=request.path,
                status=status,
                duration_s=time.perf_counter() - exchange.began,
                bytes_sent=sent,
                cache_status=exchange.cache_status,
                model=exchange.model,
                upstream=exchange.upstream,
                error=exchange.error,
                first_token_s=exchange.first_token_at - exchange.began if exchange.first_token_at else None,
            )
            for sink in sinks:
                sink(details)

    return edge


async def _answer(request: web.Request, handler: Handler, exchange: Exchange) -> web.StreamResponse:
    try:
        _admit(request, exchange.running)
        response = await handler(request)
    except GatewayError as error:
        if error.detail:
            exchange.cache_status = only_detail(error.detail)
        response = error_response(error, exchange)
        forget_traces(error)
    except web.HTTPException as error:
        response = error_response(translated(error, request), exchange)
    except Exception:  # anything else is a bug: the caller gets an id to quote, the log gets the trace
        log.exception("request %s failed", exchange.request_id)
        if exchange.head_sent and request.transport:
            request.transport.abort()  # a second head inside the first answer's body would be read as a part of it
        response = error_response(GatewayError(f"The gateway failed; quote {exchange.request_id}."), exchange)
    if not response.prepared:
        response.headers.update(exchange.headers())
        response.headers.setdefault("Cache-Control", "no-store")
    return response


def _admit(request: web.Request, running: Running) -> None:
    """Raises `GatewayError` where a request cannot be served whatever it asks for."""
    if running.over:
        raise ShuttingDown("The gateway is shutting down; ask again.", headers={"Retry-After": "1"})
    if not request.path.startswith("/v1/"):
        return
    # HTTP lets any bytes through (RFC 9110 5.5), but no client of an upstream's does, and no credential has them.
    for name in CREDENTIAL_HEADERS:
        if not request.headers.get(name, "").isascii():
            raise InvalidRequest(f"Invalid value for the header '{name}': only ASCII can be passed on.", param=name)


def error_response(error: GatewayError, exchange: Exchange) -> web.Response:
    """An error before the first byte: its status, and OpenAI's error object (an upstream's refusal as it came)."""
    exchange.error = f"{type(error).__name__}: {error.message}"
    exchange.take_upstream_id(error.headers.get("x-request-id"))
    headers = {name: value for name, value in error.headers.items() if name != "x-request-id"}
    exchange.upstream = headers.get(GATEWAY_UPSTREAM, exchange.upstream)
    if isinstance(error, UpstreamRefused):
        response = web.Response(status=error.status, body=error.content, headers=headers)
        response.headers["Content-Type"] = error.content_type
        return response
    return web.json_response(error.body(), status=error.status, headers=headers)


def translated(error: web.HTTPException, request: web.Request) -> GatewayError:
    """aiohttp's own refusals in our words."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        return not_allowed(request, sorted(error.allowed_methods))
    if error.status == 404:
        return PathNotFound(f"Unknown request URL: {request.method} {request.path}.")
    if error.status == 413:
        return BodyTooLarge(f"The request body is larger than {request.client_max_size} bytes.")
    refusal = InvalidRequest(error.reason or "The request cannot be read.")
    refusal.status = error.status
    return refusal


def refusal(request: web.BaseRequest, error: GatewayError) -> web.Response:
    """The answer to what never came to a handler, as the middleware would have given it."""
    exchange = Exchange(request, random.getrandbits(96), Running())  # as above
    response = error_response(error, exchange)
    response.headers.update(exchange.headers())
    response.headers.setdefault("Cache-Control", "no-store")
    return response


def not_allowed(request: web.Request, allowed: Sequence[str]) -> MethodNotAllowed:
    message = f"Not allowed to {request.method} on {request.path}; allowed: {', '.join(allowed)}."
    headers = {"Allow": ", ".join(allowed)}
    if "QUERY" in allowed:
        headers["Accept-Query"] = '"application/json"'  # RFC 10008 3
    return MethodNotAllowed(message, headers=headers)


def _bytes_sent(response: web.StreamResponse) -> int:
    return response.body_length if response.prepared else len(getattr(response, "body", None) or b"")

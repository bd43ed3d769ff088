"""Reading a request's body from callers who may be slow, or stop."""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.compression_utils import HAS_BROTLI

from gateway.errors import BodyTooLarge, InvalidRequest, RequestTooSlow, UnsupportedMediaType
from gateway.limits import Holding

READ_TIMEOUT_S = web.AppKey("read_timeout_s", float)
HOLDING: web.RequestKey[Holding] = web.RequestKey("holding", Holding)
"""Where the bytes of a body are counted while it is held."""
_LEAST_BYTES_PER_S = 1000
"""So many bytes of a body buy it a second more, as with Apache's mod_reqtimeout: a trickle ends, a large upload goes on."""
_CODINGS = ("gzip", "deflate", *(("br",) if HAS_BROTLI else ()), "zstd", "identity")
"""Those that aiohttp undoes; it passes on all others as they are, but for those that it has no library for."""
_BROKEN = (web.RequestPayloadError, ValueError)


async def read(request: web.Request) -> bytes:
    """All of the body. Raises `BodyTooLarge`, `Overloaded`, and the errors of `pieces`."""
    if request.content.is_eof() and "Content-Encoding" not in request.headers:
        # It has come with its head, as nearly all do.
        try:
            body = request.content.read_nowait()
        except _BROKEN:
            raise _broken_off() from None
        _hold(request, len(body), len(body))
        return body
    request.content.set_read_chunk_size(request.client_max_size)  # what is compressed comes in fewer pieces
    grown = bytearray()
    async for piece in pieces(request):
        grown += piece
        _hold(request, len(piece), len(grown))
    return bytes(grown)


def _hold(request: web.Request, more_bytes: int, in_all_bytes: int) -> None:
    if holding := request.get(HOLDING):
        holding.grow(more_bytes)
    if in_all_bytes > request.client_max_size:
        raise BodyTooLarge(f"The request body is larger than {request.client_max_size} bytes.")


async def pieces(request: web.Request) -> AsyncIterator[bytes]:
    """The body as it comes; of the time only that counts in which there is nothing to be read.

    Raises `RequestTooSlow`, `UnsupportedMediaType`, and `InvalidRequest` where it breaks off or is not coded as it says.
    """
    coding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in _CODINGS:
        raise wrong_coding(coding)
    content, clock = request.content, asyncio.get_running_loop().time
    left_s = request.app[READ_TIMEOUT_S]
    while not content.at_eof():
        began = clock()
        try:
            if content.is_eof():  # all of it is here
                piece = content.read_nowait()
            else:
                async with asyncio.timeout(max(left_s, 0.0)):
                    piece = await content.readany()
        except TimeoutError:
            raise too_slow() from None
        except _BROKEN:
            raise _broken_off() from None
        left_s += len(piece) / _LEAST_BYTES_PER_S - (clock() - began)
        if piece:
            yield piece


def _broken_off() -> InvalidRequest:
    return InvalidRequest("The request body could not be read to its end.")


def wrong_coding(coding: str) -> UnsupportedMediaType:
    """It names those that will do (RFC 9110 15.5.16)."""
    message = f"The content coding must be one of {', '.join(_CODINGS)}, not {coding!r}."
    return UnsupportedMediaType(message, headers={"Accept-Encoding": ", ".join(_CODINGS)})


def too_slow() -> RequestTooSlow:
    """The connection is of no more use: what comes next on it is the rest of this request."""
    return RequestTooSlow("The request did not come in time.", headers={"Connection": "close"})

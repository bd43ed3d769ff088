"""Reading a request's body from callers who may be slow, or stop."""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

from gateway.errors import BodyTooLarge, InvalidRequest, RequestTooSlow, UnsupportedMediaType
from gateway.limits import Holding

READ_TIMEOUT_S = web.AppKey("read_timeout_s", float)
HOLDING: web.RequestKey[Holding] = web.RequestKey("holding", Holding)
"""Where the bytes of a body are counted while it is held."""
_LEAST_BYTES_PER_S = 1000
"""So many bytes of a body buy it a second more, as with Apache's mod_reqtimeout: a trickle ends, a large upload goes on."""
_CODINGS = ("gzip", "deflate", "br", "zstd", "identity")
"""Those that aiohttp undoes; it passes on all others as they are."""


async def read(request: web.Request) -> bytes:
    """All of the body. Raises `BodyTooLarge`, `Overloaded`, and the errors of `pieces`."""
    holding = request.get(HOLDING)
    request.content.set_read_chunk_size(request.client_max_size)  # what is compressed comes in fewer pieces
    body = bytearray()
    async for piece in pieces(request):
        body += piece
        if holding:
            holding.grow(len(piece))
        if len(body) > request.client_max_size:
            raise BodyTooLarge(f"The request body is larger than {request.client_max_size} bytes.")
    return bytes(body)


async def pieces(request: web.Request) -> AsyncIterator[bytes]:
    """The body as it comes; of the time only that counts in which there is nothing to be read.

    Raises `RequestTooSlow`, `UnsupportedMediaType`, and `InvalidRequest` where it breaks off or is not coded as it says.
    """
    coding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in _CODINGS:
        raise UnsupportedMediaType(f"The content coding must be one of {', '.join(_CODINGS)}, not {coding!r}.")
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
        except (web.RequestPayloadError, ValueError):
            raise InvalidRequest("The request body could not be read to its end.") from None
        left_s += len(piece) / _LEAST_BYTES_PER_S - (clock() - began)
        if piece:
            yield piece


def too_slow() -> RequestTooSlow:
    """The connection is of no more use: what comes next on it is the rest of this request."""
    return RequestTooSlow("The request did not come in time.", headers={"Connection": "close"})

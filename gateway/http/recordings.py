"""Recordings over HTTP, as lines of JSON: both ways a line at a time, however many there are."""

from collections.abc import AsyncIterator

import orjson
from aiohttp import web

from gateway.admin import Filters
from gateway.errors import GatewayError, InvalidRequest
from gateway.http.edge import EXCHANGE
from gateway.recordings import Recordings, Terms, lines_of

NDJSON = "application/x-ndjson"
CALLER = "Gateway-Caller-Authorization"
"""With an import: the ``Authorization`` of the caller whose the recordings are to be."""


async def write(request: web.Request, recordings: Recordings, filters: Filters) -> web.StreamResponse:
    """The recordings that fit. Where the store goes away in the middle, the last line is an error."""
    exchange = request[EXCHANGE]
    texts = recordings.export(filters)
    first = await anext(texts, b"")  # what is wrong from the start still has a status of its own
    exchange.head_sent = True
    response = web.StreamResponse(headers={"Content-Type": NDJSON, "Cache-Control": "no-store", **exchange.headers()})
    try:
        await response.prepare(request)
        await response.write(first)
        try:
            async for text in texts:
                await response.write(text)
            await response.write_eof()
        except GatewayError as error:
            exchange.error = f"{type(error).__name__}: {error.message}"
            await response.write_eof(orjson.dumps(error.body()) + b"\n")
    except ConnectionResetError as error:
        exchange.left = True
        exchange.error = type(error).__name__
    finally:
        await texts.aclose()  # type: ignore[attr-defined]  # it is a generator
    return response


async def read(request: web.Request, recordings: Recordings, terms: Terms) -> web.Response:
    """Takes in what the body holds. Raises `InvalidRequest` where that cannot be read to its end."""
    if caller := request.headers.get(CALLER):
        if terms.whose == "everyone":
            raise InvalidRequest(f"'everyone' and {CALLER} contradict each other.", param="everyone")
        terms = terms._replace(whose="caller", headers={"authorization": caller})
    try:
        taken = await recordings.take(lines_of(_pieces(request)), terms)
    except (web.RequestPayloadError, ValueError):
        raise InvalidRequest("The request body could not be read to its end.") from None
    return web.Response(body=orjson.dumps(taken.told()), content_type="application/json")


async def _pieces(request: web.Request) -> AsyncIterator[bytes]:
    async for piece in request.content.iter_any():
        yield piece

"""Streams by their id: resume, cancel, status."""

from aiohttp import web

from gateway.core.stream_id import Cursor, parse_after, parse_cursor
from gateway.errors import InvalidRequest, PathNotFound
from gateway.http.completions import Timing, write_stream
from gateway.http.edge import EXCHANGE, Handler, not_allowed
from gateway.reader import FROM_START
from gateway.service import Service
from gateway.streams import Streams

_METHODS = {"": ["GET"], "cancel": ["POST"], "status": ["GET", "HEAD"]}
"""What is served at ``/v1/streams/{id}``, by what follows."""


def resume(streams: Streams, service: Service, timing: Timing) -> Handler:
    """``GET /v1/streams/{id}``: what comes after ``Last-Event-ID`` or ``?after=``; 204 where nothing does."""

    async def handle(request: web.Request) -> web.StreamResponse:
        exchange = request[EXCHANGE]
        token, cursor = _cursor(request)
        if token != request.match_info["id"]:
            streams.check_same(token, request.match_info["id"], request.headers)
        opened = await streams.resume(token, cursor, request.headers)
        if opened is None:
            return web.Response(status=204)
        exchange.cache_status = opened.disposition.cache_status()
        try:
            return await write_stream(request, opened, exchange, timing)
        finally:
            service.leave(opened)

    return handle


def cancel(streams: Streams) -> Handler:
    """``POST /v1/streams/{id}/cancel``"""

    async def handle(request: web.Request) -> web.StreamResponse:
        token = request.match_info["id"]
        await streams.cancel(token, request.headers)
        return web.json_response({"id": token, "object": "stream", "cancelled": True})

    return handle


def status(streams: Streams) -> Handler:
    """``GET /v1/streams/{id}/status``"""

    async def handle(request: web.Request) -> web.StreamResponse:
        return web.json_response(await streams.status(request.match_info["id"], request.headers))

    return handle


async def unserved(request: web.Request) -> web.StreamResponse:
    """Any other method or path below ``/v1/streams``: nothing of these is an upstream's."""
    _, _, what = request.match_info["rest"].partition("/")
    if what not in _METHODS:
        raise PathNotFound(f"Unknown request URL: {request.method} {request.path}.")
    raise not_allowed(request, _METHODS[what])


def _cursor(request: web.Request) -> tuple[str, Cursor]:
    """The stream's id, and the place in it.

    ``Last-Event-ID`` is newer than the address, which a browser repeats as it was when it reconnects; the id in it may be
    one that an answer to an earlier resume gave to the same stream.
    """
    token = request.match_info["id"]
    last_id, after = request.headers.get("Last-Event-ID"), request.query.get("after")
    try:
        if last_id:
            token = last_id.partition(".")[0]
            return token, parse_cursor(last_id, token)
        return token, FROM_START if after is None else parse_after(after)
    except ValueError as error:
        what = "Last-Event-ID" if last_id else "after"
        raise InvalidRequest(f"{what} is not a place in this stream: {error}.", param=what) from None

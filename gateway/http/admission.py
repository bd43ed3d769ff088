"""Who is let in: a place for the answer, before anything of the body is read; and the bytes of the body, as they come."""

from aiohttp import web

from gateway.http.edge import Handler
from gateway.limits import Holding, Limits
from gateway.questions import Tenants

_BODY: web.RequestKey[Holding] = web.RequestKey("body", Holding)


def admitted(handler: Handler, limits: Limits, tenants: Tenants) -> Handler:
    """The handler, for those who have a place; others are refused with `Overloaded` or `TenantOverloaded`."""

    async def handle(request: web.Request) -> web.StreamResponse:
        limits.held.check(min(request.content_length or 0, request.client_max_size))
        tenant = tenants.owner(request.headers, shared=False)
        with limits.streams.take(tenant), limits.held.holding() as body:
            request[_BODY] = body
            return await handler(request)

    return handle


async def read(request: web.Request) -> bytes:
    """All of the body. Raises `HTTPRequestEntityTooLarge`, `Overloaded`, and what aiohttp raises where it breaks off."""
    holding = request.get(_BODY)
    pieces = []
    size = 0
    while piece := await request.content.readany():
        pieces.append(piece)
        size += len(piece)
        if size > request.client_max_size:
            raise web.HTTPRequestEntityTooLarge(max_size=request.client_max_size, actual_size=size)
        if holding:
            holding.grow(len(piece))
    return b"".join(pieces)

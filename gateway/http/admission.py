"""Who is let in: a place for the answer, before anything of the body is read."""

from aiohttp import web

from gateway.http.body import HOLDING
from gateway.http.edge import Handler, Running
from gateway.limits import Limits
from gateway.questions import Tenants


def admitted(handler: Handler, limits: Limits, tenants: Tenants, running: Running, *, resumes: bool = False) -> Handler:
    """The handler, for those who have a place; others are refused with `Overloaded` or `TenantOverloaded`.

    ``resumes``: it goes on with what had been let in.
    """

    async def handle(request: web.Request) -> web.StreamResponse:
        if limits.lag.is_shedding and not running.was_let_in(request.transport):
            limits.lag.check(resumes=resumes)
        limits.held.check(min(request.content_length or 0, request.client_max_size))
        tenant = tenants.owner(request.headers, shared=False)
        with limits.streams.take(tenant), limits.held.holding() as holding:
            request[HOLDING] = holding
            return await handler(request)

    return handle

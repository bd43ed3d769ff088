"""Web pages of other origins: which of them may ask, and that they may read the answers (CORS, in WHATWG's Fetch)."""

from collections.abc import Collection

from aiohttp import web
from aiohttp.typedefs import Middleware

from gateway.http.edge import Handler

_ANY = "*"
_PREFLIGHT_S = 600
"""For how long a browser need not ask again whether it may; Chromium keeps none for longer than two hours."""


def allow(app: web.Application, origins: Collection[str]) -> None:
    """Lets pages of these origins, or of all (``*``), ask what is below ``/v1``. To others nothing is said."""
    if not origins:
        return

    async def tell(request: web.Request, response: web.StreamResponse) -> None:
        if not request.path.startswith("/v1/"):
            return
        if _ANY in origins:
            response.headers["Access-Control-Allow-Origin"] = _ANY
        else:
            # Also where no page has asked: caches on the way must not take that answer for one to a page.
            vary, origin = response.headers.get("Vary"), request.headers.get("Origin", "")
            response.headers["Vary"] = f"{vary}, Origin" if vary else "Origin"
            if origin in origins:
                response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = _ANY

    app.on_response_prepare.append(tell)
    app.middlewares.append(_preflight(origins))


def _preflight(origins: Collection[str]) -> Middleware:
    @web.middleware
    async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
        """A browser's question whether a page may ask is answered here: it has no credential, so no upstream can."""
        method = request.headers.get("Access-Control-Request-Method")
        may_ask = _ANY in origins or request.headers.get("Origin") in origins
        if request.method != "OPTIONS" or not method or not may_ask or not request.path.startswith("/v1/"):
            return await handler(request)
        headers = {"Access-Control-Allow-Methods": method, "Access-Control-Max-Age": str(_PREFLIGHT_S)}
        if names := request.headers.get("Access-Control-Request-Headers"):
            # Each by its name: "*" would leave Authorization out.
            headers["Access-Control-Allow-Headers"] = names
        return web.Response(status=204, headers=headers)

    return preflight

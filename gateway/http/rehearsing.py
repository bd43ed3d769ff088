"""What a gateway does more that stands in for a model in somebody's tests: it notes what it could not answer."""

from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

from gateway.core.apis import APIS
from gateway.errors import NotRecorded
from gateway.http.edge import Handler

Note = Callable[[dict[str, Any]], object]

_PATHS = {f"/v1/{api.path}" for api in APIS.values()}


def middleware(note: Note) -> Middleware:
    """``note``s requests that no recording answers: what was asked, its key, and the nearest recording's difference."""

    @web.middleware
    async def rehearse(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except NotRecorded as error:
            if request.path in _PATHS:
                said = error.body()["error"]
                told = {"path": request.path, "request": error.request}
                note(told | {"message": error.message, "key": said.get("key", ""), "nearest": said.get("nearest")})
            raise

    return rehearse

"""What a gateway does more that stands in for a model in somebody's tests: it notes what it could not answer."""

from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web
from aiohttp.typedefs import Middleware
from multidict import CIMultiDict

from gateway.admin import Admin
from gateway.core.apis import APIS, Api
from gateway.errors import GatewayError
from gateway.http.completions import controls_of
from gateway.http.edge import Handler
from gateway.questions import Request

Note = Callable[[dict[str, Any]], object]

_MISSING = ("not_cached", "not_recorded")
_APIS = {f"/v1/{api.path}": api for api in APIS.values()}


def middleware(directives: str, about: Callable[[], Admin], note: Note) -> Middleware:
    """Says ``directives`` for every caller, whatever it says itself, and ``note``s requests that no recording answers."""

    @web.middleware
    async def rehearse(request: web.Request, handler: Handler) -> web.StreamResponse:
        api = _APIS.get(request.path)
        if api is None:
            return await handler(request)
        if directives:
            headers = CIMultiDict(request.headers)
            headers["Cache-Control"] = directives
            request = request.clone(headers=headers)
        try:
            return await handler(request)
        except GatewayError as error:
            if error.code not in _MISSING:
                raise
            note(await _missing(request, api, about(), error))
            error.headers["x-should-retry"] = "false"  # OpenAI's clients: it will be missing again
            raise

    return rehearse


async def _missing(request: web.Request, api: Api, about: Admin, error: GatewayError) -> dict[str, Any]:
    """What was asked, its key, and what tells it from the nearest recording."""
    body = orjson.loads(await request.read())
    asked = Request(api, body, request.headers, controls_of(request.headers, body))
    told: dict[str, Any] = {"path": request.path, "request": body, "message": error.message, "key": "", "nearest": None}
    said = error.body()["error"]
    if "key" in said:
        return told | {"key": said["key"], "nearest": said["nearest"]}
    try:
        explained = await about.explain(asked)
    except GatewayError:
        return told
    return told | {"key": explained["key"], "nearest": explained["nearest"]}

"""All other requests below ``/v1``: passed on uncached, streaming both ways."""

from collections.abc import AsyncIterator, Sequence

import orjson
from aiohttp import web

from gateway.errors import InvalidRequest, ModelNotFound, PathNotFound, UpstreamError
from gateway.http import body
from gateway.http.completions import UNSTORED, is_json, parse_json
from gateway.http.edge import EXCHANGE, Handler, not_allowed
from gateway.http.writing import patiently
from gateway.ports import GATEWAY_UPSTREAM, Upstream
from gateway.questions import CREDENTIAL_HEADERS, FORWARDED_HEADERS, Router

_LISTED = "chat/completions"
"""What is ours to answer is listed by its upstream: ``GET`` there tells of the answers that it keeps (``store``)."""
_PASSED_ON = ("accept", "content-type", "idempotency-key", "openai-beta")
_FORWARDED = "gateway; fwd=bypass; detail=relayed"


class Relay:
    """Finds the upstream of a request by the model in its body, else by the configuration, and passes it on."""

    def __init__(
        self,
        router: Router,
        fallback: Upstream | None,
        paths: Sequence[str],
        own: dict[str, list[str]],
        write_timeout_s: float,
    ) -> None:
        self._router = router
        self.fallback = fallback
        """Where requests go that name no model."""
        self._paths = tuple(path.strip("/") for path in paths)
        self._own = own
        self._write_timeout_s = write_timeout_s

    def handler(self) -> Handler:
        return self._handle

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        listed = path == _LISTED and request.method == "GET"
        if path in self._own and not listed:
            raise not_allowed(request, self._own[path])
        upstream, content = await self._destination(request)
        if not upstream or not self._allowed(upstream, path):
            if listed or path.startswith("models/"):
                raise not_allowed(request, self._own[path if listed else "models"])
            raise PathNotFound(f"Unknown request URL: {request.method} {request.path}.")
        return await self._pass_on(request, upstream, content)

    async def model(self, request: web.Request, name: str) -> web.StreamResponse:
        """What its upstream tells of a model that it does not list. Raises `ModelNotFound` where nobody serves it, and
        `PathNotFound` where the upstream tells of none.
        """
        upstream = self._router.route(name).upstream
        path = f"models/{name}"
        if not (_is_clean(path) and _is_plain(path)):
            raise ModelNotFound(name)
        return await self._pass_on(request, upstream, None)

    def _allowed(self, upstream: Upstream, path: str) -> bool:
        """A key of the gateway's own serves only what the configuration names; a caller's own key is the caller's."""
        if not _is_clean(path):
            return False
        if upstream.passes_credential:
            return True
        return _is_plain(path) and any(path == own or path.startswith(f"{own}/") for own in self._paths)

    async def _destination(self, request: web.Request) -> tuple[Upstream | None, AsyncIterator[bytes] | bytes | None]:
        if not request.can_read_body:
            return self.fallback, None
        if not is_json(request.headers.get("Content-Type", "")):
            return self.fallback, body.pieces(request)
        text = await body.read(request)
        asked = parse_json(text)
        model = asked.get("model") if isinstance(asked, dict) else None
        if model is None:
            return self.fallback, text
        if not isinstance(model, str):
            raise InvalidRequest("Invalid type for 'model': expected a string.", param="model")
        route = self._router.route(model)
        request[EXCHANGE].model = model
        return route.upstream, orjson.dumps({**asked, "model": route.model})

    async def _pass_on(
        self, request: web.Request, upstream: Upstream, content: AsyncIterator[bytes] | bytes | None
    ) -> web.StreamResponse:
        exchange = request[EXCHANGE]
        exchange.upstream, exchange.cache_status = upstream.name, _FORWARDED
        names = (*FORWARDED_HEADERS, *_PASSED_ON, *(CREDENTIAL_HEADERS if upstream.passes_credential else ()))
        headers = {name: request.headers[name] for name in names if name in request.headers}
        # As it was sent: an escape that is undone here would mean something else there.
        path = request.rel_url.raw_path_qs.removeprefix("/v1/")
        async with upstream.relay(request.method, path, headers, content) as relayed:
            exchange.take_upstream_id(relayed.headers.get("x-request-id"))
            passed = {name: value for name, value in relayed.headers.items() if name != "x-request-id"}
            exchange.upstream = passed.get(GATEWAY_UPSTREAM, exchange.upstream)
            headers = {**passed, **exchange.headers(), "Cache-Control": UNSTORED}
            response = web.StreamResponse(status=relayed.status, headers=headers)
            try:
                exchange.head_sent = True
                await response.prepare(request)
                async for data in relayed.body:
                    await patiently(request, response.write(data), self._write_timeout_s)
                await response.write_eof()
            except ConnectionResetError:
                exchange.left = True
            except UpstreamError as error:
                # Half an answer must not look whole: the caller's connection breaks as the upstream's did.
                exchange.error = f"{type(error).__name__}: {error.message}"
                if request.transport:
                    request.transport.abort()
            return response


def _is_clean(path: str) -> bool:
    """Whether it leads nowhere else."""
    return not any(part in ("", ".", "..") for part in path.split("/"))


def _is_plain(path: str) -> bool:
    """Whether no server can take it for another path: some undo escapes twice, or leave out what follows a semicolon."""
    return path.isprintable() and not any(char in path for char in "%\\;")

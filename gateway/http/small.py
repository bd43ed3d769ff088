"""The small endpoints: models, health, the API's description, and a word at the root."""

import asyncio
import logging
from fnmatch import fnmatchcase
from typing import Any, Protocol

import orjson
from aiohttp import web

from gateway import __version__
from gateway.config import Config
from gateway.errors import ModelNotFound, NotRecorded, PathNotFound, UpstreamError
from gateway.http.edge import Running
from gateway.http.openapi import MetricsKind, document, operators_document
from gateway.http.relay import Relay
from gateway.ports import Store, Upstream
from gateway.questions import CREDENTIAL_HEADERS

log = logging.getLogger(__name__)

_ROOT = f"""LLM streaming gateway {__version__}
OpenAI's API is served at /v1: point a client's base_url there.
The API's description is at /openapi.json, health at /healthz and /readyz.
"""


class Catalogue(Protocol):
    """The models that are served, and by whom."""

    upstreams: tuple[Upstream, ...]

    def exact_models(self) -> Any: ...

    def globs_of(self, upstream: Upstream) -> list[str]: ...

    def route(self, model: str) -> Any: ...


class Models:
    """``GET /v1/models``: what the configuration names, and what upstreams list that its patterns admit.

    Of a model that is served without being listed its upstream tells; one that has nothing to tell serves any by that name.
    """

    def __init__(self, catalogue: Catalogue, relay: Relay, created: int) -> None:
        self._catalogue = catalogue
        self._relay = relay
        self._created = created

    async def listing(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": list((await self._models(request)).values())})

    async def one(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["model"]
        models = await self._models(request)
        if name in models:
            return web.json_response(models[name])
        try:
            return await self._relay.model(request, name)
        except PathNotFound:
            return web.json_response(self._object(name, self._catalogue.route(name).upstream))
        except NotRecorded:
            raise ModelNotFound(name) from None

    async def _models(self, request: web.Request) -> dict[str, dict[str, Any]]:
        models = {name: self._object(name, upstream) for name, upstream in self._catalogue.exact_models()}
        listed = await asyncio.gather(*(self._listed(upstream, request) for upstream in self._catalogue.upstreams))
        for upstream_models in listed:
            for model in upstream_models:
                models.setdefault(model["id"], model)
        return models

    def _object(self, name: str, upstream: Upstream) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": upstream.name}

    async def _listed(self, upstream: Upstream, request: web.Request) -> list[dict[str, Any]]:
        patterns = self._catalogue.globs_of(upstream)
        if not patterns or (upstream.passes_credential and self._is_one_of_several(upstream)):
            return []
        names = CREDENTIAL_HEADERS if upstream.passes_credential else ()
        try:
            models = await upstream.models({name: request.headers[name] for name in names if name in request.headers})
        except UpstreamError as error:
            log.debug("%s does not list its models: %s", upstream.name, error)
            return []
        return [model for model in models if any(fnmatchcase(model["id"], pattern) for pattern in patterns)]

    def _is_one_of_several(self, upstream: Upstream) -> bool:
        """Whether others are asked with callers' keys, too: nobody can tell whose a key is, and it is shown to no other."""
        return any(each.passes_credential for each in self._catalogue.upstreams if each is not upstream)


def health(store: Store) -> Any:
    async def handle(request: web.Request) -> web.Response:  # noqa: ARG001
        """The process lives; the store's state is said, but is no reason to be restarted."""
        return web.json_response({"status": "ok", "store": _state(store)})

    return handle


def readiness(store: Store, running: Running) -> Any:
    async def handle(request: web.Request) -> web.Response:  # noqa: ARG001
        """Whether to send requests here. Without the store they go through, so its state is no reason not to."""
        status, code = ("draining", 503) if running.draining else ("ready", 200)
        return web.json_response({"status": status, "store": _state(store)}, status=code)

    return handle


def _state(store: Store) -> str:
    return "ok" if store.available else "unavailable"


async def root(request: web.Request) -> web.Response:  # noqa: ARG001
    return web.Response(text=_ROOT)


def openapi(config: Config) -> Any:
    """Of what callers are served; of what operators are, where that is in the same place."""
    here = not config.admin.listen
    admin = here and config.admin.is_open
    kind: MetricsKind = ""
    if here and config.metrics.enabled:
        kind = "open" if config.metrics.public else "guarded" if admin else ""
    return _document(document(__version__, config.server.relay_paths, admin=admin, metrics=kind))


def openapi_of_operators(config: Config) -> Any:
    """Of what is served at an address of their own."""
    kind: MetricsKind = "open" if config.metrics.enabled else ""
    return _document(operators_document(__version__, admin=config.admin.is_open, metrics=kind))


def _document(found: dict[str, Any]) -> Any:
    text = orjson.dumps(found)

    async def handle(request: web.Request) -> web.Response:  # noqa: ARG001
        return web.Response(body=text, content_type="application/json")

    return handle

"""``/metrics``: where it is served, and to whom."""

from aiohttp import web

from gateway.errors import PathNotFound
from gateway.http.edge import Handler
from gateway.metrics import Metrics

_CLOSED = (
    "Metrics are not for everybody: they are served on the [admin] listen address, or with the admin key, or here to all "
    "with [metrics] public = true."
)


def served(metrics: Metrics) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        body, content_type = await metrics.text(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})

    return handle


async def closed(request: web.Request) -> web.Response:  # noqa: ARG001
    """Whoever looks for it is told how to open it; nothing is told of the gateway."""
    raise PathNotFound(_CLOSED)

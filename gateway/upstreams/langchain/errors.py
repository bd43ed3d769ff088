"""What LangChain and the vendors' packages raise, as errors of ours."""

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import orjson

from gateway.core.hiding import Hider
from gateway.errors import (
    ConfigError,
    GatewayError,
    UpstreamBroke,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)

_MESSAGE_CHARS = 500


@contextmanager
def foreign_errors(as_ours: Callable[[Exception], Exception]) -> Iterator[None]:
    """Third-party errors leave as ours; ours leave as they are."""
    try:
        yield
    except (GatewayError, ConfigError):
        raise
    except Exception as error:  # noqa: BLE001  # a vendor's class may raise anything, and nothing of it may cross this package
        raise as_ours(error) from None


def words(error: Exception | str, hide: Callable[[str], str] = str) -> str:
    """The error's own words, on one line, cut, and without what is to hide."""
    return hide(" ".join(str(error).split()))[:_MESSAGE_CHARS]


def failure(error: Exception, hide: Hider) -> UpstreamError:
    """What a stream failed of."""
    message = f"{type(error).__name__}: {words(error, hide)}"
    kinds = [kind.__name__ for kind in type(error).__mro__]
    # Each vendor brings its own client, so classes are known by name; a time-out is often a connection error too.
    if any("Timeout" in kind for kind in kinds):
        return UpstreamTimeout(message)
    if status := _status(error):
        content = {"error": {"message": message, "type": UpstreamRefused.type, "param": None, "code": UpstreamRefused.code}}
        return UpstreamRefused(status, orjson.dumps(content), "application/json", _retry_after(error))
    if isinstance(error, socket.gaierror) or any(kind.endswith(("ConnectionError", "ConnectError")) for kind in kinds):
        return UpstreamUnreachable(message)
    return UpstreamBroke(message)


def _status(error: Exception) -> int | None:
    """The HTTP status that the error carries, or that of the response that it carries."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status_code", "http_status", "status", "code"):
            status = getattr(holder, name, None)
            if isinstance(status, int) and 400 <= status <= 599:
                return int(status)
    return None


def _retry_after(error: Exception) -> dict[str, str]:
    headers = getattr(getattr(error, "response", None), "headers", None)
    value = headers.get("Retry-After") or headers.get("retry-after") if isinstance(headers, Mapping) else None
    return {"retry-after": str(value)} if value else {}

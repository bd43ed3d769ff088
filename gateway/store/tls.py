"""TLS to Redis: its files are read once, before the first connection."""

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redis.asyncio.connection import SSLConnection

from gateway.config import RedisConfig
from gateway.errors import ConfigError


def tls_options(config: RedisConfig) -> dict[str, Any]:
    """What the configuration says, in the client's words. Raises `ConfigError` where a file cannot be read."""
    options: dict[str, Any] = {
        "ssl_cert_reqs": "none" if config.tls_verify == "none" else "required",
        "ssl_check_hostname": config.tls_verify == "full",
    }
    problems = []
    for key, option in (("ca", "ssl_ca_certs"), ("cert", "ssl_certfile"), ("key", "ssl_keyfile")):
        path = getattr(config, f"tls_{key}_file")
        try:
            if path:
                Path(path).read_bytes()
                options[option] = path
        except OSError as error:
            problems.append(f"redis.tls_{key}_file: cannot be read: {error.strerror}")
    if problems:
        raise ConfigError(problems)
    return options


class TlsConnection(SSLConnection):
    """A connection that takes its context from ``like`` where there is one, and looks for ``server_name``, if not empty.

    The client makes a context for each connection: it takes longer to read all authorities than all else of connecting.
    """

    def __init__(self, *, like: SSLConnection | None = None, server_name: str = "", **options: Any) -> None:
        super().__init__(**options)
        if like:
            self.ssl_context = like.ssl_context
        self._server_name = server_name

    def _connection_arguments(self) -> Mapping[str, Any]:
        named = {"server_hostname": self._server_name} if self._server_name else {}
        return {**super()._connection_arguments(), **named}


def shared_context(connection: SSLConnection) -> SSLConnection:
    """The same, with its files loaded. Raises `ConfigError`."""
    try:
        connection.ssl_context.get()
    except (OSError, ssl.SSLError) as error:
        text = getattr(error, "reason", None) or error.strerror or str(error)
        raise ConfigError([f"redis: the files for TLS do not load: {text}"]) from None
    return connection

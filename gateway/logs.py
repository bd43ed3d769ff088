"""What this process logs, and what of it nobody is to read."""

import logging
import sys
from collections.abc import Iterator

from gateway.config import LangChainUpstreamConfig, Loaded
from gateway.core.hiding import Hider, credentials_of, written_secrets


class _Discreet(logging.Formatter):
    """Hides secrets in all that is logged, traces included: what a library puts into an exception is not ours to choose."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(message)s")
        self.hide = Hider()

    def format(self, record: logging.LogRecord) -> str:
        return self.hide(super().format(record))


def log_as(loaded: Loaded) -> None:
    """From now on this process logs, to standard error, as is configured."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Discreet())
    logging.getLogger().addHandler(handler)
    adapt(loaded)


def adapt(loaded: Loaded) -> None:
    """Takes the level, and what is to be hidden, from another configuration.

    The level is ours alone: what libraries say for their own developers is of no use here, and may hold anything.
    """
    logging.getLogger("gateway").setLevel(loaded.config.log.level.upper())
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, _Discreet):
            handler.formatter.hide.learn(_secrets(loaded))


def _secrets(loaded: Loaded) -> Iterator[str]:
    yield from loaded.secrets.values()
    for url in (loaded.config.redis.url, *loaded.proxies.values()):
        yield from credentials_of(url)
    for upstream in loaded.config.upstreams:
        if isinstance(upstream, LangChainUpstreamConfig):
            yield from written_secrets(upstream.arguments)

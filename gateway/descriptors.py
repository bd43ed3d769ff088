"""How many files and sockets the process may have open at a time: as many as the system lets it."""

import logging
from contextlib import suppress

from gateway.config import LimitsConfig

log = logging.getLogger(__name__)

# Beside callers' connections and calls of upstreams: files, Redis, the loop's own.
_OTHERS = 64
# It says that there is no limit, and takes no more than this (OPEN_MAX).
_MOST_OF_MACOS = 10_240


def raise_descriptor_limit(config: LimitsConfig) -> int | None:
    """Raises the soft limit to the hard one, warns where ``config`` allows more than fit, tells how many may be."""
    try:
        import resource  # noqa: PLC0415  # Windows has none
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft not in (hard, resource.RLIM_INFINITY):
        wanted = max(soft, _MOST_OF_MACOS) if hard == resource.RLIM_INFINITY else hard
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft == resource.RLIM_INFINITY:
        return None
    if config.max_connections + _OTHERS > soft:
        told = "limits.max_connections is %d, but the process may have only %d files and sockets open (ulimit -n)"
        log.warning(told, config.max_connections, soft)
    return soft

"""A new configuration for a gateway that runs: all of it or nothing, and no stream is dropped for it."""

import logging

from gateway.app import Adjustable, build_upstreams
from gateway.config import Loaded
from gateway.reload import changes
from gateway.upstreams.leased import Leased
from gateway.upstreams.router import Router


class Live:
    """The upstreams of a running gateway, and all else that follows its configuration."""

    def __init__(self, loaded: Loaded) -> None:
        """Raises `ConfigError`."""
        upstreams = build_upstreams(loaded)
        self.router = Router(upstreams)
        self.adjustable: Adjustable | None = None
        self._loaded = loaded
        self._upstreams = [upstream for _, upstream in upstreams]
        self._dismissed: list[Leased] = []

    async def change(self, loaded: Loaded) -> list[str]:
        """Takes the new configuration, and tells what is different. Raises `ConfigError`; then the old one stays."""
        changed = changes(self._loaded, loaded)
        upstreams = build_upstreams(loaded, self._upstreams)
        if self.adjustable:
            self.adjustable.adjust(loaded, Router(upstreams))
        logging.getLogger().setLevel(loaded.config.log.level.upper())
        self._loaded = loaded
        before, self._upstreams = self._upstreams, [upstream for _, upstream in upstreams]
        gone = [upstream for upstream in before if upstream not in self._upstreams]
        self._dismissed = [upstream for upstream in (*self._dismissed, *gone) if upstream.is_open]
        for upstream in gone:
            await upstream.dismiss()
        return changed

    async def close(self) -> None:
        for upstream in (*self._upstreams, *self._dismissed):
            await upstream.close()

"""A new configuration for a gateway that runs: all of it or nothing, and no stream is dropped for it."""

from gateway.app import Adjustable
from gateway.config import Loaded
from gateway.logs import adapt
from gateway.ports import Clock
from gateway.reload import changes
from gateway.upstreams.fleet import assemble
from gateway.upstreams.leased import Leased


class Live:
    """The upstreams of a running gateway, and all else that follows its configuration."""

    def __init__(self, loaded: Loaded, clock: Clock) -> None:
        """Raises `ConfigError`."""
        self._clock = clock
        self._loaded = loaded
        self._fleet = assemble(loaded, clock)
        self._dismissed: list[Leased] = []
        self.router = self._fleet.router
        self.adjustable: Adjustable | None = None

    async def change(self, loaded: Loaded) -> list[str]:
        """Takes the new configuration, and tells what is different. Raises `ConfigError`; then the old one stays."""
        changed = changes(self._loaded, loaded)
        fleet = assemble(loaded, self._clock, self._fleet.deployments)
        if self.adjustable:
            self.adjustable.adjust(loaded, fleet.router)
        adapt(loaded)
        gone = [each.upstream for each in self._fleet.deployments if each not in fleet.deployments]
        self._loaded, self._fleet = loaded, fleet
        self._dismissed = [upstream for upstream in (*self._dismissed, *gone) if upstream.is_open]
        for upstream in gone:
            await upstream.dismiss()
        return changed

    async def close(self) -> None:
        await self._fleet.close()
        for upstream in self._dismissed:
            await upstream.close()

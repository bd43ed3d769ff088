"""An upstream that may be dismissed while it is in use."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from gateway.ports import Answer, Call, Relayed, Upstream


class Leased:
    """An upstream that, once it is dismissed, is closed as soon as nobody uses it.

    A flight that was planned before may still come for it: then it is made again for that long.
    """

    def __init__(self, make: Callable[[], Upstream], made_of: object) -> None:
        self._make = make
        self._upstream: Upstream | None = make()
        self.made_of = made_of
        """All of the configuration that it depends on."""
        self.name = self._upstream.name
        self.passes_credential = self._upstream.passes_credential
        self._users = 0
        self._dismissed = False

    def __repr__(self) -> str:
        state = "closed" if self._upstream is None else "dismissed" if self._dismissed else "open"
        return f"<Leased {self.name} users={self._users} {state}>"

    @property
    def is_open(self) -> bool:
        return self._upstream is not None

    @asynccontextmanager
    async def ask(self, call: Call) -> AsyncIterator[Answer]:
        """See `Upstream.ask`."""
        async with self._used() as upstream, upstream.ask(call) as answer:
            yield answer

    async def models(self, headers: Mapping[str, str]) -> list[dict[str, Any]]:
        """See `Upstream.models`."""
        async with self._used() as upstream:
            return await upstream.models(headers)

    @asynccontextmanager
    async def relay(
        self, method: str, path: str, headers: Mapping[str, str], body: AsyncIterator[bytes] | bytes | None
    ) -> AsyncIterator[Relayed]:
        """See `Upstream.relay`."""
        async with self._used() as upstream, upstream.relay(method, path, headers, body) as relayed:
            yield relayed

    async def dismiss(self) -> None:
        """It is no longer configured."""
        self._dismissed = True
        if not self._users:
            await self.close()

    async def close(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream:
            await upstream.close()

    @asynccontextmanager
    async def _used(self) -> AsyncIterator[Upstream]:
        if self._upstream is None:
            self._upstream = self._make()
        self._users += 1
        try:
            yield self._upstream
        finally:
            self._users -= 1
            if self._dismissed and not self._users:
                await self.close()

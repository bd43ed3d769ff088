"""What stands in replay mode where an upstream is configured: its name and nothing else, so that nothing can be asked."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from gateway.config import UpstreamConfig
from gateway.errors import NotRecorded
from gateway.ports import Answer, Call, Relayed

_WORDS = "The gateway is in replay mode: it has nobody to ask, and passes nothing on."


class AbsentUpstream:
    """An upstream without a client, a credential or an address."""

    def __init__(self, config: UpstreamConfig, *, shared: bool) -> None:
        """``shared``: whether what is replayed is everybody's, whoever has paid for it."""
        self.name = config.name
        self.passes_credential = config.passes_credential and not shared

    def ask(self, call: Call) -> AbstractAsyncContextManager[Answer]:  # noqa: ARG002  # the port's signature
        """Raises `NotRecorded`."""
        raise NotRecorded(_WORDS)

    async def models(self, headers: Mapping[str, str]) -> list[dict[str, Any]]:  # noqa: ARG002
        """None: what there is, the configuration names."""
        return []

    def relay(
        self,
        method: str,  # noqa: ARG002
        path: str,  # noqa: ARG002
        headers: Mapping[str, str],  # noqa: ARG002
        body: AsyncIterator[bytes] | bytes | None,  # noqa: ARG002
    ) -> AbstractAsyncContextManager[Relayed]:
        """Raises `NotRecorded`."""
        raise NotRecorded(_WORDS)

    async def close(self) -> None:
        """Nothing is held open."""

"""The seams: what the service needs of a clock, a store and an upstream, and nothing of how they do it."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from gateway.core.apis import Api
from gateway.core.key import CacheKey
from gateway.core.recording import Recording


class Clock(Protocol):
    """Time. Wall clock for what is written down, monotonic for what is measured; both in seconds."""

    def now(self) -> float: ...

    def monotonic(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Call:
    """One question to an upstream. ``body`` is the caller's, with the upstream's own name of the model."""

    api: Api
    body: dict[str, Any]
    streamed: bool
    """Whether the caller asked for a stream. The upstream is asked for one wherever it can give one (DESIGN 2.3)."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of the caller's headers, those that may go upstream; its credential is among them only where it is meant to be."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An upstream's answer, once its head is there."""

    headers: Mapping[str, str]
    """Those that may reach the caller: names in lower case."""
    batches: AsyncGenerator[list[bytes], None] | None = None
    """The data of the stream's events, as many at a time as came together; ``[DONE]`` included where it came.

    Iterating raises `UpstreamError`.
    """
    whole: bytes | None = None
    """The JSON body, where the upstream did not stream."""


@dataclass(frozen=True, slots=True)
class Relayed:
    """An uncached answer of the upstream, head first: passed on as it comes, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]


class Upstream(Protocol):
    """A configured origin of answers."""

    name: str
    passes_credential: bool
    """Whether the caller's own credential goes upstream, and so is its tenant."""

    def ask(self, call: Call) -> AbstractAsyncContextManager[Answer]:
        """Entering waits for the head; leaving closes the connection. Raises `UpstreamError`."""
        ...

    async def models(self, headers: Mapping[str, str]) -> list[dict[str, Any]]:
        """OpenAI's model objects that the upstream lists itself; empty where it lists none. Raises `UpstreamError`."""
        ...

    def relay(
        self, method: str, path: str, headers: Mapping[str, str], body: AsyncIterator[bytes] | bytes | None
    ) -> AbstractAsyncContextManager[Relayed]:
        """Passes a request on to ``path`` (below ``/v1``, with its query). Raises `UpstreamError`."""
        ...

    async def close(self) -> None: ...


class Store(Protocol):
    """Where recordings live. Every method raises `StoreError` only."""

    @property
    def secret(self) -> bytes:
        """The secret that all replicas on this store share: of this process alone until the store is first reached."""
        ...

    @property
    def available(self) -> bool:
        """Whether the store answered when it was last asked."""
        ...

    async def lookup(self, key: CacheKey, want: Literal["stream", "whole"], *, patient: bool = False) -> Recording | None:
        """The recording's parts that such a reply needs, or None. ``patient`` waits seconds, not milliseconds."""
        ...

    async def store(self, key: CacheKey, recording: Recording) -> bool:
        """Writes a recording for its ``ttl_s``; tells whether it did: one of a later-started flight stays."""
        ...

    async def delete(self, key: CacheKey) -> None: ...

    async def close(self) -> None: ...

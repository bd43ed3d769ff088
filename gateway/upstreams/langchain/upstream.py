"""A LangChain model as an `Upstream`: one stream of the model for each choice of the answer."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

from gateway.config import LangChainUpstreamConfig
from gateway.core.hiding import Hider, written_secrets
from gateway.errors import GatewayError, PathNotFound, UpstreamBroke
from gateway.ports import Answer, Call, Relayed
from gateway.upstreams.chunks import Json, count_choices, model_objects, stop_sequences
from gateway.upstreams.langchain.errors import failure, foreign_errors
from gateway.upstreams.langchain.model import construct
from gateway.upstreams.langchain.requests import arguments_of, inputs_of, with_tools
from gateway.upstreams.langchain.telling import Event, Teller


class LangChainUpstream:
    """A LangChain model as an `Upstream`.

    Constructing it imports LangChain and constructs the model. Raises `ConfigError` with each problem on a line.
    """

    passes_credential = False

    def __init__(self, config: LangChainUpstreamConfig, secrets: Mapping[str, str]) -> None:
        self.name = config.name
        self._config = config
        self._hide = Hider([*secrets.values(), *written_secrets(config.arguments)])
        self._model = construct(config, secrets, self._hide)

    @asynccontextmanager
    async def ask(self, call: Call) -> AsyncIterator[Answer]:
        """Enters when the first piece is there. Raises `InvalidRequest`, `UpstreamError`."""
        streams = self._streams(call)
        events: asyncio.Queue[Event] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(stream, index, events)) for index, stream in enumerate(streams)]
        try:
            first = await events.get()
            if first.error:
                raise first.error
            async with aclosing(_batches(events, first, Teller(call, len(streams)))) as batches:
                yield Answer({}, batches=batches)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def models(self, headers: Mapping[str, str]) -> list[Json]:  # noqa: ARG002  # the port's signature
        """Those that the configuration names exactly."""
        return model_objects(self._config.models, self.name)

    def relay(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],  # noqa: ARG002  # the port's signature
        body: AsyncIterator[bytes] | bytes | None,  # noqa: ARG002
    ) -> AbstractAsyncContextManager[Relayed]:
        """Raises `PathNotFound`: LangChain's models have no paths."""
        raise PathNotFound(f"{method} /v1/{path}: a LangChain model only serves chat/completions and completions.")

    async def close(self) -> None:
        """LangChain's models have no way to be closed."""

    def _streams(self, call: Call) -> list[AsyncGenerator[Any, None]]:
        """One stream for each choice, not yet running. Raises `InvalidRequest`."""
        count_choices(call)
        per_prompt = int(call.body.get("n") or 1)
        inputs = inputs_of(call, self._model, self._hide)
        runnable = with_tools(self._model, call.body, self._hide)
        stops = stop_sequences(call.body) or None
        arguments = arguments_of(call.body, self._config.dropped_parameters)
        return [runnable.astream(given, stop=stops, **arguments) for given in inputs for _ in range(per_prompt)]

    async def _pump(self, stream: AsyncGenerator[Any, None], index: int, events: asyncio.Queue[Event]) -> None:
        """Puts what comes into ``events``: pieces, then one end. The queue has no bound, as its reader never lags."""
        try:
            with foreign_errors(lambda error: failure(error, self._hide)):
                async with aclosing(stream) as pieces:
                    async for piece in pieces:
                        events.put_nowait(Event(index, piece))
            events.put_nowait(Event(index, ended=True))
        except GatewayError as error:
            events.put_nowait(Event(index, error=error))
        except asyncio.CancelledError:
            # A library may cancel its own work, and then the reader must not wait for ever.
            events.put_nowait(Event(index, error=UpstreamBroke("The model's stream was cancelled.")))
            raise


async def _batches(events: asyncio.Queue[Event], first: Event, teller: Teller) -> AsyncGenerator[list[bytes], None]:
    """The chunks of all choices as they come, each batch what had come by then. Raises `UpstreamError`."""
    waiting = [first]
    while True:
        batch: list[bytes] = []
        error = next((event.error for event in waiting if event.error), None)
        for event in waiting:
            if not event.error:
                batch += teller.tell(event)
        if batch:
            yield batch
        if error:
            raise error
        if teller.running == 0:
            return
        waiting = [await events.get()]
        while not events.empty():
            waiting.append(events.get_nowait())

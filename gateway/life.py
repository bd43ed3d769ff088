"""One process's life: it is made, serves, and ends without losing what it serves."""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import Any, Protocol

from gateway.app import (
    ADJUSTABLE,
    ADMIN_APP,
    LIMITS,
    METRICS,
    RUNNER_OPTIONS,
    RUNNING,
    SERVICE,
    SystemClock,
    announcement,
    build_app,
    load_recordings,
    open_store,
    patience,
)
from gateway.config import AdminConfig, LimitsConfig, Loaded, ServerConfig
from gateway.descriptors import raise_descriptor_limit
from gateway.errors import ConfigError
from gateway.http.connection import Patience
from gateway.http.edge import Running
from gateway.http.server import HttpServer
from gateway.limits import Limits
from gateway.live import Live
from gateway.metrics import Metrics
from gateway.reload import tell_of_change, tell_of_refusal
from gateway.signals import Stop, on_signal
from gateway.sockets import bind
from gateway.watching import Source

log = logging.getLogger(__name__)

# A request makes a thousand objects and leaves no cycles behind: by default each would pay for a collection. Open streams
# keep some hundred objects each, and nothing is sent while those are looked at: so the middle generation is looked at
# before it is large (at 200,000 objects that stopped 2,000 streams for 100 ms), and all of them after a million more.
_GC_THRESHOLDS = 10_000, 0, 100
_LAST_ANSWERS_S = 1.0


class Boss(Protocol):
    """Who tells a process when to change, and when to end."""

    store: str
    """What it says of the store, where that is its own."""

    def announce(self, text: str) -> None:
        """It serves now."""
        ...

    def start(self, stop: Stop) -> None: ...

    def sockets(self, config: ServerConfig) -> list[socket.socket]:
        """To serve on: they listen already. Raises `OSError`."""
        ...

    def admin_sockets(self, config: AdminConfig) -> list[socket.socket]:
        """To serve operators on, where they have an address of their own. Raises `OSError`."""
        ...

    def share(self, metrics: Metrics) -> None:
        """Where others serve the same port, who asks one of them is to hear of all."""
        ...

    async def obey(self, live: Live) -> None: ...


class Alone:
    """What a process without a supervisor listens to: its signals, and its files."""

    def __init__(self, source: Source, say: Callable[[str], None]) -> None:
        self.store = ""
        self._source = source
        self._say = say
        self._reload = asyncio.Event()

    def start(self, stop: Stop) -> None:
        """From now on signals are understood."""
        for number in (signal.SIGINT, signal.SIGTERM):
            on_signal(number, stop.ask_again)
        if hasattr(signal, "SIGHUP"):
            on_signal(signal.SIGHUP, self._reload.set)

    def announce(self, text: str) -> None:
        self._say(text)

    def sockets(self, config: ServerConfig) -> list[socket.socket]:
        return bind(config.host, config.port)

    def admin_sockets(self, config: AdminConfig) -> list[socket.socket]:
        return bind(*config.address) if config.address else []

    def share(self, metrics: Metrics) -> None:
        pass

    async def obey(self, live: Live) -> None:
        """Takes new configurations until it is cancelled."""
        while True:
            await self._source.changed(self._reload)
            loaded, changed, problems = await take(live, self._source.load)
            if loaded:
                tell_of_change(loaded, changed)
            else:
                tell_of_refusal(problems)


async def serve_alone(source: Source, loaded: Loaded, say: Callable[[str], None]) -> None:
    """As `serve`, until SIGINT or SIGTERM."""
    await serve(loaded, Alone(source, say))


async def serve(loaded: Loaded, boss: Boss) -> None:
    """Runs until it is told to end. Raises `ConfigError`, and `OSError` where it cannot listen."""
    config = loaded.config
    stop = Stop()
    boss.start(stop)
    raise_descriptor_limit(config.limits)
    async with AsyncExitStack() as stack:
        live = Live(loaded, SystemClock())
        stack.push_async_callback(live.close)
        store, store_described = await open_store(stack, loaded)
        app = build_app(config, store, live.router, loaded.secrets.get(config.admin.key_name, ""))
        live.adjustable = app[ADJUSTABLE]
        boss.share(app[METRICS])
        # Below those who serve operators, who are told of all workers by way of the boss.
        obeying = await stack.enter_async_context(AsyncExitStack())
        operators = await _open_operators(stack, app, patience(config))  # below: whoever watches the end sees all of it
        shared = config.server.workers > 1
        server = HttpServer(app, app[RUNNING], patience(config), app[LIMITS], RUNNER_OPTIONS, shared=shared)
        stack.push_async_callback(server.close)
        await server.open()
        if not await stop.begins_with(load_recordings(app, config)):  # which may take minutes
            return
        sockets, admin_sockets = boss.sockets(config.server), boss.admin_sockets(config.admin)
        address = sockets[0].getsockname()
        admin_address = admin_sockets[0].getsockname() if admin_sockets else None
        await server.listen(sockets)
        if operators:
            await operators.listen(admin_sockets)
        boss.announce(announcement(address, admin_address, config, boss.store or store_described))
        obeying.push_async_callback(end_task, asyncio.create_task(boss.obey(live)))
        gc.freeze()  # what is loaded by now stays: the collector need not look at it again
        gc.set_threshold(*_GC_THRESHOLDS)
        await stop.asked()
        in_time = await _drains(server, app[RUNNING], config.server, stop)
        await app[SERVICE].close()
        if not in_time:
            # Callers are told, also those who have a connection and are about to ask.
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_ANSWERS_S):
                    await server.ended()


async def _open_operators(stack: AsyncExitStack, app: Any, patience: Patience) -> HttpServer | None:
    """What serves operators at an address of their own, where they have one: to the very end."""
    if ADMIN_APP not in app:
        return None
    limits = Limits(LimitsConfig(max_connections=0))  # callers cannot get here, so they cannot fill it
    server = HttpServer(app[ADMIN_APP], Running(), patience, limits, RUNNER_OPTIONS)
    stack.push_async_callback(server.close)
    await server.open()
    return server


async def take(live: Live, read: Callable[[], Loaded]) -> tuple[Loaded | None, list[str], list[str]]:
    """Takes a new configuration: that, what is different, and if it is not taken, why not."""
    try:
        loaded = read()
        return loaded, await live.change(loaded), []
    except ConfigError as error:
        return None, [], error.problems
    except Exception:  # a bug of ours must not keep the next one from being read
        log.exception("the configuration could not be taken")
        return None, [], ["the gateway failed to take it"]


async def end_task(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _drains(server: HttpServer, running: Running, config: ServerConfig, stop: Stop) -> bool:
    """Says that it is not ready, then takes no more connections; whether all that runs ends within the grace."""
    running.draining = True
    if config.shutdown_delay_s:
        await stop.wait_for(asyncio.sleep(config.shutdown_delay_s), config.shutdown_delay_s)
    await server.stop_listening()
    in_time = await stop.wait_for(server.ended(), config.shutdown_grace_s)
    running.over = True
    return in_time and await stop.wait_for(running.ended(), config.shutdown_grace_s)  # somebody may have come just then

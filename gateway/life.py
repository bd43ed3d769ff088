"""One process's life: it is made, serves, and ends without losing what it serves."""

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from gateway.app import RUNNER_OPTIONS, RUNNING, SERVICE, announcement, build_app, build_router, open_store
from gateway.config import Loaded, ServerConfig
from gateway.http.edge import Running
from gateway.http.server import HttpServer
from gateway.sockets import bind

# A request makes a thousand objects and leaves no cycles behind: by default each would pay for a collection.
_GC_THRESHOLD = 20_000


class Stop:
    """Whether the process is to end, and whether what it does may take its time until then."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._hurry = asyncio.Event()

    def ask(self) -> None:
        """Asks to end; who asks twice does not want to wait for the grace."""
        if self._asked.is_set():
            self._hurry.set()
        self._asked.set()

    async def asked(self) -> None:
        await self._asked.wait()

    async def wait_for(self, what: Awaitable[Any], within_s: float) -> None:
        """Waits for it, but no longer than that, and not where there is no time."""
        tasks = [asyncio.ensure_future(what), asyncio.ensure_future(self._hurry.wait())]
        try:
            await asyncio.wait(tasks, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def on_signal(number: int, then: Callable[[], object]) -> None:
    """Calls ``then`` in the running loop whenever that signal comes."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(number, then)
    except NotImplementedError:  # Windows
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(then))


async def serve(loaded: Loaded, announce: Callable[[str], None]) -> None:
    """Runs until SIGINT or SIGTERM. Raises `ConfigError`, and `OSError` where it cannot listen."""
    config = loaded.config
    stop = Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        on_signal(number, stop.ask)
    async with AsyncExitStack() as stack:
        router = build_router(loaded)
        for upstream in router.upstreams:
            stack.push_async_callback(upstream.close)
        store, store_described = await open_store(stack, loaded)
        app = build_app(config, store, router, loaded.secrets.get(config.admin.key_env, ""))
        server = HttpServer(app, app[RUNNING], RUNNER_OPTIONS)
        stack.push_async_callback(server.close)
        await server.open()
        sockets = bind(config.server.host, config.server.port)
        address = sockets[0].getsockname()
        await server.listen(sockets)
        announce(announcement(address, config, store_described))
        gc.freeze()  # what is loaded by now stays: the collector need not look at it again
        gc.set_threshold(_GC_THRESHOLD)
        await stop.asked()
        await _drain(server, app[RUNNING], config.server, stop)
        await app[SERVICE].close()


async def _drain(server: HttpServer, running: Running, config: ServerConfig, stop: Stop) -> None:
    """Says that it is not ready, then takes no more connections, and lets running answers end within the grace."""
    running.draining = True
    if config.shutdown_delay_s:
        await stop.wait_for(asyncio.sleep(config.shutdown_delay_s), config.shutdown_delay_s)
    await server.stop_listening()
    await stop.wait_for(server.ended(), config.shutdown_grace_s)
    running.over = True

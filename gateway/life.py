"""One process's life: it is made, serves, and ends without losing what it serves."""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol

from gateway.app import ADJUSTABLE, RUNNER_OPTIONS, RUNNING, SERVICE, announcement, build_app, open_store
from gateway.config import Loaded, ServerConfig
from gateway.errors import ConfigError
from gateway.http.edge import Running
from gateway.http.server import HttpServer
from gateway.reload import Live
from gateway.sockets import bind
from gateway.watching import Source

log = logging.getLogger(__name__)

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


class Boss(Protocol):
    """Who tells a process when to change, and when to end."""

    announce: Callable[[str], None]

    def start(self, stop: Stop) -> None: ...

    def sockets(self, config: ServerConfig) -> list[socket.socket]:
        """To serve on: they listen already. Raises `OSError`."""
        ...

    async def obey(self, live: Live) -> None: ...


def on_signal(number: int, then: Callable[[], object]) -> None:
    """Calls ``then`` in the running loop whenever that signal comes."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(number, then)
    except NotImplementedError:  # Windows
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(then))


class Alone:
    """What a process without a supervisor listens to: its signals, and its files."""

    def __init__(self, source: Source, say: Callable[[str], None]) -> None:
        self._source = source
        self.announce = say
        self._reload = asyncio.Event()

    def start(self, stop: Stop) -> None:
        """From now on signals are understood."""
        for number in (signal.SIGINT, signal.SIGTERM):
            on_signal(number, stop.ask)
        if hasattr(signal, "SIGHUP"):
            on_signal(signal.SIGHUP, self._reload.set)

    def sockets(self, config: ServerConfig) -> list[socket.socket]:
        return bind(config.host, config.port)

    async def obey(self, live: Live) -> None:
        """Takes new configurations until it is cancelled."""
        while True:
            await self._source.changed(self._reload)
            try:
                loaded = self._source.load()
                tell_of_change(loaded, await live.change(loaded))
            except ConfigError as error:
                tell_of_refusal(error.problems)


async def serve_alone(source: Source, loaded: Loaded, say: Callable[[str], None]) -> None:
    """As `serve`, until SIGINT or SIGTERM."""
    await serve(loaded, Alone(source, say))


async def serve(loaded: Loaded, boss: Boss) -> None:
    """Runs until it is told to end. Raises `ConfigError`, and `OSError` where it cannot listen."""
    config = loaded.config
    stop = Stop()
    boss.start(stop)
    async with AsyncExitStack() as stack:
        live = Live(loaded)
        stack.push_async_callback(live.close)
        store, store_described = await open_store(stack, loaded)
        app = build_app(config, store, live.router, loaded.secrets.get(config.admin.key_name, ""))
        live.adjustable = app[ADJUSTABLE]
        server = HttpServer(app, app[RUNNING], RUNNER_OPTIONS)
        stack.push_async_callback(server.close)
        await server.open()
        sockets = boss.sockets(config.server)
        address = sockets[0].getsockname()
        await server.listen(sockets)
        boss.announce(announcement(address, config, store_described))
        obeying = asyncio.create_task(boss.obey(live))
        stack.push_async_callback(end_task, obeying)
        gc.freeze()  # what is loaded by now stays: the collector need not look at it again
        gc.set_threshold(_GC_THRESHOLD)
        await stop.asked()
        await _drain(server, app[RUNNING], config.server, stop)
        await app[SERVICE].close()


def tell_of_change(loaded: Loaded, changed: Sequence[str]) -> None:
    log.info("%s is read again: %s", loaded.source, f"new: {', '.join(changed)}" if changed else "nothing has changed")


def tell_of_refusal(problems: Sequence[str]) -> None:
    """In the words in which a start is refused."""
    for problem in problems:
        log.error("the configuration stays as it was: %s", problem)


async def end_task(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _drain(server: HttpServer, running: Running, config: ServerConfig, stop: Stop) -> None:
    """Says that it is not ready, then takes no more connections, and lets running answers end within the grace."""
    running.draining = True
    if config.shutdown_delay_s:
        await stop.wait_for(asyncio.sleep(config.shutdown_delay_s), config.shutdown_delay_s)
    await server.stop_listening()
    await stop.wait_for(server.ended(), config.shutdown_grace_s)
    running.over = True

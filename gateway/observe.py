"""One frozen record of each request, handed to whoever wants to know: the access log now."""

import asyncio
import sys
from collections.abc import Callable
from typing import NamedTuple

_FLUSH_S = 0.2
_LONGEST_TEXT = 300


class RequestDetails(NamedTuple):
    """What there is to say of a request when it has ended. ``status`` is 499 where the caller left before the end."""

    request_id: str
    method: str
    path: str
    status: int
    duration_s: float
    bytes_sent: int
    cache_status: str = ""
    model: str = ""
    upstream: str = ""
    error: str = ""


Sink = Callable[[RequestDetails], None]


class AccessLog:
    """One line a request on standard error. They leave together, a few times a second: a write each costs as a hit does."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, details: RequestDetails) -> None:
        self._lines.append(
            f"{details.method} {_plain(details.path)} {details.status} {details.duration_s * 1000:.1f}ms "
            f"{details.bytes_sent}B id={details.request_id} model={_plain(details.model) or '-'} "
            f"upstream={details.upstream or '-'} cache={details.cache_status!r}"
            f"{f' error={_short(details.error)!r}' if details.error else ''}\n"
        )
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)

    def flush(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        lines, self._lines = self._lines, []
        sys.stderr.write("".join(lines))
        sys.stderr.flush()


def _plain(text: str) -> str:
    """No line of a log may be made by a caller, nor be as long as one likes."""
    text = _short(text)
    return text if text.isprintable() and " " not in text else repr(text)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"

"""One frozen record of each request, handed to whoever wants to know: the access log, the metrics. And what other parts of
the gateway tell of themselves when they are asked.
"""

import asyncio
import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway.errors import GatewayError, UpstreamError, UpstreamRefused

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
    first_token_s: float | None = None
    """How long the first token of a stream took to leave; None where there was none, or no stream."""


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


# Measures


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""The bounds of histograms of seconds: a hit takes a millisecond, a model that thinks takes minutes."""


class Histogram:
    """How many values were at most as large as each bound, and their sum. Adding one costs a fifth of a microsecond."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def merge(self, other: "Histogram") -> None:
        """Adds all that another one with the same bounds has."""
        self.counts = [one + two for one, two in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


@dataclass(slots=True)
class Calls:
    """What has become of an upstream's calls."""

    made: int = 0
    retries: int = 0
    """Those of them that were made because another one had failed, here or at another upstream."""
    errors: dict[str, int] = field(default_factory=dict)
    """By kind."""
    first_token: Histogram = field(default_factory=Histogram)
    """Seconds, from when it was sent."""

    def fail(self, error: GatewayError) -> None:
        kind = _kind(error)
        self.errors[kind] = self.errors.get(kind, 0) + 1


def _kind(error: GatewayError) -> str:
    if isinstance(error, UpstreamRefused):
        return "429" if error.status == 429 else f"{error.status // 100}xx"
    return (error.code or "other").removeprefix("upstream_") if isinstance(error, UpstreamError) else "other"


class UpstreamState(NamedTuple):
    """An upstream at this moment."""

    name: str
    calls: Calls
    running: int
    queued: int
    ejected: bool


class StoreState(NamedTuple):
    """The store at this moment, and what has failed until now."""

    available: bool
    failures: Mapping[str, int]
    """By kind."""
    outages: int
    """How often it has become unavailable."""
    late_lookups: int
    """Those that were given up because no answer had come in time."""

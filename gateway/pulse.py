"""What this process does at the moment: cumulative counts, cheap to add to, which all processes of all replicas report.

Whoever watches looks twice, and takes the difference: see `core.rates`.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import orjson

from gateway.core.histogram import Histogram
from gateway.core.policy import DispositionKind
from gateway.core.rates import COUNTED, MEASURED
from gateway.errors import StoreError
from gateway.observe import RequestDetails
from gateway.ports import Clock

# While there is something to tell, it is told so often.
_REPORT_S = 1.0
# Of processes that have long been gone nothing needs to be known.
_FORGET_S = 3600.0
_LEFT = 499
_MEMBERS = frozenset({"process", "at", "began_at", "open", "counts", "measured"})


class Pulse:
    """The counts of one process, beside those that `Tally` keeps (``tallied``)."""

    def __init__(self, process: str, clock: Clock, tallied: Callable[[], Mapping[str, float]]) -> None:
        self.process = process
        self.clock = clock
        self.open: Callable[[], int] = lambda: 0
        """How many streams are being written."""
        self.on_change: Callable[[], object] | None = None
        """Called with a change, as long as it is there."""
        self.frames = 0
        """That callers were sent."""
        self.ttft_hit_us = Histogram()
        self.ttft_miss_us = Histogram()
        self.ttft_collapsed_us = Histogram()
        """From the request to the first of its frames: stored, from a call of its own, or from one that ran already."""
        self.gap_us = Histogram()
        """From what was sent at one time to what was at the next."""
        self.late_us = Histogram()
        """How late frames of replays that keep time were taken to be sent."""
        self._requests = self._errors = 0
        self._tallied = tallied
        self._began_at = clock.now()
        self._first_us: dict[DispositionKind, Histogram] = {
            "hit": self.ttft_hit_us,
            "stale": self.ttft_hit_us,
            "collapsed": self.ttft_collapsed_us,
            "miss": self.ttft_miss_us,
            "bypass": self.ttft_miss_us,
        }

    def __call__(self, details: RequestDetails) -> None:
        """A request has ended: it is one of those who want to know."""
        if details.path.startswith("/v1/"):
            self._requests += 1
            if (details.status >= 400 or details.error) and details.status != _LEFT:
                self._errors += 1
            if self.on_change:
                self.on_change()

    def meter(self, began_s: float, kind: DispositionKind) -> "Meter":
        """For an answer that was asked for at that time, of the monotonic clock."""
        if self.on_change:
            self.on_change()
        return Meter(self, began_s, self._first_us[kind])

    def report(self) -> dict[str, Any]:
        """All of it, since the process began."""
        tallied = self._tallied()
        counts = {"requests": self._requests, "errors": self._errors, "frames": self.frames}
        counts |= {name: int(tallied.get(name, 0)) for name in COUNTED if name not in counts}
        measured = {name: getattr(self, name).pairs() for name in MEASURED}
        return {
            "process": self.process,
            "at": self.clock.now(),
            "began_at": self._began_at,
            "open": self.open(),
            "counts": counts,
            "measured": measured,
        }


class Meter:
    """What one answer adds to the pulse, as it is sent."""

    __slots__ = ("_first_us", "_last_s", "_monotonic", "_pulse")

    def __init__(self, pulse: Pulse, began_s: float, first_us: Histogram) -> None:
        """``began_s``: when its caller has asked; ``first_us``: where the time of its first frame is counted."""
        self._pulse = pulse
        self._monotonic = pulse.clock.monotonic
        self._last_s = began_s
        self._first_us: Histogram | None = first_us

    def sent(self, frames: int) -> None:
        """So many frames leave together, now."""
        now_s = self._monotonic()
        pulse = self._pulse
        if self._first_us is None:
            pulse.gap_us.add(int((now_s - self._last_s) * 1e6))
        else:
            self._first_us.add(int((now_s - self._last_s) * 1e6))
            self._first_us = None
        self._last_s = now_s
        pulse.frames += frames

    def sent_whole(self, frames: int) -> None:
        """An answer of so many frames leaves in one piece, as no stream."""
        self._pulse.frames += frames

    def late(self, seconds: float) -> None:
        """What leaves now was due so long ago."""
        self._pulse.late_us.add(int(seconds * 1e6))


class Board(Protocol):
    """What the store does here."""

    async def report(self, process: str, report: bytes) -> None: ...

    async def reports(self) -> list[bytes]: ...

    async def forget(self, processes: Sequence[str]) -> None: ...


class Reporter:
    """Reports a pulse about once a second while there is something new, or a stream is open."""

    def __init__(self, pulse: Pulse, board: Board) -> None:
        self._pulse = pulse
        self._board = board
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        pulse.on_change = self._schedule

    async def collect(self) -> list[dict[str, Any]]:
        """The report of this process, and the latest ones of all others if the store is there."""
        own = self._pulse.report()
        try:
            found = [report for text in await self._board.reports() if (report := _parsed(text))]
            old = [report for report in found if own["at"] - report["at"] > _FORGET_S]
            if old:
                await self._board.forget([report["process"] for report in old])
        except StoreError:
            return [own]
        return [own, *(report for report in found if report not in old and report["process"] != own["process"])]

    async def close(self) -> None:
        self._closed, self._pulse.on_change = True, None
        if self._timer:
            self._timer.cancel()
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _schedule(self) -> None:
        if self._timer is None and not self._closed:
            self._pulse.on_change = None  # it is on the way of every hit, and there is nothing more to be done
            self._timer = asyncio.get_running_loop().call_later(_REPORT_S, self._tell)

    def _tell(self) -> None:
        self._timer, self._pulse.on_change = None, self._schedule
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._write())
        else:
            self._schedule()  # the store is slow

    async def _write(self) -> None:
        report = self._pulse.report()
        try:
            with suppress(StoreError):  # the next one says all that this one would have said
                await self._board.report(report["process"], orjson.dumps(report))
        finally:
            self._task = None
            if report["open"]:
                self._schedule()


def _parsed(text: bytes) -> dict[str, Any] | None:
    """None for what is no report, such as one of a later version's."""
    try:
        report = orjson.loads(text)
        return report if isinstance(report, dict) and report.keys() >= _MEMBERS else None
    except orjson.JSONDecodeError:
        return None

"""What has happened: faults with their times, calls that reached an upstream, what callers saw, and what may never be."""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from questions import Identity

_TICK_S = 0.1
_STALL_S = 0.4
_SHOWN = 20
"""Of each kind of violation so many are told in full."""


@dataclass
class Window:
    """A fault, from before it was caused until after it was mended."""

    kind: str
    target: str
    began_at: float
    ended_at: float = float("inf")

    def overlaps(self, began_at: float, ended_at: float) -> bool:
        return self.began_at <= ended_at and began_at <= self.ended_at


@dataclass
class Call:
    """A request that reached an upstream. ``fault`` is what was wrong with the answer, ``codes`` what that may be called."""

    upstream: str
    fault: str
    codes: frozenset[str]
    began_at: float
    ended_at: float = float("inf")


@dataclass
class Journal:
    """Times are those of `now`."""

    windows: list[Window] = field(default_factory=list)
    calls: dict[Identity, list[Call]] = field(default_factory=lambda: defaultdict(list))
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By kind of request and what became of it."""
    excused: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Errors that callers saw, and the fault that each follows from."""
    injected: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    """Whole answers by their Cache-Status."""
    checks: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)
    began_at: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        return time.monotonic() - self.began_at

    @contextmanager
    def fault(self, kind: str, target: str = "", settle_s: float = 0.0) -> Iterator[None]:
        """Whatever is injected within counts as a fault until ``settle_s`` after it."""
        window = Window(kind, target, self.now())
        self.windows.append(window)
        self.injected[kind] += 1
        try:
            yield
        finally:
            window.ended_at = self.now() + settle_s

    async def watch(self) -> None:
        """Notes when the machine stalls, until it is cancelled."""
        while True:
            before = self.now()
            await asyncio.sleep(_TICK_S)
            if self.now() - before > _TICK_S + _STALL_S:
                self.windows.append(Window("machine stalled", "", before, self.now() + _STALL_S))
                self.injected["(machine stalled)"] += 1

    def faults(self, began_at: float, ended_at: float) -> Iterator[Window]:
        return (window for window in self.windows if window.overlaps(began_at, ended_at))

    def violate(self, kind: str, detail: str) -> None:
        self.violations[kind] += 1
        if self.violations[kind] <= _SHOWN:
            self.details.append(f"{self.now():.2f} s: {kind}: {detail}")

    def check(self, kind: str, *, holds: bool, detail: str) -> None:
        self.checks[kind] += 1
        if not holds:
            self.violate(kind, detail)

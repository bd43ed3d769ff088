"""When each frame of a replay is due."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PaceKind = Literal["instant", "recorded", "fixed"]


@dataclass(frozen=True, slots=True)
class Pace:
    """How a replay is timed: at once, as recorded (``speed`` times as fast), or ``frames_per_s``."""

    kind: PaceKind = "instant"
    speed: float = 1.0
    frames_per_s: float = 50.0

    def schedule(self, at_us: Sequence[int]) -> list[float]:
        """The due time of each frame in seconds after the reply began: never decreasing, one for each of ``at_us``."""
        if self.kind == "instant":
            return [0.0] * len(at_us)
        if self.kind == "fixed":
            return [(place + 1) / self.frames_per_s for place in range(len(at_us))]
        due: list[float] = []
        latest = 0.0
        for arrival_us in at_us:
            latest = max(latest, arrival_us / 1e6 / self.speed)
            due.append(latest)
        return due


INSTANT = Pace()


def due_by(schedule: Sequence[float], start: int, elapsed_s: float) -> int:
    """The place after the last frame from ``start`` on that is due: those that fall due together leave together."""
    end = start
    while end < len(schedule) and schedule[end] <= elapsed_s:
        end += 1
    return end

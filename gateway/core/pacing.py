"""When each frame of a replay is due."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

PaceKind = Literal["instant", "recorded", "fixed", "drawn"]
Wish = Mapping[str, Any]
"""Some members of a `Pace` that stand in for the configured ones."""

NO_WISH: Final[Wish] = MappingProxyType({})


class Draw(Protocol):
    """Chance, as `random.Random` makes it of a seed."""

    def gammavariate(self, alpha: float, beta: float) -> float: ...

    def uniform(self, a: float, b: float) -> float: ...


@dataclass(frozen=True, slots=True)
class Pace:
    """How a replay is timed: at once, as recorded (``speed`` times as fast), at ``tokens_per_s``, or as drawn.

    What is drawn has the mean and the standard deviation (``sd``) that are given, and is never below 0 (a gamma
    distribution). A frame that says something is a token, or several where the usage tells so; one that says nothing (a
    role, a finish reason) is due with its neighbour. Every gap is up to ``jitter``, a share of it, shorter or longer, and
    no longer than ``max_gap_s`` (0: as long as it is).
    """

    kind: PaceKind = "instant"
    speed: float = 1.0
    tokens_per_s: float = 50.0
    ttft_s: float = 0.3
    ttft_sd_s: float = 0.0
    itl_s: float = 0.02
    itl_sd_s: float = 0.0
    jitter: float = 0.0
    max_gap_s: float = 0.0
    seed: int = 0
    turns: bool = True
    """Whether each replay of a recording is drawn anew; else they are all alike."""

    def with_wish(self, wish: Wish) -> "Pace":
        return replace(self, **wish) if wish else self

    @property
    def is_instant(self) -> bool:
        return self.kind == "instant"

    @property
    def draws(self) -> bool:
        """Whether there is chance in it."""
        return bool(self.jitter) or (self.kind == "drawn" and bool(self.ttft_sd_s or self.itl_sd_s))

    @property
    def counts_tokens(self) -> bool:
        """Whether a schedule depends on which frames say something."""
        return self.kind in ("fixed", "drawn")

    def schedule(
        self, at_us: Sequence[int], draw: Draw, speaking: Sequence[bool] = (), tokens_a_frame: float = 1.0
    ) -> list[float]:
        """The due time of each frame in seconds after the reply began: never decreasing, one for each of ``at_us``.

        ``speaking`` tells which frames say something (none given: all), where that matters.
        """
        if self.is_instant:
            return [0.0] * len(at_us)
        gaps_s = self._recorded(at_us)
        if self.counts_tokens:
            gaps_s = self._by_token(speaking or [True] * len(at_us), draw, tokens_a_frame)
        due_s, due = 0.0, []
        for gap_s in gaps_s:
            if self.jitter:
                gap_s *= 1.0 + self.jitter * draw.uniform(-1.0, 1.0)  # noqa: PLW2901
            due_s += min(gap_s, self.max_gap_s) if self.max_gap_s else gap_s
            due.append(due_s)
        return due

    def _recorded(self, at_us: Sequence[int]) -> Iterator[float]:
        latest_us = 0
        for arrival_us in at_us:
            yield max(0, arrival_us - latest_us) / 1e6 / self.speed
            latest_us = max(latest_us, arrival_us)

    def _by_token(self, speaking: Sequence[bool], draw: Draw, tokens_a_frame: float) -> Iterator[float]:
        fixed_s = 1.0 / self.tokens_per_s if self.kind == "fixed" else None
        spoken = False
        for place, speaks in enumerate(speaking):
            gap_s = 0.0
            if not place:
                gap_s = fixed_s or _drawn(self.ttft_s, self.ttft_sd_s, draw)
            elif speaks and spoken:
                gap_s = tokens_a_frame * (fixed_s or _drawn(self.itl_s, self.itl_sd_s, draw))
            spoken = spoken or speaks
            yield gap_s


INSTANT = Pace()

# A deviation of more than a thousand times the mean is beyond what numbers hold.
_LEAST_SHAPE = 1e-6


def _drawn(mean: float, sd: float, draw: Draw) -> float:
    if not (mean and sd):
        return mean
    shape = max((mean / sd) ** 2, _LEAST_SHAPE)
    return draw.gammavariate(shape, mean / shape)


def due_by(schedule: Sequence[float], start: int, elapsed_s: float) -> int:
    """The place after the last frame from ``start`` on that is due: those that fall due together leave together."""
    end = start
    while end < len(schedule) and schedule[end] <= elapsed_s:
        end += 1
    return end


def speaks(chunk: Mapping[str, Any]) -> bool:
    """Whether a chunk says anything: a role, an end or a usage alone is nothing."""
    choices = chunk.get("choices")
    return isinstance(choices, list) and any(_says(choice) for choice in choices if isinstance(choice, dict))


def _says(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return bool(choice.get("text"))
    return any(value for name, value in delta.items() if name != "role")


def tokens_said(usage: Mapping[str, Any] | None) -> int:
    """How many tokens an answer shows; 0 where the usage does not tell, or counts some that were thought and not shown."""
    if not usage:
        return 0
    details, tokens = usage.get("completion_tokens_details"), usage.get("completion_tokens")
    hidden = details.get("reasoning_tokens") if isinstance(details, dict) else 0
    return tokens if isinstance(tokens, int) and not hidden else 0

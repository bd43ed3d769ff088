"""What recordings tell of a model: when its tokens came, and with which parameters a simulated one behaves like that.

The parameters are those of `simulation.Behaviour`, by the method of moments: means and standard deviations, and a straight
line through the times of first tokens over the lengths of their prompts where that line is steeper than chance has it.
A queue and a batch cannot be told from outside: what they cost is in the times. The memory does not grow.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import orjson

from gateway.core.histogram import Histogram
from gateway.core.recording import Recording, payload_of

# A slope is believed from here on: so many standard errors above 0, of so many points.
_STEEP_ERRORS = 4.0
_STEEP_POINTS = 10


@dataclass(frozen=True, slots=True)
class Observed:
    """What there is to see in one recording. Only the first choice counts."""

    at_us: tuple[int, ...]
    """When something of the answer came; empty where that is not known, since it did not stream."""
    length_tokens: int
    """As the model has counted, without what it only thought; else one for each time that something came."""
    prompt_tokens: int | None
    """Of the prompt, those that were not in the model's own cache."""
    ended: bool
    """Whether the model itself has ended the answer, and not a limit."""


def observe(recording: Recording) -> Observed:
    """Raises `CorruptRecording`."""
    meta, marks = recording.meta, recording.marks
    at_us: dict[int, None] = {}
    if marks and not meta.whole and len(meta.runs) <= 1:
        frames = recording.frames(None, usage=True)
        # What comes at one time is one arrival, as whoever reads it sees it.
        at_us = dict.fromkeys(
            arrival_us for arrival_us, frame in zip(marks.at_us, frames, strict=False) if _says_something(frame)
        )
    choices = max(1, len(meta.finish_reasons))
    return Observed(
        tuple(at_us),
        _spoken(meta.usage or {}, choices) or max(1, len(at_us)),
        _prompt(meta.usage or {}),
        "length" not in meta.finish_reasons,
    )


def _says_something(frame: bytes) -> bool:
    """Whether a part of the first choice's answer is in the frame, and not only its role, its end or its costs."""
    chunk = orjson.loads(payload_of(frame))
    choices = chunk.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(first, dict) or first.get("index", 0) != 0:
        return False
    delta = first.get("delta")
    if isinstance(delta, dict):
        return any(value for name, value in delta.items() if name != "role")
    return bool(first.get("text"))


def _spoken(usage: Mapping[str, Any], choices: int) -> int:
    """The tokens of one choice; 0 where they are not known."""
    tokens, thought = _count(usage, "completion_tokens"), _count(usage, "completion_tokens_details", "reasoning_tokens")
    if thought and tokens and thought < tokens:
        tokens -= thought
    return (tokens or 0) // choices


def _prompt(usage: Mapping[str, Any]) -> int | None:
    tokens, cached = _count(usage, "prompt_tokens"), _count(usage, "prompt_tokens_details", "cached_tokens")
    return max(0, tokens - (cached or 0)) if tokens is not None else None


def _count(usage: Mapping[str, Any], *path: str) -> int | None:
    found: Any = usage
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


class Moments:
    """The mean and the standard deviation of numbers, none of which is kept (Welford)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    def add(self, number: float) -> None:
        self.count += 1
        off = number - self.mean
        self.mean += off / self.count
        self._squares += off * (number - self.mean)

    @property
    def deviation(self) -> float:
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0


class Line:
    """A straight line through points, by least squares. No point is kept."""

    def __init__(self) -> None:
        self.count = 0
        self._x = self._y = 0.0
        self._xx = self._xy = self._yy = 0.0

    def add(self, x: float, y: float) -> None:
        self.count += 1
        x_off, y_off = x - self._x, y - self._y
        self._x += x_off / self.count
        self._y += y_off / self.count
        self._xx += x_off * (x - self._x)
        self._xy += x_off * (y - self._y)
        self._yy += y_off * (y - self._y)

    @property
    def slope(self) -> float:
        """0 where it is not steep for certain."""
        if self.count < _STEEP_POINTS or self._xx <= 0:
            return 0.0
        slope = self._xy / self._xx
        error = math.sqrt(self._left(slope) / self._xx)
        return slope if slope > _STEEP_ERRORS * error else 0.0

    def at_0(self, slope: float) -> float:
        return self._y - slope * self._x

    def deviation(self, slope: float) -> float:
        """Of the points from the line of this slope."""
        return math.sqrt(self._left(slope))

    def _left(self, slope: float) -> float:
        freedom = self.count - (2 if slope else 1)
        return max(0.0, self._yy - 2 * slope * self._xy + slope**2 * self._xx) / freedom if freedom > 0 else 0.0


class Profile:
    """All that was observed of one model."""

    def __init__(self) -> None:
        self.recordings = 0
        self.timed = 0
        """Those that tell when something came."""
        self.ttft_us = Histogram()
        self.gaps_us = Histogram()
        """Between what came at one time and at the next."""
        self._ttft_s = Moments()
        self._ttft_by_prompt = Line()
        self._gap_of_a_token_s = Moments()
        self._lengths = Moments()
        self._whole_lengths = Moments()

    def add(self, observed: Observed) -> None:
        self.recordings += 1
        self._lengths.add(observed.length_tokens)
        if observed.ended:
            self._whole_lengths.add(observed.length_tokens)
        if observed.at_us:
            self.timed += 1
            self._add_first(observed.at_us[0], observed.prompt_tokens)
            self._add_gaps(observed)

    def _add_first(self, ttft_us: int, prompt_tokens: int | None) -> None:
        self.ttft_us.add(ttft_us)
        self._ttft_s.add(ttft_us / 1e6)
        if prompt_tokens is not None:
            self._ttft_by_prompt.add(prompt_tokens, ttft_us / 1e6)

    def _add_gaps(self, observed: Observed) -> None:
        at_us = observed.at_us
        if len(at_us) < 2:
            return
        # Where several tokens come at a time, each has its share of the gap before them.
        tokens_a_gap = max(1.0, (observed.length_tokens - 1) / (len(at_us) - 1))
        for earlier_us, later_us in pairwise(at_us):
            self.gaps_us.add(later_us - earlier_us)
            self._gap_of_a_token_s.add((later_us - earlier_us) / 1e6 / tokens_a_gap)

    def fitted(self) -> dict[str, float]:
        """The parameters of a simulated model that behaves alike; those of which nothing is known are left out."""
        return self._fitted_first() | self._fitted_rate() | self._fitted_lengths()

    def _fitted_first(self) -> dict[str, float]:
        if not self.timed:
            return {}
        line, slope = self._ttft_by_prompt, self._ttft_by_prompt.slope
        if not slope or line.at_0(slope) < 0:
            return {"ttft_s": self._ttft_s.mean, "ttft_sd_s": self._ttft_s.deviation, "prefill_tokens_per_s": 0.0}
        return {
            "ttft_s": line.at_0(slope),
            "ttft_sd_s": line.deviation(slope),
            "prefill_tokens_per_s": 1 / slope,
        }

    def _fitted_rate(self) -> dict[str, float]:
        gap_s = self._gap_of_a_token_s
        if gap_s.mean <= 0:
            return {}
        return {"tokens_per_s": 1 / gap_s.mean, "itl_sd_s": gap_s.deviation}

    def _fitted_lengths(self) -> dict[str, float]:
        lengths = self._whole_lengths if self._whole_lengths.count else self._lengths
        if not lengths.count:
            return {}
        return {"length_tokens": max(1, round(lengths.mean)), "length_sd_tokens": lengths.deviation}


def config_of(models: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """The lines of a configuration in which a simulated upstream stands in for these models, as they were fitted."""
    names = [_pattern(model) for model, _ in models]
    lines = ["[[upstreams]]", 'name = "simulated"', 'kind = "simulated"', f"models = [{', '.join(names)}]"]
    for (_, fitted), name in zip(models, names, strict=True):
        lines += ["", "[[upstreams.profiles]]", f"names = [{name}]"]
        lines += [
            f"{key} = {value:.4g}" if isinstance(value, float) else f"{key} = {value}" for key, value in fitted.items()
        ]
    return "\n".join(lines) + "\n"


def _pattern(model: str) -> str:
    """A TOML string that as a glob means this name only."""
    return json.dumps(re.sub(r"([*?[])", r"[\1]", model), ensure_ascii=False).replace("\x7f", "\\u007f")

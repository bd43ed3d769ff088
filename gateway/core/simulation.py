"""How a simulated serving cluster behaves: how long its answers are, how long they take, and who waits for whom.

Times are lognormal: never below 0, and with the long tail to the right that measured latencies have. (The simulators of
llm-d and guidellm cut a normal distribution off instead; for small deviations the two are alike.) Lengths are gamma
distributed: with a deviation as large as the mean that is the exponential distribution which ServeGen found in production
(arXiv 2505.09999), with a smaller one it has a hump. What a full batch costs grows in a straight line, as llm-d has it.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

T = TypeVar("T", bound=Hashable)

# A tail that is longer would only cost memory.
MAX_LENGTH_TOKENS = 131_072


class Chance(Protocol):
    """Where the draws come from: `random.Random` is one."""

    def lognormvariate(self, mu: float, sigma: float) -> float: ...

    def gammavariate(self, alpha: float, beta: float) -> float: ...


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What one simulated model is like. Where something has a deviation (``_sd_``), the value beside it is the mean."""

    ttft_s: float = 0.3
    """To the first token of a call that runs alone, beside what its prompt costs."""
    ttft_sd_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    """How fast a prompt is read; 0: in no time."""
    tokens_per_s: float = 40.0
    """After the first token, for a call that runs alone."""
    itl_sd_s: float = 0.0
    """The deviation of the time from one token to the next."""
    length_tokens: float = 120.0
    length_sd_tokens: float = 0.0
    batch_size: int = 0
    """How many calls run at a time; 0: any number, and none slows another."""
    batch_slowdown: float = 1.0
    """How many times as long everything takes in a full batch as alone."""

    def first_token_s(self, chance: Chance, prompt_tokens: int) -> float:
        """From the moment in which a call is in the batch."""
        prefill_s = prompt_tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0
        return _lognormal(chance, self.ttft_s + prefill_s, self.ttft_sd_s)()

    def gaps_s(self, chance: Chance) -> Callable[[], float]:
        """Draws the times from one token to the next."""
        return _lognormal(chance, 1 / self.tokens_per_s, self.itl_sd_s)

    def length(self, chance: Chance) -> int:
        """Of one answer, in tokens: at least 1."""
        mean, deviation = self.length_tokens, self.length_sd_tokens
        if not deviation:
            return max(1, round(mean))
        drawn = chance.gammavariate((mean / deviation) ** 2, deviation**2 / mean)
        return max(1, min(round(drawn), MAX_LENGTH_TOKENS))

    def slowdown(self, running: int) -> float:
        """How many times as long everything takes while so many calls run."""
        if self.batch_size < 2:
            return 1.0
        share = (min(running, self.batch_size) - 1) / (self.batch_size - 1)
        return 1.0 + (self.batch_slowdown - 1.0) * max(0.0, share)


def _lognormal(chance: Chance, mean: float, deviation: float) -> Callable[[], float]:
    """Draws from the lognormal distribution of this mean and standard deviation."""
    if not (mean and deviation):
        return lambda: mean
    variance = math.log1p((deviation / mean) ** 2)
    return partial(chance.lognormvariate, math.log(mean) - variance / 2, math.sqrt(variance))


class Batch(Generic[T]):
    """Which calls run together, ``size`` at a time (0: any number); the others wait: first come, first served."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.running = 0
        self._waiting: OrderedDict[T, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Batch running={self.running} of={self.size or 'any'} waiting={len(self._waiting)}>"

    @property
    def is_empty(self) -> bool:
        return not (self.running or self._waiting)

    def enter(self, call: T) -> bool:
        """Whether it runs at once; else it waits."""
        if self.size and self.running >= self.size:
            self._waiting[call] = None
            return False
        self.running += 1
        return True

    def leave(self, call: T) -> T | None:
        """Which call runs from now on, since this one has ended, or waits no longer."""
        if call in self._waiting:
            del self._waiting[call]
            return None
        if self._waiting:
            return self._waiting.popitem(last=False)[0]
        self.running -= 1
        return None

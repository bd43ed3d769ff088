"""Counts of numbers by their size: cheap to add to, and those of two places or times can be added and subtracted.

Buckets are as HdrHistogram has them: below 32 each number has its own; above, 32 to each doubling. So what is read from
one is at most 1/32 off, at any size.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Self

_STEPS = 32
_BITS = _STEPS.bit_length()
_MOST_BITS = 42  # as microseconds, 50 days
_BUCKETS = _STEPS * (_MOST_BITS - _BITS + 2)

Pair = tuple[int, int]
"""The number of a bucket, and how many are in it."""


class Histogram:
    """How many numbers there were of each size. What is added must be whole; below 0 counts as 0."""

    __slots__ = ("_counts",)

    def __init__(self, pairs: Iterable[Pair] = ()) -> None:
        """Raises `ValueError` for what is no bucket."""
        self._counts = [0] * _BUCKETS
        for bucket, count in pairs:
            if not 0 <= bucket < _BUCKETS:
                raise ValueError(f"there is no bucket {bucket}")
            self._counts[bucket] += count

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Histogram) and self._counts == other._counts

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"<Histogram of {self.total}>"

    def add(self, number: int) -> None:
        if number < _STEPS:
            self._counts[max(0, number)] += 1
            return
        shift = number.bit_length() - _BITS
        try:
            self._counts[shift * _STEPS + (number >> shift)] += 1
        except IndexError:
            self._counts[-1] += 1

    @property
    def total(self) -> int:
        return sum(self._counts)

    def pairs(self) -> list[Pair]:
        """Those buckets that are not empty."""
        return [(bucket, count) for bucket, count in enumerate(self._counts) if count]

    def __iadd__(self, other: "Histogram") -> Self:
        self._counts = [mine + theirs for mine, theirs in zip(self._counts, other._counts, strict=True)]
        return self

    def __sub__(self, earlier: "Histogram") -> "Histogram":
        """What was added since; where something has gone, all of it was."""
        change = Histogram()
        change._counts = [now - then for now, then in zip(self._counts, earlier._counts, strict=True)]
        if min(change._counts) < 0:
            change._counts = self._counts[:]
        return change

    def quantile(self, share: float) -> float | None:
        """The number that this share of all does not exceed; None where there are none."""
        sums = list(accumulate(self._counts))
        if not sums[-1]:
            return None
        rank = max(1.0, share * sums[-1])
        bucket = bisect_left(sums, rank)
        low, high = bounds(bucket)
        inside = (rank - (sums[bucket] - self._counts[bucket])) / self._counts[bucket]
        return low + (high - 1 - low) * inside

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Of each bucket that is not empty, where it begins, where it ends, and how many are in it."""
        for bucket, count in self.pairs():
            yield (*bounds(bucket), count)


def bounds(bucket: int) -> tuple[int, int]:
    """The least number that falls into a bucket, and the least that is too large for it."""
    shift = max(0, bucket // _STEPS - 1)
    low = (bucket - shift * _STEPS) << shift
    return low, low + (1 << shift)

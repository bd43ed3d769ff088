"""A histogram as lines of text."""

import math
from collections.abc import Sequence

_BLOCKS = " ▏▎▍▌▋▊▉█"
_HEIGHTS = "▁▂▃▄▅▆▇█"

Span = tuple[int, int, int]
"""Where a bucket begins, where it ends, and how many are in it."""
Row = tuple[float, int, str]
"""Where it begins, how many are in it, and a bar as long as that is much."""


def rows(spans: Sequence[Span], *, most: int, width: int) -> list[Row]:
    """Up to ``most`` rows, each as many times as large as the one above; the longest bar is ``width`` characters."""
    if not spans:
        return []
    # What is below 1 counts as 1: a logarithm has no 0.
    first, last = max(1, spans[0][0]), max(2, spans[-1][1])
    # Rows that are narrower than buckets would have gaps.
    narrowest = min(math.log(high / low) for low, high in [(max(1, low), max(2, high)) for low, high, _ in spans])
    count = max(1, min(most, math.floor(math.log(last / first) / narrowest + 0.5)))
    step = (last / first) ** (1 / count)
    counts = [0] * count
    for low, high, many in spans:
        middle = max(1.0, (low + high) / 2)
        counts[min(count - 1, max(0, int(math.log(middle / first) / math.log(step))))] += many
    longest = max(counts)
    return [(first * step**place, many, _bar(many / longest * width)) for place, many in enumerate(counts)]


def spark(values: Sequence[float]) -> str:
    """A character for each value, as high as it is beside the greatest."""
    greatest = max(values, default=0.0)
    return "".join(_HEIGHTS[round(7 * value / greatest) if greatest > 0 else 0] for value in values)


def _bar(length: float) -> str:
    """To an eighth of a character; what is there at all can be seen."""
    eighths = max(round(8 * length), 1 if length else 0)
    return ("█" * (eighths // 8) + _BLOCKS[eighths % 8]).rstrip()

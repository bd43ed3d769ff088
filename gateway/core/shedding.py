"""Which share of newcomers a process refuses, so that its event loop is in time for those whom it serves.

What runs cannot be sent away, so the number of newcomers is all that can be chosen, and it is felt late: a stream that was
let in takes its part of the processor until it ends. So this is a controller: of how late the loop is beyond what it may,
a part refuses at once (proportional), and a part adds up until the lag is what it may be (integral). The share changes
smoothly: to let in all or nobody would idle and choke a processor in turn.

A queue that stands does harm, one that passes does none (Nichols and Jacobson, "Controlling Queue Delay", 2012). One pause,
however long (a collection of garbage, another process's turn), is one late measurement: so the median of three counts.
"""

from collections import deque
from statistics import median

_MEASUREMENTS = 3
# Found with the model of `tests/core/test_shedding.py`: more is unsteady, less lets the first moments of a flood in.
_PROPORTIONAL = 1.0
_INTEGRAL_PER_S = 0.5
# Those who resume wait this much longer, until it is sure that it was not enough to refuse all others.
_INTEGRAL_OF_RESUMED_PER_S = 0.25
# Later than twice what it may be is no worse: how much longer the loop is late depends on what was let in before.
_MOST_ERROR = 1.0
# So long without a measurement tells of the time before it, not of the lag.
_LONGEST_STEP_S = 0.1
_ALL = 1.0


class Shedding:
    """The controller of one process. As long as the loop is no later than ``max_lag_s`` (0: any lag), nobody is refused."""

    lag_s: float
    """How late the loop is, single pauses left out."""
    share: float
    """Of newcomers, which is to be refused: from 0 to 1."""
    share_of_resumed: float
    """The same of those who resume a stream that had been let in: only where it did not help to refuse all newcomers."""

    def __init__(self) -> None:
        self.become(0.0)

    def become(self, max_lag_s: float) -> None:
        """From now on that is how late the loop may be. What was learned of the load stays, unless there is no limit."""
        if not max_lag_s:
            self.lag_s = self.share = self.share_of_resumed = self._standing = 0.0
            self._last_s: float | None = None
            self._lags: deque[float] = deque([0.0] * _MEASUREMENTS, _MEASUREMENTS)
        self.max_lag_s = max_lag_s

    def add(self, lag_s: float, now_s: float) -> None:
        """One measurement, and when it was made."""
        if not self.max_lag_s:
            return
        self._lags.append(lag_s)
        self.lag_s = median(self._lags)
        step_s = 0.0 if self._last_s is None else min(now_s - self._last_s, _LONGEST_STEP_S)
        self._last_s = now_s
        error = min(self.lag_s / self.max_lag_s - 1.0, _MOST_ERROR)
        if self._standing == _ALL or error < 0:
            self.share_of_resumed = _within(self.share_of_resumed + _INTEGRAL_OF_RESUMED_PER_S * error * step_s)
        self._standing = _within(self._standing + _INTEGRAL_PER_S * error * step_s)
        self.share = _within(self._standing + _PROPORTIONAL * max(error, 0.0))


def _within(share: float) -> float:
    return min(max(share, 0.0), _ALL)

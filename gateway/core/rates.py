"""What is happening, from two looks at what has happened: rates and percentiles of the time between them.

A report is what one process has counted since it began. Reports are compared process by process, so one that restarts,
comes or goes takes nothing from the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.core.histogram import Histogram

COUNTED = ("requests", "errors", "frames", "hits", "misses", "collapsed", "bypassed", "stale", "stored")
"""``hits``, ``misses`` and so on as the statistics have them."""
MEASURED = ("ttft_hit_us", "ttft_miss_us", "ttft_collapsed_us", "gap_us", "late_us")
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
# Who has streams open reports once a second. One that has not for so long is gone.
_GONE_S = 5.0
# Who had nothing to report did nothing: what its first report tells has happened since the last look.
_IDLE_LOOKS = 2.0

Report = Mapping[str, Any]


class Watch:
    """Looks again and again, and tells what has happened since the look before."""

    def __init__(self) -> None:
        self._seen: dict[str, Report] = {}
        self._began_at: float | None = None
        """When it looked for the first time, by the clock of the gateway."""

    def look(self, reports: Sequence[Report], at: float, interval_s: float) -> dict[str, Any]:
        """``at`` is now, by the clock of the gateway; ``interval_s`` how long ago the look before was.

        The first look tells only how many streams are open.
        """
        rates = dict.fromkeys(COUNTED, 0.0)
        measured = {name: Histogram() for name in MEASURED}
        for report in reports:
            if before := self._before(report):
                _add_rates(rates, before, report, interval_s)
                for name in MEASURED:
                    measured[name] += _measured(report, name) - _measured(before, name)
        self._began_at = at if self._began_at is None else self._began_at
        self._seen = {report["process"]: report for report in reports}
        fresh = [report for report in reports if at - report["at"] < _GONE_S]
        return _figures(rates, measured) | {"open": sum(report["open"] for report in fresh), "processes": len(fresh)}

    def _before(self, report: Report) -> Report | None:
        """What the process had reported until the look before; None where nobody knows."""
        seen = self._seen.get(report["process"])
        if seen and seen["began_at"] == report["began_at"]:
            return seen
        if self._began_at is not None and report["began_at"] >= self._began_at:
            return {"at": report["began_at"], "counts": {}, "measured": {}}
        return None


def _add_rates(rates: dict[str, float], before: Report, now: Report, interval_s: float) -> None:
    passed_s = now["at"] - before["at"]
    if passed_s > _IDLE_LOOKS * interval_s:
        passed_s = interval_s
    for name in rates:
        change = now["counts"].get(name, 0) - before["counts"].get(name, 0)
        if change > 0 and passed_s > 0:
            rates[name] += change / passed_s


def _measured(report: Report, name: str) -> Histogram:
    try:
        return Histogram(report["measured"].get(name, ()))
    except ValueError:  # of another version, with other buckets
        return Histogram()


def _figures(rates: Mapping[str, float], measured: Mapping[str, Histogram]) -> dict[str, Any]:
    asked = rates["hits"] + rates["misses"] + rates["collapsed"]
    figures: dict[str, Any] = {
        "requests_per_s": rates["requests"],
        "errors_per_s": rates["errors"],
        "tokens_per_s": rates["frames"],
        "hit_rate": rates["hits"] / asked if asked else None,
    }
    figures = {name: None if value is None else round(value, 4) for name, value in figures.items()}
    return figures | {name: _percentiles(histogram) for name, histogram in measured.items()}


def _percentiles(histogram: Histogram) -> dict[str, float] | None:
    if not histogram.total:
        return None
    return {name: round(histogram.quantile(share) or 0.0, 1) for name, share in _SHARES.items()}

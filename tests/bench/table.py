"""From what was measured to the table that people read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from figures import MANY_CONNECTIONS, RELAY_CONNECTIONS, Figures


@dataclass(frozen=True)
class Mark:
    """What the gateway has to reach: a word for it, and whether its value and the comparison are good enough."""

    text: str
    reached: Callable[[float, float], bool]


@dataclass(frozen=True)
class Row:
    """A figure, one of its values, and how that of the gateway is compared with that of the bare server."""

    label: str
    figure: str
    value: str
    compare: str = "ratio"
    mark: Mark | None = None


_HITS = Mark("≥ 0.7", lambda _, ratio: ratio >= 0.7)
_FIRST_TOKEN = Mark("≤ bare + 0.5", lambda _, difference: difference <= 0.5)

ROWS = (
    Row("streamed hits/s, 1 connection", "hit_stream_1", "requests_per_s", mark=_HITS),
    Row(f"streamed hits/s, {MANY_CONNECTIONS} connections", f"hit_stream_{MANY_CONNECTIONS}", "requests_per_s", mark=_HITS),
    Row("CPU of a streamed hit, µs", f"hit_stream_{MANY_CONNECTIONS}", "cpu_us_a_request"),
    Row("whole hits/s, 1 connection", "hit_whole_1", "requests_per_s"),
    Row(f"whole hits/s, {MANY_CONNECTIONS} connections", f"hit_whole_{MANY_CONNECTIONS}", "requests_per_s"),
    Row("CPU of a whole hit, µs", f"hit_whole_{MANY_CONNECTIONS}", "cpu_us_a_request"),
    Row("added to the first token of a miss, ms", "first_token", "added_ms", "difference", _FIRST_TOKEN),
    Row("the same, paced upstream, ms", "first_token_paced", "added_ms", "difference", _FIRST_TOKEN),
    Row(f"frames relayed/s, {RELAY_CONNECTIONS} connections", "relay", "frames_per_s"),
    Row("CPU of a frame at full speed, µs", "relay", "cpu_us_a_frame"),
    Row("CPU of a frame of many paced streams, µs", "fresh", "cpu_us_a_frame"),
    Row("memory when idle, MB", "fresh", "idle_mb", mark=Mark("≤ 90 MB", lambda value, _: value <= 90)),
    Row("memory of an open stream, 256 tokens in, KiB", "fresh", "stream_kib"),
    Row("from start to listening, s", "fresh", "start_s", mark=Mark("≤ 1.5 s", lambda value, _: value <= 1.5)),
)


def markdown(measurements: Sequence[Figures]) -> str:
    """The medians of the rounds. Comparisons are made within each round first: the machine's speed drifts between them."""
    lines = ["| figure | gateway | bare | ratio | mark |", "|---|---:|---:|---:|---|"]
    lines += [_line(row, measurements) for row in ROWS]
    return "\n".join(lines)


def _line(row: Row, measurements: Sequence[Figures]) -> str:
    pairs = [pair for figures in measurements if (pair := _pair(row, figures))]
    if not pairs:
        return f"| {row.label} | – | – | – | {row.mark.text if row.mark else ''} |"
    gateway, bare = median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)
    if row.compare == "difference":
        compared = median(pair[0] - pair[1] for pair in pairs)
        shown = f"{compared:+.2f}"
    else:
        compared = median(pair[0] / pair[1] for pair in pairs)
        shown = f"{compared:.2f}"
    mark = f"{row.mark.text}: {'reached' if row.mark.reached(gateway, compared) else 'missed'}" if row.mark else ""
    return f"| {row.label} | {_number(gateway)} | {_number(bare)} | {shown} | {mark} |"


def _pair(row: Row, figures: Figures) -> tuple[float, float] | None:
    """The values of both servers, where this measurement has them."""
    servers = figures.get(row.figure)
    if not servers:
        return None
    gateway, bare = servers["gateway"].get(row.value), servers["bare"].get(row.value)
    return None if gateway is None or bare is None else (gateway, bare)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"

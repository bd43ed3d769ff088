"""From what was measured to the table that people read."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isnan, nan
from statistics import median

from compression import SIZES_TOKENS, figure
from figures import MANY_CONNECTIONS, RELAY_CONNECTIONS, Extent, Figures
from flights import REPLICAS
from outage import FAULTS
from outage import figure as outage_figure
from overload import CASES, LIMITS, ON_THE_PROCESSOR, TIMES
from overload import figure as overloaded
from pace import LATE_MS

NOTHING = "–"


@dataclass(frozen=True)
class Mark:
    """What the gateway has to reach: a word for it, and whether its value and the comparison (or NaN) are good enough."""

    text: str
    reached: Callable[[float, float], bool]


@dataclass(frozen=True)
class Row:
    """A figure, one of its values, and how that of the gateway is compared with that of the bare server, if it has one."""

    label: str
    figure: str
    value: str
    compare: str = "ratio"
    mark: Mark | None = None


_HITS = Mark("≥ 0.7", lambda _, ratio: ratio >= 0.7)
_AT_ONCE = Mark("≤ 10 ms", lambda value, _: value <= 10)
_OUTAGE = Mark("≥ 0.9", lambda _, ratio: ratio >= 0.9)
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
    Row(
        f"upstream calls for {Extent.flood_requests:,} identical requests to {REPLICAS} replicas",
        "flood",
        "calls",
        mark=Mark("= 1", lambda value, _: value == 1),
    ),
    Row("added delay of a local follower, p50, ms", "local", "delay_p50_ms"),
    Row("the same, p99, ms", "local", "delay_p99_ms"),
    Row(
        "added delay of a follower on another replica, p50, ms",
        "remote",
        "delay_p50_ms",
        mark=Mark("≤ 25 ms", lambda value, _: value <= 25),
    ),
    Row("the same, p99, ms", "remote", "delay_p99_ms"),
    Row(f"frames/s into {Extent.readers} readers of one flight", "fan_out", "frames_per_s"),
    Row("CPU of a frame to each of them at full speed, µs", "fan_out", "cpu_us_a_frame"),
    Row("CPU of a frame to each of them, paced, µs", "crowd", "cpu_us_a_frame"),
    Row("memory of a follower, KiB", "crowd", "follower_kib"),
    Row(
        f"lateness of a frame, {Extent.pace_streams:,} paced streams × {Extent.pace_rate:g}/s, by CPU time, p99, ms",
        "pace_alone",
        "late_p99_ms",
        mark=Mark(f"≤ {LATE_MS:g} ms", lambda value, _: value <= LATE_MS),
    ),
    Row("CPU of such a frame, µs", "pace_alone", "cpu_us_a_frame"),
    Row(f"frames/s at which that is {LATE_MS:g} ms", "pace_alone", "limit_frames_per_s"),
    *(
        row
        for name in LIMITS
        for row in (
            Row(f"refusal at {TIMES} times the room, {name}, p50, ms", overloaded(name), "refused_p50_ms", "none"),
            Row("the same, p99, ms", overloaded(name), "refused_p99_ms", "none", _AT_ONCE),
        )
    ),
    Row(
        f"lateness, {Extent.pace_streams:,} paced streams × {Extent.pace_rate:g}/s, by the clock, p50, ms",
        "pace",
        "late_p50_ms",
    ),
    Row("the same, p99, ms", "pace", "late_p99_ms", mark=Mark(f"≤ {LATE_MS:g} ms", lambda value, _: value <= LATE_MS)),
    Row("the same, beside its stream's most punctual frame", "pace", "own_late_p99_ms"),
    Row("error of a gap, p50, %", "pace", "gap_error_p50_percent", mark=Mark("≤ 5 %", lambda value, _: value <= 5)),
    Row("CPU of a paced frame, µs", "pace", "cpu_us_a_frame"),
    Row(f"frames/s at which p99 is {LATE_MS:g} ms late", "pace_limit", "frames_per_s"),
    *(
        row
        for tokens in SIZES_TOKENS
        for row in (
            Row(f"lookup of {tokens:,} frames, compressed (bare: plain), µs", figure(tokens), "lookup_us"),
            Row("the same, 16 at a time", figure(tokens), "many_us"),
            Row("its bytes in Redis", figure(tokens), "stored_bytes"),
        )
    ),
    *(
        row
        for case in CASES
        for row in (
            Row(
                f"gap of 50 ms in running streams, {case.name} (bare: not full), p99, ms",
                overloaded(case.name),
                "gap_p99_ms",
            ),
            *([Row("a hit meanwhile, p99, ms", overloaded(case.name), "hit_p99_ms")] if case.hits else []),
        )
    ),
    *(Row(f"whole streams/s, {name} (bare: not full)", overloaded(name), "served_per_s") for name in ON_THE_PROCESSOR),
    Row("the upstream's answer to nothing meanwhile, p99, ms", overloaded("flights"), "ping_p99_ms"),
    *(
        Row(
            f"misses/s where {fault} (bare: the cache is off)",
            outage_figure(name),
            "requests_per_s",
            mark=None if name == "fine" else _OUTAGE,
        )
        for name, (fault, _) in FAULTS.items()
    ),
)


def markdown(measurements: Sequence[Figures]) -> str:
    """The medians of the rounds. Comparisons are made within each round first: the machine's speed drifts between them."""
    lines = ["| figure | gateway | bare | ratio | mark |", "|---|---:|---:|---:|---|"]
    lines += [_line(row, measurements) for row in ROWS if any(row.figure in figures for figures in measurements)]
    return "\n".join(lines)


def _line(row: Row, measurements: Sequence[Figures]) -> str:
    values = [servers["gateway"].get(row.value) for figures in measurements if (servers := figures.get(row.figure))]
    gateway = _median(values)
    pairs = [pair for figures in measurements if (pair := _pair(row, figures))]
    bare = _median([pair[1] for pair in pairs])
    difference = row.compare == "difference"
    compared = _median([pair[0] - pair[1] if difference else pair[0] / pair[1] for pair in pairs])
    shown = NOTHING if isnan(compared) else f"{compared:+.2f}" if difference else f"{compared:.2f}"
    return f"| {row.label} | {_number(gateway)} | {_number(bare)} | {shown} | {_judged(row.mark, gateway, compared)} |"


def _judged(mark: Mark | None, value: float, compared: float) -> str:
    if mark is None or isnan(value):
        return mark.text if mark else ""
    return f"{mark.text}: {'reached' if mark.reached(value, compared) else 'missed'}"


def _pair(row: Row, figures: Figures) -> tuple[float, float] | None:
    """The values of both servers, where this measurement has them."""
    servers = figures.get(row.figure, {})
    if row.compare == "none" or not {"gateway", "bare"} <= servers.keys():
        return None
    gateway, bare = servers["gateway"].get(row.value), servers["bare"].get(row.value)
    return None if gateway is None or bare is None else (gateway, bare)


def _median(values: Iterable[float | None]) -> float:
    """NaN where there are none."""
    return median([value for value in values if value is not None] or [nan])


def _number(value: float) -> str:
    if isnan(value):
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"

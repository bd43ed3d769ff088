"""How the commands print: tables for people, JSON for programs. Nothing is cut where another program reads it.

Models, tags and texts are other people's: what could steer a terminal is shown as an escape.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from gateway.core import chart

Tell = Callable[[int, int], object]

# Wider than any table, so that nothing is cut or wrapped.
_NO_TERMINAL_WIDTH = 100_000
# What all columns need. On a terminal that has less, the terminal breaks the lines: otherwise whole columns would vanish.
_NARROWEST = 130
_TELL_EVERY_S = 5.0
_LONGEST_EXCERPT = 2000
_LIVE_PAST = 60
_CHART_ROWS, _CHART_WIDTH = 16, 60


# JSON


def document(value: Any) -> None:
    _write(json.dumps(value, indent=2) + "\n")


def lines(values: Iterable[Any]) -> None:
    """One line each."""
    _write("".join(json.dumps(value) + "\n" for value in values))


def raw(content: bytes) -> None:
    """As it is; for a terminal without what could steer it."""
    if sys.stdout.isatty():
        _write(_lines_shown(content.decode("utf-8", "replace").removesuffix("\n")) + "\n")
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)


def say(text: str) -> None:
    """A line or more, of our own words."""
    _write(text + "\n")


def complain(text: str) -> None:
    """A line on standard error, which may have other people's words in it."""
    sys.stderr.write(_shown(text) + "\n")


# Tables


def stats(found: Mapping[str, Any]) -> None:
    since = found["since"]
    _write(f"since {_day(since)}\n\n" if since else "nothing was counted yet\n\n")
    names = ["MODEL", "HITS", "(STALE)", "MISSES", "COLLAPSED", "BYPASSED", "ERRORS", "HIT RATE", "STORED"]
    table = _table(*names, "SAVED TOKENS", "SAVED TIME", "SAVED USD", left=1)
    for row in (*found["models"], found["total"] | {"model": "total"}):
        tokens = row["saved_prompt_tokens"] + row["saved_completion_tokens"]
        counted = [row[name] for name in ("hits", "stale", "misses", "collapsed", "bypassed", "errors")]
        rate = "-" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}"
        dollars = "-" if row["saved_usd"] is None else f"{row['saved_usd']:.4f}"
        _add(table, row["model"], *counted, rate, row["stored"], tokens, _saved_time(row["saved_seconds"]), dollars)
    _print(table)
    total = found["total"]
    if unpriced := total["unpriced_prompt_tokens"] + total["unpriced_completion_tokens"]:
        _write(f"\n{unpriced} of the saved tokens are of models without a price in [[models]]\n")
    if "stored" in found:
        _write("\n")
        _stored(found["stored"])


def _stored(found: Mapping[str, Any]) -> None:
    table = _table("MODEL", "ENTRIES", "SIZE", left=1)
    for row in (*found["models"], found["total"] | {"model": "total"}):
        _add(table, row["model"], row["entries"], _size(row["size_bytes"]))
    _print(table)
    if replaced := found["total"]["replaced"]:
        _write(f"\nbeside them {replaced} that were replaced, and are kept for those who resume them\n")


def entries(found: Iterable[Mapping[str, Any]], *, head: bool) -> None:
    """A page of a listing; all pages have the same columns."""
    table = Table(
        Column("KEY", width=40, overflow="fold"),
        *(Column(name, justify="right", min_width=8, no_wrap=True) for name in ("AGE", "TTL", "SIZE", "FRAMES")),
        Column("STATE", min_width=8),
        Column("MODEL", min_width=16, overflow="fold"),
        Column("NAMESPACE", min_width=9, overflow="fold"),
        Column("TAGS", overflow="fold"),
        box=None,
        pad_edge=False,
        show_header=head,
    )
    for row in found:
        times = _duration(row["age_s"]), _duration(row["ttl_s"])
        tags = ",".join(row["tags"])
        _add(
            table,
            row["key"],
            *times,
            _size(row["size_bytes"]),
            row["frames"],
            row["state"],
            row["model"],
            row["namespace"],
            tags,
        )
    _print(table)


def entry(found: Mapping[str, Any]) -> None:
    timing = found["timing"]
    facts = {
        "key": found["key"],
        "state": f"{found['state']}, {_duration(found['age_s'])} old, fresh for {_duration(found['ttl_s'])}, "
        f"kept for {_duration(found['life_s'])}",
        "answer": f"{_shown(found['model'])} at {found['upstream']} ({found['api']}), id {_shown(found['id'])}, "
        f"flight {found['flight']}",
        "owner": found["owner"],
        "namespace": found["namespace"],
        "tags": ", ".join(found["tags"]),
        "size": f"{_size(found['size_bytes'])}, stored as {_size(found['stored_bytes'])}; {found['frames']} frames",
        "ended": ", ".join(found["finish_reasons"]),
        "usage": json.dumps(found["usage"]) if found["usage"] else "",
        "timing": _timing(timing),
        "samples": "\n".join(found["samples"]) if len(found["samples"]) > 1 else "",
        "request": _excerpt(found["request"], "--part request"),
        "body": _excerpt(found["body"], "--part body"),
    }
    _facts(facts)


def purge(found: Mapping[str, Any]) -> None:
    done = "would be purged" if found["dry_run"] else "purged"
    _write(f"{found['purged']} {done}, {found['scanned']} looked at\n")
    if found["message"]:
        _write(f"{found['message']}\n")


def explanation(found: Mapping[str, Any]) -> None:
    owners = {"shared": "shared by all callers", "tenant": "this caller's own", "namespace": "shared"}
    facts = {
        "key": found["key"],
        "goes to": f"{_shown(found['model'])} at {found['upstream']}",
        "answers": owners[found["owner"]] + (f", in the namespace {found['namespace']}" if found["namespace"] else ""),
        "canonical": _excerpt(found["canonical"], "--json"),
        "not in the key": _shown(", ".join(found["left_out"])),
        "cached": f"no: {found['why_not']}" if found["why_not"] else "",
        "stored": _found(found),
    }
    if nearest := found["nearest"]:
        facts |= _nearest(nearest)
    _facts(facts)


def _found(found: Mapping[str, Any]) -> str:
    if entry := found["entry"]:
        return f"yes: {entry['state']}, {_duration(entry['age_s'])} old, fresh for {_duration(entry['ttl_s'])}"
    if found["samples"]:
        return "under other samples: " + ", ".join(found["samples"])
    return "no"


def _nearest(nearest: Mapping[str, Any]) -> dict[str, str]:
    about = f"{nearest['key']}, {_duration(nearest['age_s'])} old, of {nearest['compared']} recent ones"
    if not nearest["differences"]:
        return {"nearest": about, "differs in": ", ".join(nearest["differs_in"])}
    first, count = nearest["first"], nearest["differences"]
    at = "" if first["at"] is None else f", from {first['at']} on"
    return {
        "nearest": f"{about}: {count} difference{'s' if count > 1 else ''}",
        "the first": f"{_shown(first['path'])} ({first['kind']}{at})",
        "here": json.dumps(first["ours"], ensure_ascii=False),
        "there": json.dumps(first["theirs"], ensure_ascii=False),
    }


def profile(found: Mapping[str, Any]) -> None:
    """Percentiles by model, how they are distributed, and the configuration that is like them."""
    shares = ("p10", "p50", "p90", "p99")
    names = [f"{what} {share.upper()}" for what in ("TTFT", "GAP") for share in shares]
    table = _table("MODEL", "RECORDINGS", "TIMED", *names, "TOKENS/S", left=1)
    for row in found["models"]:
        times = [_ms_or_none(row[what][share]) for what in ("ttft_us", "gaps_us") for share in shares]
        rate = row["fitted"].get("tokens_per_s")
        _add(table, row["model"], row["recordings"], row["timed"], *times, "-" if rate is None else f"{rate:.1f}")
    _print(table)
    for row in found["models"]:
        _chart(f"{row['model']}: time to the first token", row["ttft_us"]["histogram"])
        _chart(f"{row['model']}: from one token to the next", row["gaps_us"]["histogram"])
    if not found["complete"]:
        _write(f"\na sample: {found['recordings']} of more recordings\n")
    if found["config"]:
        _write(f"\n# A simulated model that behaves alike:\n\n{found['config']}")


def _chart(title: str, histogram: Sequence[chart.Span]) -> None:
    if histogram:
        _write(f"\n{_shown(title)}\n")
    for begin_us, count, bar in chart.rows(histogram, most=_CHART_ROWS, width=_CHART_WIDTH):
        _write(f"{_ms_or_none(begin_us):>12} │{bar}{f' {count}' if count else ''}\n")


_LIVE_TIMES = {
    "TTFT of hits": "ttft_hit_us",
    "TTFT of misses": "ttft_miss_us",
    "TTFT of collapsed": "ttft_collapsed_us",
    "gaps": "gap_us",
    "lateness of replays": "late_us",
}


@contextmanager
def live() -> Iterator[Callable[[Mapping[str, Any]], object]]:
    """Shows figures, again and again: in one place on a terminal, one below the other elsewhere."""
    past: dict[str, deque[float]] = {name: deque(maxlen=_LIVE_PAST) for name in ("requests_per_s", "tokens_per_s")}
    if not sys.stdout.isatty():
        yield lambda figures: _print(_live_table(figures, past))
        return
    with Live(console=Console(file=sys.stdout), auto_refresh=False) as shown:
        yield lambda figures: shown.update(_live_table(figures, past), refresh=True)


def _live_table(figures: Mapping[str, Any], past: Mapping[str, "deque[float]"]) -> Table:
    for name, values in past.items():
        values.append(figures[name])
    hit_rate = "-" if figures["hit_rate"] is None else f"{figures['hit_rate']:.1%}"
    shown = {
        "requests": f"{figures['requests_per_s']:.1f}/s  {chart.spark(past['requests_per_s'])}",
        "tokens": f"{figures['tokens_per_s']:.0f}/s  {chart.spark(past['tokens_per_s'])}",
        "hit rate": hit_rate,
        "errors": f"{figures['errors_per_s']:.1f}/s",
        "open streams": str(figures["open"]),
        "busy processes": str(figures["processes"]),
    }
    for label, name in _LIVE_TIMES.items():
        shown[label] = "  ".join(f"{share} {_ms_or_none(us)}" for share, us in (figures[name] or {}).items()) or "-"
    table = Table(Column(no_wrap=True, style="bold"), Column(no_wrap=True), box=None, pad_edge=False, show_header=False)
    for label, value in shown.items():
        table.add_row(label, Text(value))
    return table


# Progress and questions


@contextmanager
def progress(scanned: str, purged: str | None) -> Iterator[Tell]:
    """Shows on standard error how far something is: a bar on a terminal, now and then a line elsewhere."""

    def text(looked_at: int, gone: int) -> str:
        return f"{looked_at} {scanned}" + (f", {gone} {purged}" if purged else "")

    if not sys.stderr.isatty():
        with _said(text) as tell:
            yield tell
        return
    columns = SpinnerColumn(), BarColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("asking", total=None)
        yield lambda looked_at, gone: bar.update(task, description=text(looked_at, gone))


@contextmanager
def warming(total: int, done: int) -> Iterator[Callable[[int, Mapping[str, int]], None]]:
    """Shows how many of ``total`` requests are done, of which ``done`` were before, and how they ended."""
    began_s = time.monotonic()

    def text(now_done: int, counts: Mapping[str, int]) -> str:
        per_s = (now_done - done) / max(time.monotonic() - began_s, 0.001)
        told = ", ".join(f"{counts.get(name, 0)} {name}" for name in ("hits", "misses", "errors"))
        return f"{now_done}/{total}, {per_s:.1f}/s, {told}"

    if not sys.stderr.isatty():
        latest = [done, {}]
        with _said(lambda *_: text(*latest)) as say_now:  # type: ignore[arg-type]

            def say(now_done: int, counts: Mapping[str, int]) -> None:
                latest[:] = [now_done, counts]
                say_now(0, 0)

            yield say
        return
    columns = BarColumn(), TextColumn("{task.description}", markup=False), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda now_done, counts: bar.update(task, completed=now_done, description=text(now_done, counts))


def warmed(found: Mapping[str, Any]) -> None:
    reasons = ", ".join(f"{count} {why}" for why, count in found["unstored"].items())
    facts = {
        "requests": f"{found['requests']}, in {_saved_time(found['seconds'])}",
        "hits": str(found["hits"]),
        "misses": str(found["misses"]),
        "not stored": reasons,
        "retries": str(found["retries"] or ""),
        "errors": f"{found['errors']}, in {found['failures']}" if found["errors"] else "0",
    }
    _facts(facts)


@contextmanager
def _said(text: Callable[[int, int], str]) -> Iterator[Tell]:
    last_s = time.monotonic()

    def tell(looked_at: int, gone: int) -> None:
        nonlocal last_s
        if (now_s := time.monotonic()) - last_s >= _TELL_EVERY_S:
            last_s = now_s
            sys.stderr.write(text(looked_at, gone) + "\n")

    yield tell


def confirmed(question: str) -> bool:
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# Small things


def _table(*names: str, left: int) -> Table:
    """The first ``left`` columns hold words, the others numbers."""
    columns = [
        Column(name, justify="left" if place < left else "right", overflow="fold", no_wrap=place >= left)
        for place, name in enumerate(names)
    ]
    return Table(*columns, box=None, pad_edge=False)


def _add(table: Table, *values: object) -> None:
    table.add_row(*(Text(_shown(str(value))) for value in values))


def _facts(facts: Mapping[str, str]) -> None:
    """Names and values, in lines of their own; what there is nothing to say of is left out."""
    table = Table(Column(no_wrap=True, style="bold"), Column(overflow="fold"), box=None, pad_edge=False, show_header=False)
    for name, value in facts.items():
        if value:
            table.add_row(name, Text(_lines_shown(value)))
    _print(table, narrowest=0)


def _print(table: RenderableType, *, narrowest: int = _NARROWEST) -> None:
    width = max(Console(file=sys.stdout).width, narrowest) if sys.stdout.isatty() else _NO_TERMINAL_WIDTH
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    _write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


def _shown(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _lines_shown(text: str) -> str:
    return "\n".join(map(_shown, text.split("\n")))


def _excerpt(value: Any, whole: str) -> str:
    """``whole`` is the option that shows all of it."""
    if value is None:
        return ""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if not sys.stdout.isatty() or len(text) <= _LONGEST_EXCERPT:
        return text
    return f"{text[:_LONGEST_EXCERPT]} ... (see {whole})"


def _timing(timing: Mapping[str, Any]) -> str:
    if timing["ttft_us"] is None:
        return ""
    text = f"first frame after {_ms(timing['ttft_us'])}, all after {_ms(timing['duration_us'])}"
    gaps = ", ".join(f"{name} {_ms(gap)}" for name, gap in timing["gaps_us"].items())
    return f"{text}; between frames {gaps}" if gaps else text


def _ms(us: int) -> str:
    return f"{us / 1000:.1f} ms"


def _ms_or_none(us: float | None) -> str:
    return "-" if us is None else f"{us / 1000:.2f} ms" if us < 10_000 else f"{us / 1000:.0f} ms"


def _day(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _duration(seconds: float | None) -> str:
    """In the two greatest units that say something; None has no end."""
    if seconds is None:
        return "ever"
    sign, left = ("-" if seconds < 0 else ""), int(abs(seconds))
    if left < 60:
        return f"{sign}{left}s"
    for unit, size, smaller, less in (("d", 86_400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if left >= size:
            rest = left % size // less
            return f"{sign}{left // size}{unit}" + (f"{rest}{smaller}" if rest else "")
    return ""


def _saved_time(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 60 else _duration(seconds)


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            break
        size_bytes /= 1024
    return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"

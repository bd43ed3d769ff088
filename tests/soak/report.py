"""The report: as a value for machines, and as tables for people."""

from dataclasses import asdict
from typing import Any

from journal import Journal
from leftovers import Held, Left
from rich.console import Console
from rich.table import Table


def report(journal: Journal, before: Left, after: Left, grown: list[str], about: dict[str, Any]) -> dict[str, Any]:
    """All that a run has shown."""
    return {
        "run": about,
        "passed": not journal.violations,
        "requests": {f"{kind}: {became}": count for (kind, became), count in sorted(journal.outcomes.items())},
        "answers_by_cache_status": dict(journal.served.most_common()),
        "faults_injected": dict(sorted(journal.injected.items())),
        "errors_excused": {f"{code} ← {fault}": count for (code, fault), count in journal.excused.most_common()},
        "checks": dict(sorted(journal.checks.items())),
        "violations": dict(journal.violations),
        "details": journal.details,
        "left_over": {
            "grown": grown,
            "keys": after.keys,
            "calls": after.calls,
            "replicas": {name: _both(before.replicas.get(name), held) for name, held in after.replicas.items()},
        },
    }


def _both(before: Held | None, after: Held) -> dict[str, Any]:
    return {"before": _brief(before) if before else None, "after": _brief(after)}


def _brief(held: Held) -> dict[str, Any]:
    told = asdict(held)
    return {**told, "tasks": sum(held.tasks.values()), "kinds": held.transient}


def show(told: dict[str, Any], console: Console) -> None:
    """The same for people."""
    for title in ("requests", "answers_by_cache_status", "faults_injected", "errors_excused", "checks", "violations"):
        table = Table(title.replace("_", " "), "count", title_justify="left", min_width=60)
        for name, count in told[title].items():
            table.add_row(str(name), f"{count:,}")
        if told[title] or title == "violations":
            console.print(table)
    _show_left(told["left_over"], console)
    for line in told["details"]:
        console.print(f"- {line}", markup=False, highlight=False)
    run = told["run"]
    verdict = "all invariants hold" if told["passed"] else "VIOLATED: see above"
    console.print(f"{run['requests']:,} requests in {run['minutes']:.1f} min, seed {run['seed']}: {verdict}", markup=False)


def _show_left(left: dict[str, Any], console: Console) -> None:
    names = (
        "tasks", "objects", "blocks", "in_use_mb", "resident_mb",
        "callers", "half_closed", "store", "upstreams", "descriptors",
    )  # fmt: skip
    table = Table("left over: before → after", *left["replicas"])
    for name in names:
        both = [((replica["before"] or {}).get(name, "–"), replica["after"][name]) for replica in left["replicas"].values()]
        table.add_row(name, *[f"{before} → {after}" for before, after in both])
    console.print(table)
    console.print(f"keys in Redis that should be gone: {len(left['keys'])}; calls still running: {left['calls']}")

"""Rates: what has happened between two looks, whoever reports when, comes, goes or begins anew."""

import pytest

from gateway.core.histogram import Histogram
from gateway.core.rates import Watch


def report(process="a", at=100.0, began_at=0.0, open_=0, measured=None, **counts):
    return {
        "process": process,
        "at": at,
        "began_at": began_at,
        "open": open_,
        "counts": counts,
        "measured": {name: pairs_of(values) for name, values in (measured or {}).items()},
    }


def pairs_of(values):
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram.pairs()


def watched(*looks):
    """What is told at the last look; each is a list of reports, two seconds after the one before."""
    watch = Watch()
    for number, reports in enumerate(looks):
        figures = watch.look(reports, 100.0 + 2 * number, 2.0 if number else 0.0)
    return figures


def test_rates_are_what_was_counted_in_the_time_between():
    figures = watched(
        [report(requests=10, hits=5, frames=100)],
        [report(at=102.0, requests=30, errors=1, hits=20, misses=4, collapsed=1, frames=500)],
    )
    assert (figures["requests_per_s"], figures["errors_per_s"], figures["tokens_per_s"]) == (10, 0.5, 200)
    assert figures["hit_rate"] == 0.75


def test_the_first_look_tells_what_is_open_and_nothing_else():
    figures = watched([report(open_=7, requests=1000), report("b", open_=2), report("gone", at=90.0, open_=9)])
    assert (figures["open"], figures["processes"], figures["requests_per_s"], figures["hit_rate"]) == (9, 2, 0, None)


def test_processes_add_up_each_by_the_time_between_its_own_reports():
    figures = watched(
        [report(requests=0), report("b", at=99.5, requests=100)],
        [report(at=102.0, requests=20), report("b", at=101.0, requests=130)],
    )
    assert figures["requests_per_s"] == 10 + 20


def test_what_an_idle_process_tells_at_last_has_happened_since_the_look_before():
    figures = watched([report(at=10.0, requests=5)], [report(at=102.0, requests=25)])
    assert figures["requests_per_s"] == 10


def test_a_process_that_has_begun_since_counts_from_its_beginning():
    figures = watched([], [report(at=102.0, began_at=101.0, requests=5)])
    assert figures["requests_per_s"] == 5


def test_a_process_that_was_there_before_and_not_heard_of_counts_from_the_next_look():
    assert watched([], [report(at=102.0, requests=500)])["requests_per_s"] == 0
    assert watched([], [report(at=102.0, requests=500)], [report(at=104.0, requests=510)])["requests_per_s"] == 5


def test_a_process_that_begins_anew_under_its_name_takes_nothing_away():
    figures = watched([report(requests=500)], [report(at=102.0, began_at=101.0, requests=3)])
    assert figures["requests_per_s"] == 3


def test_percentiles_are_of_what_came_since():
    slow, fast = [1_000_000] * 50, [1000] * 100
    figures = watched(
        [report(measured={"ttft_miss_us": slow, "gap_us": slow})],
        [
            report(at=102.0, measured={"ttft_miss_us": slow + fast, "gap_us": slow}),
            report("b", at=102.0, began_at=101.0, measured={"ttft_miss_us": [2000] * 2}),
        ],
    )
    assert figures["ttft_miss_us"]["p50"] == pytest.approx(1000, rel=1 / 32)
    assert figures["ttft_miss_us"]["p99"] == pytest.approx(2000, rel=1 / 32)
    assert figures["gap_us"] is None


def test_buckets_of_another_version_are_passed_over():
    odd = report(at=102.0, requests=3) | {"measured": {"gap_us": [[99_999, 1]]}}
    figures = watched([report(requests=1)], [odd])
    assert (figures["requests_per_s"], figures["gap_us"]) == (1, None)


def test_figures_that_only_a_later_version_has_are_left_out():
    figures = watched([report(requests=1, spins=1)], [report(at=102.0, requests=3, spins=9, measured={"spin_us": [1]})])
    assert figures["requests_per_s"] == 1
    assert not any("spin" in name for name in figures)

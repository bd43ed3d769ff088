"""A chart: all that was counted is in it, and bars are as long as they are many."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.chart import rows
from gateway.core.histogram import Histogram


def spans_of(values):
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return list(histogram.spans())


@given(values=st.lists(st.integers(0, 2**42), min_size=1), most=st.integers(1, 20), width=st.integers(1, 80))
def test_a_chart_has_all_in_few_rows_of_bars_that_fit(values, most, width):
    chart = rows(spans_of(values), most=most, width=width)
    assert 1 <= len(chart) <= most
    assert sum(count for _, count, _ in chart) == len(values)
    begins = [begin for begin, _, _ in chart]
    assert begins == sorted(begins)
    assert max(len(bar) for _, _, bar in chart) == width
    assert all(bool(bar) == bool(count) for _, count, bar in chart)
    by_count = sorted((count, len(bar)) for _, count, bar in chart)
    assert [length for _, length in by_count] == sorted(length for _, length in by_count)


def test_of_nothing_there_is_no_chart():
    assert rows([], most=5, width=5) == []


def test_bars_are_as_long_as_they_are_many():
    chart = rows(spans_of([100] * 8 + [10_000] * 4 + [1_000_000]), most=3, width=16)
    assert [(count, bar) for _, count, bar in chart] == [(8, "█" * 16), (4, "█" * 8), (1, "█" * 2)]

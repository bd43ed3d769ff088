"""A histogram: what is read from it is near what was put in, at any size, and it can be added to and taken from another."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.histogram import Histogram, bounds

numbers = st.one_of(st.integers(0, 200), st.integers(0, 10**7), st.integers(0, 2**42 - 1))
lists = st.lists(numbers, max_size=50)


def of(values):
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


@given(number=numbers)
def test_a_number_is_within_the_bounds_of_its_bucket_and_those_are_narrow(number):
    [(bucket, count)] = of([number]).pairs()
    low, high = bounds(bucket)
    assert count == 1
    assert low <= number < high
    assert high - low <= max(1, number / 32)


def test_buckets_leave_no_gap():
    for bucket in range(1215):
        assert bounds(bucket)[1] == bounds(bucket + 1)[0]


@given(values=st.lists(numbers, min_size=1, max_size=50), share=st.floats(0, 1))
def test_a_quantile_is_as_near_as_a_bucket_is_wide(values, share):
    exact = sorted(values)[max(1, math.ceil(share * len(values))) - 1]
    assert abs(of(values).quantile(share) - exact) <= max(1, exact / 32)


@given(values=st.lists(numbers, min_size=1, max_size=50))
def test_greater_shares_have_no_smaller_quantiles(values):
    quantiles = [of(values).quantile(share / 20) for share in range(21)]
    assert quantiles == sorted(quantiles)


def test_of_nothing_there_is_no_quantile():
    assert Histogram().quantile(0.5) is None
    assert Histogram().pairs() == []


@given(one=lists, other=lists)
def test_what_was_added_can_be_taken_away_again(one, other):
    both = of(one)
    both += of(other)
    assert both == of(one + other)
    assert both - of(one) == of(other)
    assert both.total == len(one + other)


@given(values=lists)
def test_after_a_restart_all_that_is_there_is_new(values):
    histogram = of(values)
    assert histogram - of([*values, 77]) == histogram


@given(values=lists)
def test_the_pairs_make_it_again(values):
    assert Histogram(of(values).pairs()) == of(values)


@pytest.mark.parametrize("bucket", [-1, 1216])
def test_a_bucket_that_is_none_is_refused(bucket):
    with pytest.raises(ValueError, match="no bucket"):
        Histogram([(bucket, 1)])


def test_what_is_out_of_bounds_is_counted_at_the_bounds():
    assert of([-5]) == of([0])
    assert of([2**60]) == of([2**42 - 1])

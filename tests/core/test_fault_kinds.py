import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.faults import LIKELY_FRAMES, Fault, drawn, total_rate

FAULTS = (Fault("cut", rate=0.2), Fault("status", rate=0.1), Fault("stall", rate=0.0, after=3))


def test_each_befalls_its_share():
    kinds = Counter(fault and fault.kind for seed in range(5000) for fault in [drawn(FAULTS, random.Random(seed))])
    assert kinds["cut"] / 5000 == pytest.approx(0.2, rel=0.15)
    assert kinds["status"] / 5000 == pytest.approx(0.1, rel=0.15)
    assert kinds["stall"] == 0
    assert kinds[None] / 5000 == pytest.approx(0.7, rel=0.05)
    assert total_rate(FAULTS) == pytest.approx(0.3)


@given(st.integers())
def test_the_same_seed_draws_the_same(seed):
    assert drawn(FAULTS, random.Random(seed)) == drawn(FAULTS, random.Random(seed))


def test_where_nobody_says_when_it_comes_that_is_drawn_and_else_not():
    places = {drawn([Fault("cut")], random.Random(seed)).after for seed in range(200)}
    assert places == set(range(LIKELY_FRAMES))
    assert {drawn([Fault("cut", after=40)], random.Random(seed)).after for seed in range(20)} == {40}


def test_none_is_drawn_of_none():
    assert drawn([], random.Random(0)) is None


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault("status"), "status=503"),
        (Fault("status", status=429, retry_after_s=2, after=3), "status=429;retry_after=2"),
        (Fault("slow", seconds=2.5), "slow=2.5"),
        (Fault("stall", seconds=2, after=0), "stall=2;after=0"),
        (Fault("cut", after=3, retry_after_s=1), "cut;after=3"),
        (Fault("error"), "error"),
        (Fault("malformed", after=1), "malformed;after=1"),
    ],
)
def test_a_fault_is_told_as_a_structured_field(fault, text):
    assert str(fault) == text

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.pacing import INSTANT, Pace, due_by

ARRIVALS = st.lists(st.integers(0, 10**9), max_size=20)
PACES = st.builds(
    Pace,
    kind=st.sampled_from(["instant", "recorded", "fixed"]),
    speed=st.floats(0.01, 100),
    frames_per_s=st.floats(0.1, 10_000),
)


@given(PACES, ARRIVALS)
def test_each_frame_has_a_due_time_and_none_is_due_before_the_one_before(pace, at_us):
    schedule = pace.schedule(at_us)
    assert len(schedule) == len(at_us)
    assert schedule == sorted(schedule)
    assert all(due >= 0 for due in schedule)


@given(PACES, ARRIVALS, st.lists(st.floats(0, 1e6), max_size=8))
def test_a_paced_reply_drops_doubles_and_reorders_nothing(pace, at_us, looks):
    schedule = pace.schedule(at_us)
    sent = []
    for elapsed_s in [*sorted(looks), max(schedule, default=0.0)]:
        end = due_by(schedule, len(sent), elapsed_s)
        sent += range(len(sent), end)
        assert all(schedule[place] <= elapsed_s for place in sent)
        assert all(due > elapsed_s for due in schedule[end : end + 1])
    assert sent == list(range(len(at_us)))


def test_instantly_means_at_once():
    assert INSTANT.schedule([5, 10, 2]) == [0.0, 0.0, 0.0]
    assert due_by(INSTANT.schedule([5, 10, 2]), 0, 0.0) == 3


@given(st.floats(0.01, 100))
def test_recorded_means_when_it_came_by_the_speed(speed):
    assert Pace("recorded", speed).schedule([0, 500_000, 2_000_000]) == pytest.approx([0.0, 0.5 / speed, 2.0 / speed])


def test_arrivals_that_go_back_are_due_with_the_latest_before_them():
    assert Pace("recorded").schedule([1_000_000, 500_000, 2_000_000]) == [1.0, 1.0, 2.0]


def test_a_fixed_rate_is_kept_from_the_first_frame_on():
    assert Pace("fixed", frames_per_s=10).schedule([0, 0, 0]) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("start", "elapsed_s", "end"),
    [(0, 0.0, 0), (0, 0.5, 1), (0, 1.0, 3), (1, 0.0, 1), (1, 1.5, 3), (3, 9.0, 4), (4, 9.0, 4)],
)
def test_what_is_due_together_leaves_together(start, elapsed_s, end):
    assert due_by([0.5, 1.0, 1.0, 2.0], start, elapsed_s) == end

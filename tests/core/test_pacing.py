import random
from itertools import pairwise
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.pacing import INSTANT, Pace, due_by, speaks, tokens_said

ARRIVALS = st.lists(st.integers(0, 10**9), max_size=20)
PACES = st.builds(
    Pace,
    kind=st.sampled_from(["instant", "recorded", "fixed", "drawn"]),
    speed=st.floats(0.01, 100),
    tokens_per_s=st.floats(0.1, 10_000),
    ttft_s=st.floats(0, 100),
    ttft_sd_s=st.sampled_from([0, 0.001, 50]),
    itl_s=st.floats(0, 1),
    itl_sd_s=st.sampled_from([0, 0.001, 50]),
    jitter=st.floats(0, 1),
    max_gap_s=st.sampled_from([0, 0.5, 100]),
)


def draw(seed=0):
    return random.Random(seed)


@st.composite
def schedules(draw_from):
    """A pace, when frames came, which of them say something, and when they are due."""
    pace, at_us = draw_from(PACES), draw_from(ARRIVALS)
    speaking = draw_from(st.lists(st.booleans(), min_size=len(at_us), max_size=len(at_us)))
    return pace, at_us, pace.schedule(at_us, draw(), speaking, draw_from(st.floats(0.1, 10)))


@given(schedules())
def test_each_frame_has_a_due_time_and_none_is_due_before_the_one_before(made):
    _, at_us, schedule = made
    assert len(schedule) == len(at_us)
    assert schedule == sorted(schedule)
    assert all(due >= 0 for due in schedule)


@given(schedules())
def test_no_gap_is_longer_than_it_may_be(made):
    pace, _, schedule = made
    if pace.max_gap_s:
        assert all(later - earlier <= pace.max_gap_s * 1.000001 for earlier, later in pairwise([0.0, *schedule]))


@given(schedules(), st.lists(st.floats(0, 1e6), max_size=8))
def test_a_paced_reply_drops_doubles_and_reorders_nothing(made, looks):
    _, at_us, schedule = made
    sent = []
    for elapsed_s in [*sorted(looks), max(schedule, default=0.0)]:
        end = due_by(schedule, len(sent), elapsed_s)
        sent += range(len(sent), end)
        assert all(schedule[place] <= elapsed_s for place in sent)
        assert all(due > elapsed_s for due in schedule[end : end + 1])
    if max([*looks, 0.0]) <= max(schedule, default=0.0):
        assert sent == list(range(len(at_us)))


@given(PACES, ARRIVALS, st.integers())
def test_a_schedule_can_be_had_again_from_its_seed(pace, at_us, seed):
    assert pace.schedule(at_us, draw(seed)) == pace.schedule(at_us, draw(seed))


def test_another_seed_draws_another_schedule():
    pace = Pace("drawn", ttft_sd_s=0.1)
    assert pace.schedule([0], draw(1)) != pace.schedule([0], draw(2))


def test_instantly_means_at_once():
    assert INSTANT.schedule([5, 10, 2], draw()) == [0.0, 0.0, 0.0]
    assert due_by(INSTANT.schedule([5, 10, 2], draw()), 0, 0.0) == 3


@given(st.floats(0.01, 100))
def test_recorded_means_when_it_came_by_the_speed(speed):
    schedule = Pace("recorded", speed).schedule([0, 500_000, 2_000_000], draw())
    assert schedule == pytest.approx([0.0, 0.5 / speed, 2.0 / speed])


def test_arrivals_that_go_back_are_due_with_the_latest_before_them():
    assert Pace("recorded").schedule([1_000_000, 500_000, 2_000_000], draw()) == [1.0, 1.0, 2.0]


def test_a_fixed_rate_is_that_of_tokens_and_what_says_nothing_is_due_with_its_neighbour():
    pace = Pace("fixed", tokens_per_s=10)
    assert pace.schedule([0, 0, 0], draw()) == pytest.approx([0.1, 0.2, 0.3])
    role_a_b_c_end_usage = [False, True, True, True, False, False]
    assert pace.schedule([0] * 6, draw(), role_a_b_c_end_usage) == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.3, 0.3])


def test_frames_of_several_tokens_take_the_time_of_several():
    assert Pace("fixed", tokens_per_s=10).schedule([0] * 3, draw(), [True] * 3, 4.0) == pytest.approx([0.1, 0.5, 0.9])


def test_an_answer_that_says_nothing_is_due_with_the_first_token():
    assert Pace("drawn", ttft_s=0.5).schedule([0, 0], draw(), [False, False]) == [0.5, 0.5]


def test_what_is_drawn_has_the_mean_and_the_deviation_that_were_asked_for():
    pace = Pace("drawn", ttft_s=1.0, ttft_sd_s=0.5, itl_s=0.02, itl_sd_s=0.01)
    runs = [pace.schedule([0] * 50, draw(seed)) for seed in range(400)]
    firsts, gaps = [run[0] for run in runs], [later - earlier for run in runs for earlier, later in pairwise(run)]
    assert (fmean(firsts), stdev(firsts)) == pytest.approx((1.0, 0.5), rel=0.1)
    assert (fmean(gaps), stdev(gaps)) == pytest.approx((0.02, 0.01), rel=0.05)
    assert min(gaps) >= 0


def test_jitter_spreads_gaps_evenly_and_keeps_their_mean():
    at_us = [place * 100_000 for place in range(1, 2001)]
    gaps = [later - earlier for earlier, later in pairwise(Pace("recorded", jitter=0.5).schedule(at_us, draw()))]
    assert fmean(gaps) == pytest.approx(0.1, rel=0.05)
    assert 0.05 <= min(gaps) < 0.055
    assert 0.145 < max(gaps) <= 0.15


def test_a_wish_stands_in_for_what_is_configured_and_leaves_the_rest():
    pace = Pace("recorded", speed=2.0, jitter=0.1)
    assert pace.with_wish({"speed": 4.0}) == Pace("recorded", speed=4.0, jitter=0.1)
    assert pace.with_wish({}) is pace


@pytest.mark.parametrize(
    ("pace", "chance"),
    [
        (Pace("recorded"), False), (Pace("drawn"), False), (Pace("fixed", itl_sd_s=1), False),
        (Pace("drawn", itl_sd_s=0.01), True), (Pace("drawn", ttft_sd_s=0.1), True), (Pace("recorded", jitter=0.1), True),
    ],
)  # fmt: skip
def test_only_where_there_is_chance_something_is_drawn(pace, chance):
    drawn = [pace.schedule([10, 20], draw(seed)) for seed in range(3)]
    assert (drawn[0] != drawn[1] or drawn[1] != drawn[2]) is pace.draws is chance


@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        ({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, False),
        ({"choices": [{"delta": {"content": "a"}}]}, True),
        ({"choices": [{"delta": {"reasoning_content": "a"}}]}, True),
        ({"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}, True),
        ({"choices": [{"delta": {}, "finish_reason": "stop"}]}, False),
        ({"choices": [{"delta": None}, {"delta": {"content": "a"}}]}, True),
        ({"choices": [{"text": "a"}]}, True),
        ({"choices": [{"text": "", "finish_reason": "stop"}]}, False),
        ({"choices": [], "usage": {}}, False),
        ({"choices": None}, False),
        ({"choices": ["a"]}, False),
        ({}, False),
    ],
)
def test_a_chunk_says_something_or_is_only_about_it(chunk, says):
    assert speaks(chunk) is says


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (None, 0),
        ({"completion_tokens": 7}, 7),
        ({"completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 0}}, 7),
        ({"completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 5}}, 0),
        ({"completion_tokens": 7, "completion_tokens_details": None}, 7),
        ({"completion_tokens": "7"}, 0),
    ],
)
def test_tokens_are_counted_where_all_of_them_are_shown(usage, tokens):
    assert tokens_said(usage) == tokens


@pytest.mark.parametrize(
    ("start", "elapsed_s", "end"),
    [(0, 0.0, 0), (0, 0.5, 1), (0, 1.0, 3), (1, 0.0, 1), (1, 1.5, 3), (3, 9.0, 4), (4, 9.0, 4)],
)
def test_what_is_due_together_leaves_together(start, elapsed_s, end):
    assert due_by([0.5, 1.0, 1.0, 2.0], start, elapsed_s) == end

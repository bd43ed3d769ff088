import random
from heapq import heappop, heappush
from itertools import repeat
from statistics import mean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.shedding import Shedding

MAX_LAG_S = 0.005
EVERY_S = 0.005
LAGS = st.floats(0, 1)


def shedding(max_lag_s=MAX_LAG_S):
    made = Shedding()
    made.become(max_lag_s)
    return made


def feed(made, lags, now_s=0.0):
    """A measurement for each, one after the other; tells when it is then."""
    for lag_s in lags:
        now_s += EVERY_S + lag_s
        made.add(lag_s, now_s)
    return now_s


def shares(made):
    return made.share, made.share_of_resumed


# Alone


@given(st.lists(st.floats(0, MAX_LAG_S), max_size=300))
def test_nobody_is_refused_while_the_lag_stays_below(lags):
    made = shedding()
    now_s = 0.0
    for lag_s in lags:
        now_s = feed(made, [lag_s], now_s)
        assert shares(made) == (0, 0)


@given(LAGS, st.integers(2, 50))
def test_one_pause_however_long_refuses_nobody(pause_s, calm):
    made = shedding()
    now_s = 0.0
    for _ in range(5):
        for lag_s in (*repeat(0.001, calm), pause_s):
            now_s = feed(made, [lag_s], now_s)
            assert shares(made) == (0, 0)


@given(st.floats(MAX_LAG_S * 1.01, 1))
def test_more_and_more_are_refused_while_it_stays_above(lag_s):
    made = shedding()
    now_s = feed(made, repeat(lag_s, 2))
    found = []
    for _ in range(200):
        now_s = feed(made, [lag_s], now_s)
        found.append(shares(made))
    assert found[0][0] > 0
    assert found == sorted(found)
    assert found[-1][0] > found[0][0] or found[0][0] == 1


@given(st.lists(LAGS, max_size=400), st.floats(0, MAX_LAG_S / 2))
def test_all_are_let_in_again_soon_after(lags, calm_s):
    made = shedding()
    now_s = feed(made, lags)
    end_s = now_s + 8.0
    while now_s < end_s and any(shares(made)):
        now_s = feed(made, [calm_s], now_s)
    assert shares(made) == (0, 0)
    assert now_s < end_s


@given(st.lists(LAGS, max_size=400))
def test_shares_are_shares_and_those_who_resume_are_refused_only_where_everybody_else_is_or_was_just_now(lags):
    made = shedding()
    refused_all = False
    now_s = 0.0
    for lag_s in lags:
        now_s = feed(made, [lag_s], now_s)
        assert 0 <= made.share_of_resumed <= made.share <= 1 or made.lag_s < MAX_LAG_S
        refused_all |= made.share == 1
        assert refused_all or not made.share_of_resumed


def test_those_who_resume_are_refused_where_it_does_not_help_to_refuse_all_newcomers():
    made = shedding()
    feed(made, repeat(0.1, 100))
    assert made.share == 1
    assert made.share_of_resumed == 1


@given(st.lists(LAGS, max_size=100))
def test_without_a_limit_nothing_is_refused_or_remembered(lags):
    made = shedding()
    feed(made, lags)
    made.become(0.0)
    feed(made, lags)
    assert (*shares(made), made.lag_s) == (0, 0, 0)


def test_a_higher_limit_lets_more_in_and_forgets_nothing():
    made = shedding()
    now_s = feed(made, repeat(0.008, 30))
    before = made.share
    made.become(0.1)
    feed(made, repeat(0.008, 3), now_s)
    assert 0 < made.share < before


def test_a_time_without_measurements_counts_for_little():
    made = shedding()
    now_s = feed(made, repeat(0.006, 10))
    before = made.share
    made.add(0.006, now_s + 1000)
    assert made.share < before + 0.05


# With a process


class Process:
    """A model of one: turns of its loop, in each of which all is done that was there when it began.

    A stream is ``stream_s`` long and has a frame every ``gap_s``; what it costs to send one, to begin one and to refuse a
    newcomer is about what it costs the gateway. Frames that are late are sent together, as they are when they wait in a
    socket; so a process that is always late can carry more, at gaps that are as long as it is late.
    """

    gap_s, frame_s, begin_s, refuse_s, turn_s = 0.05, 0.00012, 0.001, 0.00008, 0.0001

    def __init__(self, newcomers_per_s, stream_s=2.0, shedding=None, seed=1):
        self.shedding = shedding or Shedding()
        self.begins_a_turn = 2 if shedding else 32
        self.draw = random.Random(seed)
        self.newcomers_per_s, self.stream_s = newcomers_per_s, stream_s
        self.now_s = 0.0
        self.comes_s = 0.0
        self.waiting, self.streams = [], []
        self.gaps_s, self.refusals_s, self.lags_s, self.shares = [], [], [], []
        self.ended = self.begun = 0
        self.idle_s = 0.0
        self.probe_due_s, self.probe_runs = EVERY_S, False
        self.waited_for_since_s = None

    def run(self, seconds):
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.turn()
        return self

    def turn(self):
        work_s = self.send() + self.take()
        self.measure()
        if work_s or self.probe_runs:
            self.now_s += work_s + self.turn_s
            return
        due_s = min([self.comes_s, self.probe_due_s, *(stream[0] for stream in self.streams[:1])])
        self.idle_s += max(0.0, due_s - self.now_s)
        self.now_s = max(self.now_s, due_s)

    def send(self):
        work_s = 0.0
        while self.streams and self.streams[0][0] <= self.now_s:
            due_s, end_s, last_s = heappop(self.streams)
            work_s += self.frame_s
            sent_s = self.now_s + work_s
            self.gaps_s.append(sent_s - last_s)
            if sent_s >= end_s:
                self.ended += 1
                continue
            while due_s <= self.now_s:
                due_s += self.gap_s
            heappush(self.streams, (due_s, end_s, sent_s))
        return work_s

    def take(self):
        while self.comes_s <= self.now_s:
            self.waiting.append(self.comes_s)
            self.comes_s += self.draw.expovariate(self.newcomers_per_s)
        work_s, begun = 0.0, 0
        while self.waiting and begun < self.begins_a_turn:
            came_s = self.waiting.pop(0)
            if self.draw.random() < self.shedding.share:
                work_s += self.refuse_s
                self.refusals_s.append(self.now_s + work_s - came_s)
                continue
            begun += 1
            work_s += self.begin_s
            began_s = self.now_s + work_s + self.gap_s
            heappush(self.streams, (began_s, began_s + self.stream_s, began_s))
        self.begun += begun
        if not self.waiting:
            self.waited_for_since_s = None
        elif self.waited_for_since_s is None:
            self.waited_for_since_s = self.now_s
        return work_s

    def measure(self):
        """As `Probe` does: from when a timer is due until there has been one more turn; or since when newcomers wait."""
        if self.probe_runs:
            since_s = self.probe_due_s if self.waited_for_since_s is None else self.waited_for_since_s
            self.lags_s.append(self.now_s - min(since_s, self.probe_due_s))
            self.shedding.add(self.lags_s[-1], self.now_s)
            self.shares.append(self.shedding.share)
            self.probe_runs, self.probe_due_s = False, self.now_s + EVERY_S
        elif self.probe_due_s <= self.now_s:
            self.probe_runs = True


CARRIES_PER_S = 150
"""How many newcomers a second such a process serves in time: 300 streams of 2 s, each with 20 frames a second."""


def percentile(values, percent):
    return sorted(values)[len(values) * percent // 100]


def test_a_process_that_has_less_to_do_than_it_carries_refuses_next_to_nobody():
    process = Process(CARRIES_PER_S * 0.8, shedding=shedding()).run(20)
    assert len(process.refusals_s) < 0.005 * process.begun


@pytest.mark.parametrize("times", [3, 10])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_flood_leaves_running_streams_alone_and_is_told_so_at_once(times, seed):
    process = Process(CARRIES_PER_S * times, shedding=shedding(), seed=seed).run(20)
    unbounded = Process(CARRIES_PER_S * times, seed=seed).run(5)
    assert percentile(process.gaps_s, 99) < 1.2 * Process.gap_s < percentile(unbounded.gaps_s, 99)
    assert median(process.refusals_s) < 2 * MAX_LAG_S
    assert percentile(process.refusals_s, 99) < 10 * MAX_LAG_S
    assert mean(unbounded.lags_s[10:]) > 10 * mean(process.lags_s)


@pytest.mark.parametrize("times", [3, 10])
def test_a_flood_does_not_keep_the_process_from_serving(times):
    process = Process(CARRIES_PER_S * times, shedding=shedding()).run(20)
    cost_of_refusals = len(process.refusals_s) * Process.refuse_s / 20
    assert process.begun / 20 > (0.95 - cost_of_refusals) * CARRIES_PER_S
    assert process.idle_s < 0.1 * 20


def test_short_answers_are_shed_by_a_share_and_not_all_or_none():
    process = Process(3000, stream_s=0.05, shedding=shedding()).run(10)
    later = process.shares[len(process.shares) // 2 :]
    assert 0.3 < mean(later) < 0.95
    assert process.idle_s < 0.1 * 10


def test_when_the_flood_is_over_everybody_is_let_in_again():
    process = Process(CARRIES_PER_S * 5, shedding=shedding()).run(5)
    process.newcomers_per_s = CARRIES_PER_S / 2
    process.run(5)
    refused = len(process.refusals_s)
    process.run(10)
    assert len(process.refusals_s) == refused

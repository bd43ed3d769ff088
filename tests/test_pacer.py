"""The one timer that calls all paced readers: in the order of their times, none early, and nobody after it is forgotten."""

import asyncio
import random

import pytest
from fakes import FakeClock

from gateway.app import SystemClock
from gateway.pacer import Pacer


class Called:
    """Wants to be called at certain times, and notes when it was."""

    def __init__(self, *due_s, log=None):
        self.due_s = list(due_s)
        self.at_s = []
        self.log = [] if log is None else log

    def tick(self, now_s):
        self.at_s.append(now_s)
        self.log.append(self.due_s.pop(0))
        return self.due_s[0] if self.due_s else None


@pytest.fixture
def clock():
    clock = FakeClock()
    clock.time_s = 0.0
    return clock


async def test_all_are_called_in_the_order_of_their_times(clock):
    pacer, draw, log = Pacer(clock), random.Random(1), []
    everybody = [Called(*sorted(draw.random() for _ in range(20)), log=log) for _ in range(30)]
    for each in everybody:
        pacer.call(each, each.due_s[0])
    while pacer._heap:
        clock.time_s = pacer._heap[0][0]
        pacer._ring()
    assert len(log) == 600
    assert log == sorted(log)


async def test_nobody_is_called_early(clock):
    pacer, who = Pacer(clock), Called(1.0)
    pacer.call(who, 1.0)
    clock.time_s = 0.999
    pacer._ring()
    assert who.at_s == []
    clock.time_s = 1.0
    pacer._ring()
    assert who.at_s == [1.0]


async def test_who_was_forgotten_is_not_called(clock):
    pacer, who, other = Pacer(clock), Called(1.0), Called(1.0)
    turn = pacer.call(who, 1.0)
    pacer.call(other, 1.0)
    pacer.forget(turn)
    clock.time_s = 2.0
    pacer._ring()
    assert (who.at_s, other.at_s) == ([], [2.0])
    assert pacer._heap == []


async def test_a_crowd_that_is_due_together_leaves_the_loop_its_turns(clock):
    pacer, crowd = Pacer(clock), [Called(1.0) for _ in range(1000)]
    for each in crowd:
        pacer.call(each, 1.0)
    clock.time_s = 1.0
    pacer._ring()
    first = sum(bool(each.at_s) for each in crowd)
    assert 0 < first < 1000
    while pacer._heap:
        await asyncio.sleep(0)
    assert all(each.at_s for each in crowd)


async def test_the_timer_rings_for_whoever_is_first_also_for_one_who_comes_later():
    pacer, clock = Pacer(SystemClock()), SystemClock()
    now_s = clock.monotonic()
    late, soon = Called(now_s + 30.0), Called(now_s + 0.01, now_s + 0.02)
    pacer.forget(pacer.call(late, now_s + 30.0))
    pacer.call(soon, now_s + 0.01)
    async with asyncio.timeout(10):
        while soon.due_s:
            await asyncio.sleep(0.001)
    assert [at_s >= now_s + wait_s for at_s, wait_s in zip(soon.at_s, (0.01, 0.02), strict=True)] == [True, True]

"""Counting: cheap for who counts, one command a second for the store, and nothing lost while it is away."""

import asyncio
import time

import pytest

from gateway import tally as module
from gateway.errors import StoreUnavailable
from gateway.tally import Tally

pytestmark = pytest.mark.usefixtures("no_task_is_left")


class Counters:
    """What a store would have counted."""

    def __init__(self):
        self.commands = []
        self.totals = {}
        self.taken = asyncio.Event()
        self.away = False
        self.gate = None

    async def count(self, counts):
        if self.gate:
            await self.gate.wait()
        if self.away:
            raise StoreUnavailable("away")
        self.commands.append(counts)
        for name, amount in counts.items():
            self.totals[name] = self.totals.get(name, 0) + amount
        self.taken.set()


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(module, "_FLUSH_S", 0.01)


def timers():
    return [handle for handle in asyncio.get_running_loop()._scheduled if not handle.cancelled()]


async def test_what_is_counted_within_the_interval_goes_in_one_command():
    store = Counters()
    tally = Tally(store)
    tally.add("gpt", "hits")
    tally.add("gpt", "hits")
    tally.add("gpt", "saved_seconds", 1.5)
    tally.add("a|b", "misses")
    await store.taken.wait()
    assert store.commands == [{"hits|gpt": 2, "saved_seconds|gpt": 1.5, "misses|a|b": 1}]
    await tally.close()


async def test_no_timer_runs_while_nothing_is_counted():
    before = len(timers())
    store = Counters()
    tally = Tally(store)
    assert len(timers()) == before
    tally.add("gpt", "hits")
    assert len(timers()) == before + 1
    await store.taken.wait()
    assert tally._timer is None
    await tally.close()
    assert len(store.commands) == 1


async def test_counts_are_kept_and_merged_while_the_store_is_away():
    store = Counters()
    store.away = True
    tally = Tally(store)
    for _ in range(3):
        tally.add("gpt", "hits")
        await tally.flush()
    assert not store.commands
    store.away = False
    await store.taken.wait()  # without anything new
    assert store.commands == [{"hits|gpt": 3}]
    await tally.close()


async def test_what_comes_while_the_store_is_slow_goes_with_the_next_command():
    store = Counters()
    store.gate = asyncio.Event()
    tally = Tally(store)
    tally.add("gpt", "hits")
    first = asyncio.create_task(tally.flush())
    second = asyncio.create_task(tally.flush())
    await asyncio.sleep(0)
    tally.add("gpt", "hits", 5)
    store.gate.set()
    await asyncio.gather(first, second)
    assert store.totals == {"hits|gpt": 6}
    assert len(store.commands) == 2
    await tally.close()


async def test_whoever_gives_up_waiting_for_a_flush_loses_nothing():
    store = Counters()
    store.gate = asyncio.Event()
    tally = Tally(store)
    tally.add("gpt", "hits")
    waiting = asyncio.create_task(tally.flush())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    store.gate.set()
    await tally.close()
    assert store.totals == {"hits|gpt": 1}


async def test_too_many_models_and_too_long_names_are_counted_as_other():
    store = Counters()
    tally = Tally(store)
    for number in range(300):
        tally.add(f"model-{number}", "hits")
    tally.add("x" * 1000, "hits")
    tally.add("model-0", "hits")
    await tally.flush()
    assert len(store.totals) == 257
    assert store.totals["hits|other"] == 300 - 256 + 1
    assert store.totals["hits|model-0"] == 2
    tally.add("another", "hits")  # the bound is the process's, not one command's
    await tally.close()
    assert store.totals["hits|other"] == 300 - 256 + 2


async def test_closing_flushes_and_does_not_wait_for_a_store_that_hangs(monkeypatch):
    monkeypatch.setattr(module, "_LAST_FLUSH_S", 0.02)
    store = Counters()
    tally = Tally(store)
    tally.add("gpt", "hits")
    await tally.close()
    assert store.totals == {"hits|gpt": 1}
    tally.add("gpt", "hits")  # too late: no timer may outlive the process
    assert tally._timer is None or tally._timer.cancelled()

    store.gate = asyncio.Event()
    hanging = Tally(store)
    hanging.add("gpt", "hits")
    await hanging.close()
    assert store.totals == {"hits|gpt": 1}


async def test_counting_costs_less_than_a_microsecond():
    tally = Tally(Counters())
    tally.add("gpt", "hits")
    best_s = min(timed(tally) for _ in range(5))
    assert best_s < 1e-6
    await tally.close()


def timed(tally):
    began = time.perf_counter()
    for _ in range(10_000):
        tally.add("gpt", "hits")
    return (time.perf_counter() - began) / 10_000

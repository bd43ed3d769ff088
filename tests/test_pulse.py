"""The pulse of a process: what is counted, that little is paid for it, and that all processes hear of it."""

import asyncio
from array import array
from dataclasses import replace

import orjson
import pytest
from fakes import FakeClock, FakeStore
from stores import META, RECORDING

from gateway import pulse as module
from gateway.core.apis import CHAT
from gateway.core.histogram import Histogram
from gateway.core.pacing import INSTANT, Pace
from gateway.errors import UpstreamBroke
from gateway.flight import Failed, Flight
from gateway.observe import RequestDetails
from gateway.pacer import Pacer
from gateway.pulse import Pulse, Reporter
from gateway.reader import FlightReader, RecordingReader, StandIn

pytestmark = pytest.mark.usefixtures("no_task_is_left")


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def pulse(clock):
    return Pulse("a", clock, dict)


def ended(pulse, path="/v1/chat/completions", status=200, error=""):
    pulse(RequestDetails("id", "POST", path, status, 0.1, 10, error=error))


def measured(pulse, name):
    return Histogram(pulse.report()["measured"][name])


def test_requests_and_those_that_failed_are_counted(pulse):
    ended(pulse)
    ended(pulse, status=503)
    ended(pulse, status=200, error="UpstreamBroke: gone")
    ended(pulse, status=499, error="ConnectionResetError")
    ended(pulse, path="/admin/live")
    ended(pulse, path="/readyz", status=503)
    counts = pulse.report()["counts"]
    assert (counts["requests"], counts["errors"]) == (4, 2)


def test_what_the_tally_has_is_told_as_well(clock):
    tallied = {"hits": 2.0, "saved_seconds": 5.5}
    counts = Pulse("a", clock, lambda: tallied).report()["counts"]
    assert (counts["hits"], counts["misses"], "saved_seconds" in counts) == (2, 0, False)


def test_a_meter_tells_the_first_frame_from_the_others(pulse, clock):
    meter = pulse.meter(clock.monotonic(), "miss")
    for passed_s, frames in ((0.5, 2), (0.25, 1), (0.25, 3)):
        clock.time_s += passed_s
        meter.sent(frames)
    assert measured(pulse, "ttft_miss_us").quantile(1) == pytest.approx(500_000, rel=1 / 32)
    assert measured(pulse, "gap_us").quantile(1) == pytest.approx(250_000, rel=1 / 32)
    assert (measured(pulse, "gap_us").total, measured(pulse, "ttft_hit_us").total) == (2, 0)
    pulse.meter(clock.monotonic(), "hit").sent_whole(4)
    assert pulse.report()["counts"]["frames"] == 10
    assert measured(pulse, "ttft_hit_us").total == 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [("hit", "hit"), ("stale", "hit"), ("miss", "miss"), ("bypass", "miss"), ("collapsed", "collapsed")],
)
def test_a_first_frame_is_counted_by_where_it_comes_from(pulse, clock, kind, name):
    pulse.meter(clock.monotonic(), kind).sent(1)
    counted = {each: sum(count for _, count in pairs) for each, pairs in pulse.report()["measured"].items()}
    assert counted.pop(f"ttft_{name}_us") == 1
    assert not any(counted.values())


def reader_of(clock, meter, pace):
    recording = replace(RECORDING, meta=META._replace(frames=2), marks=replace(RECORDING.marks, at_us=array("Q", (0, 10))))
    reader = RecordingReader(recording, None, usage=True, pace=pace, pacer=Pacer(clock))
    reader.meter = meter
    return reader


async def test_a_replay_that_keeps_time_tells_how_late_it_is(pulse, clock):
    reader = reader_of(clock, pulse.meter(clock.monotonic(), "hit"), Pace("recorded"))
    clock.time_s += 2
    assert await reader.next(1.0)
    assert measured(pulse, "late_us").quantile(1) == pytest.approx(2_000_000, rel=1 / 32)
    assert pulse.report()["counts"]["frames"] == 2


async def test_a_replay_that_does_not_is_never_late(pulse, clock):
    meter = pulse.meter(clock.monotonic(), "hit")
    assert reader_of(clock, meter, INSTANT).at_once()
    assert await reader_of(clock, meter, INSTANT).next(1.0)
    assert await reader_of(clock, meter, INSTANT).whole()
    assert measured(pulse, "late_us").total == 0
    assert pulse.report()["counts"]["frames"] == 6


async def test_who_stands_in_for_a_reader_is_counted_in_its_place(pulse, clock):
    meter = pulse.meter(clock.monotonic(), "miss")
    stale = reader_of(clock, None, INSTANT)
    failing = FlightReader(Flight(CHAT, None, "r", started_at=0.0), usage=False)
    failing.meter = meter
    failing.flight.close(Failed(UpstreamBroke("gone")))

    async def instead(error):
        return stale

    reader = StandIn(failing, instead)
    assert await reader.next(1.0)
    assert stale.meter is meter
    assert (measured(pulse, "ttft_miss_us").total, pulse.report()["counts"]["frames"]) == (1, 2)


# Reports


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(module, "_REPORT_S", 0.001)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def test_what_is_new_is_reported_and_then_it_is_quiet(pulse, soon):
    store = FakeStore()
    reporter = Reporter(pulse, store)
    ended(pulse)
    await until(lambda: store.reported)
    assert orjson.loads(store.reported["a"])["counts"]["requests"] == 1
    await until(lambda: reporter._task is None)
    assert reporter._timer is None
    await reporter.close()


async def test_while_a_stream_is_open_it_goes_on(pulse, soon, clock):
    store = FakeStore()
    reporter = Reporter(pulse, store)
    pulse.open = lambda: 1
    ended(pulse)
    for _ in range(3):
        clock.time_s += 1
        await until(lambda: store.reported and orjson.loads(store.reported["a"])["at"] == clock.time_s)
    pulse.open = lambda: 0
    await until(lambda: orjson.loads(store.reported["a"])["open"] == 0)
    await reporter.close()


async def test_a_store_that_is_away_harms_nothing_and_is_told_all_later(pulse, soon):
    store, tried = FakeStore(), []
    store.broken, check = True, store._check
    store._check = lambda: (tried.append(True), check())
    reporter = Reporter(pulse, store)
    ended(pulse)
    await until(lambda: tried and reporter._task is None)
    assert [report["process"] for report in await reporter.collect()] == ["a"]
    store.broken = False
    ended(pulse)
    await until(lambda: store.reported)
    assert orjson.loads(store.reported["a"])["counts"]["requests"] == 2
    await reporter.close()


async def test_reports_of_long_gone_processes_are_let_go_of_and_odd_ones_are_passed_over(pulse, clock):
    store = FakeStore()
    reporter = Reporter(pulse, store)
    for process, age_s in (("idle", 3000.0), ("dead", 4000.0)):
        other = Pulse(process, clock, dict).report()
        await store.report(process, orjson.dumps(other | {"at": clock.now() - age_s}))
    await store.report("odd", b"{")
    await store.report("later", b'{"process": "later"}')
    assert {report["process"] for report in await reporter.collect()} == {"a", "idle"}
    assert "dead" not in store.reported
    await reporter.close()


async def test_after_its_end_nothing_is_reported(pulse, soon):
    store = FakeStore()
    reporter = Reporter(pulse, store)
    ended(pulse)
    await reporter.close()
    ended(pulse)
    await asyncio.sleep(0.01)
    assert not store.reported

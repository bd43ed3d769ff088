"""Interleavings of readers, pump and store: no sockets, no sleeps; the test's hand is the upstream."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from cores import Core
from fakes import FakeClock, FakeStore
from scripted import USAGE, chunk

from gateway.core.apis import CHAT
from gateway.core.content import Trace
from gateway.core.controls import Controls
from gateway.core.dialects.openai import END
from gateway.core.pacing import Pace
from gateway.core.policy import Directives
from gateway.core.stream_id import Cursor
from gateway.errors import (
    NotCached,
    ShuttingDown,
    StreamDiverged,
    UpstreamBroke,
    UpstreamRefused,
    UpstreamReported,
    UpstreamTimeout,
)
from gateway.flight import Complete, Failed, Flight
from gateway.questions import Request
from gateway.reader import FlightReader, RecordingReader
from gateway.service import Opened

IDLE_S = 30.0
DONE = b"[DONE]"
OPENING = chunk({"role": "assistant", "content": ""})
HELLO = chunk({"content": "Hello"})
WORLD = chunk({"content": " world"})
STOP = chunk({}, "stop")
TAIL = {**chunk({}), "choices": [], "usage": USAGE}


class Bench:
    """A service whose ports are all in the test's hand."""

    def __init__(self, pace: Pace) -> None:
        self.clock, self.store = FakeClock(), FakeStore()
        self.core = Core(self.store, self.clock, cache={"pace": pace})
        self.flights, self.service, self.upstream = self.core.flights, self.core.service, self.core.upstream

    async def open(self, *, stream: bool = True, control: str = "", **members: object) -> Opened:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **members}
        return await self.service.open(Request(CHAT, body, {}, Controls(Directives.parse(control))))

    async def asked(self, calls: int = 1) -> None:
        """Lets the pump run until the upstream has been called so often."""
        while len(self.upstream.calls) < calls:
            await asyncio.sleep(0)

    async def landed(self) -> None:
        """Lets the flights end and their recordings reach the store."""
        while len(self.flights):
            await asyncio.sleep(0)


@pytest.fixture
async def bench(no_task_is_left: None) -> AsyncIterator[Bench]:
    bench = Bench(Pace())
    yield bench
    await bench.core.close()


async def read_all(opened: Opened) -> bytes:
    parts = []
    while data := await opened.reader.next(IDLE_S):
        parts.append(data)
    return b"".join(parts)


async def test_each_reader_gets_every_frame_whenever_it_joins(bench):
    first = await bench.open()
    await bench.asked()
    bench.upstream.say(OPENING, HELLO)
    seen = await first.reader.next(IDLE_S)
    late = await bench.open()
    assert (first.disposition.kind, late.disposition.kind) == ("miss", "collapsed")
    assert await late.reader.next(IDLE_S) == seen
    bench.upstream.say(WORLD, STOP, DONE)
    rest = await first.reader.next(IDLE_S)
    assert first.reader.at_end
    after_the_end = await bench.open()
    assert await late.reader.next(IDLE_S) == rest
    assert await read_all(after_the_end) == seen + rest
    assert len(bench.upstream.calls) == 1


async def test_a_reader_that_leaves_disturbs_nobody(bench):
    first, second = await bench.open(), await bench.open()
    await bench.asked()
    bench.upstream.say(OPENING)
    await first.reader.next(IDLE_S)
    waiting = asyncio.ensure_future(first.reader.next(IDLE_S))
    await asyncio.sleep(0)
    waiting.cancel()
    bench.service.leave(first)
    bench.upstream.say(HELLO, STOP, DONE)
    assert b"Hello" in await read_all(second)
    assert second.reader.error is None


async def test_a_storable_flight_is_finished_for_the_store_when_all_have_left(bench):
    opened = await bench.open()
    await bench.asked()
    bench.service.leave(opened)
    bench.upstream.say(OPENING, HELLO, STOP, DONE)
    bench.upstream.end()
    await bench.landed()
    assert len(bench.store.recordings) == 1


async def test_a_flight_that_is_not_to_be_stored_is_ended_when_all_have_left(bench):
    opened = await bench.open(control="no-store")
    await bench.asked()
    bench.service.leave(opened)
    await bench.landed()
    assert bench.upstream.closed == 1
    assert bench.store.lookups == 0


async def test_no_store_and_no_cache_never_collapse(bench):
    opened = [await bench.open(), await bench.open(control="no-store"), await bench.open(control="no-cache")]
    await bench.asked(3)
    assert [each.disposition.kind for each in opened] == ["miss", "bypass", "miss"]


async def test_no_cache_replaces_the_entry_and_newcomers_get_the_new_one(bench):
    await bench.open()
    await bench.asked()
    bench.upstream.say(HELLO, STOP, DONE)
    bench.upstream.end()
    await bench.landed()
    bench.clock.time_s += 1
    again = await bench.open(control="no-cache")
    await bench.asked(2)
    bench.store.write_gate = asyncio.Event()
    bench.upstream.say(WORLD, STOP, DONE)
    assert b"world" in await read_all(again)
    newcomer = await bench.open()
    assert newcomer.disposition.kind == "hit"
    assert b"world" in await read_all(newcomer)
    bench.store.write_gate.set()
    bench.upstream.end()


async def test_a_lookup_that_left_before_the_recording_landed_still_finds_it(bench):
    first = await bench.open()
    await bench.asked()
    bench.flights._by_key.clear()  # as on another replica, or before this one began
    bench.store.gate = asyncio.Event()
    looking = asyncio.ensure_future(bench.open())
    while bench.store.lookups < 2:
        await asyncio.sleep(0)
    bench.upstream.say(HELLO, STOP, DONE)
    bench.upstream.end()
    await read_all(first)
    await bench.landed()
    bench.store.gate.set()
    late = await looking
    assert late.disposition.kind == "hit"
    assert len(bench.upstream.calls) == 1


async def test_what_has_ended_but_not_yet_landed_is_a_hit(bench):
    first = await bench.open()
    await bench.asked()
    bench.store.write_gate = asyncio.Event()
    bench.upstream.say(HELLO, STOP, DONE)
    stream = await read_all(first)
    second = await bench.open()
    whole = await bench.open(stream=False)
    assert (second.disposition.kind, whole.disposition.kind) == ("hit", "hit")
    assert await read_all(second) == stream
    assert b'"Hello"' in await whole.reader.whole()
    bench.store.write_gate.set()
    bench.upstream.end()


async def test_a_refusal_before_the_head_reaches_every_reader_as_what_it_is(bench):
    bench.upstream.headless = True
    first, second, whole = await bench.open(), await bench.open(), await bench.open(stream=False)
    await bench.asked()
    bench.upstream.land(UpstreamRefused(429, b"{}", "application/json", {"retry-after": "3"}))
    for opened in (first, second):
        with pytest.raises(UpstreamRefused):
            await opened.reader.head(IDLE_S)
    with pytest.raises(UpstreamRefused):
        await whole.reader.whole()
    assert (await bench.open()).disposition.kind == "miss"


async def test_a_head_that_is_late_is_not_waited_for(bench):
    bench.upstream.headless = True
    opened = await bench.open()
    await bench.asked()
    assert await opened.reader.head(0.001) is None
    bench.upstream.land()
    assert await opened.reader.head(None) == {}


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ([[OPENING, {"error": {"message": "no"}}]], UpstreamReported),
        ([[OPENING, b'{"choices": [']], UpstreamBroke),
        ([[OPENING, HELLO]], UpstreamBroke),
        ([[DONE]], UpstreamBroke),
        ([], UpstreamBroke),
    ],
)
async def test_what_ends_badly_fails_for_all_and_is_not_stored(bench, batches, error):
    opened, whole = await bench.open(), await bench.open(stream=False)
    await bench.asked()
    for batch in batches:
        bench.upstream.say(*batch)
    bench.upstream.end()
    data = await read_all(opened)
    assert isinstance(opened.reader.error, error)
    assert (b'"assistant"' in data) == any(OPENING in batch for batch in batches)
    with pytest.raises(error):
        await whole.reader.whole()
    await bench.landed()
    assert not bench.store.recordings


@pytest.mark.parametrize(
    ("chunks", "stored"),
    [
        ([HELLO, STOP], True),
        ([HELLO, chunk({}, "content_filter")], False),
        ([HELLO, chunk({}, "length")], False),
        ([HELLO], False),
        ([chunk({"content": "x" * 100_001}), STOP], False),
    ],
)
async def test_only_a_proven_complete_and_storable_answer_is_stored(bench, chunks, stored):
    opened = await bench.open()
    await bench.asked()
    bench.upstream.say(*chunks, DONE)
    bench.upstream.end()
    await read_all(opened)
    assert opened.reader.error is None
    await bench.landed()
    assert bool(bench.store.recordings) == stored


async def test_every_choice_must_have_ended_before_an_answer_is_stored(bench):
    opened = await bench.open(n=2)
    await bench.asked()
    bench.upstream.say(HELLO, STOP, chunk({"content": "x"}, index=1), DONE)
    bench.upstream.end()
    await read_all(opened)
    await bench.landed()
    assert not bench.store.recordings


async def test_an_end_without_done_is_complete_if_every_choice_has_ended(bench):
    opened = await bench.open()
    await bench.asked()
    bench.upstream.say(HELLO, STOP, TAIL)
    bench.upstream.end()
    await read_all(opened)
    assert opened.reader.error is None
    await bench.landed()
    assert len(bench.store.recordings) == 1


async def test_usage_reaches_only_who_asked_for_it(bench):
    plain = await bench.open()
    asking = await bench.open(stream_options={"include_usage": True})
    await bench.asked()
    bench.upstream.say({**HELLO, "usage": None}, {**STOP, "usage": None}, TAIL, DONE)
    assert b"usage" not in await read_all(plain)
    assert (await read_all(asking)).count(b'"usage"') == 3


async def test_only_if_cached_never_asks_the_model_nor_follows_one_who_did(bench):
    """What is being made may still fail, and on another replica it would not be found either."""
    with pytest.raises(NotCached):
        await bench.open(control="only-if-cached")
    assert not bench.upstream.calls
    await bench.open()
    await bench.asked()
    with pytest.raises(NotCached):
        await bench.open(control="only-if-cached")
    bench.store.write_gate = asyncio.Event()
    bench.upstream.say(HELLO, STOP, DONE)
    bench.upstream.end()
    while not bench.store.recordings and bench.flights.find(next(iter(bench.flights._by_key))).outcome is None:
        await asyncio.sleep(0)
    # It is complete, and only on its way to the store.
    assert (await bench.open(control="only-if-cached")).disposition.kind == "hit"
    bench.store.write_gate.set()


async def test_a_broken_store_is_nobodys_fault(bench):
    bench.store.broken = True
    opened = await bench.open()
    assert opened.disposition.detail == "store-unavailable"
    await bench.asked()
    bench.upstream.say(HELLO, STOP, DONE)
    bench.upstream.end()
    assert b"Hello" in await read_all(opened)
    await bench.landed()


def _take_away(bench: Bench) -> None:
    bench.store.broken = True
    bench.store.available = bench.store.is_writable = False


async def test_nothing_is_made_for_a_store_that_takes_nothing(bench):
    _take_away(bench)
    opened = await bench.open()
    await bench.asked()
    bench.upstream.say(HELLO, STOP, DONE)
    bench.upstream.end()
    assert b"Hello" in await read_all(opened)
    await bench.landed()
    assert isinstance(opened.reader, FlightReader)
    assert opened.reader.flight.recording is None
    assert await opened.reader.outcome(IDLE_S) == (False, "store-unavailable")


async def test_what_was_not_assembled_as_it_came_is_whole_for_who_wants_it_so(bench):
    _take_away(bench)
    stream = await bench.open()
    await bench.asked()
    bench.upstream.say(OPENING, HELLO)
    whole = await bench.open(stream=False)
    assert whole.disposition.kind == "collapsed"
    bench.upstream.say(WORLD, STOP, TAIL, DONE)
    assert b"Hello world" in await whole.reader.whole()
    assert b"world" in await read_all(stream)


async def test_a_store_that_is_back_by_the_end_gets_what_began_without_it(bench):
    _take_away(bench)
    opened = await bench.open()
    await bench.asked()
    bench.upstream.say(OPENING, HELLO, WORLD)
    bench.store.broken = False
    bench.store.available = bench.store.is_writable = True
    bench.upstream.say(STOP, DONE)
    bench.upstream.end()
    await read_all(opened)
    await bench.landed()
    [recording] = bench.store.recordings.values()
    assert b"Hello world" in recording.body


async def test_closing_tells_every_reader(bench):
    opened, whole = await bench.open(), await bench.open(stream=False)
    await bench.asked()
    bench.upstream.say(HELLO)
    await opened.reader.next(IDLE_S)
    await bench.core.close()
    assert await opened.reader.next(IDLE_S) == b""
    assert isinstance(opened.reader.error, ShuttingDown)
    with pytest.raises(ShuttingDown):
        await whole.reader.whole()


async def test_a_bug_in_an_upstream_ends_its_flight_for_all(bench, caplog):
    opened = await bench.open()
    await bench.asked()
    bench.upstream.fail(ZeroDivisionError("a bug"))
    assert await opened.reader.next(IDLE_S) == b""
    assert opened.reader.error
    assert "a bug" not in opened.reader.error.message
    assert "a bug" in caplog.text


async def test_an_idle_stream_says_so(bench):
    opened = await bench.open()
    await bench.asked()
    assert await opened.reader.next(0.001) is None
    bench.upstream.say(HELLO)
    assert b"Hello" in (await opened.reader.next(IDLE_S) or b"")


async def test_a_whole_answer_is_assembled_once_for_all_who_want_it(bench):
    readers = [await bench.open(stream=False) for _ in range(3)]
    await bench.asked()
    bench.upstream.say(OPENING, HELLO, WORLD, STOP, TAIL, DONE)
    bodies = await asyncio.gather(*(opened.reader.whole() for opened in readers))
    assert bodies[0] is bodies[1] is bodies[2]
    assert b"Hello world" in bodies[0]


@pytest.fixture
async def replay():
    """A replay of four frames, due at 1, 2, 3 and 3 s: a bench, its reader."""
    bench = Bench(Pace("fixed", tokens_per_s=1))
    await bench.open()
    await bench.asked()
    bench.upstream.say(HELLO, WORLD, HELLO, STOP, DONE)
    bench.upstream.end()
    await bench.landed()
    opened = await bench.open()
    assert isinstance(opened.reader, RecordingReader)
    yield bench, opened.reader
    await bench.core.close()


async def test_a_paced_replay_gives_each_frame_when_it_is_due_and_all_that_are_due_together(replay):
    bench, reader = replay
    assert reader.at_once() is None
    waiting = asyncio.ensure_future(reader.next(IDLE_S))
    bench.clock.time_s += 0.99
    bench.core.service.pacer._ring()
    await asyncio.sleep(0)
    assert not waiting.done()
    bench.clock.time_s += 1.01
    bench.core.service.pacer._ring()
    assert (await waiting).count(b"data: ") == 2
    bench.clock.time_s += 5
    assert (await reader.next(IDLE_S)).count(b"data: ") == 2
    assert reader.at_end
    assert await reader.next(IDLE_S) == b""


async def test_the_schedule_counts_from_when_the_request_came_however_long_the_store_takes(replay):
    bench, _ = replay
    before, bench.store.gate = bench.store.lookups, asyncio.Event()
    bench.flights._by_key.clear()  # which knows the answer for a moment after its end
    opening = asyncio.ensure_future(bench.open())
    while bench.store.lookups == before:
        await asyncio.sleep(0)
    bench.clock.time_s += 2
    bench.store.gate.set()
    assert (await (await opening).reader.next(IDLE_S)).count(b"data: ") == 2


async def test_what_falls_due_is_pushed_as_long_as_that_is_taken_and_the_last_of_it_is_given(replay):
    bench, reader = replay
    pushed, takes = [], [True, False]
    pacer, clock = bench.core.service.pacer, bench.clock

    def push(data):
        pushed.append(data)
        return takes.pop(0)

    waiting = asyncio.ensure_future(reader.next(IDLE_S, push))
    await asyncio.sleep(0)
    for _ in range(2):
        clock.time_s += 1
        pacer._ring()
    assert await waiting == pushed[1]
    assert [data.count(b"data: ") for data in pushed] == [1, 1]
    waiting = asyncio.ensure_future(reader.next(IDLE_S, push))
    await asyncio.sleep(0)
    clock.time_s += 1
    pacer._ring()
    assert (await waiting).count(b"data: ") == 2
    assert reader.at_end
    assert len(pushed) == 2


async def test_a_replay_with_a_long_gap_says_so_after_each_idle_time(replay):
    bench, reader = replay
    for _ in range(2):
        waiting = asyncio.ensure_future(reader.next(0.25))
        await asyncio.sleep(0)
        bench.clock.time_s += 0.25
        bench.core.service.pacer._ring()
        assert await waiting is None


async def test_a_reader_whose_caller_is_gone_is_called_no_more(replay):
    bench, reader = replay
    pushed = []
    waiting = asyncio.ensure_future(reader.next(IDLE_S, lambda data: pushed.append(data) or True))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    bench.clock.time_s += 5
    bench.core.service.pacer._ring()
    assert pushed == []
    assert bench.core.service.pacer._heap == []


async def test_a_push_that_breaks_breaks_its_own_stream_only(replay):
    bench, reader = replay
    other = (await bench.open()).reader
    waiting = [
        asyncio.ensure_future(reader.next(IDLE_S, lambda _: 1 // 0)),
        asyncio.ensure_future(other.next(IDLE_S)),
    ]
    await asyncio.sleep(0)
    bench.clock.time_s += 1
    bench.core.service.pacer._ring()
    broken, data = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(broken, ZeroDivisionError)
    assert data.count(b"data: ") == 1


async def test_an_interrupted_replay_ends_with_an_error():
    bench = Bench(Pace("fixed", tokens_per_s=0.001))
    await bench.open()
    await bench.asked()
    bench.upstream.say(OPENING, STOP, DONE)
    bench.upstream.end()
    await bench.landed()
    streamed, whole = await bench.open(), await bench.open(stream=False)
    waiting = [asyncio.ensure_future(streamed.reader.next(IDLE_S)), asyncio.ensure_future(whole.reader.whole())]
    await asyncio.sleep(0)
    await bench.core.close()
    data, error = await asyncio.gather(*waiting, return_exceptions=True)
    assert data == b""
    assert isinstance(streamed.reader.error, ShuttingDown)
    assert isinstance(error, ShuttingDown)


async def test_closing_tells_even_those_whose_flight_has_not_yet_begun(bench):
    opened = await bench.open()
    await bench.core.close()
    assert await opened.reader.next(IDLE_S) == b""
    assert isinstance(opened.reader.error, ShuttingDown)
    assert (await bench.open()).disposition.kind == "miss"


# Where a stream goes on


def a_flight(*texts: str, runs: int = 1) -> Flight:
    """It has said that so far."""
    flight = Flight(CHAT, None, "run-0", started_at=0.0, max_bytes=1 << 20)
    flight.land_head({})
    flight.copy([b"data: %s\n\n" % json.dumps(chunk({"content": text})).encode() for text in texts], [0] * len(texts))
    flight.runs = [(f"run-{number}", 0) for number in range(runs)]
    return flight


def a_flight_that_failed(*texts: str, runs: int = 1) -> Flight:
    """Its last run broke off when it had said that."""
    flight = a_flight(*texts, runs=runs)
    flight.close(Failed(UpstreamTimeout("It has fallen silent.")))
    return flight


def seen(*texts: str) -> str:
    trace = Trace()
    for text in texts:
        trace.add(chunk({"content": text}))
    return trace.position()


@pytest.mark.parametrize(
    ("runs", "cursor"),
    [(1, Cursor(7)), (2, Cursor(7, seen("Hello wor"))), (2, Cursor(7))],
    ids=["by number", "by content", "by number, in another run"],
)
async def test_who_has_seen_more_than_a_run_that_failed_could_say_is_told_why_it_failed(runs, cursor):
    """That the cursor is wrong, or the runs differ, is not known: the one that goes on did not come so far."""
    reader = FlightReader(a_flight_that_failed("Hel", runs=runs), usage=False, cursor=cursor, run="run-1")
    with pytest.raises(UpstreamTimeout):
        await reader.head(None)


async def test_who_has_seen_something_else_than_a_run_that_failed_is_told_that():
    reader = FlightReader(a_flight_that_failed("Help me", runs=2), usage=False, cursor=Cursor(7, seen("Hello")), run="run-0")
    with pytest.raises(StreamDiverged):
        await reader.head(None)


ALL_OF_IT = pytest.mark.parametrize(
    ("ended", "rest"), [(False, END), (True, b"")], ids=["all but the end", "all and the end"]
)


@ALL_OF_IT
@pytest.mark.parametrize("frames", [3, 4], ids=["one more", "two more"])
@pytest.mark.parametrize("runs", [1, 2], ids=["a log that was written anew", "a log that was gone on with"])
async def test_who_has_seen_all_of_it_in_more_frames_than_another_run_has_is_told_the_end_once(frames, runs, ended, rest):
    """The number of the last frame that it has is that of the other run's end, or beyond it."""
    flight = a_flight("Hel", "lo", runs=runs)
    flight.close(Complete())
    cursor = Cursor(frames, seen("Hello"), ended)
    reader = FlightReader(flight, usage=False, cursor=cursor, run="run-9")
    assert await reader.head(None) == {}
    assert reader.over == ended
    assert (await reader.next(1.0), reader.end()) == (b"", rest)


async def test_who_has_seen_some_of_it_in_more_frames_than_another_run_has_gets_the_rest():
    flight = a_flight("Hel", "lo world")
    reader = FlightReader(flight, usage=False, cursor=Cursor(5, seen("Hello")), run="run-9")
    assert await reader.head(None) == {}
    flight.close(Complete())
    assert b'" world"' in await reader.next(1.0)
    assert (await reader.next(1.0), reader.end()) == (b"", END)


async def test_who_has_seen_more_than_another_run_said_in_all_is_told_so():
    flight = a_flight("Hello")
    flight.close(Complete())
    reader = FlightReader(flight, usage=False, cursor=Cursor(5, seen("Hello wor")), run="run-9")
    with pytest.raises(StreamDiverged):
        await reader.head(None)


@pytest.mark.parametrize("said", [("b", "cd", "e"), ("b", "c", "d", "e", "f")], ids=["in fewer frames", "in more frames"])
@pytest.mark.parametrize("mirrored", [None, 4], ids=["all that the log has", "so much"])
async def test_a_number_of_a_log_counts_nothing_that_another_run_has_written_there_since(mirrored, said):
    """The log was lost with Redis when the reader had been told that its number counts what is there."""
    flight = a_flight("Hel", "lo")
    reader = FlightReader(flight, usage=False, cursor=Cursor(4), run="mirror-0", mirrored=mirrored, writer="run-0")
    assert reader.take() == b""
    flight.runs.append(("run-1", flight.count))
    flight.copy([b"data: %s\n\n" % json.dumps(chunk({"content": text})).encode() for text in said], [0] * len(said))
    flight.close(Complete())
    with pytest.raises(StreamDiverged):
        await reader.head(None)


async def test_who_has_seen_the_end_waits_for_nothing():
    flight = Flight(CHAT, None, "run-1", started_at=0.0)
    reader = FlightReader(flight, usage=False, cursor=Cursor(3, seen("Hello"), ended=True), run="run-0")
    assert await reader.head(None) == {}
    assert reader.over

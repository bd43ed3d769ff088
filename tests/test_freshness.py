"""Fresh and stale answers, samples, purges, and what was served by another: no sockets, no sleeps."""

import asyncio
import json
from collections import Counter

import pytest
from cores import Core
from fakes import FakeClock, FakeStore
from scripted import USAGE, chunk

from gateway.core.apis import CHAT
from gateway.core.controls import Controls
from gateway.core.policy import Directives
from gateway.core.purge import Purge, Selector
from gateway.core.stream_id import Cursor
from gateway.errors import (
    NotCached,
    StoreUnavailable,
    UpstreamBroke,
    UpstreamRefused,
    UpstreamReported,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.flights import Rules
from gateway.ports import Served
from gateway.questions import Request
from gateway.sharing import Terms

IDLE_S = 5.0
DONE = b"[DONE]"
STOP = chunk({}, "stop")
MODES = pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])


class Replicas:
    """Some replicas of a gateway on one store, one clock for all."""

    def __init__(self) -> None:
        self.store, self.clock, self.all = FakeStore("a"), FakeClock(), []

    def start(self, count=1, **settings):
        for name in "abc"[:count]:
            store = self.store if name == "a" else self.store.replica_of(name)
            self.all.append(Core(store, self.clock, **settings))
        return self.all if count > 1 else self.all[0]

    def later(self, seconds):
        self.clock.time_s += seconds

    @property
    def calls(self):
        return sum(len(core.upstream.calls) for core in self.all)

    async def idle(self):
        """Lets all flights end."""
        await come(lambda: not any(len(core.flights) for core in self.all))


@pytest.fixture
async def replicas(no_task_is_left):
    replicas = Replicas()
    yield replicas
    for core in replicas.all:
        await core.close()


async def opened(core, control="", *, stream=True, controls=None, headers=None, **members):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **members}
    controls = (controls or Controls())._replace(directives=Directives.parse(control))
    return await core.service.open(Request(CHAT, body, headers or {}, controls))


async def come(condition):
    """Waits for what takes turns of the loop, not time."""
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not come")


async def called(core, calls=1):
    await come(lambda: len(core.upstream.calls) >= calls)


async def settled():
    for _ in range(30):
        await asyncio.sleep(0)


def say(core, text, at=-1):
    core.upstream.say(chunk({"content": text}), STOP, {**chunk({}), "choices": [], "usage": USAGE}, DONE, at=at)
    core.upstream.end(at=at)


async def text_of(core, answer, *, streamed=True):
    """What an answer says; its reader is given back."""
    try:
        if not streamed:
            return json.loads(await answer.reader.whole())["choices"][0]["message"]["content"]
        await answer.reader.head(IDLE_S)
        text = b""
        while data := await answer.reader.next(IDLE_S):
            text += data
        if answer.reader.error:
            raise answer.reader.error
        frames = [json.loads(frame.removeprefix(b"data: ")) for frame in text.split(b"\n\n")[:-1]]
        return "".join(choice["delta"].get("content", "") for frame in frames for choice in frame["choices"])
    finally:
        core.service.leave(answer)


async def store(core, replicas, text, control="", **members):
    """Has an answer stored, from a call that is answered at once."""
    before = len(core.upstream.calls)
    answer = await opened(core, control, **members)
    await called(core, before + 1)
    say(core, text)
    assert await text_of(core, answer) == text
    await replicas.idle()


async def hit(core, control="", *, streamed=True, **members):
    answer = await opened(core, control, stream=streamed, **members)
    return answer.disposition, await text_of(core, answer, streamed=streamed)


# Freshness


@MODES
async def test_a_stale_answer_is_given_at_once_while_one_call_fetches_a_fresh_one(replicas, streamed):
    core = replicas.start(model={"ttl_s": 10.0, "stale_s": 30.0})
    await store(core, replicas, "old")
    replicas.later(25.5)
    for _ in range(5):
        told, text = await hit(core, streamed=streamed)
        assert text == "old"
        assert told.cache_status() == "gateway; hit; ttl=-16; detail=stale-while-revalidate"
        assert told.age_s == 25
    await called(core, 2)
    say(core, "new")
    await replicas.idle()
    told, text = await hit(core, streamed=streamed)
    assert (text, told.cache_status()) == ("new", "gateway; hit; ttl=10")
    assert replicas.calls == 2


async def test_who_comes_while_a_fresh_answer_is_fetched_still_gets_the_stale_one_at_once(replicas):
    core = replicas.start(model={"ttl_s": 10.0, "stale_s": 30.0})
    await store(core, replicas, "old")
    replicas.later(20)
    await hit(core)
    await called(core, 2)
    core.upstream.say(chunk({"content": "ne"}))
    assert (await hit(core))[1] == "old"
    # Who does not take a stale one joins the call.
    answer = await opened(core, "max-age=5")
    assert answer.disposition.cache_status() == "gateway; fwd=stale; collapsed; detail=max-age"
    core.upstream.say(chunk({"content": "w"}), STOP, DONE)
    core.upstream.end()
    assert await text_of(core, answer) == "new"
    assert replicas.calls == 2


async def test_an_answer_that_is_fetched_anew_keeps_the_tags_of_who_had_it_stored(replicas):
    core = replicas.start(model={"ttl_s": 10.0, "stale_s": 30.0})
    await store(core, replicas, "old", controls=Controls(tags=("t1",)))
    replicas.later(20)
    await hit(core)
    await called(core, 2)
    say(core, "new")
    await replicas.idle()
    [recording] = replicas.store.recordings.values()
    assert recording.meta.tags == ("t1",)
    assert (await hit(core))[1] == "new"


async def test_over_all_replicas_one_call_fetches_a_fresh_answer(replicas):
    cores = replicas.start(3, model={"ttl_s": 10.0, "stale_s": 30.0})
    await store(cores[0], replicas, "old")
    replicas.later(20)
    for _ in range(3):
        assert [(await hit(core))[1] for core in cores] == ["old"] * 3
    await settled()
    assert replicas.calls == 2
    [leader] = [core for core in cores if len(core.upstream.calls) == (2 if core is cores[0] else 1)]
    say(leader, "new")
    await replicas.idle()
    assert [(await hit(core))[1] for core in cores] == ["new"] * 3
    assert replicas.calls == 2


async def test_a_fresh_answer_that_cannot_be_fetched_is_tried_again_once_a_second(replicas):
    core = replicas.start(model={"ttl_s": 10.0, "stale_s": 30.0})
    await store(core, replicas, "old")
    replicas.later(15)
    for calls in (2, 3, 4):
        assert {(await hit(core))[1] for _ in range(5)} == {"old"}
        await called(core, calls)
        core.upstream.fail(UpstreamRefused(503, b"", "text/plain", {}))
        await replicas.idle()
        assert {(await hit(core))[1] for _ in range(5)} == {"old"}
        await settled()
        assert replicas.calls == calls
        replicas.later(1)


@pytest.mark.parametrize("when_abandoned", ["cancel", "finish_if_cacheable"])
async def test_nobody_need_read_what_is_fetched_for_the_store(replicas, when_abandoned):
    rules = Rules(when_abandoned=when_abandoned, abandon_grace_s=0)
    core = replicas.start(model={"ttl_s": 10.0, "stale_s": 30.0}, rules=rules)
    await store(core, replicas, "old")
    replicas.later(20)
    await hit(core)
    await called(core, 2)
    core.upstream.say(chunk({"content": "new"}))
    joined = await opened(core, "max-age=1")
    core.service.leave(joined)
    await settled()
    core.upstream.say(STOP, DONE)
    core.upstream.end()
    await replicas.idle()
    assert (await hit(core))[1] == "new"


@pytest.mark.parametrize(
    ("control", "age_s", "status"),
    [
        ("", 41, "gateway; fwd=stale"),
        ("max-age=60", 15, "gateway; fwd=stale"),
        ("min-fresh=1", 5, "gateway; hit; ttl=5"),
        ("min-fresh=6", 5, "gateway; fwd=request; detail=min-fresh"),
        ("max-age=4", 5, "gateway; fwd=request; detail=max-age"),
        ("max-stale=4", 15, "gateway; fwd=stale; detail=max-stale"),
        ("max-stale=5", 15, "gateway; hit; ttl=-5; detail=max-stale"),
        ("max-stale", 500, "gateway; hit; ttl=-490; detail=max-stale"),
        ("only-if-cached, max-stale", 500, "gateway; hit; ttl=-490; detail=max-stale"),
        ("only-if-cached", 15, "gateway; hit; ttl=-5; detail=stale-while-revalidate"),
    ],
)
async def test_what_is_said_of_an_answer_by_its_age_and_the_callers_word(replicas, control, age_s, status):
    core = replicas.start(model={"ttl_s": 10.0, "stale_s": 30.0})
    await store(core, replicas, "old")
    replicas.later(age_s)
    answer = await opened(core, control)
    assert answer.disposition.cache_status() == status
    core.service.leave(answer)


async def test_only_if_cached_asks_nobody_not_even_for_a_fresh_answer_later(replicas):
    core = replicas.start(model={"ttl_s": 10.0, "stale_s": 30.0, "samples": 2})
    await store(core, replicas, "old")
    replicas.later(15)
    assert (await hit(core, "only-if-cached"))[1] == "old"
    replicas.later(100)
    with pytest.raises(NotCached):
        await opened(core, "only-if-cached")
    with pytest.raises(NotCached):
        await opened(core, "only-if-cached, no-cache, max-stale")
    await settled()
    assert replicas.calls == 1


@pytest.mark.parametrize(("model", "age_s"), [({"stale_s": 30.0}, 15), ({"samples": 2}, 5)], ids=["stale", "samples"])
async def test_nothing_is_fetched_beside_the_way_that_would_not_be_stored(replicas, model, age_s):
    core = replicas.start(model={"ttl_s": 10.0, **model})
    await store(core, replicas, "old")
    replicas.later(age_s)
    assert (await hit(core, controls=Controls(ttl_s=0.0)))[1] == "old"
    await settled()
    assert replicas.calls == 1
    # Nor does that hold up who would have it stored.
    assert (await hit(core))[1] == "old"
    await called(core, 2)


@MODES
async def test_who_takes_no_stored_answer_keeps_it_from_nobody_else(replicas, streamed):
    core = replicas.start()
    await store(core, replicas, "old")
    strict = [await opened(core, "max-age=0", stream=streamed) for _ in range(2)]
    assert [answer.disposition.kind for answer in strict] == ["miss", "collapsed"]
    await called(core, 2)
    told, text = await hit(core, streamed=streamed)
    assert (told.kind, text) == ("hit", "old")
    core.upstream.fail(refused(503))
    for answer in strict:
        with pytest.raises(UpstreamRefused):
            await text_of(core, answer, streamed=streamed)
    assert replicas.calls == 2


async def test_a_time_to_live_of_the_callers_own(replicas):
    core = replicas.start()
    await store(core, replicas, "short", controls=Controls(ttl_s=5.0))
    assert (await hit(core))[0].ttl_s == 5
    await store(core, replicas, "unkept", "no-cache", controls=Controls(ttl_s=0.0))
    assert (await hit(core))[1] == "short"
    first = await opened(core, controls=Controls(ttl_s=0.0), seed=1)
    second = await opened(core, controls=Controls(ttl_s=0.0), seed=1)
    assert [first.disposition.kind, second.disposition.kind] == ["miss", "miss"]


# In the place of an error


def refused(status):
    return UpstreamRefused(status, b"{}", "application/json", {})


OUTAGES = [refused(429), refused(500), refused(503), UpstreamTimeout("t"), UpstreamUnreachable("u"), UpstreamBroke("b")]
FAULTS_OF_CALLERS = [refused(400), refused(401), refused(404), UpstreamReported({"message": "x", "status": 400})]


@MODES
@pytest.mark.parametrize("error", OUTAGES, ids=str)
async def test_a_stale_answer_stands_in_for_an_upstream_that_cannot_answer(replicas, error, streamed):
    core = replicas.start(model={"ttl_s": 10.0, "stale_if_error_s": 100.0})
    await store(core, replicas, "old")
    replicas.later(60)
    core.upstream.headless = True
    answers = [await opened(core, stream=streamed) for _ in range(3)]
    await called(core, 2)
    core.upstream.land(error)
    for answer in answers:
        assert await text_of(core, answer, streamed=streamed) == "old"
        assert answer.disposition.age_s == 60
        answered = f" fwd-status={error.status};" if isinstance(error, UpstreamRefused) else ""
        assert answer.disposition.cache_status() == f"gateway; fwd=stale;{answered} ttl=-50; detail=stale-if-error"
    assert replicas.calls == 2


@pytest.mark.parametrize("error", FAULTS_OF_CALLERS, ids=str)
async def test_no_stale_answer_stands_in_for_what_is_the_callers_fault(replicas, error):
    core = replicas.start(model={"ttl_s": 10.0, "stale_if_error_s": 100.0})
    await store(core, replicas, "old")
    replicas.later(60)
    core.upstream.headless = True
    answer = await opened(core)
    await called(core, 2)
    core.upstream.land(error)
    with pytest.raises(type(error)):
        await text_of(core, answer)


@pytest.mark.parametrize(
    ("control", "age_s", "stands_in"),
    [
        ("", 110, True),
        ("", 111, False),
        ("stale-if-error=10", 20, True),
        ("stale-if-error=10", 21, False),
        ("stale-if-error=500", 400, True),
        ("max-age=5", 20, False),
        ("max-age=5, stale-if-error=50", 20, True),
        ("no-cache", 20, False),
        ("no-store", 20, False),
    ],
)
async def test_a_stale_answer_stands_in_only_within_its_window(replicas, control, age_s, stands_in):
    core = replicas.start(model={"ttl_s": 10.0, "stale_if_error_s": 100.0})
    await store(core, replicas, "old")
    replicas.later(age_s)
    answer = await opened(core, control)
    await called(core, 2)
    core.upstream.fail(refused(503))
    if stands_in:
        assert await text_of(core, answer) == "old"
    else:
        with pytest.raises(UpstreamRefused):
            await text_of(core, answer)


async def test_a_stream_whose_head_is_sent_but_no_token_can_still_be_stood_in_for(replicas):
    core = replicas.start(model={"ttl_s": 10.0, "stale_if_error_s": 100.0})
    await store(core, replicas, "old")
    replicas.later(60)
    core.upstream.headless = True
    answer = await opened(core)
    assert await answer.reader.head(0.001) is None
    assert await answer.reader.next(0.001) is None
    core.upstream.land(UpstreamTimeout("too late"))
    assert await text_of(core, answer) == "old"


async def test_nothing_stands_in_for_a_stream_of_which_something_was_shown(replicas):
    core = replicas.start(model={"ttl_s": 10.0, "stale_if_error_s": 100.0})
    await store(core, replicas, "old")
    replicas.later(60)
    answer = await opened(core)
    await called(core, 2)
    core.upstream.say(chunk({"content": "ne"}))
    assert b"ne" in await answer.reader.next(IDLE_S)
    core.upstream.fail(UpstreamBroke("cut"))
    with pytest.raises(UpstreamBroke):
        await text_of(core, answer)


async def test_where_nothing_is_stored_or_the_store_is_away_the_error_is_told(replicas):
    core = replicas.start(model={"ttl_s": 10.0, "stale_if_error_s": 100.0})
    answer = await opened(core)
    await called(core)
    core.store.broken = True
    core.upstream.fail(refused(503))
    with pytest.raises(UpstreamRefused):
        await text_of(core, answer)


# Samples


async def fill(core, replicas, *texts):
    """Asks as often as it takes until all samples are there; what is fetched says the texts in turn."""
    await store(core, replicas, texts[0])
    for calls, text in enumerate(texts[1:], 2):
        replicas.later(1)
        assert (await hit(core))[0].kind == "hit"
        await called(core, calls)
        say(core, text)
        await replicas.idle()


async def test_samples_are_served_in_turn_and_fetched_beside_the_way(replicas):
    core = replicas.start(model={"samples": 3})
    await fill(core, replicas, "one", "two", "three")
    assert replicas.calls == 3
    texts = [(await hit(core))[1] for _ in range(9)]
    assert Counter(texts) == {"one": 3, "two": 3, "three": 3}
    assert texts[:3] == texts[3:6] == texts[6:]
    await settled()
    assert replicas.calls == 3


async def test_samples_are_drawn_at_random_by_a_seed(replicas):
    cores = replicas.start(2, model={"samples": 3}, cache={"sample_order": "random", "sample_seed": 7})
    await fill(cores[0], replicas, "one", "two", "three")
    for core in cores:
        core.service._samples._turns.clear()
    draws = [[(await hit(core))[1] for _ in range(20)] for core in cores]
    assert draws[0] == draws[1]
    assert set(draws[0]) == {"one", "two", "three"}


async def test_all_who_ask_before_there_is_a_sample_share_one_call(replicas):
    cores = replicas.start(3, model={"samples": 4})
    answers = [(core, await opened(core)) for core in cores for _ in range(3)]
    await settled()
    assert replicas.calls == 1
    [leader] = [core for core in cores if core.upstream.calls]
    say(leader, "one")
    assert {await text_of(core, answer) for core, answer in answers} == {"one"}


async def test_what_the_model_says_twice_is_one_answer(replicas):
    core = replicas.start(model={"samples": 3})
    await fill(core, replicas, "one", "one", "two")
    assert Counter([(await hit(core))[1] for _ in range(6)]) == {"one": 3, "two": 3}
    await settled()
    assert replicas.calls == 3


async def test_no_cache_replaces_the_oldest_sample(replicas):
    core = replicas.start(model={"samples": 2})
    await fill(core, replicas, "one", "two")
    replicas.later(1)
    await store(core, replicas, "three", "no-cache")
    assert {(await hit(core))[1] for _ in range(4)} == {"two", "three"}


async def test_a_stale_sample_is_replaced_in_its_place(replicas):
    core = replicas.start(model={"samples": 2, "ttl_s": 10.0, "stale_s": 60.0})
    await fill(core, replicas, "one", "two")
    replicas.later(20)
    assert {(await hit(core))[1] for _ in range(4)} == {"one", "two"}
    await called(core, 4)
    for at in (2, 3):
        say(core, f"new {at}", at=at)
    await replicas.idle()
    assert {(await hit(core))[1] for _ in range(4)} == {"new 2", "new 3"}


@pytest.mark.parametrize("filled", [["one"], ["one", "two"]], ids=len)
async def test_a_stale_sample_stands_in_for_an_error_though_others_are_missing(replicas, filled):
    core = replicas.start(model={"samples": 2, "ttl_s": 10.0, "stale_if_error_s": 100.0})
    await fill(core, replicas, *filled)
    replicas.later(20)
    answer = await opened(core)
    await called(core, len(filled) + 1)
    core.upstream.fail(refused(503))
    assert await text_of(core, answer) == "one"


async def test_samples_that_are_only_kept_for_errors_are_fetched_anew(replicas):
    core = replicas.start(model={"samples": 3, "ttl_s": 10.0, "stale_if_error_s": 1000.0})
    await fill(core, replicas, "one", "two", "three")
    replicas.later(20)
    await store(core, replicas, "new one")
    for calls, text in [(5, "new two"), (6, "new three")]:
        replicas.later(1)
        # Who takes a stale one has none fetched that it would take.
        await hit(core, "max-stale")
        await settled()
        assert replicas.calls == calls - 1
        await hit(core)
        await called(core, calls)
        say(core, text)
        await replicas.idle()
    assert {(await hit(core))[1] for _ in range(6)} == {"new one", "new two", "new three"}
    await settled()
    assert replicas.calls == 6


async def test_a_store_that_is_away_is_no_hindrance_to_samples(replicas):
    core = replicas.start(model={"samples": 2})
    core.store.broken = True
    answer = await opened(core)
    assert answer.disposition.cache_status() == "gateway; fwd=miss; detail=store-unavailable"
    await called(core)
    say(core, "one")
    assert await text_of(core, answer) == "one"


# What may be stored


@pytest.mark.parametrize(
    ("model", "members", "said", "word"),
    [
        ({}, {}, [chunk({"content": "x"}, "length")], "finish-reason"),
        ({}, {}, [chunk({"content": "x"}, "content_filter")], "finish-reason"),
        ({}, {"n": 2}, [STOP], "incomplete"),
        ({"max_recording_bytes": 10}, {}, [STOP], "too-large"),
        ({}, {}, [chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}, "tool_calls")], "tool-arguments"),
        ({}, {"web_search_options": {}}, [STOP], "live-data"),
        ({"store_sampled": False}, {"temperature": 0.7}, [STOP], "sampled"),
    ],
)
async def test_an_answer_that_is_not_stored_says_why(replicas, model, members, said, word):
    core = replicas.start(model=model)
    answer = await opened(core, stream=False, **members)
    await called(core)
    core.upstream.say(*said, DONE)
    core.upstream.end()
    await answer.reader.whole()
    assert await answer.reader.outcome(IDLE_S) == (False, word)
    core.service.leave(answer)
    await replicas.idle()
    assert core.store.recordings == {}


async def test_what_is_not_to_be_stored_is_not_joined_but_can_be_resumed(replicas):
    core = replicas.start()
    first, second = [await opened(core, web_search_options={}) for _ in range(2)]
    assert first.disposition.cache_status() == "gateway; fwd=bypass; detail=live-data"
    await called(core, 2)
    say(core, "one", at=0)
    say(core, "two", at=1)
    assert (await text_of(core, first), await text_of(core, second)) == ("one", "two")
    assert first.stream_id
    await replicas.idle()
    assert core.store.lookups == 0


async def test_a_whole_answer_is_said_to_be_stored_once_it_is(replicas):
    core = replicas.start()
    answer = await opened(core, stream=False)
    await called(core)
    core.store.write_gate = asyncio.Event()
    say(core, "x")
    await answer.reader.whole()
    assert await answer.reader.outcome(0.001) == (None, "")
    core.store.write_gate.set()
    assert await answer.reader.outcome(IDLE_S) == (True, "")


async def test_a_whole_answer_is_said_not_to_be_stored_where_the_store_fails(replicas):
    core = replicas.start()
    answer = await opened(core, stream=False)
    await called(core)
    core.store.broken = True
    say(core, "x")
    await answer.reader.whole()
    assert await answer.reader.outcome(IDLE_S) == (False, "store-unavailable")


async def test_an_answer_of_another_than_was_asked_is_stored_under_who_has_served_it(replicas):
    core = replicas.start()
    core.upstream.served = Served("spare", "m-small")
    await store(core, replicas, "small")
    [(key, recording)] = core.store.recordings.items()
    assert (recording.meta.upstream, recording.meta.model) == ("spare", "m-small")
    core.upstream.served = None
    answer = await opened(core)
    assert answer.disposition.kind == "miss"
    await called(core, 2)
    say(core, "large")
    await text_of(core, answer)
    await replicas.idle()
    assert len(core.store.recordings) == 2
    assert (await hit(core))[1] == "large"
    assert core.store.recordings[key] is recording


# Purges


def purge(replicas, **selector):
    return Purge(int(replicas.clock.time_s * 1e6), Selector(**selector))


async def test_what_was_purged_is_served_by_no_replica_even_if_it_is_still_there(replicas):
    cores = replicas.start(2)
    await store(cores[0], replicas, "bad", controls=Controls(tags=("t1",)))
    assert (await hit(cores[1]))[1] == "bad"
    await replicas.store.mark(purge(replicas, tag="t1"), life_s=60)
    for core in cores:
        await core.purges.refresh()
    replicas.later(1)
    answer = await opened(cores[1])
    assert answer.disposition.cache_status() == "gateway; fwd=miss; detail=purged"
    await called(cores[1])
    say(cores[1], "good")
    assert await text_of(cores[1], answer) == "good"
    await replicas.idle()
    assert [(await hit(core))[1] for core in cores] == ["good", "good"]


@pytest.mark.parametrize("learned", ["at once", "at the end"])
async def test_a_flight_that_was_begun_before_a_purge_is_not_stored_after_it(replicas, learned):
    core = replicas.start()
    first = await opened(core)
    await called(core)
    core.upstream.say(chunk({"content": "old"}))
    mark = purge(replicas, model="m*")
    await replicas.store.mark(mark, life_s=60)
    if learned == "at once":
        core.purges.learn(mark)
        replicas.later(1)
        newcomer = await opened(core)
        assert newcomer.disposition.kind == "miss"
        await called(core, 2)
        say(core, "new")
        assert await text_of(core, newcomer) == "new"
    core.upstream.say(STOP, DONE, at=0)
    core.upstream.end(at=0)
    assert await text_of(core, first) == "old"
    await replicas.idle()
    assert await first.reader.outcome(0) == (False, "purged")
    left = [recording.meta.started_at for recording in replicas.store.recordings.values()]
    assert left == ([replicas.clock.time_s] if learned == "at once" else [])


async def test_a_flight_whose_replica_is_dead_is_not_joined_after_a_purge(replicas):
    dead, core = replicas.start(2)
    await opened(dead)
    await called(dead)
    dead.upstream.say(chunk({"content": "old"}))
    await come(lambda: any(log.count for log in replicas.store.logs.values()))
    core.purges.learn(purge(replicas, model="m"))
    replicas.later(1)
    newcomer = await opened(core)
    assert newcomer.disposition.kind == "miss"
    await called(core)
    say(core, "new")
    assert await text_of(core, newcomer) == "new"
    # One that was begun after the purge is joined as ever.
    later = await opened(dead, seed=1)
    await called(dead, 2)
    await come(lambda: sum(bool(log.entries) for log in replicas.store.logs.values()) == 3)
    assert (await opened(core, seed=1)).disposition.kind == "collapsed"
    assert later.disposition.kind == "miss"


@pytest.mark.parametrize("learned", ["before", "after"])
async def test_a_flight_that_was_taken_over_for_who_resumed_it_is_not_stored_after_a_purge(replicas, learned):
    dead, core = replicas.start(2, rules=Rules(terms=Terms(lease_s=1e-3)))  # nobody waits for a lease that is gone
    first = await opened(dead, controls=Controls(tags=("t1",)))
    await called(dead)
    dead.upstream.say(chunk({"content": "old"}))
    await come(lambda: any(log.count for log in replicas.store.logs.values()))
    mark = purge(replicas, tag="t1")
    if learned == "before":
        core.purges.learn(mark)
    dead.store.broken = True
    [name] = replicas.store.logs
    replicas.store.expire(name)
    again = await core.streams.resume(first.stream_id, Cursor(1), {})
    await called(core)
    if learned == "after":
        core.purges.learn(mark._replace(at_us=0))  # as a clock that is late says it
    core.upstream.say(chunk({"content": "old"}), STOP, DONE)
    core.upstream.end()
    while await again.reader.next(IDLE_S):
        pass
    assert again.reader.error is None
    core.service.leave(again)
    await come(lambda: not len(core.flights))
    assert not replicas.store.recordings
    dead.service.leave(first)


async def test_what_another_has_served_is_not_stored_after_a_purge_of_that_ones_answers(replicas):
    core = replicas.start()
    core.upstream.served = Served("other", "spare")
    first = await opened(core)
    await called(core)
    core.upstream.say(chunk({"content": "x"}))
    core.purges.learn(purge(replicas, model="spare"))
    core.upstream.say(STOP, DONE)
    core.upstream.end()
    assert await text_of(core, first) == "x"
    await replicas.idle()
    assert await first.reader.outcome(0) == (False, "purged")
    assert not replicas.store.recordings


async def test_answers_that_end_together_look_for_purges_together(replicas):
    core = replicas.start()
    looks, held = [], asyncio.Event()

    async def slow(after):
        looks.append(len(replicas.store.marked))
        await held.wait()
        return await FakeStore.purges(core.store, after)

    core.store.purges = slow
    first = asyncio.create_task(core.purges.refresh())
    await settled()
    mark = purge(replicas, tag="t1")
    await replicas.store.mark(mark, life_s=60)
    # What was begun before them may have missed the mark: they need one look more, and no more than one.
    rest = [asyncio.create_task(core.purges.refresh()) for _ in range(20)]
    await settled()
    held.set()
    await asyncio.gather(first, *rest)
    assert looks == [0, 1]
    core.store.purges = FakeStore.purges.__get__(core.store)


async def test_a_look_for_purges_that_fails_stands_for_no_other(replicas):
    core = replicas.start()
    core.store.broken = True
    tasks = [asyncio.create_task(core.purges.refresh()) for _ in range(3)]
    assert [type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == [StoreUnavailable] * 3


async def test_a_purge_of_something_else_changes_nothing(replicas):
    core = replicas.start()
    await store(core, replicas, "kept", controls=Controls(tags=("t1",), namespace="ns"))
    core.purges.learn(purge(replicas, tag="t2"))
    core.purges.learn(purge(replicas, namespace="other"))
    core.purges.learn(purge(replicas, tag="t1", namespace="other"))
    assert (await hit(core, controls=Controls(namespace="ns")))[1] == "kept"


async def test_an_old_mark_is_forgotten(replicas):
    core = replicas.start()
    core.purges.learn(purge(replicas))
    replicas.later(core.purges.life_s + 1)
    core.purges._forget_old()
    await store(core, replicas, "x")
    assert not core.purges._marks


# Whose answers


async def test_a_namespace_is_shared_by_all_who_name_it(replicas):
    core = replicas.start(cache={"shared": False})
    controls = Controls(namespace="team")
    await store(core, replicas, "ours", controls=controls, headers={"authorization": "Bearer a"})
    assert (await hit(core, controls=controls, headers={"authorization": "Bearer b"}))[1] == "ours"
    answer = await opened(core, headers={"authorization": "Bearer a"})
    other = await opened(core, controls=Controls(namespace="other"), headers={"authorization": "Bearer a"})
    assert [answer.disposition.kind, other.disposition.kind] == ["miss", "miss"]
    [recording] = replicas.store.recordings.values()
    assert (recording.meta.namespace, recording.meta.owner) == ("team", "ns:team")


async def test_where_callers_pay_with_their_own_credential_a_namespace_only_divides(replicas):
    core = replicas.start(cache={"shared": False})
    core.upstream.passes_credential = True
    controls = Controls(namespace="team")
    await store(core, replicas, "mine", controls=controls, headers={"authorization": "Bearer a"})
    assert (await hit(core, controls=controls, headers={"authorization": "Bearer a"}))[1] == "mine"
    answer = await opened(core, controls=controls, headers={"authorization": "Bearer b"})
    assert answer.disposition.kind == "miss"


# What is counted


async def test_the_administrator_is_told_what_was_saved(replicas):
    core = replicas.start(model={"ttl_s": 10.0, "stale_s": 30.0})
    first, second = await opened(core), await opened(core)
    await called(core)
    say(core, "x")
    await text_of(core, first)
    await text_of(core, second)
    await replicas.idle()
    await hit(core)
    replicas.later(15)
    await hit(core, "only-if-cached")
    core.service.leave(await opened(core, "no-store"))
    failing = await opened(core, seed=1)
    await called(core, 3)
    core.upstream.fail(refused(500))
    with pytest.raises(UpstreamRefused):
        await text_of(core, failing)
    await core.tally.flush()
    counted = {name.removesuffix("|m"): amount for name, amount in replicas.store.counted.items()}
    assert counted.pop("saved_seconds") >= 0
    assert counted == {
        "misses": 2,
        "collapsed": 1,
        "hits": 2,
        "stale": 1,
        "bypassed": 1,
        "errors": 1,
        "stored": 1,
        "saved_prompt_tokens": 3 * USAGE["prompt_tokens"],
        "saved_completion_tokens": 3 * USAGE["completion_tokens"],
    }

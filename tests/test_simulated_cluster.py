"""The simulated model as a cluster: when its tokens come, by a clock that is turned, not waited for."""

import asyncio
from contextlib import AsyncExitStack

import orjson
import pytest
import virtual

from gateway.config import SimulatedUpstreamConfig
from gateway.core.apis import CHAT
from gateway.core.apis.base import tokens
from gateway.core.profile import Profile, observe
from gateway.core.recording import Meta, Recorder
from gateway.errors import ConfigError, InvalidRequest
from gateway.ports import Call
from gateway.upstreams.simulated import SimulatedUpstream


def upstream(**settings):
    settings = {"ttft_s": 1.0, "tokens_per_s": 10.0, "length_tokens": 11, **settings}
    return SimulatedUpstream(SimulatedUpstreamConfig(kind="simulated", name="sim", **settings))


def chat(content="Why?", model="sim-1", **members):
    return Call(CHAT, {"model": model, "messages": [{"role": "user", "content": content}], **members}, streamed=True)


async def said_by(sim, call):
    """The chunks of an answer, each with the seconds until it came."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with sim.ask(call) as answer:
        return [
            (round(loop.time() - began, 9), orjson.loads(event))
            async for batch in answer.batches
            for event in batch
            if event != b"[DONE]"
        ]


async def times_of(sim, call):
    return [at_s for at_s, chunk in await said_by(sim, call) if is_token(chunk)]


def is_token(chunk):
    return any(choice["delta"].get("content") for choice in chunk["choices"])


def text_of(said):
    return "".join(choice["delta"].get("content") or "" for _, chunk in said for choice in chunk["choices"])


def end_of(said):
    [reason] = [choice["finish_reason"] for _, chunk in said for choice in chunk["choices"] if choice["finish_reason"]]
    return reason


def test_tokens_come_when_they_are_due():
    times = virtual.run(times_of(upstream(), chat()))
    assert times == pytest.approx([1 + step / 10 for step in range(11)])


def test_a_prompt_takes_as_long_as_it_is():
    said = virtual.run(said_by(upstream(prefill_tokens_per_s=100.0), chat("word " * 500)))
    prompt_tokens = said[-1][1]["usage"]["prompt_tokens"]
    assert prompt_tokens > 500
    assert said[0][0] == pytest.approx(1 + prompt_tokens / 100)


def test_times_deviate_and_do_so_again_from_the_same_seed():
    settings = {"ttft_sd_s": 0.5, "itl_sd_s": 0.05}

    async def twice(seed):
        sim = upstream(seed=seed, **settings)
        return [await times_of(sim, chat()), await times_of(sim, chat())]

    first, second = virtual.run(twice(1))
    assert first != second
    assert virtual.run(twice(1)) == [first, second]
    assert virtual.run(twice(2))[0] != first


def test_what_is_said_does_not_hang_on_when():
    async def both():
        sim = upstream(length_sd_tokens=40.0, length_tokens=100, itl_sd_s=0.1)
        return await said_by(sim, chat()), await said_by(sim, chat()), await said_by(sim, chat("else"))

    one, same, other = virtual.run(both())
    assert text_of(one) == text_of(same)
    assert len(tokens(text_of(one))) != len(tokens(text_of(other)))


def test_a_seed_chooses_the_text_as_well():
    one, other = (text_of(virtual.run(said_by(upstream(seed=seed, length_tokens=100), chat()))) for seed in (1, 2))
    assert one != other


def test_lengths_are_drawn_by_request_and_the_limit_holds():
    async def all_of():
        sim = upstream(length_tokens=100, length_sd_tokens=60.0)
        return [await said_by(sim, chat(f"{number}", max_tokens=120)) for number in range(40)]

    said = virtual.run(all_of())
    counts = [len(tokens(text_of(each))) for each in said]
    assert len(set(counts)) > 10
    assert max(counts) == 120
    assert {end_of(each) for each in said} == {"stop", "length"}
    assert {count for each, count in zip(said, counts, strict=True) if end_of(each) == "length"} == {120}


@pytest.mark.parametrize(
    ("members", "count", "reason"),
    [
        ({"ignore_eos": True, "max_tokens": 30}, 30, "length"),
        ({"ignore_eos": True, "max_completion_tokens": 5}, 5, "length"),
        ({"ignore_eos": True}, 11, "stop"),
        ({"min_tokens": 25}, 25, "stop"),
        ({"min_tokens": 25, "max_tokens": 20}, 20, "length"),
        ({"min_tokens": 5}, 11, "stop"),
    ],
)
def test_what_load_generators_demand_of_lengths_is_obeyed(members, count, reason):
    said = virtual.run(said_by(upstream(), chat(**members)))
    assert len(tokens(text_of(said))) == said[-1][1]["usage"]["completion_tokens"] == count
    assert end_of(said) == reason


def test_a_least_length_that_is_no_count_is_refused():
    with pytest.raises(InvalidRequest) as caught:
        virtual.run(said_by(upstream(), chat(min_tokens="many")))
    assert caught.value.param == "min_tokens"


def test_a_full_batch_is_slower_for_all_and_alone_it_is_not():
    async def together(count):
        sim = upstream(batch_size=5, batch_slowdown=3.0)
        return await asyncio.gather(*(times_of(sim, chat(f"{number}")) for number in range(count)))

    [alone] = virtual.run(together(1))
    assert alone[-1] == pytest.approx(2.0)
    latest = [max(times[-1] for times in virtual.run(together(count))) for count in range(1, 6)]
    assert latest == sorted(latest)
    assert len(set(latest)) == 5
    firsts = [times[:2] for times in virtual.run(together(5))]
    assert firsts[0] == pytest.approx([1, 1.3])  # it was alone when it began
    assert firsts[4] == pytest.approx([3, 3.3])


def test_who_finds_no_room_waits_for_it_first_come_first_served():
    async def crowd():
        sim = upstream(batch_size=2)
        return await asyncio.gather(*(times_of(sim, chat(f"{number}")) for number in range(6)))

    firsts = [times[0] for times in virtual.run(crowd())]
    assert firsts == pytest.approx([1, 1, 3, 3, 5, 5])


def test_models_have_batches_of_their_own():
    async def two_models():
        sim = upstream(batch_size=1)
        return await asyncio.gather(*(times_of(sim, chat(model=model)) for model in ("one", "other", "one")))

    assert [times[0] for times in virtual.run(two_models())] == pytest.approx([1, 1, 3])


def test_who_gives_up_while_it_waits_or_runs_leaves_its_place_to_the_next():
    async def scene():
        sim = upstream(batch_size=1)
        async with AsyncExitStack() as stack:
            running = [await stack.enter_async_context(sim.ask(chat(f"{number}"))) for number in range(2)]
            assert len(running) == 2
            calls = [asyncio.ensure_future(times_of(sim, chat(f"later {number}"))) for number in range(3)]
            await asyncio.sleep(0)
            calls[0].cancel()
            calls[1].cancel()
            await asyncio.sleep(50)
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert not sim._batches
        return found

    *left, times = virtual.run(scene())
    assert all(isinstance(each, asyncio.CancelledError) for each in left)
    assert times[0] == pytest.approx(51)


def test_who_gives_up_in_the_moment_in_which_its_turn_comes_hands_it_on():
    async def scene():
        sim = upstream(batch_size=1)
        async with sim.ask(chat()):
            calls = [asyncio.ensure_future(times_of(sim, chat(f"{number}"))) for number in range(2)]
            await asyncio.sleep(1)
            calls[0].cancel()
        return await asyncio.gather(*calls, return_exceptions=True)

    gone, times = virtual.run(scene())
    assert isinstance(gone, asyncio.CancelledError)
    assert times[0] == pytest.approx(2)


def test_profiles_say_what_is_different_for_some_models():
    profiles = [
        {"names": ["big-1"], "ttft_s": 2.0},
        {"names": ["big-*", "huge"], "ttft_s": 9.0, "tokens_per_s": 5.0},
    ]

    def times(model):
        return virtual.run(times_of(upstream(profiles=profiles), chat(model=model)))

    assert times("big-1")[:2] == pytest.approx([2, 2.2])
    assert times("huge")[:2] == pytest.approx([9, 9.2])
    assert times("small")[:2] == pytest.approx([1, 1.1])


def test_a_corpus_is_what_answers_are_passages_of(tmp_path):
    verses = [f"verse {number} has a_word_that_is_longer_than_a_token, and more" for number in range(50)]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(verses) + "\n\n", "utf-8")

    def answer(content, length):
        said = virtual.run(said_by(upstream(corpus_file=str(corpus), length_tokens=length), chat(content)))
        assert end_of(said) == "stop"
        assert said[-1][1]["usage"]["completion_tokens"] == length
        return text_of(said)

    endless = "\n".join(verses * 3)
    for number in range(20):
        text = answer(f"{number}", 30)
        assert text in endless
        assert text.startswith("verse ")
    assert answer("1", 30) != answer("2", 30)
    assert answer("1", 30) == answer("1", 30)
    assert answer("1", 800) in endless


def test_a_corpus_that_has_vanished_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"upstreams\.sim\.corpus_file: cannot be read"):
        upstream(corpus_file=str(tmp_path / "nothing"))


def test_a_profile_of_its_recordings_gives_its_parameters_back():
    told = {
        "ttft_s": 0.4,
        "ttft_sd_s": 0.08,
        "prefill_tokens_per_s": 1500.0,
        "tokens_per_s": 25.0,
        "itl_sd_s": 0.01,
        "length_tokens": 60,
        "length_sd_tokens": 30.0,
    }

    async def profiled():
        sim, profile = upstream(**told), Profile()
        for number in range(300):
            profile.add(observe(await recorded(sim, chat(f"{number} " + "word " * (number * 37 % 3000)))))
        return profile.fitted()

    found = virtual.run(profiled())
    for name, value in told.items():
        within = 0.25 if "_sd_" in name else 0.12
        assert found[name] == pytest.approx(value, rel=within), name


async def recorded(sim, call):
    """The recording that the gateway would have made of an answer."""
    recorder, loop = Recorder(), asyncio.get_running_loop()
    began = loop.time()
    async with sim.ask(call) as answer:
        async for batch in answer.batches:
            for payload in batch:
                if payload != b"[DONE]":
                    recorder.add(payload, int((loop.time() - began) * 1e6))
    reasons = tuple(recorder.finish_reasons.values())
    meta = Meta("chat", "m", "u", 0.0, 0.0, 0, 60.0, recorder.id, finish_reasons=reasons, usage=recorder.usage)
    return recorder.recording(meta._replace(frames=len(recorder.frames)), b"{}")

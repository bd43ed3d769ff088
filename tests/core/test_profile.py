"""A profile: what the simulated model was told to be like is what its recordings say that it is."""

import math
import random
from array import array

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import load
from gateway.core.profile import Observed, Profile, config_of, observe
from gateway.core.recording import Marks, Meta, Recorder
from gateway.core.simulation import Behaviour

ANSWERS = 250


def observed(behaviour, rng, prompt_tokens):
    """What a simulated answer leaves, without anything in between."""
    length = behaviour.length(rng)
    at_s, gap_s = [behaviour.first_token_s(rng, prompt_tokens)], behaviour.gaps_s(rng)
    for _ in range(length - 1):
        at_s.append(at_s[-1] + gap_s())
    at_us = tuple(round(1e6 * each) for each in at_s)
    return Observed(tuple(dict.fromkeys(at_us)), length, prompt_tokens, ended=True)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    ttft_s=st.floats(0.02, 5),
    ttft_share=st.floats(0.02, 0.4),
    rate=st.floats(5, 500),
    itl_share=st.floats(0.02, 0.5),
    length=st.integers(20, 200),
    length_share=st.floats(0.05, 0.6),
)
def test_the_parameters_of_a_simulated_model_come_out_of_its_recordings(
    seed, ttft_s, ttft_share, rate, itl_share, length, length_share
):
    told = Behaviour(ttft_s, ttft_share * ttft_s, 0.0, rate, itl_share / rate, length, length_share * length)
    rng, profile = random.Random(seed), Profile()
    for _ in range(ANSWERS):
        profile.add(observed(told, rng, rng.randrange(10, 1000)))
    found = profile.fitted()
    error = 5 / math.sqrt(ANSWERS)
    assert found["ttft_s"] == pytest.approx(told.ttft_s, rel=error * ttft_share + 0.001)
    assert found["ttft_sd_s"] == pytest.approx(told.ttft_sd_s, rel=0.4)
    assert found["tokens_per_s"] == pytest.approx(told.tokens_per_s, rel=0.05)
    assert found["itl_sd_s"] == pytest.approx(told.itl_sd_s, rel=0.15)
    assert found["length_tokens"] == pytest.approx(told.length_tokens, rel=error * length_share + 0.01)
    assert found["length_sd_tokens"] == pytest.approx(told.length_sd_tokens, rel=0.4)
    assert found["prefill_tokens_per_s"] == 0 or found["ttft_s"] < told.ttft_s


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), ttft_s=st.floats(0.1, 1), rate=st.floats(500, 5000))
def test_what_a_prompt_costs_comes_out_too(seed, ttft_s, rate):
    told = Behaviour(ttft_s, 0.2 * ttft_s, rate, 50.0, 0.0, 5)
    rng, profile = random.Random(seed), Profile()
    for _ in range(ANSWERS):
        profile.add(observed(told, rng, rng.randrange(10, 10_000)))
    found = profile.fitted()
    assert found["prefill_tokens_per_s"] == pytest.approx(rate, rel=0.15)
    assert found["ttft_s"] == pytest.approx(ttft_s, abs=0.2 * ttft_s)
    assert found["ttft_sd_s"] == pytest.approx(0.2 * ttft_s, rel=0.3)


def test_percentiles_are_those_of_what_was_seen():
    profile = Profile()
    for ttft_ms in range(1, 101):
        profile.add(Observed((ttft_ms * 1000, ttft_ms * 1000 + 20_000), 2, None, ended=True))
    assert profile.ttft_us.quantile(0.5) == pytest.approx(50_000, rel=1 / 32)
    assert profile.ttft_us.quantile(0.99) == pytest.approx(99_000, rel=1 / 32)
    assert profile.gaps_us.quantile(0.5) == pytest.approx(20_000, rel=1 / 32)


def test_of_a_prompt_that_costs_more_than_everything_the_mean_is_told():
    profile = Profile()
    for tokens in range(100, 200):
        profile.add(Observed((tokens * 10_000 - 900_000,), 1, tokens, ended=True))
    found = profile.fitted()
    assert (found["prefill_tokens_per_s"], found["ttft_s"]) == (0, pytest.approx(0.595, rel=0.01))


def test_lengths_are_those_of_answers_that_ended_by_themselves_where_there_are_any():
    profile = Profile()
    profile.add(Observed((), 10, None, ended=False))
    assert profile.fitted() == {"length_tokens": 10, "length_sd_tokens": 0}
    profile.add(Observed((), 80, None, ended=True))
    assert profile.fitted() == {"length_tokens": 80, "length_sd_tokens": 0}


def test_of_nothing_nothing_is_known():
    assert Profile().fitted() == {}


def test_where_several_tokens_come_at_a_time_each_has_its_share():
    profile = Profile()
    profile.add(Observed((100_000, 200_000, 300_000), 9, None, ended=True))
    assert profile.fitted()["tokens_per_s"] == pytest.approx(40)
    assert profile.gaps_us.quantile(0.5) == pytest.approx(100_000, rel=1 / 32)


# From the frames of a recording


def recorded(*chunks, **members):
    """A recording of chunks, each with the microseconds after which it came."""
    recorder = Recorder()
    for at_us, chunk in chunks:
        recorder.add(orjson.dumps({"id": "chatcmpl-1", "created": 5, **chunk}), at_us)
    meta = Meta("chat", "m", "u", 0.0, 0.0, 0, 60.0, "chatcmpl-1", frames=len(chunks), finish_reasons=("stop",))
    return recorder.recording(meta._replace(**members), b"{}")


def delta(index=0, **delta):
    return {"choices": [{"index": index, "delta": delta, "finish_reason": None}]}


USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 30,
    "prompt_tokens_details": {"cached_tokens": 64},
    "completion_tokens_details": {"reasoning_tokens": 20},
}


def test_only_what_says_something_of_the_first_choice_is_a_token():
    recording = recorded(
        (5, delta(role="assistant", content="")),
        (10, delta(content="a")),
        (11, delta(index=1, content="other")),
        (20, delta(reasoning_content="hm")),
        (30, delta(tool_calls=[{"index": 0}])),
        (30, delta(content="b")),
        (40, delta()),
        (41, {"choices": [{"index": 0, "text": "c"}]}),
        (50, {"choices": [], "usage": {"completion_tokens": 4}}),
        (60, {"choices": "odd"}),
        (60, {"choices": [None]}),
    )
    assert observe(recording) == Observed((10, 20, 30, 41), 4, None, ended=True)


def test_thoughts_are_no_part_of_the_length_nor_cached_prompts_of_the_work():
    recording = recorded((1, delta(content="a")), usage=USAGE, finish_reasons=("length",))
    assert observe(recording) == Observed((1,), 10, 36, ended=False)


def test_choices_share_what_was_counted():
    usage = {"completion_tokens": 30}
    assert observe(recorded((1, delta(content="a")), usage=usage, finish_reasons=("stop",) * 3)).length_tokens == 10


@pytest.mark.parametrize("usage", [None, {}, {"completion_tokens": None}, {"completion_tokens": "9", "prompt_tokens": True}])
def test_where_nothing_was_counted_arrivals_are(usage):
    recording = recorded((1, delta(content="a")), (2, delta(content="b")), usage=usage)
    assert observe(recording) == Observed((1, 2), 2, None, ended=True)


@pytest.mark.parametrize("members", [{"whole": True}, {"runs": (("a", 0), ("b", 1))}])
def test_what_did_not_stream_or_was_taken_over_tells_no_times(members):
    assert observe(recorded((1, delta(content="a")), **members)).at_us == ()


def test_marks_are_what_times_are_taken_from():
    recording = recorded((7, delta(content="a")))
    assert isinstance(recording.marks, Marks)
    assert recording.marks.at_us == array("Q", [7])


# As a configuration


@pytest.mark.parametrize("model", ["gpt-4o", 'odd "name" \\ \x7f\n', "with*stars?and[brackets]", "müller/größe-1 🎈"])
def test_the_configuration_is_one_and_means_this_model_only(tmp_path, model):
    fitted = {"ttft_s": 0.123456, "tokens_per_s": 12345.6, "length_tokens": 90, "length_sd_tokens": 0.0}
    (tmp_path / "c.toml").write_text(config_of([(model, fitted), ("other", {"ttft_s": 9.0})]), "utf-8")
    [upstream] = load(tmp_path / "c.toml", {}).config.upstreams
    behaviour = upstream.behaviour(model)
    assert (behaviour.ttft_s, behaviour.tokens_per_s, behaviour.length_tokens) == (0.1235, 12350, 90)
    assert upstream.behaviour("other").ttft_s == 9
    assert upstream.behaviour("another").ttft_s == 0.3

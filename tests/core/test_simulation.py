"""A simulated cluster: draws have the means and deviations that they should, load only slows, nobody jumps a queue."""

import math
import random
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.simulation import MAX_LENGTH_TOKENS, Batch, Behaviour

DRAWS = 4000
seeds = st.integers(0, 2**32)
means = st.floats(0.001, 100)
# A longer tail would need more draws than a test should make.
shares = st.floats(0.01, 0.5)


def is_distributed(drawn, mean, deviation):
    """Whether draws look like that: five standard errors for the mean, and as many, roughly, for the deviation."""
    assert abs(fmean(drawn) - mean) <= 5 * deviation / math.sqrt(len(drawn))
    assert pstdev(drawn) == pytest.approx(deviation, rel=0.15)


@settings(max_examples=25)
@given(seed=seeds, mean=means, share=shares)
def test_gaps_have_the_mean_and_the_deviation_that_they_should(seed, mean, share):
    draw = Behaviour(tokens_per_s=1 / mean, itl_sd_s=share * mean).gaps_s(random.Random(seed))
    drawn = [draw() for _ in range(DRAWS)]
    is_distributed(drawn, mean, share * mean)
    assert min(drawn) > 0


@settings(max_examples=25)
@given(seed=seeds, mean=means, share=shares, prompt=st.integers(0, 100_000), rate=st.floats(10, 1e5))
def test_a_first_token_takes_its_time_and_that_of_its_prompt(seed, mean, share, prompt, rate):
    behaviour = Behaviour(ttft_s=mean, ttft_sd_s=share * mean, prefill_tokens_per_s=rate)
    rng = random.Random(seed)
    drawn = [behaviour.first_token_s(rng, prompt) for _ in range(DRAWS)]
    is_distributed(drawn, mean + prompt / rate, share * mean)


@settings(max_examples=25)
@given(seed=seeds, mean=st.integers(100, 1000), share=st.floats(0.05, 1.0))
def test_lengths_have_the_mean_and_the_deviation_that_they_should(seed, mean, share):
    rng, behaviour = random.Random(seed), Behaviour(length_tokens=mean, length_sd_tokens=share * mean)
    drawn = [behaviour.length(rng) for _ in range(DRAWS)]
    is_distributed(drawn, mean, share * mean)
    assert all(isinstance(length, int) and 1 <= length <= MAX_LENGTH_TOKENS for length in drawn)


def test_lengths_with_a_deviation_as_large_as_the_mean_are_exponential():
    rng, behaviour = random.Random(1), Behaviour(length_tokens=500, length_sd_tokens=500)
    drawn = [behaviour.length(rng) for _ in range(DRAWS)]
    for share in (0.25, 0.5, 0.9):
        longer = sum(length > -500 * math.log(share) for length in drawn)
        assert longer / DRAWS == pytest.approx(share, abs=0.04)


def test_nothing_is_drawn_where_nothing_deviates():
    behaviour = Behaviour(ttft_s=0.5, prefill_tokens_per_s=100, tokens_per_s=20, length_tokens=7)
    no_chance = None
    assert behaviour.first_token_s(no_chance, 50) == 1.0
    assert behaviour.gaps_s(no_chance)() == 0.05
    assert behaviour.length(no_chance) == 7
    assert Behaviour(ttft_s=0.0, ttft_sd_s=1.0).first_token_s(no_chance, 5) == 0.0


@given(seed=seeds)
def test_the_same_seed_draws_the_same(seed):
    behaviour = Behaviour(ttft_sd_s=0.1, itl_sd_s=0.01, length_sd_tokens=50)

    def drawn(seed):
        rng = random.Random(seed)
        return behaviour.length(rng), behaviour.first_token_s(rng, 10), behaviour.gaps_s(rng)()

    assert drawn(seed) == drawn(seed)
    assert drawn(seed) != drawn(seed + 1)


@given(size=st.integers(2, 1000), factor=st.floats(1, 100), running=st.lists(st.integers(0, 2000), min_size=2))
def test_load_only_slows(size, factor, running):
    behaviour = Behaviour(batch_size=size, batch_slowdown=factor)
    slowdowns = [behaviour.slowdown(count) for count in sorted(running)]
    assert slowdowns == sorted(slowdowns)
    assert behaviour.slowdown(1) == 1
    assert behaviour.slowdown(size) == pytest.approx(factor)
    assert behaviour.slowdown(size + 1) == behaviour.slowdown(size)


@pytest.mark.parametrize("size", [0, 1])
def test_where_there_is_no_batch_nothing_slows(size):
    assert Behaviour(batch_size=size, batch_slowdown=9).slowdown(50) == 1


@given(size=st.integers(0, 4), moves=st.lists(st.one_of(st.just("enter"), st.integers(0, 20)), max_size=60))
def test_who_came_first_runs_first_and_never_more_than_there_is_room_for(size, moves):
    batch, running, waiting, number = Batch(size), [], [], 0
    for move in moves:
        if move == "enter":
            entered = batch.enter(number)
            assert entered == (not size or len(running) < size)
            (running if entered else waiting).append(number)
            number += 1
        elif running + waiting:
            leaving = (running + waiting)[move % len(running + waiting)]
            expected = waiting[0] if leaving in running and waiting else None
            assert batch.leave(leaving) == expected
            (running if leaving in running else waiting).remove(leaving)
            if expected is not None:
                running.append(waiting.pop(0))
        assert batch.running == len(running)
        assert not size or batch.running <= size
        assert batch.is_empty == (not running and not waiting)

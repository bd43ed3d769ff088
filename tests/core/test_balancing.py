from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.core.balancing import Candidate, EjectionRules, Health, KeyRing, choose

RULES = EjectionRules(error_rate=0.5, min_calls=4, window_s=30.0, first_s=5.0, longest_s=60.0)
DRAWS = st.floats(0, 1, exclude_max=True)
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        load=st.integers(0, 5),
        weight=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
        is_free=st.booleans(),
        has_room=st.booleans(),
        state=st.sampled_from(["well", "probed", "ejected"]),
        rests=st.booleans(),
    ),
    max_size=6,
)


# Whom to ask


@given(CANDIDATES, DRAWS)
def test_the_one_that_is_asked_is_as_good_as_any_and_the_least_loaded_of_those(candidates, draw):
    place = choose(candidates, draw)
    fit = [each for each in candidates if each.has_room and each.state != "ejected" and not each.rests]
    if not fit:
        assert place is None
        return
    chosen = candidates[place]
    assert chosen in fit
    rivals = [each for each in fit if each.is_free] or fit
    assert chosen in rivals
    assert chosen.load / chosen.weight == min(each.load / each.weight for each in rivals)


@given(CANDIDATES, DRAWS)
def test_in_despair_anybody_with_room_is_asked_but_an_ejected_one_last(candidates, draw):
    place = choose(candidates, draw, desperate=True)
    with_room = [each for each in candidates if each.has_room]
    assert (place is None) == (not with_room)
    if place is not None and candidates[place].state == "ejected":
        assert all(each.state == "ejected" for each in with_room)
    calm = choose(candidates, draw)
    assert calm is None or place == calm


def test_of_equals_each_is_asked_by_its_weight():
    pair = [Candidate(0, 3.0, True, True), Candidate(0, 1.0, True, True)]
    places = [choose(pair, draw / 100) for draw in range(100)]
    assert (places.count(0), places.count(1)) == (75, 25)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(0, 60), st.randoms(use_true_random=False))
def test_running_calls_spread_by_weight(weights, calls, draws):
    loads = [0] * len(weights)
    for _ in range(calls):
        pool = [Candidate(load, weight, True, True) for load, weight in zip(loads, weights, strict=True)]
        loads[choose(pool, draws.random())] += 1
    fair = calls / sum(weights)
    assert all(abs(load / weight - fair) <= len(weights) / min(weights) for load, weight in zip(loads, weights, strict=True))


# Ejection


def test_a_deployment_whose_calls_fail_is_left_alone_and_then_probed_by_one_call():
    health = Health(RULES)
    left_alone = [health.fail(health.begin(0.0), 0.0) for _ in range(4)]
    assert left_alone == [0.0, 0.0, 0.0, 5.0]
    assert health.state(4.9) == "ejected"
    assert health.state(5.0) == "probed"
    probe = health.begin(5.0)
    assert probe.is_probe
    assert health.state(5.1) == "ejected"
    assert health.fail(probe, 5.1) == 10.0
    assert health.state(15.0) == "ejected"
    probe = health.begin(15.2)
    health.succeed(probe, 15.3)
    assert health.state(15.3) == "well"
    assert health.fail(health.begin(15.4), 15.4) == 0.0  # it begins anew


def test_it_is_left_alone_for_longer_each_time_until_it_has_been_well_for_long():
    health, now, times = Health(RULES), 0.0, []
    for _ in range(6):
        left_alone_s = 0.0
        while not left_alone_s:
            left_alone_s = health.fail(health.begin(now), now)
        times.append(left_alone_s)
        now += left_alone_s
    assert times == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    health.succeed(health.begin(now), now)
    now += 61.0
    assert [health.fail(health.begin(now), now) for _ in range(4)][-1] == 5.0


def test_what_began_before_it_was_ejected_changes_nothing_more():
    health = Health(RULES)
    old = [health.begin(0.0) for _ in range(6)]
    for ticket in old[:4]:
        health.fail(ticket, 1.0)
    health.succeed(old[4], 2.0)
    assert health.fail(old[5], 2.0) == 0.0
    assert health.state(2.0) == "ejected"
    assert health.state(6.0) == "probed"


def test_who_is_asked_in_despair_and_answers_is_well_again_but_its_failure_says_nothing_new():
    health = Health(RULES)
    for _ in range(4):
        health.fail(health.begin(0.0), 0.0)
    assert health.fail(health.begin(1.0), 1.0) == 0.0
    assert health.state(5.0) == "probed"
    health.succeed(health.begin(1.0), 2.0)
    assert health.state(2.0) == "well"


def test_a_probe_whose_caller_leaves_makes_way_for_the_next_one():
    health = Health(RULES)
    for _ in range(4):
        health.fail(health.begin(0.0), 0.0)
    health.drop(health.begin(5.0))
    assert health.state(5.0) == "probed"


def test_one_that_always_breaks_off_in_the_middle_is_ejected_too():
    health, left_alone_s = Health(RULES), 0.0
    for _ in range(4):
        ticket = health.begin(0.0)
        health.succeed(ticket, 0.0)
        left_alone_s = health.fail(ticket, 0.0, spoke=True)
    assert left_alone_s == 5.0


def test_few_failures_among_many_calls_eject_nobody_and_nor_does_anything_where_it_is_off():
    health, off = Health(RULES), Health(replace(RULES, enabled=False))
    for call in range(100):
        ticket = health.begin(0.0)
        if call % 3:
            health.succeed(ticket, 0.0)
        else:
            health.fail(ticket, 0.0)
        off.fail(off.begin(0.0), 0.0)
    assert health.state(0.0) == off.state(0.0) == "well"


class HealthMachine(RuleBasedStateMachine):
    """Whatever happens: one probe at a time, nobody is ejected for ever, nor without failures enough."""

    def __init__(self):
        super().__init__()
        self.health, self.now, self.running, self.ended = Health(RULES), 0.0, [], 0

    @rule(passed_s=st.floats(0, 20))
    def pass_time(self, passed_s):
        self.now += passed_s

    @rule()
    def begin(self):
        state = self.health.state(self.now)
        self.running.append(self.health.begin(self.now))
        assert self.running[-1].is_probe == (state == "probed")

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["succeed", "fail", "spoke", "drop"]))
    def end(self, data, how):
        ticket = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        before = self.health.state(self.now)
        self.ended += 1
        if how == "succeed":
            self.health.succeed(ticket, self.now)
        elif how == "drop":
            self.health.drop(ticket)
        elif self.health.fail(ticket, self.now, spoke=how == "spoke"):
            assert before != "well" or self.ended >= RULES.min_calls
            assert self.health.state(self.now) == "ejected"

    @invariant()
    def one_probe_at_a_time(self):
        assert sum(ticket.is_probe and ticket.epoch == self.health._epoch for ticket in self.running) <= 1

    @invariant()
    def it_is_asked_again_some_day(self):
        probing = any(ticket.is_probe and ticket.epoch == self.health._epoch for ticket in self.running)
        assert probing or self.health.state(self.now + RULES.longest_s) != "ejected"


TestHealth = HealthMachine.TestCase


# Keys


def test_one_key_serves_until_it_is_refused_and_comes_back_after_its_rest():
    ring = KeyRing(["a", "b"])
    assert [ring.pick("m", 0.0) for _ in range(3)] == ["a", "a", "a"]
    ring.rest("a", "m", 5.0)
    assert ring.pick("m", 0.0) == "b"
    assert ring.pick("other", 0.0) == "b"  # where nothing speaks against it, the same goes on
    ring.rest("b", "m", 9.0)
    assert ring.pick("m", 1.0) == "a"  # all rest: the one that soonest will not
    assert ring.ready_in_s("m", 1.0) == 4.0
    assert ring.pick("m", 1.0, {"a", "b"}) is None
    assert KeyRing([]).pick("m", 0.0) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 20)), max_size=30), st.floats(0, 20), st.sets(st.integers(0, 3)))
def test_a_key_that_rests_is_used_only_where_all_do(rests, now, refused):
    ring, until = KeyRing("abcd"), dict.fromkeys("abcd", 0.0)
    for place, at in rests:
        ring.rest("abcd"[place], "m", at)
        until["abcd"[place]] = at
    left = set("abcd") - {"abcd"[place] for place in refused}
    key = ring.pick("m", now, {"abcd"[place] for place in refused})
    assert (key is None) == (not left)
    if key:
        assert key in left
        assert max(now, until[key]) == min(max(now, until[each]) for each in left)

"""Whatever upstreams do and callers leave, in any order: what one call may cost, and what it leaves behind."""

import asyncio
from contextlib import asynccontextmanager

import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import chunk

from gateway.config import RetriesConfig, SimulatedUpstreamConfig
from gateway.core.apis import CHAT
from gateway.core.balancing import EjectionRules
from gateway.core.policy import ModelRules, RuleBook
from gateway.core.retrying import RetryBudget
from gateway.errors import (
    GatewayError,
    InvalidRequest,
    UpstreamBroke,
    UpstreamBusy,
    UpstreamRefused,
    UpstreamUnreachable,
)
from gateway.ports import GATEWAY_UPSTREAM, Answer, Call, Served
from gateway.upstreams.asking import AskingTerms, Target
from gateway.upstreams.pool import Deployment, Pool
from gateway.upstreams.resilient import Resilient

ROLE = orjson.dumps(chunk({"role": "assistant", "content": ""}))
TOKEN = orjson.dumps(chunk({"content": "x"}))
HOWS = ["unreachable", "503", "429", "400", "wrong", "silent", "reports", "broken at once", "broken later", "good", "whole"]


class Clock:
    """Time passes only where somebody waits."""

    def __init__(self):
        self.s = 1000.0

    def now(self):
        return self.s

    def monotonic(self):
        return self.s


class Scripted:
    """An upstream in a test's hand: how it answers each call in turn."""

    passes_credential = False

    def __init__(self, name, hows, seen):
        self.name, self._hows, self._seen, self.open = name, hows, seen, 0

    @asynccontextmanager
    async def ask(self, call):
        how = self._hows.pop(0) if self._hows else "good"
        self._seen.append((self.name, how))
        self.open += 1
        try:
            await asyncio.sleep(0)
            if how == "unreachable":
                raise UpstreamUnreachable("gone")
            if how.isdigit():
                raise UpstreamRefused(int(how), b"{}", "application/json", {})
            if how == "wrong":
                raise InvalidRequest("wrong")
            if how == "silent":
                await asyncio.Event().wait()
            yield Answer({}, whole=b"{}") if how == "whole" else Answer({}, batches=self._batches(how))
        finally:
            self.open -= 1

    async def _batches(self, how):
        self.open += 1
        try:
            yield [ROLE]
            await asyncio.sleep(0)
            if how == "reports":
                yield [b'{"error": "Overloaded."}']
            if how == "broken at once":
                raise UpstreamBroke("broke")
            yield [TOKEN]
            await asyncio.sleep(0)
            if how == "broken later":
                raise UpstreamBroke("broke")
            yield [TOKEN, b"[DONE]"]
        finally:
            self.open -= 1

    async def close(self):
        pass


class World:
    """Two groups, the second of which stands in for the first."""

    def __init__(self, hows, retries, *, concurrent, fallbacks):
        self.seen, self.upstreams = [], []
        clock = self.clock = Clock()
        rules = RuleBook(ModelRules(retries=retries), [(("m",), {"fallbacks": ("n",) if fallbacks else ()})])
        terms = AskingTerms(rules, RetriesConfig(backoff_s=0.0), 0.01, 100.0, clock, lambda: 0.5)
        self.pools = {}
        for group, members in hows.items():
            deployments = []
            for place, member in enumerate(members):
                name = f"{group}{place}"
                config = SimulatedUpstreamConfig(
                    kind="simulated",
                    name=name,
                    group=group,
                    models=("*",),
                    max_concurrent_calls=concurrent,
                    max_queued_calls=1,
                    queue_timeout_s=0.01,
                )
                self.upstreams.append(Scripted(name, list(member), self.seen))
                rules_of_ejection = EjectionRules(min_calls=2)
                deployments.append(Deployment(config, self.upstreams[-1], rules_of_ejection, clock))
            self.pools[group] = Pool(group, deployments, RetryBudget(0.5, 100.0, clock.monotonic()), lambda: 0.5)
        self.resilient = Resilient(self.pools["a"], terms, lambda name: Target(self.pools["b"], name))

    async def ask(self):
        """What came, and of whom."""
        got, error, answer = [], None, None
        try:
            async with self.resilient.ask(Call(CHAT, {"model": "m"}, True, {}, "m")) as answer:
                if answer.batches is None:
                    return [answer.whole], None, answer
                async for batch in answer.batches:
                    got += batch
        except GatewayError as caught:
            error = caught
        return got, error, answer

    def assert_nothing_is_left(self):
        assert [upstream.open for upstream in self.upstreams] == [0] * len(self.upstreams)
        for pool in self.pools.values():
            for deployment in pool.deployments:
                assert (deployment.slots.load, deployment.slots.taken) == (0, 0)
                assert not deployment.health._probing


HOW = st.sampled_from(HOWS)
MEMBERS = st.lists(st.lists(HOW, max_size=8), min_size=1, max_size=3)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FEW
@given(MEMBERS, MEMBERS, st.integers(0, 3), st.booleans())
def test_one_call_at_a_time(ours, theirs, retries, fallbacks):
    async def run():
        world = World({"a": ours, "b": theirs}, retries, concurrent=1, fallbacks=fallbacks)
        for _ in range(4):
            world.seen.clear()
            got, error, answer = await world.ask()
            seen = list(world.seen)
            own, standing_in = (sum(name[0] == group for name, _ in seen) for group in "ab")
            assert own <= 1 + retries
            assert standing_in <= (1 + retries) * fallbacks
            # Nothing is asked after who has begun to answer, and nothing where the request is wrong.
            last = "good", "whole", "broken later"
            assert not any(how in last for _, how in seen[:-1])
            assert not any(how in ("400", "wrong") and name[0] == "a" for name, how in seen[:-1])
            if answer:
                assert answer.headers[GATEWAY_UPSTREAM] == seen[-1][0]
                assert answer.served == (Served("b", "n") if seen[-1][0][0] == "b" else None)
                assert (error is None) == (seen[-1][1] != "broken later")
                assert (
                    got
                    == {
                        "good": [ROLE, TOKEN, TOKEN, b"[DONE]"],
                        "broken later": [ROLE, TOKEN],
                        "whole": [b"{}"],
                    }[seen[-1][1]]
                )
            else:
                assert error
                assert (error.headers.get("x-should-retry") == "false") == (len(seen) > 1)
                if seen:
                    assert error.headers[GATEWAY_UPSTREAM][0] == "a"
            world.assert_nothing_is_left()

    asyncio.run(run())


@FEW
@given(MEMBERS, MEMBERS, st.integers(0, 2), st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 2))
def test_many_calls_whose_callers_leave_at_any_moment(ours, theirs, retries, lives, concurrent):
    async def run():
        world = World({"a": ours, "b": theirs}, retries, concurrent=concurrent, fallbacks=True)
        tasks = [asyncio.ensure_future(world.ask()) for _ in lives]
        for turn in range(14):
            world.clock.s += 2
            for task, life in zip(tasks, lives, strict=True):
                if life == turn and life < 12:
                    task.cancel()
            assert all(each.slots.taken <= concurrent for pool in world.pools.values() for each in pool.deployments)
            await asyncio.sleep(0)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError | tuple) for each in ended)
        assert await asyncio.gather(*(world.ask() for _ in range(2)))
        world.assert_nothing_is_left()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


async def test_whoever_waits_in_vain_is_told_so_once_and_fast():
    world = World({"a": [["silent"]], "b": [["503"]]}, 0, concurrent=1, fallbacks=True)
    slot = await world.pools["a"].deployments[0].slots.take()
    began = asyncio.get_running_loop().time()
    _, error, _ = await world.ask()
    assert isinstance(error, UpstreamBusy)
    assert asyncio.get_running_loop().time() - began < 0.5
    assert world.seen == [("b0", "503")]
    slot.release()
    world.assert_nothing_is_left()


async def test_a_probe_that_is_given_up_makes_way_for_the_next_one():
    world = World({"a": [["503", "503", "silent", "good"]], "b": [[]]}, 0, concurrent=2, fallbacks=True)
    for _ in range(3):
        assert (await world.ask())[2].headers[GATEWAY_UPSTREAM] == "b0"
    assert [name for name, _ in world.seen] == ["a0", "b0", "a0", "b0", "b0"]
    world.clock.s += 6
    probe = asyncio.ensure_future(world.ask())
    while world.seen[-1] != ("a0", "silent"):
        await asyncio.sleep(0)
    assert (await world.ask())[2].headers[GATEWAY_UPSTREAM] == "b0"
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    assert (await world.ask())[2].headers[GATEWAY_UPSTREAM] == "a0"
    world.assert_nothing_is_left()

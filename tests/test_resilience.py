"""An upstream fails before its first token, or has too much to do: who answers in the end, and what the caller is told."""

import asyncio
import json
import socket
import ssl
from contextlib import ExitStack

import openai
import pytest
from openai import AsyncOpenAI
from running import next_block
from scripted import ScriptedUpstream, chunk, say_hello, stream

from gateway.app import SystemClock
from gateway.config import load
from gateway.errors import ConfigError, UpstreamBusy
from gateway.upstreams.fleet import assemble
from gateway.upstreams.slots import Slots

MODES = pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
NO_STORE = {"Cache-Control": "no-store"}
RETRIES = {"max_retries": 2, "backoff_s": 0.001, "min_per_s": 100.0}
NEVER_WAITED_FOR = {**RETRIES, "backoff_s": 1000.0, "max_backoff_s": 1000.0}
ROLE = chunk({"role": "assistant", "content": ""})
OVERLOADED = {"error": {"message": "Overloaded.", "type": "server_error", "param": None, "code": "overloaded"}}


@pytest.fixture
async def other(no_task_is_left):
    """A second upstream."""
    scripted = ScriptedUpstream()
    await scripted.start()
    yield scripted
    await scripted.stop()
    assert not scripted.errors


def entry(upstream, name, **members):
    return {"name": name, "kind": "openai", "base_url": upstream.base_url, "models": ["*"], **members}


def pair(upstream, other, **members):
    """Two deployments of one group."""
    return [entry(upstream, "eu", group="world", **members), entry(other, "us", group="world", **members)]


def standing_in(upstream, other, **members):
    """An upstream, and another one that answers in its place."""
    return {
        "upstreams": [entry(upstream, "first"), entry(other, "backup", models=["small"], **members)],
        "models": [{"names": ["model-1"], "fallbacks": ["small"]}],
    }


def content(got):
    assert got.status == 200, got.body
    if not got.headers["Content-Type"].startswith("text/event-stream"):
        return got.json["choices"][0]["message"]["content"]
    assert got.events[-1] == "[DONE]"
    choices = [choice for event in got.events[:-1] for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def refuses(status=503, **headers):
    async def script(asked):
        await asked.answer(OVERLOADED, status, **headers)

    return script


def in_turn(*scripts):
    """Answers the first request by the first one, and so on; all further ones by the last."""
    left = list(scripts)

    async def script(asked):
        await (left.pop(0) if len(left) > 1 else left[0])(asked)

    return script


async def turns(condition):
    """Gives others their turn until it is so."""
    while not condition():
        await asyncio.sleep(0)


# Retries


async def resets(asked):
    asked.reset()


async def hangs_up(asked):
    asked.writer.close()


async def resets_after_the_head(asked):
    await asked.head()
    asked.reset()


async def resets_after_the_role(asked):
    await asked.head()
    await asked.event(ROLE)
    asked.reset()


async def ends_after_the_role(asked):
    await asked.head()
    await asked.event(ROLE)
    await asked.end()


async def ends_at_once(asked):
    await asked.head()
    await asked.end()


async def says_only_done(asked):
    await asked.head()
    await asked.done()


async def sends_half_a_chunk(asked):
    await asked.head()
    await asked.send(b'data: {"id": "x", "choi\n\n')
    await asked.end()


async def reports_an_error_event(asked):
    await asked.head()
    await asked.event(ROLE)
    await asked.event(OVERLOADED)
    await asked.end()


async def reports_an_error_as_a_success(asked):
    await asked.answer(OVERLOADED)


async def sends_a_page(asked):
    await asked.answer(b"<html>Bad gateway</html>", content_type="text/html")


async def sends_broken_json(asked):
    await asked.answer(b'{"id": "x", "choi')


async def says_nothing(asked):
    await asked.gate("never")


async def says_nothing_after_the_role(asked):
    await asked.head()
    await asked.event(ROLE)
    await asked.gate("never")


async def only_comments(asked):
    await asked.head()
    while not asked.gone.is_set():
        await asked.send(b": still thinking\n\n")
        await asyncio.sleep(0.01)


FAULTS = [
    refuses(500), refuses(503), refuses(408), refuses(429, retry_after="0"), refuses(429, retry_after_ms="1"),
    refuses(400, x_should_retry="true"), resets, hangs_up, resets_after_the_head, resets_after_the_role,
    ends_after_the_role, ends_at_once, says_only_done, sends_half_a_chunk, reports_an_error_event,
    reports_an_error_as_a_success, sends_a_page, sends_broken_json, says_nothing, says_nothing_after_the_role, only_comments,
]  # fmt: skip
NAMES = [
    "500", "503", "408", "Retry-After", "retry-after-ms", "x-should-retry", *(fault.__name__ for fault in FAULTS[6:]),
]  # fmt: skip


@MODES
@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
async def test_what_fails_before_its_first_token_is_asked_again_and_nobody_notices(start_gateway, upstream, fault, streamed):
    gateway = await start_gateway(retries=RETRIES, flights={"first_byte_timeout_s": 0.1})
    upstream.script = in_turn(fault, say_hello)
    got = await gateway.chat(stream=streamed)
    assert content(got) == "Hello world"
    assert len(upstream.asked) == 2
    assert upstream.bodies[0] == upstream.bodies[1]
    assert "x-should-retry" not in got.headers
    assert got.headers["Gateway-Upstream"] == "scripted"
    assert await gateway.stores()
    assert b"HTTP" not in got.body


@MODES
async def test_after_the_first_token_there_is_no_second_try_but_an_error(start_gateway, upstream, streamed):
    async def breaks(asked):
        await asked.head()
        await asked.event(ROLE)
        await asked.event(chunk({"content": "Hel"}))
        if streamed:
            await asked.gate("read")
            asked.reset()
        else:
            await asked.end()

    gateway = await start_gateway(retries=RETRIES)
    upstream.script = breaks
    if streamed:
        async with gateway.opened(stream=True) as response:
            assert "role" in await next_block(response)
            assert "Hel" in await next_block(response)
            upstream.gate("read").released.set()
            error = json.loads((await next_block(response)).removeprefix("data: "))["error"]
            assert not await response.read()
    else:
        got = await gateway.chat()
        error = got.json["error"]
        assert (got.status, got.headers["Gateway-Upstream"]) == (502, "scripted")
    assert error["code"] == "upstream_broke"
    assert len(upstream.asked) == 1
    assert not await gateway.stores()


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (refuses(400), 400),
        (refuses(401), 401),
        (refuses(404), 404),
        (refuses(501), 501),
        (refuses(503, x_should_retry="false"), 503),
    ],
)
async def test_what_a_second_try_cannot_change_is_asked_once(start_gateway, upstream, fault, status):
    gateway = await start_gateway(retries=RETRIES)
    upstream.script = fault
    got = await gateway.chat()
    assert (got.status, got.json) == (status, OVERLOADED)
    assert len(upstream.asked) == 1
    assert got.headers.get("x-should-retry") == ("false" if status == 503 else None)
    assert got.headers["Gateway-Upstream"] == "scripted"


@MODES
async def test_when_all_tries_have_failed_the_last_refusal_passes_as_it_came_and_says_not_to_try_again(
    start_gateway, upstream, streamed
):
    last = b'{"error":  {"message": "Down.", "new": 1}}'

    async def down(asked):
        await asked.answer(last, 503, retry_after="1", x_request_id="req_last", x_should_retry="true")

    gateway = await start_gateway(retries=RETRIES)
    upstream.script = in_turn(refuses(500), resets, down)
    got = await gateway.chat(stream=streamed)
    assert (got.status, got.body) == (503, last)
    told = {name: got.headers[name] for name in ("retry-after", "x-should-retry", "X-Request-Id", "Gateway-Upstream")}
    assert told == {
        "retry-after": "1",
        "x-should-retry": "false",
        "X-Request-Id": "req_last",
        "Gateway-Upstream": "scripted",
    }
    assert len(upstream.asked) == 3
    assert got.cache_status == "gateway; fwd=miss; fwd-status=503"


async def test_the_official_client_does_not_multiply_the_tries(start_gateway, upstream):
    gateway = await start_gateway(retries=RETRIES)
    upstream.script = refuses(503)
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="k", max_retries=2) as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="model-1", messages=[])
    assert len(upstream.asked) == 3


async def test_a_wait_that_is_too_long_is_the_callers(start_gateway, upstream):
    gateway = await start_gateway(retries=RETRIES | {"max_wait_s": 1})
    upstream.script = refuses(429, retry_after="2")
    got = await gateway.chat()
    assert (got.status, got.headers["retry-after"]) == (429, "2")
    assert "x-should-retry" not in got.headers
    assert len(upstream.asked) == 1


async def test_a_wait_that_would_end_too_late_is_not_begun(start_gateway, upstream):
    gateway = await start_gateway(retries=RETRIES, flights={"total_timeout_s": 3})
    upstream.script = refuses(429, retry_after="5")
    assert (await gateway.chat()).status == 429


async def test_an_outage_is_not_multiplied(start_gateway, upstream):
    gateway = await start_gateway(retries=RETRIES | {"budget": 0.2, "min_per_s": 0})
    upstream.script = refuses(503)
    for number in range(20):
        assert (await gateway.chat(str(number))).status == 503
    assert 20 <= len(upstream.asked) <= 24


async def test_each_model_has_its_own_retries(start_gateway, upstream):
    gateway = await start_gateway(retries=RETRIES, models=[{"names": ["once"], "retries": 0}])
    upstream.script = refuses(503)
    await gateway.chat(model="once")
    assert len(upstream.asked) == 1
    await gateway.chat(model="model-1")
    assert len(upstream.asked) == 4


@pytest.mark.parametrize("headers", [NO_STORE, {"Cache-Control": "no-cache"}], ids=["no-store", "cacheable"])
async def test_the_last_reader_who_leaves_ends_the_wait_for_a_retry(start_gateway, upstream, headers):
    gateway = await start_gateway(
        retries=RETRIES | {"max_wait_s": 100}, flights={"when_abandoned": "cancel", "abandon_grace_s": 0}
    )

    async def refuses_later(asked):
        await asked.answer(OVERLOADED, 429, retry_after="50")
        asked.upstream.gate("refused").reached.set()

    upstream.script = refuses_later
    asking = asyncio.ensure_future(gateway.chat(headers=headers))
    await upstream.gate("refused").reached.wait()
    await turns(lambda: len(gateway.service._flights) == 1)
    asking.cancel()
    async with asyncio.timeout(5):
        await gateway.landed()
    assert len(upstream.asked) == 1


async def test_who_joins_during_a_retry_gets_the_same_answer(start_gateway, upstream):
    gateway = await start_gateway(retries=RETRIES)

    async def held(asked):
        await asked.gate("second")
        await say_hello(asked)

    upstream.script = in_turn(refuses(503), held)
    leader = asyncio.ensure_future(gateway.chat())
    await upstream.gate("second").reached.wait()
    follower = asyncio.ensure_future(gateway.chat(stream=True))
    await turns(lambda: any(flight.readers == 2 for flight in gateway.service._flights._tasks))
    upstream.gate("second").released.set()
    assert content(await leader) == content(await follower) == "Hello world"
    assert (await follower).headers["Gateway-Upstream"] == "scripted"
    assert len(upstream.asked) == 2


# Fallbacks


@MODES
@pytest.mark.parametrize(
    "fault",
    [refuses(503), refuses(429, retry_after="900"), resets, reports_an_error_event],
    ids=lambda fault: fault.__name__,
)
async def test_a_fallback_answers_where_the_model_cannot_and_says_so(start_gateway, upstream, other, fault, streamed):
    gateway = await start_gateway(
        {"BACKUP_KEY": "ours"}, retries=RETRIES, **standing_in(upstream, other, api_key_env="BACKUP_KEY")
    )
    upstream.script = fault
    mine = {"Authorization": "Bearer mine", "OpenAI-Organization": "org-mine"}
    got = await gateway.chat(stream=streamed, headers=mine)
    assert content(got) == "Hello world"
    assert got.headers["Gateway-Upstream"] == "backup"
    assert [body["model"] for body in other.bodies] == ["small"]
    # What was meant for the one goes to no other.
    assert other.asked[0].headers["authorization"] == "Bearer ours"
    assert "openai-organization" not in other.asked[0].headers
    # It is the fallback's answer, and is stored as such.
    assert not await gateway.stores(headers=mine)
    assert await gateway.stores(model="small", headers=mine)
    asked_before = len(upstream.asked)
    upstream.script = say_hello
    again = await gateway.chat(headers=mine)
    assert (again.headers["Gateway-Upstream"], len(upstream.asked)) == ("first", asked_before + 1)


async def test_the_fallbacks_answer_serves_those_who_ask_for_it(start_gateway, upstream, other):
    keys = {"KEY_A": "a", "KEY_B": "b"}
    entries = standing_in(upstream, other, api_key_env="KEY_B")
    entries["upstreams"][0]["api_key_env"] = "KEY_A"
    gateway = await start_gateway(keys, **entries)
    upstream.script = refuses(503)
    assert content(await gateway.chat()) == "Hello world"
    await gateway.landed()
    assert (await gateway.chat(model="small")).cache_status.startswith("gateway; hit")


async def test_fallbacks_are_asked_in_order_by_model_or_by_upstream(start_gateway, upstream, other):
    gateway = await start_gateway(
        {"KEY": "k"},
        upstreams=[entry(upstream, "first", api_key_env="KEY"), entry(other, "backup", api_key_env="KEY", models=["m-*"])],
        models=[{"names": ["model-1"], "fallbacks": ["small", "model-1", "backup/tiny", "backup/org/big", "backup/m-last"]}],
    )
    upstream.script = refuses(503)
    other.script = in_turn(refuses(503), refuses(400), say_hello)
    assert content(await gateway.chat()) == "Hello world"
    assert [body["model"] for body in upstream.bodies] == ["model-1", "small"]
    assert [body["model"] for body in other.bodies] == ["tiny", "org/big", "m-last"]


async def test_where_nobody_answers_the_error_is_that_of_the_model_itself(start_gateway, upstream, other):
    gateway = await start_gateway({"KEY": "k"}, **standing_in(upstream, other, api_key_env="KEY"))
    upstream.script = refuses(429, retry_after="900")
    other.script = refuses(500)
    got = await gateway.chat()
    assert (got.status, got.headers["retry-after"], got.headers["Gateway-Upstream"]) == (429, "900", "first")
    assert got.headers["x-should-retry"] == "false"
    assert (len(upstream.asked), len(other.asked)) == (1, 1)


async def test_a_request_that_is_wrong_is_no_reason_for_a_fallback(start_gateway, upstream, other):
    gateway = await start_gateway({"KEY": "k"}, retries=RETRIES, **standing_in(upstream, other, api_key_env="KEY"))
    upstream.script = refuses(400)
    assert (await gateway.chat()).status == 400
    assert (len(upstream.asked), len(other.asked)) == (1, 0)


async def test_an_upstream_that_is_left_alone_costs_those_with_a_fallback_no_time_but_is_better_than_nobody(
    start_gateway, upstream, other
):
    gateway = await start_gateway({"KEY": "k"}, ejection={"min_calls": 3}, **standing_in(upstream, other, api_key_env="KEY"))
    upstream.script = refuses(503)
    for number in range(5):
        assert (await gateway.chat(str(number))).headers["Gateway-Upstream"] == "backup"
    assert len(upstream.asked) == 3
    other.script = refuses(500)
    upstream.script = say_hello
    assert (await gateway.chat("x")).headers["Gateway-Upstream"] == "first"
    assert (await gateway.chat("y")).headers["Gateway-Upstream"] == "first"


def test_fallbacks_must_be_served_and_by_somebody_with_a_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    upstreams = [{"name": name, "kind": "openai", "models": [f"{name}-*"]} for name in ("a", "b")]
    models = [{"names": ["a-1"], "fallbacks": ["a-2", "nobody", "b-1", "c/x"]}]
    environ = {"GATEWAY_UPSTREAMS": json.dumps(upstreams), "GATEWAY_MODELS": json.dumps(models)}
    with pytest.raises(ConfigError) as raised:
        assemble(load(None, environ), SystemClock())
    assert raised.value.problems == [
        "models.0.fallbacks: no upstream serves 'nobody'",
        "models.0.fallbacks: 'b' has no key of its own to stand in with",
        "models.0.fallbacks: no upstream serves 'c/x'",
    ]


async def test_a_simulated_model_can_stand_in(start_gateway, upstream):
    gateway = await start_gateway(
        upstreams=[
            entry(upstream, "first"),
            {"name": "demo", "kind": "simulated", "models": ["sim"], "ttft_s": 0, "tokens_per_s": 10_000},
        ],
        models=[{"names": ["model-1"], "fallbacks": ["sim"]}],
    )
    upstream.script = refuses(503)
    got = await gateway.chat(stream=True)
    assert content(got)
    assert got.headers["Gateway-Upstream"] == "demo"


async def test_a_langchain_model_that_fails_is_asked_again_and_stood_in_for(start_gateway, upstream):
    failing = {"responses": ["never said"], "error_on_chunk_number": 0}
    gateway = await start_gateway(
        retries=RETRIES,
        upstreams=[
            {
                "name": "chain",
                "kind": "langchain",
                "target": "langchain_core.language_models.fake_chat_models.FakeListChatModel",
                "arguments": failing,
                "models": ["model-1"],
            },
            entry(upstream, "backup", models=["small"]) | {"api_key_env": "KEY"},
        ],
        models=[{"names": ["model-1"], "fallbacks": ["small"]}],
        environ={"KEY": "k"},
    )
    got = await gateway.chat(stream=True)
    assert content(got) == "Hello world"
    assert got.headers["Gateway-Upstream"] == "backup"
    deployment = gateway.service._questions._router.upstreams[0].pool.deployments[0]
    assert round(deployment.health._failures) == 3


async def test_the_access_log_names_who_has_answered_or_refused(start_gateway, upstream, other, capsys):
    gateway = await start_gateway({"KEY": "k"}, log={"access": True}, **standing_in(upstream, other, api_key_env="KEY"))
    upstream.script = refuses(503)
    await gateway.chat()
    await gateway.chat(stream=True, headers=NO_STORE)
    other.script = refuses(500)
    await gateway.chat(headers=NO_STORE)
    async with asyncio.timeout(5):
        lines = []
        while len(lines) < 3:
            lines += capsys.readouterr().err.splitlines()
            await asyncio.sleep(0.01)
    assert [line.split(" upstream=")[1].split()[0] for line in lines] == ["backup", "backup", "first"]


# Several deployments


async def test_deployments_of_one_group_share_their_entries(start_gateway, upstream, other):
    gateway = await start_gateway(upstreams=pair(upstream, other))
    for number in range(8):
        await gateway.chat(str(number))
    await gateway.landed()
    asked = len(upstream.asked) + len(other.asked)
    assert asked == 8
    for number in range(8):
        assert (await gateway.chat(str(number))).cache_status.startswith("gateway; hit")
    assert asked == len(upstream.asked) + len(other.asked)


@pytest.mark.parametrize("fault", [refuses(500), resets_after_the_role, refuses(429, retry_after="5")])
async def test_the_next_deployment_is_asked_at_once(start_gateway, upstream, other, fault):
    gateway = await start_gateway(upstreams=pair(upstream, other), retries=NEVER_WAITED_FOR)
    upstream.script = other.script = in_turn(fault, say_hello)
    assert content(await gateway.chat()) == "Hello world"
    assert (len(upstream.asked), len(other.asked)) == (1, 1)


async def test_the_least_loaded_deployment_is_asked(start_gateway, upstream, other):
    gateway = await start_gateway(upstreams=pair(upstream, other))

    async def held(asked):
        await asked.gate("held")
        await say_hello(asked)

    upstream.script = other.script = held
    asking = [asyncio.ensure_future(gateway.chat(str(number))) for number in range(6)]
    await turns(lambda: len(upstream.asked) + len(other.asked) == 6)
    assert (len(upstream.asked), len(other.asked)) == (3, 3)
    for each in (upstream, other):
        each.gate("held").released.set()
    assert {(await each).headers["Gateway-Upstream"] for each in asking} == {"eu", "us"}


async def test_who_has_had_enough_rests_for_as_long_as_it_says(start_gateway, upstream, other):
    gateway = await start_gateway(
        {"KEY": "k"}, upstreams=pair(upstream, other, api_key_env="KEY"), retries=NEVER_WAITED_FOR | {"max_wait_s": 100}
    )
    upstream.script = refuses(429, retry_after="60")
    for number in range(12):
        assert content(await gateway.chat(str(number))) == "Hello world"
    assert (len(upstream.asked), len(other.asked)) == (1, 12)


async def test_a_limit_of_one_callers_own_key_is_not_the_deployments(start_gateway, upstream, other):
    """Another caller's request may well go there."""
    gateway = await start_gateway(upstreams=pair(upstream, other), retries=NEVER_WAITED_FOR | {"max_wait_s": 100})
    upstream.script = in_turn(refuses(429, retry_after="60"), say_hello)
    served = [(await gateway.chat(str(number))).headers["Gateway-Upstream"] for number in range(24)]
    assert "eu" in served[1:]


async def test_a_deployment_that_fails_is_left_alone_until_one_call_finds_it_well(start_gateway, upstream, other, caplog):
    gateway = await start_gateway(
        upstreams=pair(upstream, other), retries=RETRIES, ejection={"min_calls": 3, "first_s": 0.1, "window_s": 1000}
    )
    upstream.script = refuses(500)
    number = 0

    async def one_more():
        nonlocal number
        number += 1
        assert content(await gateway.chat(str(number))) == "Hello world"

    while not caplog.records:
        await one_more()
    assert "upstream eu fails too often: for 0.1 s it is asked only" in caplog.text
    failed, upstream.script = len(upstream.asked), say_hello
    assert failed >= 3
    while len(upstream.asked) == failed:  # until its time is over
        await one_more()
    assert number < 10_000
    for _ in range(20):
        await one_more()
    assert len(upstream.asked) > failed + 1


async def test_each_deployment_is_asked_by_its_own_name_of_the_model(start_gateway, upstream, other):
    eu, us = pair(upstream, other)
    eu |= {"models": [], "aliases": {"fast": "fast-eu"}}
    us |= {"models": [], "aliases": {"fast": "fast-us"}}
    gateway = await start_gateway(upstreams=[eu, us], retries=RETRIES)
    upstream.script = other.script = in_turn(refuses(500), say_hello)
    assert content(await gateway.chat(model="fast")) == "Hello world"
    assert ([body["model"] for body in upstream.bodies], [body["model"] for body in other.bodies]) == (
        ["fast-eu"],
        ["fast-us"],
    )
    await gateway.landed()
    assert (await gateway.chat(model="fast")).cache_status.startswith("gateway; hit")
    assert (await gateway.chat(model="slow")).status == 404


async def test_who_has_failed_is_not_asked_again_while_there_is_another(start_gateway, upstream, other):
    """However short the wait is that was drawn for it."""
    at_once = {**RETRIES, "backoff_s": 1e-9, "max_backoff_s": 1e-9}
    gateway = await start_gateway(upstreams=pair(upstream, other), retries=at_once, ejection={"enabled": False})
    for number in range(12):
        upstream.script = other.script = in_turn(refuses(500), say_hello)
        assert content(await gateway.chat(str(number))) == "Hello world"
        assert len(upstream.bodies) == len(other.bodies) == number + 1


async def test_only_deployments_that_serve_a_model_are_asked_for_it(start_gateway, upstream, other):
    eu, us = pair(upstream, other)
    gateway = await start_gateway(upstreams=[eu | {"models": ["a", "both"]}, us | {"models": ["b", "both"]}])
    for number in range(6):
        assert (await gateway.chat(str(number), model="a")).headers["Gateway-Upstream"] == "eu"
        assert (await gateway.chat(str(number), model="b")).headers["Gateway-Upstream"] == "us"


async def test_relayed_requests_are_spread_as_well_and_never_sent_twice(start_gateway, upstream, other):
    eu, us = pair(upstream, other)
    eu |= {"aliases": {"embed": "embed-eu"}}
    us |= {"aliases": {"embed": "embed-us"}}
    gateway = await start_gateway(upstreams=[eu, us], retries=RETRIES)

    async def echo(asked):
        await asked.answer({"model": asked.json["model"]})

    upstream.script = other.script = echo
    seen = set()
    while len(seen) < 2:
        got = await gateway.post("/v1/embeddings", {"model": "embed", "input": "x"})
        assert got.json["model"] == f"embed-{got.headers['Gateway-Upstream']}"
        seen.add(got.headers["Gateway-Upstream"])
    upstream.script = other.script = refuses(503)
    before = len(upstream.asked) + len(other.asked)
    assert (await gateway.post("/v1/embeddings", {"model": "embed", "input": "x"})).status == 503
    assert len(upstream.asked) + len(other.asked) == before + 1


async def test_a_group_lists_the_models_of_all(start_gateway, upstream, other):
    async def lists(asked):
        name = "model-eu" if asked.upstream is upstream else "model-us"
        await asked.answer({"object": "list", "data": [{"id": name, "object": "model"}]})

    gateway = await start_gateway(upstreams=pair(upstream, other))
    upstream.script = other.script = lists
    async with gateway.session.get(f"{gateway.base_url}/models") as response:
        assert {model["id"] for model in (await response.json())["data"]} == {"model-eu", "model-us"}
    upstream.script = refuses(500)
    async with gateway.session.get(f"{gateway.base_url}/models") as response:
        assert {model["id"] for model in (await response.json())["data"]} == {"model-us"}


# Several keys


def by_key(**answers):
    """Answers by the key that comes: a script each."""

    async def script(asked):
        await answers[asked.headers["authorization"].removeprefix("Bearer ")](asked)

    return script


def keys_of(upstream):
    return "".join(asked.headers["authorization"][-1] for asked in upstream.asked)


@pytest.fixture
async def keyed(start_gateway, upstream):
    return await start_gateway(
        {"KEY_A": "a", "KEY_B": "b"}, upstreams=[entry(upstream, "scripted", api_key_envs=["KEY_A", "KEY_B"])]
    )


@MODES
@pytest.mark.parametrize("status", [429, 401, 402])
async def test_a_key_that_is_refused_rests_and_the_next_one_serves(keyed, upstream, status, streamed):
    upstream.script = by_key(a=refuses(status, retry_after="60"), b=say_hello)
    for number in range(3):
        assert content(await keyed.chat(str(number), stream=streamed)) == "Hello world"
    assert keys_of(upstream) == "abbb"


async def test_where_all_keys_have_had_enough_the_caller_hears_when_the_first_one_has_not(keyed, upstream):
    upstream.script = by_key(a=refuses(429, retry_after="30"), b=refuses(429, retry_after="60"))
    got = await keyed.chat()
    assert (got.status, got.headers["retry-after"]) == (429, "30")
    assert keys_of(upstream) == "ab"


async def test_a_key_that_is_wrong_does_not_hide_that_the_other_one_has_had_enough(keyed, upstream):
    upstream.script = by_key(a=refuses(429, retry_after="30"), b=refuses(401))
    got = await keyed.chat()
    assert (got.status, got.headers["retry-after"]) == (429, "30")


# Queues


def narrow(upstream, **members):
    return [entry(upstream, "scripted", max_concurrent_calls=1, **members)]


async def held(asked):
    await asked.gate(asked.json["messages"][0]["content"])
    await say_hello(asked)


def waiting(gateway):
    (deployment,) = gateway.service._questions._router.upstreams[0].pool.deployments
    return deployment.slots.load - deployment.slots.taken


async def test_calls_beyond_the_limit_wait_for_their_turn_in_order(start_gateway, upstream):
    gateway = await start_gateway(upstreams=narrow(upstream))
    upstream.script = held
    asking = []
    for place, name in enumerate("abc"):
        asking.append(asyncio.ensure_future(gateway.chat(name, headers=NO_STORE)))
        await (upstream.gate("a").reached.wait() if place == 0 else turns(lambda place=place: waiting(gateway) == place))
    assert len(upstream.asked) == 1
    for name, each in zip("abc", asking, strict=True):
        await upstream.gate(name).reached.wait()
        assert len(upstream.asked) == "abc".index(name) + 1
        upstream.gate(name).released.set()
        assert content(await each) == "Hello world"


async def test_a_full_queue_is_told_at_once_and_hits_do_not_wait(start_gateway, upstream):
    gateway = await start_gateway(upstreams=narrow(upstream, max_queued_calls=1), retries=RETRIES)
    await gateway.chat("stored")
    await gateway.landed()
    upstream.script = held
    asking = [asyncio.ensure_future(gateway.chat(name)) for name in "ab"]
    await turns(lambda: waiting(gateway) == 1)
    got = await gateway.chat("c")
    assert (got.status, got.json["error"]["code"], got.headers["Retry-After"]) == (503, "upstream_busy", "1")
    assert (await gateway.chat("stored")).cache_status.startswith("gateway; hit")
    for name in "ab":
        upstream.gate(name).released.set()
    assert [content(await each) for each in asking] == ["Hello world"] * 2


async def test_nobody_waits_in_a_queue_for_longer_than_configured(start_gateway, upstream):
    gateway = await start_gateway(upstreams=narrow(upstream, queue_timeout_s=0.05))
    upstream.script = held
    first = asyncio.ensure_future(gateway.chat("a"))
    await upstream.gate("a").reached.wait()
    got = await gateway.chat("b", stream=True)
    assert (got.status, got.json["error"]["code"], got.headers["Retry-After"]) == (503, "upstream_busy", "1")
    upstream.gate("a").released.set()
    assert content(await first) == "Hello world"
    upstream.gate("b").released.set()
    assert content(await gateway.chat("b", headers=NO_STORE)) == "Hello world"


async def test_who_leaves_the_queue_makes_room(start_gateway, upstream):
    gateway = await start_gateway(upstreams=narrow(upstream, max_queued_calls=1))
    upstream.script = held
    first = asyncio.ensure_future(gateway.chat("a"))
    await upstream.gate("a").reached.wait()
    leaves = asyncio.ensure_future(gateway.chat("b", headers=NO_STORE))
    await turns(lambda: waiting(gateway) == 1)
    leaves.cancel()
    await turns(lambda: waiting(gateway) == 0)
    last = asyncio.ensure_future(gateway.chat("c"))
    await turns(lambda: waiting(gateway) == 1)
    for name in "ac":
        upstream.gate(name).released.set()
    assert [content(await each) for each in (first, last)] == ["Hello world"] * 2
    assert [body["messages"][0]["content"] for body in upstream.bodies] == ["a", "c"]


async def test_a_busy_deployment_is_passed_over_and_a_busy_upstream_stood_in_for(start_gateway, upstream, other):
    entries = standing_in(upstream, other, api_key_env="KEY")
    entries["upstreams"][0] |= {"max_concurrent_calls": 1, "max_queued_calls": 0}
    gateway = await start_gateway({"KEY": "k"}, **entries)
    upstream.script = held
    first = asyncio.ensure_future(gateway.chat("a"))
    await upstream.gate("a").reached.wait()
    assert (await gateway.chat("b")).headers["Gateway-Upstream"] == "backup"
    upstream.gate("a").released.set()
    assert (await first).headers["Gateway-Upstream"] == "first"


async def test_a_slot_is_free_again_after_every_kind_of_end(start_gateway, upstream):
    gateway = await start_gateway(
        upstreams=narrow(upstream, max_queued_calls=0), flights={"first_byte_timeout_s": 0.1}, ejection={"enabled": False}
    )
    for fault in FAULTS:
        upstream.script = fault
        assert (await gateway.chat(headers=NO_STORE)).status >= 400
    upstream.script = held
    leaves = asyncio.ensure_future(gateway.chat("x", headers=NO_STORE))
    await upstream.gate("x").reached.wait()
    leaves.cancel()
    await gateway.landed()
    upstream.script = say_hello
    assert content(await gateway.chat(headers=NO_STORE)) == "Hello world"


async def test_a_turn_that_comes_in_the_moment_in_which_its_owner_leaves_goes_to_the_next():
    slots = Slots(1, 5, 10.0)
    first = await slots.take()
    leaves, stays = (asyncio.ensure_future(slots.take()) for _ in range(2))
    await turns(lambda: slots.load == 3)
    first.release()
    first.release()  # once is enough
    leaves.cancel()
    (await stays).release()
    assert (slots.load, slots.taken) == (0, 0)
    assert leaves.cancelled()
    slots = Slots(1, 0, 10.0)
    await slots.take()
    with pytest.raises(UpstreamBusy):
        await slots.take()


# Time-outs by model


async def test_how_long_a_model_may_take_is_its_own(start_gateway, upstream):
    gateway = await start_gateway(
        models=[
            {"names": ["late"], "first_byte_timeout_s": 0.05},
            {"names": ["idle"], "idle_timeout_s": 0.05},
            {"names": ["total"], "total_timeout_s": 0.05},
        ]
    )
    upstream.script = says_nothing
    got = await gateway.chat(model="late", stream=True)
    assert (got.status, got.json["error"]["code"]) == (504, "upstream_timeout")
    got = await gateway.chat(model="total", stream=True)
    assert (got.status, got.json["error"]["code"]) == (504, "upstream_timeout")

    async def begins(asked):
        await asked.head()
        await asked.event(chunk({"content": "x"}))
        await asked.gate("never")

    upstream.script = begins
    got = await gateway.chat(model="idle", stream=True)
    assert json.loads(got.events[-1])["error"]["code"] == "upstream_timeout"
    for asked in upstream.asked:
        await asked.gone.wait()


async def test_a_silence_that_a_model_may_have_is_not_cut_by_the_upstreams_own_limit(start_gateway, upstream):
    gateway = await start_gateway(
        upstreams=[entry(upstream, "scripted", idle_timeout_s=0.05)],
        models=[{"names": ["patient"], "idle_timeout_s": 20, "first_byte_timeout_s": 20}],
    )
    upstream.script = in_turn(says_nothing, held)
    assert (await gateway.chat("x", model="hasty")).status == 504
    patient = asyncio.ensure_future(gateway.chat("x", model="patient"))
    await upstream.gate("x").reached.wait()
    assert (await gateway.chat("y", model="hasty")).status == 504
    upstream.gate("x").released.set()
    assert content(await patient) == "Hello world"


async def test_a_connection_that_cannot_be_made_in_time_is_given_up(start_gateway, upstream):
    with socket.create_server(("127.0.0.1", 0), backlog=1) as full, ExitStack() as stack:
        port = full.getsockname()[1]
        for _ in range(3):  # nobody accepts: from now on nobody is even greeted
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        gateway = await start_gateway(
            upstreams=[entry(upstream, "scripted", base_url=f"http://127.0.0.1:{port}/v1")],
            models=[{"names": ["*"], "connect_timeout_s": 0.1}],
        )
        async with asyncio.timeout(3):
            got = await gateway.chat()
    assert (got.status, got.json["error"]["code"]) == (502, "upstream_unreachable")


async def test_an_upstream_is_made_without_a_stall(start_gateway, upstream, monkeypatch):
    """All roots take 40 ms to load, in which a reload would stop every stream."""
    loaded = []
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *arguments, **_: loaded.append(arguments))
    gateway = await start_gateway()
    assert content(await gateway.chat()) == "Hello world"
    assert not loaded


# Streams that do not end


async def test_an_endless_stream_ends_when_its_time_is_over(start_gateway, upstream):
    async def endless(asked):
        await asked.head()
        while not asked.gone.is_set():
            await asked.event(chunk({"content": "on and "}))
            await asyncio.sleep(0)

    upstream.script = endless
    gateway = await start_gateway(models=[{"names": ["*"], "total_timeout_s": 0.3}], flights={"max_flight_bytes": 100_000})
    got = await gateway.chat(stream=True)
    assert (got.status, json.loads(got.events[-1])["error"]["code"]) == (200, "upstream_timeout")
    await upstream.asked[0].gone.wait()
    assert not await gateway.stores()


@pytest.mark.parametrize("begun", [True, False])
async def test_a_frame_that_trickles_and_never_ends_is_a_silence(start_gateway, upstream, begun):
    async def trickles(asked):
        await asked.head()
        if begun:
            await asked.event(chunk({"content": "x"}))
        await asked.send(b"data: ")
        while not asked.gone.is_set():
            await asked.send(b" ")
            await asyncio.sleep(0.005)

    upstream.script = trickles
    gateway = await start_gateway(models=[{"names": ["*"], "first_byte_timeout_s": 0.1, "idle_timeout_s": 0.1}])
    got = await gateway.chat(stream=True)
    error = json.loads(got.events[-1]) if begun else got.json
    assert (got.status, error["error"]["code"]) == (200 if begun else 504, "upstream_timeout")
    await upstream.asked[0].gone.wait()


async def test_a_stream_that_trickles_byte_by_byte_is_read_as_it_comes(start_gateway, upstream):
    """Each byte for itself, and the caller has each frame before the next one begins."""
    gateway = await start_gateway()
    frames = [f"data: {json.dumps(chunk({'content': word}))}\n\n".encode() for word in ("Hel", "lo")]

    async def trickles(asked):
        await asked.head()
        for place, frame in enumerate(frames):
            for at in range(len(frame)):
                await asked.send(frame[at : at + 1])
                await asyncio.sleep(0)
            await asked.gate(f"frame {place}")
        await asked.event(chunk({}, "stop"))
        await asked.done()

    upstream.script = trickles
    async with gateway.opened(stream=True) as response:
        for place, word in enumerate(("Hel", "lo")):
            assert word in await next_block(response)
            await upstream.gate(f"frame {place}").reached.wait()
            upstream.gate(f"frame {place}").released.set()
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_many_tokens_cost_no_retry_machinery(start_gateway, upstream):
    """A stream that goes well passes unchanged, whatever stands ready."""
    gateway = await start_gateway(retries=RETRIES)

    async def long(asked):
        await stream(asked, *(str(number) for number in range(200)))

    upstream.script = long
    assert content(await gateway.chat(stream=True)) == "".join(str(number) for number in range(200))

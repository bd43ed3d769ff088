"""Faults on demand: what the caller gets goes wrong, what is stored and what others get does not."""

import json
import time
from contextlib import suppress

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from running import next_block
from scripted import chunk

from gateway.config import load
from gateway.errors import ConfigError

ALLOWED = {"allowed": True}
HIT = "gateway; hit"


def fault(text):
    return {"Gateway-Fault": text}


@pytest.fixture
async def gateway(start_gateway):
    return await start_gateway(faults=ALLOWED)


@pytest.fixture(params=["hit", "miss"])
async def asked_about(request, gateway):
    """A prompt that is answered from the cache, and one that is not."""
    if request.param == "hit":
        await gateway.chat("hit")
        await gateway.landed()
    return request.param


async def whole_of(gateway, content):
    """What others get, which is stored and right."""
    await gateway.landed()
    got = await gateway.chat(content, stream=True)
    assert got.cache_status.startswith(HIT)
    assert got.events[-1] == "[DONE]"
    assert [json.loads(event)["choices"][0]["delta"] for event in got.events[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
        {"content": " world"},
        {},
    ]
    return got


async def broken(gateway, content, text, **members):
    """What comes of an answer until its connection breaks."""
    got = b""
    async with gateway.opened(content, headers=fault(text), **members) as response:
        try:
            while data := await response.content.readany():
                got += data
        except aiohttp.ClientPayloadError:
            return response, got
    raise AssertionError("the answer is complete")


async def test_a_refusal_has_its_status_and_says_when_to_come_back(gateway, upstream, asked_about):
    before = len(upstream.asked)
    got = await gateway.chat(asked_about, headers=fault("status=429;retry_after=7"))
    assert (got.status, got.headers["Retry-After"], got.json["error"]["code"]) == (429, "7", "injected_fault")
    assert got.headers["Gateway-Fault"] == "status=429;retry_after=7"
    assert got.cache_status == "gateway; detail=fault"
    assert len(upstream.asked) == before


async def test_a_cut_breaks_the_connection_after_so_many_frames(gateway, asked_about):
    response, got = await broken(gateway, asked_about, "cut;after=2", stream=True)
    assert response.headers["Gateway-Fault"] == "cut;after=2"
    assert response.headers["Cache-Control"] == "no-store, no-transform"
    assert (got.count(b"data: "), got.endswith(b"\n\n"), b"[DONE]" in got) == (2, True, False)
    await whole_of(gateway, asked_about)


async def test_a_whole_answer_is_cut_in_its_middle(gateway, asked_about):
    response, got = await broken(gateway, asked_about, "cut")
    assert len(got) == int(response.headers["Content-Length"]) // 2
    assert response.headers["Cache-Control"] == "no-store"
    await whole_of(gateway, asked_about)


async def test_a_cut_stream_can_be_resumed(gateway, asked_about):
    response, got = await broken(gateway, asked_about, "cut;after=2", stream=True)
    stream = response.headers["Gateway-Stream-Id"]
    async with gateway.session.get(f"{gateway.base_url}/streams/{stream}?after=2") as rest:
        whole = got + await rest.read()
    assert (whole.count(b"data: "), whole.endswith(b"data: [DONE]\n\n")) == (5, True)


async def test_a_malformed_frame_is_one_and_all_others_are_right(gateway, asked_about):
    got = await gateway.chat(asked_about, stream=True, headers=fault("malformed;after=1"))
    right = await whole_of(gateway, asked_about)
    assert len(got.events) == len(right.events) == 5
    wrong = []
    for place, event in enumerate(got.events[:-1]):
        try:
            json.loads(event)
        except ValueError:
            wrong.append(place)
    assert wrong == [1]
    assert got.events[-1] == "[DONE]"


async def test_a_whole_answer_that_is_malformed_is_complete_as_http_and_no_json(gateway, asked_about):
    got = await gateway.chat(asked_about, headers=fault("malformed"))
    assert (got.status, len(got.body)) == (200, int(got.headers["Content-Length"]))
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        _ = got.json
    await whole_of(gateway, asked_about)


async def test_an_error_event_ends_the_stream(gateway, asked_about):
    got = await gateway.chat(asked_about, stream=True, headers=fault("error;after=1"))
    *shown, last = got.events
    assert (got.status, len(shown), json.loads(last)["error"]["code"]) == (200, 1, "injected_fault")
    await whole_of(gateway, asked_about)
    got = await gateway.chat(asked_about, headers=fault("error"))
    assert (got.status, got.json["error"]["code"]) == (500, "injected_fault")


@pytest.mark.parametrize("text", ["cut;after=99", "malformed;after=99", "error;after=99"])
async def test_a_fault_beyond_the_end_comes_at_the_end(gateway, text):
    await gateway.chat("hit")
    await gateway.landed()
    if text.startswith("cut"):
        _, got = await broken(gateway, "hit", text, stream=True)
    else:
        got = (await gateway.chat("hit", stream=True, headers=fault(text))).body
    assert got.count(b"data: ") == {"cut": 4, "malformed": 6, "error": 5}[text.partition(";")[0]]
    assert (b"[DONE]" in got) is text.startswith("malformed")


async def test_a_fault_before_the_first_frame_does_not_wait_for_it(gateway, upstream):
    async def script(asked):
        await asked.head()
        await asked.gate("never")

    upstream.script = script
    for text in ("cut;after=0", "error;after=0"):
        async with gateway.opened(text, stream=True, headers={**fault(text), "Cache-Control": "no-store"}) as response:
            assert response.status == 200
            with suppress(aiohttp.ClientPayloadError):
                assert b"injected_fault" in await response.read()


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("text", ["stall=0.1;after=2", "slow=0.1"])
async def test_what_stalls_or_is_slow_comes_in_full_and_later(gateway, asked_about, text, streamed):
    began = time.monotonic()
    got = await gateway.chat(asked_about, stream=streamed, headers=fault(text))
    assert time.monotonic() - began >= 0.1
    assert got.status == 200
    if streamed:
        assert got.events == [*got.events[:-1], "[DONE]"]
        assert len(got.events) == 5
    else:
        assert got.json["choices"][0]["message"]["content"] == "Hello world"


async def test_a_stall_is_silent(start_gateway):
    gateway = await start_gateway(faults=ALLOWED, server={"keepalive_s": 0.01})
    async with gateway.opened(stream=True, headers=fault("stall=0.3;after=1")) as response:
        first = await next_block(response)
        second = await next_block(response)
    assert first.startswith("data: ")
    assert second.startswith("data: ")


async def test_a_slow_first_token_shifts_a_paced_replay_and_does_not_bunch_it(start_gateway):
    gateway = await start_gateway(faults=ALLOWED, replay={"pace": "fixed", "tokens_per_s": 20})
    await gateway.chat("hit")
    await gateway.landed()
    began = time.monotonic()
    await gateway.chat("hit", stream=True, headers=fault("slow=0.2"))
    assert time.monotonic() - began >= 0.2 + 2 / 20


async def test_who_reads_the_same_answer_notices_nothing(gateway, upstream):
    async def script(asked):
        await asked.head()
        await asked.event(chunk({"content": "Hello"}))
        await asked.gate("both are there")
        await asked.event(chunk({"content": " world"}))
        await asked.event(chunk({}, "stop"))
        await asked.done()

    upstream.script = script
    async with gateway.opened(stream=True) as other:
        assert "Hello" in await next_block(other)
        _, got = await broken(gateway, "hi", "cut;after=1", stream=True)
        assert got.count(b"data: ") == 1
        upstream.gate("both are there").released.set()
        assert (await other.read()).endswith(b"data: [DONE]\n\n")
    assert len(upstream.asked) == 1


async def test_events_with_ids_are_cut_between_two(gateway):
    await gateway.chat("hit")
    await gateway.landed()
    headers = {**fault("malformed;after=1"), "Gateway-Event-Ids": "?1"}
    got = await gateway.chat("hit", stream=True, headers=headers)
    blocks = got.body.decode().split("\n\n")
    assert all(block.startswith("id: ") for block in blocks[:-1])
    assert blocks[1].count("\n") == 1
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(blocks[1].partition("data: ")[2])


# Which faults


@pytest.mark.parametrize("text", ["cut", "status=500;rate=0", ""])
async def test_without_leave_no_fault_can_be_asked_for(start_gateway, upstream, text):
    gateway = await start_gateway(models=[{"names": ["*"], "faults": [{"kind": "status"}]}])
    got = await gateway.chat(headers=fault(text))
    assert (got.status, got.json["error"]["param"]) == (400, "Gateway-Fault")
    assert (await gateway.chat()).status == 200
    assert len(upstream.asked) == 1


@pytest.mark.parametrize(
    "text",
    [
        "cut=1", "boom", "status", "status=200", "status=600", "stall", "stall=-1", "cut;after=-1", "cut;after=1.5",
        "cut;when=1", "error;rate=1.1", "cut, error", "cut;rate=0.6, error;rate=0.5", "seed=x",
        "status=500;retry_after=soon", "slow=1;after=1",
    ],
)  # fmt: skip
async def test_what_is_no_fault_is_refused(gateway, upstream, text):
    got = await gateway.chat(headers=fault(text))
    assert (got.status, got.json["error"]["param"]) == (400, "Gateway-Fault")
    assert upstream.asked == []


async def statuses(gateway, number=40, **headers):
    return [(await gateway.chat(headers=headers)).status for _ in range(number)]


async def test_faults_by_rate_are_the_same_from_the_same_seed(start_gateway):
    models = [{"names": ["model-*"], "faults": [{"kind": "status", "status": 429, "rate": 0.3, "retry_after_s": 1}]}]
    one, same, other = [
        await start_gateway(faults={"allowed": True, "seed": seed}, models=models) for seed in (1, 1, 2)
    ]  # fmt: skip
    found = await statuses(one)
    assert set(found) == {200, 429}
    assert found == await statuses(same)
    assert found != await statuses(other)
    assert set(await statuses(one, 20, **{"Gateway-Fault": "cut;rate=0"})) == {200}
    async with one.session.post(f"{one.base_url}/chat/completions", json={"model": "other", "messages": []}) as response:
        assert response.status == 200


async def test_a_seed_of_the_callers_own_gives_the_same_each_time(gateway):
    asked = [f"status=500;rate=0.5, seed={seed}" for seed in range(12)]
    first, second = [[(await gateway.chat(headers=fault(text))).status for text in asked] for _ in range(2)]
    assert first == second
    assert set(first) == {200, 500}


@pytest.mark.parametrize(
    ("faults", "problem"),
    [
        ([{"kind": "status", "status": 200}], "models.0.faults.0.status"),
        ([{"kind": "boom"}], "models.0.faults.0.kind"),
        ([{"kind": "cut", "rate": 0.6}, {"kind": "error", "rate": 0.5}], "models.0.faults: their rates come to more than 1"),
        ([{"kind": "cut", "afer": 1}], "models.0.faults.0.afer: is not a key"),
    ],
)
def test_faults_that_cannot_be_are_told_by_their_path(faults, problem):
    with pytest.raises(ConfigError, match=problem):
        load(None, {"GATEWAY_MODELS": json.dumps([{"names": ["a"], "faults": faults}])})


# In the official client


CLIENT_RAISES = {
    "status=429": openai.RateLimitError,
    "cut;after=1": openai.APIConnectionError,
    "malformed;after=1": ValueError,
    "error;after=1": openai.APIError,
}


@pytest.mark.parametrize(("text", "error"), CLIENT_RAISES.items())
async def test_the_official_client_raises_on_each(gateway, text, error):
    body = {"model": "model-1", "messages": [{"role": "user", "content": "hit"}], "stream": True}
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="k", max_retries=0) as client:
        with pytest.raises(error):
            _ = [each async for each in await client.chat.completions.create(**body, extra_headers=fault(text))]

"""The simulated model: deterministic, paced, and OpenAI's in every form of answer."""

import asyncio
import math
import time

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import SimulatedUpstreamConfig
from gateway.core.apis import CHAT, COMPLETIONS
from gateway.core.apis.base import tokens
from gateway.errors import InvalidRequest, PathNotFound
from gateway.ports import Call
from gateway.upstreams.simulated import SimulatedUpstream

pytestmark = pytest.mark.usefixtures("no_task_is_left")

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 2, "maximum": 4},
        "share": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "detail": {"const": "full"},
        "retries": {"type": "integer", "default": 3},
        "stops": {"type": "array", "items": {"$ref": "#/$defs/stop"}, "minItems": 2},
        "note": {"type": "string"},
    },
    "required": ["city", "unit", "days", "share", "detail", "retries", "stops"],
    "$defs": {
        "stop": {
            "type": "object",
            "properties": {"on": {"type": "string", "format": "date"}, "night": {"type": ["null", "boolean"]}},
            "required": ["on", "night"],
        }
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
]


def upstream(**settings):
    settings = {"ttft_s": 0, "tokens_per_s": 1e6, **settings}
    return SimulatedUpstream(SimulatedUpstreamConfig(kind="simulated", name="sim", models=("sim-1", "sim-*"), **settings))


def chat(content="Why is the sky blue?", **members):
    return Call(CHAT, {"model": "sim-1", "messages": [{"role": "user", "content": content}], **members}, streamed=True)


def completion(prompt, **members):
    return Call(COMPLETIONS, {"model": "sim-1", "prompt": prompt, **members}, streamed=True)


async def batches_of(call, **settings):
    async with upstream(**settings).ask(call) as answer:
        return [batch async for batch in answer.batches]


async def chunks_of(call, **settings):
    events = [event for batch in await batches_of(call, **settings) for event in batch]
    assert events.pop() == b"[DONE]"
    return [orjson.loads(event) for event in events]


async def body_of(call, **settings):
    assembler = call.api.assembler()
    for chunk in await chunks_of(call, **settings):
        assembler.add(chunk)
    return assembler.body()


async def text_of(call, **settings):
    choice = (await body_of(call, **settings))["choices"][0]
    return choice["message"]["content"] if call.api is CHAT else choice["text"]


async def test_the_same_request_gets_the_same_answer_under_a_fresh_identity():
    one, other = await body_of(chat()), await body_of(chat())
    assert one["choices"] == other["choices"]
    assert one["usage"] == other["usage"]
    assert one["id"] != other["id"]
    assert one["id"].startswith("chatcmpl-")
    assert len(one["id"].removeprefix("chatcmpl-")) >= 24


async def test_what_does_not_change_the_answer_does_not_change_the_text():
    assert await text_of(chat(user="ada", stream=True, temperature=1)) == await text_of(chat(temperature=1.0))


@pytest.mark.parametrize("members", [{"content": "Why is the sea blue?"}, {"seed": 2}, {"model": "sim-2"}, {"top_k": 5}])
async def test_another_request_gets_another_answer(members):
    assert await text_of(chat(**members)) != await text_of(chat())


async def test_the_answer_takes_up_what_the_user_said_last_and_names_redis():
    parts = [{"type": "text", "text": "Tell me\n of   tides"}, {"type": "image_url", "image_url": {"url": "x"}}]
    text = await text_of(chat(parts))
    assert "“Tell me of tides”" in text
    assert "Redis" in text


async def test_braces_in_the_users_words_are_only_words():
    assert "{city} {0}" in await text_of(chat("{city} {0}"))


@pytest.mark.parametrize("length", [1, 2, 5, 12, 13, 14, 60, 120, 1000])
async def test_the_answer_has_exactly_the_length_that_is_configured(length):
    body = await body_of(chat(), length_tokens=length)
    assert len(tokens(body["choices"][0]["message"]["content"])) == length
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == length


async def test_a_chat_stream_opens_with_the_role_and_ends_with_usage_that_no_other_chunk_names():
    *chunks, usage = await chunks_of(chat())
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("usage" not in chunk for chunk in chunks)
    assert usage["choices"] == []
    counts = usage["usage"]
    assert counts["total_tokens"] == counts["prompt_tokens"] + counts["completion_tokens"]
    assert {(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in [*chunks, usage]} == {
        (usage["id"], usage["created"], "sim-1", "chat.completion.chunk")
    }


async def test_several_choices_are_interleaved_and_each_says_something_else():
    chunks = await chunks_of(chat(n=3))
    assert [chunk["choices"][0]["index"] for chunk in chunks[:9]] == [0, 0, 1, 1, 2, 2, 0, 1, 2]
    choices = (await body_of(chat(n=3)))["choices"]
    assert len({choice["message"]["content"] for choice in choices}) == 3
    assert [choice["finish_reason"] for choice in choices] == ["stop"] * 3


async def test_more_choices_than_openai_gives_are_refused():
    with pytest.raises(InvalidRequest) as caught:
        await body_of(chat(n=129))
    assert caught.value.param == "n"


@pytest.mark.parametrize("stop", ["Redis", ["nowhere", "Redis", "tokens come out of Redis"], ["", "Redis"]])
async def test_a_stop_sequence_ends_the_text_before_itself(stop):
    body = await body_of(chat(stop=stop), length_tokens=300)
    text = body["choices"][0]["message"]["content"]
    whole = await text_of(chat(), length_tokens=300)
    assert "Redis" in whole
    assert text
    assert "Redis" not in text
    assert body["choices"][0]["finish_reason"] == "stop"


async def test_a_stop_that_is_no_text_is_refused():
    with pytest.raises(InvalidRequest) as caught:
        await body_of(chat(stop=[7]))
    assert caught.value.param == "stop"


@pytest.mark.parametrize("member", ["max_tokens", "max_completion_tokens"])
async def test_a_token_limit_cuts_the_text_and_says_so(member):
    body = await body_of(chat(**{member: 7}))
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 7


async def test_a_token_limit_that_is_not_reached_changes_no_finish_reason():
    assert (await body_of(chat(max_tokens=120), length_tokens=120))["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("limit", ["7", -1, 1.5, True])
async def test_a_token_limit_that_is_no_count_is_refused(limit):
    with pytest.raises(InvalidRequest) as caught:
        await body_of(chat(max_tokens=limit))
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("required", "look"),
        ({"type": "function", "function": {"name": "weather"}}, "weather"),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]},
            },
            "weather",
        ),
    ],
)
async def test_a_demanded_tool_is_called(choice, name):
    chunks = await chunks_of(chat(tools=TOOLS, tool_choice=choice))
    body = await body_of(chat(tools=TOOLS, tool_choice=choice))
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == name
    assert call["id"].startswith("call_")
    assert body["choices"][0]["message"]["content"] is None
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    heads = [chunk for chunk in chunks if '"name"' in orjson.dumps(chunk).decode()]
    assert len(heads) == 1


async def test_arguments_come_in_fragments_and_fit_the_schema():
    call = chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "weather"}})
    assert len(await chunks_of(call)) > 5
    arguments = orjson.loads((await body_of(call))["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])
    assert list(arguments) == WEATHER["required"]
    assert arguments["unit"] in ("celsius", "fahrenheit")
    assert 2 <= arguments["days"] <= 4
    assert 0 < arguments["share"] <= 1
    assert (arguments["detail"], arguments["retries"]) == ("full", 3)
    assert len(arguments["stops"]) == 2
    assert all(isinstance(stop["night"], bool) for stop in arguments["stops"])


@pytest.mark.parametrize("choice", [None, "auto", "none"])
async def test_a_tool_that_is_not_demanded_is_not_called(choice):
    body = await body_of(chat(tools=TOOLS, tool_choice=choice))
    assert "tool_calls" not in body["choices"][0]["message"]
    assert body["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "members",
    [
        {"tool_choice": "required"},
        {"tool_choice": "perhaps", "tools": TOOLS},
        {"tool_choice": {"type": "function", "function": {"name": "nobody"}}, "tools": TOOLS},
        {"tool_choice": "required", "tools": [{"type": "custom", "custom": {"name": "grep"}}]},
    ],
)
async def test_a_demand_for_a_tool_that_is_not_there_is_refused(members):
    with pytest.raises(InvalidRequest) as caught:
        await body_of(chat(**members))
    assert caught.value.param == "tool_choice"


async def test_json_is_answered_where_json_is_asked_for():
    answer = orjson.loads(await text_of(chat(response_format={"type": "json_object"})))
    assert answer["question"] == "Why is the sky blue?"
    wanted = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER}}
    assert set(orjson.loads(await text_of(chat(response_format=wanted)))) == set(WEATHER["required"])


SELF = {"$ref": "#"}
ODD_SCHEMAS = [
    None,
    True,
    {"type": "object", "required": list("abcdefgh"), "properties": dict.fromkeys("abcdefgh", SELF)},
    SELF,
    {"allOf": [SELF] * 20},
    {"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**9}},
    {"type": "integer", "minimum": "low", "maximum": None, "multipleOf": 0},
    {"type": "number", "minimum": -1e300, "maximum": 1e300, "multipleOf": 1e-300},
    {"properties": 7, "required": 8, "enum": 9, "type": "object"},
    {"anyOf": [{"type": "null"}, {"allOf": [{"type": "object", "properties": {"a": {}}}, {"required": ["a"]}]}]},
]


@pytest.mark.parametrize("schema", ODD_SCHEMAS)
async def test_no_schema_is_too_odd_or_too_large(schema):
    wanted = {"type": "json_schema", "json_schema": {"name": "odd", "schema": schema}}
    text = await text_of(chat(response_format=wanted))
    orjson.loads(text)
    assert len(text) < 5_000_000


@given(low=st.integers(-100, 100), span=st.integers(0, 50), kind=st.sampled_from(["integer", "number"]))
def test_a_number_lies_within_its_bounds(low, span, kind):
    schema = {"type": kind, "minimum": low, "maximum": low + span}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    number = orjson.loads(asyncio.run(text_of(chat(response_format=wanted))))
    assert low <= number <= low + span
    assert kind == "number" or number == math.floor(number)


async def test_log_probabilities_are_given_token_by_token():
    choice = (await body_of(chat(logprobs=True, top_logprobs=2)))["choices"][0]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    assert all(entry["logprob"] <= 0 and bytes(entry["bytes"]).decode() == entry["token"] for entry in entries)
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in entries)
    assert max(len(entry["top_logprobs"]) for entry in entries) == 2


async def test_a_completion_has_an_answer_for_each_prompt_and_choice_in_order():
    body = await body_of(completion(["of tides", "of stars"], n=2))
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    texts = [choice["text"] for choice in body["choices"]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert ["of tides" in text for text in texts] == [True, True, False, False]
    assert len(set(texts)) == 4


async def test_a_completion_echoes_its_prompt_and_counts_offsets_from_it():
    choice = (await body_of(completion("of tides", echo=True, logprobs=1)))["choices"][0]
    assert choice["text"].startswith("of tides")
    offsets, said = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert all(choice["text"][at : at + len(token)] == token for at, token in zip(offsets, said, strict=True))


@pytest.mark.parametrize(
    ("prompt", "choices", "count"), [([1, 2, 3], 1, 3), ([[1, 2], [3]], 2, 3), (None, 1, 0), ([], 1, 0)]
)
async def test_prompts_of_tokens_or_of_nothing_are_answered_too(prompt, choices, count):
    body = await body_of(completion(prompt))
    assert len(body["choices"]) == choices
    assert body["usage"]["prompt_tokens"] == count


async def test_the_stream_keeps_its_schedule():
    started = time.monotonic()
    batches = await batches_of(chat(), ttft_s=0.03, tokens_per_s=1000, length_tokens=40)
    assert time.monotonic() - started >= 0.03 + 39 / 1000
    assert len(batches) > 1


async def test_tokens_that_fall_due_together_leave_together():
    assert len(await batches_of(chat(), tokens_per_s=1e9)) <= 3


async def test_a_reader_may_leave_at_any_time():
    async with upstream(ttft_s=3600).ask(chat()) as answer:
        waiting = asyncio.ensure_future(anext(answer.batches))
        await asyncio.wait([waiting], timeout=0)
        waiting.cancel()
        await asyncio.wait([waiting])
    assert waiting.cancelled()


async def test_only_exact_names_are_listed_as_models():
    (model,) = await upstream().models({})
    assert model == {"id": "sim-1", "object": "model", "created": 0, "owned_by": "sim"}


async def test_no_other_path_is_served():
    with pytest.raises(PathNotFound, match="simulated"):
        async with upstream().relay("POST", "embeddings", {}, b""):
            pass


async def test_through_the_gateway_it_limits_lengths_and_tells_usage_to_who_asks_for_it(start_gateway):
    simulated = {
        "name": "s",
        "kind": "simulated",
        "models": ["*"],
        "ttft_s": 0,
        "tokens_per_s": 1e6,
        "length_sd_tokens": 50,
    }
    gateway = await start_gateway(upstreams=[simulated])
    plain = await gateway.chat("hi", stream=True, max_tokens=3)
    asked = await gateway.chat("hi", stream=True, max_tokens=3, stream_options={"include_usage": True})
    chunks = [orjson.loads(text) for text in plain.events[:-1]]
    assert plain.events[-1] == asked.events[-1] == "[DONE]"
    assert not any(chunk.get("usage") for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    usage = orjson.loads(asked.events[-2])["usage"]
    assert usage["completion_tokens"] == 3
    whole = (await gateway.chat("hi", max_tokens=3)).json
    assert (whole["usage"], whole["choices"][0]["finish_reason"]) == (usage, "length")

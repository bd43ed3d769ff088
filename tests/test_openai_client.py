"""The official `openai` client is the judge of compatibility: what it reads from a hit is what it read from the miss."""

import asyncio
import base64
from itertools import product

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from scripted import USAGE, chunk, text_chunk

MODES = ("stream", "whole")
FILLS_AND_HITS = [pytest.param(*pair, id="{}-fills-{}".format(*pair)) for pair in product(MODES, MODES)]
NO_STORE = {"Cache-Control": "no-store"}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("weather", "time")]
AUDIO = base64.b64encode(bytes(range(60))).decode()


def call_fragment(index, arguments, name=None, **members):
    head = {"id": f"call_{name}", "type": "function"} if name else {}
    function = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
    return chunk({"tool_calls": [{"index": index, **head, "function": function}]}, **members)


def tool_call(name, arguments):
    return {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}


def with_logprobs(answered, **logprobs):
    answered["choices"][0]["logprobs"] = logprobs
    return answered


def token(text):
    return {"token": text, "bytes": list(text.encode()), "logprob": -0.5, "top_logprobs": []}


ROLE = chunk({"role": "assistant", "content": ""})
SPOKEN = {"id": "audio_1", "transcript": "Hello there", "expires_at": 1700003600, "data": AUDIO}

# What is asked for, the chunks of the answer, and the choices of the same answer in one piece.
CHAT = {
    "text": (
        {},
        [ROLE, chunk({"content": "Hé"}), chunk({"content": "llo\n\n\u2028 \U0001f600"}), chunk({}, "stop")],
        [{"message": {"content": "Héllo\n\n\u2028 \U0001f600"}, "finish_reason": "stop"}],
    ),
    "parallel tool calls in fragments": (
        {"tools": TOOLS},
        [
            chunk({"role": "assistant", "content": None}),
            call_fragment(0, "", "weather"),
            call_fragment(0, '{"city": "O'),
            call_fragment(1, "", "time"),
            call_fragment(0, 'slo"}'),
            call_fragment(1, '{"zone":'),
            call_fragment(1, ' "CET"}'),
            chunk({}, "tool_calls"),
        ],
        [
            {
                "message": {
                    "content": None,
                    "tool_calls": [tool_call("weather", '{"city": "Oslo"}'), tool_call("time", '{"zone": "CET"}')],
                },
                "finish_reason": "tool_calls",
            }
        ],
    ),
    "function call": (
        {"functions": [{"name": "weather", "parameters": {}}]},
        [
            chunk({"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": ""}}),
            chunk({"function_call": {"arguments": '{"a":'}}),
            chunk({"function_call": {"arguments": " 1}"}}),
            chunk({}, "function_call"),
        ],
        [
            {
                "message": {"content": None, "function_call": {"name": "weather", "arguments": '{"a": 1}'}},
                "finish_reason": "function_call",
            }
        ],
    ),
    "two choices, interleaved": (
        {"n": 2},
        [
            chunk({"role": "assistant", "content": ""}, index=1),
            ROLE,
            chunk({"content": "one"}),
            chunk({"content": "two"}, index=1),
            chunk({"content": " more"}),
            chunk({}, "stop", index=1),
            chunk({}, "stop"),
        ],
        [
            {"message": {"content": "one more"}, "finish_reason": "stop"},
            {"index": 1, "message": {"content": "two"}, "finish_reason": "stop"},
        ],
    ),
    "logprobs": (
        {"logprobs": True},
        [
            ROLE,
            with_logprobs(chunk({"content": "A"}), content=[token("A")], refusal=None),
            with_logprobs(chunk({"content": " b"}), content=[token(" b")], refusal=None),
            chunk({}, "stop"),
        ],
        [
            {
                "message": {"content": "A b"},
                "logprobs": {"content": [token("A"), token(" b")], "refusal": None},
                "finish_reason": "stop",
            }
        ],
    ),
    "refusal": (
        {},
        [
            chunk({"role": "assistant", "content": None, "refusal": ""}),
            chunk({"refusal": "I can't"}),
            chunk({"refusal": " help."}),
            chunk({}, "stop"),
        ],
        [{"message": {"content": None, "refusal": "I can't help."}, "finish_reason": "stop"}],
    ),
    "reasoning and unknown members": (
        {"extra_body": {"top_k": 3}},
        [
            chunk({"role": "assistant", "reasoning_content": "Let me"}, provider="acme"),
            chunk({"reasoning_content": " think."}, provider="acme"),
            chunk({"content": "42", "mood": {"glad": 1}}, provider="acme", system_fingerprint="fp_1"),
            chunk({}, "stop", provider="acme", service_tier="default"),
        ],
        [
            {
                "message": {"content": "42", "reasoning_content": "Let me think.", "mood": {"glad": 1}},
                "finish_reason": "stop",
            }
        ],
    ),
    "audio": (
        {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}},
        [
            chunk({"role": "assistant", "audio": {"id": "audio_1", "transcript": "Hello"}}),
            chunk({"audio": {"data": AUDIO[:40]}}),
            chunk({"audio": {"data": AUDIO[40:], "transcript": " there"}}),
            chunk({"audio": {"expires_at": 1700003600}}),
            chunk({}, "stop"),
        ],
        [{"message": {"content": None, "audio": SPOKEN}, "finish_reason": "stop"}],
    ),
    "a limit that the request set": (
        {"max_completion_tokens": 1},
        [ROLE, chunk({"content": "cut"}), chunk({}, "length")],
        [{"message": {"content": "cut"}, "finish_reason": "length"}],
    ),
}  # fmt: skip

LEGACY_LOGPROBS = {"tokens": ["Hi"], "token_logprobs": [-0.1], "top_logprobs": [{"Hi": -0.1}], "text_offset": [0]}
COMPLETIONS = {
    "text": (
        {"prompt": "Say"},
        [text_chunk("Hello"), text_chunk(" world"), text_chunk("", "stop")],
        [{"text": "Hello world", "finish_reason": "stop"}],
    ),
    "several prompts, two choices each": (
        {"prompt": ["a", "b"], "n": 2},
        [text_chunk(f"t{index}", index=index) for index in (2, 0, 3, 1)]
        + [text_chunk("", "stop", index=index) for index in (0, 1, 2, 3)],
        [{"index": index, "text": f"t{index}", "finish_reason": "stop"} for index in range(4)],
    ),
    "prompts of tokens": (
        {"prompt": [[1, 2], [3]]},
        [text_chunk(f"t{index}", "stop", index=index) for index in range(2)],
        [{"index": index, "text": f"t{index}", "finish_reason": "stop"} for index in range(2)],
    ),
    "logprobs": (
        {"prompt": "Say", "logprobs": 1},
        [with_logprobs(text_chunk("Hi"), **LEGACY_LOGPROBS), text_chunk("", "stop")],
        [{"text": "Hi", "logprobs": LEGACY_LOGPROBS, "finish_reason": "stop"}],
    ),
}
ANSWERS = [pytest.param("chat", *case, id=f"chat: {name}") for name, case in CHAT.items()]
ANSWERS += [pytest.param("completions", *case, id=f"completions: {name}") for name, case in COMPLETIONS.items()]


def says(*chunks):
    """A script that streams ``chunks``, and usage if it is asked for it, as OpenAI does."""

    async def script(asked):
        assert asked.json["stream"] is True
        await asked.head(x_request_id="req_upstream")
        wanted = (asked.json.get("stream_options") or {}).get("include_usage")
        for each in chunks:
            await asked.event({**each, "usage": None} if wanted else each)
        if wanted:
            await asked.event({**chunks[0], "choices": [], "usage": USAGE})
        await asked.done()

    return script


def fails_with(status, error, **headers):
    async def script(asked):
        await asked.answer({"error": error}, status, **headers)

    return script


class Caller:
    """The official client, asynchronous or not. What it was told is a list of chunks for a stream, else one object."""

    def __init__(self, client):
        self.client = client

    async def ask(self, api, mode, **request):
        resource = self.client.chat.completions if api == "chat" else self.client.completions
        request = {
            "model": "model-1",
            **({"messages": [{"role": "user", "content": "hi"}]} if api == "chat" else {}),
            **request,
        }
        if isinstance(self.client, AsyncOpenAI):
            answer = await resource.create(stream=mode == "stream", **request)
            return [each.to_dict() async for each in answer] if mode == "stream" else answer.to_dict()

        def in_thread():
            answer = resource.create(stream=mode == "stream", **request)
            return [each.to_dict() for each in answer] if mode == "stream" else answer.to_dict()

        return await asyncio.to_thread(in_thread)


@pytest.fixture
async def gateway(start_gateway):
    return await start_gateway()


@pytest.fixture
async def client(gateway):
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="sk-caller", max_retries=0) as client:
        yield client


@pytest.fixture
def caller(client):
    return Caller(client)


@pytest.fixture
def sync_caller(gateway):
    with OpenAI(base_url=gateway.base_url, api_key="sk-caller", max_retries=0) as client:
        yield Caller(client)


def identity(told):
    """The id and time of an answer, which are the same in all its chunks."""
    [identity] = {(each["id"], each["created"]) for each in (told if isinstance(told, list) else [told])}
    return identity


def nameless(told):
    if isinstance(told, list):
        return [nameless(each) for each in told]
    return {name: value for name, value in told.items() if name not in ("id", "created")}


def filled_in(api, choices):
    """``choices`` with the members that every unstreamed choice has."""
    whole = []
    for choice in choices:
        filled = {"index": 0, "logprobs": None, **choice}
        if api == "chat":
            filled["message"] = {"role": "assistant", **choice["message"]}
        whole.append(filled)
    return whole


@pytest.mark.parametrize(("fill", "hit"), FILLS_AND_HITS)
@pytest.mark.parametrize(("api", "request_members", "chunks", "choices"), ANSWERS)
async def test_a_hit_equals_a_miss_in_all_but_id_and_created(
    caller, upstream, api, request_members, chunks, choices, fill, hit
):
    upstream.script = says(*chunks)
    uncached = await caller.ask(api, hit, **request_members, extra_headers=NO_STORE)
    filled = await caller.ask(api, fill, **request_members)
    told = await caller.ask(api, hit, **request_members)
    assert len(upstream.asked) == 2
    assert nameless(told) == nameless(uncached)
    if hit == "whole":
        assert told["choices"] == filled_in(api, choices)
        assert told["usage"] == USAGE
    else:
        assert nameless(told) == [nameless(each) for each in chunks]
    assert identity(filled) == (chunks[0]["id"], chunks[0]["created"])
    fresh_id, fresh_created = identity(told)
    assert fresh_id != chunks[0]["id"]
    assert (len(fresh_id), fresh_id.partition("-")[0]) == (len(chunks[0]["id"]), chunks[0]["id"].partition("-")[0])
    assert fresh_created > chunks[0]["created"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("api", ["chat", "completions"])
async def test_the_synchronous_client_reads_what_the_asynchronous_one_does(caller, sync_caller, upstream, api, mode):
    request_members, chunks, _ = {"chat": CHAT, "completions": COMPLETIONS}[api]["text"]
    upstream.script = says(*chunks)
    miss = await sync_caller.ask(api, mode, **request_members)
    hit = await sync_caller.ask(api, mode, **request_members)
    assert len(upstream.asked) == 1
    assert nameless(miss) == nameless(hit) == nameless(await caller.ask(api, mode, **request_members))


async def test_two_hits_have_two_ids(caller, upstream):
    await caller.ask("chat", "whole")
    hits = [await caller.ask("chat", mode) for mode in (*MODES, *MODES)]
    assert len({identity(hit)[0] for hit in hits}) == 4
    assert len(upstream.asked) == 1


# Usage


@pytest.mark.parametrize("filler_asks", [True, False, None], ids="filler-{}".format)
@pytest.mark.parametrize("asks", [True, False], ids="reader-{}".format)
@pytest.mark.parametrize("api", ["chat", "completions"])
async def test_usage_reaches_only_a_stream_that_asked_for_it_whoever_filled_the_cache(
    caller, upstream, api, filler_asks, asks
):
    members, chunks, _ = {"chat": CHAT, "completions": COMPLETIONS}[api]["text"]
    upstream.script = says(*chunks)
    options = {"stream_options": {"include_usage": asks}} if asks else {}
    if filler_asks is None:
        await caller.ask(api, "whole", **members)
    else:
        filling = {"stream_options": {"include_usage": True}} if filler_asks else {}
        await caller.ask(api, "stream", **members, **filling)
    hit = await caller.ask(api, "stream", **members, **options)
    miss = await caller.ask(api, "stream", **members, **options, extra_headers=NO_STORE)
    usages = [each.get("usage", "absent") for each in hit]
    assert usages == ([*[None] * len(chunks), USAGE] if asks else ["absent"] * len(chunks))
    assert nameless(hit) == nameless(miss)
    assert [body["stream_options"]["include_usage"] for body in upstream.bodies] == [True, True]


async def test_other_stream_options_of_the_caller_go_upstream_beside_ours(caller, upstream):
    await caller.ask("chat", "stream", stream_options={"include_obfuscation": False})
    assert upstream.bodies[0]["stream_options"] == {"include_obfuscation": False, "include_usage": True}


# Requests


async def test_every_parameter_goes_upstream_as_it_was_sent(caller, upstream):
    members = {
        "temperature": 0.25, "seed": 7, "tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True,
        "logit_bias": {"50256": -100}, "response_format": {"type": "json_object"}, "stop": ["a", "b"],
        "user": "me", "metadata": {"a": "b"},
    }  # fmt: skip
    vendors = {"top_k": 3, "guided_json": {"b": 1, "a": None}}
    await caller.ask("chat", "stream", **members, extra_body=vendors)
    assert upstream.bodies[0] == {
        "model": "model-1",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        **members,
        **vendors,
    }


class Event(BaseModel):
    name: str
    day: int


async def test_parsed_answers_are_parsed_on_a_miss_and_on_a_hit(client, upstream):
    upstream.script = says(ROLE, chunk({"content": '{"name": "fair",'}), chunk({"content": ' "day": 7}'}), chunk({}, "stop"))
    request = {"model": "model-1", "messages": [{"role": "user", "content": "when?"}], "response_format": Event}
    for _ in range(2):
        parsed = await client.chat.completions.parse(**request)
        assert parsed.choices[0].message.parsed == Event(name="fair", day=7)
        async with client.chat.completions.stream(**request) as stream:
            events = [event.type async for event in stream]
            final = await stream.get_final_completion()
        assert final.choices[0].message.parsed == Event(name="fair", day=7)
        assert events.count("content.done") == 1
    assert len(upstream.asked) == 1


async def test_the_stream_helper_assembles_tool_calls_of_a_hit(client, upstream):
    members, chunks, choices = CHAT["parallel tool calls in fragments"]
    upstream.script = says(*chunks)
    request = {"model": "model-1", "messages": [{"role": "user", "content": "hi"}], **members}
    await client.chat.completions.create(**request)
    async with client.chat.completions.stream(**request) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    calls = [call.to_dict() for call in final.choices[0].message.tool_calls]
    assert [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
        (call["id"], call["function"]["name"], call["function"]["arguments"]) for call in choices[0]["message"]["tool_calls"]
    ]
    assert len(upstream.asked) == 1


# Errors

REFUSALS = [
    (
        400,
        openai.BadRequestError,
        {"message": "Too long.", "type": "invalid_request_error", "param": "messages", "code": "x"},
    ),
    (401, openai.AuthenticationError, {"message": "Bad key.", "type": "invalid_request_error", "param": None, "code": "k"}),
    (403, openai.PermissionDeniedError, {"message": "No.", "type": "invalid_request_error", "param": None, "code": None}),
    (
        422,
        openai.UnprocessableEntityError,
        {"message": "Odd.", "type": "invalid_request_error", "param": None, "code": None},
    ),
    (
        429,
        openai.RateLimitError,
        {"message": "Slow down.", "type": "requests", "param": None, "code": "rate_limit_exceeded"},
    ),
    (500, openai.InternalServerError, {"message": "Oh.", "type": "server_error", "param": None, "code": None}),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("status", "kind", "error"), REFUSALS, ids=lambda value: str(value) if isinstance(value, int) else ""
)
async def test_an_upstreams_refusal_raises_what_it_would_have_raised_without_the_gateway(
    caller, upstream, mode, status, kind, error
):
    upstream.script = fails_with(status, error, retry_after="7", x_request_id="req_theirs")
    with pytest.raises(kind) as raised:
        await caller.ask("chat", mode)
    caught = raised.value
    assert (caught.status_code, caught.body, caught.request_id) == (status, error, "req_theirs")
    assert (caught.code, caught.param, caught.type) == (error["code"], error["param"], error["type"])
    assert caught.response.headers["retry-after"] == "7"


async def test_the_callers_own_credential_is_what_the_upstream_judges(caller, upstream):
    await caller.ask("chat", "whole")
    assert upstream.asked[0].headers["authorization"] == "Bearer sk-caller"


@pytest.mark.parametrize("mode", MODES)
async def test_an_unknown_model_is_not_found(start_gateway, upstream, mode):
    named = {"name": "scripted", "kind": "openai", "base_url": upstream.base_url, "models": ["model-1"]}
    gateway = await start_gateway(upstreams=[named])
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="k", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as raised:
            await Caller(client).ask("chat", mode, model="nobody")
    assert (raised.value.code, raised.value.param, raised.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )
    assert raised.value.request_id
    assert not upstream.asked


async def test_a_request_of_a_wrong_type_is_a_bad_request(caller, upstream):
    with pytest.raises(openai.BadRequestError) as raised:
        await caller.ask("chat", "whole", n="two")
    assert (raised.value.param, raised.value.type) == ("n", "invalid_request_error")
    assert not upstream.asked


@pytest.mark.parametrize("api", ["chat", "completions"])
async def test_an_error_in_mid_stream_is_raised_after_the_chunks_that_came(caller, sync_caller, upstream, api):
    error = {"message": "Overloaded.", "type": "server_error", "param": None, "code": "overloaded"}
    members, chunks, _ = {"chat": CHAT, "completions": COMPLETIONS}[api]["text"]

    async def script(asked):
        await asked.head()
        for each in chunks[:2]:  # the first one of a chat says nothing yet
            await asked.event(each)
        await asked.event({"error": error})
        await asked.end()

    upstream.script = script
    resource = caller.client.chat.completions if api == "chat" else caller.client.completions
    request = {"model": "model-1", **({"messages": []} if api == "chat" else {}), **members}
    stream = await resource.create(stream=True, **request)
    assert [(await anext(stream)).to_dict() for _ in range(2)] == chunks[:2]
    with pytest.raises(openai.APIError) as raised:
        await anext(stream)
    assert type(raised.value) is openai.APIError
    assert (raised.value.body, raised.value.code, str(raised.value)) == (error, "overloaded", "Overloaded.")
    with pytest.raises(openai.APIError, match="Overloaded"):
        await sync_caller.ask(api, "stream", **members)
    with pytest.raises(openai.InternalServerError, match="Overloaded"):
        await caller.ask(api, "whole", **members)


# Headers and models


@pytest.mark.parametrize("mode", MODES)
async def test_raw_responses_show_ids_and_what_the_cache_did(client, upstream, mode):
    request = {"model": "model-1", "messages": [], "stream": mode == "stream"}

    async def ask(**headers):
        raw = await client.chat.completions.with_raw_response.create(**request, extra_headers=headers)
        answer = raw.parse()
        if mode == "stream":
            assert [each.choices[0].delta.content async for each in answer] == ["", "Hello", " world", None]
        else:
            assert answer._request_id == raw.headers["x-request-id"]
        return raw.headers

    miss, hit, own = await ask(), await ask(), await ask(**{"X-Request-Id": "mine-1"})
    assert miss["x-request-id"] == "req_upstream"
    assert miss["cache-status"] == "gateway; fwd=miss; fwd-status=200" + ("; stored" if mode == "whole" else "")
    assert "age" not in miss
    assert hit["x-request-id"].startswith("req_")
    assert hit["x-request-id"] != "req_upstream"
    assert hit["cache-status"].startswith("gateway; hit; ttl=")
    assert int(hit["age"]) < 60
    assert own["x-request-id"] == "mine-1"


async def test_models_are_listed_and_found(start_gateway, upstream):
    """Those of the configuration, and those that an upstream lists and the patterns admit."""
    scripted = {"kind": "openai", "base_url": upstream.base_url}
    gateway = await start_gateway(
        upstreams=[
            {"name": "one", **scripted, "models": ["named", "model-*"], "aliases": {"fast": "model-1"}},
            {"name": "two", "kind": "simulated", "models": ["other-*"]},
        ]
    )
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="sk-caller", max_retries=0) as client:
        listed = {model.id: model.owned_by async for model in client.models.list()}
        assert listed == {"named": "one", "fast": "one", "model-1": "me"}
        assert (await client.models.retrieve("model-1")).to_dict() == {
            "id": "model-1", "object": "model", "created": 1, "owned_by": "me",
        }  # fmt: skip
        assert (await client.models.retrieve("fast")).owned_by == "one"
        with pytest.raises(openai.NotFoundError) as raised:
            await client.models.retrieve("org/nobody")
    assert raised.value.code == "model_not_found"
    assert {asked.headers["authorization"] for asked in upstream.asked} == {"Bearer sk-caller"}


async def test_a_model_that_is_served_but_not_listed_is_found_where_its_upstream_knows_it(start_gateway, upstream):
    """As a new model's dated name is at OpenAI; what a simulated model is called is its caller's choice."""

    async def script(asked):
        if asked.path.endswith("/models"):
            await asked.answer({"object": "list", "data": []})
        elif asked.path.endswith("/models/org%2Fnew"):
            await asked.answer({"id": "org/new", "object": "model", "created": 2, "owned_by": "me"})
        else:
            await asked.answer({"error": {"message": "It has gone.", "type": "x", "code": "model_not_found"}}, 404)

    upstream.script = script
    scripted = {"kind": "openai", "base_url": upstream.base_url}
    simulated = {"name": "three", "kind": "simulated", "models": ["sim-*"]}
    named = [{"name": "one", **scripted, "models": ["org/*"]}, {"name": "two", **scripted, "models": ["b-*"]}, simulated]
    gateway = await start_gateway(upstreams=named)
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="sk-caller", max_retries=0) as client:
        assert (await client.models.retrieve("org/new")).created == 2
        assert (await client.models.retrieve("sim-1")).owned_by == "three"
        for name, message in (("b-1", "It has gone."), ("c", "The model 'c' does not exist or is not configured here.")):
            with pytest.raises(openai.NotFoundError, match=message) as raised:
                await client.models.retrieve(name)
            assert raised.value.code == "model_not_found"
    assert {asked.headers["authorization"] for asked in upstream.asked} == {"Bearer sk-caller"}


async def test_stored_completions_are_listed_by_the_upstream_that_keeps_them(client, upstream):
    async def script(asked):
        assert (asked.method, asked.path) == ("GET", "/v1/chat/completions?limit=1")
        await asked.answer({"object": "list", "data": [{"id": "chatcmpl-1"}], "has_more": False})

    upstream.script = script
    assert [each.id async for each in await client.chat.completions.list(limit=1)] == ["chatcmpl-1"]


async def test_embeddings_are_relayed_to_the_client(client, upstream):
    async def script(asked):
        assert asked.json == {"model": "model-1", "input": "hi", "encoding_format": "base64"}
        encoded = base64.b64encode(bytes.fromhex("0000803f00000040")).decode()
        data = [{"object": "embedding", "index": 0, "embedding": encoded}]
        await asked.answer({"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}})

    upstream.script = script
    answer = await client.embeddings.create(model="model-1", input="hi")
    assert answer.data[0].embedding == [1.0, 2.0]


# LangChain's client


@pytest.fixture
async def chat_openai(gateway):
    from langchain_openai import ChatOpenAI  # noqa: PLC0415  # seconds to import

    async with openai.DefaultAsyncHttpxClient() as http:
        common = {"api_key": "sk-caller", "max_retries": 0, "http_async_client": http}
        yield ChatOpenAI(base_url=gateway.base_url, model="model-1", stream_usage=True, **common)


async def test_langchain_reads_the_same_from_a_miss_and_a_hit_in_both_modes(chat_openai, upstream):
    streamed = [each async for each in chat_openai.astream("hi")]
    for _ in range(2):
        whole = await chat_openai.ainvoke("hi")
        joined = sum([each async for each in chat_openai.astream("hi")][1:], streamed[0])
        for message in (whole, joined):
            assert message.text == "Hello world"
            assert message.response_metadata["finish_reason"] == "stop"
            usage = message.usage_metadata
            assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (3, 2, 5)
    assert len(upstream.asked) == 1


async def test_langchain_reads_tool_calls_from_a_miss_and_a_hit(chat_openai, upstream):
    upstream.script = says(*CHAT["parallel tool calls in fragments"][1])
    with_tools = chat_openai.bind_tools(TOOLS)
    expected = [("weather", {"city": "Oslo"}), ("time", {"zone": "CET"})]
    for _ in range(2):
        assert [(call["name"], call["args"]) for call in (await with_tools.ainvoke("hi")).tool_calls] == expected
        first, *rest = [each async for each in with_tools.astream("hi")]
        assert [(call["name"], call["args"]) for call in sum(rest, first).tool_calls] == expected
    assert len(upstream.asked) == 1

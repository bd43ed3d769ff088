"""Any model of LangChain's as an upstream, judged by models that say one thing each."""

import asyncio
import subprocess
import sys
from typing import Any, ClassVar

import httpx2
import openai
import orjson
import pytest
from langchain_core.language_models import LLM, BaseChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import SecretStr

from gateway.config import LangChainUpstreamConfig
from gateway.core.apis import CHAT, COMPLETIONS
from gateway.errors import (
    ConfigError,
    InvalidRequest,
    PathNotFound,
    UpstreamBroke,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.ports import Call
from gateway.upstreams.langchain import LangChainUpstream

pytestmark = pytest.mark.usefixtures("no_task_is_left")

COMMUNITY = "langchain_community.chat_models.fake.FakeListChatModel"
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}]


class Scripted(BaseChatModel):
    """Streams the chunks of its script, raises the errors in it, and keeps what it was asked."""

    script: list[Any] = []  # noqa: RUF012  # pydantic copies it
    api_key: SecretStr = SecretStr("")
    limit: int = 0
    asked: ClassVar[list[Any]] = []
    closed: ClassVar[list[bool]] = []

    @property
    def _llm_type(self):
        return "scripted"

    def _generate(self, *_, **__):
        raise NotImplementedError

    async def _astream(self, messages, stop=None, **kwargs):
        self.asked.append((messages, stop, kwargs))
        try:
            for item in self.script:
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, asyncio.Event):
                    await item.wait()
                else:
                    yield ChatGenerationChunk(message=item)
        finally:
            self.closed.append(True)


class WithTools(Scripted):
    def bind_tools(self, tools, *, tool_choice=None, **kwargs):
        return self.bind(tools=[tool["function"]["name"] for tool in tools], tool_choice=tool_choice, **kwargs)


class Unstreamed(BaseChatModel):
    """Only answers whole."""

    @property
    def _llm_type(self):
        return "unstreamed"

    def _generate(self, *_, **__):
        calls = [{"name": "weather", "args": {"city": "Oslo"}, "id": "a1"}]
        usage = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
        message = AIMessage("Well,", tool_calls=calls, usage_metadata=usage, response_metadata={"finish_reason": "STOP"})
        return ChatResult(generations=[ChatGeneration(message=message)])


class Parrot(LLM):
    """Completes a prompt with itself."""

    @property
    def _llm_type(self):
        return "parrot"

    def _call(self, prompt, *_, **__):
        return prompt


class Picky(Unstreamed):
    """Cannot be constructed."""

    def __init__(self, **arguments):
        raise RuntimeError(f"no client:\n{arguments}")


def a_model_for(word):
    return GenericFakeChatModel(messages=iter([AIMessage(f"made for {word}")]))


@pytest.fixture(autouse=True)
def _forget():
    Scripted.asked.clear()
    Scripted.closed.clear()


def upstream(target=COMMUNITY, arguments=None, secrets=None, **settings):
    target = target if isinstance(target, str) else f"{__name__}.{target.__name__}"
    if target == COMMUNITY:
        arguments = arguments or {"responses": ["Hello, world"]}
    config = LangChainUpstreamConfig(kind="langchain", name="lc", target=target, arguments=arguments or {}, **settings)
    return LangChainUpstream(config, secrets or {})


def scripted(*script, kind=Scripted, **settings):
    return upstream(kind, {"script": list(script)}, **settings)


def chat(messages=None, **members):
    messages = messages or [{"role": "user", "content": "hi"}]
    return Call(CHAT, {"model": "m", "messages": messages, **members}, streamed=True)


def completion(prompt, **members):
    return Call(COMPLETIONS, {"model": "m", "prompt": prompt, **members}, streamed=True)


async def chunks_of(model, call):
    async with model.ask(call) as answer:
        events = [event async for batch in answer.batches for event in batch]
    assert events.pop() == b"[DONE]"
    return [orjson.loads(event) for event in events]


async def body_of(model, call):
    assembler = call.api.assembler()
    for chunk in await chunks_of(model, call):
        assembler.add(chunk)
    return assembler.body()


async def choice_of(model, call=None):
    return (await body_of(model, call or chat()))["choices"][0]


async def drained(answer):
    """What was said before the failure, and the failure."""
    said = []
    try:
        async for batch in answer.batches:
            said += batch
    except UpstreamError as error:
        return said, error
    pytest.fail("it did not fail")


async def failure_of(model, call=None):
    with pytest.raises(Exception) as caught:  # noqa: PT011  # which one is what the test asks
        async with model.ask(call or chat()):
            pytest.fail("entered")
    return caught.value


def problems_of(*args, **settings):
    with pytest.raises(ConfigError) as caught:
        upstream(*args, **settings)
    return caught.value.problems


def test_importing_the_upstream_does_not_import_langchain():
    code = "import sys, gateway.upstreams.langchain; sys.exit(any(name.startswith('langchain') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_a_community_model_streams_in_openais_chunks():
    chunks = await chunks_of(upstream(), chat())
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(chunks) == len("Hello, world") + 2
    assert {(chunk["object"], chunk["model"]) for chunk in chunks} == {("chat.completion.chunk", "m")}
    assert len({chunk["id"] for chunk in chunks}) == 1
    choice = await choice_of(upstream())
    assert choice["message"] == {"role": "assistant", "content": "Hello, world"}
    assert choice["finish_reason"] == "stop"


def test_the_sunset_of_the_community_package_warns_nobody():
    code = (
        "from gateway.config import LangChainUpstreamConfig as C\n"
        "from gateway.upstreams.langchain import LangChainUpstream as U\n"
        f"U(C(kind='langchain', name='x', target={COMMUNITY!r}, arguments={{'responses': ['a']}}), {{}})"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


async def test_a_function_that_makes_a_model_is_a_target_too():
    assert (await choice_of(upstream(a_model_for, {"word": "you"})))["message"]["content"] == "made for you"


async def test_openais_messages_reach_the_model_as_langchains():
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "data:,"}}]},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "42"},
    ]
    await body_of(scripted(AIMessageChunk("ok")), chat(messages))
    system, user, assistant, tool = Scripted.asked[0][0]
    assert isinstance(system, SystemMessage)
    assert isinstance(user, HumanMessage)
    assert user.content[1]["type"] == "image_url"
    assert assistant.tool_calls == [{"name": "f", "args": {"a": 1}, "id": "c", "type": "tool_call"}]
    assert (type(tool), tool.content, tool.tool_call_id) == (ToolMessage, "42", "c")
    assert "content" not in messages[2]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "weird", "content": "x"},
        {"content": "x"},
        {"role": "user", "content": 5},
        {"role": "tool", "content": "x"},
        {"role": "assistant", "tool_calls": "all"},
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}]},
    ],
)
async def test_messages_that_langchain_does_not_take_are_the_callers_fault(message):
    error = await failure_of(scripted(), chat([message]))
    assert isinstance(error, InvalidRequest)
    assert error.param == "messages"


async def test_members_reach_the_model_but_those_that_say_nothing_to_it():
    call = chat(
        temperature=0.5, max_tokens=9, top_k=3, seed=None, stop="END", n=1, stream=True, stream_options={}, user="u",
        metadata={}, store=True, prompt_cache_key="k", safety_identifier="s", service_tier="auto", tool_choice="auto",
        presence_penalty=1,
    )  # fmt: skip
    await body_of(scripted(AIMessageChunk("ok"), dropped_parameters=("presence_penalty",)), call)
    _, stop, arguments = Scripted.asked[0]
    assert stop == ["END"]
    assert arguments == {"temperature": 0.5, "max_tokens": 9, "top_k": 3}


@pytest.mark.parametrize(
    "name", ["base_url", "api_base", "apiKey", "extra_headers", "openai_api_key", "config", "run_manager"]
)
async def test_a_caller_cannot_steer_the_models_connection(name):
    error = await failure_of(scripted(AIMessageChunk("ok")), chat(**{name: "https://evil.example"}))
    assert isinstance(error, InvalidRequest)
    assert error.param == name
    assert not Scripted.asked


async def test_text_reasoning_and_refusals_come_from_any_vendors_blocks():
    choice = await choice_of(
        scripted(
            AIMessageChunk([{"type": "thinking", "thinking": "Let "}]),
            AIMessageChunk([{"type": "reasoning", "reasoning": "me "}]),
            AIMessageChunk([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "see. "}]}]),
            AIMessageChunk([{"type": "reasoning_content", "reasoning_content": {"text": "Hm."}}]),
            AIMessageChunk("", additional_kwargs={"reasoning_content": " Yes."}),
            AIMessageChunk(["A", {"type": "text", "text": "B"}, {"type": "image", "url": "x"}]),
            AIMessageChunk("C"),
            AIMessageChunk([{"type": "refusal", "refusal": "No."}]),
        )
    )
    message = choice["message"]
    assert message["content"] == "ABC"
    assert message["reasoning_content"] == "Let me see. Hm. Yes."
    assert message["refusal"] == "No."


def calls(*fragments):
    return [
        AIMessageChunk("", tool_call_chunks=[dict(zip(("index", "id", "name", "args"), one, strict=True))])
        for one in fragments
    ]


@pytest.mark.parametrize(
    "fragments",
    [
        [(0, "a", "f", ""), (0, None, None, '{"x"'), (0, None, None, ":1}"), (1, "b", "g", "{}")],
        [(1, "a", "f", None), (1, None, None, '{"x":1}'), (2, "b", "g", "{}")],
        [(None, "a", "f", '{"x":1}'), (None, "b", "g", "{}")],
        [(0, "a", "f", '{"x":1}'), (0, "b", "g", "{}")],
        [(5, "a", "f", '{"x"'), (5, "a", "f", ":1}"), (7, "b", "g", "{}")],
        [(None, "a", "f", '{"x"'), (None, None, None, ":1}"), (None, "b", "g", "{}")],
        [(0, "a", None, ""), (0, None, "f", '{"x":1}'), (0, "b", "g", "{}")],
        [(0, "a", "f", '{"x"'), (1, "b", "g", "{"), (0, None, None, ":1}"), (1, None, None, "}")],
    ],
)
async def test_tool_calls_are_numbered_from_zero_however_the_vendor_numbers_them(fragments):
    choice = await choice_of(scripted(*calls(*fragments)))
    assert choice["message"]["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    assert choice["finish_reason"] == "tool_calls"


async def test_an_answer_that_begins_with_a_call_has_no_text_but_keeps_text_that_came_before():
    call = calls((0, "a", "f", "{}"))
    assert (await choice_of(scripted(AIMessageChunk(""), *call)))["message"]["content"] is None
    assert (await choice_of(scripted(AIMessageChunk("So:"), *call)))["message"]["content"] == "So:"


async def test_tool_calls_without_an_id_get_one_each():
    choice = await choice_of(scripted(*calls((None, None, "f", "{}"), (None, None, "f", "{}"))))
    ids = [call["id"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(name.startswith("call_") for name in ids)


async def test_id_and_name_of_a_call_come_once():
    chunks = await chunks_of(scripted(*calls((0, "a", "f", "{"), (0, "a", "f", "}"))), chat())
    told = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert told == [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}},
        {"index": 0, "function": {"arguments": "}"}},
    ]


async def test_a_model_that_cannot_stream_answers_in_one_piece():
    body = await body_of(upstream(Unstreamed), chat())
    choice = body["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Oslo"}'}
    assert choice["finish_reason"] == "tool_calls"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (None, None),
        ("auto", None),
        ("required", "any"),
        ({"type": "function", "function": {"name": "weather"}}, "weather"),
        ({"type": "allowed_tools"}, {"type": "allowed_tools"}),
    ],
)
async def test_tools_are_bound_with_the_choice_in_langchains_words(sent, got):
    await body_of(scripted(AIMessageChunk("ok"), kind=WithTools), chat(tools=TOOLS, tool_choice=sent))
    assert Scripted.asked[0][2] == {"tools": ["weather"], "tool_choice": got}


async def test_a_model_that_must_not_call_never_hears_of_the_tools():
    await body_of(scripted(AIMessageChunk("ok")), chat(tools=TOOLS, tool_choice="none"))
    assert Scripted.asked[0][2] == {}


@pytest.mark.parametrize(
    ("model", "tools"),
    [
        (Scripted, TOOLS),
        ("langchain_core.language_models.FakeListLLM", TOOLS),
        (WithTools, [{"type": "custom", "custom": {"name": "grep"}}]),
        (WithTools, "all"),
    ],
)
async def test_tools_that_a_model_cannot_be_given_are_the_callers_fault(model, tools):
    error = await failure_of(
        upstream(model, {"responses": ["x"]} if model not in (Scripted, WithTools) else {}), chat(tools=tools)
    )
    assert isinstance(error, InvalidRequest)
    assert error.param == "tools"


async def test_usage_is_summed_and_comes_last():
    chunks = await chunks_of(
        scripted(
            AIMessageChunk("", usage_metadata={"input_tokens": 7, "output_tokens": 0, "total_tokens": 7,
                                               "input_token_details": {"cache_read": 4, "cache_creation": 2}}),
            AIMessageChunk("ok"),
            AIMessageChunk("", usage_metadata={"input_tokens": 0, "output_tokens": 5, "total_tokens": 5,
                                               "output_token_details": {"reasoning": 3}}),
        ),
        chat(),
    )  # fmt: skip
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }
    assert all("usage" not in chunk for chunk in chunks[:-1])


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "stop"),
        ({"finish_reason": "length"}, "length"),
        ({"finish_reason": "STOP"}, "stop"),
        ({"finish_reason": "MAX_TOKENS"}, "length"),
        ({"finish_reason": "SAFETY"}, "content_filter"),
        ({"stop_reason": "end_turn"}, "stop"),
        ({"stop_reason": "stop_sequence"}, "stop"),
        ({"stop_reason": "max_tokens"}, "length"),
        ({"stop_reason": "tool_use"}, "tool_calls"),
        ({"stopReason": "guardrail_intervened"}, "content_filter"),
        ({"done_reason": "stop"}, "stop"),
        ({"finish_reason": "eos"}, "stop"),
        ({"finish_reason": "MALFORMED_FUNCTION_CALL"}, "MALFORMED_FUNCTION_CALL"),
    ],
)
async def test_how_an_answer_ended_is_said_in_openais_words(metadata, reason):
    chunk = AIMessageChunk("", response_metadata=metadata)
    assert (await choice_of(scripted(AIMessageChunk("ok"), chunk)))["finish_reason"] == reason


async def test_log_probabilities_pass_through():
    entry = {"token": "ok", "logprob": -0.1, "bytes": None, "top_logprobs": []}
    chunk = AIMessageChunk("ok", response_metadata={"logprobs": {"content": [entry]}})
    assert (await choice_of(scripted(chunk)))["logprobs"] == {"content": [entry]}


async def test_several_choices_are_several_streams_merged_as_they_come():
    body = await body_of(scripted(AIMessageChunk("o"), AIMessageChunk("k")), chat(n=3))
    assert [(choice["index"], choice["message"]["content"]) for choice in body["choices"]] == [
        (0, "ok"),
        (1, "ok"),
        (2, "ok"),
    ]
    assert len(Scripted.asked) == 3


async def test_one_choice_that_fails_fails_the_answer_and_ends_the_others():
    gate = asyncio.Event()
    model = scripted(AIMessageChunk("o"), gate, RuntimeError("lost"))
    async with model.ask(chat(n=2)) as answer:
        gate.set()
        said, error = await drained(answer)
    assert "lost" in error.message
    assert b"[DONE]" not in said
    assert len(Scripted.closed) == 2


async def test_too_many_choices_are_refused():
    assert (await failure_of(scripted(), chat(n=129))).param == "n"


async def test_a_chat_model_completes_each_prompt_as_a_message():
    body = await body_of(scripted(AIMessageChunk("ok")), completion(["one", "two"], n=2, stop=["."]))
    assert body["object"] == "text_completion"
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in body["choices"]] == [
        (index, "ok", "stop") for index in range(4)
    ]
    assert [asked[0][0].content for asked in Scripted.asked] == ["one", "one", "two", "two"]


@pytest.mark.parametrize("prompt", [[1, 2], [[1], [2]]])
async def test_prompts_of_tokens_are_refused(prompt):
    assert (await failure_of(scripted(), completion(prompt))).param == "prompt"


async def test_an_llm_serves_both_apis():
    model = upstream("langchain_core.language_models.FakeListLLM", {"responses": ["first", "second"]})
    assert (await choice_of(model, completion("go on")))["text"] == "first"
    assert (await choice_of(model))["message"]["content"] == "second"


async def test_an_llm_is_given_a_chat_as_a_transcript():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert (await choice_of(upstream(Parrot), chat(messages)))["message"]["content"] == "System: Be brief.\nHuman: hi"


def refusal(status, message="slow down", headers=None):
    response = httpx2.Response(status, headers=headers, request=httpx2.Request("POST", "http://model.example"))
    return openai.APIStatusError(message, response=response, body=None)


class WithHttpStatus(Exception):
    http_status = 503


class ReadTimeout(Exception):
    """As several HTTP clients call theirs."""


@pytest.mark.parametrize(
    ("raised", "mapped", "status"),
    [
        (TimeoutError(), UpstreamTimeout, 504),
        (ReadTimeout(), UpstreamTimeout, 504),
        (openai.APITimeoutError(httpx2.Request("POST", "http://model.example")), UpstreamTimeout, 504),
        (openai.APIConnectionError(request=httpx2.Request("POST", "http://model.example")), UpstreamUnreachable, 502),
        (ConnectionRefusedError("no"), UpstreamUnreachable, 502),
        (httpx2.ConnectError("no"), UpstreamUnreachable, 502),
        (refusal(429), UpstreamRefused, 429),
        (WithHttpStatus(), UpstreamRefused, 503),
        (ValueError("what?"), UpstreamBroke, 502),
        (StopAsyncIteration(), UpstreamBroke, 502),
        (asyncio.CancelledError(), UpstreamBroke, 502),
    ],
)
async def test_a_failure_before_the_first_piece_keeps_its_kind_and_status(raised, mapped, status):
    error = await failure_of(scripted(raised))
    assert (type(error), error.status) == (mapped, status)
    assert error.__cause__ is None


async def test_a_refusal_is_an_openai_error_object_and_says_when_to_come_back():
    error = await failure_of(scripted(refusal(429, headers={"Retry-After": "7"})))
    assert orjson.loads(error.content)["error"]["message"] == "APIStatusError: slow down"
    assert (error.content_type, error.headers) == ("application/json", {"retry-after": "7"})


async def test_a_failure_after_the_first_piece_comes_in_the_stream_after_what_was_said():
    async with scripted(AIMessageChunk("so far"), RuntimeError("lost")).ask(chat()) as answer:
        said, error = await drained(answer)
    assert (type(error), error.message) == (UpstreamBroke, "RuntimeError: lost")
    assert "so far" in said[1].decode()
    assert b"[DONE]" not in said


async def test_a_model_that_says_nothing_at_all_is_broken():
    assert isinstance(await failure_of(scripted()), UpstreamBroke)


async def test_what_is_not_json_breaks_the_answer():
    with pytest.raises(UpstreamBroke, match="not JSON"):
        await body_of(scripted(AIMessageChunk("\ud800")), chat())


async def test_no_secret_is_told_and_no_message_is_long():
    class_with_secret = {"kind": Scripted, "arguments_env": {"api_key": "KEY"}, "secrets": {"KEY": "sk-very-secret"}}
    model = scripted(RuntimeError("bad key sk-very-secret " + "x" * 2000), **class_with_secret)
    message = (await failure_of(model)).message
    assert "secret" not in message
    assert len(message) < 600


async def test_leaving_early_closes_the_models_stream():
    async with scripted(AIMessageChunk("o"), asyncio.Event()).ask(chat()) as answer:
        assert await anext(answer.batches)
    assert Scripted.closed == [True]


async def test_a_caller_who_leaves_before_the_first_piece_closes_the_models_stream():
    model = scripted(asyncio.Event())
    asking = asyncio.ensure_future(failure_of(model))
    while not Scripted.asked:
        await asyncio.wait([asking], timeout=0)
    asking.cancel()
    await asyncio.wait([asking])
    assert Scripted.closed == [True]


def test_secrets_reach_the_construction_by_the_name_of_their_variable():
    model = upstream(Scripted, arguments_env={"api_key": "KEY"}, secrets={"KEY": "sk-very-secret"})
    assert model._model.api_key.get_secret_value() == "sk-very-secret"


def test_langchain_missing_says_what_to_install(monkeypatch):
    for name in ("langchain_core", "langchain_core.language_models"):
        monkeypatch.setitem(sys.modules, name, None)
    (problem,) = problems_of()
    assert problem.startswith("upstreams.lc.target: ")
    assert "llm-streaming-gateway[langchain]" in problem


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("no_such_package.Model", "there is no module 'no_such_package'"),
        ("langchain_core.no_such.Model", "there is no module 'langchain_core.no_such'"),
        ("langchain_core.language_models.NoSuch", "has no class 'NoSuch'"),
        ("langchain_core.documents.Document", "is not a chat model or LLM"),
        ("os.getcwd", "gives no chat model or LLM"),
    ],
)
def test_a_wrong_target_is_a_problem_of_the_configuration(target, words):
    (problem,) = problems_of(target)
    assert problem.startswith("upstreams.lc.target: ")
    assert words in problem


def test_a_module_that_fails_on_import_is_a_problem_of_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "lc_broken.py").write_text("import lc_absent_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = problems_of("lc_broken.Model")
    assert "lc_broken cannot be imported" in problem
    assert "lc_absent_dependency" in problem


def test_every_refused_argument_is_named_on_a_line_of_its_own_without_its_value():
    problems = problems_of(
        Scripted,
        {"script": "sk-in-the-file", "limit": "many"},
        arguments_env={"api_key": "KEY"},
        secrets={"KEY": "sk-very-secret"},
    )
    assert [problem.split(":")[0] for problem in problems] == [
        "upstreams.lc.arguments.script",
        "upstreams.lc.arguments.limit",
    ]
    assert "sk-" not in "".join(problems)


def test_a_model_that_cannot_be_constructed_is_one_line_without_its_secrets():
    (problem,) = problems_of(Picky, arguments_env={"api_key": "KEY"}, secrets={"KEY": "sk-very-secret"})
    assert problem == "upstreams.lc.arguments: the model cannot be constructed: RuntimeError: no client: {'api_key': '***'}"


def test_a_variable_that_is_not_set_is_a_problem_of_the_configuration():
    assert problems_of(Scripted, arguments_env={"api_key": "KEY"}) == [
        "upstreams.lc.arguments_env.api_key: the environment variable KEY is not set"
    ]


async def test_only_exact_names_are_listed_as_models():
    models = await upstream(models=("claude-*", "claude-x")).models({})
    assert models == [{"id": "claude-x", "object": "model", "created": 0, "owned_by": "lc"}]


async def test_no_other_path_is_served():
    with pytest.raises(PathNotFound, match="LangChain"):
        async with upstream().relay("POST", "embeddings", {}, b""):
            pass

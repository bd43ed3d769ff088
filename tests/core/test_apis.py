import base64
import copy
import json
import time
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.core.apis import APIS, CHAT, COMPLETIONS, RequestProblem
from gateway.core.apis.base import tokens

ENVELOPE = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1741569952, "model": "gpt-4o"}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def chunk(*choices, **members):
    return {**ENVELOPE, "choices": list(choices), **members}


def part(delta=None, index=0, finish_reason=None, **members):
    return {"index": index, "delta": delta or {}, "finish_reason": finish_reason, **members}


def assemble(chunks, api=CHAT):
    assembler = api.assembler()
    for value in copy.deepcopy(chunks):
        assembler.add(value)
    return assembler.body()


def message(*deltas, **members):
    """The message that ``deltas`` make."""
    (choice,) = assemble([chunk(part(delta)) for delta in deltas])["choices"]
    return choice["message"]


def call(index=None, id=None, name=None, arguments=None):  # noqa: A002
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    members = {"index": index, "id": id, "type": "function" if id else None, "function": function}
    return {key: value for key, value in members.items() if value is not None}


def called(*calls):
    return [call(None, *parts) for parts in calls]


# OpenAI's own accumulator as the judge


def oracle(chunks):
    """What OpenAI's client makes of a well-behaved stream, without the members that it adds."""
    state = ChatCompletionStreamState()
    for value in copy.deepcopy(chunks):
        state.handle_chunk(ChatCompletionChunk.model_validate(value))
    body = state.get_final_completion().to_dict(mode="json")
    for choice in body["choices"]:
        choice["message"].pop("parsed", None)
        for tool_call in choice["message"].get("tool_calls") or ():
            tool_call.pop("index", None)
            tool_call["function"].pop("parsed_arguments", None)
    return body


def lean(value):
    """Null and absent are the same to a client's model, but the two sides set them in different places."""
    if isinstance(value, dict):
        return {name: lean(item) for name, item in value.items() if item not in (None, [])}
    if isinstance(value, list):
        return [lean(item) for item in value]
    return value


LOGPROB = st.fixed_dictionaries({
    "token": st.text(max_size=3),
    "logprob": st.floats(-9, 0),
    "bytes": st.none() | st.lists(st.integers(0, 255), max_size=2),
    "top_logprobs": st.just([]),
})  # fmt: skip
LOGPROBS = st.none() | st.fixed_dictionaries(
    {"content": st.lists(LOGPROB, max_size=2), "refusal": st.none() | st.lists(LOGPROB, max_size=1)}
)
PIECE = st.text(max_size=4)
FRAGMENTS = st.lists(PIECE, max_size=4)


@st.composite
def deltas(draw):
    """The deltas of one well-behaved choice."""
    found = [{"role": "assistant", "content": draw(st.sampled_from(["", None]))}]
    for name in draw(st.permutations(["reasoning_content", "content", "refusal", "tool_calls", "audio"])):
        pieces = draw(FRAGMENTS)
        if name == "tool_calls":
            for index in range(draw(st.integers(0, 3))):
                found.append({name: [call(index, f"call_{index}", f"f{index}", "")]})
                found += [{name: [call(index, arguments=piece)]} for piece in pieces]
        elif name == "audio" and pieces:
            found.append({name: {"id": "audio_1", "transcript": pieces[0]}})
            found += [{name: {"data": base64.b64encode(piece.encode() * 3).decode()}} for piece in pieces]
            found.append({name: {"expires_at": 1741569999}})
        else:
            found += [{name: piece} for piece in pieces]
    return found


@st.composite
def streams(draw):
    choices = []
    for index in range(draw(st.integers(1, 3))):
        first, *rest = draw(deltas())
        # OpenAI's accumulator counts the log probabilities of a later choice's first chunk twice.
        parts = [part(first, index, logprobs=None), *[part(delta, index, logprobs=draw(LOGPROBS)) for delta in rest]]
        choices.append([*parts, part({}, index, "stop", logprobs=None)])
    found = [chunk(parts.pop(0), service_tier="default", system_fingerprint="fp_1") for parts in choices]
    while any(choices):
        found.append(chunk(draw(st.sampled_from([parts for parts in choices if parts])).pop(0), system_fingerprint="fp_1"))
    return [*found, chunk(usage=USAGE, system_fingerprint="fp_1")]


@given(streams())
def test_a_well_behaved_stream_is_assembled_as_openais_client_does(stream):
    body = assemble(stream)
    assert lean(body) == lean(oracle(stream))
    ChatCompletion.model_validate(body, strict=True)


def test_parallel_calls_may_come_interleaved():
    stream = [
        chunk(part({"role": "assistant", "content": None, "tool_calls": [call(0, "a", "f", ""), call(1, "b", "g", "")]})),
        chunk(part({"tool_calls": [call(1, arguments='{"x"'), call(0, arguments="{")]})),
        chunk(part({"tool_calls": [call(0, arguments="}"), call(1, arguments=":1}")]}, finish_reason="tool_calls")),
    ]
    assert lean(assemble(stream)) == lean(oracle(stream))
    assert assemble(stream)["choices"][0]["message"]["tool_calls"] == called(("a", "f", "{}"), ("b", "g", '{"x":1}'))


# Where OpenAI's accumulator fails, and vendors differ


def test_names_that_are_repeated_are_said_once():
    assert message({"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}) == {
        "role": "assistant", "content": "ab",
    }  # fmt: skip
    repeated = [{"tool_calls": [call(0, "call_1", "f", piece)]} for piece in ('{"a"', ":1", "}")]
    assert message(*repeated)["tool_calls"] == called(("call_1", "f", '{"a":1}'))
    emptied = [{"tool_calls": [{**call(0, arguments=piece), "id": "", "type": "function"}]} for piece in "{}"]
    assert message({"tool_calls": [call(0, "call_1", "f")]}, *emptied)["tool_calls"] == called(("call_1", "f", "{}"))


def test_the_first_to_come_need_not_be_number_0():
    stream = [chunk(part({"content": "b"}, 1)), chunk(part({"content": "a"}, 0)), chunk(part({"content": "c"}, 2))]
    assert [choice["message"]["content"] for choice in assemble(stream)["choices"]] == ["a", "b", "c"]
    assert [choice["index"] for choice in assemble(stream)["choices"]] == [0, 1, 2]
    calls = message({"tool_calls": [call(1, "b", "g", "")]}, {"tool_calls": [call(0, "a", "f", "")]})["tool_calls"]
    assert calls == called(("a", "f", ""), ("b", "g", ""))


@pytest.mark.parametrize(
    ("fragments", "calls"),
    [
        ([[call(None, "a", "f", "{")], [call(arguments="}")]], [("a", "f", "{}")]),
        ([[call(None, "a", "f", "{")], [call(None, "a", "f", "}")]], [("a", "f", "{}")]),
        ([[call(None, "a", "f"), call(None, "b", "g", "[]")]], [("a", "f"), ("b", "g", "[]")]),
        ([[call(None, "a", "f")], [call(None, "b", "g", "[")], [call(arguments="]")]], [("a", "f"), ("b", "g", "[]")]),
        ([[call(None, "a", "f") | {"index": None}], [call(None, "b", "g") | {"index": None}]], [("a", "f"), ("b", "g")]),
    ],
)
def test_calls_without_an_index_are_told_apart_by_id_and_place(fragments, calls):
    assert message(*[{"tool_calls": fragment} for fragment in fragments])["tool_calls"] == called(*calls)


def test_calls_without_index_and_id_are_told_apart_by_place():
    functions = [{"function": {"name": name, "arguments": "{}"}} for name in "fg"]
    assert message({"tool_calls": functions})["tool_calls"] == functions


def test_usage_and_fingerprint_hold_wherever_they_come():
    stream = [
        chunk(part({"content": "a"}), usage=USAGE, system_fingerprint="fp"),
        chunk(part(finish_reason="stop"), usage=None),
    ]
    assert assemble(stream)["usage"] == USAGE
    assert assemble(stream)["system_fingerprint"] == "fp"
    assert assemble([*stream, chunk(usage={"total_tokens": 9})])["usage"] == {"total_tokens": 9}
    assert "usage" not in assemble([chunk(part({"content": "a"}), usage=None)])


def test_azures_first_chunk_names_nothing():
    first = {
        "choices": [],
        "created": 0,
        "id": "",
        "model": "",
        "object": "",
        "prompt_filter_results": [{"prompt_index": 0}],
    }
    filtered = {"hate": {"filtered": False, "severity": "safe"}}
    parts = [part({"content": piece}, content_filter_results=filtered) for piece in "ab"]
    body = assemble([first, *map(chunk, parts), chunk(part(finish_reason="stop", content_filter_results={}))])
    assert body == {
        **ENVELOPE,
        "object": "chat.completion",
        "choices": [{
            "index": 0,
            "message": {"role": "assistant", "content": "ab"},
            "finish_reason": "stop",
            "content_filter_results": {},
        }],
        "prompt_filter_results": [{"prompt_index": 0}],
    }  # fmt: skip


def test_what_stands_beside_a_delta_does_not_grow():
    last = part(finish_reason="stop", native_finish_reason="STOP", stop_reason=None)
    (choice,) = assemble([chunk(part({"content": "a"}, native_finish_reason=None)), chunk(last), chunk(last)])["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["native_finish_reason"] == "STOP"
    assert choice["stop_reason"] is None
    (choice,) = assemble([chunk(last), chunk(part(finish_reason="")), chunk(part())])["choices"]
    assert choice["finish_reason"] == "stop"


def test_lists_grow_and_items_with_an_index_merge():
    assert message({"annotations": [{"a": 1}]}, {"annotations": [{"a": 2}]})["annotations"] == [{"a": 1}, {"a": 2}]
    details = [
        {"type": "reasoning.text", "text": "a", "signature": None, "format": "x", "index": 0},
        {"type": "reasoning.text", "text": "b", "signature": "s", "format": "x", "index": 0},
        {"type": "reasoning.text", "text": "c", "format": "x", "index": 1},
    ]
    assert message(*[{"reasoning_details": [item]} for item in details])["reasoning_details"] == [
        {"type": "reasoning.text", "text": "ab", "signature": "s", "format": "x", "index": 0},
        {"type": "reasoning.text", "text": "c", "format": "x", "index": 1},
    ]


def test_parts_and_text_may_follow_each_other():
    thinking = [{"content": [{"type": "thinking", "thinking": [{"type": "text", "text": piece}]}]} for piece in "ab"]
    assert message({"role": "assistant", "content": ""}, *thinking, {"content": "c"}, {"content": "d"})["content"] == [
        {"type": "thinking", "thinking": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"type": "text", "text": "cd"},
    ]
    assert message({"content": "a"}, {"content": [{"type": "text", "text": "b"}]})["content"] == [
        {"type": "text", "text": "ab"}
    ]


@pytest.mark.parametrize("cuts", [[3], [1, 2], [4, 5], [2, 4, 6]])
def test_audio_is_joined_whether_or_not_its_pieces_are_padded(cuts):
    sound = bytes(range(7))
    edges = [0, *cuts, len(sound)]
    pieces = [base64.b64encode(sound[start:end]).decode() for start, end in pairwise(edges)]
    audio = message({"audio": {"id": "audio_1"}}, *[{"audio": {"data": piece, "transcript": "x"}} for piece in pieces])[
        "audio"
    ]
    assert base64.b64decode(audio["data"], validate=True) == sound
    assert (audio["id"], audio["transcript"]) == ("audio_1", "x" * len(pieces))


def test_audio_that_is_no_base64_is_joined_as_text():
    for odd in ("é=", "!="):
        assert message({"audio": {"data": odd}}, {"audio": {"data": "b"}})["audio"]["data"] == odd + "b"


def test_old_function_calls_grow():
    fragments = [
        {"function_call": {"name": "f", "arguments": ""}},
        {"function_call": {"arguments": "{"}},
        {"function_call": {"arguments": "}"}},
    ]
    assert message({"role": "assistant", "content": None}, *fragments) == {
        "role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"},
    }  # fmt: skip


def test_obfuscation_is_no_part_of_an_answer():
    assert "obfuscation" not in assemble([chunk(part({"content": "a"}), obfuscation="xyz")])


def test_text_completions_are_assembled():
    def piece(text, index=0, finish_reason=None, logprobs=None):
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(token, offset):
        return {"tokens": [token], "token_logprobs": [-1.0], "top_logprobs": [{token: -1.0}], "text_offset": [offset]}

    head = {"id": "cmpl-1", "object": "text_completion", "created": 5, "model": "m"}
    parts = [
        piece("b", 1),
        piece("a", logprobs=logprobs("a", 0)),
        piece("c", logprobs=logprobs("c", 1)),
        piece("", 0, "stop"),
        piece("", 1, "length"),
    ]
    body = assemble(
        [{**head, "choices": [value]} for value in parts] + [{**head, "choices": [], "usage": USAGE}], COMPLETIONS
    )
    joined = {
        "tokens": ["a", "c"],
        "token_logprobs": [-1.0] * 2,
        "top_logprobs": [{"a": -1.0}, {"c": -1.0}],
        "text_offset": [0, 1],
    }
    assert body == {**head, "choices": [piece("ac", 0, "stop", joined), piece("b", 1, "length")], "usage": USAGE}
    Completion.model_validate(body, strict=True)


def test_long_answers_are_assembled_in_linear_time():
    item = {"token": "ж", "logprob": -1.0, "bytes": None, "top_logprobs": []}
    assembler = CHAT.assembler()
    started = time.process_time()
    for _ in range(30_000):
        assembler.add(chunk(part({"content": "жук " * 12}, logprobs={"content": [item], "refusal": None})))
    (choice,) = assembler.body()["choices"]
    assert (len(choice["message"]["content"]), len(choice["logprobs"]["content"])) == (1_440_000, 30_000)
    assert time.process_time() - started < 3  # it takes a tenth of that; were it quadratic, more than twice


NAMES = st.sampled_from([
    "index", "delta", "message", "content", "tool_calls", "id", "function", "audio", "data", "logprobs", "text", "role",
])  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def mostly(strategy):
    return strategy | strategy | JSON


FRAGMENT = st.fixed_dictionaries(
    {}, optional={"index": mostly(st.integers(0, 2)), "id": JSON, "function": JSON, "name": JSON}
)
DELTA = st.fixed_dictionaries(
    {},
    optional={
        "content": JSON,
        "role": JSON,
        "tool_calls": mostly(st.lists(mostly(FRAGMENT), max_size=2)),
        "audio": JSON,
        "x": JSON,
    },
)
CHOICE = st.fixed_dictionaries(
    {}, optional={"index": JSON, "delta": mostly(DELTA), "message": mostly(DELTA), "text": JSON, "logprobs": JSON}
)
CHUNK = st.fixed_dictionaries(
    {"choices": mostly(st.lists(mostly(CHOICE), max_size=2))},
    optional={"id": JSON, "created": JSON, "usage": JSON, "x": JSON},
)


@given(st.sampled_from([CHAT, COMPLETIONS]), st.lists(CHUNK, max_size=4))
def test_chunks_of_any_shape_are_assembled_to_something(api, chunks):
    assert json.loads(json.dumps(assemble(chunks, api)))["object"] in ("chat.completion", "text_completion")


@given(st.sampled_from([CHAT, COMPLETIONS]), CHUNK)
def test_answers_of_any_shape_are_split_to_something(api, body):
    assert isinstance(json.loads(json.dumps(api.split(body))), list)


# Splitting an answer, and assembling it again

WORDS = st.sampled_from(
    ["", " ", "\n\n", "Hello, world!", " ж 😀\u2028", "a" * 40, '{"a": [1, 2]}', "\ta \x0b b "]
) | st.text(max_size=12)
UNKNOWN = st.dictionaries(st.sampled_from(["vendor", "x_groq", "stop_reason", "citations"]), JSON, max_size=2)


@st.composite
def logprobs_of(draw, text):
    """None, some list, or the log probabilities of the tokens that ``text`` is made of."""
    kind = draw(st.sampled_from(["none", "any", "tokens", "refusal", "more"]))
    if kind in ("none", "any"):
        return draw(LOGPROBS) if kind == "any" else None
    items = [{"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": []} for token in tokens(text or "")]
    more = (
        {"refusal": draw(st.none() | st.lists(LOGPROB, max_size=1))}
        if kind == "refusal"
        else {"vendor": 1}
        if kind == "more"
        else {}
    )
    return {"content": items, **more}


FUNCTION_CALL = st.fixed_dictionaries(
    {
        "id": st.text(max_size=5),
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": WORDS, "arguments": WORDS}),
    },
    optional={"extra_content": JSON},
)
CUSTOM_CALL = st.fixed_dictionaries(
    {"id": st.text(max_size=5), "type": st.just("custom"), "custom": st.fixed_dictionaries({"name": WORDS, "input": WORDS})}
)
ANNOTATION = st.fixed_dictionaries(
    {"type": st.just("url_citation"), "url_citation": st.dictionaries(st.text(max_size=3), JSON, max_size=2)}
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.just("assistant"),
        "content": st.none() | WORDS | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": WORDS})),
    },
    optional={
        "refusal": st.none() | WORDS,
        "tool_calls": st.none() | st.lists(FUNCTION_CALL | CUSTOM_CALL, max_size=3),
        "annotations": st.lists(ANNOTATION, max_size=2),
        "audio": st.none()
        | st.fixed_dictionaries({"id": WORDS, "data": WORDS, "transcript": WORDS, "expires_at": st.integers(0, 9)}),
        "function_call": st.none() | st.fixed_dictionaries({"name": WORDS, "arguments": WORDS}),
        "reasoning_content": st.none() | WORDS,
        "reasoning": st.none() | WORDS,
        "reasoning_details": st.lists(JSON, max_size=2),
        "vendor": JSON,
    },
)
MODERATED = {"type": "error", "code": "x", "message": "y"}
BODY = {
    "id": st.just("chatcmpl-1") | st.just(""),
    "created": st.just(1741569952) | st.just(0),
    "model": st.just("gpt-4o"),
}
BESIDE = {
    "usage": st.just(USAGE) | st.just({}),
    "system_fingerprint": st.none() | st.just("fp_1"),
    "service_tier": st.none() | st.just("default"),
    "moderation": st.none() | st.just({"input": MODERATED, "output": MODERATED}),
    "vendor": JSON,
    "prompt_logprobs": JSON,
}
REASON = st.none() | st.sampled_from(["stop", "length", "tool_calls"])


@st.composite
def chat_completions(draw):
    choices = []
    for index in draw(st.lists(st.integers(0, 5), unique=True, min_size=1, max_size=3).map(sorted)):
        said = draw(MESSAGE)
        choice = {"index": index, "message": said, "finish_reason": draw(REASON), **draw(UNKNOWN)}
        if draw(st.booleans()):
            choice["logprobs"] = draw(logprobs_of(said["content"] if isinstance(said["content"], str) else ""))
        choices.append(choice)
    return draw(
        st.fixed_dictionaries({**BODY, "object": st.just("chat.completion"), "choices": st.just(choices)}, optional=BESIDE)
    )


@st.composite
def text_completions(draw):
    lists = st.lists(st.none() | st.floats(-9, 0) | st.text(max_size=2), max_size=3)
    logprobs = st.none() | st.fixed_dictionaries(
        dict.fromkeys(("tokens", "token_logprobs", "top_logprobs", "text_offset"), lists)
    )
    choices = [
        {"text": draw(WORDS), "index": index, "logprobs": draw(logprobs), "finish_reason": draw(REASON), **draw(UNKNOWN)}
        for index in draw(st.lists(st.integers(0, 5), unique=True, min_size=1, max_size=3).map(sorted))
    ]
    return draw(
        st.fixed_dictionaries({**BODY, "object": st.just("text_completion"), "choices": st.just(choices)}, optional=BESIDE)
    )


HELLO = {
    **ENVELOPE,
    "object": "chat.completion",
    "choices": [{
        "index": 0,
        "message": {"role": "assistant", "content": "Hello  there, world.\n", "refusal": None, "annotations": []},
        "logprobs": None,
        "finish_reason": "stop",
    }],
    "usage": USAGE,
    "service_tier": "default",
    "citations": ["a", "b"],
}  # fmt: skip


@given(chat_completions())
@example(HELLO)
def test_assembling_a_split_chat_completion_gives_it_back(body):
    before = copy.deepcopy(body)
    chunks = CHAT.split(body)
    assert assemble(chunks) == body == before
    assert assemble(json.loads(json.dumps(chunks))) == body


@given(text_completions())
def test_assembling_a_split_text_completion_gives_it_back(body):
    before = copy.deepcopy(body)
    chunks = COMPLETIONS.split(body)
    assert assemble(chunks, COMPLETIONS) == body == before
    assert assemble(json.loads(json.dumps(chunks)), COMPLETIONS) == body


@pytest.mark.parametrize("choices", [{}, {"choices": []}, {"choices": None}, {"choices": "x"}, {"choices": [None]}])
@pytest.mark.parametrize("api", [CHAT, COMPLETIONS])
def test_an_answer_without_choices_has_no_chunks(api, choices):
    assert api.split({**ENVELOPE, "usage": USAGE, "message": "no choices", **choices}) == []


def test_a_split_answer_reads_like_a_stream_of_openai():
    chunks = CHAT.split(HELLO)
    assert [value["choices"][0]["delta"] for value in chunks[:-1]] == [
        {"role": "assistant", "content": "", "refusal": None, "annotations": []},
        {"content": "Hello"}, {"content": "  there,"}, {"content": " world."}, {"content": "\n"},
        {},
    ]  # fmt: skip
    assert [value["choices"][0]["finish_reason"] for value in chunks[:-1]] == [None] * 5 + ["stop"]
    assert [value.get("citations") for value in chunks] == [["a", "b"]] + [None] * 6
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], USAGE)
    assert not any("usage" in value for value in chunks[:-1])
    assert all(
        {name: value[name] for name in ENVELOPE} == ENVELOPE and value["service_tier"] == "default" for value in chunks
    )
    assert lean(oracle(chunks)) == lean(HELLO)


@settings(max_examples=40)
@given(chat_completions())
def test_openais_client_reads_a_split_answer(body):
    assume(body.get("usage") != {})
    calls = [tool for choice in body["choices"] for tool in choice["message"].get("tool_calls") or ()]
    assume(not any(tool["type"] == "custom" for tool in calls))
    assume(
        all(
            choice["message"].get("content") is None or isinstance(choice["message"]["content"], str)
            for choice in body["choices"]
        )
    )
    for value in CHAT.split(body):
        ChatCompletionChunk.model_validate(json.loads(json.dumps(value)))


def test_log_probabilities_come_with_their_tokens():
    items = [{"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": []} for token in ("Hel", "lo")]
    said = {"role": "assistant", "content": "Hello"}
    body = {**ENVELOPE, "choices": [{"index": 0, "message": said, "logprobs": {"content": items}, "finish_reason": "stop"}]}
    parts = [value["choices"][0] for value in CHAT.split(body)]
    assert [(value["delta"].get("content"), value["logprobs"]) for value in parts] == [
        ("", None), ("Hel", {"content": items[:1]}), ("lo", {"content": items[1:]}), (None, None),
    ]  # fmt: skip


@pytest.mark.parametrize("beside", [{"refusal": [{"token": "x"}]}, {"vendor": "x"}, {"refusal": None}, {}])
def test_log_probabilities_come_back_whatever_stands_beside_them(beside):
    said = {"role": "assistant", "content": "ab"}
    logprobs = {"content": [{"token": "a"}, {"token": "b"}], **beside}
    body = {**ENVELOPE, "object": "chat.completion"}
    body["choices"] = [{"index": 0, "message": said, "logprobs": logprobs, "finish_reason": "stop"}]
    assert assemble(CHAT.split(body)) == body


@given(WORDS | st.text(alphabet=" \n\u3000ab", max_size=60))
def test_tokens_joined_are_the_text_and_each_is_short(text):
    found = tokens(text)
    assert "".join(found) == text
    assert all(token and len(token.lstrip()) <= 12 for token in found)


# Requests

RIGHT = [
    (CHAT, {"messages": []}),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "x"}], "n": 3, "stream": True, "stream_options": {"include_usage": True}},
    ),
    (CHAT, {"messages": [{}], "n": 2.0, "stream": None, "stream_options": None, "vendor": [None]}),
    (COMPLETIONS, {}),
    *[(COMPLETIONS, {"prompt": prompt}) for prompt in ("x", "", None, [], ["a", "b"], [1, 2], [[1, 2], [3]])],
]
NO_PROMPTS = (5, True, {}, ["a", 1], [1, "a"], [True], [[1], 2], [["a"]], [None], [1.5])
WRONG = [
    (CHAT, {"messages": []}, {"model": None}, "model"),
    (CHAT, {"messages": []}, {"model": ""}, "model"),
    (CHAT, {"messages": []}, {"model": 5}, "model"),
    (CHAT, {}, {}, "messages"),
    *[(CHAT, {}, {"messages": wrong}, "messages") for wrong in (None, "x", {}, 5)],
    (CHAT, {}, {"messages": [{}, "x"]}, "messages[1]"),
    (CHAT, {}, {"messages": [None]}, "messages[0]"),
    *[(api, {"messages": []}, {"n": wrong}, "n") for api in APIS.values() for wrong in (0, -1, 1.5, "1", True, [], {}, 0.0)],
    *[(api, {"messages": []}, {"stream": wrong}, "stream") for api in APIS.values() for wrong in (0, 1, "true", {})],
    *[(api, {"messages": []}, {"stream_options": wrong}, "stream_options") for api in APIS.values() for wrong in (True, [])],
    *[(COMPLETIONS, {}, {"prompt": wrong}, "prompt") for wrong in NO_PROMPTS],
]  # fmt: skip


@pytest.mark.parametrize(("api", "body"), RIGHT)
def test_right_types_are_accepted(api, body):
    api.validate({"model": "m", **body})


@pytest.mark.parametrize(("api", "body", "wrong", "param"), WRONG)
def test_a_wrong_type_is_refused_by_the_name_of_its_member(api, body, wrong, param):
    with pytest.raises(RequestProblem) as caught:
        api.validate({"model": "m", **body, **wrong})
    assert caught.value.param == param
    assert f"'{param}'" in str(caught.value)


@pytest.mark.parametrize(
    ("api", "body", "choices"),
    [
        (CHAT, {}, 1), (CHAT, {"n": None}, 1), (CHAT, {"n": 3}, 3), (CHAT, {"n": 2.0}, 2),
        (COMPLETIONS, {}, 1), (COMPLETIONS, {"prompt": "x", "n": 2}, 2), (COMPLETIONS, {"prompt": []}, 1),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 3}, 6), (COMPLETIONS, {"prompt": [1, 2, 3], "n": 2}, 2),
        (COMPLETIONS, {"prompt": [[1, 2], [3], [4]], "n": 2}, 6), (COMPLETIONS, {"prompt": ["a"]}, 1),
    ],
)  # fmt: skip
def test_choices_are_those_that_the_answer_will_have(api, body, choices):
    assert api.choices(body) == choices
    assert isinstance(api.choices(body), int)


@pytest.mark.parametrize(
    ("api", "body", "limits"),
    [
        (CHAT, {}, False), (CHAT, {"max_tokens": None}, False), (CHAT, {"max_tokens": 5}, True),
        (CHAT, {"max_completion_tokens": 5}, True),
        (COMPLETIONS, {}, False), (COMPLETIONS, {"max_tokens": 5}, True), (COMPLETIONS, {"max_completion_tokens": 5}, False),
    ],
)  # fmt: skip
def test_a_length_limit_is_one_that_the_request_itself_sets(api, body, limits):
    assert api.limits_tokens(body) is limits


@pytest.mark.parametrize(
    ("api", "body", "cannot"),
    [
        (CHAT, {}, False), (CHAT, {"audio": None, "tools": None}, False), (CHAT, {"audio": {"voice": "x"}}, False),
        (CHAT, {"audio": {"format": "pcm16"}}, False), (CHAT, {"audio": {"format": "mp3"}}, True),
        (CHAT, {"audio": "mp3"}, False),
        (CHAT, {"tools": [{"type": "function"}]}, False),
        (CHAT, {"tools": [{"type": "function"}, {"type": "custom"}]}, True),
        (CHAT, {"tools": [None, "custom"]}, False), (CHAT, {"tools": {}}, False),
        (COMPLETIONS, {}, False), (COMPLETIONS, {"best_of": None}, False), (COMPLETIONS, {"best_of": 1}, False),
        (COMPLETIONS, {"best_of": 2}, True), (COMPLETIONS, {"best_of": 2.0}, True), (COMPLETIONS, {"best_of": "2"}, False),
    ],
)  # fmt: skip
def test_what_cannot_be_streamed_is_known(api, body, cannot):
    assert api.cannot_stream(body) is cannot


def test_each_api_is_found_by_its_name():
    assert {name: (api.path, api.id_prefix) for name, api in APIS.items()} == {
        "chat": ("chat/completions", "chatcmpl-"),
        "completions": ("completions", "cmpl-"),
    }

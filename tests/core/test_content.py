import contextlib
import copy
import json
import re
from collections import defaultdict
from itertools import chain

import orjson
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gateway.core.apis import CHAT, COMPLETIONS
from gateway.core.content import Continuation, Diverged, Skip, Trace, parse_position, pieces

USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
FIRST = {
    "id": "chatcmpl-first",
    "object": "chat.completion.chunk",
    "created": 11,
    "model": "m",
    "system_fingerprint": "fp_1",
}
SECOND = {**FIRST, "id": "chatcmpl-second", "created": 22, "system_fingerprint": "fp_2"}
LOGPROBS = {"content": [{"token": "a", "logprob": -0.5}], "refusal": None}


def chunk(*choices, envelope=FIRST, **members):
    return {**envelope, "choices": list(choices), **members}


def part(delta=None, index=0, finish_reason=None, **members):
    return {"index": index, "delta": delta or {}, "finish_reason": finish_reason, **members}


def text(content, **members):
    return chunk(part({"content": content}, **members))


def ended(reason="stop", index=0, **members):
    return chunk(part({}, index, reason), **members)


def call(index=None, id=None, name=None, arguments=None):  # noqa: A002
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    members = {"index": index, "id": id, "type": "function" if id else None, "function": function}
    return {key: value for key, value in members.items() if value is not None}


def calls(*items, **members):
    return chunk(part({"tool_calls": list(items)}, **members))


def under(envelope, value):
    return {**value, **envelope}


def assemble(chunks, api=CHAT):
    assembler = api.assembler()
    for value in copy.deepcopy(chunks):
        assembler.add(value)
    return assembler.body()


def go_on(shown, run, *, finish=True):
    """What a new run adds to what was shown."""
    continuation = Continuation(copy.deepcopy(shown))
    out = [json.loads(new) for value in run if (new := continuation.feed(orjson.dumps(value))) is not None]
    if finish:
        continuation.finish()
    return out


def trace_of(chunks):
    trace = Trace()
    for value in chunks:
        trace.add(value)
    return trace


def with_numbers(chunks):
    """``chunks`` with an index for each call that has only an id."""
    chunks, ids = copy.deepcopy(chunks), defaultdict(list)
    for choice in chain(*[value["choices"] for value in chunks]):
        for each in choice.get("delta", {}).get("tool_calls", ()):
            known = ids[choice["index"]]
            if "index" not in each:
                known += [] if each["id"] in known else [each["id"]]
                each["index"] = known.index(each["id"])
    return chunks


def contents(chunks):
    """The content of a stream: strings that grow joined, of all others the last."""
    found = defaultdict(str)
    for value in with_numbers(chunks):
        for channel, piece in pieces(value):
            held = channel.endswith((".name", "finish_reason"))
            found[channel] = piece if held else found[channel] + piece
    return dict(found)


# Streams: a plan says what is said, a style how a vendor says it; chunks are drawn

TEXT = st.text(max_size=9) | st.text("ab", max_size=5) | st.sampled_from(["Hällo 😀 wörld", '{"a": "\\n"}', "e\u0301"])
NAMES = st.sampled_from(["f", "get_weather", "get_time"])
TEXTS = ("reasoning_content", "content", "refusal")
STYLES = ("numbered", "repeating", "unnumbered")


@st.composite
def plans(draw, max_choices=3):
    """For each choice what it says: texts, the calls' names and arguments, the finish reason."""
    return [
        {
            "texts": {name: draw(TEXT) for name in draw(st.lists(st.sampled_from(TEXTS), unique=True))},
            "calls": draw(st.lists(st.tuples(NAMES, TEXT), max_size=2)),
            "finish": draw(st.sampled_from(["stop", "length", "tool_calls"])),
        }
        for _ in range(draw(st.integers(1, max_choices)))
    ]


def cut(draw, value):
    """``value`` in pieces, empty ones among them."""
    borders = sorted(draw(st.lists(st.integers(0, len(value)), max_size=4)))
    return [value[start:end] for start, end in zip([0, *borders], [*borders, len(value)], strict=True)]


def fragments(draw, number, name, arguments, run, style):
    """The deltas of one call."""
    index = None if style == "unnumbered" else number
    call_id = f"call_{run}_{number}"
    first, *rest = cut(draw, arguments)
    again = (None, None) if style == "numbered" else (call_id, name)
    found = [call(index, call_id, name, first), *[call(index, *again, piece) for piece in rest]]
    return [{"tool_calls": [fragment]} for fragment in found]


def queues(draw, plan, run, style):
    """Deltas whose order counts, list by list."""
    found = [[{name: piece} for piece in cut(draw, value)] for name, value in plan["texts"].items()]
    called = [fragments(draw, at, *each, run, style) for at, each in enumerate(plan["calls"])]
    return found + ([list(chain(*called))] if style == "unnumbered" else called)


def joined(chunks, draw):
    """Some neighbours in one chunk, where no delta says two things of one name."""
    found = []
    for value in chunks:
        last = found[-1]["choices"] if found else []
        (choice,) = value["choices"]
        same = next((other for other in last if other["index"] == choice["index"]), None)
        if not last or not draw(st.booleans()):
            found.append(value)
        elif same is None:
            last.append(choice)
        elif not same["finish_reason"] and not set(same["delta"]) & set(choice["delta"]):
            same["delta"] |= choice["delta"]
            same["finish_reason"] = choice["finish_reason"]
        else:
            found.append(value)
    return found


def streamed(draw, plan, *, run=1, style="numbered", in_order=False):
    """One way to say ``plan``."""
    envelope = FIRST if run == 1 else SECOND
    waiting = []
    for index, choice in enumerate(plan):
        parts = [[part(delta, index) for delta in deltas] for deltas in queues(draw, choice, run, style)]
        waiting.append((parts, [part({"role": "assistant", "content": ""}, index)], part({}, index, choice["finish"])))
    found = []
    while waiting:
        at = draw(st.integers(0, len(waiting) - 1))
        parts, role, last = waiting[at]
        parts[:] = [queue for queue in parts if queue]
        if role:
            found.append(role.pop())
        elif parts:
            found.append(parts[0 if in_order else draw(st.integers(0, len(parts) - 1))].pop(0))
        else:
            found.append(last)
            waiting.pop(at)
    chunks = joined([chunk(copy.deepcopy(choice), envelope=envelope) for choice in found], draw)
    return [*chunks, chunk(envelope=envelope, usage=USAGE)]


def said(chunks, api=CHAT):
    """The answer without what each run has of its own."""
    body = assemble(chunks, api)
    for choice in body["choices"]:
        for each in choice.get("message", {}).get("tool_calls", ()):
            del each["id"]
        for name in TEXTS:
            choice.get("message", {}).setdefault(name, None)
            choice["message"][name] = choice["message"][name] or None
    return body["choices"]


def ids_of_calls(body):
    return {(choice["index"], each["id"]) for choice in body["choices"] for each in choice["message"].get("tool_calls", ())}


@given(plans(), st.sampled_from(STYLES), st.data())
def test_a_new_run_of_the_same_content_goes_on_with_the_stream(plan, style, data):
    first = streamed(data.draw, plan, run=1, style=style)
    second = streamed(data.draw, plan, run=2, style=style)
    shown = first[: data.draw(st.integers(0, len(first)))]
    whole = shown + go_on(shown, second)
    assert said(whole) == said(first)
    assert contents(whole) == contents(first)
    body = assemble(whole)
    assert body["usage"] == USAGE
    if shown:
        assert all(under(FIRST, value) == value for value in whole)
        assert ids_of_calls(assemble(shown)) <= ids_of_calls(body)


@given(plans(), st.sampled_from(STYLES), st.data())
def test_a_stream_that_was_shown_whole_has_nothing_new(plan, style, data):
    first = streamed(data.draw, plan, run=1, style=style)
    assert go_on(first, streamed(data.draw, plan, run=2, style=style)) == []


@given(plans(), st.data())
def test_a_stream_can_change_hands_more_than_once(plan, data):
    first, *others = [streamed(data.draw, plan, run=run) for run in (1, 2, 3)]
    shown = first
    for run in others:
        shown = shown[: data.draw(st.integers(0, len(shown)))]
        shown = shown + go_on(shown, run)
    assert said(shown) == said(first)


def changed(draw, plan, shown):
    """``plan`` with one thing said otherwise, or not at all, that was shown."""
    plan = copy.deepcopy(plan)
    held = contents(shown)
    channel = draw(st.sampled_from(sorted(held)))
    at = draw(st.integers(0, len(held[channel]) - 1))
    index, name, *rest = channel.split(".")
    choice = plan[int(index)]

    def other(value):
        return value[:at] if draw(st.booleans()) else value[:at] + ("y" if value[at] == "x" else "x") + value[at + 1 :]

    if name == "finish_reason":
        choice["finish"] = "content_filter"
    elif name == "tool_calls":
        called_name, arguments = choice["calls"][int(rest[0])]
        is_name = rest[-1] == "name"
        choice["calls"][int(rest[0])] = (called_name + "x", arguments) if is_name else (called_name, other(arguments))
    else:
        choice["texts"][name] = other(choice["texts"][name])
    return channel, plan


@given(plans(), st.sampled_from(STYLES), st.data())
def test_a_new_run_that_says_something_else_is_found_out(plan, style, data):
    first = streamed(data.draw, plan, run=1, style=style)
    shown = first[: data.draw(st.integers(1, len(first)))]
    assume(contents(shown))
    channel, other = changed(data.draw, plan, shown)
    continuation = Continuation(shown)
    run = streamed(data.draw, other, run=2, style=style)
    whole = list(shown)

    def feed_all():
        for value in run:
            if new := continuation.feed(orjson.dumps(value)):
                whole.append(json.loads(new))  # noqa: PERF401  # what came before the difference is wanted too
        continuation.finish()

    with pytest.raises(Diverged):
        feed_all()
    before, after, all_of_it = contents(shown), contents(whole), contents(first)
    assert before.items() <= {**after, **before}.items()
    assert after[channel] == before[channel]
    for name, value in after.items():
        assert value.startswith(before.get(name, ""))
        assert all_of_it[name].startswith(value)


@given(plans(), st.data())
def test_a_new_run_that_ends_too_early_is_found_out(plan, data):
    first = streamed(data.draw, plan, run=1)
    second = streamed(data.draw, plan, run=2)
    shown = first[: data.draw(st.integers(1, len(first)))]
    second = second[: data.draw(st.integers(0, len(second)))]
    continuation = Continuation(shown)
    out = [json.loads(new) for value in second if (new := continuation.feed(orjson.dumps(value)))]
    said_again = contents(second)
    if all(said_again.get(channel, "").startswith(value) for channel, value in contents(shown).items()):
        assert continuation.is_used_up
        continuation.finish()
        assert contents(shown + out) == said_again
    else:
        assert not continuation.is_used_up
        with pytest.raises(Diverged):
            continuation.finish()


# Completions


def completion(value, index=0, finish_reason=None, **members):
    return {"text": value, "index": index, "logprobs": None, "finish_reason": finish_reason, **members}


def completions(draw, texts):
    parts = [[completion(piece, at) for piece in cut(draw, value)] for at, value in enumerate(texts)]
    found = []
    while any(parts):
        found.append(draw(st.sampled_from([queue for queue in parts if queue])).pop(0))
    ends = [completion("", at, "stop") for at in range(len(texts))]
    return [chunk(choice) for choice in found + ends]


@given(st.lists(TEXT, min_size=1, max_size=3), st.data())
def test_completions_go_on_too(texts, data):
    first = completions(data.draw, texts)
    shown = first[: data.draw(st.integers(0, len(first)))]
    whole = shown + go_on(shown, completions(data.draw, texts))
    assert assemble(whole, COMPLETIONS) == assemble(first, COMPLETIONS)
    assert trace_of(whole).position() == trace_of(first).position()


# Pieces

TEXT_PART = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ([part({"role": "assistant", "content": "Hel"})], [("0.content", "Hel")]),
        ([part({"content": "", "reasoning_content": None})], []),
        ([part({"reasoning_content": "a", "content": "b"}, 2)], [("2.reasoning_content", "a"), ("2.content", "b")]),
        ([part({"unknown": {"deep": "a"}, "refusal": "b"})], [("0.unknown.deep", "a"), ("0.refusal", "b")]),
        (
            [part({"tool_calls": [call(1, "x", "f", "{")]}, finish_reason="tool_calls")],
            [
                ("0.tool_calls.1.function.name", "f"),
                ("0.tool_calls.1.function.arguments", "{"),
                ("0.finish_reason", "tool_calls"),
            ],
        ),
        (
            [part({"tool_calls": [call(None, "x", "f"), call(None, "y", "g"), call(None, "x", None, "{")]})],
            [
                ("0.tool_calls.0.function.name", "f"),
                ("0.tool_calls.1.function.name", "g"),
                ("0.tool_calls.0.function.arguments", "{"),
            ],
        ),
        (
            [part({"function_call": {"name": "f", "arguments": "{"}})],
            [("0.function_call.name", "f"), ("0.function_call.arguments", "{")],
        ),
        ([part({"audio": {"id": "x", "data": "QQ==", "expires_at": 5}})], [("0.audio.data", "QQ==")]),
        ([part({"content": "a"}, native_finish_reason="x", content_filter_results={"hate": "safe"})], [("0.content", "a")]),
        ([completion("a", 1, "stop", stop_reason="</s>")], [("1.text", "a"), ("1.finish_reason", "stop")]),
        ([completion("a", content_filter_results={"hate": {"severity": "safe"}})], [("0.text", "a")]),
        ([{"delta": {"content": "a"}}, {"delta": {"content": "b"}}], [("0.content", "a"), ("1.content", "b")]),
        (
            [part({"reasoning_details": [{"type": "t", "text": "a", "index": 3, "format": "x", "signature": "s"}]})],
            [("0.reasoning_details.3.text", "a")],
        ),
        (
            [part({"content": [{"type": "thinking", "thinking": [TEXT_PART]}, TEXT_PART]})],
            [("0.content.thinking.thinking.text.text", "a"), ("0.content.text.text", "a")],
        ),
        ([part({"notes": [{"b": "x", "a": 1}, "x", 5]})], [("0.notes[]", '{"a":1,"b":"x"}'), ("0.notes[]", '"x"')]),
        ([part({"tool_calls": [{"index": 0, "extra_content": {"google": {"thought_signature": "s"}}}]})], []),
    ],
)  # fmt: skip
def test_pieces_are_the_growing_strings_with_their_channels(choices, expected):
    assert pieces(chunk(*choices)) == expected


@pytest.mark.parametrize("choices", [None, 5, "x", {}, [None], ["x"], [[]], [{}], [{"delta": None}], [{"delta": "x"}]])
def test_what_is_no_choice_has_no_pieces(choices):
    assert [channel for channel, _ in pieces({"choices": choices})] in ([], ["0.delta"])
    assert pieces({}) == []


MEMBERS = st.sampled_from([
    "delta", "index", "content", "text", "tool_calls", "function", "name", "id", "arguments", "type", "role", "audio",
    "data", "finish_reason", "logprobs", "signature", "x.y", "usage", "message",
])  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False) | st.text("ab", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(MEMBERS, inner, max_size=4),
    max_leaves=12,
)
ODD_CHUNKS = st.lists(
    st.fixed_dictionaries(
        {"choices": JSON | st.lists(st.dictionaries(MEMBERS, JSON, max_size=4), max_size=2)},
        optional=dict.fromkeys(("id", "created", "model", "usage", "error"), JSON),
    ),
    max_size=4,
)


@given(ODD_CHUNKS, ODD_CHUNKS, st.integers(0, 9))
def test_whatever_chunks_are_nothing_is_raised_but_diverged(shown, run, length):
    trace = trace_of(copy.deepcopy(shown))
    assert len(trace.digest()) == 8
    with contextlib.suppress(Diverged):
        go_on(shown, run)
    with contextlib.suppress(Diverged):
        skip = Skip(length, trace.digest())
        for value in copy.deepcopy(run):
            skip.feed(value)


@given(ODD_CHUNKS)
def test_whatever_was_shown_its_own_run_says_it_again(run):
    run = [value for value in run if not value.get("error")]
    with contextlib.suppress(Diverged):  # odd streams go on after their end
        assert trace_of(go_on(run, run)).length == 0


@pytest.mark.parametrize("nested", [{"a": "x"}, ["x"]])
def test_content_nested_too_deeply_to_be_any_is_left_alone(nested):
    for _ in range(900):
        nested = {"a": nested} if isinstance(nested, dict) else [nested]
    value = json.loads(json.dumps(text("ab")))
    value["choices"][0]["delta"]["deep"] = nested
    assert pieces(value) == [("0.content", "ab")]
    payload = json.dumps(value).encode()
    assert Continuation([text("ab")]).feed(payload) is None
    with pytest.raises(Diverged, match="nested too deeply"):
        Continuation([text("a")]).feed(payload)


# Trace


@given(plans(), st.sampled_from(STYLES), st.data())
def test_a_position_depends_on_content_only(plan, style, data):
    first = trace_of(streamed(data.draw, plan, run=1, style=style))
    second = trace_of(streamed(data.draw, plan, run=2, style=style))
    assert first.position() == second.position()
    assert first.length == sum(map(len, contents(streamed(data.draw, plan)).values()))


@given(plans(), st.data())
def test_other_content_is_another_position(plan, data):
    first = streamed(data.draw, plan)
    _, other = changed(data.draw, plan, first)
    assert trace_of(first).position() != trace_of(streamed(data.draw, other)).position()


def test_the_same_text_in_another_channel_is_another_position():
    positions = [
        trace_of([chunk(part(delta, index))]).position()
        for delta in ({"content": "ab"}, {"refusal": "ab"}, {"content": "a", "refusal": "b"})
        for index in (0, 1)
    ]
    assert len(set(positions)) == len(positions)


@given(plans(), st.data())
def test_a_position_survives_being_written(plan, data):
    trace = trace_of(streamed(data.draw, plan))
    assert re.fullmatch(r"[A-Za-z0-9_-]+", trace.position())
    assert parse_position(trace.position()) == (trace.length, trace.digest())


@pytest.mark.parametrize(
    "word",
    ["", "-", "1", "1-", "1-abcdefg", "1-abcdefghi", "01-abcdefgh", "-1-abcdefgh", "G-abcdefgh", "A-abcdefgh", "1-abcd.fgh",
     "1-abcdefgh\n", " 1-abcdefgh", "1-abcdefg=", "0x1-abcdefgh", "1-äbcdefgh",
     "٣-abcdefgh", "1" * 13 + "-abcdefgh"],
)  # fmt: skip
def test_an_odd_position_is_refused(word):
    with pytest.raises(ValueError, match="position"):
        parse_position(word)


# Continuation, case by case


@pytest.mark.parametrize("payload", [b"", b"[DONE]", b"[]", b"{", b'{"error":{"message":"x"}}', b'{"id":"y","error":"x"}'])
def test_what_is_no_chunk_is_returned_as_it_came(payload):
    assert Continuation([text("a")]).feed(payload) == payload


def test_without_anything_shown_all_comes_as_it_is():
    payload = json.dumps(under(SECOND, text("a"))).encode()
    assert Continuation([]).feed(payload) == payload


def test_a_chunk_that_is_all_new_keeps_its_bytes_but_for_the_envelope():
    shown = [text("a")]
    new = {**SECOND, "big": 1.0, "system_fingerprint": "fp_2", "choices": [part({"content": "b"})], "service_tier": "flex"}
    after = {"choices": [part({"content": "c"})], **SECOND}
    continuation = Continuation(shown)
    assert continuation.feed(orjson.dumps(text("a"))) is None
    for value in (new, new, after, {"choices": [], "x": 1}, {**new, "id": "", "created": 0}, {**new, "id": None}):
        expected = {k: FIRST.get(k, v) if v not in ("", 0) else v for k, v in value.items()}
        assert continuation.feed(json.dumps(value).encode()) == json.dumps(expected).encode()


def test_a_chunk_is_cut_at_the_character():
    (new,) = go_on([text("Hällo 😀")], [text("Häl"), under(SECOND, text("lo 😀!"))])
    assert new == text("!")


def test_a_role_is_told_once_for_each_choice():
    role = {"role": "assistant", "content": ""}
    assert go_on([chunk(part(role))], [chunk(part(role)), text("a")]) == [text("a")]
    assert go_on([chunk(part(role))], [chunk(part(role, 1)), chunk(part(role))]) == [chunk(part(role, 1))]
    assert go_on([text("a")], [chunk(part({"role": "assistant", "content": "ab"}))]) == [
        chunk(part({"role": "assistant", "content": "b"}))
    ]


def test_ids_of_calls_that_were_shown_hold():
    shown = [calls(call(0, "a", "f", "{"))]
    run = [calls(call(0, "b", "f", "{}"), call(1, "c", "g", "")), calls(call(0, "b", "f", "x"))]
    assert go_on(shown, run) == [
        calls({"index": 0, "type": "function", "function": {"arguments": "}"}}, call(1, "c", "g", "")),
        calls({"index": 0, "type": "function", "function": {"arguments": "x"}}),
    ]


def test_calls_that_nobody_numbers_go_on_too():
    shown = [calls(call(None, "a", "f", "{")), calls(call(None, None, None, "}")), calls(call(None, "b", "f", "["))]
    run = [calls(call(None, "c", "f", "{}")), calls(call(None, "d", "f", "[]")), calls(call(None, "e", "g", ""))]
    (choice,) = assemble(shown + go_on(shown, run))["choices"]
    assert choice["message"]["tool_calls"] == [
        call(None, "a", "f", "{}"), call(None, "b", "f", "[]"), call(None, "e", "g", ""),
    ]  # fmt: skip


def test_a_name_that_is_said_again_is_the_same_name():
    shown = [calls(call(0, "a", "f", "1")), calls(call(0, "a", "f", "2"))]
    assert contents(shown)["0.tool_calls.0.function.name"] == "f"
    assert trace_of(shown).position() == trace_of([calls(call(0, "b", "f", "12"))]).position()
    assert go_on(shown, [calls(call(0, "b", "f", "12"))]) == []


def test_items_of_a_list_go_on_whole():
    def notes(*items):
        return chunk(part({"annotations": [{"url": item} for item in items]}))

    assert go_on([notes("a"), notes("b")], [notes("a", "b", "c"), notes("d")]) == [notes("c"), notes("d")]
    with pytest.raises(Diverged):
        go_on([notes("a"), notes("b")], [notes("a", "x")])


def test_encoded_bytes_are_not_cut_inside():
    def audio(data):
        return chunk(part({"audio": {"data": data}}))

    assert go_on([audio("QUJD")], [audio("QUJD"), audio("REVG")]) == [audio("REVG")]
    with pytest.raises(Diverged, match="inside"):
        go_on([audio("QUJD")], [audio("QUJDREVG")])


@pytest.mark.parametrize(
    ("shown", "run", "channel", "at"),
    [
        ([text("Hello")], [text("Help")], "0.content", 3),
        ([text("Hello")], [text("He"), text("lp")], "0.content", 3),
        ([text("Hello")], [text("Hel"), ended()], "0.content", 3),
        ([text("Hello")], [chunk(part({"content": "Hel"}, finish_reason="stop"))], "0.content", 3),
        ([text("Hello")], [text("Hel")], "0.content", 3),
        ([text("a"), ended("stop")], [text("a"), ended("length")], "0.finish_reason", 0),
        ([text("a"), ended("stop")], [text("ab"), ended("stop")], "0.content", 1),
        ([text("a"), ended("stop")], [text("a")], "0.finish_reason", 0),
        ([text("a"), ended("stop")], [text("a"), ended("stop"), ended("length")], "0.finish_reason", 4),
        ([calls(call(0, "a", "f", ""))], [calls(call(0, "a", "g", ""))], "0.tool_calls.0.function.name", 0),
        ([calls(call(0, "a", "f", ""))], [text("a"), ended()], "0.tool_calls.0.function.name", 0),
    ],
)
def test_the_first_difference_is_told_and_not_what_was_said(shown, run, channel, at):
    with pytest.raises(Diverged, match=f"at character {at} of {re.escape(channel)}$") as caught:
        go_on(shown, run)
    assert (caught.value.channel, caught.value.at) == (channel, at)


def test_a_long_name_of_a_channel_does_not_fill_the_log():
    assert len(str(Diverged("x" * 10_000, 5))) < 200


def test_logprobs_stay_or_go_with_the_whole_text_of_a_chunk():
    def likely(content, **members):
        return text(content, logprobs=LOGPROBS, **members)

    assert go_on([likely("ab")], [likely("a"), likely("b"), likely("c")]) == [likely("c")]
    assert go_on([likely("ab")], [likely("ab", finish_reason="stop")]) == [text("", logprobs=None, finish_reason="stop")]
    assert go_on([text("a")], [text("ab", logprobs={"content": None, "refusal": None})])
    with pytest.raises(Diverged, match="logprobs"):
        go_on([likely("ab")], [likely("abc")])
    with pytest.raises(Diverged, match="logprobs"):
        go_on([text("ab")], [chunk(part({"content": "ab", "refusal": "x"}, logprobs=LOGPROBS))])


def test_logprobs_do_not_keep_a_name_from_being_said_again():
    shown = [calls(call(0, "a", "f", "1"), logprobs=LOGPROBS)]
    again = calls(call(0, "b", "f", "2"), logprobs=LOGPROBS)
    assert go_on(shown, [calls(call(0, "b", "f", "1"), logprobs=LOGPROBS), again])[0]["choices"][0]["logprobs"] == LOGPROBS


def test_usage_is_told_once():
    about = chunk(usage=USAGE)
    end = ended(usage=USAGE)
    plain = [text("a"), ended()]
    assert go_on([text("a")], [*plain, about]) == [ended(), about]
    assert go_on(plain, [*plain, about]) == [about]
    assert go_on([*plain, about], [*plain, about]) == []
    assert go_on(plain, [text("a"), end]) == [under({"usage": USAGE}, ended(None))]
    assert go_on([text("a"), end], [text("a"), end]) == []
    assert go_on(plain, [*plain, chunk(usage={})]) == []
    # Told at the beginning and at the end.
    assert go_on([about, text("a")], [about, *plain, about]) == [ended(), about]


def test_usage_with_every_chunk_is_told_with_what_is_new():
    run = [chunk(part({"content": word}), usage={"total_tokens": at}) for at, word in enumerate("abcd", 1)]
    assert go_on(run[:2], [*run, ended(usage=USAGE)]) == [*run[2:], ended(usage=USAGE)]


def test_what_says_nothing_comes_only_after_something_new():
    silent = chunk(prompt_filter_results=[{"prompt_index": 0}])
    empty = text("")
    assert go_on([silent], [silent, empty, text("a"), silent, empty]) == [text("a"), silent, empty]
    assert go_on([text("a")], [silent, empty, text("a"), empty, text("b"), empty]) == [text("b"), empty]


def test_each_choice_goes_on_by_itself():
    shown = [text("a"), chunk(part({"content": "x"}, 1))]
    run = [chunk(part({"content": "xy"}, 1)), text("ab"), ended(index=1), ended()]
    out = go_on(shown, run)
    assert out == [chunk(part({"content": "y"}, 1)), text("b"), ended(index=1), ended()]


# Skip


@given(plans(max_choices=1), st.sampled_from(["numbered", "repeating"]), st.data())
def test_a_client_that_knows_its_position_gets_the_rest(plan, style, data):
    seen_run = streamed(data.draw, plan, run=1, style=style, in_order=True)
    log = streamed(data.draw, plan, run=2, style=style, in_order=True)
    seen = seen_run[: data.draw(st.integers(0, len(seen_run)))]
    skip = Skip(*parse_position(trace_of(seen).position()))
    out = [rest for value in copy.deepcopy(log) if (rest := skip.feed(value)) is not None]
    assert skip.reached
    before, after = contents(seen), contents(out)
    held = [name for name in after if name.endswith(".name") and before.get(name) == after[name]]
    whole = {name: before.get(name, "") + after.get(name, "") for name in {**before, **after} if name not in held}
    assert whole == {name: value for name, value in contents(log).items() if name not in held}
    assert len(out) <= len(log)


@given(plans(max_choices=1), st.data())
def test_a_log_that_says_something_else_is_found_out(plan, data):
    run = streamed(data.draw, plan, in_order=True)
    seen = run[: data.draw(st.integers(1, len(run)))]
    assume(contents(seen))
    _, other = changed(data.draw, plan, seen)
    skip = Skip(*parse_position(trace_of(seen).position()))
    try:
        for value in streamed(data.draw, other, run=2, in_order=True):
            skip.feed(value)
    except Diverged:
        pass
    assert not skip.reached


@pytest.mark.parametrize("length", [0, 3])
def test_a_position_of_another_stream_is_never_reached(length):
    skip = Skip(length, "abcdefgh")
    with pytest.raises(Diverged, match="what the client saw"):
        skip.feed(text("abcdef"))
    assert not skip.reached


def test_a_log_that_ends_before_the_position_does_not_reach_it():
    skip = Skip(*parse_position(trace_of([text("abc")]).position()))
    assert skip.feed(text("ab")) is None
    assert not skip.reached


def test_a_chunk_is_cut_at_the_position_and_later_ones_are_not_touched():
    skip = Skip(*parse_position(trace_of([text("ab")]).position()))
    assert skip.feed(chunk(part({"role": "assistant", "content": "abc"}, finish_reason="stop"))) == chunk(
        part({"content": "c"}, finish_reason="stop")
    )
    assert skip.reached
    assert skip.feed(text("d")) == text("d")


def test_a_position_inside_of_what_cannot_be_cut_is_refused():
    short = parse_position(trace_of([ended("sto")]).position())
    with pytest.raises(Diverged, match="inside"):
        Skip(*short).feed(ended("stop"))
    with pytest.raises(Diverged, match="logprobs"):
        Skip(*parse_position(trace_of([text("a")]).position())).feed(text("ab", logprobs=LOGPROBS))


def test_usage_that_comes_with_the_end_is_not_lost():
    seen = [text("a"), ended()]
    skip = Skip(*parse_position(trace_of(seen).position()))
    assert [skip.feed(value) for value in (text("a"), ended(usage=USAGE))] == [None, under({"usage": USAGE}, ended(None))]


def test_the_start_of_a_stream_is_a_position_too():
    skip = Skip(*parse_position(Trace().position()))
    assert skip.reached
    assert skip.feed(text("a")) == text("a")

import copy
import json

import orjson
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gateway.core.apis import CHAT, COMPLETIONS
from gateway.core.apis.base import IGNORED, RequestProblem
from gateway.core.key import cache_key, canonical_text, tenant_of, without_path

SECRET = bytes(range(32))
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"b": {"type": "null"}, "a": {"default": None}}},
    },
}
CHAT_BODY = {
    "model": "gpt-4o",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi 😀"}, {"type": "image_url", "image_url": {"url": "u"}}]},
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "1.0"},
    ],
    "temperature": 0.5, "n": 2, "stop": ["a", "b"], "logit_bias": {"5": -100, "7": 1}, "tools": [TOOL], "functions": [TOOL],
    "response_format": {"type": "json_schema", "json_schema": {"b": 1, "a": 2.0}}, "tool_choice": {"type": "function"},
    "top_k": 40, "chat_template_kwargs": {"b": 1, "a": None},
}  # fmt: skip
COMPLETION_BODY = {
    "model": "gpt-3.5-turbo-instruct",
    "prompt": ["one", "two"],
    "max_tokens": 7,
    "logprobs": 2,
    "suffix": "s",
}


def key(body, *, secret=SECRET, owner="owner", api=CHAT, route=("openai", "gpt-4o"), ignored=()):
    return cache_key(secret, owner=owner, api=api, route=route, body=body, ignored=ignored)


# A change of any of these is a change of every deployment's keys: raise SCHEMA_VERSION or undo it.
@pytest.mark.parametrize(
    ("api", "body", "digest"),
    [
        (
            CHAT,
            {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]},
            "cdfca65973f5dfcd6149ae1b72b27a0dc007f88f",
        ),
        (CHAT, CHAT_BODY, "03d6719eebfca99a6cfa626344fc7a7b53f1996b"),
        (CHAT, CHAT_BODY | {"stream": True, "user": "me"}, "03d6719eebfca99a6cfa626344fc7a7b53f1996b"),
        (COMPLETIONS, {"model": "gpt-4o", "prompt": "Hello"}, "95e33cb5ddfb6cccac9247bee03f67f0a03ecf2a"),
        (COMPLETIONS, COMPLETION_BODY, "fa82ea5cd9fc029d6ca8f121dbcebc9c7a922a99"),
    ],
    ids=["hello", "all", "all streamed", "prompt", "prompts"],
)
def test_golden_vectors(api, body, digest):
    assert key(body, api=api) == digest


def test_the_tenant_is_a_digest_of_the_whole_credential():
    assert tenant_of(SECRET, ["sk-1", "", ""]) == "cfff841a15b5f0b92413f315d314c7c2"
    assert len({tenant_of(SECRET, parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], [])}) == 5
    assert tenant_of(SECRET, ["sk-1"]) != tenant_of(SECRET[:16], ["sk-1"])


def test_the_canonical_text_is_sorted_and_lean():
    body = {
        "stop": "x",
        "top_k": None,
        "n": None,
        "messages": [{"role": "user", "content": "1.0", "name": None}],
        "seed": 1.0,
    }
    assert canonical_text(CHAT, body) == b'{"messages":[{"content":"1.0","role":"user"}],"seed":1,"stop":["x"],"top_k":null}'


def shuffled(value, keep=()):
    """``value`` with the members of each object in reverse order, but inside the members that ``keep`` names."""
    if isinstance(value, dict):
        return {name: item if name in keep else shuffled(item) for name, item in reversed(value.items())}
    if isinstance(value, list):
        return [shuffled(item) for item in value]
    return value


AS_SENT = ("tools", "functions", "response_format", "chat_template_kwargs", "top_k")
SAME = {
    "order of members": shuffled(CHAT_BODY, AS_SENT),
    "white space": json.loads(json.dumps(CHAT_BODY, indent=3)),
    "null members": CHAT_BODY | {"seed": None, "stream": None, "audio": None, "max_tokens": None, "tools": [TOOL]},
    "whole numbers": CHAT_BODY | {"n": 2.0, "logit_bias": {"5": -100.0, "7": 1}},
    "null in a message": CHAT_BODY | {"messages": [{"content": None, "name": None, **m} for m in CHAT_BODY["messages"]]},
    "the model, which the route names": CHAT_BODY | {"model": "alias"},
    **{f"ignored {name}": CHAT_BODY | {name: {"any": ["thing", None]}} for name in sorted(IGNORED)},
}


@pytest.mark.parametrize("body", SAME.values(), ids=SAME)
def test_the_key_does_not_depend_on_what_changes_nothing(body):
    assert key(body) == key(CHAT_BODY)


def test_the_ignored_names_are_those_of_the_design():
    assert {
        "stream", "stream_options", "user", "safety_identifier", "metadata", "store",
        "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "service_tier",
    } == IGNORED  # fmt: skip


@pytest.mark.parametrize("api", [CHAT, COMPLETIONS])
def test_one_stop_word_may_stand_alone(api):
    assert key({"stop": "x"}, api=api) == key({"stop": ["x"]}, api=api) != key({"stop": ["x", "x"]}, api=api)
    assert key({"stop": None}, api=api) == key({}, api=api) != key({"stop": []}, api=api)


def test_cache_breakpoints_are_ignored_inside_messages_and_nowhere_else():
    part = {"type": "text", "text": "Hi"}
    marked = part | {"prompt_cache_breakpoint": {"mode": "explicit"}}

    def asked(content, **members):
        return {"messages": [{"role": "user", "content": content, **members}]}

    assert key(asked([part])) == key(asked([marked])) == key(asked([part], prompt_cache_breakpoint=True))
    for name in ("prediction", "tool_choice", "vendor", "tools"):
        assert key({"messages": [], name: [part]}) != key({"messages": [], name: [marked]})
    assert key(asked([part], vendor=part)) != key(asked([part], vendor=marked))


OTHER = {
    "null of an unknown member": (CHAT_BODY, CHAT_BODY | {"vendor": None}),
    "null inside an unknown member": ({"x": {"a": None}}, {"x": {}}),
    "null of an unknown member of a message": ({"messages": [{"x": None}]}, {"messages": [{}]}),
    "whole numbers of an unknown member": ({"top_k": 1}, {"top_k": 1.0}),
    "order inside an unknown member": ({"x": {"a": 1, "b": 2}}, {"x": {"b": 2, "a": 1}}),
    **{
        f"order inside {name}": ({name: [{"a": 1, "b": 2}]}, {name: [{"b": 2, "a": 1}]})
        for name in ("tools", "functions", "response_format")
    },
    "order of messages": ({"messages": [{"role": "a"}, {"role": "b"}]}, {"messages": [{"role": "b"}, {"role": "a"}]}),
    "order of stop words": ({"stop": ["a", "b"]}, {"stop": ["b", "a"]}),
    "true and 1": ({"logprobs": True}, {"logprobs": 1}),
    "text and number": ({"seed": "1"}, {"seed": 1}),
    "text that looks like a number": ({"messages": [{"content": "1.0"}]}, {"messages": [{"content": "1"}]}),
    "white space in text": ({"messages": [{"content": "a b"}]}, {"messages": [{"content": "a  b"}]}),
    "unicode forms": ({"messages": [{"content": "é"}]}, {"messages": [{"content": "e\u0301"}]}),
    "null in an array": ({"messages": [{"content": [None]}]}, {"messages": [{"content": []}]}),
    "null messages": ({"messages": [None]}, {"messages": []}),
    "empty and absent": ({"logit_bias": {}}, {}),
    "1 and 1.5": ({"temperature": 1}, {"temperature": 1.5}),
    "large numbers": ({"seed": 2**53}, {"seed": 2**53 + 1}),
    "large floats": ({"seed": 2.0**53}, {"seed": 2.0**53 + 2}),
    "signs": ({"temperature": 1.0}, {"temperature": -1.0}),
    "an ignored name inside a message": ({"messages": [{"user": "a"}]}, {"messages": [{"user": "b"}]}),
    "an ignored name inside a tool": ({"tools": [{"metadata": 1}]}, {"tools": [{"metadata": 2}]}),
}


@pytest.mark.parametrize(("one", "other"), OTHER.values(), ids=OTHER)
def test_the_key_changes_with(one, other):
    assert key(one) != key(other)


def test_zero_has_no_sign():
    assert key({"temperature": -0.0}) == key({"temperature": 0})


# Any edit

TEXT = st.text(max_size=5)
LEAF = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=5
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system"]), "content": TEXT | st.lists(st.dictionaries(TEXT, VALUE, max_size=2))},
        optional={"name": TEXT, "tool_calls": VALUE, "vendor": VALUE, "audio": VALUE},
    ),
    max_size=3,
)  # fmt: skip
REQUEST = st.fixed_dictionaries(
    {"messages": MESSAGES},
    optional={
        "temperature": LEAF, "stop": TEXT | st.lists(TEXT, max_size=2),
        "tools": VALUE, "functions": VALUE, "response_format": VALUE,
        "tool_choice": VALUE, "logit_bias": st.dictionaries(TEXT, LEAF, max_size=3), "vendor": VALUE, "guided_json": VALUE,
    },
)  # fmt: skip


def places(value, path=()):
    """The path of each value inside of ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield (*path, name)
        yield from places(item, (*path, name))


def edited(draw, body):
    """``body`` with one value replaced, removed or added, or one order changed."""
    body = copy.deepcopy(body)
    *path, last = draw(st.sampled_from(list(places(body))))
    inside = body
    for name in path:
        inside = inside[name]
    edit = draw(st.sampled_from(["replace", "remove", "add", "reverse"]))
    if edit == "replace":
        inside[last] = draw(VALUE)
    elif edit == "remove":
        del inside[last]
    elif edit == "add" and isinstance(inside, dict):
        inside.setdefault(draw(TEXT), draw(VALUE))
    elif edit == "add":
        inside.insert(last, draw(VALUE))
    elif isinstance(inside, dict):
        items = list(reversed(inside.items()))
        inside.clear()
        inside.update(items)
    else:
        inside.reverse()
    return body


KNOWN_OF_MESSAGES = {"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "function_call", "audio"}


def meaning(value, *, strict, ordered=False):
    """What must decide over the key, as a value to compare; written apart from the code that it judges."""
    if isinstance(value, dict):
        members = [
            (name, meaning(item, strict=strict, ordered=ordered))
            for name, item in value.items()
            if strict or item is not None
        ]
        return ("object", tuple(members if ordered else sorted(members, key=lambda member: member[0])))
    if isinstance(value, list):
        return ("array", tuple(meaning(item, strict=strict, ordered=ordered) for item in value))
    if isinstance(value, float) and not strict and value == int(value) and abs(value) < 2**53:
        return ("int", int(value))
    return (type(value).__name__, repr(value))


def meaning_of_message(message):
    if not isinstance(message, dict):
        return meaning(message, strict=True, ordered=True)
    return tuple(sorted(
        (name, meaning(value, strict=name not in KNOWN_OF_MESSAGES, ordered=name not in KNOWN_OF_MESSAGES))
        for name, value in message.items()
        if name != "prompt_cache_breakpoint" and (value is not None or name not in KNOWN_OF_MESSAGES)
    ))  # fmt: skip


def meaning_of_request(body):
    told = {}
    for name, value in body.items():
        if name in IGNORED or name == "model":
            continue
        as_sent = name in ("tools", "functions", "response_format")
        known = as_sent or name in ("messages", "temperature", "stop", "tool_choice", "logit_bias")
        if known and value is None:
            continue
        if name == "messages" and isinstance(value, list):
            told[name] = tuple(meaning_of_message(message) for message in value)
        elif name == "stop":
            told[name] = meaning([value] if isinstance(value, str) else value, strict=True, ordered=True)
        else:
            told[name] = meaning(value, strict=as_sent or not known, ordered=as_sent or not known)
    return told


@given(REQUEST, st.data())
def test_the_key_changes_with_an_edit_if_and_only_if_its_meaning_does(body, data):
    other = edited(data.draw, body)
    assume(isinstance(other.get("messages"), list))
    assert (key(body) == key(other)) == (meaning_of_request(body) == meaning_of_request(other))


@given(REQUEST)
def test_the_key_is_that_of_the_request_as_it_goes_over_the_wire(body):
    before = copy.deepcopy(body)
    assert key(body) == key(orjson.loads(orjson.dumps(body)))
    assert (body, list(body)) == (before, list(before))


@given(st.sampled_from(sorted(IGNORED)), VALUE)
def test_the_key_does_not_depend_on_any_value_of_an_ignored_member(name, value):
    assert key(CHAT_BODY | {name: value}) == key(CHAT_BODY)


# What goes in besides the body

PARTS = st.tuples(st.text("ab\0", max_size=3), st.lists(st.text("ab\0", max_size=3), max_size=3), st.sampled_from("ab"))


@given(PARTS, PARTS)
@example(("a", ["b"], "a"), ("ab", [], "a"))
@example(("", ["a"], "a"), ("a", [""], "a"))
@example(("", ["a", "b"], "a"), ("", ["ab"], "a"))
def test_owner_route_and_body_do_not_run_into_each_other(one, other):
    def joined(parts):
        owner, route, content = parts
        return key({"messages": [{"content": content}]}, owner=owner, route=route)

    assert (joined(one) == joined(other)) == (one == other)


def test_api_route_owner_and_secret_are_in_the_key():
    body = {"stop": "x"}
    variants = [
        {},
        {"api": COMPLETIONS},
        {"route": ("openai", "b")},
        {"route": ("a", "gpt-4o")},
        {"owner": "b"},
        {"secret": b"s" * 16},
    ]
    assert len({key(body, **variant) for variant in variants}) == len(variants)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_a_secret_may_have_16_to_64_bytes(size):
    assert len(key({}, secret=b"s" * size)) == 40


# Paths that the configuration ignores


@pytest.mark.parametrize(
    ("path", "left"),
    [
        ("a", {"b": [{"x": 3, "y": 4}, {"x": 5}, 6]}),
        ("a.x", {"a": {"y": {"x": 2}}, "b": [{"x": 3, "y": 4}, {"x": 5}, 6]}),
        ("a.y.x", {"a": {"x": 1, "y": {}}, "b": [{"x": 3, "y": 4}, {"x": 5}, 6]}),
        ("a.*", {"a": {}, "b": [{"x": 3, "y": 4}, {"x": 5}, 6]}),
        ("a.*.x", {"a": {"x": 1, "y": {}}, "b": [{"x": 3, "y": 4}, {"x": 5}, 6]}),
        ("b.*.x", {"a": {"x": 1, "y": {"x": 2}}, "b": [{"y": 4}, {}, 6]}),
        ("b.0.x", {"a": {"x": 1, "y": {"x": 2}}, "b": [{"y": 4}, {"x": 5}, 6]}),
        ("b.1", {"a": {"x": 1, "y": {"x": 2}}, "b": [{"x": 3, "y": 4}, 6]}),
        ("b.*", {"a": {"x": 1, "y": {"x": 2}}, "b": []}),
        ("*", {}),
        *[(path, None) for path in ("", ".", "c", "a.z", "b.9", "b.-1", "b.²", "a.x.y", "b.x", "a..x")],
    ],
)
def test_an_ignored_path_takes_out_what_it_names_and_leaves_the_request_alone(path, left):
    body = {"a": {"x": 1, "y": {"x": 2}}, "b": [{"x": 3, "y": 4}, {"x": 5}, 6]}
    before = copy.deepcopy(body)
    assert without_path(body, path.split(".")) == (before if left is None else left)
    assert body == before


def test_ignored_paths_are_out_of_the_key():
    messages = [{"role": "user", "content": "Hi", "timestamp": 1}, {"role": "user", "content": "Ho", "timestamp": 2}]
    one = {"messages": messages, "extra": {"trace": 1, "depth": 2}}
    other = {"messages": [{**message, "timestamp": 9} for message in messages], "extra": {"trace": 2, "depth": 2}}
    ignored = ("messages.*.timestamp", "extra.trace")
    assert key(one) != key(other)
    assert key(one, ignored=ignored) == key(other, ignored=ignored)
    assert key(one, ignored=ignored) != key(one | {"extra": {"depth": 3}}, ignored=ignored)


# What cannot be written


def nested(depth):
    value = "leaf"
    for _ in range(depth):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize("api", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", ["vendor", "metadata", "tool_choice", "logit_bias", "stream_options"])
def test_a_request_that_is_nested_too_deeply_to_be_written_again_is_the_callers_fault(api, name):
    body = {"model": "m", "messages": [], name: nested(500)}
    with pytest.raises(RequestProblem, match="nested too deeply") as caught:
        api.validate(body)
    assert caught.value.param == name


def test_a_request_that_can_be_written_has_a_key():
    body = {"model": "m", "messages": [{"role": "user", "content": [nested(125)]}], "tool_choice": nested(126)}
    CHAT.validate(body)
    assert len(key(body)) == 40


@pytest.mark.parametrize(
    "text", ["18446744073709551616", "-9223372036854775809", "1e300", "9007199254740993.0", "1e-400", "-0.0"]
)
def test_numbers_of_any_size_have_a_key(text):
    for name in ("seed", "vendor"):
        body = orjson.loads(b'{"messages":[],"%s":%s}' % (name.encode(), text.encode()))
        assert key(body) == key(orjson.loads(orjson.dumps(body)))

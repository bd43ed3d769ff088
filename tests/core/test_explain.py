import copy
import operator

import orjson
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gateway.core.apis import CHAT, COMPLETIONS
from gateway.core.apis.base import IGNORED
from gateway.core.explain import Difference, differences, left_out, nearest
from gateway.core.key import canonical_text

# What is not in the key

PART = {"type": "text", "text": "Hi", "prompt_cache_breakpoint": {"mode": "explicit"}}
BODY = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "a", "name": None},
        {"role": "user", "content": [PART, PART], "prompt_cache_breakpoint": True, "vendor": None},
    ],
    "stream": True, "user": None, "metadata": {"a": 1}, "seed": None, "vendor": None, "stop": "x", "n": 1.0,
    "tools": [{"type": "function", "strict": None}],
}  # fmt: skip
DROPPED = [
    "messages.0.name", "messages.1.content.0.prompt_cache_breakpoint", "messages.1.content.1.prompt_cache_breakpoint",
    "messages.1.prompt_cache_breakpoint", "metadata", "seed", "stream", "user",
]  # fmt: skip


def test_ignored_members_breakpoints_and_nulls_are_left_out():
    assert left_out(CHAT, BODY, ()) == DROPPED
    assert left_out(COMPLETIONS, {"model": "m", "prompt": None, "suffix": None, "echo": True, "x": None}, ()) == [
        "prompt",
        "suffix",
    ]
    assert left_out(CHAT, {"model": "m", "messages": []}, ()) == []
    assert left_out(CHAT, {"model": "m", "messages": [], **dict.fromkeys(IGNORED, 1)}, ()) == sorted(IGNORED)


@pytest.mark.parametrize(
    ("ignored", "more"),
    [
        (["vendor"], ["vendor"]),
        (["tools.*.type"], ["tools.0.type"]),
        (["tools.0"], ["tools.0"]),
        (["tools", "tools.0.type"], ["tools"]),
        (["metadata.a"], []),
        (["model", "*.nothing", "messages.7", "seed.x", "stop.0"], []),
        (["tools.*.type", "tools.0"], ["tools.0"]),
    ],
)
def test_what_the_configuration_ignores_is_left_out(ignored, more):
    assert left_out(CHAT, BODY, ignored) == sorted([*DROPPED, *more])


def test_positions_are_those_of_the_request_whatever_went_before():
    body = {"model": "m", "messages": [{"role": "user", "content": str(number), "name": None} for number in range(5)]}
    assert left_out(CHAT, body, ["messages.1", "messages.1", "messages.2"]) == [
        "messages.0.name", "messages.1", "messages.2", "messages.3.name", "messages.4",
    ]  # fmt: skip
    assert left_out(CHAT, body, ["*"]) == ["messages"]


def test_not_more_than_200_paths_are_told():
    assert len(left_out(CHAT, {"model": "m", "messages": [{"name": None}] * 300}, ())) == 200


MEMBERS = st.sampled_from(["a", "role", "content", "0", "prompt_cache_breakpoint", "seed", "user", "x"])
SCALARS = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, -0.0, 1.0, 1.5]) | st.text("ab", max_size=3)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(MEMBERS, inner, max_size=3), max_leaves=8
)
REQUESTS = st.builds(
    lambda members, messages: {"model": "m", **members, "messages": messages},
    st.dictionaries(MEMBERS, VALUES, max_size=4),
    st.lists(st.dictionaries(MEMBERS, VALUES, max_size=3), max_size=3),
)
PATHS = st.lists(
    st.lists(MEMBERS | st.sampled_from(["*", "1", "messages"]), min_size=1, max_size=3).map(".".join), max_size=3
)


def at_paths(body, paths, change):
    """``body`` with a change at each of the paths, the last positions first."""
    body = copy.deepcopy(body)
    for path in sorted(
        (path.split(".") for path in paths), key=lambda path: [(len(name), name) for name in path], reverse=True
    ):
        *parents, name = path
        value = body
        for parent in parents:
            value = value[int(parent)] if isinstance(value, list) else value[parent]
        change(value, int(name) if isinstance(value, list) else name)
    return body


@given(REQUESTS, PATHS)
def test_what_is_left_out_can_be_anything_without_the_key_noticing(body, ignored):
    paths = left_out(CHAT, body, ignored)
    assert paths == sorted(set(paths))
    text = canonical_text(CHAT, body, ignored)
    assert canonical_text(CHAT, at_paths(body, paths, lambda value, name: value.pop(name))) == text


def leaves(value, place=()):
    if not isinstance(value, dict | list):
        return [".".join(place)]
    named = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for name, item in named for leaf in leaves(item, (*place, str(name)))]


@given(REQUESTS, PATHS, st.data())
def test_anything_else_changes_the_key(body, ignored, data):
    out = left_out(CHAT, body, [*ignored])
    kept = [leaf for leaf in leaves(body) if leaf != "model" and not any(f"{leaf}.".startswith(f"{path}.") for path in out)]
    assume(kept)
    changed = at_paths(
        body, [data.draw(st.sampled_from(kept))], lambda value, name: operator.setitem(value, name, "changed")
    )
    assert canonical_text(CHAT, changed, ignored) != canonical_text(CHAT, body, ignored)


# How two requests differ


def told(ours, theirs):
    return list(differences(orjson.dumps(ours), orjson.dumps(theirs)))


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        ({"a": 1}, {"a": 2}, Difference("a", "value", 1, 2)),
        ({"a": 1}, {"a": 1.0}, Difference("a", "value", 1, 1.0)),
        ({"a": 1}, {"a": True}, Difference("a", "value", 1, True)),
        ({"a": 0.0}, {"a": -0.0}, Difference("a", "value", 0.0, -0.0)),
        ({"a": "1"}, {"a": 1}, Difference("a", "value", "1", 1)),
        ({"a": None}, {"a": False}, Difference("a", "value", None, False)),
        ({"a": []}, {"a": {}}, Difference("a", "value", [], {})),
        ({"a": None}, {}, Difference("a", "only-ours", None, None)),
        ({}, {"a": {"b": [1]}}, Difference("a", "only-theirs", None, {"b": [1]})),
        ({"m": [{"c": "abc"}]}, {"m": [{"c": "abd"}]}, Difference("m.0.c", "text", "abc", "abd", 2)),
        ({"m": [1, 2]}, {"m": [1]}, Difference("m.1", "only-ours", 2, None)),
        ({"m": [1]}, {"m": [1, {"r": 2}, 3]}, Difference("m.1", "only-theirs", None, {"r": 2})),
        (
            {"a": {"b": 1, "c": 2, "d": 3}},
            {"a": {"b": 1, "d": 3, "c": 2}},
            Difference("a", "order", ["c", "d"], ["d", "c"], 1),
        ),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, Difference("", "order", ["a", "b"], ["b", "a"], 0)),
        ("", "x", Difference("", "text", "", "x", 0)),
    ],
)
def test_one_difference_is_told_as_what_it_is(ours, theirs, difference):
    found = told(ours, theirs)
    assert found == [difference]
    assert repr(found) == repr([difference])  # as 1 == 1.0


def test_differences_come_in_the_order_of_the_document():
    ours = {"m": [{"c": "x", "r": "u"}, 2], "o": {"a": 1, "b": 2}, "z": 1}
    theirs = {"k": 1, "m": [{"c": "y", "r": "u", "s": 1}, 3, 4], "o": {"b": 3, "a": 1}, "z": 1}
    assert [(found.path, found.kind) for found in told(ours, theirs)] == [
        ("m.0.c", "text"), ("m.0.s", "only-theirs"), ("m.1", "value"), ("m.2", "only-theirs"),
        ("o", "order"), ("o.b", "value"), ("k", "only-theirs"),
    ]  # fmt: skip


def test_long_texts_are_shown_around_their_first_difference():
    ours, theirs = "ä" * 1000 + "x" + "b" * 1000, "ä" * 1000 + "yy" + "b" * 1000
    assert told({"a": ours}, {"a": theirs}) == [
        Difference("a", "text", "…" + "ä" * 20 + "x" + "b" * 19 + "…", "…" + "ä" * 20 + "yy" + "b" * 18 + "…", 1000)
    ]
    assert told({"a": ours}, {"a": ours[:1000]}) == [
        Difference("a", "text", "…" + "ä" * 20 + "x" + "b" * 19 + "…", "…" + "ä" * 20, 1000)
    ]


def test_long_values_are_cut():
    [found] = told({"a": {"b": ["ä" * 500]}}, {"a": "c" * 500})
    assert found.kind == "value"
    assert found.ours.startswith('{"b":["ää')
    assert found.theirs == "c" * 200 + "…"
    assert len(found.ours) <= 201


@given(st.text("ab", max_size=12), st.text("ab", max_size=12))
def test_the_first_difference_of_two_texts_is_the_first(ours, theirs):
    assume(ours != theirs)
    [found] = told(ours, theirs)
    assert ours[: found.at] == theirs[: found.at]
    assert ours[found.at : found.at + 1] != theirs[found.at : found.at + 1]


@given(VALUES, VALUES)
@example({"a": 1, "b": 2}, {"b": 2, "a": 1})
@example([0.0], [-0.0])
@example([[1, True]] * 70, [[1, True]] * 69 + [[True, 1]])
def test_there_is_no_difference_if_and_only_if_the_texts_are_the_same(ours, theirs):
    assert bool(told(ours, theirs)) == (orjson.dumps(ours) != orjson.dumps(theirs))
    assert told(ours, copy.deepcopy(ours)) == []
    swapped = {"only-ours": "only-theirs", "only-theirs": "only-ours"}
    ours_first, theirs_first = told(ours, theirs), told(theirs, ours)
    assert {(found.path, swapped.get(found.kind, found.kind)) for found in theirs_first} == {
        (found.path, found.kind) for found in ours_first
    }
    orjson.dumps([found._asdict() for found in ours_first])


@given(st.lists(st.integers(0, 500), min_size=200, max_size=400), st.data())
@settings(max_examples=10)
def test_in_a_long_list_each_difference_is_found(items, data):
    places = sorted(data.draw(st.sets(st.integers(0, len(items) - 1), max_size=5)))
    theirs = [[item] if place in places else item for place, item in enumerate(items)]
    assert [found.path for found in told({"a": items}, {"a": theirs})] == [f"a.{place}" for place in places]


def nested(depth, leaf):
    for _ in range(depth):
        leaf = b'[{"a":' + leaf + b"}]"
    return leaf


@pytest.mark.parametrize("depth", [1, 100, 127, 500])
def test_no_depth_that_can_be_read_is_too_deep(depth):
    ours, theirs = nested(depth, b"1"), nested(depth, b"2")
    assert [found.path.count("a") for found in differences(ours, theirs)] == [depth]
    assert nearest(ours, [("x", theirs)]).differing == 1
    assert [found.kind for found in differences(ours, b"3")] == ["value"]


# The nearest


def near(ours, *theirs):
    return nearest(orjson.dumps(ours), [(place, orjson.dumps(value)) for place, value in enumerate(theirs)])


def test_the_nearest_has_the_fewest_differing_leaves():
    ours = {"a": 1, "b": 2, "c": {"d": [1, 2, 3]}}
    assert near(ours, {"a": 2, "b": 3, "c": ours["c"]}, ours | {"b": 1}) == (1, 1, Difference("b", "value", 2, 1))
    assert near(ours, {"a": 1, "b": 2}, {**ours, "a": 5, "b": 5}) == (1, 2, Difference("a", "value", 1, 5))
    assert near(ours, {"a": 1, "b": 2, "c": {"d": [1]}}) == (0, 2, Difference("c.d.1", "only-ours", 2, None))
    assert near({"a": 1, "b": 2}, {"b": 2, "a": 1})[:2] == (0, 1)
    assert near({"a": {}}, {"a": []})[:2] == (0, 1)


def test_of_equally_near_ones_that_is_taken_whose_text_has_most_in_common_with_ours():
    asked = {"q": "What is a gate, and why?"}
    assert near(asked, {"q": "What is a?"}, {"q": "What is a gateway, and why?"}, {"q": "And why?"}).candidate == 1
    assert near(asked, {"q": "Why?"}, {"q": "Who is this, and why?"}, {"q": 5}).candidate == 1
    assert near({"q": "aa"}, {"q": "aaaa"}, {"q": "aa", "r": "aaaa"}, {"q": "aaa"}).candidate == 0


def test_of_equally_near_ones_the_first_is_taken():
    assert near({"a": 1}, {"a": 2}, {"a": 3}).candidate == 0
    assert near({"a": [1] * 2000}, {"a": [2] * 2000}, {"a": [3] * 1500}) == (0, 1000, Difference("a.0", "value", 1, 2))
    assert near({"a": 1}) is None


def test_after_an_equal_one_nothing_more_is_looked_at():
    def candidates():
        yield "other", b'{"a":2}'
        yield "same", b'{"a":1}'
        raise AssertionError

    assert nearest(b'{"a":1}', candidates()) == ("same", 0, None)


@given(VALUES, st.lists(VALUES, max_size=5), st.integers(0, 5))
def test_an_equal_one_is_found_among_any(ours, others, place):
    found = near(ours, *others[:place], ours, *others[place:])
    assert found.differing == 0
    assert found.first is None
    assert orjson.dumps([*others[:place], ours, *others[place:]][found.candidate]) == orjson.dumps(ours)


@given(VALUES, st.lists(VALUES, min_size=1, max_size=5))
def test_none_is_nearer_than_the_nearest(ours, others):
    found = near(ours, *others)
    alone = [near(ours, other).differing for other in others]
    assert found.differing == min(alone)
    nearest_ones = [place for place, differing in enumerate(alone) if differing == min(alone)]
    assert found.candidate in nearest_ones
    if not any(isinstance(near(ours, others[place]).first.ours, str) for place in nearest_ones if alone[place]):
        assert found.candidate == nearest_ones[0]
    assert found.first == next(iter(told(ours, others[found.candidate])), None)

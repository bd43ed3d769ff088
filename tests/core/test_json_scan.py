import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.json_scan import cut_member, members

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
TRICKY = st.sampled_from(['"', "\\", '\\"', '"}', "{[", "]}", ",", '","usage":null', '"id":"x"', ": ", "\n", "é\u2028😀"])
NAMES = st.sampled_from(["id", "usage", "choices", "a"]) | TRICKY | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS | TRICKY, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=5)
SPACE = st.text(" \t\r\n", max_size=2)


@st.composite
def written(draw, value):
    """``value`` as JSON text with any white space that the grammar allows."""
    space = SPACE if draw(st.booleans()) else st.just("")

    def write(item):
        if isinstance(item, dict):
            inner = ",".join(f"{pad()}{write(name)}{pad()}:{pad()}{write(child)}{pad()}" for name, child in item.items())
            return "{" + (inner or pad()) + "}"
        if isinstance(item, list):
            return "[" + (",".join(f"{pad()}{write(child)}{pad()}" for child in item) or pad()) + "]"
        return json.dumps(item, ensure_ascii=ascii_only)

    def pad():
        return draw(space)

    ascii_only = draw(st.booleans())
    return (pad() + write(value) + pad()).encode()


TEXTS = OBJECTS.flatmap(lambda value: st.tuples(st.just(value), written(value)))


@given(TEXTS)
def test_members_are_those_that_a_parser_finds(pair):
    value, text = pair
    found = list(members(text))
    assert [json.loads(b'"' + member.name + b'"') for member in found] == list(value)
    for member, expected in zip(found, value.values(), strict=True):
        written_value = text[member.value_start : member.value_end]
        assert json.loads(written_value) == expected
        assert written_value == written_value.strip()
        assert text[member.start :].startswith(b'"' + member.name + b'"')


@given(TEXTS.filter(lambda pair: pair[0]), st.integers(0, 4))
def test_cutting_a_member_leaves_the_object_without_it(pair, place):
    value, text = pair
    member = list(members(text))[place % len(value)]
    start, end = cut_member(text, member)
    del value[list(value)[place % len(value)]]
    assert json.loads(text[:start] + text[end:]) == value


@pytest.mark.parametrize(
    ("text", "name", "left"),
    [
        (b'{"a":1,"b":2,"c":3}', b"a", b'{"b":2,"c":3}'),
        (b'{"a":1,"b":2,"c":3}', b"b", b'{"a":1,"c":3}'),
        (b'{"a":1,"b":2,"c":3}', b"c", b'{"a":1,"b":2}'),
        (b'{"a":1}', b"a", b"{}"),
        (b'{ "a" : 1 }', b"a", b"{  }"),
        (b'{ "a" : 1 , "b" : 2 }', b"a", b'{ "b" : 2 }'),
        (b'{ "a" : 1 , "b" : 2 }', b"b", b'{ "a" : 1  }'),
    ],
)
def test_cutting_takes_the_comma_along(text, name, left):
    (member,) = [member for member in members(text) if member.name == name]
    start, end = cut_member(text, member)
    assert text[:start] + text[end:] == left


JSON_LIKE = st.lists(st.sampled_from([*'{}[]",:\\ \n', '"a"', "1", "null", "\x0b", "\xff"]), max_size=30)


@given(st.binary(max_size=40) | JSON_LIKE.map(lambda parts: "".join(parts).encode("latin-1")))
@example(b"{")
@example(b'{"a')
@example(b'{"a"')
@example(b'{"a":')
@example(b'{"a":[{}')
@example(b'{"a":"\\')
@example(b'{"a":1,}')
@example(b"")
def test_arbitrary_bytes_raise_nothing_but_value_error(data):
    try:
        for member in members(data):
            cut_member(data, member)
    except ValueError:
        pass


def test_a_long_string_that_does_not_end_is_refused_in_linear_time():
    with pytest.raises(ValueError, match="no value"):
        list(members(b'{"a":"' + b"\\n" * 1_000_000))

import http_sf
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.core.apis import RequestProblem
from gateway.http.fields import NAMESPACE, TAGS, TTL, namespace, tags, ttl_s

READERS = {TTL: ttl_s, NAMESPACE: namespace, TAGS: tags}
ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=128)


def refused(field, values):
    with pytest.raises(RequestProblem) as problem:
        READERS[field](values)
    assert problem.value.param == field
    assert f"'{field}'" in str(problem.value)
    assert str(problem.value).isprintable()
    assert str(problem.value).isascii()
    return True


def test_what_is_not_sent_says_nothing():
    assert (ttl_s([]), namespace(()), tags([])) == (None, None, ())


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("60", 60),
        ("1.5", 1.5),
        ("-0", 0),
        ("999999999999999", 999_999_999_999_999),
        ("60;until=now", 60),
        (" 60 ", 60),
    ],
)
def test_a_ttl_is_a_number_of_seconds(value, seconds):
    assert ttl_s([value]) == seconds
    assert isinstance(ttl_s([value]), float)


@pytest.mark.parametrize(
    "values",
    [
        [""], ["-1"], ["-0.5"], ["+1"], ["1e3"], ["1."], [".5"], ["1.2345"], ["9" * 16], ["9" * 5000], ["60s"], ["?1"],
        ["@60"], ['"60"'], ["sixty"], ["60, 60"], ["60", "60"], ["60", ""], ["(60)"], ["60;"], ["٣"], ["NaN"],
        ["inf"], ["\0"], ["\udcff"],
    ],
)  # fmt: skip
def test_any_other_ttl_is_refused(values):
    assert refused(TTL, values)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("team-a", "team-a"), ('"team-a"', "team-a"), ('"a, b"', "a, b"), (r'"\"\\"', '"\\'), ("*/x:y", "*/x:y"),
        ("a;b=c", "a"), ("x" * 128, "x" * 128), ('" "', " "),
    ],
)  # fmt: skip
def test_a_namespace_is_a_string_or_a_token(value, name):
    assert namespace([value]) == name
    assert type(namespace([value])) is str


@pytest.mark.parametrize(
    "values",
    [
        [""], ['""'], ["x" * 129], ['"' + "x" * 129 + '"'], ["1"], ["?0"], [":YQ==:"], ['%"x"'], ["@1"], ["(a)"],
        ["a b"], ["a,b"], ["a", "a"], ['"a', 'b"'], ['"a'], ["'a'"], ["é"], ['"é"'], ['"a\n"'], ['"a\0"'], ["a\x7f"],
        ['"\udcff"'], ["9a"],
    ],
)  # fmt: skip
def test_any_other_namespace_is_refused(values):
    assert refused(NAMESPACE, values)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([""], ()),
        (["a"], ("a",)),
        (['b, "a b", a;x=1, b'], ("b", "a b", "a")),
        (["a, b", "c"], ("a", "b", "c")),
        (["b", "a", "b"], ("b", "a")),
        ([",".join(["a", "b"] * 20)], ("a", "b")),
        ([",".join(f"t{number}" for number in range(16))], tuple(f"t{number}" for number in range(16))),
    ],
)
def test_tags_come_each_once_in_their_order(values, found):
    assert tags(values) == found


@pytest.mark.parametrize(
    "values",
    [
        ["a,"], [",a"], ["a,,b"], ["a", ""], ["a b"], ["(a b)"], ["a, (b)"], ["()"], ["1"], ["a, ?1"], ['""'], ["x" * 129],
        ['"a'], [",".join(f"t{number}" for number in range(17))], ["é"], ["a\nb"], ["\0"],
    ],
)  # fmt: skip
def test_any_other_list_of_tags_is_refused(values):
    assert refused(TAGS, values)


@settings(max_examples=60, deadline=None)
@given(st.lists(ASCII, min_size=1, max_size=16))
def test_what_is_written_as_the_rfc_says_is_read(names):
    assert namespace([http_sf.ser(names[0])]) == names[0]
    assert tags([http_sf.ser([name]) for name in names]) == tuple(dict.fromkeys(names))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(READERS)),
    st.lists(st.text('ab19.-"\\,;=()?:@%* \t\0é\udcff') | st.text(st.characters()), max_size=3),
)
@example(TTL, ["@999999999999999"])
@example(TTL, ['%"%ff"'])
def test_any_text_is_read_or_is_a_problem_of_the_request(field, values):
    try:
        READERS[field](values)
    except RequestProblem as problem:
        assert problem.param == field  # noqa: PT017  # either is lawful

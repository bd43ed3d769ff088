import http_sf
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.core.apis import RequestProblem
from gateway.core.pacing import Pace
from gateway.http.fields import NAMESPACE, REPLAY, TAGS, TTL, namespace, replay, tags, ttl_s

READERS = {TTL: ttl_s, NAMESPACE: namespace, TAGS: tags, REPLAY: replay}
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
    assert (ttl_s([]), namespace(()), tags([]), replay([])) == (None, None, (), {})


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


@pytest.mark.parametrize(
    ("values", "pace"),
    [
        (["instant"], Pace("instant", speed=3.0, ttft_sd_s=0.1, itl_sd_s=0.1)),
        (["recorded"], Pace("recorded", speed=3.0, ttft_sd_s=0.1, itl_sd_s=0.1)),
        (["recorded;speed=2"], Pace("recorded", speed=2.0, ttft_sd_s=0.1, itl_sd_s=0.1)),
        (["recorded, speed=0.5"], Pace("recorded", speed=0.5, ttft_sd_s=0.1, itl_sd_s=0.1)),
        (["rate=80"], Pace("fixed", speed=3.0, tokens_per_s=80.0, ttft_sd_s=0.1, itl_sd_s=0.1)),
        (["rate=80, ttft=0.5"], Pace("drawn", speed=3.0, ttft_s=0.5, itl_s=0.0125)),
        (["ttft=0.5"], Pace("drawn", speed=3.0, ttft_s=0.5, itl_sd_s=0.1)),
        (["ttft=0.5;sd=0.2", "itl=0.1;sd=0"], Pace("drawn", speed=3.0, ttft_s=0.5, ttft_sd_s=0.2, itl_s=0.1)),
        (["jitter=1, max_gap=0.25"], Pace(speed=3.0, ttft_sd_s=0.1, itl_sd_s=0.1, jitter=1.0, max_gap_s=0.25)),
        (["seed=-7"], Pace(speed=3.0, ttft_sd_s=0.1, itl_sd_s=0.1, seed=-7, turns=False)),
        ([""], Pace(speed=3.0, ttft_sd_s=0.1, itl_sd_s=0.1)),
    ],
)
def test_a_pace_is_what_is_said_and_else_as_configured(values, pace):
    configured = Pace(speed=3.0, ttft_sd_s=0.1, itl_sd_s=0.1)
    assert configured.with_wish(replay(values)) == pace


@pytest.mark.parametrize(
    "values",
    [
        ["instant=1"], ["instant=?0"], ["instant, recorded"], ["rate=50, itl=0.1"], ["recorded, ttft=1"], ["rate"],
        ["rate=0"], ["rate=fast"], ["rate=?1"], ["rate=(1 2)"], ["ttft=-1"], ["ttft=1;sd=-1"], ["ttft=1;ds=1"],
        ["jitter=1.1"], ["jitter=-0.1"], ["max_gap=0"], ["seed=1.5"], ["seed=a"], ["recorded;speed=0"], ["spede=2"],
        ["fixed"], ["itl=0.0001"], ["rate=50;speed=2"], ["rate=,"], ["RATE=1"], ["recorded", ","], ["é"], ["1"],
    ],
)  # fmt: skip
def test_any_other_pace_is_refused(values):
    assert refused(REPLAY, values)


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
@example(REPLAY, ['ttft=@1;sd=%"x"'])
@example(REPLAY, ["recorded;speed=999999999999999"])
@example(TTL, ["@999999999999999"])
@example(TTL, ['%"%ff"'])
def test_any_text_is_read_or_is_a_problem_of_the_request(field, values):
    try:
        READERS[field](values)
    except RequestProblem as problem:
        assert problem.param == field  # noqa: PT017  # either is lawful

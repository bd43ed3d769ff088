import re
from dataclasses import replace

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.policy import (
    NO_DIRECTIVES,
    NOT_FORWARDED,
    Directives,
    Disposition,
    ModelRules,
    RuleBook,
    age_s,
    has_broken_arguments,
    remaining_s,
    staleness_s,
)
from gateway.core.recording import Meta

ANY = 1 << 62
META = Meta("chat", "m", "u", started_at=990.0, written_at=1000.0, duration_us=1, ttl_s=60.0, id="x")


@pytest.mark.parametrize(
    ("header", "directives"),
    [
        ("", {}),
        ("no-cache", {"no_cache": True}),
        ("No-Cache , NO-STORE", {"no_cache": True, "no_store": True}),
        ("only-if-cached", {"only_if_cached": True}),
        ("max-age=0", {"max_age_s": 0}),
        ("max-age=60, min-fresh=5", {"max_age_s": 60, "min_fresh_s": 5}),
        ('max-age="60"', {"max_age_s": 60}),
        ("max-age = 60", {"max_age_s": 60}),
        ("max-age=60,max-age=5", {"max_age_s": 60}),
        ("max-age", {"max_age_s": 0}),
        ("max-age=", {"max_age_s": 0}),
        ("max-age=-1", {"max_age_s": 0}),
        ("max-age=1.5", {"max_age_s": 0}),
        ("max-age=²", {"max_age_s": 0}),
        ("max-age=٣", {"max_age_s": 0}),
        ("max-age=" + "9" * 5000, {"max_age_s": 10**18 - 1}),
        ("min-fresh=x", {"min_fresh_s": ANY}),
        ("no-cache=x", {"no_cache": True}),
        ("x-no-cache, no-cachex, nocache, xmax-stale=5, immutable", {}),
        ("max-stale", {"max_stale_s": ANY}),
        ("max-stale=5", {"max_stale_s": 5}),
        ("max-stale=", {"max_stale_s": 0}),
        ('max-stale=""', {"max_stale_s": 0}),
        ("max-stale, max-stale=5", {"max_stale_s": ANY}),
        ("max-stale=5, max-stale", {"max_stale_s": 5}),
        ("max-stale=x", {"max_stale_s": 0}),
        ("max-stale=-1", {"max_stale_s": 0}),
        ("stale-if-error=30", {"stale_if_error_s": 30}),
        ("stale-if-error", {"stale_if_error_s": 0}),
        (",, ,no-store,,", {"no_store": True}),
        ('private="a, no-store, max-age=5", no-cache', {"no_cache": True}),
        ('private="a, no-store', {"no_store": True}),
        ('ext="a\\", no-store, b"', {}),
    ],
)
def test_directives_are_read_as_the_standard_has_them(header, directives):
    assert Directives.parse(header) == replace(NO_DIRECTIVES, **directives)


@given(st.text(max_size=40) | st.text('nostrecahmxgi-=", \t0179\\', max_size=40))
@example("=" * 20)
@example('a="\\')
def test_any_text_is_read_as_some_directives(header):
    directives = Directives.parse(header)
    assert (directives.max_age_s or 0) >= 0
    directives.refusal(META, 1000.0)


@pytest.mark.parametrize(
    ("header", "now", "refusal"),
    [  # written at 1000, fresh until 1060
        ("", 1000.0, ""),
        ("", 1060.0, ""),
        ("", 1060.5, "stale"),
        ("max-age=10", 1010.9, ""),
        ("max-age=10", 1011.0, "max-age"),
        ("max-age=0", 1000.9, "max-age"),
        ("max-age=0", 1001.0, "max-age"),
        ("max-age=0", 900.0, "max-age"),
        ("max-age=x", 1001.0, "max-age"),
        ("max-age=999", 1061.0, "stale"),
        ("min-fresh=20", 1040.0, ""),
        ("min-fresh=20", 1040.1, "min-fresh"),
        ("min-fresh=0", 1060.0, ""),
        ("min-fresh=0", 1060.5, "min-fresh"),
        ("min-fresh=x", 1000.0, "min-fresh"),
        ("max-age=50, min-fresh=20", 1045.0, "min-fresh"),
        ("max-age=30, min-fresh=20", 1035.0, "max-age"),
        ("max-stale=10", 1070.0, ""),
        ("max-stale=10", 1070.5, "max-stale"),
        ("max-stale", 99999.0, ""),
        ("max-stale=x", 1060.5, "max-stale"),
        ("max-stale=x", 1050.0, ""),
        ("max-stale=100, max-age=65", 1065.0, ""),
        ("max-stale=100, max-age=65", 1066.0, "max-age"),
        ("max-stale=100, min-fresh=1", 1061.0, "min-fresh"),
        ("no-cache, only-if-cached", 1000.0, ""),
    ],
)
def test_a_stored_answer_is_refused_by_its_age_and_the_life_it_has_left(header, now, refusal):
    assert Directives.parse(header).refusal(META, now) == refusal


@pytest.mark.parametrize(
    ("header", "now", "refusal"),
    [
        ("", 1060.5, ""),
        ("", 1090.0, ""),
        ("", 1090.5, "stale"),
        ("max-age=999", 1061.0, "stale"),
        ("min-fresh=0", 1060.5, "min-fresh"),
        ("max-stale=5", 1066.0, "max-stale"),
        ("max-stale=50", 1110.0, ""),
        ("stale-if-error=5", 1061.0, ""),
    ],
)
def test_who_does_not_say_gets_a_stale_answer_for_as_long_as_the_configuration_allows(header, now, refusal):
    assert Directives.parse(header).refusal(META, now, stale_s=30) == refusal


@pytest.mark.parametrize(
    ("header", "window_s"),
    [
        ("", 20),
        ("max-stale=5", 20),
        ("stale-if-error=300", 300),
        ("stale-if-error=0", 0),
        ("stale-if-error=x", 0),
        ("max-age=5", 0),
        ("min-fresh=5", 0),
        ("max-age=5, stale-if-error=60", 60),
    ],
)
def test_how_stale_an_answer_may_be_that_stands_in_for_an_error(header, window_s):
    assert Directives.parse(header).error_window_s(20) == window_s


@given(st.floats(0, 4e9), st.floats(0, 1e8), st.floats(0, 4e9))
def test_age_and_remaining_life_are_whole_seconds_and_never_too_good(written_at, ttl_s, now):
    meta = META._replace(written_at=written_at, ttl_s=ttl_s)
    assert age_s(meta, now) >= 0
    assert isinstance(age_s(meta, now), int)
    assert isinstance(remaining_s(meta, now), int)
    assert remaining_s(meta, now) <= written_at + ttl_s - now
    assert (remaining_s(meta, now) < 0) == (staleness_s(meta, now) > 0)
    assert age_s(meta, now) <= max(0.0, now - written_at)


RULES = ModelRules(finish_reasons=frozenset({"stop", "tool_calls", "length"}), max_recording_bytes=100)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ({}, ""),
        ({"size_bytes": 100}, ""),
        ({"size_bytes": 101}, "too-large"),
        ({"reasons": {}}, "incomplete"),
        ({"choices": 2}, "incomplete"),
        ({"choices": 10**12}, "incomplete"),
        ({"reasons": {1: "stop"}}, "incomplete"),
        ({"reasons": {0: "stop", 2: "stop"}, "choices": 2}, "incomplete"),
        ({"reasons": {1: "stop", 0: "tool_calls"}, "choices": 2}, ""),
        ({"reasons": {0: "stop", 1: "length"}, "choices": 2}, "finish-reason"),
        ({"reasons": {0: "stop", 1: "error"}}, "finish-reason"),
        ({"reasons": {0: "length"}}, "finish-reason"),
        ({"reasons": {0: "length"}, "limits_tokens": True}, ""),
        ({"reasons": {0: "content_filter"}, "limits_tokens": True}, "finish-reason"),
        ({"reasons": {0: ""}}, "finish-reason"),
        ({"reasons": {}, "size_bytes": 101}, "too-large"),
    ],
)
def test_only_a_proven_complete_answer_is_stored(case, why):
    asked = {"reasons": {0: "stop"}, "choices": 1, "size_bytes": 50, "limits_tokens": False, **case}
    assert RULES.why_not_keep(**asked) == why


def test_a_filtered_answer_is_not_stored_whatever_the_configuration_says():
    rules = ModelRules(finish_reasons=frozenset({"content_filter"}))
    assert rules.why_not_keep(reasons={0: "content_filter"}, choices=1, size_bytes=1, limits_tokens=False) == "finish-reason"


@pytest.mark.parametrize(
    ("rules", "body", "why"),
    [
        ({}, {}, ""),
        ({"enabled": False}, {}, "disabled"),
        ({}, {"web_search_options": {}}, "live-data"),
        ({}, {"web_search_options": None}, ""),
        ({}, {"search_parameters": {"mode": "auto"}}, "live-data"),
        ({}, {"tools": [{"type": "function"}, {"type": "web_search_preview"}]}, "live-data"),
        ({}, {"tools": [{"type": "function"}, "x", {}]}, ""),
        ({}, {"tools": {}}, ""),
        ({"store_live_data": True}, {"web_search_options": {}}, ""),
        ({}, {"temperature": 2}, ""),
        ({"store_sampled": False}, {}, "sampled"),
        ({"store_sampled": False}, {"temperature": None, "seed": None}, "sampled"),
        ({"store_sampled": False}, {"temperature": 0}, ""),
        ({"store_sampled": False}, {"temperature": 0.1}, "sampled"),
        ({"store_sampled": False}, {"temperature": True}, "sampled"),
        ({"store_sampled": False}, {"temperature": 0.1, "seed": 0}, ""),
        ({"store_sampled": False, "sampled_temperature": 0.5}, {"temperature": 0.5}, ""),
        ({"store_sampled": False, "sampled_temperature": 1.0}, {}, ""),
    ],
)
def test_what_is_not_even_looked_up(rules, body, why):
    assert ModelRules(**rules).why_not_ask(body) == why


def answer(*messages):
    return orjson.dumps({"choices": [{"index": at, "message": message} for at, message in enumerate(messages)]})


@pytest.mark.parametrize(
    ("messages", "broken"),
    [
        ([{"content": '"arguments": {'}], False),
        ([{"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}], False),
        ([{"tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}, {"type": "custom", "custom": {}}]}], False),
        ([{"tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1'}}]}], True),
        ([{"tool_calls": [{"function": {"name": "f", "arguments": ""}}]}], True),
        ([{"content": "x"}, {"tool_calls": [{"function": {"arguments": "{}"}}, {"function": {"arguments": "{"}}]}], True),
        ([{"function_call": {"name": "f", "arguments": "{"}}], True),
        ([{"function_call": {"name": "f", "arguments": None}}], False),
        ([{"tool_calls": {"arguments": "{"}}, {"tool_calls": [7]}, None], False),
    ],
)
def test_a_tool_call_that_nobody_can_run_is_found(messages, broken):
    assert has_broken_arguments(answer(*messages)) is broken


def test_of_the_rules_whose_patterns_fit_the_first_that_has_one_holds():
    default = ModelRules(ttl_s=1, samples=1)
    book = RuleBook(
        default,
        [
            (["gpt-5", "o*"], {"ttl_s": 2.0, "samples": None, "names": ["gpt-5"]}),
            (["gpt-*"], {"ttl_s": 3.0, "samples": 4}),
        ],
    )
    assert book.of("llama") == default
    assert book.of("gpt-5") == replace(default, ttl_s=2.0, samples=4)
    assert book.of("o3") == replace(default, ttl_s=2.0)
    assert book.of("gpt-4") == replace(default, ttl_s=3.0, samples=4)
    assert book.of("fast", "gpt-5") == book.of("gpt-5")
    assert {book.of(f"m-{number}") for number in range(5000)} == {default}


# Structured fields (RFC 8941): a list of one token with parameters, as RFC 9211 wants it.
TOKEN = r"[A-Za-z*][A-Za-z0-9:/!#$%&'*+.^_`|~-]*"
ITEM = r'(?:-?\d{1,15}|"(?:[ !#-\[\]-~]|\\["\\])*"|' + TOKEN + ")"
CACHE_STATUS = re.compile(rf"{TOKEN}(?:; *[a-z*][a-z0-9_.*-]*(?:={ITEM})?)*")
PARAMETERS = {"hit", "fwd", "fwd-status", "ttl", "stored", "collapsed", "key", "detail"}

DISPOSITIONS = st.builds(
    Disposition,
    kind=st.sampled_from(["hit", "miss", "collapsed", "bypass", "stale"]),
    detail=st.sampled_from(["", "no-store", "no-cache", "disabled", "store-unavailable", "store-corrupt", "too-large"]),
    age_s=st.integers(0, 10**9),
    ttl_s=st.integers(-(10**9), 10**9),
    fwd=st.sampled_from(["miss", "request", "bypass", "stale"]),
    stored=st.booleans(),
    status=st.just(0) | st.integers(100, 599),
)


@given(DISPOSITIONS)
def test_cache_status_is_a_structured_field_that_says_hit_or_why_not(disposition):
    value = disposition.cache_status()
    assert CACHE_STATUS.fullmatch(value)
    assert CACHE_STATUS.fullmatch(NOT_FORWARDED)
    name, *parameters = value.split("; ")
    names = [parameter.partition("=")[0] for parameter in parameters]
    assert name == "gateway"
    assert set(names) <= PARAMETERS
    assert len(set(names)) == len(names)
    assert ("hit" in names) != ("fwd" in names)
    assert ("hit" in names) == (disposition.kind == "hit")


@pytest.mark.parametrize(
    ("disposition", "value"),
    [
        (Disposition("hit", ttl_s=7), "gateway; hit; ttl=7"),
        (Disposition("hit", ttl_s=-3, status=200), "gateway; hit; ttl=-3"),
        (Disposition("miss"), "gateway; fwd=miss"),
        (Disposition("miss", status=200), "gateway; fwd=miss; fwd-status=200"),
        (Disposition("miss", status=200, stored=True), "gateway; fwd=miss; fwd-status=200; stored"),
        (Disposition("collapsed"), "gateway; fwd=miss; collapsed"),
        (
            Disposition("bypass", "no-store", fwd="request", status=429),
            "gateway; fwd=request; fwd-status=429; detail=no-store",
        ),
        (
            Disposition("stale", "stale-if-error", ttl_s=-9, fwd="stale", status=503),
            "gateway; fwd=stale; fwd-status=503; ttl=-9; detail=stale-if-error",
        ),
    ],
)
def test_cache_status_values(disposition, value):
    assert disposition.cache_status() == value

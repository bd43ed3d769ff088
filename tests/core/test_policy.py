import re
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.policy import NO_DIRECTIVES, NOT_FORWARDED, Directives, Disposition, StoreRules, age_s, remaining_s
from gateway.core.recording import Meta

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
        ("min-fresh=x", {"min_fresh_s": 1 << 62}),
        ("no-cache=x", {"no_cache": True}),
        ("x-no-cache, no-cachex, nocache, max-stale=5, immutable", {}),
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
    directives.accept(META, 1000.0)


@pytest.mark.parametrize(
    ("header", "now", "accepted"),
    [
        ("", 1000.0, True),
        ("", 99999.0, True),
        ("max-age=10", 1010.9, True),
        ("max-age=10", 1011.0, False),
        ("max-age=0", 1000.9, False),
        ("max-age=0", 1001.0, False),
        ("max-age=0", 900.0, False),
        ("max-age=x", 1001.0, False),
        ("min-fresh=20", 1040.0, True),
        ("min-fresh=20", 1040.1, False),
        ("min-fresh=0", 1060.0, True),
        ("min-fresh=0", 1060.5, False),
        ("min-fresh=x", 1000.0, False),
        ("max-age=50, min-fresh=20", 1045.0, False),
        ("max-age=30, min-fresh=20", 1035.0, False),
        ("no-cache, only-if-cached", 1000.0, True),
    ],
)
def test_a_stored_answer_is_accepted_by_its_age_and_the_life_it_has_left(header, now, accepted):
    assert Directives.parse(header).accept(META, now) is accepted


@given(st.floats(0, 4e9), st.floats(0, 1e8), st.floats(0, 4e9))
def test_age_and_remaining_life_are_whole_seconds_and_never_too_good(written_at, ttl_s, now):
    meta = META._replace(written_at=written_at, ttl_s=ttl_s)
    assert age_s(meta, now) >= 0
    assert isinstance(age_s(meta, now), int)
    assert isinstance(remaining_s(meta, now), int)
    assert remaining_s(meta, now) <= written_at + ttl_s - now
    assert age_s(meta, now) <= max(0.0, now - written_at)


RULES = StoreRules(frozenset({"stop", "tool_calls", "length"}), max_recording_bytes=100)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ({}, None),
        ({"size_bytes": 100}, None),
        ({"size_bytes": 101}, "too-large"),
        ({"reasons": {}}, "incomplete"),
        ({"choices": 2}, "incomplete"),
        ({"choices": 10**12}, "incomplete"),
        ({"reasons": {1: "stop"}}, "incomplete"),
        ({"reasons": {0: "stop", 2: "stop"}, "choices": 2}, "incomplete"),
        ({"reasons": {1: "stop", 0: "tool_calls"}, "choices": 2}, None),
        ({"reasons": {0: "stop", 1: "length"}, "choices": 2}, "finish-reason"),
        ({"reasons": {0: "stop", 1: "error"}}, "finish-reason"),
        ({"reasons": {0: "length"}}, "finish-reason"),
        ({"reasons": {0: "length"}, "limits_tokens": True}, None),
        ({"reasons": {0: "content_filter"}, "limits_tokens": True}, "finish-reason"),
        ({"reasons": {0: ""}}, "finish-reason"),
        ({"reasons": {}, "size_bytes": 101}, "too-large"),
    ],
)
def test_only_a_proven_complete_answer_is_stored(case, why):
    asked = {"reasons": {0: "stop"}, "choices": 1, "size_bytes": 50, "limits_tokens": False, **case}
    assert RULES.why_not(**asked) == why


def test_a_filtered_answer_is_not_stored_whatever_the_configuration_says():
    rules = StoreRules(frozenset({"content_filter"}), 100)
    assert rules.why_not(reasons={0: "content_filter"}, choices=1, size_bytes=1, limits_tokens=False) == "finish-reason"


# Structured fields (RFC 8941): a list of one token with parameters, as RFC 9211 wants it.
TOKEN = r"[A-Za-z*][A-Za-z0-9:/!#$%&'*+.^_`|~-]*"
ITEM = r'(?:-?\d{1,15}|"(?:[ !#-\[\]-~]|\\["\\])*"|' + TOKEN + ")"
CACHE_STATUS = re.compile(rf"{TOKEN}(?:; *[a-z*][a-z0-9_.*-]*(?:={ITEM})?)*")
PARAMETERS = {"hit", "fwd", "fwd-status", "ttl", "stored", "collapsed", "key", "detail"}

DISPOSITIONS = st.builds(
    Disposition,
    kind=st.sampled_from(["hit", "miss", "collapsed", "bypass"]),
    detail=st.sampled_from(["", "no-store", "no-cache", "disabled", "store-unavailable", "store-corrupt", "too-large"]),
    age_s=st.integers(0, 10**9),
    ttl_s=st.integers(-(10**9), 10**9),
    fwd=st.sampled_from(["miss", "request", "bypass", "stale"]),
)


@given(DISPOSITIONS, st.none() | st.integers(100, 599))
def test_cache_status_is_a_structured_field_that_says_hit_or_why_not(disposition, status):
    value = disposition.cache_status(status)
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
    ("disposition", "status", "value"),
    [
        (Disposition("hit", ttl_s=7), None, "gateway; hit; ttl=7"),
        (Disposition("hit", ttl_s=-3), 200, "gateway; hit; ttl=-3"),
        (Disposition("miss"), None, "gateway; fwd=miss"),
        (Disposition("miss"), 200, "gateway; fwd=miss; fwd-status=200"),
        (Disposition("collapsed"), None, "gateway; fwd=miss; collapsed"),
        (Disposition("bypass", "no-store", fwd="request"), 429, "gateway; fwd=request; fwd-status=429; detail=no-store"),
    ],
)
def test_cache_status_values(disposition, status, value):
    assert disposition.cache_status(status) == value

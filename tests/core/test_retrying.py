from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.retrying import RetryBudget, Verdict, backoff_s, judge, retry_after_s
from gateway.errors import (
    InvalidRequest,
    UpstreamBroke,
    UpstreamBusy,
    UpstreamRefused,
    UpstreamReported,
    UpstreamTimeout,
    UpstreamUnreachable,
)

NOW = 1_800_000_000.0
DRAWS = st.floats(0, 1, exclude_max=True)


def refused(status, content=b"", **headers):
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    return UpstreamRefused(status, content, "application/json", told)


# What a failure means


@pytest.mark.parametrize(
    ("error", "again", "elsewhere", "is_fault"),
    [
        (UpstreamUnreachable("x"), True, True, True),
        (UpstreamTimeout("x"), True, True, True),
        (UpstreamBroke("x"), True, True, True),
        (UpstreamBusy("x"), False, True, False),
        (InvalidRequest("x"), False, False, False),
        (refused(500), True, True, True),
        (refused(503), True, True, True),
        (refused(501), False, False, False),
        (refused(408), True, True, False),
        (refused(409), True, True, False),
        (refused(429), True, True, False),
        (refused(400), False, False, False),
        (refused(403), False, False, False),
        (refused(404), False, False, False),
        (refused(422), False, False, False),
        (refused(503, x_should_retry="false"), False, True, True),
        (refused(400, x_should_retry="true"), True, False, False),
        (refused(400, x_should_retry="True"), False, False, False),  # the clients know no other spelling
        (UpstreamReported({"message": "x", "type": "server_error"}), True, True, True),
        (UpstreamReported({"message": "x", "code": 503}), True, True, True),
        (UpstreamReported({"message": "x", "code": 429}), True, True, False),
        (UpstreamReported({"message": "x", "code": 400}), False, False, False),
        (UpstreamReported({"message": "x", "type": "invalid_request_error"}), False, False, False),
        (UpstreamReported("Overloaded."), True, True, True),
    ],
)
def test_what_a_failure_means(error, again, elsewhere, is_fault):
    verdict = judge(error, NOW)
    assert (verdict.again, verdict.elsewhere, verdict.is_fault) == (again, elsewhere, is_fault)


def test_a_spent_or_wrong_key_is_another_upstreams_to_better_only_where_it_is_ours():
    spent = refused(429, b'{"error": {"code": "insufficient_quota"}}', retry_after="1")
    for error in (refused(401), refused(402), spent):
        assert judge(error, NOW) == Verdict(elsewhere=True, is_limit=error.status != 401)
    assert judge(refused(401), NOW, own_key=False) == Verdict()
    assert judge(spent, NOW, own_key=False) == Verdict(again=True, elsewhere=True, wait_s=1.0, is_limit=True)


# Retry-After


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "3"}, 3.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({}, None),
        ({"retry-after": format_datetime(datetime.fromtimestamp(NOW + 7, UTC), usegmt=True)}, 7.0),
        ({"retry-after": format_datetime(datetime.fromtimestamp(NOW - 7, UTC), usegmt=True)}, 0.0),
    ],
)
def test_for_how_long_an_upstream_asks_to_be_left_alone(headers, wait_s):
    assert retry_after_s(headers, NOW) == wait_s


@given(st.text(), st.text())
def test_no_header_is_too_odd_to_be_read(one, other):
    wait_s = retry_after_s({"retry-after": one, "retry-after-ms": other}, NOW)
    assert wait_s is None or wait_s >= 0


# Back-off


@given(st.integers(0, 10_000), st.floats(0, 10), st.floats(0, 100), DRAWS)
def test_backoff_is_drawn_from_all_that_the_failures_allow_and_never_more_than_the_cap(failures, base_s, longest_s, draw):
    most_s = backoff_s(failures, base_s, longest_s, 1.0)
    assert 0 <= backoff_s(failures, base_s, longest_s, draw) <= most_s <= longest_s
    assert most_s <= backoff_s(failures + 1, base_s, longest_s, 1.0)
    assert backoff_s(failures, base_s, longest_s, 0.0) == 0


def test_backoff_doubles():
    assert [backoff_s(failures, 0.5, 3.0, 1.0) for failures in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]


# The budget

STEPS = st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=80)


@given(STEPS, st.floats(0, 1), st.floats(0, 3))
def test_retries_are_never_more_than_a_share_of_the_calls_and_a_few_a_second(steps, share, min_per_s):
    budget, now, calls, retries = RetryBudget(share, min_per_s, 100.0), 100.0, 0, 0
    for gap_s, is_call in steps:
        now += gap_s
        if is_call:
            budget.count_call(now)
            calls += 1
        else:
            retries += budget.take(now)
        assert retries <= share * calls + min_per_s * (10 + now - 100.0) + 1e-6


def test_in_an_outage_a_fifth_of_the_calls_is_made_again():
    budget = RetryBudget(0.2, 0.0)
    retries = 0
    for call in range(1000):
        budget.count_call(call / 100)
        retries += budget.take(call / 100) + budget.take(call / 100)
    assert 120 <= retries <= 200


def test_a_call_of_long_ago_allows_no_retry_and_a_clock_that_goes_back_gives_nothing():
    budget = RetryBudget(1.0, 0.0)
    for _ in range(5):
        budget.count_call(0.0)
    assert budget.take(1.0)
    assert not budget.take(100.0)
    budget = RetryBudget(0.0, 0.1, 50.0)
    assert budget.take(50.0)
    assert not budget.take(0.0)
    assert not budget.take(59.0)
    assert budget.take(60.1)

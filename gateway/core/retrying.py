"""Whether an upstream that failed is asked again, when, and how often at most. The clock and the draws are arguments."""

import math
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from gateway.errors import (
    GatewayError,
    UpstreamBroke,
    UpstreamBusy,
    UpstreamRefused,
    UpstreamReported,
    UpstreamTimeout,
    UpstreamUnreachable,
)

_PASSING = frozenset({408, 409, 429})
_NOT_IMPLEMENTED = 501
_TOLD = {"true": True, "false": False}
# What no second call of the same credential can change.
_SPENT = (b"insufficient_quota", b"billing_hard_limit_reached")
_CALLERS_FAULT = ("invalid_request", "authentication", "permission", "not_found", "invalid_api_key", "content_filter")
_TALL_POWER = 32
_BUDGET_WINDOW_S = 10.0


class Verdict(NamedTuple):
    """What a failure before the first token means."""

    again: bool = False
    """Whether the same upstream may do better a little later."""
    elsewhere: bool = False
    """Whether another one may do better at once."""
    wait_s: float | None = None
    """How long it asks to be left alone."""
    is_fault: bool = False
    """Whether it says something about the upstream's health."""
    is_limit: bool = False
    """Whether the credential has had its share for now."""


_FAULT = Verdict(again=True, elsewhere=True, is_fault=True)
_FINAL = Verdict()


def judge(error: GatewayError, now: float, *, own_key: bool = True) -> Verdict:
    """``now`` is Unix time. ``own_key``: whether the credential is ours, so that another upstream's may be better."""
    if isinstance(error, UpstreamRefused):
        return _judge_refusal(error, now, own_key=own_key)
    if isinstance(error, UpstreamReported):
        return _judge_report(error)
    if isinstance(error, UpstreamBusy):
        return Verdict(elsewhere=True)
    if isinstance(error, UpstreamUnreachable | UpstreamTimeout | UpstreamBroke):
        return _FAULT
    return _FINAL


def _judge_refusal(error: UpstreamRefused, now: float, *, own_key: bool) -> Verdict:
    status = error.status
    is_fault = status >= 500 and status != _NOT_IMPLEMENTED
    passing = is_fault or status in _PASSING
    is_limit = status == 429 or (own_key and status == 402)
    if own_key and (status in (401, 402) or (status == 429 and any(word in error.content[:65_536] for word in _SPENT))):
        # The operator's key is spent or wrong: to its callers that is an outage like another.
        return Verdict(elsewhere=True, is_limit=is_limit)
    again = _TOLD.get(error.headers.get("x-should-retry", ""), passing)
    return Verdict(again, passing, retry_after_s(error.headers, now) if again else None, is_fault, is_limit)


def _judge_report(error: UpstreamReported) -> Verdict:
    """An error in an answer that had begun as a success."""
    if error.status == 429:
        return Verdict(again=True, elsewhere=True, is_limit=True)
    kinds = f"{error.reported.get('type')} {error.reported.get('code')}".lower()
    if error.status < 500 or any(word in kinds for word in _CALLERS_FAULT):
        return _FINAL
    return _FAULT


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """For how long an upstream asks to be left alone: ``retry-after-ms``, or ``Retry-After`` (RFC 9110 10.2.3)."""
    if (milliseconds := _number(headers.get("retry-after-ms", ""))) is not None:
        return milliseconds / 1000
    text = headers.get("retry-after", "")
    if (seconds := _number(text)) is not None:
        return seconds
    try:
        date = parsedate_to_datetime(text)
        at = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return max(0.0, at - now)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return max(0.0, number) if math.isfinite(number) else None


def backoff_s(failures: int, base_s: float, longest_s: float, draw: float) -> float:
    """Capped exponential back-off with full jitter: ``draw`` (0 to 1) of what the ``failures``-th failure allows at most."""
    return draw * min(longest_s, base_s * 2.0 ** min(max(failures - 1, 0), _TALL_POWER))


class RetryBudget:
    """How many calls may be made again: a share of those that were made lately, and a few at any time.

    In an outage every call fails, and each would be made again: this is what keeps the load from multiplying.
    """

    def __init__(self, share: float, min_per_s: float, now: float = 0.0) -> None:
        self._share = share
        self._min_per_s = min_per_s
        self._most_spare = min_per_s * _BUDGET_WINDOW_S
        self._spare = self._most_spare
        self._earned = 0.0
        self._at = now

    def __repr__(self) -> str:
        return f"<RetryBudget earned={self._earned:.1f} spare={self._spare:.1f}>"

    def count_call(self, now: float) -> None:
        """A call is made for the first time."""
        self._pass_time(now)
        self._earned += self._share

    def take(self, now: float) -> bool:
        """Whether one more may be made again; if so, it counts."""
        self._pass_time(now)
        if self._earned >= 1.0:
            self._earned -= 1.0
        elif self._spare >= 1.0:
            self._spare -= 1.0
        else:
            return False
        return True

    def _pass_time(self, now: float) -> None:
        passed_s = max(0.0, now - self._at)
        self._at = max(self._at, now)
        self._spare = min(self._most_spare, self._spare + self._min_per_s * passed_s)
        self._earned *= math.exp(-passed_s / _BUDGET_WINDOW_S)

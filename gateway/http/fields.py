"""The structured fields (RFC 9651) in which a caller says what to do with the cache.

RFC 9651 4.2 lets the definition of a field choose whether a malformed value is ignored or refused. These are refused, with
`RequestProblem`: a mistyped namespace that is ignored would mix entries which are meant to be apart. Parameters are
ignored, as the RFC wants it of those that are not known.
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal

import http_sf

from gateway.core.apis.base import RequestProblem
from gateway.core.controls import MAX_NAME_CHARS, MAX_TAGS

TTL = "Gateway-Cache-TTL"
NAMESPACE = "Gateway-Cache-Namespace"
TAGS = "Gateway-Cache-Tags"

_A_TTL = "one Integer or Decimal of seconds, 0 or more"
_A_NAMESPACE = f"one String or Token of 1 to {MAX_NAME_CHARS} characters"
_SOME_TAGS = f"a List of at most {MAX_TAGS} Strings or Tokens of 1 to {MAX_NAME_CHARS} characters"


def ttl_s(values: Sequence[str]) -> float | None:
    """For how many seconds the answer is to be kept, from the field lines; 0: not at all. Raises `RequestProblem`."""
    if not values:
        return None
    value = _item(TTL, values, _A_TTL)
    if type(value) not in (int, Decimal) or value < 0:  # by type, since a Boolean is an int too
        raise _problem(TTL, _A_TTL)
    return float(value)


def namespace(values: Sequence[str]) -> str | None:
    """The namespace in which to look and to keep, from the field lines. Raises `RequestProblem`."""
    if not values:
        return None
    return _name(NAMESPACE, _item(NAMESPACE, values, _A_NAMESPACE), _A_NAMESPACE)


def tags(values: Sequence[str]) -> tuple[str, ...]:
    """By what the answer can be purged later, from the field lines: each tag once. Raises `RequestProblem`."""
    members = _parsed(TAGS, values, "list", _SOME_TAGS)
    names = dict.fromkeys(_name(TAGS, member, _SOME_TAGS) for member, _ in members)
    if len(names) > MAX_TAGS:
        raise _problem(TAGS, _SOME_TAGS)
    return tuple(names)


def _item(field: str, values: Sequence[str], expected: str) -> Any:
    # Two lines could be joined to one Item: inside of a String a comma is text.
    if len(values) != 1:
        raise _problem(field, expected)
    value, _ = _parsed(field, values, "item", expected)
    return value


def _parsed(field: str, values: Sequence[str], kind: Literal["item", "list"], expected: str) -> Any:
    try:
        return http_sf.parse(", ".join(values).encode("ascii"), tltype=kind)
    except ValueError:  # the parser's, or the encoder's
        raise _problem(field, expected) from None


def _name(field: str, value: Any, expected: str) -> str:
    """A String's or Token's text; an inner list, or an item of another type, is none."""
    if not (isinstance(value, str | http_sf.Token) and 1 <= len(value) <= MAX_NAME_CHARS):
        raise _problem(field, expected)
    return str(value)


def _problem(field: str, expected: str) -> RequestProblem:
    return RequestProblem(f"Invalid value for the header '{field}': expected {expected} (RFC 9651).", field)

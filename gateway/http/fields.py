"""The structured fields (RFC 9651) in which a caller says what to do with the cache, and how a replay is to be.

RFC 9651 4.2 lets the definition of a field choose whether a malformed value is ignored or refused. These are refused, with
`RequestProblem`: a mistyped namespace that is ignored would mix entries which are meant to be apart. Parameters are
ignored, as the RFC wants it of those that are not known; but in a Dictionary, whose members and parameters say how a test
is to be run, what is not known is refused: a test that was not what it seemed has tested nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, cast

import http_sf

from gateway.core.apis.base import RequestProblem
from gateway.core.controls import MAX_NAME_CHARS, MAX_TAGS
from gateway.core.faults import Fault, FaultKind, FaultWish, total_rate
from gateway.core.pacing import NO_WISH, Wish

TTL = "Gateway-Cache-TTL"
NAMESPACE = "Gateway-Cache-Namespace"
TAGS = "Gateway-Cache-Tags"
REPLAY = "Gateway-Replay"
FAULT = "Gateway-Fault"

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


Read = Callable[[Any], Any]
"""Takes a bare item, or raises `ValueError` with what it has to be."""


def _number(least: float, most: float = 1e15) -> Read:
    def read(value: Any) -> float:
        if type(value) not in (int, Decimal) or not least <= float(value) <= most:  # by type: a Boolean is an int too
            raise ValueError(f"a number from {least:g} to {most:g}" if most < 1e15 else f"a number of at least {least:g}")
        return float(value)

    return read


def _whole(least: int, most: int = 10**15) -> Read:
    def read(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"an Integer from {least} to {most}")
        return value

    return read


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("an Integer")
    return value


def _yes(value: Any) -> bool:
    if value is not True:
        raise ValueError("no value")
    return True


_ABOVE_ZERO = 0.001
_SECONDS = _number(0)
Known = Mapping[str, tuple[str, Read, Mapping[str, tuple[str, Read]]]]
"""The members of a Dictionary: what each is called here, how it is read, and the same of its parameters."""
_REPLAY: Known = {
    "instant": ("instant", _yes, {}),
    "recorded": ("recorded", _yes, {"speed": ("speed", _number(_ABOVE_ZERO))}),
    "rate": ("tokens_per_s", _number(_ABOVE_ZERO), {}),
    "ttft": ("ttft_s", _SECONDS, {"sd": ("ttft_sd_s", _SECONDS)}),
    "itl": ("itl_s", _SECONDS, {"sd": ("itl_sd_s", _SECONDS)}),
    "speed": ("speed", _number(_ABOVE_ZERO), {}),
    "jitter": ("jitter", _number(0, 1), {}),
    "max_gap": ("max_gap_s", _number(_ABOVE_ZERO), {}),
    "seed": ("seed", _integer, {}),
}
_KINDS = ("instant", "recorded", "rate", "itl")
_RATE = ("rate", _number(0, 1))
_AFTER = ("after", _whole(0))
_FAULTS: Known = {
    "status": ("status", _whole(400, 599), {"retry_after": ("retry_after_s", _whole(0)), "rate": _RATE}),
    "slow": ("seconds", _SECONDS, {"rate": _RATE}),
    "stall": ("seconds", _SECONDS, {"after": _AFTER, "rate": _RATE}),
    "cut": ("", _yes, {"after": _AFTER, "rate": _RATE}),
    "malformed": ("", _yes, {"after": _AFTER, "rate": _RATE}),
    "error": ("", _yes, {"after": _AFTER, "rate": _RATE}),
    "seed": ("seed", _integer, {}),
}


def replay(values: Sequence[str]) -> Wish:
    """How a replay is to be timed, from the field lines. Raises `RequestProblem`."""
    if not values:
        return NO_WISH
    wish: dict[str, Any] = {}
    members = _members(REPLAY, values, _REPLAY)
    for name, said in members.items():
        # What does not say how it varies does not.
        wish |= {own: 0.0 for own, _ in _REPLAY[name][2].values() if own.endswith("_sd_s")} | said
    if "seed" in members:
        wish["turns"] = False
    return _with_kind(members, wish)


def faults(values: Sequence[str]) -> FaultWish | None:
    """What is to go wrong, from the field lines: one of these, each with its rate. Raises `RequestProblem`."""
    if not values:
        return None
    members = _members(FAULT, values, _FAULTS)
    seed = members.pop("seed", {}).get("seed")
    kinds = [(name, {own: value for own, value in said.items() if own}) for name, said in members.items()]
    found = tuple(Fault(kind=cast("FaultKind", name), **said) for name, said in kinds)
    if len(found) > 1 and total_rate(found) > 1:
        raise _problem(FAULT, "rates that come to no more than 1")
    return FaultWish(found, seed)


def _members(field: str, values: Sequence[str], known: Known) -> dict[str, dict[str, Any]]:
    """Of each member its own value and those of its parameters, by what they are called here."""
    found: dict[str, dict[str, Any]] = {}
    for name, (value, parameters) in _parsed(field, values, "dictionary", "a Dictionary").items():
        if name not in known:
            raise _problem(field, f"no member {name!r}, but some of {', '.join(known)}")
        own, read, its = known[name]
        found[name] = {own: _read(field, name, value, read)}
        for parameter, given in parameters.items():
            if parameter not in its:
                raise _problem(field, f"no parameter {parameter!r} of {name!r}")
            own, read = its[parameter]
            found[name][own] = _read(field, f"{name};{parameter}", given, read)
    return found


def _with_kind(said: Mapping[str, Any], wish: dict[str, Any]) -> Wish:
    """The kind of pace that the members come to."""
    kinds = [name for name in _KINDS if name in said]
    if len(kinds) > 1:
        raise _problem(REPLAY, f"only one of {' and '.join(kinds)}")
    if "ttft" in said and kinds and kinds[0] in ("instant", "recorded"):
        raise _problem(REPLAY, f"no 'ttft' beside {kinds[0]!r}")
    wish.pop("instant", None)
    wish.pop("recorded", None)
    if "rate" in said and "ttft" in said:
        return wish | {"kind": "drawn", "itl_s": 1.0 / wish.pop("tokens_per_s"), "itl_sd_s": 0.0}
    if "rate" in said:
        return wish | {"kind": "fixed"}
    if "ttft" in said or "itl" in said:
        return wish | {"kind": "drawn"}
    return wish | {"kind": kinds[0]} if kinds else wish


def _read(field: str, name: str, value: Any, read: Read) -> Any:
    try:
        return read(value)
    except ValueError as expected:
        raise _problem(field, f"{expected} for {name!r}") from None


def _item(field: str, values: Sequence[str], expected: str) -> Any:
    # Two lines could be joined to one Item: inside of a String a comma is text.
    if len(values) != 1:
        raise _problem(field, expected)
    value, _ = _parsed(field, values, "item", expected)
    return value


def _parsed(field: str, values: Sequence[str], kind: Literal["item", "list", "dictionary"], expected: str) -> Any:
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

"""Where the members of a JSON object stand in its bytes: what lets a reply patch a value and leave all else as it came.

Only text that a JSON parser has accepted, or will be given, is scanned; on anything else `members` raises `ValueError`.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_SPACE = re.compile(rb"[ \t\r\n]*")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SCALAR = re.compile(rb"[^,\]}\s]+")
_BRACKET_OR_STRING = re.compile(rb'[\[\]{}]|"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


class Member(NamedTuple):
    """A top-level member: its name as written, where its name starts, and where its value starts and ends."""

    name: bytes
    start: int
    value_start: int
    value_end: int


def members(text: bytes) -> Iterator[Member]:
    """The members of the object that ``text`` is, in order."""
    at = _expect(text, _skip_space(text, 0), b"{")
    at = _skip_space(text, at)
    if text[at : at + 1] == b"}":
        return
    while True:
        name = _STRING.match(text, at)
        if name is None:
            raise ValueError(f"no member name at byte {at}")
        value_start = _skip_space(text, _expect(text, _skip_space(text, name.end()), b":"))
        value_end = _skip_value(text, value_start)
        yield Member(name[0][1:-1], at, value_start, value_end)
        at = _skip_space(text, value_end)
        if text[at : at + 1] == b"}":
            return
        at = _skip_space(text, _expect(text, at, b","))


def cut_member(text: bytes, member: Member) -> tuple[int, int]:
    """The span to remove so that ``member`` is gone and the object is still well-formed."""
    before = text[: member.start].rstrip(b" \t\r\n")
    if before.endswith(b","):
        return len(before) - 1, member.value_end
    after = _skip_space(text, member.value_end)
    if text[after : after + 1] == b",":
        return member.start, _skip_space(text, after + 1)
    return member.start, member.value_end


def _skip_space(text: bytes, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _expect(text: bytes, at: int, char: bytes) -> int:
    if text[at : at + 1] != char:
        raise ValueError(f"{char!r} expected at byte {at}")
    return at + 1


def _skip_value(text: bytes, at: int) -> int:
    first = text[at : at + 1]
    if first not in (b"{", b"["):
        match = (_STRING if first == b'"' else _SCALAR).match(text, at)
        if match is None:
            raise ValueError(f"no value at byte {at}")
        return match.end()
    depth = 0
    for token in _BRACKET_OR_STRING.finditer(text, at):
        kind = token[0][:1]
        if kind in b"{[":
            depth += 1
        elif kind in b"}]":
            depth -= 1
            if depth == 0:
                return token.end()
    raise ValueError(f"the value at byte {at} does not end")

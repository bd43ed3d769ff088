"""One reader's stream, as a token that the gateway can trust when it comes back, and the cursors inside of it.

The token holds all that a resume needs, so any replica can serve it; a keyed digest over it and its owner makes it ours
and nobody else's. What the reader's fresh identity is made of depends only on what stays the same over all resumes, and
tells whoever has the secret, and nobody else, of which flight the answer is.
"""

import re
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from hashlib import blake2b
from hmac import compare_digest
from typing import Literal, NamedTuple

from gateway.core.content import parse_position
from gateway.core.key import CacheKey

NO_RUN = "00000000"
"""The run of a stream of which it is not known: of a hit that an earlier version gave."""

_VERSION = 1
_APIS = ("chat", "completions")  # by number: only ever append
_FIELDS = struct.Struct(">BBB32sI8s")  # version, flags, api; key, flight and run; created; nonce
_HIT, _USAGE, _EVENT_IDS, _SHARED, _FRESH = (1 << bit for bit in range(5))
_ALL_FLAGS = 0b11111
_MAC_BYTES = 13  # so that the whole is a multiple of three: no padding, and no bits that may be flipped unseen
_TOKEN = re.compile(r"[A-Za-z0-9_-]{80}")
_NAME_BYTES = 16  # a nonce, and the flight under it
_NAME_PAIRS = 11
_CHECK_BYTES = 21  # 42 digits: 64 in all
_SHOWN = re.compile(r"(?:.*[-_])?([0-9A-Za-z]{22})([0-9a-f]{2,42})", re.DOTALL)
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# Two digits at a time: it is on the way of every hit.
_PAIRS = [one + other for one in _BASE62 for other in _BASE62]
_PAIR_NUMBERS = {pair: number for number, pair in enumerate(_PAIRS)}
_AFTER = re.compile(r"(0|[1-9][0-9]{0,11})(?:\.((?!end\Z)[^.]+))?(\.end)?")


class UnknownStream(ValueError):
    """A token that is not ours, or another owner's."""


class StreamId(NamedTuple):
    """One reader's stream.

    ``key`` is 40 hexadecimal digits, ``flight`` 16, ``run`` 8 (`NO_RUN` if it is not known); ``created`` are Unix seconds
    (32 bits), ``nonce`` 8 bytes. ``shared``: the entries are not a tenant's. ``fresh``: a hit whose id and time are new.
    """

    kind: Literal["flight", "hit"]
    usage: bool
    event_ids: bool
    shared: bool
    fresh: bool
    api: str
    key: CacheKey
    flight: str
    run: str
    created: int
    nonce: bytes


def mint(secret: bytes, owner: str, stream: StreamId) -> tuple[str, str]:
    """The token (80 letters, digits, ``-`` and ``_``), and the `identity_digits`. ``secret`` is 16 to 64 bytes."""
    kind, usage, event_ids, shared, fresh, api, key, flight, run, created, nonce = stream
    flags = (kind == "hit") | usage << 1 | event_ids << 2 | shared << 3 | fresh << 4
    hexadecimal = bytes.fromhex(key + flight + run)
    packed = _FIELDS.pack(_VERSION, flags, _APIS.index(api), hexadecimal, created, nonce)
    token = urlsafe_b64encode(packed + _mac(secret, packed, owner)).decode()
    return token, _traceable_digits(secret, hexadecimal[20:28], nonce)


def open_token(secret: bytes, owner_of: Callable[[bool], str], token: str) -> StreamId:
    """The stream of a token; raises `UnknownStream`. ``owner_of(shared)`` is the presenter as an owner of entries."""
    if not _TOKEN.fullmatch(token):
        raise UnknownStream("not a stream id")
    data = urlsafe_b64decode(token)
    packed, mac = data[:-_MAC_BYTES], data[-_MAC_BYTES:]
    if not compare_digest(mac, _mac(secret, packed, owner_of(bool(_FIELDS.unpack(packed)[1] & _SHARED)))):
        raise UnknownStream("not a stream id of this caller")
    return _unpacked(packed)


def _unpacked(packed: bytes) -> StreamId:
    version, flags, api, hexadecimal, created, nonce = _FIELDS.unpack(packed)
    if version != _VERSION or flags > _ALL_FLAGS or api >= len(_APIS):
        raise UnknownStream("a stream id of another version")
    digits = hexadecimal.hex()
    return StreamId(
        kind="hit" if flags & _HIT else "flight",
        usage=bool(flags & _USAGE),
        event_ids=bool(flags & _EVENT_IDS),
        shared=bool(flags & _SHARED),
        fresh=bool(flags & _FRESH),
        api=_APIS[api],
        key=CacheKey(digits[:40]),
        flight=digits[40:56],
        run=digits[56:],
        created=created,
        nonce=nonce,
    )


def _mac(secret: bytes, packed: bytes, owner: str) -> bytes:
    return blake2b(packed + owner.encode(), key=secret, person=b"stream", digest_size=_MAC_BYTES).digest()


# The fresh identity


def identity_digits(secret: bytes, stream: StreamId) -> str:
    """The digits from which the reader's fresh id follows: the same for all resumes of one stream."""
    return traceable_digits(secret, stream.flight, stream.nonce)


def traceable_digits(secret: bytes, flight: str, nonce: bytes) -> str:
    """64 digits and letters for the id of an answer of that flight: 22 hold the nonce and, under a mask, the flight; then
    comes a keyed digest of both.

    ``flight`` is 16 hexadecimal digits, ``nonce`` 8 bytes that no other answer of the flight has.
    """
    return _traceable_digits(secret, bytes.fromhex(flight), nonce)


def flight_of(secret: bytes, response_id: str) -> str | None:
    """The flight (16 hexadecimal digits) of an answer that was shown under an id made of `traceable_digits`.

    None for any other id: at least 8 bits of the digest are there to tell.
    """
    shown = _SHOWN.fullmatch(response_id)
    if shown is None:
        return None
    number = _from_base62(shown[1])
    if number >> 8 * _NAME_BYTES:
        return None
    name = number.to_bytes(_NAME_BYTES)
    if not compare_digest(_check_digits(secret, name)[: len(shown[2])], shown[2]):
        return None
    return (int.from_bytes(name[8:]) ^ _mask(secret, name[:8])).to_bytes(8).hex()


def _traceable_digits(secret: bytes, flight: bytes, nonce: bytes) -> str:
    name = int.from_bytes(nonce + flight) ^ _mask(secret, nonce)
    return _base62(name) + _check_digits(secret, name.to_bytes(_NAME_BYTES))


def _mask(secret: bytes, nonce: bytes) -> int:
    return int.from_bytes(blake2b(nonce, key=secret, person=b"identity mask", digest_size=8).digest())


def _check_digits(secret: bytes, name: bytes) -> str:
    return blake2b(name, key=secret, person=b"identity check", digest_size=_CHECK_BYTES).hexdigest()


def _base62(number: int) -> str:
    """The lowest pair of digits first."""
    pairs = []
    for _ in range(_NAME_PAIRS):
        number, pair = divmod(number, len(_PAIRS))
        pairs.append(_PAIRS[pair])
    return "".join(pairs)


def _from_base62(digits: str) -> int:
    number = 0
    for at in reversed(range(0, len(digits), 2)):
        number = number * len(_PAIRS) + _PAIR_NUMBERS[digits[at : at + 2]]
    return number


# Cursors


class Cursor(NamedTuple):
    """What a reader has seen: frames up to ``after``, and by content ``position`` (see `Trace`), if that is told.

    ``ended``: and the end behind them. Another run may say the same in fewer frames, so the number does not tell that.
    """

    after: int
    position: str = ""
    ended: bool = False

    @property
    def is_only_a_number(self) -> bool:
        """Whether it hangs on whose events were counted."""
        return self.after > 0 and not (self.position or self.ended)


def format_cursor(token: str, after: int, position: str = "", ended: bool = False) -> bytes:  # noqa: FBT001, FBT002  # as a Cursor
    """The id of an event: ``TOKEN.12`` or ``TOKEN.12.1f-abcdefgh``, and that of the last one with ``.end`` behind it."""
    return f"{token}.{after}{f'.{position}' if position else ''}{'.end' if ended else ''}".encode()


def parse_cursor(text: str, token: str) -> Cursor:
    """The cursor of an event's id in the stream ``token``; raises ValueError."""
    if not text.startswith(f"{token}."):
        raise ValueError("a cursor of another stream")
    return parse_after(text[len(token) + 1 :])


def parse_after(text: str) -> Cursor:
    """``12``, ``12.1f-abcdefgh`` or either with ``.end``; raises ValueError."""
    match = _AFTER.fullmatch(text)
    if match is None:
        raise ValueError("not a cursor")
    if match[2] is not None:
        parse_position(match[2])
    return Cursor(int(match[1]), match[2] or "", match[3] is not None)


def read_token(token: str) -> StreamId:
    """What a token says, whoever's it is, for those who may see everybody's entries; raises `UnknownStream`.

    Nobody vouches for it: good enough to look something up by, never to decide whose it is.
    """
    if not _TOKEN.fullmatch(token):
        raise UnknownStream("not a stream id")
    return _unpacked(urlsafe_b64decode(token)[:-_MAC_BYTES])

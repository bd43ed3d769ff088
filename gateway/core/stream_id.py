"""One reader's stream, as a token that the gateway can trust when it comes back, and the cursors inside of it.

The token holds all that a resume needs, so any replica can serve it; a keyed digest over it and its owner makes it ours
and nobody else's. What the reader's fresh identity is made of depends only on what stays the same over all resumes.
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
"""The run of a stream that has none."""

_VERSION = 1
_APIS = ("chat", "completions")  # by number: only ever append
_FIELDS = struct.Struct(">BBB32sI8s")  # version, flags, api; key, flight and run; created; nonce
_UNCHANGING = struct.Struct(">8sI8s")  # flight, created, nonce
_HIT, _USAGE, _EVENT_IDS, _SHARED, _FRESH = (1 << bit for bit in range(5))
_ALL_FLAGS = 0b11111
_HEX_DIGITS = 64
_MAC_BYTES = 13  # so that the whole is a multiple of three: no padding, and no bits that may be flipped unseen
_TOKEN = re.compile(r"[A-Za-z0-9_-]{80}")
_AFTER = re.compile(r"(0|[1-9][0-9]{0,11})(?:\.(.+))?")


class UnknownStream(ValueError):
    """A token that is not ours, or another owner's."""


class StreamId(NamedTuple):
    """One reader's stream.

    ``key`` is 40 hexadecimal digits, ``flight`` 16, ``run`` 8 (`NO_RUN` if there is none); ``created`` are Unix seconds
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
    return token, _identity_digits(secret, hexadecimal[20:28], created, nonce)


def identity_digits(secret: bytes, stream: StreamId) -> str:
    """64 hexadecimal digits from which the reader's fresh id follows: the same for all resumes of one stream."""
    return _identity_digits(secret, bytes.fromhex(stream.flight), stream.created, stream.nonce)


def open_token(secret: bytes, owner_of: Callable[[bool], str], token: str) -> StreamId:
    """The stream of a token; raises `UnknownStream`. ``owner_of(shared)`` is the presenter as an owner of entries."""
    if not _TOKEN.fullmatch(token):
        raise UnknownStream("not a stream id")
    data = urlsafe_b64decode(token)
    packed, mac = data[:-_MAC_BYTES], data[-_MAC_BYTES:]
    version, flags, api, hexadecimal, created, nonce = _FIELDS.unpack(packed)
    shared = bool(flags & _SHARED)
    if not compare_digest(mac, _mac(secret, packed, owner_of(shared))):
        raise UnknownStream("not a stream id of this caller")
    if version != _VERSION or flags > _ALL_FLAGS or api >= len(_APIS):
        raise UnknownStream("a stream id of another version")
    digits = hexadecimal.hex()
    return StreamId(
        kind="hit" if flags & _HIT else "flight",
        usage=bool(flags & _USAGE),
        event_ids=bool(flags & _EVENT_IDS),
        shared=shared,
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


def _identity_digits(secret: bytes, flight: bytes, created: int, nonce: bytes) -> str:
    unchanging = _UNCHANGING.pack(flight, created, nonce)
    return blake2b(unchanging, key=secret, person=b"identity", digest_size=_HEX_DIGITS // 2).hexdigest()


class Cursor(NamedTuple):
    """What a reader has seen: frames up to ``after``, and by content ``position`` (see `Trace`), if that is told."""

    after: int
    position: str = ""


def format_cursor(token: str, after: int, position: str = "") -> bytes:
    """The id of an event: ``TOKEN.12`` or ``TOKEN.12.1f-abcdefgh``."""
    return (f"{token}.{after}.{position}" if position else f"{token}.{after}").encode()


def parse_cursor(text: str, token: str) -> Cursor:
    """The cursor of an event's id in the stream ``token``; raises ValueError."""
    if not text.startswith(f"{token}."):
        raise ValueError("a cursor of another stream")
    return parse_after(text[len(token) + 1 :])


def parse_after(text: str) -> Cursor:
    """``12`` or ``12.1f-abcdefgh``; raises ValueError."""
    match = _AFTER.fullmatch(text)
    if match is None:
        raise ValueError("not a cursor")
    if match[2] is not None:
        parse_position(match[2])
    return Cursor(int(match[1]), match[2] or "")

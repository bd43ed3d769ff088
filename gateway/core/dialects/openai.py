"""OpenAI's stream: each frame as it came, ``[DONE]`` at a good end, one event with an ``error`` object at a bad one."""

import orjson

from gateway.core.sse import comment, encode
from gateway.errors import GatewayError

DONE = b"[DONE]"
END = encode(DONE)
KEEP_ALIVE = comment(b"keep-alive")
KEEP_ALIVE_BETWEEN_IDS = b": keep-alive\n"
"""The same on a stream whose events have ids: glued to the next event, since the official Python client makes an empty
event, which it cannot parse, of an id and a comment with a blank line of its own."""


def error_event(error: GatewayError) -> bytes:
    """The only form of a failure in mid-stream that every client raises on; nothing may follow it."""
    return encode(orjson.dumps(error.body()))


def with_id(cursor: bytes, event: bytes) -> bytes:
    """An event that says from where to resume after it (WHATWG HTML 9.2.6)."""
    return b"id: " + cursor + b"\n" + event

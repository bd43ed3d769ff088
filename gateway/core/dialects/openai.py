"""OpenAI's stream: each frame as it came, ``[DONE]`` at a good end, one event with an ``error`` object at a bad one."""

import orjson

from gateway.core.sse import comment, encode
from gateway.errors import GatewayError

DONE = b"[DONE]"
END = encode(DONE)
KEEP_ALIVE = comment(b"keep-alive")


def error_event(error: GatewayError) -> bytes:
    """The only form of a failure in mid-stream that every client raises on; nothing may follow it."""
    return encode(orjson.dumps(error.body()))

"""What the tests of the store share: a recording, and patience with servers."""

import asyncio
import time
from array import array
from collections.abc import Callable
from dataclasses import replace

from gateway.core.key import CacheKey
from gateway.core.recording import Marks, Meta, Recording

KEY = CacheKey("0123456789abcdef0123456789abcdef01234567")
META = Meta(
    api="chat",
    model="model-1",
    upstream="scripted",
    started_at=1_700_000_000.25,
    written_at=1_700_000_001.5,
    duration_us=900,
    ttl_s=60.0,
    id="chatcmpl-1",
    frames=2,
    finish_reasons=("stop",),
    usage={"total_tokens": 5},
    body_id=(6, 18),
    body_created=None,
)
RECORDING = Recording(
    META,
    b'data: {"id":"chatcmpl-1"}\n\ndata: {"id":"chatcmpl-1"}\n\n',
    Marks(54, 54, array("Q", (400, 900))),
    b'{"id":"chatcmpl-1"}',
)


def begun(seconds_later: float, body: bytes) -> Recording:
    return replace(RECORDING, meta=META._replace(started_at=META.started_at + seconds_later), body=body)


def large(size_bytes: int) -> Recording:
    sse = b"data: " + b"x" * size_bytes + b"\n\n"
    return replace(RECORDING, sse=sse, marks=Marks(len(sse), len(sse), array("Q", [1])), body=sse)


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    """Waits for what another process must do first."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)

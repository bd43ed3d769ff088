"""Writing to callers who may not read: never more than a little ahead of them, and not for ever."""

import asyncio
from collections.abc import Awaitable

from aiohttp import web

PIECE_BYTES = 65_536
"""What is written at a time of an answer that is there in full: as much as a transport's buffer takes."""


class CallerTooSlow(ConnectionResetError):
    """The caller has not taken what was written for too long."""


async def patiently(request: web.BaseRequest, write: Awaitable[None], write_timeout_s: float) -> None:
    """Waits for a write as long as a caller may take for it. Raises `CallerTooSlow`."""
    try:
        async with asyncio.timeout(write_timeout_s):
            await write
    except TimeoutError:
        if request.transport:
            request.transport.abort()
        raise CallerTooSlow from None


async def write_whole(request: web.Request, response: web.StreamResponse, body: bytes, write_timeout_s: float) -> None:
    """Writes a large body, of which a slow caller would otherwise hold a second copy. Raises `ConnectionResetError`."""
    response.content_length = len(body)
    await response.prepare(request)
    view = memoryview(body)
    for start in range(0, len(view), PIECE_BYTES):
        await patiently(request, response.write(view[start : start + PIECE_BYTES]), write_timeout_s)
    await response.write_eof()

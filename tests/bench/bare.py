"""The comparator: the least that a streaming cache on aiohttp and redis-py can do, without any care for correctness.

A hit is one GET and one write; a miss relays the upstream's bytes as they come, keeps a copy and stores it at the end.
"""

import asyncio
import sys
from hashlib import blake2b

import orjson
import redis.asyncio as aioredis
import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

_LIFE_S = 3600


def key_of(request: object) -> bytes:
    return b"bare:" + blake2b(orjson.dumps(request, option=orjson.OPT_SORT_KEYS), digest_size=20).digest()


class Bare:
    """The one handler, with its clients."""

    def __init__(self, store: aioredis.Redis, session: ClientSession, upstream: str) -> None:
        self._store = store
        self._session = session
        self._upstream = upstream

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        asked = orjson.loads(body)
        key = key_of(asked)
        stored = await self._store.get(key)
        if stored is None:
            return await self._relay(request, key, body)
        content_type = "text/event-stream" if asked.get("stream") else "application/json"
        return web.Response(body=stored, headers={"Content-Type": content_type, "Cache-Status": "bare; hit"})

    async def _relay(self, request: web.Request, key: bytes, body: bytes) -> web.StreamResponse:
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type")}
        async with self._session.post(self._upstream + request.path, data=body, headers=headers) as answer:
            response = web.StreamResponse(status=answer.status)
            response.headers["Content-Type"] = answer.headers["Content-Type"]
            response.headers["Cache-Status"] = "bare; fwd=miss"
            await response.prepare(request)
            copy = []
            async for data in answer.content.iter_any():
                copy.append(data)
                await response.write(data)
        if answer.status == 200:
            await self._store.set(key, b"".join(copy), ex=_LIFE_S)
        return response


async def serve(port: int, redis_socket: str, upstream: str) -> None:
    store = aioredis.Redis(unix_socket_path=redis_socket, max_connections=1000)
    async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None)) as session:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", Bare(store, session, upstream).answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), sys.argv[2], sys.argv[3]))

"""Callers that no client would be: they send what bytes they like, and read as little as they like."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from running import Gateway
from yarl import URL

from gateway.app import RUNNING

PATIENCE_S = 30.0


@dataclass
class Answer:
    """One answer as it came."""

    version: str
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str:
        [value] = [value for each, value in self.headers if each == name.lower()]
        return value

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object, and nothing else."""
        assert self.header("content-type").partition(";")[0] == "application/json"
        [(name, error)] = json.loads(self.body).items()
        assert name == "error"
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
        return error


@dataclass
class Told:
    """All that came back on a connection; ``rest`` is what is no answer; ``closed``: by the gateway, before long."""

    answers: list[Answer] = field(default_factory=list)
    rest: bytes = b""
    closed: bool = False


@asynccontextmanager
async def connected(gateway: Gateway) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", URL(gateway.origin).port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def tell(gateway: Gateway, *pieces: bytes, answers: int = 1, closes: bool = False) -> Told:
    """Sends the bytes, piece by piece, and reads that many answers; then whether the connection is closed.

    A connection that is to stay open is proven to be by one more request.
    """
    async with asyncio.timeout(PATIENCE_S), connected(gateway) as (reader, writer):
        told = Told()
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            for _ in range(answers):
                told.answers.append(await read_answer(reader))
            if not closes:
                writer.write(HEALTH)
                told.closed = not reader.at_eof() and (await read_answer(reader)).status != 200
                return told
            told.rest = await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            told.rest += getattr(error, "partial", b"")
        told.closed = True
        return told


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """The next answer, but interim ones."""
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").removesuffix("\r\n\r\n")
        first, *lines = head.split("\r\n")
        version, status, _ = first.split(" ", 2)
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        if status != "100":
            break
    known = dict(headers)
    body = b""
    if known.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    elif "content-length" in known:
        body = await reader.readexactly(int(known["content-length"]))
    return Answer(version, int(status), headers, body)


async def by_then(condition: Callable[[], Any], within_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it has not come to be"
        await asyncio.sleep(0.005)


def left_over(gateway: Gateway) -> dict[str, int]:
    """What a gateway that serves nobody has none of."""
    flights = gateway.service._flights
    server = gateway.runner.server
    assert server
    counted = {
        "requests": gateway.runner.app[RUNNING]._count,
        "flights": len(flights._tasks),
        "flights by key": len(flights._by_key),
        "replays": len(gateway.service.replays),
        "connections": len(server.connections),
    }
    return {name: count for name, count in counted.items() if count}


async def nothing_is_left(gateway: Gateway) -> None:
    """Once all callers have gone."""
    await gateway.session.close()
    try:
        await by_then(lambda: not left_over(gateway))
    except AssertionError:
        raise AssertionError(left_over(gateway)) from None

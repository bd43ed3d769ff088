"""What a supervisor and a worker say to each other: JSON, each message behind its length."""

import asyncio
import socket
import struct
from contextlib import suppress
from typing import Any, Self

import orjson

_LENGTH = struct.Struct("!I")
Message = dict[str, Any]


class Channel:
    """One end of a socket pair. It ends when the process at the other end does, however that ends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, sock: socket.socket) -> Self:
        return cls(*await asyncio.open_unix_connection(sock=sock))

    def send(self, message: Message) -> None:
        """Nobody is told whether it arrives: who is gone is noticed by `receive`."""
        data = orjson.dumps(message)
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def receive(self) -> Message | None:
        """The next message; None where no more can come."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            message: Message = orjson.loads(await self._reader.readexactly(length))
            return message
        return None

    def close(self) -> None:
        self._writer.transport.abort()


def receive_first(sock: socket.socket) -> Message:
    """The first message, for who has no event loop yet. Raises `OSError`."""
    (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
    message: Message = orjson.loads(_exactly(sock, length))
    return message


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (part := sock.recv(size - len(data))):
            raise ConnectionResetError("the supervisor is gone")
        data += part
    return data

"""Stands before a Redis: ``late.py PORT SOCKET [SECONDS]`` holds each answer back so long, or for ever."""

import asyncio
import sys
from asyncio import StreamReader, StreamWriter
from contextlib import closing, suppress

import uvloop


async def _pass_on(reader: StreamReader, writer: StreamWriter, delay_s: float) -> None:
    """Each piece after so long, however many wait."""
    loop = asyncio.get_running_loop()
    with closing(writer), suppress(OSError):
        while data := await reader.read(65_536):
            if delay_s:
                loop.call_later(delay_s, writer.write, data)
            else:
                writer.write(data)


async def _swallow(reader: StreamReader) -> None:
    with suppress(OSError):
        while await reader.read(65_536):
            pass


async def main() -> None:
    port, socket, *delay_s = sys.argv[1:]

    async def connected(reader: StreamReader, writer: StreamWriter) -> None:
        if not delay_s:
            await _swallow(reader)
            writer.close()
            return
        theirs, ours = await asyncio.open_unix_connection(socket)
        await asyncio.gather(_pass_on(reader, ours, 0), _pass_on(theirs, writer, float(delay_s[0])))

    async with await asyncio.start_server(connected, "127.0.0.1", int(port)) as server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())

"""A scripted upstream on a real socket: it says what a test tells it, byte by byte, and waits where a test wants it to."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Asked:
    """One request that reached the upstream, and the connection to answer it on."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    writer: asyncio.StreamWriter
    upstream: "ScriptedUpstream"
    chunked: bool = True
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the gateway has closed the connection."""

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    async def head(self, status: int = 200, content_type: str = "text/event-stream", **headers: str) -> None:
        """The head of a chunked answer; ``retry_after="3"`` becomes ``retry-after: 3``."""
        lines = [f"HTTP/1.1 {status} Scripted", f"content-type: {content_type}", "transfer-encoding: chunked"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.raw("\r\n".join([*lines, "", ""]).encode())

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def send(self, data: bytes) -> None:
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def event(self, data: Any) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        await self.send(f"data: {text}\n\n".encode())

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")

    async def done(self) -> None:
        await self.send(b"data: [DONE]\n\n")
        await self.end()

    async def answer(self, body: Any, status: int = 200, content_type: str = "application/json", **headers: str) -> None:
        """A whole answer with its length."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} Scripted", f"content-type: {content_type}", f"content-length: {len(data)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.raw("\r\n".join([*lines, "", ""]).encode() + data)

    def reset(self) -> None:
        """Cuts the connection with a TCP reset."""
        self.writer.transport.abort()

    async def gate(self, name: str) -> None:
        """Tells the test that this point is reached, and waits until the test releases it."""
        self.upstream.gate(name).reached.set()
        await self.upstream.gate(name).released.wait()


@dataclass
class Gate:
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)


Script = Callable[[Asked], Awaitable[None]]


def chunk(delta: dict[str, Any], finish: str | None = None, index: int = 0, **members: Any) -> dict[str, Any]:
    """A chat chunk in OpenAI's shape."""
    return {
        "id": "chatcmpl-0123456789abcdefghijklmn",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "model-1",
        "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}],
        **members,
    }


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 1}}


async def say_hello(asked: Asked) -> None:
    """A short good answer: streamed or not, chat or completion, with usage if it is asked for."""
    if asked.path.endswith("/models"):
        await asked.answer(
            {"object": "list", "data": [{"id": "model-1", "object": "model", "created": 1, "owned_by": "me"}]}
        )
    elif asked.json.get("stream"):
        await stream(asked, "Hello", " world")
    else:
        await asked.answer(whole_answer("Hello world"))


async def stream(asked: Asked, *words: str, finish: str = "stop") -> None:
    options = asked.json.get("stream_options") or {}
    nothing = {"usage": None} if options.get("include_usage") else {}
    await asked.head(x_request_id="req_upstream")
    if asked.path.endswith("/chat/completions"):
        await asked.event(chunk({"role": "assistant", "content": ""}, **nothing))
        for word in words:
            await asked.event(chunk({"content": word}, **nothing))
        await asked.event(chunk({}, finish, **nothing))
        tail = {**chunk({}), "choices": [], "usage": USAGE}
    else:
        for word in words:
            await asked.event(text_chunk(word, **nothing))
        await asked.event(text_chunk("", finish, **nothing))
        tail = {**text_chunk(""), "choices": [], "usage": USAGE}
    if nothing:
        await asked.event(tail)
    await asked.done()


async def two_parts(asked: Asked) -> None:
    """A stream that waits in its middle, at the gate ``second part``."""
    await asked.head()
    await asked.event(chunk({"role": "assistant", "content": "Hello"}))
    await asked.gate("second part")
    await asked.event(chunk({"content": " world"}))
    await asked.event(chunk({}, "stop"))
    await asked.done()


def text_chunk(text: str, finish: str | None = None, index: int = 0, **members: Any) -> dict[str, Any]:
    """A completion chunk in OpenAI's shape."""
    return {
        "id": "cmpl-0123456789abcdefghijklmn",
        "object": "text_completion",
        "created": 1700000000,
        "model": "model-1",
        "choices": [{"index": index, "text": text, "logprobs": None, "finish_reason": finish}],
        **members,
    }


def whole_answer(text: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-whole456789abcdefghijklm",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "model-1",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": "stop"}
        ],
        "usage": USAGE,
    }


class ScriptedUpstream:
    """Listens on a free port of loopback. ``script`` answers each request; ``asked`` keeps them all."""

    def __init__(self) -> None:
        self.script: Script = say_hello
        self.asked: list[Asked] = []
        self.on_body: Callable[[bytes], object] = lambda _: None
        """Told what has come of a chunked body, piece by piece."""
        self.errors: list[BaseException] = []
        self._gates: dict[str, Gate] = {}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def configured(self, **keys: Any) -> dict[str, Any]:
        """What a configuration says of it: ``[[upstreams]]``."""
        return {"name": "scripted", "kind": "openai", "base_url": self.base_url, "models": ["*"], **keys}

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [asked.json for asked in self.asked]

    def gate(self, name: str) -> Gate:
        return self._gates.setdefault(name, Gate())

    async def stop(self) -> None:
        if self._server:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            while asked := await self._read(reader, writer):
                self.asked.append(asked)
                await self._answer(asked, reader)
                if writer.is_closing():
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, asked: Asked, reader: asyncio.StreamReader) -> None:
        """Runs the script, and watches whether the other side hangs up meanwhile."""
        script = asyncio.ensure_future(self.script(asked))
        hang_up = asyncio.ensure_future(self._hung_up(reader))
        try:
            await asyncio.wait((script, hang_up), return_when=asyncio.FIRST_COMPLETED)
            if not script.done():
                asked.gone.set()
            await script
        except ConnectionError:
            asked.gone.set()
        except Exception as error:
            self.errors.append(error)
            raise
        finally:
            for task in (script, hang_up):
                task.cancel()
            await asyncio.gather(script, hang_up, return_exceptions=True)

    async def _hung_up(self, reader: asyncio.StreamReader) -> None:
        while not reader.at_eof():
            if reader._buffer:  # the next request is there already: not ours to read
                await asyncio.Event().wait()
            await reader._wait_for_data("_hung_up")

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Asked | None:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").strip().split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = b""
        if "content-length" in headers:
            body = await reader.readexactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readuntil(b"\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
                self.on_body(body)
            await reader.readline()
        return Asked(method, path, headers, body, writer, self)

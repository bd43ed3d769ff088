"""A scripted OpenAI-compatible upstream, so fast that it is not what is measured.

`POST /v1/chat/completions` answers with `max_tokens` tokens, streamed or not. When is said by `POST /settings`:
``ttft_s`` until the first event, ``gap_s`` between two; with no gap, as fast as it can. `GET /stats` tells how many
calls there were and how many are open.
"""

import asyncio
import re
import socket
import sys
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

import orjson
import uvloop

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_WORDS = (" the", " shop", " sends", " every", " order", " within", " two", " days", ",", " unless", " it", " is", " large")
_ID = "chatcmpl-B0123456789abcdefghijklmnopqr"
_CREATED = 1_790_000_000
_PROMPT_TOKENS = 120

_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"X-Request-Id: req_scripted\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_LAST_CHUNK = b"0\r\n\r\n"


def _text(tokens: int) -> list[str]:
    return list(islice(cycle(_WORDS), tokens))


def _usage(tokens: int) -> dict[str, object]:
    return {
        "prompt_tokens": _PROMPT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": _PROMPT_TOKENS + tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def _envelope(kind: str) -> dict[str, object]:
    names = {"service_tier": "default", "system_fingerprint": "fp_scripted"}
    return {"id": _ID, "object": kind, "created": _CREATED, "model": "scripted", **names}


def _http_chunk(event: bytes) -> bytes:
    data = b"data: " + event + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


@lru_cache
def stream_chunks(tokens: int, *, usage: bool) -> list[bytes]:
    """The events of a streamed answer, each as an HTTP chunk of its own."""
    envelope = _envelope("chat.completion.chunk")
    no_usage_yet = {"usage": None} if usage else {}
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": word}, None) for word in _text(tokens)]
    deltas.append(({}, "stop"))
    events = [
        {**envelope, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}], **no_usage_yet}
        for delta, reason in deltas
    ]
    if usage:
        events.append({**envelope, "choices": [], "usage": _usage(tokens)})
    return [_http_chunk(orjson.dumps(event)) for event in events] + [_http_chunk(b"[DONE]")]


@lru_cache
def whole_answer(tokens: int) -> bytes:
    """The answer in one piece, head included."""
    message = {"role": "assistant", "content": "".join(_text(tokens))}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return _json_answer({**_envelope("chat.completion"), "choices": [choice], "usage": _usage(tokens)})


def _json_answer(value: object) -> bytes:
    body = orjson.dumps(value)
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class Script:
    """When answers come, and how many there were."""

    def __init__(self) -> None:
        self.ttft_s = 0.0
        self.gap_s = 0.0
        self.calls = 0
        self.open = 0


class Connection(asyncio.Protocol):
    """One keep-alive connection. Clients of a benchmark do not pipeline, so it holds one request at a time."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._chunks: list[bytes] = []
        self._next = 0
        self._due_at = 0.0
        self._timer: asyncio.Handle | None = None
        self._full = False
        self._answering = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def connection_lost(self, _error: Exception | None) -> None:
        self._end()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        if self._answering and self._timer is None:
            self._write_next()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank:
            return
        length = _LENGTH.search(head)
        if not length and not head.startswith(b"GET "):
            self._transport.abort()  # a body of unknown length is not understood here
        elif not length or len(body) >= int(length[1]):
            self._received = b""
            self._answer(head.split(b" ", 2)[1], body)

    def _answer(self, path: bytes, body: bytes) -> None:
        script = self._script
        if path == b"/stats":
            self._transport.write(_json_answer({"calls": script.calls, "open": script.open}))
        elif path == b"/settings":
            vars(script).update(orjson.loads(body))
            self._transport.write(_json_answer({}))
        elif path == b"/v1/chat/completions":
            self._begin(orjson.loads(body))
        else:
            self._transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    def _begin(self, request: dict[str, Any]) -> None:
        script, tokens = self._script, request["max_tokens"]
        script.calls += 1
        script.open += 1
        self._answering = True
        wait_s = script.ttft_s
        if request.get("stream"):
            options = request.get("stream_options") or {}
            chunks = stream_chunks(tokens, usage=bool(options.get("include_usage")))
            self._chunks = [_STREAM_HEAD + chunks[0], *chunks[1:-1], chunks[-1] + _LAST_CHUNK]
        else:
            wait_s += tokens * script.gap_s
            self._chunks = [whole_answer(tokens)]
        self._next = 0
        self._due_at = self._loop.time() + wait_s
        if wait_s:
            self._timer = self._loop.call_at(self._due_at, self._write_next)
        else:
            self._write_next()

    def _write_next(self) -> None:
        """Each event is a write of its own, as a model server's is."""
        self._timer = None
        self._transport.write(self._chunks[self._next])
        self._next += 1
        gap_s = self._script.gap_s
        self._due_at += gap_s
        if self._next == len(self._chunks):
            self._end()
        elif gap_s:
            self._timer = self._loop.call_at(self._due_at, self._write_next)
        elif not self._full:
            self._timer = self._loop.call_soon(self._write_next)

    def _end(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._answering:
            self._answering = False
            self._script.open -= 1


async def serve(port: int) -> None:
    script = Script()
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(script), "127.0.0.1", port, family=socket.AF_INET, backlog=1024
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))

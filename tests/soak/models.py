"""The upstreams of the soak: scripted servers that answer by `questions`, in odd shapes, and fail by the seed."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

from journal import Call, Journal
from questions import Identity, words_of
from scripted import Asked, ScriptedUpstream

Fault = Callable[[Asked, list[bytes]], Awaitable[None]]
UNREACHED = frozenset({"upstream_unreachable", "upstream_broke", "upstream_timeout"})
ERROR = {"error": {"message": "Injected.", "type": "server_error", "param": None, "code": "injected"}}
_MEANWHILE = 0.5
"""The share of faults that come after some tokens."""


# Faults before the head


async def resets(asked: Asked, _: list[bytes]) -> None:
    asked.reset()


async def hangs_up(asked: Asked, _: list[bytes]) -> None:
    asked.writer.close()


async def hangs(asked: Asked, _: list[bytes]) -> None:
    await asked.gone.wait()


async def refuses_500(asked: Asked, _: list[bytes]) -> None:
    await asked.answer(ERROR, 500)


async def refuses_503(asked: Asked, _: list[bytes]) -> None:
    await asked.answer(ERROR, 503, retry_after="1")


async def refuses_429(asked: Asked, _: list[bytes]) -> None:
    await asked.answer(ERROR, 429, retry_after="0")


async def errs_as_200(asked: Asked, _: list[bytes]) -> None:
    await asked.answer(ERROR)


async def sends_a_page(asked: Asked, _: list[bytes]) -> None:
    await asked.answer(b"<html>Bad gateway</html>", content_type="text/html")


async def sends_garbage(asked: Asked, _: list[bytes]) -> None:
    await asked.raw(bytes(range(256)))
    asked.writer.close()


# Faults after some events


async def breaks_off(asked: Asked, _: list[bytes]) -> None:
    await asked.end()


async def errs(asked: Asked, _: list[bytes]) -> None:
    await asked.event(ERROR)
    await asked.end()


async def cuts_json(asked: Asked, left: list[bytes]) -> None:
    await asked.send(b"data: " + left[0][: len(left[0]) // 2] + b"\n\n")
    await asked.end()


async def garbles(asked: Asked, _: list[bytes]) -> None:
    await asked.send(b"data: \xff\xfe\x00garbage\n\n")
    await asked.end()


BROKE = frozenset({"upstream_broke"})
INJECTED = frozenset({"injected"})
TIMED_OUT = frozenset({"upstream_timeout"})
BEFORE: dict[Fault, frozenset[str]] = {
    resets: UNREACHED,
    hangs_up: UNREACHED,
    hangs: TIMED_OUT,
    refuses_500: INJECTED,
    refuses_503: INJECTED,
    refuses_429: INJECTED,
    errs_as_200: INJECTED,
    sends_a_page: BROKE,
    sends_garbage: UNREACHED,
}
WITHIN: dict[Fault, frozenset[str]] = {
    resets: UNREACHED,  # with what had not been read of it, the head perhaps
    hangs: TIMED_OUT,
    breaks_off: BROKE,
    errs: INJECTED,
    cuts_json: BROKE,
    garbles: BROKE,
}


# Odd shapes of right answers


def plain(event: bytes) -> bytes:
    return b"data: " + event + b"\n\n"


def crlf(event: bytes) -> bytes:
    return b"data:" + event + b"\r\n\r\n"


def commented(event: bytes) -> bytes:
    return b": PROCESSING\n\nevent: message\nid: 7\ndata: " + event + b"\n\n"


def in_lines(event: bytes) -> bytes:
    return (
        b"".join(b"data: " + line + b"\n" for line in json.dumps(json.loads(event), indent=1).encode().split(b"\n")) + b"\n"
    )


SHAPES = (plain, plain, crlf, commented, in_lines)


class Model(ScriptedUpstream):
    """One deployment, which can also be taken away as a whole."""

    def __init__(self, name: str, journal: Journal, seed: int, fault_rate: float) -> None:
        super().__init__()
        self.name = name
        self.fault_rate = fault_rate
        self.running = 0
        self.port = 0
        self.script = self._counted
        self._journal = journal
        self._seed = seed
        self._draw = random.Random(f"{seed} {name}")
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """On the port that it had before, if it had one."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Resets all its connections."""
        for writer in self._writers:
            writer.transport.abort()

    def close(self) -> None:
        """Listens no more, and resets all its connections."""
        if self._server:
            self._server.close()
        self.cut()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await super()._connected(reader, writer)
        finally:
            self._writers.discard(writer)

    async def _counted(self, asked: Asked) -> None:
        self.asked.clear()
        self.running += 1
        try:
            await self._answer_or_fail(asked)
        finally:
            self.running -= 1

    async def _answer_or_fail(self, asked: Asked) -> None:
        identity = _identity(asked, passes_credential=self.name == "own")
        calls = self._journal.calls[identity]
        # A function of the seed, the question and how often it was asked, so that a run can be repeated.
        draw = random.Random(f"{self._seed} {identity} {len(calls)}")
        fault, codes, place = self._planned(draw, len(words_of(identity)))
        call = Call(self.name, fault.__name__ if fault else "", codes, self._journal.now())
        calls.append(call)
        if fault:
            self._journal.injected[f"upstream {fault.__name__}{' mid-stream' if place else ''}"] += 1
        try:
            await self._speak(asked, identity, fault, place)
        finally:
            call.ended_at = self._journal.now()

    def _planned(self, draw: random.Random, words: int) -> tuple[Fault | None, frozenset[str], int]:
        """The fault of a call, what it may be called, and after how many events it comes: 0 is before the head."""
        if draw.random() >= self.fault_rate:
            return None, frozenset(), 0
        within = draw.random() < _MEANWHILE
        fault, codes = draw.choice(list((WITHIN if within else BEFORE).items()))
        return fault, codes, draw.randint(1, words) if within else 0

    async def _speak(self, asked: Asked, identity: Identity, fault: Fault | None, place: int) -> None:
        draw = self._draw
        await asyncio.sleep(draw.random() * 0.1)
        if fault and not place:
            await fault(asked, [])
            return
        if not asked.json.get("stream") or (not fault and draw.random() < 0.05):
            await asked.answer(_whole(identity))
            return
        events = [json.dumps(event, ensure_ascii=False).encode() for event in _events(asked, identity, draw)]
        shape, split = draw.choice(SHAPES), draw.random() < 0.1
        pause_s = draw.choice((0.0, 0.0, 0.02, 0.05)) * (len(events) < 100)
        await asked.head()
        for number, event in enumerate(events):
            if fault and number == place:
                await fault(asked, events[number:])
                return
            await _send(asked, shape(event), split=split)
            if pause_s:
                await asyncio.sleep(pause_s)
        await (asked.end() if draw.random() < 0.1 else asked.done())


def _identity(asked: Asked, *, passes_credential: bool) -> Identity:
    owner = asked.headers.get("authorization", "").removeprefix("Bearer ") if passes_credential else ""
    if asked.path.endswith("/chat/completions"):
        return Identity("chat", asked.json["messages"][0]["content"], owner)
    return Identity("completions", asked.json["prompt"], owner)


async def _send(asked: Asked, data: bytes, *, split: bool) -> None:
    if not split:
        await asked.send(data)
        return
    for place in range(0, len(data), 7):
        await asked.send(data[place : place + 7])


def _events(asked: Asked, identity: Identity, draw: random.Random) -> list[dict[str, Any]]:
    """The chunks of an answer. Where they are cut, and who they say they are, is another at each call."""
    chat, words = identity.api == "chat", words_of(identity)
    envelope = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{draw.randrange(10**12)}",
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": 1_700_000_000 + draw.randrange(10**6),
        "model": asked.json["model"],
    }

    def event(text: str | None, finish: str | None = None) -> dict[str, Any]:
        said = {"delta": {} if text is None else {"content": text}} if chat else {"text": text or ""}
        return {**envelope, "choices": [{"index": 0, **said, "finish_reason": finish}]}

    # Not within a word's first character, so that no event is empty.
    pieces = [part for word in words for part in _cut(word, draw)]
    events = [event(piece) for piece in pieces]
    if chat and draw.random() < 0.5:
        events.insert(
            0, {**envelope, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
        )
    events.append(event(None, "stop"))
    if (asked.json.get("stream_options") or {}).get("include_usage"):
        events.append({**envelope, "choices": [], "usage": usage_of(identity)})
    return events


def _cut(word: str, draw: random.Random) -> list[str]:
    if draw.random() < 0.7:
        return [word]
    place = draw.randint(1, len(word) - 1)
    return [word[:place], word[place:]]


def usage_of(identity: Identity) -> dict[str, int]:
    count = len(words_of(identity))
    return {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": count + 3}


def _whole(identity: Identity) -> dict[str, Any]:
    chat, text = identity.api == "chat", "".join(words_of(identity))
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {
        "id": "chatcmpl-whole" if chat else "cmpl-whole",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1_700_000_000,
        "model": "whole",
        "choices": [{"index": 0, **said, "finish_reason": "stop"}],
        "usage": usage_of(identity),
    }

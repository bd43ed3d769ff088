"""One request as its caller sees it: sent, read event by event, and compared with the answer as it comes."""

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
from connections import ASKING, Connection
from fleet import STALE_IF_ERROR_S, STALE_S, Replica
from journal import Journal
from models import usage_of
from questions import Question

# Nothing that is injected holds up a caller for so long.
PATIENCE_S = 60.0

_HIT = re.compile(r"gateway; hit; ttl=(-?\d+)")
# Lives are told in whole seconds.
_GRAIN_S = 1.0

Became = Literal["running", "whole", "refused", "broken", "cut", "timeout", "left", "nothing more"]


class Left(Exception):
    """The caller has had enough."""


@dataclass
class Stream:
    """What a caller has of one stream, over all connections that it took."""

    question: Question
    began_at: float
    usage: bool = False
    ids: bool = False
    text: str = ""
    events: int = 0
    stream_id: str = ""
    last_event_id: str = ""
    envelopes: set[tuple[Any, Any]] = field(default_factory=set)
    """Whose the chunks say they are."""
    used: dict[str, int] | None = None
    finished: bool = False
    cancelled: bool = False
    is_wrong: bool = False
    kept_until: float = float("inf")
    """Of a hit: it can be resumed for as long as it is stored."""

    def take(self, chunk: dict[str, Any]) -> None:
        self.events += 1
        self.envelopes.add((chunk.get("id"), chunk.get("created")))
        if chunk.get("usage"):
            self.used = chunk["usage"]
        for choice in chunk["choices"]:
            said = choice["delta"].get("content") if self.question.api == "chat" else choice["text"]
            self.text += said or ""
            self.finished |= choice.get("finish_reason") == "stop"

    def wrong(self) -> str:
        """What is wrong with all of it, once it is said to be whole."""
        if self.text != self.question.answer:
            return f"the text is {self.text[-60:]!r}, should be {self.question.answer[-60:]!r}"
        if not self.finished:
            return "it has no finish reason"
        if self.usage and self.used != usage_of(self.question.identity):
            return f"its usage is {self.used}"
        return ""


@dataclass
class Attempt:
    """One request to one replica."""

    replica: Replica
    question: Question
    began_at: float
    ended_at: float = 0.0
    became: Became = "running"
    status: int = 0
    code: str = ""
    cache_status: str = ""
    upstream: str = ""
    body: bytes = b""
    events: int = 0
    counted: bool = False
    """Whether it resumed by a number alone, which says nothing about what was seen."""
    kept_until: float = float("inf")
    heard_at: float = 0.0
    """When something came last, a comment perhaps."""
    connection: Connection | None = None
    """What it was sent on last."""

    def __str__(self) -> str:
        asked = f"{self.question} of {self.replica.name}"
        told = f"{self.status} {self.code} {self.cache_status!r} {self.body[:200]!r}"
        counted = ", counted" if self.counted else ""
        lasted = (
            f"{self.began_at:.2f} to {self.ended_at:.2f} s, {self.events} events, heard at {self.heard_at:.2f} s{counted}"
        )
        on = f" on {self.connection}" if self.became == "cut" else ""
        return f"{asked}: {self.became} ({lasted}): {told}{on}"


OnEvent = Callable[[Stream], Awaitable[None]]
"""Called after each event; raises `Left` where the caller leaves."""


async def reads_on(_: Stream) -> None:
    """A caller who stays."""


class Asker:
    """Makes attempts. What may never be seen, whatever is injected, goes to the journal from here."""

    def __init__(self, session: aiohttp.ClientSession, journal: Journal) -> None:
        self._session = session
        self._journal = journal

    async def whole(self, replica: Replica, question: Question, headers: dict[str, str]) -> Attempt:
        """Asks for the answer in one piece."""
        url, body = f"{replica.base_url}/{question.path}", question.body()
        async with (
            self._attempt(replica, question) as attempt,
            self._request("POST", url, attempt, headers, body) as response,
        ):
            attempt.body = await response.read()
            if not self._refused(attempt):
                attempt.became = "whole"
                self._check_whole(attempt)
        return attempt

    async def stream(
        self, replica: Replica, stream: Stream, headers: dict[str, str], on_event: OnEvent = reads_on
    ) -> Attempt:
        """Asks for the answer as a stream."""
        question = stream.question
        body = question.body(stream=True, **({"stream_options": {"include_usage": True}} if stream.usage else {}))
        if stream.ids:
            headers = {**headers, "Gateway-Event-Ids": "?1"}
        url = f"{replica.base_url}/{question.path}"
        return await self._read(replica, stream, on_event, "POST", url, headers, body)

    async def resume(self, replica: Replica, stream: Stream, on_event: OnEvent = reads_on) -> Attempt:
        """Goes on after what came."""
        url, headers = f"{replica.base_url}/streams/{stream.stream_id}", {}
        if counted := not stream.last_event_id:
            url += f"?after={stream.events}"
        else:
            headers["Last-Event-ID"] = stream.last_event_id
        return await self._read(replica, stream, on_event, "GET", url, headers, None, counted=counted)

    async def _read(
        self,
        replica: Replica,
        stream: Stream,
        on_event: OnEvent,
        method: str,
        url: str,
        headers: dict[str, str],
        body: Any,
        *,
        counted: bool = False,
    ) -> Attempt:
        async with self._attempt(replica, stream.question) as attempt:
            attempt.counted, attempt.kept_until = counted, stream.kept_until
            async with self._request(method, url, attempt, headers, body) as response:
                if response.status == 204:
                    attempt.became = "nothing more"
                    if not stream.cancelled:
                        self._check_end(attempt, stream)
                    return attempt
                if response.status != 200:
                    attempt.body = await response.read()
                    self._refused(attempt)
                    return attempt
                if hit := _HIT.match(attempt.cache_status):
                    kept_until = self._journal.now() + int(hit[1]) + max(STALE_S, STALE_IF_ERROR_S) - _GRAIN_S
                    stream.kept_until = min(stream.kept_until, kept_until)
                attempt.kept_until = stream.kept_until
                stream.stream_id = response.headers.get("Gateway-Stream-Id", stream.stream_id)
                await self._follow(response, attempt, stream, on_event)
        return attempt

    async def _follow(self, response: aiohttp.ClientResponse, attempt: Attempt, stream: Stream, on_event: OnEvent) -> None:
        """Reads to the end of the stream, or of the connection."""
        async for fields in _events(response):
            attempt.heard_at = self._journal.now()
            if "data" not in fields:
                continue
            attempt.events += 1
            if fields["data"] == "[DONE]":
                attempt.became = "whole"
                self._check_end(attempt, stream)
                return
            chunk = self._parsed(attempt, fields["data"])
            if "error" in chunk:
                attempt.became, attempt.code = "broken", code_of(chunk)
                attempt.body = fields["data"].encode()
                return
            if chunk:
                stream.take(chunk)
                stream.last_event_id = fields.get("id", stream.last_event_id)
                self._check_prefix(attempt, stream)
            await on_event(stream)
        attempt.became = "cut"

    def _parsed(self, attempt: Attempt, data: str) -> dict[str, Any]:
        try:
            chunk = json.loads(data)
            assert "error" in chunk or isinstance(chunk["choices"], list)
        except (ValueError, KeyError, AssertionError):
            self._journal.violate("garbage", f"{attempt}: {data[:200]!r}")
            return {}
        return chunk

    @contextlib.asynccontextmanager
    async def _attempt(self, replica: Replica, question: Question) -> Any:
        attempt = Attempt(replica, question, self._journal.now())
        ASKING.set(attempt)
        try:
            async with asyncio.timeout(PATIENCE_S):
                yield attempt
        except TimeoutError:
            attempt.became = "timeout"
        except Left:
            attempt.became = "left"
        except (aiohttp.ClientError, ConnectionError) as error:
            attempt.became, attempt.body = "cut", repr(error).encode()
        finally:
            attempt.ended_at = self._journal.now()

    @contextlib.asynccontextmanager
    async def _request(self, method: str, url: str, attempt: Attempt, headers: dict[str, str], body: Any) -> Any:
        headers = {"Authorization": f"Bearer {attempt.question.tenant}", **headers}
        async with self._session.request(method, url, json=body, headers=headers) as response:
            attempt.status = response.status
            attempt.cache_status = response.headers.get("Cache-Status", "")
            attempt.upstream = response.headers.get("Gateway-Upstream", "")
            told = {"Cache-Status", "X-Request-Id"} <= response.headers.keys()
            self._journal.check("every answer says what was done", holds=told, detail=str(attempt))
            try:
                yield response
            except Left:
                response.close()
                raise

    def _refused(self, attempt: Attempt) -> bool:
        if attempt.status == 200:
            return False
        attempt.became = "refused"
        try:
            attempt.code = code_of(json.loads(attempt.body))
        except ValueError:
            self._journal.violate("an error that is no error object", str(attempt))
        return True

    def _check_whole(self, attempt: Attempt) -> None:
        try:
            [choice] = json.loads(attempt.body)["choices"]
            text = choice["message"]["content"] if attempt.question.api == "chat" else choice["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        self._journal.check("whole answers are right", holds=text == attempt.question.answer, detail=str(attempt))

    def _check_prefix(self, attempt: Attempt, stream: Stream) -> None:
        if stream.is_wrong:
            return
        holds = stream.question.answer.startswith(stream.text)
        detail = "" if holds else f"{attempt}: {stream.text[-80:]!r}"
        self._journal.check("each piece follows the one before", holds=holds, detail=detail)
        stream.is_wrong = not holds

    def _check_end(self, attempt: Attempt, stream: Stream) -> None:
        wrong = "" if stream.is_wrong else stream.wrong()
        self._journal.check("streams are right at their end", holds=not wrong, detail=f"{attempt}: {wrong}")
        # A run that never reached Redis is gone with its replica, and with it the id that its callers saw.
        if not any(self._journal.faults(stream.began_at - 2.0, self._journal.now())):
            holds = len(stream.envelopes) == 1
            self._journal.check("a stream keeps its identity", holds=holds, detail=f"{attempt}: {stream.envelopes}")


def code_of(body: Any) -> str:
    """That of an error object; empty where it is none."""
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("code")) if isinstance(error, dict) else ""


async def _events(response: aiohttp.ClientResponse) -> Any:
    """The fields of each event that is whole (WHATWG HTML 9.2.6); of a comment there are none."""
    held = b""
    async for data in response.content.iter_any():
        *blocks, held = (held + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for block in blocks:
            fields: dict[str, str] = {}
            for line in block.decode().split("\n"):
                name, _, value = line.partition(":")
                if name:
                    value = value.removeprefix(" ")
                    fields[name] = f"{fields[name]}\n{value}" if name == "data" and "data" in fields else value
            yield fields

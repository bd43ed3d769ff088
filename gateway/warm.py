"""Fills a gateway's cache: sends it the requests of a file, so many at a time and a second, and tells what came of them.

It can be interrupted: how far it has come is in a small file beside the requests, which the next run goes on from.
"""

import asyncio
import email.utils
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from gateway.core.apis import APIS
from gateway.errors import CommandFailed

_PATHS = {f"/v1/{api.path}" for api in APIS.values()}
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
# Those that may pass with the time they name, whoever has tried before.
_BUSY = frozenset({429, 503})
_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 30.0
_LONGEST_WAIT_S = 3600.0
_SAVE_EVERY_S = 1.0


class Wish(NamedTuple):
    """A request of the file: where it goes, what it is called in the report, and its body."""

    line: int
    custom_id: str
    path: str
    body: dict[str, Any]


class Reply(NamedTuple):
    """What a gateway answered. Status 0: it did not, and ``content`` says why."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Terms(NamedTuple):
    """How it is asked: requests at a time, requests a second (None: as fast as it goes), and tries after the first."""

    concurrency: int = 8
    per_s: float | None = None
    retries: int = 4


Send = Callable[[str, dict[str, Any]], Awaitable[Reply]]
COUNTED = ("hits", "misses", "errors")


class Progress:
    """What has been done: all lines up to ``done``, and some beyond; how they ended, and why answers were not stored."""

    def __init__(self) -> None:
        self.done = 0
        self.beyond: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.unstored: Counter[str] = Counter()

    def add(self, line: int) -> None:
        self.beyond.add(line)
        while self.done + 1 in self.beyond:
            self.done += 1
            self.beyond.remove(self.done)

    @property
    def count(self) -> int:
        return self.done + len(self.beyond)

    def has(self, line: int) -> bool:
        return line <= self.done or line in self.beyond


class Requests:
    """The requests of a file, in the Batch API's input format or as plain bodies, each read once.

    It knows by a digest what it has read: what follows may still be written.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = blake2b(digest_size=16)
        self.read = 0

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def __iter__(self) -> "Iterator[Wish | Unsent]":
        for line in self._lines():
            yield _wish(self.read, line)

    def skip(self, lines: int, progress: Progress) -> list["Wish | Unsent"]:
        """Reads the first lines, and gives those of them that are not done: as many as were sent at a time."""
        read = islice(self._lines(), lines)
        return [_wish(self.read, line) for line in read if not progress.has(self.read)]

    def _lines(self) -> Iterator[bytes]:
        for line in self._file:
            self.read += 1
            self._digest.update(line.strip() + b"\n")
            yield line


class State:
    """The file that remembers how far it has come."""

    def __init__(self, requests: Path) -> None:
        self._path = requests.with_name(f"{requests.name}.warming")

    def load(self, requests: Requests) -> tuple[Progress, list["Wish | Unsent"]]:
        """What was done, and those that were read and not done. Raises `CommandFailed` where the requests are others now."""
        progress = Progress()
        try:
            told = orjson.loads(self._path.read_bytes())
            progress.done, progress.beyond = told["done"], set(told["beyond"])
            progress.counts, progress.unstored = Counter(told["counts"]), Counter(told["unstored"])
            read, digest = told["read"], told["digest"]
        except FileNotFoundError:
            return progress, []
        except (ValueError, KeyError, TypeError):
            raise CommandFailed(f"{self._path} is damaged: --restart begins anew", 2) from None
        left = requests.skip(read, progress)
        if (requests.read, requests.digest) != (read, digest):
            raise CommandFailed(f"the requests have changed since {self._path} was written: --restart begins anew", 2)
        return progress, left

    def save(self, progress: Progress, requests: Requests) -> None:
        told = {
            "done": progress.done,
            "beyond": sorted(progress.beyond),
            "counts": progress.counts,
            "unstored": progress.unstored,
            "read": requests.read,
            "digest": requests.digest,
        }
        part = self._path.with_name(f"{self._path.name}.part")
        part.write_bytes(orjson.dumps(told))
        part.replace(self._path)

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)


class Warmer:
    """Sends wishes, and writes down what failed. ``tell`` is called whenever one has ended."""

    def __init__(
        self, send: Send, terms: Terms, progress: Progress, failures: IO[bytes], tell: Callable[[], object]
    ) -> None:
        self._send = send
        self._terms = terms
        self._failures = failures
        self._tell = tell
        self._progress = progress
        self._next_s = 0.0
        self._not_before_s = 0.0
        self._draw = random.Random().random  # noqa: S311  # it spreads load

    async def run(self, wishes: "Iterator[Wish | Unsent]", save: Callable[[], object]) -> None:
        """Until all are done. Where it is cancelled, what was not answered is not done; what is done is saved."""
        workers = [asyncio.create_task(self._work(wishes)) for _ in range(self._terms.concurrency)]
        saver = asyncio.create_task(self._save(save))
        try:
            await asyncio.gather(*workers)
        finally:
            for task in (*workers, saver):
                task.cancel()
            await asyncio.gather(*workers, saver, return_exceptions=True)
            self._failures.flush()
            save()

    async def _save(self, save: Callable[[], object]) -> None:
        while True:
            await asyncio.sleep(_SAVE_EVERY_S)
            self._failures.flush()
            save()

    async def _work(self, wishes: "Iterator[Wish | Unsent]") -> None:
        for wish in wishes:
            await self._fulfil(wish)

    async def _fulfil(self, wish: "Wish | Unsent") -> None:
        if isinstance(wish, Unsent):
            if wish.message:
                self._failed(wish.custom_id, None, "invalid_request", wish.message)
        else:
            reply = await self._asked(wish)
            if reply.status == 200:
                self._count(reply.headers.get("Cache-Status", ""))
            else:
                self._refused(wish, reply)
        self._progress.add(wish.line)
        self._tell()

    async def _asked(self, wish: Wish) -> Reply:
        """The answer, or the last refusal."""
        tries = 0
        while True:
            await self._turn()
            reply = await self._send(wish.path, wish.body)
            if tries == self._terms.retries or not _may_pass(reply):
                return reply
            wait_s = retry_after_s(reply.headers, time.time())
            if wait_s is None:
                most_s = min(_BACKOFF_S * 2**tries, _LONGEST_BACKOFF_S)
                await asyncio.sleep(most_s * (0.5 + self._draw() / 2))
            else:
                # Whoever asks at all now would be told the same.
                self._not_before_s = max(self._not_before_s, time.monotonic() + min(wait_s, _LONGEST_WAIT_S))
            tries += 1
            self._progress.counts["retries"] += 1

    async def _turn(self) -> None:
        """Waits until one more may be sent."""
        while (wait_s := self._not_before_s - time.monotonic()) > 0:  # noqa: ASYNC110  # others may move that time
            await asyncio.sleep(wait_s)
        if self._terms.per_s:
            now_s = time.monotonic()
            self._next_s = max(self._next_s, now_s)
            wait_s, self._next_s = self._next_s - now_s, self._next_s + 1 / self._terms.per_s
            if wait_s > 0:
                await asyncio.sleep(wait_s)

    def _count(self, status: str) -> None:
        """``status`` is RFC 9211's, as `policy.Disposition` writes it."""
        parts = [part.strip() for part in status.split(";")]
        hit = "hit" in parts
        self._progress.counts["hits" if hit else "misses"] += 1
        if not hit and "stored" not in parts:
            self._progress.unstored.update(part.removeprefix("detail=") for part in parts if part.startswith("detail="))

    def _refused(self, wish: Wish, reply: Reply) -> None:
        if not reply.status:
            self._failed(wish.custom_id, None, "no_answer", reply.content.decode())
            return
        try:
            body = orjson.loads(reply.content)
        except orjson.JSONDecodeError:
            body = reply.content.decode("utf-8", "replace")
        response = {"status_code": reply.status, "request_id": reply.headers.get("X-Request-Id", ""), "body": body}
        self._failed(wish.custom_id, response, None, "")

    def _failed(self, custom_id: str, response: dict[str, Any] | None, code: str | None, message: str) -> None:
        """As a line of the Batch API's output file."""
        self._progress.counts["errors"] += 1
        error = {"code": code, "message": message} if code else None
        name = f"batch_req_{self._progress.counts.total():08d}"
        self._failures.write(
            orjson.dumps({"id": name, "custom_id": custom_id, "response": response, "error": error}) + b"\n"
        )


class Unsent(NamedTuple):
    """A line that is no request, and why; of an empty one there is nothing to say."""

    line: int
    custom_id: str
    message: str


def _wish(number: int, line: bytes) -> Wish | Unsent:
    name = f"line-{number}"
    if not line.strip():
        return Unsent(number, name, "")
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Unsent(number, name, f"line {number} is not JSON: {error}")
    if not isinstance(value, dict):
        return Unsent(number, name, f"line {number} is not an object")
    body, path = value, "/v1/completions" if "prompt" in value and "messages" not in value else "/v1/chat/completions"
    if "body" in value and "url" in value:
        name, path, body = str(value.get("custom_id") or name), value["url"], value["body"]
        if path not in _PATHS or value.get("method", "POST") != "POST":
            return Unsent(number, name, f"only POST to {' and '.join(sorted(_PATHS))} can be cached")
    if not isinstance(body, dict):
        return Unsent(number, name, f"line {number} has a body that is not an object")
    # One recording serves both modes; a stream that breaks would have to be read to know it.
    return Wish(number, name, path, {key: item for key, item in body.items() if key not in ("stream", "stream_options")})


def _may_pass(reply: Reply) -> bool:
    if reply.headers.get("x-should-retry") == "false" and reply.status not in _BUSY:
        return False  # the gateway has tried again itself
    return not reply.status or reply.status in _RETRIED


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """What ``Retry-After`` says (RFC 9110 10.2.3), in seconds from now; None where it says nothing that can be read."""
    text = headers.get("Retry-After", "").strip()
    with suppress(ValueError):
        return max(0.0, float(text))
    with suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    return None

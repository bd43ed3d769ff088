"""The administration of a running gateway, as its commands see it."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NoReturn, Self

import aiohttp
import orjson

from gateway.errors import CommandFailed
from gateway.warm import Reply

NDJSON = "application/x-ndjson"
# A purge tells more often than that how far it is.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=60.0)
# An answer that is wanted whole comes all at once, when a model has said all.
_PATIENT = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=3900.0)
_LONGEST_LINE_BYTES = 1 << 24
_IS_OFF = (
    "the administration is off there: in the gateway's configuration, [admin] key_env names the environment variable that "
    "holds its key, and [admin] enabled must be true"
)


class Remote:
    """A running gateway. Every method raises `CommandFailed`; no message shows the key."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {key}"}

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=_TIMEOUT, read_bufsize=_LONGEST_LINE_BYTES)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        return _parsed(await self.raw(path, query))

    async def raw(self, path: str, query: Mapping[str, str] | None = None) -> bytes:
        async with self._asked("GET", path, params=query) as response:
            return await response.read()

    async def post(self, path: str, body: Any) -> Any:
        async with self._asked("POST", path, json=body) as response:
            return _parsed(await response.read())

    async def pieces(self, path: str, query: Mapping[str, str]) -> AsyncIterator[bytes]:
        """An answer as it comes, however long it is."""
        async with self._asked("GET", path, params=query) as response:
            async for piece in response.content.iter_any():
                yield piece

    async def send(self, path: str, query: Mapping[str, str], lines: bytes, headers: Mapping[str, str]) -> Any:
        """What is said to lines of JSON."""
        async with self._asked("POST", path, params=query, data=lines, headers=headers) as response:
            return _parsed(await response.read())

    async def watch(self, method: str, path: str, body: Any, tell: Callable[[int, int], object]) -> Any:
        """The result of what takes its time; ``tell`` is told how many entries were looked at, and how many went."""
        async with self._asked(method, path, json=body, accept=NDJSON) as response:
            async for line in response.content:
                told = _parsed(line)
                if "error" in told:
                    raise CommandFailed(told["error"]["message"])
                if told.get("object") != "progress":
                    return told
                tell(told["scanned"], told["purged"])
        raise CommandFailed("the gateway went away before it was done")

    @asynccontextmanager
    async def _asked(
        self, method: str, path: str, *, accept: str = "*/*", headers: Mapping[str, str] | None = None, **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {**self._headers, "Accept": accept, **(headers or {})}
        try:
            async with self._session.request(
                method, self.url + path, headers=headers, allow_redirects=False, **options
            ) as response:
                if response.status != 200:
                    _refuse(response.status, await response.read(), self.url)
                yield response
        except aiohttp.InvalidURL:
            raise CommandFailed(f"{self.url} is not a URL", 2) from None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise CommandFailed(f"the gateway at {self.url} cannot be reached: {_reason(error)}") from None


class Caller:
    """A gateway as its callers see it."""

    def __init__(self, url: str, headers: Mapping[str, str], concurrency: int) -> None:
        self._url = url
        self._headers = headers
        self._concurrency = concurrency

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=self._concurrency)
        self._session = aiohttp.ClientSession(timeout=_PATIENT, connector=connector, headers=self._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def check(self) -> None:
        """Raises `CommandFailed` where no gateway answers."""
        try:
            async with self._session.get(f"{self._url}/healthz") as response:
                if response.status != 200:
                    raise CommandFailed(f"what answers at {self._url} is no gateway (status {response.status})")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise CommandFailed(f"the gateway at {self._url} cannot be reached: {_reason(error)}") from None

    async def ask(self, path: str, body: Any) -> Reply:
        try:
            async with self._session.post(self._url + path, json=body) as response:
                return Reply(response.status, response.headers, await response.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            return Reply(0, {}, _reason(error).encode())


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.strerror:
        return error.os_error.strerror
    return str(error) or type(error).__name__


def _refuse(status: int, content: bytes, url: str) -> NoReturn:
    """Says in a command's words why a gateway has refused."""
    try:
        error = orjson.loads(content)["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CommandFailed(f"what answers at {url} is no gateway (status {status})") from None
    if status == 401:
        raise CommandFailed(f"the gateway at {url} does not take this admin key")
    if code == "unknown_url":
        raise CommandFailed(_IS_OFF)
    raise CommandFailed(message, 2 if status == 400 else 1)


def _parsed(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        raise CommandFailed("the answer is not JSON: is this a gateway?") from None

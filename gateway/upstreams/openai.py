"""Any OpenAI-compatible server, through the official client at the level of raw bytes.

The client builds requests and types errors; what comes back is never parsed by it: per-chunk models cost forty times
the bytes themselves (measured: 80 µs against 2 µs a chunk). Its own retries are off.
"""

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Literal

import aiohttp
import httpx2
import openai
import orjson
from openai import AsyncOpenAI, Omit
from openai._vendor.httpx_aiohttp import AiohttpTransport  # the one behind DefaultAioHttpClient, which takes no session

from gateway.config import OpenAIUpstreamConfig
from gateway.core.apis import APIS
from gateway.core.sse import Decoder, Event, EventTooLarge
from gateway.errors import (
    UpstreamBroke,
    UpstreamError,
    UpstreamRefused,
    UpstreamReported,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.ports import Answer, Call, Relayed

Parameter = Literal["stream", "stream_options"]

_PASSED_BACK = frozenset({
    "x-request-id", "openai-processing-ms", "openai-version", "openai-organization", "openai-model",
    "retry-after", "retry-after-ms", "x-should-retry",
})  # fmt: skip
_PASSED_BACK_PREFIX = "x-ratelimit-"
_RELAYED_BACK = _PASSED_BACK | {"content-type", "content-disposition"}

_REFUSING = frozenset({400, 404, 405, 415, 422, 501})
_NAMES_STREAMING = re.compile(rb"\bstream(?:s|ed|ing)?\b")
_REMEMBER_REFUSAL_S = 3600.0
_MAX_REFUSALS = 4096

_MAX_BODY_BYTES = 64 << 20
_LIST_TIMEOUT_S = 5.0
_KEEPALIVE_EXPIRY_S = 55.0  # below the 60 s after which common servers and balancers close an idle connection


@dataclass(frozen=True, slots=True)
class _Ask:
    """How to ask: as a stream or not, and whether to ask for usage in it."""

    stream: bool
    usage: bool

    def without(self, parameter: Parameter, call: Call) -> "_Ask | None":
        """The next simpler way; None where the refused parameter is the caller's own wish."""
        if parameter == "stream_options" and self.usage:
            return replace(self, usage=False)
        if parameter == "stream" and self.stream and not call.streamed:
            return _Ask(stream=False, usage=False)
        return None

    def body(self, call: Call) -> bytes:
        body = dict(call.body)
        if self.stream:
            body["stream"] = True
            if self.usage:
                body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
            elif not call.streamed:
                body.pop("stream_options", None)
        return orjson.dumps(body)


class _DirectTransport(httpx2.AsyncClient):
    """httpx2's client without what a gateway must not do of its own: cookies, redirects, authentication, logging."""

    def __init__(self, transport: AiohttpTransport, timeout: httpx2.Timeout) -> None:
        super().__init__(transport=transport, timeout=timeout, trust_env=False)
        self._direct = transport
        self._timeouts = {"timeout": timeout.as_dict()}

    def build_request(self, method: str, url: httpx2.URL | str, **given: Any) -> httpx2.Request:
        timeout = given.get("timeout")
        timeouts = {"timeout": timeout.as_dict()} if isinstance(timeout, httpx2.Timeout) else self._timeouts
        return httpx2.Request(method, url, headers=given.get("headers"), content=given.get("content"), extensions=timeouts)

    async def send(self, request: httpx2.Request, *, stream: bool = False, **_: Any) -> httpx2.Response:
        response = await self._direct.handle_async_request(request)
        response.request = request
        if not stream:
            await response.aread()
        return response


class _Client(AsyncOpenAI):
    """The official client, with a way of its own for raw bytes."""

    async def post_bytes(self, url: httpx2.URL, headers: Mapping[str, str], content: bytes) -> httpx2.Response:
        """What ``post`` does where it is asked for the bare response, its body unread; raises the client's typed errors.

        Around that ``post`` builds and copies models, which costs 0.3 ms: every first token would wait for it.
        """
        sent = {"accept": "application/json", "content-type": "application/json", "user-agent": self.user_agent, **headers}
        request = self._client.build_request("POST", url, headers=sent, content=content)
        response = await self._client.send(request, stream=True)
        if response.is_success:
            return response
        try:
            await response.aread()
        finally:
            await response.aclose()
        raise self._make_status_error_from_response(response)


class OpenAIUpstream:
    """One ``[[upstreams]]`` entry of kind ``openai``."""

    def __init__(self, config: OpenAIUpstreamConfig, api_key: str | None, proxy: str | None = None) -> None:
        self.name = config.name
        self.passes_credential = api_key is None
        self._config = config
        connect_s, idle_s = config.connect_timeout_s, config.idle_timeout_s
        timeout = httpx2.Timeout(connect=connect_s, read=idle_s, write=idle_s, pool=connect_s)
        transport = AiohttpTransport(client=self._new_session, proxy=httpx2.Proxy(proxy) if proxy else None)
        self._http = _DirectTransport(transport, timeout)
        self._client = _Client(
            api_key=api_key or "none",  # the client refuses to be made without one; _headers leaves it out
            base_url=config.base_url,
            max_retries=0,
            timeout=timeout,
            http_client=self._http,
        )
        # The client takes these from the environment, which is the configuration's alone to read.
        self._client.organization = self._client.project = None
        self._api_key = api_key
        self._urls = {api.path: httpx2.URL(f"{config.base_url}/{api.path}") for api in APIS.values()}
        self._refused: dict[tuple[str, bytes, Parameter], float] = {}

    @asynccontextmanager
    async def ask(self, call: Call) -> AsyncIterator[Answer]:
        """Raises `UpstreamError`."""
        response = await self._open(call)
        try:
            yield await _answer(response)
        finally:
            await response.aclose()

    async def models(self, headers: Mapping[str, str]) -> list[dict[str, Any]]:
        """The upstream's own list. Raises `UpstreamError`."""
        sent: dict[str, str | Omit] = {"authorization": Omit(), **self._headers(headers)}
        options: Any = {"headers": sent, "timeout": _LIST_TIMEOUT_S}
        with _errors_mapped():
            response = await self._client.get("/models", cast_to=httpx2.Response, options=options)
        try:
            listed = orjson.loads(response.content)["data"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise UpstreamBroke("The upstream's list of models is not of OpenAI's shape.") from None
        return [model for model in listed if isinstance(model, dict) and isinstance(model.get("id"), str)]

    @asynccontextmanager
    async def relay(
        self, method: str, path: str, headers: Mapping[str, str], body: AsyncIterator[bytes] | bytes | None
    ) -> AsyncIterator[Relayed]:
        """Passes a request on as it is, whatever the status of its answer. Raises `UpstreamError`."""
        url = f"{self._config.base_url}/{path}"
        with _errors_mapped():
            request = self._http.build_request(method, url, headers=self._headers(headers), content=body)
            response = await self._http.send(request, stream=True)
        try:
            passed = {name: value for name, value in response.headers.items() if _passes_back(name, _RELAYED_BACK)}
            yield Relayed(response.status_code, passed, _bytes(response))
        finally:
            await response.aclose()

    async def close(self) -> None:
        await self._client.close()

    def _new_session(self) -> aiohttp.ClientSession:
        """Callers share the connections, so no cookie of one may reach the upstream with another."""
        connector = aiohttp.TCPConnector(limit=self._config.max_connections, keepalive_timeout=_KEEPALIVE_EXPIRY_S)
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

    async def _open(self, call: Call) -> httpx2.Response:
        """Asks for a stream with usage; where that alone is refused, asks again the simpler way (DESIGN 2.3)."""
        ask = self._first_ask(call)
        refused: list[Parameter] = []
        while True:
            try:
                response = await self._post(call, ask)
            except UpstreamRefused as refusal:
                parameter = refused_parameter(refusal)
                simpler = ask.without(parameter, call) if parameter else None
                if parameter is None or simpler is None:
                    raise
                refused.append(parameter)
                ask = simpler
            else:
                self._remember(call, refused)
                return response

    def _first_ask(self, call: Call) -> _Ask:
        if not call.streamed and (not self._config.stream or call.api.cannot_stream(call.body)):
            return _Ask(stream=False, usage=False)
        ask: _Ask = _Ask(stream=True, usage=self._config.ask_usage)
        parameters: tuple[Parameter, ...] = ("stream_options", "stream")
        for parameter in parameters if self._refused else ():
            if self._refused.get(self._memory(call, parameter), 0.0) > time.monotonic():
                ask = ask.without(parameter, call) or ask
        return ask

    def _remember(self, call: Call, refused: list[Parameter]) -> None:
        if len(self._refused) > _MAX_REFUSALS:
            self._refused.clear()
        for parameter in refused:
            self._refused[self._memory(call, parameter)] = time.monotonic() + _REMEMBER_REFUSAL_S

    @staticmethod
    def _memory(call: Call, parameter: Parameter) -> tuple[str, bytes, Parameter]:
        """Another credential may be allowed what this one is not."""
        credential = call.headers.get("authorization", "").encode()
        return str(call.body.get("model")), blake2b(credential, digest_size=16).digest(), parameter

    async def _post(self, call: Call, ask: _Ask) -> httpx2.Response:
        with _errors_mapped():
            return await self._client.post_bytes(self._urls[call.api.path], self._headers(call.headers), ask.body(call))

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The caller's, and our key if we have one; nothing compressed: a compressor holds tokens back."""
        sent = {**headers, "accept-encoding": "identity"}
        if self._api_key:
            sent["authorization"] = f"Bearer {self._api_key}"
        return sent


def refused_parameter(refusal: UpstreamRefused) -> Parameter | None:
    """Which of the members that the gateway adds of its own a refusal is about, if any.

    Servers say it in many forms (``param``, a list of ``loc``, prose), but all of them name the member.
    """
    if refusal.status not in _REFUSING:
        return None
    text = refusal.content[:65_536].lower()
    if b"stream_options" in text or b"include_usage" in text:
        return "stream_options"
    return "stream" if _NAMES_STREAMING.search(text) else None


def _passes_back(name: str, names: frozenset[str]) -> bool:
    return name in names or name.startswith(_PASSED_BACK_PREFIX)


def _passed_back(response: httpx2.Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if _passes_back(name, _PASSED_BACK)}


async def _answer(response: httpx2.Response) -> Answer:
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    headers = _passed_back(response)
    if kind == "application/json" or kind.endswith("+json"):
        return Answer(headers, whole=await _whole(response))
    if kind == "text/html":
        raise UpstreamBroke("The upstream answered with a web page.", headers=headers)
    return Answer(headers, batches=_batches(response))


async def _whole(response: httpx2.Response) -> bytes:
    body = bytearray()
    async for data in _bytes(response):
        body += data
        if len(body) > _MAX_BODY_BYTES:
            raise UpstreamBroke(f"The upstream's answer is larger than {_MAX_BODY_BYTES} bytes.")
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise UpstreamBroke(f"The upstream's answer is not JSON: {error}.") from None
    if isinstance(answer, dict) and answer.get("error"):
        raise UpstreamReported(answer["error"])
    return bytes(body)


async def _batches(response: httpx2.Response) -> AsyncGenerator[list[bytes], None]:
    decoder = Decoder(_MAX_BODY_BYTES)
    try:
        async for data in _bytes(response):
            if batch := [_data(event) for event in decoder.feed(data) if event.data and event.event != b"ping"]:
                yield batch
    except EventTooLarge as error:
        raise UpstreamBroke(f"The upstream sent a broken stream: {error}.") from None


def _data(event: Event) -> bytes:
    """An event's data; an ``error`` event that is flat gets the form that every client understands."""
    if event.event == b"error":
        try:
            error = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            error = event.data.decode(errors="replace")
        if not (isinstance(error, dict) and error.get("error")):
            return orjson.dumps({"error": error or "The upstream reported an error."})
    return event.data


async def _bytes(response: httpx2.Response) -> AsyncIterator[bytes]:
    """The body as it comes, decompressed. Raises `UpstreamError`."""
    with _errors_mapped(begun=True):
        # What is not compressed needs none of httpx2's layers.
        compressed = response.headers.get("content-encoding", "identity") != "identity"
        async for data in response.aiter_bytes() if compressed else response.stream:  # type: ignore[union-attr]
            yield data


class _errors_mapped:  # noqa: N801  # used as a with statement, like contextlib's
    """Maps the client's exceptions to the taxonomy. The client's texts are not passed on: they may hold addresses."""

    def __init__(self, *, begun: bool = False) -> None:
        self._begun = begun

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, openai.APIError | httpx2.HTTPError | httpx2.StreamError | httpx2.InvalidURL):
            raise _mapped(error, begun=self._begun) from error


def _mapped(error: Exception, *, begun: bool) -> UpstreamError:
    if isinstance(error, openai.APIStatusError):
        response = error.response
        if response.has_redirect_location:
            return UpstreamBroke("The upstream redirects to another address: its base_url is not right.")
        kind = response.headers.get("content-type", "application/json")
        return UpstreamRefused(response.status_code, response.content, kind, _passed_back(response))
    if begun and isinstance(error, httpx2.TimeoutException):
        return UpstreamTimeout("The upstream sent nothing for too long.")
    if begun:
        return UpstreamBroke("The upstream's answer was cut off.")
    if isinstance(error, httpx2.ReadTimeout) or isinstance(error.__cause__, httpx2.ReadTimeout):
        return UpstreamTimeout("The upstream did not answer in time.")
    return UpstreamUnreachable("The upstream cannot be reached.")

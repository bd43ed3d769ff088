"""Any OpenAI-compatible server: the official client, on its aiohttp transport, at the level of raw bytes.

What carries tokens goes through the client's connections without its layers: its models cost forty times the bytes of a
chunk (measured: 80 µs against 2 µs), and its requests 0.4 ms that every first token would wait for. Nothing is retried
here, but for another key in the place of one that is refused.
"""

import asyncio
import math
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Literal

import aiohttp
import httpx2
import openai
import orjson
from openai import AsyncOpenAI, Omit
from openai._vendor.httpx_aiohttp import AiohttpTransport  # the one behind DefaultAioHttpClient, which takes no session
from yarl import URL

from gateway.config import OpenAIUpstreamConfig
from gateway.core.apis import APIS
from gateway.core.balancing import KeyRing
from gateway.core.hiding import Hider, credentials_of
from gateway.core.retrying import judge, retry_after_s
from gateway.core.sse import Decoder, Event, EventTooLarge
from gateway.errors import (
    GatewayError,
    UpstreamBroke,
    UpstreamError,
    UpstreamRefused,
    UpstreamReported,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.ports import AS_CONFIGURED, Answer, Call, Patience, Relayed

Parameter = Literal["stream", "stream_options"]

_PASSED_BACK = frozenset({
    "x-request-id", "openai-processing-ms", "openai-version", "openai-organization", "openai-model",
    "retry-after", "retry-after-ms", "x-should-retry",
})  # fmt: skip
_PASSED_BACK_PREFIX = "x-ratelimit-"
_RELAYED_BACK = _PASSED_BACK | {"content-type", "content-disposition"}

_SECRET_HEADERS = ("authorization", "api-key", "x-api-key")
# What a key is refused with that is wrong, spent, or has had its share for now. Another one may do better.
_REFUSING_A_KEY = frozenset({401, 402, 429})
_REST_S = 1.0
_LONG_REST_S = 60.0
_REFUSING = frozenset({400, 404, 405, 415, 422, 501})
_NAMES_STREAMING = re.compile(rb"\bstream(?:s|ed|ing)?\b")
_REMEMBER_REFUSAL_S = 3600.0
_MAX_REFUSALS = 4096

_MAX_BODY_BYTES = 64 << 20
_LIST_TIMEOUT_S = 5.0
# Connections are the session's, with aiohttp's own context. The client's transport would load all roots for one that is
# never used: 40 ms for each upstream, in which a reload stops every stream. This one trusts nobody.
_UNUSED_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
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


class OpenAIUpstream:
    """One ``[[upstreams]]`` entry of kind ``openai``."""

    def __init__(self, config: OpenAIUpstreamConfig, api_keys: Sequence[str] = (), proxy: str | None = None) -> None:
        self.name = config.name
        self.passes_credential = not api_keys
        self._config = config
        self._keys = KeyRing(api_keys)
        self._proxy = proxy
        self._own_secrets = [*api_keys, *(credentials_of(proxy) if proxy else ())]
        self._hide = Hider(self._own_secrets)
        self._urls = {api.path: URL(f"{config.base_url}/{api.path}") for api in APIS.values()}
        connect_s, idle_s = config.connect_timeout_s, config.idle_timeout_s
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s, sock_read=idle_s)
        self._connections: aiohttp.ClientSession | None = None
        proxied = httpx2.Proxy(proxy) if proxy else None
        transport = AiohttpTransport(client=self._session, proxy=proxied, verify=_UNUSED_TLS)
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
        self._client = AsyncOpenAI(
            api_key=api_keys[0] if api_keys else "none",  # the client refuses to be made without one; `models` leaves it out
            base_url=config.base_url,
            max_retries=0,
            timeout=_LIST_TIMEOUT_S,
            http_client=httpx2.AsyncClient(transport=transport, trust_env=False, cookies=no_cookies),
        )
        # The client takes these from the environment, which is the configuration's alone to read.
        self._client.organization = self._client.project = None
        self._refused: dict[tuple[str, bytes, Parameter], float] = {}

    @asynccontextmanager
    async def ask(self, call: Call) -> AsyncIterator[Answer]:
        """Raises `UpstreamError`."""
        response = None
        try:
            response = await self._open(call)
            answer = await _answer(response)
            yield replace(answer, headers=_hidden(answer.headers, self._hider(call.headers)))
        except GatewayError as error:
            error.reword(self._hider(call.headers))
            raise
        finally:
            if response:
                response.close()

    async def models(self, headers: Mapping[str, str]) -> list[dict[str, Any]]:
        """The upstream's own list. Raises `UpstreamError`."""
        sent: dict[str, str | Omit] = {"authorization": Omit(), **self._headers(headers, self._any_key())}
        options: Any = {"headers": sent}
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
        url = URL(f"{self._config.base_url}/{path}", encoded=True)
        response = await self._send(method, url, self._headers(headers, self._any_key()), body, self._timeout)
        try:
            hide = self._hider(headers)
            passed = _hidden(_passed_back(response, _RELAYED_BACK), hide)
            content = _bytes(response) if response.status < 400 else _told(response, hide)
            yield Relayed(response.status, passed, content)
        finally:
            response.close()

    async def close(self) -> None:
        await self._client.close()
        if self._connections:
            await self._connections.close()

    def _hider(self, headers: Mapping[str, str]) -> Hider:
        """Hides our secrets, and what the caller has shown: what went wrong is logged, and told to others."""
        shown = [headers[name].rpartition(" ")[2] for name in _SECRET_HEADERS if name in headers]
        return Hider([*self._own_secrets, *shown]) if shown else self._hide

    def _any_key(self) -> str | None:
        return self._keys.pick("", time.monotonic())

    def _session(self) -> aiohttp.ClientSession:
        """The connections, which the client shares. So do callers: no cookie of one may reach the upstream with another.

        How many calls there are is limited elsewhere: who waits here for a connection would be taken for an upstream that
        cannot be reached.
        """
        if self._connections is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_EXPIRY_S)
            self._connections = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        return self._connections

    async def _open(self, call: Call) -> aiohttp.ClientResponse:
        """With the next key, where one is refused for what it is. Raises `UpstreamError`."""
        model = str(call.body.get("model"))
        refused: dict[str, UpstreamRefused] = {}
        while True:
            key = self._keys.pick(model, time.monotonic(), refused)
            try:
                return await self._open_with(call, key)
            except UpstreamRefused as refusal:
                if key is None or refusal.status not in _REFUSING_A_KEY:
                    raise
                refused[key] = refusal
                self._keys.rest(key, model, time.monotonic() + _rest_s(refusal))
                if len(refused) == len(self._keys):
                    raise self._refused_with_all(model, list(refused.values())) from None

    def _refused_with_all(self, model: str, refusals: list[UpstreamRefused]) -> UpstreamRefused:
        """One that will pass, if there is one; it says when the first key can be used again."""
        limited = [refusal for refusal in refusals if refusal.status == 429]
        if limited and len(refusals) > 1:
            limited[-1].headers.pop("retry-after-ms", None)
            limited[-1].headers["retry-after"] = str(math.ceil(self._keys.ready_in_s(model, time.monotonic())))
        return (limited or refusals)[-1]

    async def _open_with(self, call: Call, key: str | None) -> aiohttp.ClientResponse:
        """Asks for a stream with usage; where that alone is refused, asks again the simpler way (DESIGN 2.3)."""
        ask = self._first_ask(call)
        refused: list[Parameter] = []
        while True:
            try:
                response = await self._post(call, ask, key)
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

    async def _post(self, call: Call, ask: _Ask, key: str | None) -> aiohttp.ClientResponse:
        headers = self._headers({**call.headers, "content-type": "application/json"}, key)
        limits = self._timeout if call.patience == AS_CONFIGURED else self._timeout_of(call.patience)
        response = await self._send("POST", self._urls[call.api.path], headers, ask.body(call), limits)
        if response.status < 300:
            return response
        try:
            raise await _refusal(response)
        finally:
            response.close()

    def _timeout_of(self, patience: Patience) -> aiohttp.ClientTimeout:
        """A connection may be silent for as long as an answer may, at its beginning or later; who asks has its own."""
        connect_s = patience.connect_s or self._config.connect_timeout_s
        silent_s = max(patience.first_byte_s or 0.0, patience.idle_s or self._config.idle_timeout_s)
        return aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s, sock_read=silent_s)

    async def _send(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        body: AsyncIterator[bytes] | bytes | None,
        limits: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        with _errors_mapped():
            return await self._session().request(
                method,
                url,
                headers=headers,
                data=body,
                timeout=limits,
                proxy=self._proxy,
                allow_redirects=False,
                skip_auto_headers=("Content-Type",),
            )

    def _headers(self, headers: Mapping[str, str], key: str | None) -> dict[str, str]:
        """The caller's, and our key if we have one; nothing compressed: a compressor holds tokens back."""
        sent = {
            "accept": "application/json",
            "user-agent": self._client.user_agent,
            **headers,
            "accept-encoding": "identity",
        }
        if key:
            sent["authorization"] = f"Bearer {key}"
        return sent


def _rest_s(refusal: UpstreamRefused) -> float:
    """For how long a key is not used that was refused so."""
    if not judge(refusal, time.time()).again:
        return _LONG_REST_S
    asked_s = retry_after_s(refusal.headers, time.time())
    return _REST_S if asked_s is None else asked_s


async def _refusal(response: aiohttp.ClientResponse) -> UpstreamError:
    if response.status < 400:
        return UpstreamBroke("The upstream redirects to another address: its base_url is not right.")
    kind = response.headers.get("content-type", "application/json")
    kind = kind if kind.isprintable() else "application/octet-stream"
    return UpstreamRefused(response.status, await _read(response), kind, _passed_back(response))


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


def _passed_back(response: aiohttp.ClientResponse, names: frozenset[str] = _PASSED_BACK) -> dict[str, str]:
    headers = ((name.lower(), value) for name, value in response.headers.items())
    # What is no text, or would end a line, is in no header of ours.
    return {name: value for name, value in headers if _passes_back(name, names) and value.isprintable()}


def _hidden(headers: Mapping[str, str], hide: Hider) -> dict[str, str]:
    return {name: hide(value) for name, value in headers.items()}


async def _answer(response: aiohttp.ClientResponse) -> Answer:
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    headers = _passed_back(response)
    if kind == "application/json" or kind.endswith("+json"):
        return Answer(headers, whole=await _whole(response))
    if kind == "text/html":
        raise UpstreamBroke("The upstream answered with a web page.", headers=headers)
    return Answer(headers, batches=_batches(response))


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    body = await _read(response)
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise UpstreamBroke(f"The upstream's answer is not JSON: {error}.") from None
    if isinstance(answer, dict) and answer.get("error"):
        raise UpstreamReported(answer["error"])
    return body


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for data in _bytes(response):
        body += data
        if len(body) > _MAX_BODY_BYTES:
            raise UpstreamBroke(f"The upstream's answer is larger than {_MAX_BODY_BYTES} bytes.")
    return bytes(body)


async def _told(response: aiohttp.ClientResponse, hide: Hider) -> AsyncIterator[bytes]:
    """What an upstream says of an error, in one piece."""
    yield hide((await _read(response)).decode("latin-1")).encode("latin-1")


async def _batches(response: aiohttp.ClientResponse) -> AsyncGenerator[list[bytes], None]:
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


async def _bytes(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The body as it comes, decompressed. Raises `UpstreamError`."""
    with _errors_mapped(begun=True), _loss_noticed(response):
        async for data in response.content.iter_any():
            yield data


@contextmanager
def _loss_noticed(response: aiohttp.ClientResponse) -> Iterator[None]:
    """Tells the reader of a body that its connection is gone.

    aiohttp 3.14 forgets that where the chunks cannot be parsed: it closes the connection, and the reader waits for ever.
    """
    protocol = None if response.connection is None else response.connection.protocol
    closed = None if protocol is None else protocol.closed
    if closed is None:
        yield
        return

    def tell(_: "asyncio.Future[None]") -> None:
        content = response.content
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the connection was lost"))

    closed.remove_done_callback(_fetch)  # the connection may have served before
    closed.add_done_callback(_fetch)
    closed.add_done_callback(tell)
    try:
        yield
    finally:
        closed.remove_done_callback(tell)


def _fetch(closed: "asyncio.Future[None]") -> None:
    """How a connection ends later is nobody's concern, and asyncio would complain that nobody has looked."""
    if not closed.cancelled():
        closed.exception()


class _errors_mapped:  # noqa: N801  # used as a with statement, like contextlib's
    """Maps the libraries' exceptions to the taxonomy. Their texts are not passed on: they may hold addresses."""

    def __init__(self, *, begun: bool = False) -> None:
        self._begun = begun

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and isinstance(error.__cause__, GatewayError):
            raise error.__cause__  # of the caller's, whose upload broke off while it was passed on
        if isinstance(error, aiohttp.ClientError | openai.APIError | httpx2.HTTPError | OSError):
            raise _mapped(error, begun=self._begun) from error


def _mapped(error: Exception, *, begun: bool) -> UpstreamError:
    if begun and isinstance(error, TimeoutError):
        return UpstreamTimeout("The upstream sent nothing for too long.")
    if begun:
        return UpstreamBroke("The upstream's answer was cut off.")
    if isinstance(error, aiohttp.SocketTimeoutError):
        return UpstreamTimeout("The upstream did not answer in time.")
    return UpstreamUnreachable("The upstream cannot be reached.")

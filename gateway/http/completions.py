"""Chat completions and completions: read the request, open the answer, write it. One write loop serves every stream."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web
from multidict import CIMultiDictProxy

from gateway.core.apis import Api, RequestProblem
from gateway.core.controls import NO_CONTROLS, Controls, from_body
from gateway.core.dialects.openai import END
from gateway.core.policy import Directives
from gateway.errors import InvalidRequest, UnsupportedMediaType, UpstreamRefused
from gateway.http import body, fields
from gateway.http.edge import EXCHANGE, Exchange, Handler
from gateway.http.writing import PIECE_BYTES, patiently, write_whole
from gateway.ports import GATEWAY_UPSTREAM
from gateway.questions import CREDENTIAL_HEADERS, Request
from gateway.reader import Reader
from gateway.service import Opened, Service

METHODS = ("POST", "QUERY")
"""QUERY (RFC 10008) says that the request changes nothing, and that its content is a part of the key: so it is here."""

# Below this a write cannot fill the transport's buffer of 64 KiB by itself.
_SMALL_BYTES = 32_768
# Structured fields' (RFC 9651 3.3.6); what is neither is ignored, as a field that does not parse has to be.
_BOOLEANS = {"?1": True, "?0": False}
STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
_CONTROL_HEADERS = ("Cache-Control", "Gateway-Cache-TTL", "Gateway-Cache-Namespace", "Gateway-Cache-Tags")
# For caches between the caller and us: they may keep what we keep, for as long as we do, but for this caller only; and
# nothing else, since a stream that fails ends as well as one that does not (RFC 9111 5.2.2).
UNSTORED = "no-store"
_VARY = ", ".join((*(name.title() for name in CREDENTIAL_HEADERS), "Gateway-Cache-Namespace", "Gateway-Event-Ids"))


@dataclass(frozen=True, slots=True)
class Timing:
    """How long things may take, in seconds."""

    head_after_s: float
    keepalive_s: float
    write_timeout_s: float
    stored_within_s: float
    """How long an answer that is given whole waits to be told whether it is stored."""


def handler(api: Api, service: Service, timing: Timing, *, event_ids: bool) -> Handler:
    """The handler of one API's path. ``event_ids``: what holds where a caller does not say."""

    async def handle(request: web.Request) -> web.StreamResponse:
        exchange = request[EXCHANGE]
        asked = await _read(request, api, event_ids=event_ids)
        exchange.model = str(asked.body.get("model"))
        opened = await service.open(asked)
        exchange.upstream = opened.upstream
        exchange.cache_status = opened.disposition.cache_status()
        try:
            if asked.streamed:
                return await write_stream(request, opened, exchange, timing)
            return await _whole(request, opened, exchange, timing)
        except UpstreamRefused as refusal:
            exchange.cache_status = opened.disposition._replace(status=refusal.status).cache_status()
            raise
        finally:
            service.leave(opened)

    return handle


async def _read(request: web.Request, api: Api, *, event_ids: bool) -> Request:
    asked = await read_json(request)
    if not isinstance(asked, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    try:
        controls = controls_of(request.headers, asked)
    except RequestProblem as problem:
        raise InvalidRequest(str(problem), param=problem.param) from None
    if (wish := request.headers.get("Gateway-Event-Ids")) is not None:
        event_ids = _BOOLEANS.get(wish.strip(), event_ids)
    return Request(api, asked, request.headers, controls, event_ids)


def controls_of(headers: CIMultiDictProxy[str], body: dict[str, Any]) -> Controls:
    """What the caller says of the cache, in headers and, as LiteLLM's callers do, in the body: there it is taken out.

    Raises `RequestProblem`.
    """
    asked = body.pop("cache", None) if isinstance(body.get("cache"), dict | None) else None
    if asked is None and not any(name in headers for name in _CONTROL_HEADERS):
        return NO_CONTROLS
    controls = Controls(
        directives=Directives.parse(",".join(headers.getall("Cache-Control", ()))),
        ttl_s=fields.ttl_s(headers.getall("Gateway-Cache-TTL", ())),
        namespace=fields.namespace(headers.getall("Gateway-Cache-Namespace", ())) or "",
        tags=fields.tags(headers.getall("Gateway-Cache-Tags", ())),
    )
    return from_body(asked, controls) if asked else controls


async def read_json(request: web.Request) -> Any:
    """The parsed body. Raises `UnsupportedMediaType`, and what `body.read` and `InvalidRequest` do."""
    kind = request.headers.get("Content-Type")
    if kind is None and request.method == "QUERY":
        raise InvalidRequest("A QUERY must name the type of its content: application/json (RFC 10008 2).")
    if kind is not None and not is_json(kind):
        raise UnsupportedMediaType(f"The content type must be application/json, not {kind!r}.")
    return parse_json(await body.read(request))


def parse_json(text: bytes) -> Any:
    """Raises `InvalidRequest`."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The request body is not JSON: {error}.") from None


def is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


async def _whole(request: web.Request, opened: Opened, exchange: Exchange, timing: Timing) -> web.StreamResponse:
    answer = await opened.reader.whole()
    # Nobody waits twice for a store that does not answer.
    within_s = 0.0 if opened.disposition.detail == "store-unavailable" else timing.stored_within_s
    kept, why_not = await opened.reader.outcome(within_s)
    if kept or why_not:
        told = opened.disposition
        opened.disposition = told._replace(stored=bool(kept), detail=why_not or told.detail)
    headers = _headers(opened, exchange, await opened.reader.head(None))
    headers["Content-Type"] = "application/json"
    if len(answer) <= PIECE_BYTES:
        return web.Response(body=answer, headers=headers)
    response = web.StreamResponse(headers=headers)
    with _leaving(exchange):
        await write_whole(request, response, answer, timing.write_timeout_s)
    return response


async def write_stream(request: web.Request, opened: Opened, exchange: Exchange, timing: Timing) -> web.StreamResponse:
    """The answer as a stream, at once or as it comes; 204 where the caller has all of it. Raises the errors of its head."""
    reader = opened.reader
    if (stream := reader.at_once()) is not None:
        headers = _headers(opened, exchange, None, streamed=True)
        exchange.first_token_at = time.perf_counter()
        return web.Response(body=stream + END, headers=headers)
    head = await reader.head(timing.head_after_s)
    if reader.over:
        return web.Response(status=204)
    response = web.StreamResponse(headers=_headers(opened, exchange, head, streamed=True))
    exchange.running.streams += 1
    try:
        with _leaving(exchange):
            await response.prepare(request)
            if head is None:
                await response.write(reader.keep_alive)
            await _write(request, response, reader, timing)
            if reader.error:
                exchange.error = f"{type(reader.error).__name__}: {reader.error.message}"
    finally:
        exchange.running.streams -= 1
    return response


@contextmanager
def _leaving(exchange: Exchange) -> Iterator[None]:
    """While an answer is written, its caller may leave."""
    exchange.head_sent = True
    try:
        yield
    except ConnectionResetError as error:
        exchange.left = True
        exchange.error = type(error).__name__


async def _write(request: web.Request, response: web.StreamResponse, reader: Reader, timing: Timing) -> None:
    """The one loop that writes streams: what the reader has, comments while it has nothing, then the end."""
    exchange = request[EXCHANGE]
    while True:
        data = await reader.next(timing.keepalive_s)
        if data and not exchange.first_token_at:
            exchange.first_token_at = time.perf_counter()
        if reader.at_end:
            # Clients stop reading at the end event, so it leaves together with the end of the body.
            await patiently(request, response.write_eof((data or b"") + reader.end()), timing.write_timeout_s)
            return
        await _write_data(request, response, reader.keep_alive if data is None else data, timing)


async def _write_data(request: web.Request, response: web.StreamResponse, data: bytes, timing: Timing) -> None:
    transport = request.transport
    if transport is None:
        raise ConnectionResetError
    if len(data) < _SMALL_BYTES and not transport.get_write_buffer_size():
        await response.write(data)  # which cannot wait
    else:
        await patiently(request, response.write(data), timing.write_timeout_s)


def _headers(
    opened: Opened, exchange: Exchange, head: Mapping[str, str] | None, *, streamed: bool = False
) -> dict[str, str]:
    """``head`` is what the upstream said, where it has answered."""
    disposition = opened.disposition
    passed: Mapping[str, str] = {}
    if head is not None and disposition.kind in ("miss", "bypass"):
        exchange.take_upstream_id(head.get("x-request-id"))
        disposition = disposition._replace(status=200)
        passed = {name: value for name, value in head.items() if name != "x-request-id"}
    elif head and disposition.kind == "collapsed" and (served_by := head.get(GATEWAY_UPSTREAM)):
        passed = {GATEWAY_UPSTREAM: served_by}
    exchange.upstream = passed.get(GATEWAY_UPSTREAM, exchange.upstream)
    exchange.cache_status = disposition.cache_status()
    headers = {**passed, **exchange.headers(), "Cache-Control": UNSTORED}
    if disposition.is_replay:
        headers["Age"] = str(disposition.age_s)
    if opened.ttl_s and (disposition.ttl_s > 0 or disposition.stored):
        headers["Cache-Control"] = f"private, max-age={int(opened.ttl_s)}"
        headers["Vary"] = _VARY
    if opened.stream_id:
        headers["Gateway-Stream-Id"] = opened.stream_id
    if streamed:
        headers["Cache-Control"] += ", no-transform"
        headers |= STREAM_HEADERS
    return headers

"""The administration below ``/admin/``: who has its key looks into the cache and purges it; nobody else learns a thing."""

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from hmac import compare_digest
from typing import Any

import orjson
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.admin import Admin, Entry, Filters
from gateway.core.apis import APIS, RequestProblem
from gateway.core.key import CacheKey
from gateway.core.recording import payload_of
from gateway.eraser import Tell, Wanted
from gateway.errors import EntryNotFound, GatewayError, InvalidRequest, PathNotFound, Unauthorized
from gateway.http import recordings
from gateway.http.completions import controls_of, read_json
from gateway.http.edge import EXCHANGE, Exchange, Handler, not_allowed
from gateway.http.recordings import NDJSON
from gateway.questions import Request
from gateway.recordings import Recordings, Terms

_KEY = re.compile(r"[0-9a-f]{40}")
_CURSOR = re.compile(r"[0-9]{0,19}|[0-9]{1,5}-[0-9]{1,5}-[0-9a-f]{0,40}-[0-9]{0,19}")
_LONGEST_SELECTOR = 1000
_NO_STORE = {"Cache-Control": "no-store"}
_MOST_ENTRIES = 10_000
_PARTS = ("body", "stream", "timing", "request")
_SERVED = (
    ("GET", "/admin/", "this list"),
    (
        "GET",
        "/admin/entries",
        "what is stored: ?namespace= &model= &tag= &min_age_s= &max_age_s= &min_bytes= &stale=true &limit= &cursor=",
    ),
    ("GET", "/admin/entries/{key}", "one entry, or of it only ?part=body, stream, timing or request"),
    ("DELETE", "/admin/entries/{key}", "purges an entry with all its samples"),
    ("POST", "/admin/purge", "purges by key, id, stream, namespace, model, tag, or all: true; dry_run: true only counts"),
    ("GET", "/admin/stats", "hits, misses and what they saved; ?scan=true looks at every entry too"),
    ("GET", "/admin/live", "what each process has counted since it began: of two answers the difference is what happens"),
    (
        "GET",
        "/admin/profile",
        "how fast the models of recordings are: ?namespace= &model= &tag= &min_age_s= &max_age_s= &limit=",
    ),
    ("POST", "/admin/explain", "why a request (api, request, headers) is or is not answered from the cache"),
    (
        "GET",
        "/admin/recordings",
        "recordings as lines of JSON: ?namespace= &model= &tag= &min_age_s= &max_age_s= &min_bytes= &stale=true",
    ),
    ("POST", "/admin/recordings", "takes such lines in: ?ttl_s= &everyone=true"),
)


def add_routes(app: web.Application, admin: Admin, about: Recordings, key: Callable[[], str]) -> None:
    """Serves everything below ``/admin/`` to whoever shows the ``key`` of that moment, and 401 to all others."""
    handlers = _Handlers(admin, about)
    served: list[Handler] = [
        handlers.root,
        handlers.entries,
        handlers.entry,
        handlers.delete,
        handlers.purge,
        handlers.stats,
        handlers.live,
        handlers.profile,
        handlers.explain,
        handlers.export,
        handlers.take,
    ]
    allowed: dict[str, list[str]] = {}
    for (method, path, _), handler in zip(_SERVED, served, strict=True):
        app.router.add_route(method, path, guarded(handler, key))
        allowed.setdefault(path, []).append(method)
    app.router.add_get("/admin", guarded(handlers.root, key))
    allowed["/admin"] = ["GET"]
    # Paths that are not served need the key too: without it, nobody can tell which are.
    for path in ("/admin", "/admin/{rest:.*}"):
        app.router.add_route("*", path, guarded(_unserved(allowed), key))


def guarded(handler: Handler, key: Callable[[], str]) -> Handler:
    """The handler behind the key. What it answers is for no cache."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            _check_key(request.headers.get("Authorization", ""), key().encode())
            response = await handler(request)
        except GatewayError as error:
            error.headers |= _NO_STORE
            raise
        if not response.prepared:
            response.headers.update(_NO_STORE)
        return response

    return handle


def _check_key(authorization: str, expected: bytes) -> None:
    scheme, _, shown = authorization.partition(" ")
    # Compared first, and in a time that does not depend on how much of it is right.
    fits = compare_digest(shown.strip().encode("utf-8", "surrogateescape"), expected)
    if not (fits and scheme.lower() == "bearer"):
        raise Unauthorized("The administration needs its own key: Authorization: Bearer <admin key>.")


def _unserved(allowed: Mapping[str, list[str]]) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        path = request.path
        if re.fullmatch(r"/admin/entries/[^/]+", path):
            path = "/admin/entries/{key}"
        if path in allowed:
            raise not_allowed(request, allowed[path])
        raise PathNotFound(f"Unknown request URL: {request.method} {request.path}.")

    return handle


class _Handlers:
    """Each reads its parameters, asks `Admin` or `Recordings`, and writes JSON."""

    def __init__(self, admin: Admin, about: Recordings) -> None:
        self._admin = admin
        self._recordings = about

    async def root(self, request: web.Request) -> web.Response:
        _Query(request).end()
        served = [{"method": method, "path": path, "what": what} for method, path, what in _SERVED]
        return _json({"object": "list", "data": served})

    async def entries(self, request: web.Request) -> web.Response:
        query = _Query(request)
        filters = query.filters()
        cursor, limit = query.text("cursor") or "", query.whole("limit", 100, least=1, most=_MOST_ENTRIES)
        query.end()
        if not _CURSOR.fullmatch(cursor):
            raise InvalidRequest("'cursor' must be that of an answer before.", param="cursor")
        listing = await self._admin.entries(filters, cursor, limit)
        return _json({"object": "list", "data": listing.entries, "cursor": listing.cursor, "scanned": listing.scanned})

    async def entry(self, request: web.Request) -> web.Response:
        query = _Query(request)
        part = query.text("part")
        if part is not None and part not in _PARTS:
            raise InvalidRequest(f"'part' must be one of {', '.join(_PARTS)}.", param="part")
        query.end()
        return _entry_response(await self._admin.entry(_key(request)), part)

    async def delete(self, request: web.Request) -> web.StreamResponse:
        _Query(request).end()
        wanted = Wanted(key=_key(request))
        return await _reporting(request, lambda tell: self._admin.purge(wanted, tell))

    async def purge(self, request: web.Request) -> web.StreamResponse:
        wanted = _wanted(await _object(request))
        return await _reporting(request, lambda tell: self._admin.purge(wanted, tell))

    async def stats(self, request: web.Request) -> web.StreamResponse:
        query = _Query(request)
        scan = query.boolean("scan")
        query.end()
        return await _reporting(request, lambda tell: self._admin.stats(scan=scan, tell=tell))

    async def live(self, request: web.Request) -> web.Response:
        _Query(request).end()
        return _json(await self._admin.live())

    async def profile(self, request: web.Request) -> web.StreamResponse:
        query = _Query(request)
        filters = Filters(
            namespace=query.text("namespace"),
            model=query.text("model"),
            tag=query.text("tag"),
            min_age_s=query.number("min_age_s", 0.0),
            max_age_s=query.number("max_age_s", math.inf),
        )
        limit = query.whole("limit", 1000, least=1, most=_MOST_ENTRIES)
        query.end()
        return await _reporting(request, lambda tell: self._admin.profile(filters, limit, tell))

    async def explain(self, request: web.Request) -> web.Response:
        return _json(await self._admin.explain(_asked(await _object(request))))

    async def export(self, request: web.Request) -> web.StreamResponse:
        query = _Query(request)
        filters = query.filters()
        query.end()
        return await recordings.write(request, self._recordings, filters)

    async def take(self, request: web.Request) -> web.StreamResponse:
        query = _Query(request)
        ttl_s = query.number("ttl_s", -1.0)
        terms = Terms("everyone" if query.boolean("everyone") else "recorded", ttl_s=None if ttl_s < 0 else ttl_s)
        query.end()
        return await recordings.read(request, self._recordings, terms)


# Requests


class _Query:
    """The parameters in an address. Each is read once, and `end` refuses what is left. Raises `InvalidRequest`."""

    def __init__(self, request: web.Request) -> None:
        self._left: dict[str, str] = {}
        for name, value in request.query.items():
            if name in self._left:
                raise InvalidRequest(f"'{name}' is given twice.", param=name)
            self._left[name] = value

    def text(self, name: str) -> str | None:
        text = self._left.pop(name, None)
        _check_length(name, text)
        return text

    def number(self, name: str, default: float) -> float:
        """A number that is 0 or more."""
        text = self.text(name)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise InvalidRequest(f"'{name}' must be a number, 0 or more.", param=name)
        return value

    def whole(self, name: str, default: int, *, least: int = 0, most: int = 1 << 53) -> int:
        text = self.text(name)
        if text is None:
            return default
        if not re.fullmatch(r"[0-9]{1,16}", text) or not least <= int(text) <= most:
            raise InvalidRequest(f"'{name}' must be a whole number from {least} to {most}.", param=name)
        return int(text)

    def boolean(self, name: str) -> bool:
        text = self.text(name)
        if text not in (None, "true", "false"):
            raise InvalidRequest(f"'{name}' must be true or false.", param=name)
        return text == "true"

    def filters(self) -> Filters:
        """Which entries are meant."""
        return Filters(
            namespace=self.text("namespace"),
            model=self.text("model"),
            tag=self.text("tag"),
            min_age_s=self.number("min_age_s", 0.0),
            max_age_s=self.number("max_age_s", math.inf),
            min_bytes=self.whole("min_bytes", 0),
            stale=self.boolean("stale"),
        )

    def end(self) -> None:
        for name in self._left:
            raise InvalidRequest(f"'{name}' is not a parameter of this path.", param=name)


def _check_length(name: str, value: Any) -> None:
    """What a pattern costs grows with the square of its length, and the whole service would wait."""
    if isinstance(value, str) and len(value) > _LONGEST_SELECTOR:
        raise InvalidRequest(f"'{name}' must not be longer than {_LONGEST_SELECTOR} characters.", param=name)


def _key(request: web.Request) -> CacheKey:
    key = request.match_info["key"]
    if not _KEY.fullmatch(key):
        raise EntryNotFound("A key has 40 hexadecimal digits, in lower case.", param="key")
    return CacheKey(key)


async def _object(request: web.Request) -> dict[str, Any]:
    body = await read_json(request)
    if not isinstance(body, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    return body


def _wanted(body: Mapping[str, Any]) -> Wanted:
    """A member that is not known is refused: mistyped, it would make a purge greater than was meant."""
    for name, value in body.items():
        if name not in Wanted._fields:
            raise InvalidRequest(f"'{name}' is not a selector.", param=name)
        if value is not None and not isinstance(value, bool if name in ("all", "dry_run") else str):
            raise InvalidRequest(f"'{name}' has a wrong type.", param=name)
        _check_length(name, value)
    wanted = Wanted(**{name: value for name, value in body.items() if value is not None})
    if wanted.key and not _KEY.fullmatch(wanted.key):
        raise InvalidRequest("'key' must be 40 hexadecimal digits, in lower case.", param="key")
    return wanted


def _asked(body: Mapping[str, Any]) -> Request:
    """The request that is to be explained, as its caller would have sent it."""
    for name in body:
        if name not in ("api", "request", "headers"):
            raise InvalidRequest(f"'{name}' is not a member of this.", param=name)
    api, asked, headers = body.get("api", "chat"), body.get("request"), body.get("headers") or {}
    if not isinstance(api, str) or api not in APIS:
        raise InvalidRequest(f"'api' must be one of {', '.join(APIS)}.", param="api")
    if not isinstance(asked, dict):
        raise InvalidRequest("'request' must be a JSON object.", param="request")
    if not (isinstance(headers, dict) and all(isinstance(value, str) for value in headers.values())):
        raise InvalidRequest("'headers' must be an object of texts.", param="headers")
    sent = CIMultiDictProxy(CIMultiDict(headers))
    try:
        return Request(APIS[api], asked, sent, controls_of(sent, asked))
    except RequestProblem as problem:
        raise InvalidRequest(str(problem), param=problem.param) from None


# Answers


def _json(value: Any) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")


def _entry_response(entry: Entry, part: str | None) -> web.Response:
    recording = entry.recording
    if part == "timing":
        return _json(entry.timing)
    if part == "stream":
        return web.Response(body=recording.stream(None, usage=True), content_type="text/event-stream", charset="utf-8")
    if part:
        body = recording.request if part == "request" else recording.body
        if not body:
            raise EntryNotFound(f"The {part} of this entry is not kept.", param="part")
        return web.Response(body=body, content_type="application/json")
    frames = [payload_of(frame).decode("utf-8", "replace") for frame in recording.frames(None, usage=True)]
    parts = {"timing": entry.timing, "stream": frames, "body": _raw(recording.body), "request": _raw(recording.request)}
    return _json(entry.about | parts)


def _raw(text: bytes | None) -> Any:
    """Stored JSON as it is: numbers and all, nothing of it is written anew."""
    return orjson.Fragment(text) if text else None


Work = Callable[[Tell], Awaitable[dict[str, Any]]]
_Step = tuple[int, int]
"""How many entries were looked at, and how many went."""


async def _reporting(request: web.Request, work: Work) -> web.StreamResponse:
    """The result of the work; for a caller who accepts them, lines of JSON that say how far it is, and the result last."""
    if NDJSON not in request.headers.get("Accept", ""):
        return _json(await work(lambda *_: None))
    told: asyncio.Queue[_Step | None] = asyncio.Queue()
    task = asyncio.ensure_future(work(lambda *step: told.put_nowait(step)))
    task.add_done_callback(lambda _: told.put_nowait(None))
    task.add_done_callback(_fetch)
    try:
        first = await told.get()
        if first is None:
            await task  # what is wrong from the start still has a status of its own
        return await _write_report(request, first, told, task)
    finally:
        task.cancel()


def _fetch(task: "asyncio.Future[Any]") -> None:
    """A caller who left does not fetch what went wrong, and asyncio would complain."""
    if not task.cancelled():
        task.exception()


async def _write_report(
    request: web.Request, step: "_Step | None", told: "asyncio.Queue[_Step | None]", task: "asyncio.Future[dict[str, Any]]"
) -> web.StreamResponse:
    exchange = request[EXCHANGE]
    exchange.head_sent = True
    response = web.StreamResponse(headers={"Content-Type": NDJSON, **_NO_STORE, **exchange.headers()})
    try:
        await response.prepare(request)
        while step:
            scanned, purged = step
            await response.write(orjson.dumps({"object": "progress", "scanned": scanned, "purged": purged}) + b"\n")
            step = await told.get()
        await response.write_eof(orjson.dumps(await _outcome(task, exchange)) + b"\n")
    except ConnectionResetError as error:
        exchange.left = True
        exchange.error = type(error).__name__
    return response


async def _outcome(task: "asyncio.Future[dict[str, Any]]", exchange: Exchange) -> dict[str, Any]:
    """The result, or the error: the status is spent."""
    try:
        return await task
    except GatewayError as error:
        exchange.error = f"{type(error).__name__}: {error.message}"
        return error.body()

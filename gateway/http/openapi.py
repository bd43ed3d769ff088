"""What is served, as an OpenAPI 3.1 document. It describes the gateway: what only the model reads is passed on as it is."""

from collections.abc import Iterable
from typing import Any, Literal

Json = dict[str, Any]

_STATUSES = {
    400: "The request is not what the API takes.",
    404: "No upstream serves this model, or the stream is unknown, has expired or is another tenant's.",
    405: "The path is served, but by other methods: `Allow` names them.",
    413: "The request body is too large.",
    415: "The request body is declared as something else than JSON.",
    429: "The caller has as many streams or calls as one may have at a time, or the upstream refuses more.",
    502: "The upstream cannot be reached, or its answer is no answer.",
    503: "The gateway or the upstream has all that it can take, the gateway is shutting down, or the store is not reached.",
    504: "The upstream took too long; or `only-if-cached` was asked, or it is replay mode, and there is no stored answer.",
}


MetricsKind = Literal["", "open", "guarded"]
"""Whether ``/metrics`` is served, and whether it needs the admin key."""


def document(
    version: str,
    relay_paths: Iterable[str] = ("embeddings", "moderations"),
    *,
    admin: bool = False,
    metrics: MetricsKind = "",
) -> Json:
    """The whole document. ``relay_paths`` are the paths below ``/v1`` that are passed on uncached.

    ``admin``: whether what is served below ``/admin/`` belongs to it.
    """
    document = _served(version, relay_paths)
    if metrics:
        document["paths"]["/metrics"] = {"get": _metrics(metrics)}
    if admin:
        document["paths"] |= _admin_paths()
        document["components"]["schemas"] |= _admin_schemas()
        document["components"]["responses"]["401"] = _error(_ADMIN_401, "WWW-Authenticate")
        document["components"]["headers"]["WWW-Authenticate"] = {"description": "`Bearer`.", "schema": {"const": "Bearer"}}
        document["components"]["securitySchemes"]["admin"] = {
            "type": "http",
            "scheme": "bearer",
            "description": "The admin key, which no caller of `/v1` has.",
        }
    return document


def operators_document(version: str, *, admin: bool, metrics: MetricsKind) -> Json:
    """What is served at ``[admin] listen``."""
    whole = document(version, (), admin=admin, metrics=metrics)
    paths = {path: item for path, item in whole["paths"].items() if path in _OF_OPERATORS or path.startswith("/admin/")}
    return whole | {"paths": paths, "security": [{}]}


_OF_OPERATORS = ("/healthz", "/health", "/readyz", "/metrics", "/openapi.json")


def _served(version: str, relay_paths: Iterable[str]) -> Json:
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "LLM streaming gateway",
            "version": version,
            "summary": "OpenAI's API, answered from a cache of recorded token streams where it can be.",
        },
        "servers": [{"url": "/"}],
        # Where the upstream has a key of its own, the caller needs none.
        "security": [{"bearer": []}, {}],
        "paths": {
            "/v1/chat/completions": {"post": _answered("createChatCompletion", "ChatCompletion")},
            "/v1/completions": {"post": _answered("createCompletion", "Completion")},
            "/v1/models": {"get": _get("listModels", "The models that can be asked.", "ModelList", 405)},
            "/v1/models/{model}": {
                "parameters": [_parameter("model", "path", _string("The model's name."))],
                "get": _get("retrieveModel", "One of the models.", "Model", 404),
            },
            "/v1/streams/{id}": {"parameters": [_ref("parameters", "StreamId")], "get": _resumed()},
            "/v1/streams/{id}/cancel": {
                "parameters": [_ref("parameters", "StreamId")],
                "post": _get("cancelStream", "Ends this reader of a stream for good.", "Cancelled", 404, 405, 503),
            },
            "/v1/streams/{id}/status": {
                "parameters": [_ref("parameters", "StreamId")],
                "get": _get("streamStatus", "What has become of a stream.", "StreamStatus", 404, 405, 503),
            },
            **{f"/v1/{path}": {"post": _relayed(path)} for path in relay_paths},
            "/healthz": {"get": _get("health", "The process is up.", "Health", 405)},
            "/health": {"get": _get("vllmHealth", "The same, at the path of vLLM's server.", "Health", 405)},
            "/readyz": {"get": _readiness()},
            "/openapi.json": {"get": _get("openapi", "This document.", "AnyObject", 405)},
            "/": {"get": _text("root", "What this is, in a few words.")},
        },
        "components": {
            "schemas": _schemas(),
            "headers": _headers(),
            "parameters": _parameters(),
            "responses": {str(status): _error(text, *_also(status)) for status, text in _STATUSES.items()},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


# Operations


# Of what RFC 9651 allows, the simple forms: no parameters, no escapes.
_SF_SECONDS = r"^[0-9]{1,12}(\.[0-9]{1,3})?$"
_SF_NAME = r"([A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]{0,127}|\"[ !#-\[\]-~]{1,128}\")"
_SF_REPLAY = (
    r"^((instant|recorded(;speed=[1-9][0-9]{0,3})?|rate=[1-9][0-9]{0,6})(, jitter=0\.[0-9])?(, seed=-?[0-9]{1,9})?)?$"
)
_SF_FAULT = r"^(status=[45][0-9]{2}|cut|malformed|error);rate=0(\.[0-9])?(, seed=-?[0-9]{1,9})?$"
_ANSWER_PARAMETERS = (
    *("CacheControl", "CacheTtl", "CacheNamespace", "CacheTags", "EventIds", "Replay", "Fault", "RequestId"),
)


def _answered(operation: str, name: str) -> Json:
    """An operation whose answers are recorded and replayed."""
    return {
        "operationId": operation,
        "summary": "Answered from the cache, from an answer that is under way, or by the model.",
        "description": "`QUERY` (RFC 10008), which OpenAPI 3.1 cannot describe, is served in the same way.",
        "parameters": [_ref("parameters", name) for name in _ANSWER_PARAMETERS],
        "requestBody": {"required": True, "content": _json(_ref("schemas", f"{name}Request"))},
        "responses": {
            "200": {
                "description": "The answer: a stream of events where `stream` is true, else one object.",
                "headers": _header_refs(
                    *("Cache-Status", "Age", "Cache-Control", "Gateway-Stream-Id", "Gateway-Upstream", "Gateway-Simulated"),
                    *("Gateway-Fault", "X-Request-Id"),
                ),
                "content": _json(_ref("schemas", name)) | _events(f"{name}Chunk"),
            },
            **_errors(*_STATUSES),
            "default": _refusal(),
        },
    }


def _resumed() -> Json:
    return {
        "operationId": "resumeStream",
        "summary": "What comes after the last event that the caller has, from any replica.",
        "parameters": [_ref("parameters", name) for name in ("LastEventId", "After", "RequestId")],
        "responses": {
            "200": {
                "description": "The rest of the stream: live, or at once if it has ended.",
                "headers": _header_refs("Cache-Status", "Age", "Gateway-Stream-Id", "X-Request-Id"),
                "content": _events("chunk of the stream's kind"),
            },
            "204": {
                "description": "Nothing comes after it, or the stream was cancelled.",
                "headers": _header_refs("X-Request-Id"),
            },
            **_errors(400, 404, 405, 429, 502, 503, 504),
            "default": _refusal(),
        },
    }


def _relayed(path: str) -> Json:
    return {
        "operationId": f"relay_{path.replace('/', '_')}",
        "summary": "Passed on to the upstream as it is, never cached.",
        "parameters": [_ref("parameters", "RequestId")],
        "requestBody": {"required": True, "content": {"*/*": {}}},
        "responses": {
            **_errors(400, 404, 413, 429, 502, 503, 504),
            "default": {
                "description": "The upstream's answer, whatever its status and type.",
                "headers": _header_refs("Cache-Status", "X-Request-Id"),
                "content": {"*/*": {}},
            },
        },
    }


def _get(operation: str, summary: str, schema: str, *errors: int) -> Json:
    return {
        "operationId": operation,
        "summary": summary,
        "parameters": [_ref("parameters", "RequestId")],
        "responses": {
            "200": {
                "description": summary,
                "headers": _header_refs("Cache-Status", "X-Request-Id"),
                "content": _json(_ref("schemas", schema)),
            },
            **_errors(*errors),
        },
    }


def _metrics(kind: MetricsKind) -> Json:
    found = _text("metrics", "Metrics in Prometheus' text format, or in OpenMetrics'.")
    text = {"schema": {"type": "string"}}
    found["responses"]["200"]["content"] = {"text/plain": text, "application/openmetrics-text": text}
    if kind == "guarded":
        found["security"] = [{"admin": []}]
        found["responses"] |= _errors(401)
    return found


def _readiness() -> Json:
    """Not ready is said in the same words as ready."""
    found = _get("readiness", "The process wants requests. It can serve them without the store.", "Readiness", 405)
    draining = {**found["responses"]["200"], "description": "The process is ending: send requests to another one."}
    found["responses"]["503"] = draining
    return found


def _text(operation: str, summary: str) -> Json:
    found = _get(operation, summary, "AnyObject", 405)
    found["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return found


# The administration

_ADMIN_401 = "The admin key is missing or wrong."
_ENTRIES_QUERY: dict[str, Json] = {
    "namespace": {"type": "string", "description": "Only entries of this namespace."},
    "model": {"type": "string", "description": "Only entries of this model: a name, a pattern (`gpt-*`) or an alias."},
    "tag": {"type": "string", "description": "Only entries with this tag."},
    "min_age_s": {"type": "number", "minimum": 0},
    "max_age_s": {"type": "number", "minimum": 0},
    "min_bytes": {"type": "integer", "minimum": 0, "maximum": 2**53},
    "stale": {"type": "boolean", "description": "Only entries that are not fresh any more."},
    "limit": {
        "type": "integer",
        "minimum": 1,
        "maximum": 10_000,
        "default": 100,
        "description": "About how many: the store's pages are given in full.",
    },
    "cursor": {"type": "string", "pattern": "^[0-9]{0,19}$", "description": "The `cursor` of the answer before."},
}


def _admin_paths() -> Json:
    entry_key = _parameter("key", "path", {"type": "string", "pattern": "^[0-9a-f]{40}$"})
    part = _parameter("part", "query", {"enum": ["body", "stream", "timing", "request"], "description": "Only this."})
    scan = _parameter("scan", "query", {"type": "boolean", "description": "Look at every entry, too."})
    found = _administered("getEntry", "One entry with all that is known of it.", "CacheEntryParts", part, errors=(404, 503))
    found["responses"]["200"]["content"] |= {"text/event-stream": {"schema": {"type": "string"}}}
    query = [_parameter(name, "query", schema) for name, schema in _ENTRIES_QUERY.items()]
    profiled = [
        _parameter(
            name, "query", _ENTRIES_QUERY[name] | ({"default": 1000, "description": "How many."} if name == "limit" else {})
        )
        for name in ("namespace", "model", "tag", "min_age_s", "max_age_s", "limit")
    ]
    purge = _reported(_administered("purge", "Deletes the entries that fit all that is named.", "Purged", body="Purge"))
    return {
        "/admin/": {"get": _administered("administration", "What is served here.", "AnyObject")},
        "/admin/entries": {"get": _administered("listEntries", "What is stored.", "CacheEntries", *query)},
        "/admin/entries/{key}": {
            "parameters": [entry_key],
            "get": found,
            "delete": _reported(
                _administered("purgeEntry", "Deletes an entry with all its samples.", "Purged", errors=(404, 503))
            ),
        },
        "/admin/purge": {"post": purge},
        "/admin/stats": {
            "get": _reported(_administered("stats", "How requests were answered, and what that saved.", "CacheStats", scan))
        },
        "/admin/live": {
            "get": _administered("live", "What each process has counted since it began.", "CacheLive", errors=())
        },
        "/admin/profile": {
            "get": _reported(_administered("profile", "How fast the models of recordings are.", "CacheProfile", *profiled))
        },
        "/admin/explain": {
            "post": _administered(
                "explain", "Why a request is or is not answered.", "Explanation", body="Explain", errors=(404, 503)
            )
        },
        "/admin/recordings": _recordings(),
    }


def _recordings() -> Json:
    lines = {"application/x-ndjson": {"schema": {"type": "string", "description": "Lines of JSON, a recording each."}}}
    query = [_parameter(name, "query", schema) for name, schema in _ENTRIES_QUERY.items() if name not in ("limit", "cursor")]
    out = _administered("exportRecordings", "Recordings, in no order, each at least once.", "AnyObject", *query)
    out["responses"]["200"]["content"] = lines
    into = _administered(
        "importRecordings",
        "Takes recordings in, each under the key that its request has here.",
        "Imported",
        _parameter("ttl_s", "query", {"type": "number", "minimum": 0, "description": "For how long they are fresh."}),
        _parameter("everyone", "query", {"type": "boolean", "description": "They are for all callers, whosever they were."}),
        _parameter("Gateway-Caller-Authorization", "header", _string("The `Authorization` of the caller they are for.")),
    )
    into["requestBody"] = {"required": True, "content": lines}
    return {"get": out, "post": into}


def _administered(
    operation: str, summary: str, schema: str, *parameters: Json, body: str = "", errors: tuple[int, ...] = (503,)
) -> Json:
    found = _get(operation, summary, schema, 400, 401, 405, *errors)
    found["security"] = [{"admin": []}]
    found["parameters"] += parameters
    if body:
        found["requestBody"] = {"required": True, "content": _json(_ref("schemas", body))}
        found["responses"] |= _errors(413, 415)
    return found


def _reported(operation: Json) -> Json:
    """The same, with lines that say how far it is for a caller who accepts them."""
    text = "Lines of JSON: `{object: progress, scanned, purged}` as it goes on, the result (or an Error) last."
    operation["responses"]["200"]["content"]["application/x-ndjson"] = {"schema": {"type": "string", "description": text}}
    return operation


def _admin_schemas() -> Json:
    text, number, whole = {"type": "string"}, {"type": "number"}, {"type": "integer"}
    texts = _array(text)
    entry = {
        "key": text,
        "state": {"enum": ["fresh", "stale", "replaced", "purged"]},
        **dict.fromkeys(("api", "upstream", "model", "owner", "namespace", "id", "flight", "sample_of"), text),
        "tags": texts,
        **dict.fromkeys(("written_at", "age_s", "ttl_s"), number),
        "life_s": {"type": ["number", "null"], "description": "Until the store lets go of it."},
        **dict.fromkeys(("size_bytes", "frames", "duration_us"), whole),
        "finish_reasons": texts,
        "usage": {"type": ["object", "null"]},
    }
    timing = _object(
        {
            "ttft_us": {"type": ["integer", "null"]},
            "duration_us": whole,
            "gaps_us": {"type": "object"},
            "at_us": _array(whole),
        }
    )
    selectors = {
        "key": _string("An entry with all its samples.", pattern="^[0-9a-f]{40}$"),
        "id": _string("A response's id, that of a hit too.", minLength=1),
        "stream": _string("A `Gateway-Stream-Id`.", minLength=1),
        "namespace": _string("What is in it.", minLength=1),
        "model": _string("A name, a pattern or an alias.", minLength=1),
        "tag": _string("What has it.", minLength=1),
        "all": {"type": "boolean", "description": "Everything: goes with no selector."},
        "dry_run": {"type": "boolean", "description": "Only counts."},
    }
    purged = {
        "dry_run": {"type": "boolean"},
        "marked": {"type": "boolean"},
        "scanned": whole,
        "purged": whole,
        "message": text,
    }
    explained = {
        **dict.fromkeys(("api", "key", "upstream", "model", "namespace", "why_not"), text),
        "owner": {"enum": ["shared", "tenant", "namespace"]},
        "canonical": {"type": "object"},
        "left_out": texts,
        "samples_wanted": whole,
        "samples": texts,
        "entry": {"anyOf": [_ref("schemas", "CacheEntry"), {"type": "null"}]},
        "nearest": {"type": ["object", "null"], "description": "The recent entry that is most like it, and how it differs."},
    }
    distribution = {
        **{name: {"type": ["number", "null"]} for name in ("p10", "p50", "p90", "p99")},
        "histogram": _array(_array(whole) | {"description": "Where a bucket begins, where it ends, how many are in it."}),
    }
    profiled = {
        "model": text,
        **dict.fromkeys(("recordings", "timed"), whole),
        **dict.fromkeys(("ttft_us", "gaps_us"), _object(distribution, *distribution)),
        "fitted": {"type": "object", "description": "The keys of a profile of a simulated upstream that behaves alike."},
    }
    report = {
        "process": text,
        **dict.fromkeys(("at", "began_at"), number),
        "open": whole | {"description": "Streams that were being written then."},
        "counts": {"type": "object", "additionalProperties": whole},
        "measured": {
            "type": "object",
            "description": "Histograms, as the numbers of their buckets and how many are in each.",
            "additionalProperties": _array(_array(whole)),
        },
    }
    live = {"object": {"const": "cache.live"}, "at": number, "reports": _array(_object(report, *report))}
    profile = {
        "object": {"const": "cache.profile"},
        **dict.fromkeys(("scanned", "recordings"), whole),
        "complete": {"type": "boolean", "description": "Whether every recording that fits was looked at."},
        "models": _array(_object(profiled, *profiled)),
    }
    listing = {"object": {"const": "list"}, "data": _array(_ref("schemas", "CacheEntry")), "cursor": text, "scanned": whole}
    parts = {"timing": timing, "stream": texts, "body": {}, "request": {}, "samples": texts, "stored_bytes": whole}
    error = _object({"line": whole, "message": text}, "line", "message")
    taken = {**dict.fromkeys(("imported", "kept", "expired", "purged", "failed"), whole), "errors": _array(error)}
    explain = {"api": {"enum": ["chat", "completions"]}, "headers": {"type": "object", "additionalProperties": text}}
    explain["request"] = {"anyOf": [_ref("schemas", "ChatCompletionRequest"), _ref("schemas", "CompletionRequest")]}
    return {
        "CacheEntry": _object(entry, *entry),
        "CacheEntries": _object(listing, *listing),
        "CacheEntryParts": {"allOf": [_ref("schemas", "CacheEntry"), _object(parts, *parts)]},
        "Purge": _object(selectors) | {"additionalProperties": False, "minProperties": 1},
        "Purged": _object({"object": {"const": "cache.purge"}, **purged}, *purged),
        "CacheStats": _object(
            {
                "object": {"const": "cache.stats"},
                "since": {"type": ["number", "null"]},
                "total": {"type": "object"},
                "models": _array({"type": "object"}),
                "stored": {"type": "object"},
            },
            *("object", "since", "total", "models"),
        ),
        "Imported": _object({"object": {"const": "cache.import"}, **taken}, *taken),
        "CacheLive": _object(live, *live),
        "CacheProfile": _object(profile, *profile),
        "Explain": _object(explain, "request") | {"additionalProperties": False},
        "Explanation": _object({"object": {"const": "cache.explanation"}, **explained}, *explained),
    }


# Bodies


def _schemas() -> Json:
    return {
        "ChatCompletionRequest": _request({"messages": _array(_ref("schemas", "Message"))}, "messages"),
        "Message": _object({"role": _string("Whose message it is."), "content": {}}),
        "CompletionRequest": _request({"prompt": _prompt()}),
        "ChatCompletion": _answer("chat.completion", "message"),
        "ChatCompletionChunk": _answer("chat.completion.chunk", "delta"),
        "Completion": _answer("text_completion", "text"),
        "CompletionChunk": _answer("text_completion", "text"),
        "Usage": _object({f"{kind}_tokens": {"type": "integer"} for kind in ("prompt", "completion", "total")}),
        "Model": _object({"id": {"type": "string"}, "object": {"const": "model"}}, "id", "object"),
        "ModelList": _object({"object": {"const": "list"}, "data": _array(_ref("schemas", "Model"))}, "object", "data"),
        "Cancelled": _object({"id": {"type": "string"}, "cancelled": {"const": True}}, "id", "cancelled"),
        "StreamStatus": _object(
            {
                "id": {"type": "string"},
                "object": {"const": "stream"},
                "state": {"enum": ["running", "complete", "failed", "abandoned", "orphaned"]},
                "frames": {"type": "integer", "minimum": 0},
                "age_s": {"type": "number", "minimum": 0},
                "readers": {"type": "integer", "minimum": 0, "description": "In all replicas."},
                "cancelled": {"type": "boolean", "description": "Whether this reader was cancelled."},
                "error": _ref("schemas", "ErrorObject"),
            },
            *("id", "object", "state", "frames", "age_s", "readers", "cancelled"),
        ),
        "Health": _object({"status": {"const": "ok"}, "store": {"enum": ["ok", "unavailable"]}}, "status"),
        "Readiness": _object(
            {"status": {"enum": ["ready", "draining"]}, "store": {"enum": ["ok", "unavailable"]}}, "status", "store"
        ),
        "Error": _object({"error": _ref("schemas", "ErrorObject")}, "error"),
        "ErrorObject": _object(
            {
                "message": _string("What went wrong."),
                "type": {"type": ["string", "null"], "description": "Whose fault it is."},
                "param": {"type": ["string", "null"], "description": "The member of the request that is at fault."},
                "code": {"type": ["string", "integer", "null"], "description": "A word for the failure."},
                "key": _string("With `not_recorded`: what the recording would be stored under."),
                "nearest": {
                    "type": ["object", "null"],
                    "description": "With it: the recording that is most like it.",
                },
            },
            "message",
        ),
        "AnyObject": {"type": "object"},
    }


def _request(members: Json, *required: str) -> Json:
    """What the gateway reads itself is typed; every other member goes to the model as it is."""
    common = {
        "model": _string("Decides which upstream is asked.", minLength=1),
        "stream": _or_null("boolean", "Whether the answer comes as events. The same recording serves both."),
        "stream_options": _or_null("object", "`include_usage` adds an event with the usage at the end."),
        "n": _or_null("integer", "How many choices.", minimum=1),
    }
    return _object(common | members, "model", *required)


def _prompt() -> Json:
    tokens = _array({"type": "integer"})
    forms = [{"type": "string"}, _array({"type": "string"}), tokens, _array(tokens), {"type": "null"}]
    return {"description": "A text or its tokens, or a list of either.", "anyOf": forms}


def _answer(kind: str, content: str) -> Json:
    choice = _object({"index": {"type": "integer"}, content: {}, "finish_reason": {"type": ["string", "null"]}})
    return _object(
        {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": _array(choice),
            "usage": {"anyOf": [_ref("schemas", "Usage"), {"type": "null"}]},
        }
    )


def _events(chunk: str) -> Json:
    text = (
        f"Server-sent events: the data of each is a {chunk}, and of the last one `[DONE]`. Comments keep the connection "
        "alive. After a failure the last event is an Error, and no `[DONE]` follows."
    )
    # No type: some tools take it for that of a whole stream, others for that of an event.
    return {"text/event-stream": {"schema": {"description": text}}}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


# Errors, headers, parameters


def _errors(*statuses: int) -> Json:
    return {str(status): _ref("responses", str(status)) for status in statuses}


def _error(text: str, *headers: str) -> Json:
    return {
        "description": text,
        "headers": _header_refs("Cache-Status", "X-Request-Id", *headers),
        "content": _json(_ref("schemas", "Error")),
    }


def _refusal() -> Json:
    found = _error("The upstream's own refusal, with its status, body and `Retry-After`.", "Retry-After")
    return found | {"content": {**found["content"], "*/*": {}}}


def _also(status: int) -> list[str]:
    """The headers that go with some statuses only."""
    return {405: ["Allow"], 429: ["Retry-After"], 503: ["Retry-After"]}.get(status, [])


def _headers() -> Json:
    texts = {
        "Cache-Status": "What the cache did (RFC 9211): `gateway; hit; ttl=60`, `gateway; fwd=miss; collapsed`.",
        "X-Request-Id": "The caller's, if it sent a sane one; else the upstream's, or a new one.",
        "Cache-Control": "For caches on the way: what is stored here may be kept as long, for this caller; all else is not.",
        "Gateway-Stream-Id": "By which a stream that was cut can be resumed; on a resumed one, by which it can be again.",
        "Gateway-Upstream": "Which configured upstream has answered, where the request was forwarded.",
        "Gateway-Simulated": "`?1`: in replay mode the simulated model has answered what is not recorded.",
        "Gateway-Fault": "The fault on demand that befalls this answer, and after how many events.",
        "Allow": "The methods of this path.",
        "Retry-After": "The upstream's, or when to come back to what was full.",
    }
    age = {"description": "On a hit, the answer's age in seconds (RFC 9111).", "schema": {"type": "integer", "minimum": 0}}
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in texts.items()} | {"Age": age}


def _parameters() -> Json:
    cache_control = (
        "RFC 9111: `no-cache` asks the model and replaces what is stored, `no-store` touches nothing, `max-age`, "
        "`min-fresh` and `max-stale` bound what will do, `only-if-cached` never asks the model; RFC 5861: `stale-if-error`."
    )
    ttl = "For how many seconds the answer stays fresh (RFC 9651 Item: Integer or Decimal); 0: it is not stored."
    namespace = "Whose answers to share (RFC 9651 Item: String or Token), in the place of the caller's own."
    tags = "By what the answer can be purged (RFC 9651 List of Strings or Tokens)."
    replay = (
        "How a hit is timed, in the place of what is configured (RFC 9651 Dictionary): `instant`; `recorded;speed=2`; "
        "`rate=50` (tokens a second); `ttft=0.3;sd=0.1, itl=0.02;sd=0.005`; and `jitter=0.1`, `max_gap=2`, `seed=7`."
    )
    fault = (
        "What is to go wrong with the answer, where that is allowed (RFC 9651 Dictionary): `status=429;retry_after=2`, "
        "`slow=5`, `stall=30;after=3`, `cut;after=3`, `malformed`, `error`, each with `;rate=0.1`; and `seed=7`."
    )
    cursor = "`{id}.{n}`, as the `id` of an event says it: what follows is what came after it."
    return {
        "StreamId": _parameter("id", "path", _string("`Gateway-Stream-Id` of the answer.")),
        "LastEventId": _parameter("Last-Event-ID", "header", _string(cursor)),
        "After": _parameter(
            "after", "query", _string("How many events the caller has, where it counts them itself.", pattern="^[0-9]{1,9}$")
        ),
        "EventIds": _parameter("Gateway-Event-Ids", "header", _string("`?1`: each event of the stream has an `id`.")),
        "CacheControl": _parameter("Cache-Control", "header", _string(cache_control)),
        "CacheTtl": _parameter("Gateway-Cache-TTL", "header", _string(ttl, pattern=_SF_SECONDS)),
        "CacheNamespace": _parameter("Gateway-Cache-Namespace", "header", _string(namespace, pattern=f"^{_SF_NAME}$")),
        "CacheTags": _parameter(
            "Gateway-Cache-Tags", "header", _string(tags, pattern=f"^({_SF_NAME}([ \\t]*,[ \\t]*{_SF_NAME}){{0,15}})?$")
        ),
        "Replay": _parameter("Gateway-Replay", "header", _string(replay, pattern=_SF_REPLAY)),
        "Fault": _parameter("Gateway-Fault", "header", _string(fault, pattern=_SF_FAULT)),
        "RequestId": _parameter("X-Request-Id", "header", _string("Names the request in logs and in the answer.")),
    }


def _parameter(name: str, where: str, schema: Json) -> Json:
    return {"name": name, "in": where, "required": where == "path", "schema": schema}


# Small schemas


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def _header_refs(*names: str) -> Json:
    return {name: _ref("headers", name) for name in names}


def _object(properties: Json, *required: str) -> Json:
    found = {"type": "object", "properties": properties, "additionalProperties": True}
    return found | ({"required": list(required)} if required else {})


def _array(items: Json) -> Json:
    return {"type": "array", "items": items}


def _string(text: str, **rules: Any) -> Json:
    return {"type": "string", "description": text, **rules}


def _or_null(kind: str, text: str, **rules: Any) -> Json:
    return {"type": [kind, "null"], "description": text, **rules}

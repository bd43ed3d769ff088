"""What is served below ``/admin/``, in the document's words."""

from gateway.http.openapi.parts import (
    NUMBER,
    TEXT,
    WHOLE,
    Json,
    array_of,
    error,
    error_refs,
    json_content,
    object_of,
    operation,
    or_null,
    parameter,
    schema_ref,
    string,
    whole_object_of,
)

_KEY = "^[0-9a-f]{40}$"
_TEXTS = array_of(TEXT)
_FLAG: Json = {"type": "boolean"}
_ENTRIES_QUERY: dict[str, Json] = {
    "namespace": string("Only entries of this namespace."),
    "model": string("Only entries of this model: a name, a pattern (`gpt-*`) or an alias."),
    "tag": string("Only entries with this tag."),
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
    "cursor": string("The `cursor` of the answer before.", pattern="^[0-9]{0,19}$"),
}
_PROFILED_QUERY = {
    **{name: _ENTRIES_QUERY[name] for name in ("namespace", "model", "tag", "min_age_s", "max_age_s")},
    "limit": _ENTRIES_QUERY["limit"] | {"default": 1000, "description": "How many."},
}
_EXPORTED_QUERY = {name: schema for name, schema in _ENTRIES_QUERY.items() if name not in ("limit", "cursor")}


def add_to(document: Json) -> None:
    """Adds the administration to a document of the API."""
    components = document["components"]
    document["paths"] |= _paths()
    components["schemas"] |= _entry_schemas() | _purge_schemas() | _explain_schemas() | _count_schemas()
    components["responses"]["401"] = error("The admin key is missing or wrong.", "WWW-Authenticate")
    components["headers"]["WWW-Authenticate"] = {"description": "`Bearer`.", "schema": {"const": "Bearer"}}
    components["securitySchemes"]["admin"] = {
        "type": "http",
        "scheme": "bearer",
        "description": "The admin key, which no caller of `/v1` has.",
    }


# Operations


def _paths() -> Json:
    part = parameter("part", "query", {"enum": ["body", "stream", "timing", "request"], "description": "Only this."})
    scan = parameter("scan", "query", _FLAG | {"description": "Look at every entry, too."})
    found = _administered("getEntry", "One entry with all that is known of it.", "CacheEntryParts", part, errors=(404, 503))
    found["responses"]["200"]["content"] |= {"text/event-stream": {"schema": TEXT}}
    entries = _administered("listEntries", "What is stored.", "CacheEntries", *_query(_ENTRIES_QUERY))
    purge_entry = _administered("purgeEntry", "Deletes an entry with all its samples.", "Purged", errors=(404, 503))
    purge = _administered("purge", "Deletes the entries that fit all that is named.", "Purged", body="Purge")
    stats = _administered("stats", "How requests were answered, and what that saved.", "CacheStats", scan)
    live = _administered("live", "What each process has counted since it began.", "CacheLive", errors=())
    profile = _administered("profile", "How fast the models of recordings are.", "CacheProfile", *_query(_PROFILED_QUERY))
    explain = _administered(
        "explain", "Why a request is or is not answered.", "Explanation", body="Explain", errors=(404, 503)
    )
    return {
        "/admin/": {"get": _administered("administration", "What is served here.", "AnyObject")},
        "/admin/entries": {"get": entries},
        "/admin/entries/{key}": {
            "parameters": [parameter("key", "path", TEXT | {"pattern": _KEY})],
            "get": found,
            "delete": _reported(purge_entry),
        },
        "/admin/purge": {"post": _reported(purge)},
        "/admin/stats": {"get": _reported(stats)},
        "/admin/live": {"get": live},
        "/admin/profile": {"get": _reported(profile)},
        "/admin/explain": {"post": explain},
        "/admin/recordings": _recordings(),
    }


def _recordings() -> Json:
    lines = {"application/x-ndjson": {"schema": string("Lines of JSON, a recording each.")}}
    summary = "Recordings, in no order, each at least once."
    out = _administered("exportRecordings", summary, "AnyObject", *_query(_EXPORTED_QUERY))
    out["responses"]["200"]["content"] = lines
    into = _administered(
        "importRecordings",
        "Takes recordings in, each under the key that its request has here.",
        "Imported",
        parameter("ttl_s", "query", {"type": "number", "minimum": 0, "description": "For how long they are fresh."}),
        parameter("everyone", "query", _FLAG | {"description": "They are for all callers, whosever they were."}),
        parameter("Gateway-Caller-Authorization", "header", string("The `Authorization` of the caller they are for.")),
    )
    into["requestBody"] = {"required": True, "content": lines}
    return {"get": out, "post": into}


def _query(schemas: dict[str, Json]) -> list[Json]:
    return [parameter(name, "query", schema) for name, schema in schemas.items()]


def _administered(
    name: str, summary: str, answer: str, *parameters: Json, body: str = "", errors: tuple[int, ...] = (503,)
) -> Json:
    found = operation(name, summary, answer, 400, 401, 405, *errors)
    found["security"] = [{"admin": []}]
    found["parameters"] += parameters
    if body:
        found["requestBody"] = {"required": True, "content": json_content(schema_ref(body))}
        found["responses"] |= error_refs(413, 415)
    return found


def _reported(operation: Json) -> Json:
    """The same, with lines that say how far it is for a caller who accepts them."""
    text = "Lines of JSON: `{object: progress, scanned, purged}` as it goes on, the result (or an Error) last."
    operation["responses"]["200"]["content"]["application/x-ndjson"] = {"schema": string(text)}
    return operation


# Bodies


def _entry_schemas() -> Json:
    entry = {
        "key": TEXT,
        "state": {"enum": ["fresh", "stale", "replaced", "purged"]},
        **dict.fromkeys(("api", "upstream", "model", "owner", "namespace", "id", "flight", "sample_of"), TEXT),
        "tags": _TEXTS,
        **dict.fromkeys(("written_at", "age_s", "ttl_s"), NUMBER),
        "life_s": or_null("number", "Until the store lets go of it."),
        **dict.fromkeys(("size_bytes", "frames", "duration_us"), WHOLE),
        "finish_reasons": _TEXTS,
        "usage": {"type": ["object", "null"]},
    }
    timing = {
        "ttft_us": {"type": ["integer", "null"]},
        "duration_us": WHOLE,
        "gaps_us": {"type": "object"},
        "at_us": array_of(WHOLE),
    }
    parts = {
        "timing": object_of(timing),
        "stream": _TEXTS,
        "body": {},
        "request": {},
        "samples": _TEXTS,
        "stored_bytes": WHOLE,
    }
    problem = whole_object_of({"line": WHOLE, "message": TEXT})
    counts = dict.fromkeys(("imported", "kept", "expired", "purged", "failed"), WHOLE)
    return {
        "CacheEntry": whole_object_of(entry),
        "CacheEntries": _result("list", data=array_of(schema_ref("CacheEntry")), cursor=TEXT, scanned=WHOLE),
        "CacheEntryParts": {"allOf": [schema_ref("CacheEntry"), whole_object_of(parts)]},
        "Imported": _result("cache.import", **counts, errors=array_of(problem)),
    }


def _purge_schemas() -> Json:
    selectors = {
        "key": string("An entry with all its samples.", pattern=_KEY),
        "id": string("A response's id, that of a hit too.", minLength=1),
        "stream": string("A `Gateway-Stream-Id`.", minLength=1),
        "namespace": string("What is in it.", minLength=1),
        "model": string("A name, a pattern or an alias.", minLength=1),
        "tag": string("What has it.", minLength=1),
        "all": _FLAG | {"description": "Everything: goes with no selector."},
        "dry_run": _FLAG | {"description": "Only counts."},
    }
    return {
        "Purge": object_of(selectors) | {"additionalProperties": False, "minProperties": 1},
        "Purged": _result("cache.purge", dry_run=_FLAG, marked=_FLAG, scanned=WHOLE, purged=WHOLE, message=TEXT),
    }


def _explain_schemas() -> Json:
    explain = {
        "api": {"enum": ["chat", "completions"]},
        "headers": {"type": "object", "additionalProperties": TEXT},
        "request": {"anyOf": [schema_ref("ChatCompletionRequest"), schema_ref("CompletionRequest")]},
    }
    explained = {
        **dict.fromkeys(("api", "key", "upstream", "model", "namespace", "why_not"), TEXT),
        "owner": {"enum": ["shared", "tenant", "namespace"]},
        "canonical": {"type": "object"},
        "left_out": _TEXTS,
        "samples_wanted": WHOLE,
        "samples": _TEXTS,
        "entry": {"anyOf": [schema_ref("CacheEntry"), {"type": "null"}]},
        "nearest": or_null("object", "The recent entry that is most like it, and how it differs."),
    }
    return {
        "Explain": object_of(explain, "request") | {"additionalProperties": False},
        "Explanation": _result("cache.explanation", **explained),
    }


def _count_schemas() -> Json:
    """Of what is counted and measured: over all time, by each process, of each model."""
    stats = {
        "object": {"const": "cache.stats"},
        "since": {"type": ["number", "null"]},
        "total": {"type": "object"},
        "models": array_of({"type": "object"}),
        "stored": {"type": "object"},
    }
    report = {
        "process": TEXT,
        **dict.fromkeys(("at", "began_at"), NUMBER),
        "open": WHOLE | {"description": "Streams that were being written then."},
        "counts": {"type": "object", "additionalProperties": WHOLE},
        "measured": {
            "type": "object",
            "description": "Histograms, as the numbers of their buckets and how many are in each.",
            "additionalProperties": array_of(array_of(WHOLE)),
        },
    }
    bucket = array_of(WHOLE) | {"description": "Where a bucket begins, where it ends, how many are in it."}
    distribution = {
        **{name: {"type": ["number", "null"]} for name in ("p10", "p50", "p90", "p99")},
        "histogram": array_of(bucket),
    }
    model = {
        "model": TEXT,
        **dict.fromkeys(("recordings", "timed"), WHOLE),
        **dict.fromkeys(("ttft_us", "gaps_us"), whole_object_of(distribution)),
        "fitted": {"type": "object", "description": "The keys of a profile of a simulated upstream that behaves alike."},
    }
    profile = {
        **dict.fromkeys(("scanned", "recordings"), WHOLE),
        "complete": _FLAG | {"description": "Whether every recording that fits was looked at."},
        "models": array_of(whole_object_of(model)),
    }
    return {
        "CacheStats": object_of(stats, "object", "since", "total", "models"),
        "CacheLive": _result("cache.live", at=NUMBER, reports=array_of(whole_object_of(report))),
        "CacheProfile": _result("cache.profile", **profile),
    }


def _result(kind: str, **members: Json) -> Json:
    """What a call comes to: an object that names its kind, none of whose members is ever missing."""
    return whole_object_of({"object": {"const": kind}, **members})

"""What operations refer to: the bodies, headers, parameters and refusals of the API."""

from gateway.http.openapi.parts import (
    TEXT,
    WHOLE,
    Json,
    array_of,
    error,
    object_of,
    or_null,
    parameter,
    schema_ref,
    string,
    whole_object_of,
)

STATUSES = {
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


# Of what RFC 9651 allows, the simple forms: no parameters, no escapes.
_SF_SECONDS = r"^[0-9]{1,12}(\.[0-9]{1,3})?$"
_SF_NAME = r"([A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]{0,127}|\"[ !#-\[\]-~]{1,128}\")"
_SF_REPLAY = (
    r"^((instant|recorded(;speed=[1-9][0-9]{0,3})?|rate=[1-9][0-9]{0,6})(, jitter=0\.[0-9])?(, seed=-?[0-9]{1,9})?)?$"
)
_SF_FAULT = r"^(status=[45][0-9]{2}|cut|malformed|error);rate=0(\.[0-9])?(, seed=-?[0-9]{1,9})?$"


def components() -> Json:
    return {
        "schemas": _schemas(),
        "headers": _headers(),
        "parameters": _parameters(),
        "responses": {str(status): error(text, *_also(status)) for status, text in STATUSES.items()},
        "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
    }


def _schemas() -> Json:
    return {
        "ChatCompletionRequest": _request({"messages": array_of(schema_ref("Message"))}, "messages"),
        "Message": object_of({"role": string("Whose message it is."), "content": {}}),
        "CompletionRequest": _request({"prompt": _prompt()}),
        "ChatCompletion": _answer("chat.completion", "message"),
        "ChatCompletionChunk": _answer("chat.completion.chunk", "delta"),
        "Completion": _answer("text_completion", "text"),
        "CompletionChunk": _answer("text_completion", "text"),
        "Usage": object_of({f"{kind}_tokens": WHOLE for kind in ("prompt", "completion", "total")}),
        "Model": whole_object_of({"id": TEXT, "object": {"const": "model"}}),
        "ModelList": whole_object_of({"object": {"const": "list"}, "data": array_of(schema_ref("Model"))}),
        "Cancelled": whole_object_of({"id": TEXT, "cancelled": {"const": True}}),
        "StreamStatus": object_of(
            {
                "id": TEXT,
                "object": {"const": "stream"},
                "state": {"enum": ["running", "complete", "failed", "abandoned", "orphaned"]},
                "frames": {"type": "integer", "minimum": 0},
                "age_s": {"type": "number", "minimum": 0},
                "readers": {"type": "integer", "minimum": 0, "description": "In all replicas."},
                "cancelled": {"type": "boolean", "description": "Whether this reader was cancelled."},
                "error": schema_ref("ErrorObject"),
            },
            *("id", "object", "state", "frames", "age_s", "readers", "cancelled"),
        ),
        "Health": object_of({"status": {"const": "ok"}, "store": {"enum": ["ok", "unavailable"]}}, "status"),
        "Readiness": whole_object_of({"status": {"enum": ["ready", "draining"]}, "store": {"enum": ["ok", "unavailable"]}}),
        "Error": whole_object_of({"error": schema_ref("ErrorObject")}),
        "ErrorObject": object_of(
            {
                "message": string("What went wrong."),
                "type": {"type": ["string", "null"], "description": "Whose fault it is."},
                "param": {"type": ["string", "null"], "description": "The member of the request that is at fault."},
                "code": {"type": ["string", "integer", "null"], "description": "A word for the failure."},
                "key": string("With `not_recorded`: what the recording would be stored under."),
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
        "model": string("Decides which upstream is asked.", minLength=1),
        "stream": or_null("boolean", "Whether the answer comes as events. The same recording serves both."),
        "stream_options": or_null("object", "`include_usage` adds an event with the usage at the end."),
        "n": or_null("integer", "How many choices.", minimum=1),
    }
    return object_of(common | members, "model", *required)


def _prompt() -> Json:
    tokens = array_of(WHOLE)
    forms = [TEXT, array_of(TEXT), tokens, array_of(tokens), {"type": "null"}]
    return {"description": "A text or its tokens, or a list of either.", "anyOf": forms}


def _answer(kind: str, content: str) -> Json:
    choice = object_of({"index": WHOLE, content: {}, "finish_reason": {"type": ["string", "null"]}})
    return object_of(
        {
            "id": TEXT,
            "object": {"const": kind},
            "created": WHOLE,
            "model": TEXT,
            "choices": array_of(choice),
            "usage": {"anyOf": [schema_ref("Usage"), {"type": "null"}]},
        }
    )


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
    return {name: {"description": text, "schema": TEXT} for name, text in texts.items()} | {"Age": age}


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
        "StreamId": parameter("id", "path", string("`Gateway-Stream-Id` of the answer.")),
        "LastEventId": parameter("Last-Event-ID", "header", string(cursor)),
        "After": parameter(
            "after", "query", string("How many events the caller has, where it counts them itself.", pattern="^[0-9]{1,9}$")
        ),
        "EventIds": parameter("Gateway-Event-Ids", "header", string("`?1`: each event of the stream has an `id`.")),
        "CacheControl": parameter("Cache-Control", "header", string(cache_control)),
        "CacheTtl": parameter("Gateway-Cache-TTL", "header", string(ttl, pattern=_SF_SECONDS)),
        "CacheNamespace": parameter("Gateway-Cache-Namespace", "header", string(namespace, pattern=f"^{_SF_NAME}$")),
        "CacheTags": parameter(
            "Gateway-Cache-Tags", "header", string(tags, pattern=f"^({_SF_NAME}([ \\t]*,[ \\t]*{_SF_NAME}){{0,15}})?$")
        ),
        "Replay": parameter("Gateway-Replay", "header", string(replay, pattern=_SF_REPLAY)),
        "Fault": parameter("Gateway-Fault", "header", string(fault, pattern=_SF_FAULT)),
        "RequestId": parameter("X-Request-Id", "header", string("Names the request in logs and in the answer.")),
    }

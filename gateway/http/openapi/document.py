"""The document itself: which operations there are, and what each takes and answers."""

from collections.abc import Iterable
from typing import Literal

from gateway.http.openapi import administration
from gateway.http.openapi.components import STATUSES, components
from gateway.http.openapi.parts import (
    TEXT,
    Json,
    error,
    error_refs,
    header_refs,
    json_content,
    operation,
    parameter,
    ref,
    schema_ref,
    string,
)

MetricsKind = Literal["", "open", "guarded"]
"""Whether ``/metrics`` is served, and whether it needs the admin key."""

_OF_OPERATORS = ("/healthz", "/health", "/readyz", "/metrics", "/openapi.json")
_ANSWER_PARAMETERS = ("CacheControl", "CacheTtl", "CacheNamespace", "CacheTags", "EventIds", "Replay", "Fault", "RequestId")


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
        administration.add_to(document)
    return document


def operators_document(version: str, *, admin: bool, metrics: MetricsKind) -> Json:
    """What is served at ``[admin] listen``."""
    whole = document(version, (), admin=admin, metrics=metrics)
    paths = {path: item for path, item in whole["paths"].items() if path in _OF_OPERATORS or path.startswith("/admin/")}
    return whole | {"paths": paths, "security": [{}]}


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
            "/v1/models": {"get": operation("listModels", "The models that can be asked.", "ModelList", 405)},
            "/v1/models/{model}": {
                "parameters": [parameter("model", "path", string("The model's name."))],
                "get": operation("retrieveModel", "One of the models.", "Model", 404),
            },
            "/v1/streams/{id}": {"parameters": [ref("parameters", "StreamId")], "get": _resumed()},
            "/v1/streams/{id}/cancel": {
                "parameters": [ref("parameters", "StreamId")],
                "post": operation("cancelStream", "Ends this reader of a stream for good.", "Cancelled", 404, 405, 503),
            },
            "/v1/streams/{id}/status": {
                "parameters": [ref("parameters", "StreamId")],
                "get": operation("streamStatus", "What has become of a stream.", "StreamStatus", 404, 405, 503),
            },
            **{f"/v1/{path}": {"post": _relayed(path)} for path in relay_paths},
            "/healthz": {"get": operation("health", "The process is up.", "Health", 405)},
            "/health": {"get": operation("vllmHealth", "The same, at the path of vLLM's server.", "Health", 405)},
            "/readyz": {"get": _readiness()},
            "/openapi.json": {"get": operation("openapi", "This document.", "AnyObject", 405)},
            "/": {"get": _text("root", "What this is, in a few words.")},
        },
        "components": components(),
    }


def _answered(operation_id: str, name: str) -> Json:
    """An operation whose answers are recorded and replayed."""
    return {
        "operationId": operation_id,
        "summary": "Answered from the cache, from an answer that is under way, or by the model.",
        "description": "`QUERY` (RFC 10008), which OpenAPI 3.1 cannot describe, is served in the same way.",
        "parameters": [ref("parameters", name) for name in _ANSWER_PARAMETERS],
        "requestBody": {"required": True, "content": json_content(schema_ref(f"{name}Request"))},
        "responses": {
            "200": {
                "description": "The answer: a stream of events where `stream` is true, else one object.",
                "headers": header_refs(
                    *("Cache-Status", "Age", "Cache-Control", "Gateway-Stream-Id", "Gateway-Upstream", "Gateway-Simulated"),
                    *("Gateway-Fault", "X-Request-Id"),
                ),
                "content": json_content(schema_ref(name)) | _events(f"{name}Chunk"),
            },
            **error_refs(*STATUSES),
            "default": _refusal(),
        },
    }


def _resumed() -> Json:
    return {
        "operationId": "resumeStream",
        "summary": "What comes after the last event that the caller has, from any replica.",
        "parameters": [ref("parameters", name) for name in ("LastEventId", "After", "RequestId")],
        "responses": {
            "200": {
                "description": "The rest of the stream: live, or at once if it has ended.",
                "headers": header_refs("Cache-Status", "Age", "Gateway-Stream-Id", "X-Request-Id"),
                "content": _events("chunk of the stream's kind"),
            },
            "204": {
                "description": "Nothing comes after it, or the stream was cancelled.",
                "headers": header_refs("X-Request-Id"),
            },
            **error_refs(400, 404, 405, 429, 502, 503, 504),
            "default": _refusal(),
        },
    }


def _relayed(path: str) -> Json:
    return {
        "operationId": f"relay_{path.replace('/', '_')}",
        "summary": "Passed on to the upstream as it is, never cached.",
        "parameters": [ref("parameters", "RequestId")],
        "requestBody": {"required": True, "content": {"*/*": {}}},
        "responses": {
            **error_refs(400, 404, 413, 429, 502, 503, 504),
            "default": {
                "description": "The upstream's answer, whatever its status and type.",
                "headers": header_refs("Cache-Status", "X-Request-Id"),
                "content": {"*/*": {}},
            },
        },
    }


def _metrics(kind: MetricsKind) -> Json:
    found = _text("metrics", "Metrics in Prometheus' text format, or in OpenMetrics'.")
    found["responses"]["200"]["content"]["application/openmetrics-text"] = {"schema": TEXT}
    if kind == "guarded":
        found["security"] = [{"admin": []}]
        found["responses"] |= error_refs(401)
    return found


def _readiness() -> Json:
    """Not ready is said in the same words as ready."""
    found = operation("readiness", "The process wants requests. It can serve them without the store.", "Readiness", 405)
    draining = {**found["responses"]["200"], "description": "The process is ending: send requests to another one."}
    found["responses"]["503"] = draining
    return found


def _text(name: str, summary: str) -> Json:
    found = operation(name, summary, "AnyObject", 405)
    found["responses"]["200"]["content"] = {"text/plain": {"schema": TEXT}}
    return found


def _events(chunk: str) -> Json:
    text = (
        f"Server-sent events: the data of each is a {chunk}, and of the last one `[DONE]`. Comments keep the connection "
        "alive. After a failure the last event is an Error, and no `[DONE]` follows."
    )
    # No type: some tools take it for that of a whole stream, others for that of an event.
    return {"text/event-stream": {"schema": {"description": text}}}


def _refusal() -> Json:
    found = error("The upstream's own refusal, with its status, body and `Retry-After`.", "Retry-After")
    return found | {"content": {**found["content"], "*/*": {}}}

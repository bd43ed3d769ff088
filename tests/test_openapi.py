"""The OpenAPI document is valid, and says of request bodies what the gateway does with them."""

import orjson
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from gateway.core.apis import CHAT, COMPLETIONS, RequestProblem
from gateway.core.faults import Fault
from gateway.errors import (
    BodyTooLarge,
    GatewayError,
    InjectedFault,
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    NotRecorded,
    TenantOverloaded,
    Unavailable,
    UnsupportedMediaType,
    UpstreamReported,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.http.openapi import document, operators_document

DOCUMENT = document("1.2.3")
MODEL = {"model": "m"}
CHAT_BODY = MODEL | {"messages": []}
COMMON = [
    {"model": ""}, {"model": None}, {"model": 1}, {"model": ["m"]},
    {"stream": True}, {"stream": False}, {"stream": None}, {"stream": 1}, {"stream": "true"},
    {"stream_options": {}}, {"stream_options": {"include_usage": True}}, {"stream_options": None}, {"stream_options": []},
    {"n": 1}, {"n": 3.0}, {"n": None}, {"n": 0}, {"n": -1}, {"n": 1.5}, {"n": "1"}, {"n": True}, {"n": [1]},
    {"unknown": {"deep": [1]}}, {"temperature": "hot"}, {"tools": 5},
]  # fmt: skip
MESSAGES = [
    None, [], "hi", {}, {"role": "user"}, [{}], [{"role": "user", "content": "hi"}], [{"role": "user", "content": [{}]}],
    [{"role": "user", "content": None, "x": 1}], ["hi"], [None], [{}, 1], [[]],
]  # fmt: skip
PROMPTS = [
    None, "", "hi", [], ["a", "b"], [1, 2], [[1, 2], [3]], [[]], ["a", 1], [1, [2]], [["a"]], [None], [True], [1.5],
    {}, 5, True, [{"a": 1}],
]  # fmt: skip
BODIES = [
    *[(CHAT, CHAT_BODY | body) for body in COMMON],
    *[(CHAT, MODEL | {"messages": messages}) for messages in MESSAGES],
    (CHAT, {}), (CHAT, MODEL), (CHAT, {"messages": []}),
    *[(COMPLETIONS, MODEL | {"prompt": "hi"} | body) for body in COMMON],
    *[(COMPLETIONS, MODEL | {"prompt": prompt}) for prompt in PROMPTS],
    (COMPLETIONS, {}), (COMPLETIONS, MODEL), (COMPLETIONS, {"prompt": "hi"}),
]  # fmt: skip


def schema(name, document=DOCUMENT):
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": document["components"]})


def accepts(api, body):
    try:
        api.validate(body)
    except RequestProblem:
        return False
    return True


def operations(document=DOCUMENT):
    for path, item in document["paths"].items():
        for method in item.keys() - {"parameters"}:
            yield f"{method.upper()} {path}", item[method]


def test_the_document_is_openapi_3_1():
    OpenAPIV31SpecValidator(orjson.loads(orjson.dumps(DOCUMENT))).validate()


def test_the_document_lists_what_is_served():
    assert sorted(name for name, _ in operations()) == [
        "GET /",
        "GET /health",
        "GET /healthz",
        "GET /openapi.json",
        "GET /readyz",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "GET /v1/streams/{id}",
        "GET /v1/streams/{id}/status",
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/embeddings",
        "POST /v1/moderations",
        "POST /v1/streams/{id}/cancel",
    ]


def test_the_document_names_the_version_and_the_configured_relays():
    changed = document("4.5.6", relay_paths=["audio/speech"])
    assert changed["info"]["version"] == "4.5.6"
    assert changed["paths"].keys() - DOCUMENT["paths"].keys() == {"/v1/audio/speech"}
    OpenAPIV31SpecValidator(changed).validate()


def test_the_administration_belongs_to_the_document_only_where_it_is_on():
    administered = document("1.2.3", admin=True)
    OpenAPIV31SpecValidator(orjson.loads(orjson.dumps(administered))).validate()
    added = {name: operation for name, operation in operations(administered) if name not in dict(operations())}
    assert sorted(added) == [
        "DELETE /admin/entries/{key}",
        "GET /admin/",
        "GET /admin/entries",
        "GET /admin/entries/{key}",
        "GET /admin/live",
        "GET /admin/profile",
        "GET /admin/recordings",
        "GET /admin/stats",
        "POST /admin/explain",
        "POST /admin/purge",
        "POST /admin/recordings",
    ]
    assert all(operation["security"] == [{"admin": []}] and "401" in operation["responses"] for operation in added.values())
    assert "admin" not in orjson.dumps(DOCUMENT).decode()


def test_metrics_belong_to_the_document_where_they_are_served_and_say_whether_they_need_the_key():
    for kind, security in (("open", None), ("guarded", [{"admin": []}])):
        found = document("1.2.3", admin=kind == "guarded", metrics=kind)
        OpenAPIV31SpecValidator(orjson.loads(orjson.dumps(found))).validate()
        operation = found["paths"]["/metrics"]["get"]
        assert operation.get("security") == security
        assert ("401" in operation["responses"]) is (security is not None)
    assert "/metrics" not in DOCUMENT["paths"]


@pytest.mark.parametrize("admin", [False, True])
def test_what_operators_are_served_elsewhere_has_a_document_of_its_own(admin):
    found = operators_document("1.2.3", admin=admin, metrics="open")
    OpenAPIV31SpecValidator(orjson.loads(orjson.dumps(found))).validate()
    assert {"/metrics", "/healthz", "/readyz"} <= found["paths"].keys()
    assert any(path.startswith("/admin/") for path in found["paths"]) is admin
    assert not any(path.startswith("/v1/") for path in found["paths"])


@pytest.mark.parametrize(("api", "body"), BODIES, ids=lambda value: getattr(value, "name", None) or repr(value))
def test_the_schemas_of_requests_agree_with_what_the_gateway_accepts(api, body):
    name = {"chat": "ChatCompletionRequest", "completions": "CompletionRequest"}[api.name]
    assert schema(name).is_valid(body) == accepts(api, body)


@pytest.mark.parametrize("api", [CHAT, COMPLETIONS], ids=lambda api: api.name)
def test_an_answered_operation_has_both_forms_their_headers_and_every_error_of_the_gateway(api):
    responses = DOCUMENT["paths"][f"/v1/{api.path}"]["post"]["responses"]
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert set(responses["200"]["headers"]) == {
        "Cache-Status",
        "Age",
        "Cache-Control",
        "Gateway-Stream-Id",
        "Gateway-Upstream",
        "Gateway-Simulated",
        "Gateway-Fault",
        "X-Request-Id",
    }
    faults = [InvalidRequest, ModelNotFound, MethodNotAllowed, BodyTooLarge, UnsupportedMediaType]
    faults += [TenantOverloaded, UpstreamUnreachable, Unavailable, UpstreamTimeout, NotRecorded]
    assert {*responses} == {"200", "default"} | {str(fault.status) for fault in faults}


ERRORS = [
    GatewayError("x"), InvalidRequest("x", param="n"), UpstreamReported({"code": 429}),
    NotRecorded("x", key="k", nearest={"key": "n"}), NotRecorded("x", key="k"), InjectedFault(Fault("error")),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_error_bodies_fit_their_schema(error):
    schema("Error").validate(error.body())

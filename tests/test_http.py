"""What HTTP callers see: statuses, headers, the timing of heads and frames, the cache's directives, and the relay."""

import asyncio
import gzip
import json
import re
import time

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from running import Got, next_block
from scripted import chunk, stream, whole_answer
from yarl import URL

CHAT, LEGACY = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
MODEL = {"model": "model-1"}
CHAT_BODY = {**MODEL, "messages": [{"role": "user", "content": "hi"}]}
LEGACY_BODY = {**MODEL, "prompt": "hi"}
REQUEST_ID = re.compile(r"req_[0-9a-f]{24}")

TOKEN = r"[A-Za-z*][\w!#$%&'*+.^`|~:/-]*"
PARAMETER = re.compile(rf';[ ]*([a-z*][a-z0-9_.*-]*)(?:=({TOKEN}|-?\d+|"(?:[^"\\]|\\["\\])*"))?')


def parsed(cache_status):
    """The parameters of a `Cache-Status` with one cache (RFC 9211), read as the structured field that it must be."""
    name = re.match(TOKEN, cache_status)
    assert name
    assert name[0] == "gateway"
    assert re.fullmatch(rf"(?:{PARAMETER.pattern})*", cache_status[name.end() :], re.ASCII), cache_status
    found = {key: value or True for key, value in PARAMETER.findall(cache_status[name.end() :])}
    assert found.keys() <= {"hit", "fwd", "fwd-status", "ttl", "collapsed", "stored", "detail"}
    return found


def assert_error(got, status, code=None, param=None, kind="invalid_request_error"):
    """The answer is OpenAI's error object, and has what every answer has."""
    assert (got.status, got.headers["Content-Type"].partition(";")[0]) == (status, "application/json")
    [(name, error)] = got.json.items()
    assert name == "error"
    assert {**error, "message": ""} == {"message": "", "type": kind, "param": param, "code": code}
    assert error["message"]
    assert got.headers["X-Request-Id"]
    assert parsed(got.cache_status)


async def ask(gateway, method, path, data=None, headers=None):
    url = URL(f"{gateway.origin}{path}", encoded=True)
    skipped = () if data is None or "Content-Type" in (headers or {}) else ("Content-Type",)
    request = gateway.session.request(
        method, url, data=data, headers=headers, skip_auto_headers=skipped, allow_redirects=False
    )
    async with request as response:
        return Got(response.status, response.headers, await response.read())


@pytest.fixture
async def gateway(start_gateway):
    return await start_gateway()


@pytest.fixture
async def keyed(start_gateway, upstream):
    """A gateway whose upstream has a key of its own."""
    return await start_gateway({"UPSTREAM_KEY": "sk-own"}, upstreams=[keyed_upstream(upstream)])


def keyed_upstream(upstream, **members):
    common = {"name": "scripted", "kind": "openai", "base_url": upstream.base_url, "models": ["*"]}
    return {**common, "api_key_env": "UPSTREAM_KEY", **members}


# Errors

BAD_JSON = {
    "nothing": b"",
    "cut off": b'{"model": "model-1", "messages": [',
    "not JSON": b"model=model-1",
    "invalid UTF-8": b'{"model": "model-1", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "NaN": b'{"model": "model-1", "messages": [], "temperature": NaN}',
    "infinity": b'{"model": "model-1", "messages": [], "temperature": Infinity}',
    "a lone surrogate": b'{"model": "model-1", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "nested without end": b'{"model": "model-1", "messages": ' + b"[" * 200_000,
    "an array": b"[]",
    "a string": b'"hi"',
    "null": b"null",
}


@pytest.mark.parametrize("path", [CHAT, LEGACY])
@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON.keys())
async def test_a_body_that_is_no_json_object_is_a_bad_request(gateway, upstream, path, body):
    assert_error(await ask(gateway, "POST", path, body, JSON), 400)
    assert not upstream.asked


@pytest.mark.parametrize("depth", [300, 1000])
async def test_a_body_nested_deeper_than_it_can_be_written_is_a_bad_request(gateway, depth):
    nested = b"[" * depth + b"]" * depth
    body = b'{"model": "model-1", "messages": [{"role": "user", "content": %s}]}' % nested
    assert_error(await ask(gateway, "POST", CHAT, body, JSON), 400, param="messages")


async def test_a_body_that_is_not_compressed_as_it_says_is_a_bad_request(gateway):
    got = await ask(gateway, "POST", CHAT, b"no gzip", {**JSON, "Content-Encoding": "gzip"})
    assert_error(got, 400)


async def test_a_compressed_body_is_read(gateway, upstream):
    body = gzip.compress(json.dumps(CHAT_BODY).encode())
    got = await ask(gateway, "POST", CHAT, body, {**JSON, "Content-Encoding": "gzip"})
    assert got.status == 200
    assert upstream.bodies[0]["messages"] == CHAT_BODY["messages"]


WRONG = [
    *[("model", value) for value in (None, "", 1, ["model-1"], {})],
    *[("stream", value) for value in (1, "true", [])],
    *[("n", value) for value in (0, -1, 1.5, "1", True, [1])],
]
WRONG_CHAT = [(CHAT, CHAT_BODY, *case) for case in [*WRONG, *[("messages", value) for value in (None, "hi", {}, 1)]]]
WRONG_LEGACY = [
    (LEGACY, LEGACY_BODY, *case) for case in [*WRONG, *[("prompt", value) for value in (5, {}, ["a", 1], [True])]]
]


@pytest.mark.parametrize(("path", "good", "name", "value"), WRONG_CHAT + WRONG_LEGACY)
async def test_a_member_of_a_wrong_type_is_a_bad_request_that_names_it(gateway, upstream, path, good, name, value):
    assert_error(await gateway.post(path, {**good, name: value}), 400, param=name)
    assert not upstream.asked


async def test_a_message_that_is_no_object_is_named_by_its_place(gateway):
    got = await gateway.post(CHAT, {**MODEL, "messages": [{"role": "user"}, "hi"]})
    assert_error(got, 400, param="messages[1]")


@pytest.mark.parametrize("path", [CHAT, LEGACY, "/v1/embeddings"])
async def test_an_unknown_model_is_not_found(start_gateway, upstream, path):
    upstreams = [{"name": "scripted", "kind": "openai", "base_url": upstream.base_url, "models": ["model-*"]}]
    gateway = await start_gateway(upstreams=upstreams)
    assert_error(await gateway.post(path, {**CHAT_BODY, "prompt": "", "model": "other"}), 404, "model_not_found", "model")
    assert not upstream.asked


UNKNOWN = [
    "GET /nothing",
    "GET /v1",
    "POST /v2/chat/completions",
    "POST /v1/files",
    "GET /v1/",
    "POST /v1/chat/completions/",
]


@pytest.mark.parametrize("line", UNKNOWN)
async def test_an_unknown_path_is_not_found(keyed, upstream, line):
    assert_error(await ask(keyed, *line.split()), 404, "unknown_url")
    assert not upstream.asked


WRONG_METHODS = {
    **dict.fromkeys([f"GET {CHAT}", f"DELETE {CHAT}", f"PUT {LEGACY}"], "POST, QUERY"),
    **dict.fromkeys(["POST /v1/models", "POST /v1/models/model-1", "POST /healthz", "PUT /"], "GET, HEAD"),
}


@pytest.mark.parametrize(("line", "allowed"), WRONG_METHODS.items())
async def test_a_wrong_method_is_refused_with_those_that_are_allowed(keyed, upstream, line, allowed):
    got = await ask(keyed, *line.split())
    assert_error(got, 405, "method_not_allowed")
    assert got.headers["Allow"] == allowed
    assert not upstream.asked


async def test_paths_of_the_gateways_own_are_never_relayed_whatever_the_credential(gateway, upstream):
    got = await ask(gateway, "DELETE", CHAT)
    assert_error(got, 405, "method_not_allowed")
    assert got.headers["Allow"] == "POST, QUERY"
    assert got.headers["Accept-Query"] == '"application/json"'
    assert not upstream.asked


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "json"]
)
async def test_another_content_type_than_json_is_refused(gateway, kind):
    got = await ask(gateway, "POST", CHAT, json.dumps(CHAT_BODY).encode(), {"Content-Type": kind})
    assert_error(got, 415, "unsupported_media_type")


@pytest.mark.parametrize("kind", [None, "application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"])
async def test_json_by_any_name_or_none_is_read(gateway, kind):
    headers = {"Content-Type": kind} if kind else {}
    assert (await ask(gateway, "POST", CHAT, json.dumps(CHAT_BODY).encode(), headers)).status == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_over_the_limit_is_too_large(start_gateway, upstream, path, chunked):
    gateway = await start_gateway(server={"max_body_bytes": 200})

    async def pieces():
        for _ in range(2):
            yield b" " * 101

    data = pieces() if chunked else b" " * 201
    assert_error(await ask(gateway, "POST", path, data, JSON), 413, "request_too_large")
    at_limit = json.dumps(CHAT_BODY).ljust(200).encode()
    assert (await ask(gateway, "POST", CHAT, at_limit, JSON)).status == 200


async def test_a_bug_is_a_500_that_shows_nothing_but_an_id_to_quote(gateway, monkeypatch, caplog):
    def broken(_):
        raise ZeroDivisionError("the secret of the house")

    monkeypatch.setattr(gateway.service, "open", broken)
    got = await gateway.chat(headers={"X-Request-Id": "mine"})
    assert_error(got, 500, kind="server_error")
    assert "mine" in got.json["error"]["message"]
    assert b"secret" not in got.body
    assert "the secret of the house" in caplog.text


async def send_line(gateway, method, path, line):
    """Sends a request with that header line, which no client would send; gives the answer's bytes."""
    body = json.dumps(CHAT_BODY).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", URL(gateway.origin).port)
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    writer.write(b"%s%s\r\n\r\n%s" % (head.encode(), line, body))
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("name", [b"authorization", b"x-api-key"])
@pytest.mark.parametrize("value", [b"Bearer \xff", "Bearer é".encode()])
async def test_a_credential_that_no_upstream_can_take_is_refused(gateway, upstream, name, value):
    for method, path in (("POST", CHAT), ("POST", "/v1/embeddings"), ("GET", "/v1/models"), ("GET", "/v1/streams/x")):
        answer = await send_line(gateway, method, path, b"%s: %s" % (name, value))
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b'"param": "%s"' % name in answer
    assert not upstream.asked


async def test_nothing_of_a_request_that_cannot_be_parsed_is_in_the_log(gateway, caplog):
    caplog.set_level("DEBUG")
    for line, status in ((b"Authorization: sk-secret\0", b"400"), (b"Authorization: " + b"sk-secret" * 1000, b"431")):
        answer = await send_line(gateway, "GET", "/", line)
        assert answer.startswith(b"HTTP/1.0 " + status)
        assert b"sk-secret" not in answer
    assert "sk-secret" not in caplog.text
    assert "Traceback" not in caplog.text
    assert "Error handling request from 127.0.0.1: BadHttpMessage" in caplog.text


async def test_no_caller_makes_a_line_of_the_log_or_one_that_is_as_long_as_it_likes(start_gateway, upstream, capsys):
    upstreams = [{"name": "scripted", "kind": "openai", "base_url": upstream.base_url, "models": ["model-*"]}]
    gateway = await start_gateway(log={"access": True}, upstreams=upstreams)
    capsys.readouterr()
    for model in ("model-1\nPOST /forged", "model-" + "x" * 100_000, "other" * 100_000):
        await gateway.chat(model=model)
    lines = []
    async with asyncio.timeout(5):
        while len(lines) < 3:  # they leave a few times a second
            await asyncio.sleep(0.01)
            lines += capsys.readouterr().err.splitlines()
    assert [line.split()[:3] for line in lines] == [["POST", CHAT, "200"]] * 2 + [["POST", CHAT, "404"]]
    assert max(map(len, lines)) < 1000


# Headers


SANE, ODD = ("a", "Ab1._:+/=@-", "x" * 128), ("x" * 129, "a b", "é", "", "a,b")
IDS = [*((given, True) for given in SANE), *((given, False) for given in ODD)]


@pytest.mark.parametrize("path", [CHAT, LEGACY, "/healthz", "/nothing"])
@pytest.mark.parametrize(("given", "kept"), IDS)
async def test_a_sane_request_id_is_kept_and_any_other_is_replaced(gateway, path, given, kept):
    method, data = ("POST", b"{") if path.startswith("/v1") else ("GET", None)
    got = await ask(gateway, method, path, data, {**JSON, "X-Request-Id": given})
    [request_id] = got.headers.getall("X-Request-Id")
    assert request_id == given if kept else REQUEST_ID.fullmatch(request_id)


@pytest.mark.parametrize(("theirs", "taken"), [("req_1", True), ("a b", False), ("x" * 129, False), ("é", False)])
async def test_the_upstreams_request_id_is_the_callers_too_if_it_is_sane(gateway, upstream, theirs, taken):
    upstream.script = lambda asked: asked.answer(whole_answer("hi"), x_request_id=theirs)
    [request_id] = (await gateway.chat()).headers.getall("X-Request-Id")
    assert request_id == theirs if taken else REQUEST_ID.fullmatch(request_id)


async def test_request_ids_differ(gateway):
    assert len({(await ask(gateway, "GET", "/healthz")).headers["X-Request-Id"] for _ in range(20)}) == 20


async def test_cache_status_tells_what_was_done(start_gateway, upstream):
    gateway = await start_gateway()

    async def told(content="hi", **directives):
        headers = {"Cache-Control": directives.pop("control")} if "control" in directives else None
        return parsed((await gateway.chat(content, headers=headers, **directives)).cache_status)

    forwarded = {"fwd": "miss", "fwd-status": "200"}
    assert await told() == {**forwarded, "stored": True}
    hit = await told()
    assert 86_000 < int(hit.pop("ttl")) <= 86_400
    assert hit == {"hit": True}
    assert await told("b", stream=True) == forwarded
    assert (await told("b", stream=True)).keys() == {"hit", "ttl"}
    assert await told(control="no-cache") == {
        "fwd": "request",
        "fwd-status": "200",
        "stored": True,
        "detail": "no-cache",
    }
    assert await told(control="no-store") == {"fwd": "request", "fwd-status": "200", "detail": "no-store"}
    assert await told("c", control="only-if-cached") == {"detail": "not-cached"}
    assert parsed((await gateway.post("/v1/embeddings", MODEL)).cache_status) == {"fwd": "bypass", "detail": "relayed"}
    off = await start_gateway(cache={"mode": "off"})
    for _ in range(2):
        assert parsed((await off.chat()).cache_status) == {"fwd": "bypass", "fwd-status": "200", "detail": "disabled"}


@pytest.mark.parametrize("path", ["/", "/healthz", "/openapi.json", "/v1/models", "/v1/models/model-1"])
async def test_what_the_gateway_says_of_its_own_is_marked_so(gateway, path):
    got = await ask(gateway, "GET", path)
    assert got.status == 200
    assert parsed(got.cache_status) == {"detail": "local"}
    assert REQUEST_ID.fullmatch(got.headers["X-Request-Id"])
    assert (await ask(gateway, "HEAD", path)).status == 200


@pytest.mark.parametrize("streamed", [True, False])
async def test_age_is_on_hits_only(gateway, streamed):
    assert "Age" not in (await gateway.chat(stream=streamed)).headers
    assert 0 <= int((await gateway.chat(stream=streamed)).headers["Age"]) < 30


async def test_a_stream_has_the_headers_that_keep_proxies_from_buffering_it_on_a_miss_and_on_a_hit(gateway):
    for kept in ("no-store", "private, max-age=86400"):
        headers = (await gateway.chat(stream=True)).headers
        assert {name: headers[name] for name in ("Content-Type", "Cache-Control", "X-Accel-Buffering")} == {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": f"{kept}, no-transform",
            "X-Accel-Buffering": "no",
        }
        assert "Content-Encoding" not in headers


async def test_of_the_upstreams_headers_only_known_ones_reach_the_caller(gateway, upstream):
    known = {"x-ratelimit-remaining-requests": "9", "openai-processing-ms": "12", "openai-version": "2020-10-01"}
    foreign = {"set-cookie": "a=b", "server": "nginx", "x-internal": "1", "cache-control": "max-age=5", "via": "1.1 proxy"}

    async def script(asked):
        await asked.head(**known, **foreign)
        await asked.event(chunk({"content": "x"}, "stop"))
        await asked.done()

    upstream.script = script
    headers = (await gateway.chat(stream=True)).headers
    assert {name: headers[name] for name in known} == known
    assert headers["Server"] == "gateway"
    assert headers["Cache-Control"] == "no-store, no-transform"
    assert not {"set-cookie", "x-internal", "via"} & {name.lower() for name in headers}


SECRETS = {
    "Cookie": "a=b",
    "Proxy-Authorization": "Basic x",
    "TE": "trailers",
    "X-Secret": "1",
    "X-Forwarded-For": "10.0.0.1",
}
CREDENTIALS = {"Authorization": "Bearer sk-caller", "api-key": "k", "x-api-key": "k", "OpenAI-Organization": "org-1"}
TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
async def test_of_the_callers_headers_only_known_ones_go_upstream(gateway, upstream, path):
    await ask(gateway, "POST", path, json.dumps(CHAT_BODY).encode(), {**JSON, **SECRETS, **CREDENTIALS, **TRACE})
    sent = upstream.asked[0].headers
    known = {name.lower(): value for name, value in {**CREDENTIALS, **TRACE}.items()}
    assert {name: sent[name] for name in known} == known
    assert not {name.lower() for name in SECRETS} & sent.keys()


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/v1/models"])
async def test_a_callers_credential_never_goes_where_the_gateway_has_a_key_of_its_own(keyed, upstream, path):
    method, data = ("GET", None) if path == "/v1/models" else ("POST", json.dumps(CHAT_BODY).encode())
    await ask(keyed, method, path, data, {**JSON, **SECRETS, **CREDENTIALS})
    sent = upstream.asked[0].headers
    assert sent["authorization"] == "Bearer sk-own"
    assert not {name.lower() for name in (*SECRETS, *CREDENTIALS)} & sent.keys() - {"authorization"}


async def test_a_caller_without_a_credential_sends_none(gateway, upstream):
    await gateway.chat()
    await gateway.post("/v1/embeddings", MODEL)
    assert not any("authorization" in asked.headers for asked in upstream.asked)


# Small endpoints


@pytest.mark.parametrize("path", ["/healthz", "/health"])
async def test_health_tells_the_stores_state(gateway, start_gateway, tmp_path, path):
    assert (await ask(gateway, "GET", path)).json == {"status": "ok", "store": "ok"}
    away = await start_gateway(redis={"url": f"unix://{tmp_path}/nobody"})
    got = await ask(away, "GET", path)
    assert (got.status, got.json) == (200, {"status": "ok", "store": "unavailable"})


async def test_the_root_says_in_plain_text_what_this_is(gateway):
    got = await ask(gateway, "GET", "/")
    assert got.headers["Content-Type"].startswith("text/plain")
    assert b"/v1" in got.body


async def test_the_openapi_document_agrees_with_what_is_routed(start_gateway, upstream):
    gateway = await start_gateway(
        {"UPSTREAM_KEY": "sk-own"},
        upstreams=[keyed_upstream(upstream)],
        server={"relay_paths": ["embeddings", "audio/speech"]},
    )
    paths = (await ask(gateway, "GET", "/openapi.json")).json["paths"]
    relayed = {"/v1/embeddings", "/v1/audio/speech"}
    assert {path for path in paths if path.startswith("/v1/")} - relayed == {
        CHAT,
        LEGACY,
        "/v1/models",
        "/v1/models/{model}",
        "/v1/streams/{id}",
        "/v1/streams/{id}/cancel",
        "/v1/streams/{id}/status",
    }
    async with gateway.opened(stream=True) as response:
        stream_id = response.headers["Gateway-Stream-Id"]
        await response.read()
    await ask(gateway, "POST", f"/v1/streams/{stream_id}/cancel")
    for path, item in paths.items():
        methods = {name.upper() for name in item.keys() - {"parameters"}}
        path = path.replace("{model}", "model-1").replace("{id}", stream_id)  # noqa: PLW2901
        for method in sorted(methods, reverse=True):
            body = json.dumps({**CHAT_BODY, "prompt": "hi"}).encode() if method == "POST" else None
            expected = 204 if path.endswith(stream_id) else 200  # by then the stream has been cancelled
            assert (await ask(gateway, method, path, body, JSON)).status == expected
        if path not in relayed:
            allowed = (await ask(gateway, "DELETE", path)).headers["Allow"]
            # QUERY has no place in OpenAPI 3.1.
            assert set(allowed.split(", ")) - {"HEAD", "QUERY"} == methods


# The relay


@pytest.mark.parametrize("path", ["embeddings", "moderations"])
@pytest.mark.parametrize("status", [200, 400, 503])
async def test_configured_paths_are_relayed_with_the_configured_key_whatever_the_answer(keyed, upstream, path, status):
    async def script(asked):
        await asked.answer(
            b'{"a":  1}', status, x_request_id="req_theirs", retry_after="5", set_cookie="a=b", x_internal="1"
        )

    upstream.script = script
    got = await keyed.post(f"/v1/{path}", {**MODEL, "input": ["é"]}, authorization="Bearer sk-caller")
    [asked] = upstream.asked
    assert (asked.method, asked.path, asked.json) == ("POST", f"/v1/{path}", {**MODEL, "input": ["é"]})
    assert asked.headers["authorization"] == "Bearer sk-own"
    assert (got.status, got.body) == (status, b'{"a":  1}')
    expected = {"Content-Type": "application/json", "X-Request-Id": "req_theirs", "Retry-After": "5"}
    assert {name: got.headers[name] for name in expected} == expected
    assert got.headers["Cache-Control"] == "no-store"
    assert not {"set-cookie", "x-internal"} & {name.lower() for name in got.headers}


SNEAKY = [
    "files", "embeddings/../files", "embeddings/%2e%2e/files", "embeddings/..%2Ffiles", "embeddings//files", "embeddingsx",
    "./files", "fine_tuning/jobs", "responses",
]  # fmt: skip


@pytest.mark.parametrize("path", SNEAKY)
async def test_no_other_path_is_relayed_with_the_gateways_own_key(keyed, upstream, path):
    got = await ask(keyed, "POST", f"/v1/{path}", b"{}", JSON)
    assert_error(got, 404, "unknown_url")
    assert not upstream.asked


async def test_an_escape_in_a_path_is_not_undone_on_the_way(gateway, keyed, upstream):
    """What is harmless here must not become a way out of the allowed path there: with a key of ours it is not passed on."""
    for each, path in ((gateway, "/v1/embeddings/%252e%252e/files"), (keyed, "/v1/embeddings/a%20b")):
        await ask(each, "POST", path, b"{}", JSON)
        assert upstream.asked[-1].path == path
    assert (await ask(keyed, "POST", "/v1/embeddings/%252e%252e/files", b"{}", JSON)).status == 404


@pytest.mark.parametrize("line", ["GET files", "GET files/f-1/content", "DELETE files/f-1", "GET files/a%20b%3Fc",
                                  "GET files?after=f-1&limit=2", "GET files?q=a%26b%3D%C3%A9+c&q=%2523"])  # fmt: skip
async def test_with_the_callers_own_credential_any_path_is_relayed_as_it_was_sent(gateway, upstream, line):
    async def script(asked):
        await asked.answer(b"bytes", 201, "application/octet-stream", content_disposition="attachment")

    upstream.script = script
    method, path = line.split()
    got = await ask(gateway, method, f"/v1/{path}", headers={"Authorization": "Bearer sk-caller"})
    [asked] = upstream.asked
    assert (asked.method, asked.path, asked.body) == (method, f"/v1/{path}", b"")
    assert asked.headers["authorization"] == "Bearer sk-caller"
    assert (got.status, got.body, got.headers["Content-Type"]) == (201, b"bytes", "application/octet-stream")
    assert got.headers["Content-Disposition"] == "attachment"


async def test_a_relayed_model_goes_to_the_upstream_that_serves_it_by_its_own_name(start_gateway, upstream):
    scripted = {"kind": "openai", "base_url": upstream.base_url}
    gateway = await start_gateway(
        {"UPSTREAM_KEY": "sk-own"},
        upstreams=[
            {"name": "one", **scripted, "models": ["model-*"]},
            {"name": "two", **scripted, "aliases": {"fast": "text-embedding-3"}, "api_key_env": "UPSTREAM_KEY"},
        ],
    )
    body = {"input": {"b": 1, "a": None}, "model": "fast", "x": [1.0]}
    await gateway.post("/v1/embeddings", body, authorization="Bearer sk-caller")
    await gateway.post("/v1/embeddings", {**body, "model": "model-2"}, authorization="Bearer sk-caller")
    assert [(asked.json, asked.headers["authorization"]) for asked in upstream.asked] == [
        ({**body, "model": "text-embedding-3"}, "Bearer sk-own"),
        ({**body, "model": "model-2"}, "Bearer sk-caller"),
    ]
    assert_error(await gateway.post("/v1/moderations", {"input": "names no model"}), 404, "unknown_url")
    assert_error(await gateway.post("/v1/embeddings", {"model": 5}), 400, param="model")


async def test_a_request_without_a_model_goes_where_the_configuration_says(start_gateway, upstream):
    scripted = {"kind": "openai", "base_url": upstream.base_url}
    named = [{"name": "one", **scripted}, {"name": "two", **scripted, "api_key_env": "UPSTREAM_KEY"}]
    gateway = await start_gateway({"UPSTREAM_KEY": "sk-own"}, upstreams=named, server={"relay_upstream": "two"})
    await gateway.post("/v1/moderations", {"input": "hi"})
    assert [asked.headers["authorization"] for asked in upstream.asked] == ["Bearer sk-own"]


async def test_an_upload_streams_up_and_its_answer_streams_down(gateway, upstream):
    """The upstream has the first part before the second is sent, and the caller the first bytes before the rest are."""

    async def script(asked):
        await asked.head(content_type="text/plain")
        await asked.send(b"first")
        await asked.gate("answering")
        await asked.send(b"second")
        await asked.end()

    upstream.script = script
    form = aiohttp.FormData()

    async def file():
        yield b"one"
        await upstream.gate("uploading").released.wait()
        yield b"two"

    form.add_field("purpose", "assistants")
    form.add_field("file", file(), filename="a.bin")
    upstream.on_body = lambda body: b"one" in body and upstream.gate("uploading").released.set()
    async with gateway.session.post(f"{gateway.base_url}/files", data=form) as response:
        assert await response.content.readexactly(5) == b"first"
        upstream.gate("answering").released.set()
        assert await response.read() == b"second"
    [asked] = upstream.asked
    assert asked.headers["content-type"].startswith("multipart/form-data; boundary=")
    assert [asked.body.count(part) for part in (b"one", b"two", b"assistants")] == [1, 1, 1]


async def test_a_relayed_answer_that_breaks_off_breaks_off_for_the_caller(gateway, upstream):
    async def script(asked):
        await asked.head(content_type="text/plain")
        await asked.send(b"first")
        await asked.gate("reset")
        asked.reset()

    upstream.script = script
    async with gateway.session.get(f"{gateway.base_url}/files/f/content") as response:
        assert await response.content.readexactly(5) == b"first"
        upstream.gate("reset").released.set()
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert (await gateway.chat()).status == 502  # nothing of it is left behind


async def test_a_relay_to_nobody_is_a_bad_gateway(start_gateway, upstream):
    gateway = await start_gateway()
    await upstream.stop()
    assert_error(await gateway.post("/v1/embeddings", MODEL), 502, "upstream_unreachable", kind="upstream_error")


async def test_a_caller_who_leaves_a_relay_takes_the_upstreams_connection_along(gateway, upstream):
    async def script(asked):
        await asked.head(content_type="text/plain")
        await asked.send(b"first")
        await asked.gate("never")

    upstream.script = script
    async with gateway.session.get(f"{gateway.base_url}/files/f/content") as response:
        await response.content.readexactly(5)
        response.close()
    await upstream.asked[0].gone.wait()


# Tenants


async def answers(gateway, *credentials, **members):
    """How each of these callers was served."""
    served = []
    for credential in credentials:
        got = await gateway.chat(headers={"Authorization": f"Bearer {credential}"}, **members)
        served.append("hit" if "hit" in parsed(got.cache_status) else "miss")
    return served


async def test_callers_with_two_credentials_do_not_share_entries(gateway, keyed, upstream):
    assert await answers(gateway, "a", "a", "b", "b", "a") == ["miss", "hit", "miss", "hit", "hit"]
    assert await answers(keyed, "a", "a", "b", "b", "a") == ["miss", "hit", "miss", "hit", "hit"]


@pytest.mark.parametrize("name", ["api-key", "x-api-key", "OpenAI-Organization", "OpenAI-Project"])
async def test_every_credential_makes_a_tenant(gateway, name):
    served = [parsed((await gateway.chat(headers={name: value})).cache_status) for value in ("a", "b", "a")]
    assert ["hit" in each for each in served] == [False, False, True]


async def test_a_shared_cache_serves_all_callers_of_an_upstream_with_a_key_of_its_own(start_gateway, upstream):
    shared = {"cache": {"scope": "shared"}}
    gateway = await start_gateway({"UPSTREAM_KEY": "sk-own"}, upstreams=[keyed_upstream(upstream)], **shared)
    assert await answers(gateway, "a", "b") == ["miss", "hit"]
    passing = await start_gateway(**shared)
    assert await answers(passing, "a", "b", "a") == ["miss", "miss", "hit"]


# Cache-Control


@pytest.fixture
def count_up(upstream):
    """Each answer tells its number."""

    async def script(asked):
        await stream(asked, str(len(upstream.asked)))

    upstream.script = script


async def read(gateway, control=None, **members):
    headers = {"Cache-Control": control} if control else None
    return (await gateway.chat(headers=headers, **members)).json["choices"][0]["message"]["content"]


async def test_no_cache_asks_again_and_replaces_the_entry(gateway, count_up):
    told = [await read(gateway, control) for control in (None, None, "no-cache", None, "NO-CACHE", None)]
    assert told == ["1", "1", "2", "2", "3", "3"]


async def test_no_store_touches_nothing(gateway, count_up):
    told = [await read(gateway, control) for control in ("no-store", None, "foo, no-store", None)]
    assert told == ["1", "2", "3", "2"]


@pytest.mark.parametrize("control", ["min-fresh=86400", "min-fresh=99999999999999999999", "max-age=0", "max-age=soon"])
async def test_an_answer_that_is_not_fresh_enough_is_asked_for_again(gateway, count_up, control):
    told = [await read(gateway, each) for each in (None, control, None)]
    assert told == ["1", "2", "2"]


@pytest.mark.parametrize("control", ["max-age=60", "min-fresh=60", "max-stale", 'private, foo="a, no-store"', "=", ""])
async def test_an_answer_that_is_fresh_enough_is_a_hit(gateway, count_up, control):
    assert [await read(gateway, each) for each in (None, control)] == ["1", "1"]


@pytest.mark.parametrize("streamed", [True, False])
async def test_only_if_cached_is_a_hit_or_a_504_and_never_asks_the_model(gateway, upstream, streamed):
    only = {"Cache-Control": "only-if-cached"}
    assert_error(await gateway.chat(stream=streamed, headers=only), 504, "not_cached", kind="gateway_error")
    assert_error(
        await gateway.chat(stream=streamed, headers={"Cache-Control": "only-if-cached, no-cache"}),
        504, "not_cached", kind="gateway_error",
    )  # fmt: skip
    assert not upstream.asked
    await gateway.chat()
    got = await gateway.chat(stream=streamed, headers=only)
    assert "hit" in parsed(got.cache_status)
    assert len(upstream.asked) == 1


async def test_only_if_cached_does_not_take_an_unreachable_store_for_a_miss(start_gateway, upstream, tmp_path):
    gateway = await start_gateway(redis={"url": f"unix://{tmp_path}/nobody"})
    got = await gateway.chat(headers={"Cache-Control": "only-if-cached"})
    assert_error(got, 503, "store_unavailable", kind="gateway_error")
    assert not upstream.asked
    got = await gateway.chat()
    assert parsed(got.cache_status) == {"fwd": "miss", "fwd-status": "200", "detail": "store-unavailable"}


# When heads and frames leave


async def test_the_head_leaves_with_the_first_token_since_until_then_all_may_change(gateway, upstream):
    async def script(asked):
        await asked.head(x_ratelimit_limit_requests="5")
        await asked.event(chunk({"role": "assistant", "content": ""}))
        await asked.gate("token")
        await asked.event(chunk({"content": "x"}))
        await asked.gate("end")
        await asked.event(chunk({}, "stop"))
        await asked.done()

    upstream.script = script
    asking = asyncio.ensure_future(gateway.opened(stream=True).__aenter__())
    await upstream.gate("token").reached.wait()
    assert not asking.done()
    upstream.gate("token").released.set()
    async with await asking as response:
        assert (response.status, response.headers["x-ratelimit-limit-requests"]) == (200, "5")
        upstream.gate("end").released.set()
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_a_head_that_waited_long_enough_is_a_200_with_a_comment_and_a_later_refusal_is_an_error_event(
    start_gateway, upstream
):
    async def script(asked):
        await asked.gate("head")
        await asked.answer({"error": {"message": "Slow down.", "code": "rate_limit_exceeded"}}, 429)

    upstream.script = script
    gateway = await start_gateway(server={"head_after_s": 0.02})
    async with gateway.opened(stream=True) as response:
        assert response.status == 200
        assert await next_block(response) == ": keep-alive"
        assert parsed(response.headers["Cache-Status"]) == {"fwd": "miss"}
        upstream.gate("head").released.set()
        rest = [block async for block in blocks(response) if not block.startswith(":")]
    [event] = rest
    error = json.loads(event.removeprefix("data: "))["error"]
    assert (error["message"], error["code"]) == ("Slow down.", "rate_limit_exceeded")


async def blocks(response):
    while block := await next_block(response):
        yield block


async def test_each_frame_is_written_when_it_comes(gateway, upstream):
    words = ["one", "two", "three"]

    async def script(asked):
        await asked.head()
        for word in words:
            await asked.event(chunk({"content": word}))
            await asked.gate(word)
        await asked.event(chunk({}, "stop"))
        await asked.done()

    upstream.script = script
    async with gateway.opened(stream=True) as response:
        for word in words:
            assert json.loads((await next_block(response)).removeprefix("data: ")) == chunk({"content": word})
            upstream.gate(word).released.set()
        assert [block async for block in blocks(response)][-1] == "data: [DONE]"


async def test_comments_keep_an_idle_stream_alive_and_the_official_client_survives_them(start_gateway, upstream):
    async def script(asked):
        await asked.head()
        await asked.event(chunk({"content": "one"}))
        await asked.gate("idle")
        await asked.event(chunk({"content": "two"}, "stop"))
        await asked.done()

    upstream.script = script
    gateway = await start_gateway(server={"keepalive_s": 0.02})

    async def official():
        async with AsyncOpenAI(base_url=gateway.base_url, api_key="k", max_retries=0) as client:
            chunks = await client.chat.completions.create(**CHAT_BODY, stream=True)
            return [each.choices[0].delta.content async for each in chunks]

    client = asyncio.ensure_future(official())
    async with gateway.opened(stream=True, headers={"Authorization": "Bearer k"}) as response:
        assert "one" in await next_block(response)
        assert [await next_block(response) for _ in range(3)] == [": keep-alive"] * 3
        upstream.gate("idle").released.set()
        assert [block for block in [each async for each in blocks(response)] if block[0] != ":"][-1] == "data: [DONE]"
    assert await client == ["one", "two"]
    assert len(upstream.asked) == 1


async def test_an_old_client_gets_the_same_frames_and_then_the_end_of_the_connection(gateway, upstream):
    expected = (await gateway.chat(stream=True, headers={"Cache-Control": "no-store"})).body
    body = json.dumps({**CHAT_BODY, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", URL(gateway.origin).port)
    writer.write(b"POST %s HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body))
    head, _, told = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.0 200")
    assert b"transfer-encoding" not in head.lower()
    assert told == expected


# Paces


PACES = {
    "recorded": ({"pace": "recorded"}, [0.0, 0.03, 0.06, 0.06]),
    "recorded, twice as fast": ({"pace": "recorded", "speed": 2.0}, [0.0, 0.015, 0.03, 0.03]),
    "no gap longer than so much": ({"pace": "recorded", "max_gap_s": 0.01}, [0.0, 0.01, 0.02, 0.02]),
    "fixed": ({"pace": "fixed", "tokens_per_s": 50.0}, [0.02, 0.04, 0.06, 0.06]),
    "drawn": ({"pace": "drawn", "ttft_s": 0.05, "itl_s": 0.01}, [0.05, 0.06, 0.07, 0.07]),
}


async def slowly(asked):
    await asked.head()
    for word in ("one", "two", "three"):
        await asked.event(chunk({"content": word}))
        if word != "three":
            await asyncio.sleep(0.03)  # the model's own time, which is recorded
    await asked.event(chunk({}, "stop"))
    await asked.done()


@pytest.mark.parametrize(("replay", "due"), PACES.values(), ids=PACES.keys())
async def test_a_paced_replay_gives_every_frame_in_order_and_none_before_its_time(start_gateway, upstream, replay, due):
    upstream.script = slowly
    gateway = await start_gateway(replay={**replay, "identity": "original"})
    miss = await gateway.chat(stream=True)
    await gateway.landed()
    arrivals, seen, began = [], [], time.monotonic()
    async with gateway.opened(stream=True) as response:
        assert "hit" in parsed(response.headers["Cache-Status"])
        async for block in blocks(response):
            seen.append(block.removeprefix("data: "))
            arrivals.append(time.monotonic() - began)
    assert seen == miss.events
    assert [arrival >= at for arrival, at in zip(arrivals, [*due, due[-1]], strict=True)] == [True] * 5
    began = time.monotonic()
    whole = await gateway.chat()
    assert time.monotonic() - began >= due[-1]
    assert whole.json["choices"][0]["message"]["content"] == "onetwothree"
    assert len(upstream.asked) == 1


async def test_an_instant_replay_waits_for_nothing_in_either_mode(gateway, upstream):
    async def script(asked):
        await asked.head()
        await asked.event(chunk({"content": "one"}))
        await asyncio.sleep(0.5)  # the model's own time
        await asked.event(chunk({}, "stop"))
        await asked.done()

    upstream.script = script
    await gateway.chat()
    for streamed in (True, False):
        began = time.monotonic()
        assert "hit" in parsed((await gateway.chat(stream=streamed)).cache_status)
        assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_replay_under_way_ends_with_an_error_at_shutdown(start_gateway, upstream, streamed):
    gateway = await start_gateway(replay={"pace": "fixed", "tokens_per_s": 10.0})
    await gateway.chat()
    await gateway.landed()
    if not streamed:
        asking = asyncio.ensure_future(gateway.chat())
        while not gateway.service.replays:
            await asyncio.sleep(0)
        await gateway.service.close()
        assert_error(await asking, 503, "shutting_down", kind="gateway_error")
        return
    async with gateway.opened(stream=True) as response:
        first = await next_block(response)
        await gateway.service.close()
        *others, last = [first, *[block async for block in blocks(response)]]
    assert 1 <= len(others) < 4
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"


async def test_a_late_refusal_raises_in_the_official_client(start_gateway, upstream):
    async def script(asked):
        await asked.gate("head")
        await asked.answer({"error": {"message": "Slow down.", "code": "rate_limit_exceeded"}}, 429)

    upstream.script = script
    gateway = await start_gateway(server={"head_after_s": 0.02})
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="k", max_retries=0) as client:
        stream = await client.chat.completions.create(**CHAT_BODY, stream=True)
        upstream.gate("head").released.set()
        with pytest.raises(openai.APIError, match="Slow down"):
            _ = [each async for each in stream]

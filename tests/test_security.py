"""What the threat model in the README promises, a test each: injection, smuggling, splitting, poisoning, oracles."""

import asyncio
import contextlib
import json
import logging
from hashlib import blake2b, sha256

import pytest
from raw import by_then, tell
from redis import Redis
from running import Got
from scripted import chunk, stream, whole_answer

from gateway.core.apis import CHAT
from gateway.core.key import cache_key, tenant_of

PATH = b"/v1/chat/completions"
QUESTION = {"model": "model-1", "messages": [{"role": "user", "content": "hi"}]}
BODY = json.dumps(QUESTION).encode()


def post(*lines, body=BODY, path=PATH, method=b"POST"):
    head = [b"%s %s HTTP/1.1" % (method, path), b"Host: x", b"Content-Type: application/json", *lines]
    return b"\r\n".join([*head, b"Content-Length: %d" % len(body), b"", body])


@pytest.fixture
async def gateway(start_gateway):
    """Its callers bring their own credentials."""
    return await start_gateway()


@pytest.fixture
async def keyed(start_gateway, upstream):
    """The key is the gateway's own."""
    served = {"name": "scripted", "kind": "openai", "base_url": upstream.base_url, "models": ["*"], "api_key_env": "KEY"}
    return await start_gateway({"KEY": "sk-own"}, upstreams=[served])


def complaints(caplog):
    return [record for record in caplog.records if record.levelno >= logging.ERROR]


# Header injection and response splitting

FORGED = "X-Forged"
ECHOED = {
    "the path": post(path=b"/nothing%0d%0aX-Forged:%20a"),
    "the path of a relay": post(path=b"/v1/embeddings%0d%0aX-Forged:%20a"),
    "a model's name": post(body=json.dumps({**QUESTION, "model": "a\r\nX-Forged: a\r\n\r\n"}).encode()),
    "a model's path": b"GET /v1/models/a%0D%0AX-Forged:%20a HTTP/1.1\r\nHost: x\r\n\r\n",
    "a stream's id": b"GET /v1/streams/a%0D%0AX-Forged:%20a HTTP/1.1\r\nHost: x\r\n\r\n",
    "a place in a stream": b"GET /v1/streams/a?after=1%0D%0AX-Forged:%20a HTTP/1.1\r\nHost: x\r\n\r\n",
    "the last event": b"GET /v1/streams/a HTTP/1.1\r\nHost: x\r\nLast-Event-ID: a.1\\r\\nX-Forged: a\r\n\r\n",
    "a request id": post(b"X-Request-Id: a%0d%0aX-Forged: a"),
    "a namespace": post(b'Gateway-Cache-Namespace: "a%0d%0aX-Forged: a"'),
    "a namespace in the body": post(body=json.dumps({**QUESTION, "cache": {"namespace": "a\r\nX-Forged: a"}}).encode()),
    "a tag": post(b'Gateway-Cache-Tags: "a\\"\\\\%0d%0aX-Forged: a"'),
    "a content type": post().replace(b"application/json", b"a/b; x=%0d%0aX-Forged: a"),
    "a method": b"PROPFIND /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
}


async def test_nothing_that_a_caller_sends_makes_a_header_of_an_answer(gateway, caplog, subtests):
    for name, sent in ECHOED.items():
        with subtests.test(name):
            told = await tell(gateway, sent)
            [answer] = told.answers
            assert answer.status < 500
            assert not told.closed
            assert FORGED.lower() not in dict(answer.headers)
            assert all("\r" not in value and "\n" not in value for _, value in answer.headers)
            assert not complaints(caplog)


HOSTILE = {
    "a bare CR": b"x-ratelimit-a: b\rX-Forged: c",
    "a bare LF": b"x-ratelimit-a: b\nX-Forged: c",
    "a folded line": b"x-ratelimit-a: b\r\n X-Forged: c",
    "NUL": b"x-ratelimit-a: b\0c",
    "a request id": b"x-request-id: a\rX-Forged: c",
    "a place to go": b"retry-after: 1\rX-Forged: c",
    "bytes that are no text": b"x-ratelimit-a: \xff\xfe\x80",
    "a control character": b"x-ratelimit-a: a\x01\x1b[31mb",
    "an endless value": b"x-ratelimit-a: " + b"a" * 8000,
    "hop by hop": b"Connection: x-ratelimit-a\r\nx-ratelimit-a: b\r\nProxy-Authenticate: Basic\r\nUpgrade: h2c",
    "a cookie": b"Set-Cookie: a=b",
    "ours": b"Cache-Status: gateway; hit\r\nAge: 5\r\nGateway-Upstream: other\r\nServer: other",
    "a place": b'Location: https://other.example/\r\nRefresh: 0\r\nAccess-Control-Allow-Origin: *\r\nAlt-Svc: h2="other"',
}
NEVER_PASSED = {
    "set-cookie",
    "location",
    "refresh",
    "access-control-allow-origin",
    "alt-svc",
    "upgrade",
    "proxy-authenticate",
    "x-forged",
}


@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize("asked_for", ["a stream", "an answer", "a relay"])
async def test_no_header_of_an_upstream_splits_an_answer_or_speaks_for_the_gateway(
    gateway, upstream, caplog, subtests, status, asked_for
):
    body = json.dumps(whole_answer("hi") if status == 200 else {"error": {"message": "no"}}).encode()
    sent = {
        "a stream": post(b"Cache-Control: no-store", body=json.dumps({**QUESTION, "stream": True}).encode()),
        "an answer": post(b"Cache-Control: no-store"),
        "a relay": post(path=b"/v1/embeddings"),
    }[asked_for]
    for name, lines in HOSTILE.items():

        async def hostile(asked, lines=lines):
            head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % (status, len(body))
            await asked.raw(head + lines + b"\r\n\r\n" + body)

        upstream.script = hostile
        caplog.clear()
        with subtests.test(name):
            told = await tell(gateway, sent)
            [answer] = told.answers
            headers = dict(answer.headers)
            assert answer.status in (status, 502)
            assert not told.closed
            assert len(headers) == len(answer.headers)
            assert not headers.keys() & NEVER_PASSED
            assert headers["cache-status"].startswith("gateway; fwd")
            assert (headers["server"], headers.get("gateway-upstream", "scripted")) == ("gateway", "scripted")
            assert headers.get("connection", "") in ("", "keep-alive")
            assert not any(set(value) & set("\r\n\0\x01\x1b") for _, value in answer.headers)
            assert not complaints(caplog)


# Log injection


FORGING = "a\nPOST /forged 200\x1b[2J\u2028\x85b"


async def test_no_caller_and_no_upstream_makes_a_line_of_the_access_log(start_gateway, upstream, capsys):
    gateway = await start_gateway(log={"access": True})

    async def refuse(asked):
        await asked.answer({"error": {"message": FORGING, "type": FORGING, "code": FORGING}}, 500, x_request_id="a b")

    async def report(asked):
        await asked.head()
        await asked.event({"error": {"message": FORGING, "code": FORGING}})
        await asked.end()

    capsys.readouterr()
    upstream.script = report
    await gateway.chat(model=FORGING, stream=True)
    upstream.script = refuse
    await gateway.chat(model=FORGING, headers={"User-Agent": "a\u2028b", "X-Request-Id": "a b"})
    for path in (b"/a%0aPOST%20/forged%1b[2J%e2%80%a8", b"/v1/models/%0a%1b", b"/v1/embeddings/%0a"):
        await tell(gateway, post(path=path))
    lines = []
    async with asyncio.timeout(5):
        while sum("/healthz" not in line for line in lines) < 5:
            await asyncio.sleep(0.01)
            lines += [line for line in capsys.readouterr().err.split("\n") if line]
    assert all(line.isprintable() for line in lines)
    assert {line.split()[0] for line in lines} <= {"POST", "GET"}
    assert not [line for line in lines if line.startswith("POST /forged")]


async def test_no_caller_and_no_upstream_makes_a_line_of_any_other_log(start_gateway, upstream, caplog):
    caplog.set_level("DEBUG", "gateway")
    served = {"kind": "openai", "base_url": upstream.base_url, "models": ["*"]}

    async def report(asked):
        await asked.head()
        await asked.event({"error": {"message": FORGING, "code": FORGING}})
        await asked.end()

    upstream.script = report
    gateway = await start_gateway(upstreams=[{"name": "scripted", **served}])
    for number in range(30):
        await gateway.chat(f"{number}", model=FORGING, stream=True)
    await gateway.landed()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("gateway")]
    assert [text for text in said if "fails too often" in text]  # what an upstream says is in some
    assert all(text.isprintable() for text in said)


# Smuggling

SMUGGLED = b"GET /v1/files/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
START = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED_BODY = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
SMUGGLING = {
    "CL.TE": START + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % (5 + len(SMUGGLED)) + SMUGGLED,
    "TE.CL": START + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + CHUNKED_BODY + SMUGGLED,
    "CL.CL": START + b"Content-Length: %d\r\nContent-Length: 0\r\n\r\n" % (len(BODY) + len(SMUGGLED)) + BODY + SMUGGLED,
    "a list of lengths": START + b"Content-Length: %d, 0\r\n\r\n" % len(BODY) + BODY + SMUGGLED,
    "TE.TE": START + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + CHUNKED_BODY + SMUGGLED,
    "TE.TE, the other way round": START
    + b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    + CHUNKED_BODY
    + SMUGGLED,
    "a vertical tab": START + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + CHUNKED_BODY + SMUGGLED,
    "a quoted coding": START + b'Transfer-Encoding: "chunked"\r\n\r\n' + CHUNKED_BODY + SMUGGLED,
    "a space before the colon": START
    + b"Transfer-Encoding : chunked\r\nContent-Length: 4\r\n\r\n"
    + CHUNKED_BODY
    + SMUGGLED,
    "a folded coding": START + b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 4\r\n\r\n" + CHUNKED_BODY + SMUGGLED,
    "an extension with LF": START + b"Transfer-Encoding: chunked\r\n\r\n2;\n{}\r\n0\r\n\r\n" + SMUGGLED,
    "a chunk that overflows": START + b"Transfer-Encoding: chunked\r\n\r\n10000000000000002\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
    "HTTP/1.0 with chunks": START.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED_BODY + SMUGGLED,
    "an upgrade": START
    + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
    + SMUGGLED,
    "behind what cannot be parsed": b"GET / HTTP/1.1\r\nHost : x\r\n\r\n" + SMUGGLED,
}


async def test_no_request_hides_in_another(gateway, upstream, subtests):
    for name, sent in SMUGGLING.items():
        with subtests.test(name):
            told = await tell(gateway, sent, closes=True)
            assert told.closed
            assert [answer.status for answer in told.answers] in ([400], [200])
            assert told.rest == b""
            assert not [asked.path for asked in upstream.asked if "smuggled" in asked.path]


async def test_a_request_in_a_body_is_a_body(gateway, upstream):
    """What looks like a request, within its length, reaches the upstream as it is, and as the body of one request."""
    upstream.script = lambda asked: asked.answer({})
    told = await tell(gateway, post(body=SMUGGLED, path=b"/v1/files").replace(b"application/json", b"text/plain"))
    assert not told.closed
    [asked] = upstream.asked
    assert (asked.method, asked.path, asked.body) == ("POST", "/v1/files", SMUGGLED)


HOP_BY_HOP = [
    b"Connection: keep-alive, X-Mine",
    b"X-Mine: a",
    b"TE: trailers",
    b"Trailer: X-Late",
    b"Upgrade: h2c",
    b"Keep-Alive: timeout=1000",
    b"Proxy-Authorization: Basic YTpi",
    b"Proxy-Connection: keep-alive",
    b"Expect: 100-continue",
    b"Cookie: a=b",
    b"X-Forwarded-For: 127.0.0.1",
    b"Max-Forwards: 0",
]
ALLOWED = {
    *["host", "accept", "accept-encoding", "content-type", "content-length", "transfer-encoding", "user-agent"],
    *["authorization", "connection"],
}


@pytest.mark.parametrize("path", [PATH, b"/v1/files", b"/v1/embeddings"])
async def test_what_goes_upstream_is_framed_once_and_has_nothing_of_the_callers_connection(gateway, upstream, path):
    sent = [
        post(*HOP_BY_HOP, b"Authorization: Bearer mine", path=path),
        START.replace(PATH, path)
        + b"\r\n".join([*HOP_BY_HOP, b"Transfer-Encoding: chunked", b"", b""])
        + CHUNKED_BODY[:-2]
        + b"X-Late: a\r\n\r\n",
    ]
    for each in sent:
        told = await tell(gateway, each.replace(b"Upgrade: h2c\r\n", b""))
        assert told.answers[0].status == 200
    assert upstream.asked
    for asked in upstream.asked:
        assert asked.headers.keys() <= ALLOWED
        assert ("content-length" in asked.headers) != ("transfer-encoding" in asked.headers)
        assert asked.headers["host"] == f"127.0.0.1:{upstream.port}"
        assert asked.headers.get("connection", "keep-alive") == "keep-alive"
        assert asked.json["messages"] == QUESTION["messages"]


# Cache poisoning


UNKEYED = [
    "Host: other.example",
    "X-Forwarded-Host: other.example",
    "X-Forwarded-For: 127.0.0.1",
    "X-Forwarded-Proto: gopher",
    "Forwarded: host=other.example",
    "X-Original-URL: /v1/other",
    "X-Rewrite-URL: /v1/other",
    "X-HTTP-Method-Override: DELETE",
    "User-Agent: other",
    "Accept: text/html",
    "Accept-Language: tlh",
    "Accept-Encoding: br",
    "Accept-Charset: utf-7",
    "Cookie: session=other",
    "Origin: https://other.example",
    "Referer: https://other.example",
    "Range: bytes=0-1",
    "If-None-Match: *",
    "If-Modified-Since: Thu, 01 Jan 2099 00:00:00 GMT",
    "OpenAI-Beta: other",
    "Idempotency-Key: other",
    "X-Stainless-Lang: other",
    "Gateway-Cache-Key: 0000000000000000000000000000000000000000",
    "Gateway-Stream-Id: other",
    "Gateway-Upstream: other",
    "Gateway-Cache-Tags: other",
    "Cache-Status: gateway; hit",
    "Age: 5",
    "Via: 1.1 other",
    "Priority: u=0",
]


async def test_no_header_changes_what_is_asked_without_changing_the_key(gateway, upstream, subtests):
    async def asked_with(*lines):
        before = len(upstream.asked)
        told = await tell(gateway, post(b"Cache-Control: no-cache", *lines))
        assert told.answers[0].status == 200
        [asked] = upstream.asked[before:]
        return asked.path, asked.headers, asked.body

    plain = await asked_with()
    for line in UNKEYED:
        if line.startswith("Host"):
            continue
        with subtests.test(line):
            assert await asked_with(line.encode()) == plain
    assert (
        (await tell(gateway, post(path=PATH + b"?model=other&api-version=1")))
        .answers[0]
        .header("cache-status")
        .startswith("gateway; hit")
    )
    assert len(upstream.asked) == len(UNKEYED)


KEYED = [
    "temperature",
    "seed",
    "tools",
    "response_format",
    "logit_bias",
    "n",
    "top_p",
    "x",
    "cache_control",
    "extra_body",
    "__proto__",
    "Model",
]


async def test_every_member_of_the_body_that_goes_upstream_is_in_the_key(gateway, upstream, subtests):
    await gateway.chat()
    for name in KEYED:
        with subtests.test(name):
            got = await gateway.chat(**{name: 2})
            assert "fwd=miss" in got.cache_status
            assert upstream.bodies[-1][name] == 2
    hit = await tell(gateway, post(body=b'{"model":"other","model":"model-1",' + BODY[1:]))
    assert "gateway; hit" in hit.answers[0].header("cache-status")  # what goes upstream is what the key is made of


def bearer(name):
    return {"Authorization": f"Bearer {name}"}


FORGERIES = {
    "a key": {"Gateway-Cache-Key": "KEY"},
    "a tenant": {"Gateway-Tenant": "a", "X-Tenant": "a"},
    "the namespace": {"Gateway-Cache-Namespace": "a"},
    "the tenant's digest as a namespace": {"Gateway-Cache-Namespace": '"OWNER"'},
    "a path to a namespace": {"Gateway-Cache-Namespace": '"OWNER/ns:a"'},
    "the shared ones": {"Gateway-Cache-Namespace": "shared"},
    "a second credential": {"api-key": "a"},
}


async def test_no_caller_is_answered_with_what_another_tenant_has_and_none_writes_into_it(gateway, upstream, subtests):
    owner = tenant_of(gateway.store.secret, ["Bearer a", "", "", "", ""])
    key = key_of(gateway.store.secret, owner)
    await gateway.chat(headers=bearer("a"))
    assert await gateway.stores(headers=bearer("a"))
    for number, (name, forged) in enumerate(FORGERIES.items()):
        with subtests.test(name):
            headers = {each: value.replace("OWNER", owner).replace("KEY", key) for each, value in forged.items()}
            got = await gateway.chat(headers={**bearer(f"b{number}"), **headers})
            assert "fwd=miss" in got.cache_status
    upstream.script = lambda asked: stream(asked, "poisoned")
    await gateway.chat(headers={**bearer("b"), "Cache-Control": "no-cache"})
    assert b"poisoned" not in (await gateway.chat(headers=bearer("a"))).body


def key_of(secret, owner):
    return cache_key(secret, owner=owner, api=CHAT, route=("scripted", "model-1"), body=QUESTION)


async def refuse(asked):
    await asked.answer({"error": {"message": "no"}}, 500)


async def error_as_success(asked):
    await asked.answer({"error": {"message": "no"}})


async def error_in_the_stream(asked):
    await asked.head()
    await asked.event(chunk({"content": "half"}))
    await asked.event({"error": {"message": "no"}})
    await asked.done()


async def cut_off(asked):
    await asked.head()
    await asked.event(chunk({"content": "half"}))
    asked.reset()


async def ended_early(asked):
    await asked.head()
    await asked.event(chunk({"content": "half"}))
    await asked.done()


async def filtered(asked):
    await stream(asked, "half", finish="content_filter")


async def of_another(asked):
    await asked.answer(b"<html>sign in</html>", content_type="text/html")


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    "script", [refuse, error_as_success, error_in_the_stream, cut_off, ended_early, filtered, of_another]
)
async def test_no_answer_that_failed_is_kept_for_the_next(gateway, upstream, script, streamed):
    upstream.script = script
    with contextlib.suppress(Exception):
        await gateway.chat(stream=streamed)
    assert not await gateway.stores()


CONFUSING = [
    "//v1/embeddings",
    "/v1//embeddings",
    "/v1/./embeddings",
    "/v1/embeddings/../files",
    "/v1/embeddings/%2e%2e/files",
    "/v1/embeddings/%2E%2E/files",
    "/v1/embeddings/..%2ffiles",
    "/v1/embeddings/%2e%2e%2ffiles",
    "/v1/embeddings%2f..%2ffiles",
    "/v1/embeddings/..%5cfiles",
    "/v1/embeddings/..\\files",
    "/v1/embeddings/%252e%252e/files",
    "/v1/embeddings/..;/files",
    "/v1/%65mbeddings/../files",
    "/v1/embeddings/a%2f..%2f..%2ffiles",
    "/v1/embeddings/%2e%2e;x/files",
    "/v1/x/%2e%2e/embeddings",
    "/v1%2fembeddings",
    "/V1/embeddings",
    "/v1/EMBEDDINGS",
    "/v1/embeddings/%00",
    "/v1/embeddings/%0d%0a",
    "/v1/embeddings%20",
    "http://other.example/v1/files",
    "/v1/chat/completions/",
    "/v1/chat%2fcompletions",
    "/v1/./chat/completions",
    "/v1/embeddings/.%2e/files",
    "/v1/embeddings?/../../files",
    "/v1/embeddings#/../files",
]


async def test_no_path_means_another_to_the_upstream_than_to_the_gateway(keyed, upstream, subtests):
    """With the gateway's own key, only what the configuration names is asked for, however it is written."""
    for path in CONFUSING:
        with subtests.test(path):
            del upstream.asked[:]
            told = await tell(keyed, post(path=path.encode()))
            assert told.answers[0].status < 500
            for asked in upstream.asked:
                where = asked.path.partition("?")[0]
                assert where == "/v1/embeddings", path
            assert told.answers[0].status in (200, 400, 404, 405)


MODEL_PATHS = ["..%2ffiles", "%2e%2e/files", "a/%2e%2e/%2e%2e/files", "%252e%252e/files", "..;/files", "a%2f%2fb"]


async def test_no_name_of_a_model_means_another_path_to_the_upstream(keyed, upstream, subtests):
    for name in MODEL_PATHS:
        with subtests.test(name):
            told = await tell(keyed, b"GET /v1/models/%s HTTP/1.1\r\nHost: x\r\n\r\n" % name.encode())
            assert told.answers[0].status == 404
            assert {asked.path for asked in upstream.asked} <= {"/v1/models"}


# Oracles


def shown(got: Got):
    """All that a caller sees of an answer, but what is drawn for each."""
    headers = {name: value for name, value in got.headers.items() if name.lower() not in ("x-request-id", "date")}
    return got.status, headers, got.body


@pytest.mark.parametrize("streamed", [True, False])
async def test_nobody_is_told_whether_another_tenant_has_asked_the_same(gateway, streamed):
    await gateway.chat("secret", headers=bearer("a"))
    await gateway.landed()
    only = {**bearer("b"), "Cache-Control": "only-if-cached"}
    there, elsewhere = [await gateway.chat(text, stream=streamed, headers=only) for text in ("secret", "unheard")]
    assert shown(there) == shown(elsewhere)
    assert there.status == 504
    asked = [await gateway.chat(text, headers=bearer("b")) for text in ("secret", "unheard")]
    assert [got.cache_status for got in asked] == [asked[0].cache_status] * 2
    assert not any("Age" in got.headers for got in asked)


async def test_nobody_joins_the_running_call_of_another_tenant(gateway, upstream):
    async def wait(asked):
        await asked.gate("both")
        await stream(asked, "x")

    upstream.script = wait
    asking = [asyncio.ensure_future(gateway.chat(headers=bearer(name))) for name in ("a", "b")]
    await by_then(lambda: len(upstream.asked) == 2)
    upstream.gate("both").released.set()
    assert ["collapsed" in (await each).cache_status for each in asking] == [False, False]
    assert [asked.headers["authorization"] for asked in upstream.asked] in (
        ["Bearer a", "Bearer b"],
        ["Bearer b", "Bearer a"],
    )


async def test_a_stream_of_another_tenant_is_as_unknown_as_one_that_never_was(gateway):
    token = (await gateway.chat(stream=True, headers=bearer("a"))).headers["Gateway-Stream-Id"]
    forged = token[:-4] + "AAAA"
    for method, end in (("GET", "?after=0"), ("GET", "/status"), ("POST", "/cancel")):
        seen = []
        for whose in (token, forged):
            url = f"{gateway.base_url}/streams/{whose}{end}"
            async with gateway.session.request(method, url, headers=bearer("b")) as response:
                got = Got(response.status, response.headers, await response.read())
                seen.append(json.dumps([got.status, got.json]).replace(whose, "ID"))
        assert seen[0] == seen[1]
        assert seen[0].startswith("[404")


async def test_keys_are_digests_under_a_secret_and_differ_by_tenant(gateway, shared_redis):
    for name in ("a", "b"):
        await gateway.chat(headers=bearer(name))
    await gateway.landed()
    with Redis.from_url(shared_redis.url) as client:
        names = [name.decode() for name in client.scan_iter(f"{gateway.store._server.config.prefix}*:rec", count=10_000)]
        everything = b" ".join(b"%r" % client.dump(name) for name in names) + " ".join(names).encode()
    secret = gateway.store.secret
    expected = {key_of(secret, tenant_of(secret, [f"Bearer {name}", "", "", "", ""])) for name in ("a", "b")}
    assert {name.split("{")[1].split("}")[0] for name in names} == expected
    assert len(expected) == 2
    other = bytes(32)
    assert key_of(secret, "a") != key_of(other, "a")
    assert tenant_of(secret, ["a"]) != tenant_of(other, ["a"])
    for digest in (sha256, blake2b):
        assert not expected & {digest(text).hexdigest()[:40] for text in (BODY, b"Bearer a" + BODY)}
    assert b"Bearer" not in everything


async def test_credentials_are_compared_in_constant_time(start_gateway, monkeypatch):
    compared = []

    def spy(name):
        module = __import__(name, fromlist=["x"])
        real = module.compare_digest

        def compare(one, other):
            compared.append((name, one, other))
            return real(one, other)

        monkeypatch.setattr(module, "compare_digest", compare)

    spy("gateway.http.admin")
    spy("gateway.core.stream_id")
    gateway = await start_gateway({"ADMIN": "secret-of-admin"}, admin={"key_env": "ADMIN"})
    for shown_key in ("", "s", "secret-of-admi", "secret-of-admin", "x" * 1000):
        async with gateway.session.get(f"{gateway.origin}/admin/", headers=bearer(shown_key)) as response:
            assert response.status == (200 if shown_key == "secret-of-admin" else 401)
    assert [one for _, one, _ in compared] == [b"", b"s", b"secret-of-admi", b"secret-of-admin", b"x" * 1000]
    assert {other for _, _, other in compared} == {b"secret-of-admin"}
    token = (await gateway.chat(stream=True)).headers["Gateway-Stream-Id"]
    async with gateway.session.get(f"{gateway.base_url}/streams/{token[:-4]}AAAA/status") as response:
        assert response.status == 404
    assert compared[-1][0] == "gateway.core.stream_id"

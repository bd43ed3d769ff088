"""Callers who are slow, silent, vanished, absurd or malicious: each gets a 4xx with the error object, or is served right;
nobody else is harmed, and nothing is left behind."""

import gzip
import json
import logging

import pytest
from raw import HEALTH, by_then, connected, nothing_is_left, read_answer, tell

CHAT = b"/v1/chat/completions"
BODY = json.dumps({"model": "model-1", "messages": [{"role": "user", "content": "hi"}]}).encode()


@pytest.fixture
async def gateway(start_gateway):
    started = await start_gateway()
    yield started
    await nothing_is_left(started)


def post(*lines, body=BODY, length=True, path=CHAT, version=b"1.1"):
    head = [b"POST %s HTTP/%s" % (path, version), b"Host: x", b"Content-Type: application/json", *lines]
    if length:
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*head, b"", body])


def chunked(*chunks, lines=(b"Transfer-Encoding: chunked",)):
    return post(*lines, body=b"".join(chunks), length=False)


GOOD_CHUNK = b"%x\r\n%s\r\n" % (len(BODY), BODY)
END_CHUNK = b"0\r\n\r\n"

REFUSED = {
    "no method": (b" / HTTP/1.1\r\n\r\n", 400),
    "garbage": (b"\x00\x01\x02garbage\xff\r\n\r\n", 400),
    "a method of garbage": (b"G\xffT / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a method that nobody knows": (b"BREW /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a method with a bracket": (b"GE(T / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "an endless method": (b"G" * 100_000, 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 400),
    "HTTP/3.0": (b"GET / HTTP/3.0\r\nHost: x\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(32)), 400),
    "SSH": (b"SSH-2.0-OpenSSH_9.6\r\n", 400),
    "Redis": (b"*1\r\n$4\r\nPING\r\n", 400),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    "a target that is no UTF-8": (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a target with a space": (b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a target with a control character": (b"GET /a\x01b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a target that is no path": (b"GET healthz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a very long target": (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 100_000), 431),
    "a long field": (b"GET / HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n" % (b"a" * 100_000), 431),
    "a field with a long name": (b"GET / HTTP/1.1\r\nHost: x\r\n%s: a\r\n\r\n" % (b"a" * 100_000), 431),
    "very many fields": (b"GET / HTTP/1.1\r\nHost: x\r\n%s\r\n" % b"".join(b"X%d: a\r\n" % i for i in range(2000)), 431),
    "a field with NUL": (b"GET / HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n", 400),
    "a field with a bare CR": (b"GET / HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n", 400),
    "a name with a space": (b"GET / HTTP/1.1\r\nHost: x\r\nX Y: a\r\n\r\n", 400),
    "a name with a space behind it": (b"GET / HTTP/1.1\r\nHost: x\r\nX : a\r\n\r\n", 400),
    "no name": (b"GET / HTTP/1.1\r\nHost: x\r\n: a\r\n\r\n", 400),
    "no colon": (b"GET / HTTP/1.1\r\nHost: x\r\nX\r\n\r\n", 400),
    "a folded field": (b"GET / HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n", 400),
    "a space before the first field": (b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    "lines that end with LF": (b"GET / HTTP/1.1\nHost: x\n\n", 400),
    "one line that ends with LF": (b"GET / HTTP/1.1\r\nHost: x\nX: a\r\n\r\n", 400),
    "a length and chunks": (chunked(GOOD_CHUNK, END_CHUNK, lines=(b"Transfer-Encoding: chunked", b"Content-Length: 5")), 400),
    "chunks and a length": (chunked(GOOD_CHUNK, END_CHUNK, lines=(b"Content-Length: 5", b"Transfer-Encoding: chunked")), 400),
    "two lengths": (post(b"Content-Length: 5"), 400),
    "two equal lengths": (post(b"Content-Length: %d" % len(BODY)), 400),
    "a list of lengths": (post(b"Content-Length: %d, %d" % (len(BODY), len(BODY)), length=False), 400),
    "a negative length": (post(b"Content-Length: -1", length=False), 400),
    "a length with a plus": (post(b"Content-Length: +5", length=False), 400),
    "a length in hexadecimal": (post(b"Content-Length: 0x5", length=False), 400),
    "no length behind its name": (post(b"Content-Length:", length=False), 400),
    "an enormous length": (post(b"Content-Length: 99999999999999999999999", length=False), 400),
    "another coding behind chunked": (chunked(GOOD_CHUNK, END_CHUNK, lines=(b"Transfer-Encoding: chunked, gzip",)), 400),
    "chunked twice": (chunked(GOOD_CHUNK, END_CHUNK, lines=(b"Transfer-Encoding: chunked, chunked",)), 400),
    "another coding": (chunked(GOOD_CHUNK, END_CHUNK, lines=(b"Transfer-Encoding: identity",)), 400),
    "a coding that looks like chunked": (chunked(GOOD_CHUNK, END_CHUNK, lines=(b"Transfer-Encoding: xchunked",)), 400),
    "a size that is no number": (chunked(b"zz\r\nhi\r\n", END_CHUNK), 400),
    "a negative size": (chunked(b"-2\r\nhi\r\n", END_CHUNK), 400),
    "an enormous size": (chunked(b"fffffffffffffffff\r\nhi\r\n", END_CHUNK), 400),
    "a chunk that is longer than its size": (chunked(b"1\r\nhi\r\n", END_CHUNK), 400),
    "a content coding that is not true": (post(b"Content-Encoding: gzip"), 400),
    "a chunk without its end": (chunked(b"2\r\nhi", END_CHUNK), 400),
    "a bare LF in a chunk's head": (chunked(b"2\nhi\r\n", END_CHUNK), 400),
}  # fmt: skip


async def test_what_is_not_http_is_refused_with_the_error_object_and_the_end_of_the_connection(
    gateway, upstream, caplog, subtests
):
    for name, (sent, status) in REFUSED.items():
        with subtests.test(name):
            told = await tell(gateway, sent + HEALTH, closes=True)  # what comes behind it is not looked at
            [answer] = told.answers
            assert (answer.status, answer.error["type"]) == (status, "invalid_request_error")
            assert (told.rest, told.closed) == (b"", True)
            assert answer.header("x-request-id")
            assert answer.header("cache-control") == "no-store"
            assert not upstream.asked
            assert not complaints(caplog)


def complaints(caplog):
    return [record for record in caplog.records if record.levelno > logging.INFO]


def get(path=b"/healthz", *lines, version=b"1.1"):
    return b"\r\n".join([b"GET %s HTTP/%s" % (path, version), b"Host: x", *lines, b"", b""])


NOT_TAKEN = {
    "an unknown expectation": (post(b"Expect: 200-ok"), 417),
    "an unknown content coding": (post(b"Content-Encoding: rot13"), 415),
    "two content codings": (post(b"Content-Encoding: gzip, gzip"), 415),
    "half a gzip": (post(b"Content-Encoding: gzip", body=gzip.compress(BODY)[:40]), 400),
    "a body that is no JSON": (post(body=b"hi"), 400),
    "no body": (post(body=b""), 400),
    "no length and no chunks": (post(length=False, body=b""), 400),
    "a path that is not served": (get(b"/nothing"), 404),
    "a method that is not served": (b"DELETE /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    "all of the server": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "a tunnel": (b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "an invalid escape": (get(b"/%zz"), 404),
    "an escape that is no UTF-8": (get(b"/%ff"), 404),
    "an escaped end of line": (get(b"/%0d%0aX-Forged:%20a"), 404),
    "an escaped NUL": (get(b"/v1/models/%00"), 404),
    "a stream id with an escaped end of line": (get(b"/v1/streams/a%0d%0ab"), 404),
    "a place that is no number": (get(b"/v1/streams/abc?after=%00"), 400),
}  # fmt: skip


async def test_a_request_that_is_refused_leaves_a_connection_that_serves(gateway, upstream, caplog, subtests):
    for name, (sent, status) in NOT_TAKEN.items():
        with subtests.test(name):
            told = await tell(gateway, sent)
            [answer] = told.answers
            assert (answer.status, answer.error["type"]) == (status, "invalid_request_error")
            assert not told.closed
            assert not [asked for asked in upstream.asked if asked.method == "POST"]
            assert not complaints(caplog)


TRAILED = chunked(b"5;name=value\r\n" + BODY[:5] + b"\r\n", b"%X\r\n%s\r\n" % (len(BODY) - 5, BODY[5:]), b"0\r\nX: a\r\n\r\n")
SERVED = {
    "a target in absolute form": (get(b"http://other.example/healthz"), 1),
    "empty lines before it": (b"\r\n\r\n" + get(), 1),
    "as many fields as there may be": (get(b"/healthz", *[b"X%d: a" % number for number in range(100)]), 1),
    "a long line": (get(b"/healthz?" + b"a" * 8000), 1),
    "chunks, with extension and trailer": (TRAILED, 1),
    "an expectation that is met": (post(b"Expect: 100-continue"), 1),
    "an upgrade that is not offered": (get(b"/healthz", b"Connection: Upgrade", b"Upgrade: websocket"), 1),
    "HTTP/2 by an upgrade": (get(b"/healthz", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: "), 1),
    "requests in a row": (post() + get() + post(), 3),
    "very many requests in a row": (get() * 200, 200),
    "a compressed body": (post(b"Content-Encoding: gzip", body=gzip.compress(BODY)), 1),
    "a version that is old but keeps the connection": (get(b"/healthz", b"Connection: keep-alive", version=b"1.0"), 1),
}  # fmt: skip


async def test_what_is_odd_but_allowed_is_served(gateway, subtests):
    for name, (sent, answers) in SERVED.items():
        with subtests.test(name):
            told = await tell(gateway, sent, answers=answers)
            assert [answer.status for answer in told.answers] == [200] * answers
            assert not told.closed


async def test_a_request_may_come_byte_by_byte(gateway, upstream):
    sent = chunked(GOOD_CHUNK, END_CHUNK)
    told = await tell(gateway, *[bytes([byte]) for byte in sent], b"")
    assert told.answers[0].status == 200
    assert upstream.bodies[0]["messages"] == json.loads(BODY)["messages"]

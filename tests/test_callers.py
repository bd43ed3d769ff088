"""Callers who are slow, silent, vanished, absurd or malicious: each gets a 4xx with the error object, or is served right;
nobody else is harmed, and nothing is left behind."""

import asyncio
import contextlib
import ctypes
import gzip
import json
import logging
import socket
import struct
import sys
from contextlib import asynccontextmanager

import pytest
from aiohttp.compression_utils import HAS_BROTLI
from raw import HEALTH, PATIENCE_S, by_then, connected, left_over, nothing_is_left, read_answer, tell
from scripted import chunk
from yarl import URL

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


CHUNKED = b"Transfer-Encoding: chunked"


def chunked(*chunks, lines=(CHUNKED,)):
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
    "a length and chunks": (chunked(GOOD_CHUNK, END_CHUNK, lines=(CHUNKED, b"Content-Length: 5")), 400),
    "chunks and a length": (chunked(GOOD_CHUNK, END_CHUNK, lines=(b"Content-Length: 5", CHUNKED)), 400),
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


TRAILED = chunked(
    b"5;name=value\r\n" + BODY[:5] + b"\r\n", b"%X\r\n%s\r\n" % (len(BODY) - 5, BODY[5:]), b"0\r\nX: a\r\n\r\n"
)
SERVED = {
    "a target in absolute form": (get(b"http://other.example/healthz"), 1),
    "empty lines before it": (b"\r\n\r\n" + get(), 1),
    "as many fields as there may be": (get(b"/healthz", *[b"X%d: a" % number for number in range(100)]), 1),
    "a long line": (get(b"/healthz?" + b"a" * 8000), 1),
    "chunks, with extension and trailer": (TRAILED, 1),
    "an expectation that is met": (post(b"Expect: 100-continue"), 1),
    "an upgrade that is not offered": (get(b"/healthz", b"Connection: Upgrade", b"Upgrade: websocket"), 1),
    "HTTP/2 by an upgrade": (get(b"/healthz", b"Connection: Upgrade", b"Upgrade: h2c", b"HTTP2-Settings: "), 1),
    "requests in a row": (post() + get() + post(), 3),
    "very many requests in a row": (get() * 200, 200),
    "a compressed body": (post(b"Content-Encoding: gzip", body=gzip.compress(BODY)), 1),
    "a version that is old but keeps the connection": (get(b"/healthz", b"Connection: keep-alive", version=b"1.0"), 1),
}  # fmt: skip


async def test_a_content_coding_without_a_library_for_it_is_refused_with_those_that_will_do(gateway, upstream):
    """Brotli, where it happens to be installed, is undone like the others."""
    if HAS_BROTLI:
        pytest.skip("Brotli is installed here")
    [answer] = (await tell(gateway, post(b"Content-Encoding: br"), closes=True)).answers
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")
    assert answer.header("accept-encoding") == "gzip, deflate, zstd, identity"
    assert answer.header("accept-encoding") in answer.error["message"]
    assert not upstream.asked


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


# Slow senders

LONG, GZIPPED = b"Content-Length: 100000", gzip.compress(BODY)
UPLOAD = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
STOPS = {
    "a head": [b"GET /healthz HTTP/1.1\r\nHo"],
    "the first line of a head": [b"GE"],
    "a head, after a request": [get(), b"GET /healthz HTTP/1.1\r\nHost: x\r\n"],
    "a head, byte by byte": [b"GET / HTTP/1.1\r\nX: ", *[b"a"] * 10_000],
    "a body with a length": [post()[:-1]],
    "a body in chunks": [chunked(GOOD_CHUNK[:-20])],
    "a body before its last chunk": [chunked(GOOD_CHUNK)],
    "a body, byte by byte": [post(LONG, length=False, body=b""), *[b" "] * 10_000],
    "a body that is compressed": [post(LONG, b"Content-Encoding: gzip", length=False, body=GZIPPED[:10])],
    "a body that is passed on": [post(path=b"/v1/embeddings")[:-1]],
    "an upload": [UPLOAD + b"Content-Length: 100000\r\n\r\n--x\r\n"],
    "an upload in chunks": [UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\n--x\r\n"],
}  # fmt: skip


@pytest.fixture
async def hasty(start_gateway):
    """A gateway with little patience."""
    started = await start_gateway(server={"read_timeout_s": 0.1, "write_timeout_s": 1.0})
    yield started
    await nothing_is_left(started)


@pytest.mark.parametrize("pieces", STOPS.values(), ids=STOPS.keys())
async def test_a_request_that_stops_or_trickles_is_answered_with_408_and_the_end_of_the_connection(
    hasty, upstream, caplog, pieces
):
    async with connected(hasty) as (reader, writer):
        sending = asyncio.ensure_future(trickle(writer, pieces))
        async with asyncio.timeout(PATIENCE_S):
            answer = await read_answer(reader)
            if pieces[0].startswith(get()):
                assert answer.status == 200
                answer = await read_answer(reader)
        sending.cancel()
    assert (answer.status, answer.error["type"], answer.error["code"]) == (408, "invalid_request_error", "request_too_slow")
    assert answer.header("connection") == "close"
    assert not complaints(caplog)
    [pool] = [each.pool for each in hasty.service._questions._router.upstreams]
    assert not pool.deployments[0].health._failures  # what a caller does is no fault of the upstream's


async def trickle(writer, pieces):
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)  # the caller's own slowness


async def test_a_body_that_is_long_but_comes_at_some_rate_is_served(start_gateway):
    gateway = await start_gateway(server={"read_timeout_s": 0.5})
    body = BODY.ljust(8000)
    async with connected(gateway) as (reader, writer):
        writer.write(post(body=body)[: -len(body)])
        for start in range(0, len(body), 1000):
            writer.write(body[start : start + 1000])
            await writer.drain()
            await asyncio.sleep(0.1)  # longer, together, than a body may stop
        assert (await read_answer(reader)).status == 200


@pytest.mark.parametrize("pieces", STOPS.values(), ids=STOPS.keys())
async def test_a_caller_who_leaves_in_the_middle_of_a_request_leaves_nothing(gateway, caplog, pieces):
    async with connected(gateway) as (_, writer):
        writer.write(pieces[0])
        await writer.drain()
        await by_then(lambda: gateway.runner.server.connections)
    await by_then(lambda: not gateway.runner.server.connections)
    assert not complaints(caplog)


BOMB = gzip.compress(b" " * (100 << 20))


async def test_a_small_body_that_decompresses_to_a_large_one_is_too_large(start_gateway):
    gateway = await start_gateway(server={"max_body_bytes": 1 << 20})
    told = await tell(gateway, post(b"Content-Encoding: gzip", body=BOMB))
    assert (told.answers[0].status, told.answers[0].error["code"]) == (413, "request_too_large")


# Slow readers

SMALL = 4096
"""What a slow reader's kernel takes for it, so that the gateway has to."""

AHEAD_BYTES = 256 << 10
"""How far the gateway may be ahead of a caller who reads nothing: what a transport holds, and the piece that filled it."""

WORDS = "x" * 10_000
ENOUGH = 100
"""Frames of so many bytes that they fill every buffer between the gateway and a slow reader, many times over."""


@asynccontextmanager
async def slow_callers(gateway, *sent):
    """Callers who send that, and read only what they are told to; the kernel holds little for either side."""
    sockets = []
    loop = asyncio.get_running_loop()
    for acceptor in gateway.server._acceptors:
        acceptor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    try:
        for data in sent:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
            sock.setblocking(False)
            sockets.append(sock)
            await loop.sock_connect(sock, ("127.0.0.1", URL(gateway.origin).port))
            await loop.sock_sendall(sock, data)
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def buffered(gateway):
    """What the gateway holds for each caller in its transport."""
    transports = [connection.transport for connection in gateway.runner.server.connections]
    return [transport.get_write_buffer_size() for transport in transports if transport]


def ask(content, **members):
    body = {"model": "model-1", "messages": [{"role": "user", "content": content}], **members}
    return post(body=json.dumps(body).encode())


async def say_much(asked):
    """An answer of a MB, once all who are to hear it are there."""
    await asked.head()
    await asked.event(chunk({"role": "assistant", "content": ""}))
    await asked.gate("all are there")
    for _ in range(ENOUGH):
        await asked.event(chunk({"content": WORDS}))
    await asked.event(chunk({}, "stop"))
    await asked.done()


def has_all(got):
    return got.status == 200 and got.body.count(WORDS.encode()) == ENOUGH and got.body.endswith(b"data: [DONE]\n\n")


async def test_a_thousand_slow_readers_of_one_stream_cost_little_and_slow_nobody(start_gateway, upstream):
    upstream.script = say_much
    gateway = await start_gateway()
    count = 1000
    async with slow_callers(gateway, *[ask("hi", stream=True)] * count) as sockets:
        reading = asyncio.ensure_future(gateway.chat(stream=True))
        await by_then(lambda: sum(each.readers for each in flights(gateway)) == count + 1)
        upstream.gate("all are there").released.set()
        for _ in range(5):
            for sock in sockets:
                with contextlib.suppress(BlockingIOError):
                    sock.recv(1)
            await asyncio.sleep(0.001)
        assert has_all(await reading)
        await by_then(lambda: sum(size > 0 for size in buffered(gateway)) == count)
        assert max(buffered(gateway)) < AHEAD_BYTES
        assert len(upstream.asked) == 1
        assert has_all(await gateway.chat(stream=True, headers={"Cache-Control": "no-cache"}))  # others are served
    await nothing_is_left(gateway)


def flights(gateway):
    return list(gateway.service._flights._by_key.values())


MANY = 50
STREAMS_OF_THEIR_OWN = [ask(f"{number}", stream=True) for number in range(MANY)]
RELAYED = b"GET /v1/files/f/content HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW = {
    "streams of their own": STREAMS_OF_THEIR_OWN,
    "answers in full": [ask(f"{number}") for number in range(MANY)],
    "replays": [ask("stored", stream=True)] * MANY,
    "replays with ids": [ask("stored", stream=True).replace(b"Host: x", b"Host: x\r\nGateway-Event-Ids: ?1")] * MANY,
    "stored answers in full": [ask("stored")] * MANY,
    "what is relayed": [RELAYED] * MANY,
    "requests in a row": [get(b"/openapi.json") * 500] * 5,
    "errors in a row": [post(body=b"{}", path=b"/nothing") * 2000] * 5,
}


async def much_at_once(asked):
    if asked.path.endswith("/content"):
        await asked.answer(b"x" * (1 << 20), content_type="text/plain")
    else:
        asked.upstream.gate("all are there").released.set()
        await say_much(asked)


TRICKLED = ("replays", "stored answers in full", "what is relayed")
ROWS = [
    *[pytest.param(sent, 0, id=name) for name, sent in SLOW.items()],
    *[pytest.param(SLOW[name], 256, id=f"{name}, who trickles") for name in TRICKLED],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "reads"), ROWS)
async def test_no_answer_is_written_far_ahead_of_a_caller_who_does_not_read_or_hardly_and_who_is_let_go(
    start_gateway, upstream, caplog, sent, reads
):
    upstream.script = much_at_once
    gateway = await start_gateway(server={"write_timeout_s": 1.0})
    await gateway.chat("stored", stream=True)
    await gateway.landed()
    ahead = [0]

    def all_let_go():
        ahead.extend(buffered(gateway))
        for sock in sockets if reads else ():
            with contextlib.suppress(BlockingIOError, ConnectionError):
                sock.recv(reads)
        return not left_over(gateway)

    async with slow_callers(gateway, *sent) as sockets:
        assert has_all(await gateway.chat("others", stream=True))
        await gateway.session.close()
        await by_then(all_let_go)  # though the callers have closed nothing
    assert 0 < max(ahead) < AHEAD_BYTES
    assert not complaints(caplog)


async def test_a_caller_who_reads_late_gets_all_that_was_asked_for_in_a_row(start_gateway):
    gateway = await start_gateway()
    asked = 300
    async with slow_callers(gateway, get(b"/openapi.json") * asked) as [sock]:
        await by_then(lambda: any(buffered(gateway)))
        reader, writer = await asyncio.open_connection(sock=sock)
        bodies = {(await read_answer(reader)).body for _ in range(asked)}
        writer.close()
    assert len(bodies) == 1


# Callers who vanish


def vanish(sock):
    """From now on nothing reaches that caller's kernel, and nothing leaves it: a filter drops all (socket(7), bpf(2))."""
    drop_all = struct.pack("HBBI", 0x06, 0, 0, 0)  # BPF_RET: take 0 bytes
    code = ctypes.create_string_buffer(drop_all)
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(code)))


SO_ATTACH_FILTER = 26
VANISHING = {
    "in the middle of a stream": ask("hi", stream=True),
    "waiting for a stream": ask("hi", stream=True, wait=True),
    "waiting for a whole answer": ask("ho", wait=True),
    "waiting for what is relayed": RELAYED,
    "between two requests": get(),
    "in the middle of a head": get()[:-4],
    "in the middle of a body": post()[:-4],
}


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")
async def test_a_caller_who_vanishes_without_a_word_is_noticed(start_gateway, upstream):
    async def wait(asked):
        if asked.path.endswith("/completions") and not asked.json.get("wait"):
            await asked.head()
            await asked.event(chunk({"content": "x"}))
        await asked.gate("all are gone")

    upstream.script = wait
    abandoned = {"when_abandoned": "cancel", "abandon_grace_s": 0.0}
    gateway = await start_gateway(server={"write_timeout_s": 1.0}, flights=abandoned)
    async with slow_callers(gateway, *VANISHING.values()) as sockets:
        await by_then(lambda: len(upstream.asked) == sum("waiting" in name or "stream" in name for name in VANISHING))
        for sock in sockets:
            vanish(sock)
        await nothing_is_left(gateway)

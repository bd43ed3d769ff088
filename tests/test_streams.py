"""The upstream misbehaves, callers leave, and streams are shared: what each caller is told, and what is stored."""

import asyncio
import json
import socket
import zlib
from contextlib import suppress

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from running import next_block
from scripted import USAGE, chunk, say_hello, stream, text_chunk, whole_answer

from gateway.core.apis import CHAT, COMPLETIONS

MODES = pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
CHUNKS = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "Hé\u2028"}),
    chunk({"content": "llo \U0001f600"}),
    chunk({}, "stop"),
]
GOOD = b"".join(b"data: %s\n\n" % json.dumps(each, ensure_ascii=False).encode() for each in CHUNKS)
DONE = b"data: [DONE]\n\n"
FIRST = b"data: %s\n\n" % json.dumps(CHUNKS[1]).encode()
LAST = b"data: %s\n\n" % json.dumps(CHUNKS[3]).encode()
OVERLOADED = {"message": "Overloaded.", "type": "server_error", "param": None, "code": "overloaded"}


@pytest.fixture
async def gateway(start_gateway):
    return await start_gateway()


@pytest.fixture(autouse=True)
def nothing_is_logged_as_an_error(caplog):
    """Neither an upstream's fault nor a caller who leaves is an error of the gateway's."""
    yield
    assert [record for record in caplog.get_records("call") if record.levelname == "ERROR"] == []


def sends(*pieces, content_type="text/event-stream", **headers):
    """A script that answers 200 and sends each piece by itself."""

    async def script(asked):
        await asked.head(content_type=content_type, **headers)
        for piece in pieces:
            await asked.send(piece)
            await asyncio.sleep(0)  # the reader's turn, and once more for what it wakes
            await asyncio.sleep(0)
        await asked.end()

    return script


def content(got):
    return got.json["choices"][0]["message"]["content"]


async def blocks(response):
    while block := await next_block(response):
        yield block


async def rest_of(response):
    return [block.removeprefix("data: ") async for block in blocks(response)]


async def official(gateway, streamed, **members):
    """What the official client makes of it: its chunks' texts, or the whole text."""
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="k", max_retries=0) as client:
        request = {"model": "model-1", "messages": [{"role": "user", "content": "hi"}], **members}
        if not streamed:
            return (await client.chat.completions.create(**request)).choices[0].message.content
        chunks = await client.chat.completions.create(**request, stream=True)
        return [each.choices[0].delta.content async for each in chunks]


# Good streams in odd forms


def in_several_lines():
    """Each chunk's JSON over several lines of data."""
    forms = [json.dumps(each, indent=1).replace("\n", "\ndata: ") for each in CHUNKS]
    return "".join(f"data: {form}\n\n" for form in forms).encode()


FORMS = {
    "CRLF": GOOD.replace(b"\n", b"\r\n"),
    "CR": GOOD.replace(b"\n", b"\r"),
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "comments": b": hello\n\n" + GOOD.replace(b"data:", b": OPENROUTER PROCESSING\n\n: x\ndata:"),
    "no space": GOOD.replace(b"data: ", b"data:"),
    "event lines": GOOD.replace(b"data:", b"event: completion\ndata:"),
    "ids and retry": b"retry: 1000\n\n" + GOOD.replace(b"data:", b"id: 7\ndata:"),
    "pings": b"event: ping\ndata: {}\n\n" + GOOD.replace(b"data:", b'event: ping\ndata: {"type": "ping"}\n\ndata:'),
    "data in several lines": in_several_lines(),
    "empty events": b"\n\n" + GOOD.replace(b"\n\n", b"\n\ndata:\n\n"),
}  # fmt: skip


@MODES
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
async def test_a_good_stream_in_an_odd_form_is_an_ordinary_one_to_the_caller_and_to_the_cache(
    gateway, upstream, form, streamed
):
    upstream.script = sends(form + DONE)
    miss, hit = await gateway.chat(stream=streamed), await gateway.chat(stream=streamed)
    assert len(upstream.asked) == 1
    if not streamed:
        assert content(miss) == content(hit) == "Hé\u2028llo \U0001f600"
        return
    *events, done = miss.events
    assert ([json.loads(each) for each in events], done) == (CHUNKS, "[DONE]")
    assert miss.body.count(b"\n") == 2 * len(miss.events)  # nothing else is in the stream
    assert len(hit.events) == len(miss.events)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 300])
@pytest.mark.parametrize("form", [GOOD, FORMS["CRLF"], FORMS["a byte order mark"]], ids=["LF", "CRLF", "BOM"])
async def test_how_the_bytes_of_a_stream_are_cut_makes_no_difference(gateway, upstream, form, size):
    data = form + DONE
    upstream.script = sends(*(data[at : at + size] for at in range(0, len(data), size)))
    assert (await gateway.chat(stream=True)).body == GOOD + DONE
    upstream.script = sends(data)
    assert (await gateway.chat(stream=True, headers={"Cache-Control": "no-store"})).body == GOOD + DONE


@MODES
async def test_a_frame_of_a_megabyte_is_passed_on_and_stored(gateway, upstream, streamed):
    text = "é" * 500_000
    upstream.script = sends(b"data: %s\n\n" % json.dumps(chunk({"content": text})).encode(), LAST, DONE)
    for _ in range(2):
        got = await gateway.chat(stream=streamed)
        told = json.loads(got.events[0])["choices"][0]["delta"]["content"] if streamed else content(got)
        assert told == text
    assert len(upstream.asked) == 1


@MODES
async def test_a_compressed_stream_is_read_as_it_comes(gateway, upstream, streamed):
    packer = zlib.compressobj(wbits=31)

    def packed(data):
        return packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)

    async def script(asked):
        await asked.head(content_encoding="gzip")
        await asked.send(packed(FIRST))
        if streamed:
            await asked.gate("between")
        await asked.send(packed(LAST + DONE) + packer.flush())
        await asked.end()

    upstream.script = script
    if not streamed:
        assert content(await gateway.chat()) == "Hé\u2028"
        return
    async with gateway.opened(stream=True) as response:
        assert "Content-Encoding" not in response.headers
        assert json.loads((await next_block(response)).removeprefix("data: ")) == CHUNKS[1]
        upstream.gate("between").released.set()
        assert (await rest_of(response))[-1] == "[DONE]"


@MODES
async def test_json_in_place_of_a_stream_is_an_answer_and_is_stored(gateway, upstream, streamed):
    async def script(asked):
        assert asked.json["stream"] is True
        await asked.answer(whole_answer("Hello big world"))

    upstream.script = script
    for _ in range(2):
        got = await gateway.chat(stream=streamed)
        if streamed:
            assert got.headers["Content-Type"].startswith("text/event-stream")
            assert got.events[-1] == "[DONE]"
            assert assembled(CHAT, got.events) == nameless(whole_answer("Hello big world"), usage=False)
        else:
            assert nameless(got.json) == nameless(whole_answer("Hello big world"))
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("content_type", ["text/plain", "application/octet-stream", "text/event-stream; charset=utf-8"])
async def test_a_stream_by_another_name_is_a_stream(gateway, upstream, content_type):
    upstream.script = sends(GOOD + DONE, content_type=content_type)
    assert (await gateway.chat(stream=True)).body == GOOD + DONE


def assembled(api, events):
    """The answer that these events make, nameless."""
    assembler = api.assembler()
    for event in events:
        if event != "[DONE]":
            assembler.add(json.loads(event))
    return nameless(assembler.body())


def nameless(body, *, usage=True):
    hidden = {"id", "created"} | (set() if usage else {"usage"})
    return {name: value for name, value in body.items() if name not in hidden}


# What is complete, and so stored


@MODES
async def test_finish_reasons_without_done_are_a_complete_answer(gateway, upstream, streamed):
    upstream.script = sends(GOOD)
    got = await gateway.chat(stream=streamed)
    assert (got.body == GOOD + DONE) if streamed else (content(got) == "Hé\u2028llo \U0001f600")
    assert await gateway.stores()


@MODES
async def test_done_without_a_finish_reason_is_passed_on_and_not_stored(gateway, upstream, streamed):
    upstream.script = sends(FIRST, DONE)
    got = await gateway.chat(stream=streamed)
    assert (got.body == FIRST + DONE) if streamed else (content(got) == "Hé\u2028")
    assert not await gateway.stores(stream=streamed)


async def test_one_choice_without_a_finish_reason_is_enough_not_to_store(gateway, upstream):
    upstream.script = sends(FIRST, LAST, DONE)
    got = await gateway.chat(stream=True, n=2)
    assert got.body == FIRST + LAST + DONE
    assert not await gateway.stores(n=2)


async def test_an_answer_ends_with_done_though_the_upstream_keeps_its_connection_open(gateway, upstream):
    async def script(asked):
        await asked.head()
        await asked.send(GOOD + DONE + b"data: late\n\n")
        await asked.gate("never")

    upstream.script = script
    assert (await gateway.chat(stream=True)).body == GOOD + DONE
    assert content(await gateway.chat()) == "Hé\u2028llo \U0001f600"


LIMITS = [({}, False), ({"max_tokens": 1}, True), ({"max_completion_tokens": 1}, True), ({"max_tokens": None}, False)]


@pytest.mark.parametrize(("members", "stored"), LIMITS)
async def test_a_cut_answer_is_stored_only_where_the_request_itself_set_the_limit(gateway, upstream, members, stored):
    upstream.script = lambda asked: stream(asked, "cut", finish="length")
    assert content(await gateway.chat(**members)) == "cut"
    assert await gateway.stores(**members) is stored


@MODES
@pytest.mark.parametrize(("reason", "stored"), [("content_filter", False), ("error", False), ("weird", False),
                                                ("tool_calls", True), ("function_call", True)])  # fmt: skip
async def test_only_storable_finish_reasons_are_stored(gateway, upstream, reason, stored, streamed):
    upstream.script = lambda asked: stream(asked, "text", finish=reason)
    assert (await gateway.chat(stream=streamed)).status == 200
    assert await gateway.stores() is stored


async def test_the_configuration_narrows_what_is_stored(start_gateway, upstream):
    gateway = await start_gateway(cache={"finish_reasons": ["tool_calls"]})
    await gateway.chat()
    assert not await gateway.stores()


@MODES
async def test_an_answer_over_the_size_limit_is_delivered_and_not_stored(start_gateway, upstream, streamed):
    gateway = await start_gateway(cache={"max_recording_bytes": len(GOOD)})
    upstream.script = sends(GOOD + DONE)
    await gateway.chat(stream=streamed)
    assert await gateway.stores()
    upstream.script = sends(FIRST, GOOD, DONE)
    got = await gateway.chat("more", stream=streamed)
    assert (got.body == FIRST + GOOD + DONE) if streamed else content(got).startswith("Hé\u2028Hé")
    assert not await gateway.stores("more")


async def test_what_one_gateway_stored_another_one_replays(start_gateway, upstream):
    shared = {"redis": {"prefix": f"shared-{id(upstream)}"}}
    one, other = await start_gateway(**shared), await start_gateway(**shared)
    await one.chat(stream=True)
    await one.landed()
    assert (await other.chat()).cache_status.startswith("gateway; hit")
    assert len(upstream.asked) == 1


# Broken answers

BROKEN = {
    "JSON cut in half": (FIRST + b'data: {"id": "x", "choi\n\n', 1),
    "no JSON": (FIRST + b"data: <oops>\n\n" + LAST, 1),
    "JSON that is no object": (b"data: [1]\n\n", 0),
    "an end in the middle": (FIRST, 1),
    "an end in the middle of a line": (FIRST + LAST[:-20], 1),
    "an end before the blank line": (FIRST + LAST[:-1], 1),
    "nothing": (b"", 0),
    "only a comment": (b": hello\n\n", 0),
    "only [DONE]": (DONE, 0),
}


@MODES
@pytest.mark.parametrize(("data", "good"), BROKEN.values(), ids=BROKEN.keys())
async def test_a_broken_answer_ends_in_an_error_and_is_not_stored(gateway, upstream, data, good, streamed):
    upstream.script = sends(data)
    got = await gateway.chat(stream=streamed)
    await assert_broken(gateway, upstream, got, streamed, good)


async def assert_broken(gateway, upstream, got, streamed, good, code="upstream_broke", status=502):
    """The caller was told: by the status, where nothing had come. Nothing is stored; nobody else is served from it; and the
    official client raises.
    """
    if streamed and good:
        assert got.status == 200
        *events, last = got.events
        assert [json.loads(event) for event in events] == [CHUNKS[1]] * good
        error = json.loads(last)["error"]
    else:
        assert got.status == status
        error = got.json["error"]
    assert error["message"]
    assert (error["type"], error["code"]) == ("upstream_error", code)
    assert not await gateway.stores()
    with pytest.raises(openai.APIError if streamed and good else openai.InternalServerError) as raised:
        await official(gateway, streamed)
    assert raised.value.code == code
    upstream.script = say_hello
    assert content(await gateway.chat()) == "Hello world"


async def test_a_completion_breaks_as_a_chat_does(gateway, upstream):
    first = text_chunk("He")
    upstream.script = sends(b"data: %s\n\n" % json.dumps(first).encode())
    got = await gateway.post("/v1/completions", {"model": "model-1", "prompt": "hi", "stream": True})
    good, last = got.events
    assert json.loads(good) == first
    assert json.loads(last)["error"]["code"] == "upstream_broke"
    assert (await gateway.post("/v1/completions", {"model": "model-1", "prompt": "hi"})).status == 502


@MODES
async def test_a_reset_in_the_middle_ends_in_an_error(gateway, upstream, streamed):
    """All that came before it has been passed on when the reset comes."""

    async def script(asked):
        await asked.head()
        await asked.send(FIRST)
        if streamed and len(upstream.asked) == 1:
            await asked.gate("read")
        asked.reset()

    upstream.script = script
    if not streamed:
        await assert_broken(gateway, upstream, await gateway.chat(), streamed, 0)
        return
    async with gateway.opened(stream=True) as response:
        assert json.loads((await next_block(response)).removeprefix("data: ")) == CHUNKS[1]
        upstream.gate("read").released.set()
        [error] = await rest_of(response)
    assert json.loads(error)["error"]["code"] == "upstream_broke"
    assert not await gateway.stores()


@MODES
async def test_a_web_page_in_place_of_an_answer_is_a_bad_gateway(gateway, upstream, streamed):
    upstream.script = sends(b"<html>Log in to the hotel's network</html>", content_type="text/html; charset=utf-8")
    got = await gateway.chat(stream=streamed)
    assert (got.status, got.json["error"]["code"]) == (502, "upstream_broke")
    assert b"hotel" not in got.body
    assert not await gateway.stores()


NO_ANSWERS = [b"", b"null", b"[]", b'"hi"', b"{", b"\xff", b"{}", b'{"choices": null}', b'{"choices": [1]}']


@MODES
@pytest.mark.parametrize("body", NO_ANSWERS)
async def test_json_that_is_no_answer_is_a_bad_gateway(gateway, upstream, body, streamed):
    async def script(asked):
        await asked.answer(body)

    upstream.script = script
    got = await gateway.chat(stream=streamed)
    if streamed and got.status == 200:
        [event] = got.events
        error = json.loads(event)["error"]
    else:
        error = got.json["error"]
        assert got.status == 502
    assert error["code"] == "upstream_broke"
    assert not await gateway.stores()


@MODES
@pytest.mark.parametrize(("code", "status"), [(429, 429), ("overloaded", 502), (None, 502), (200, 502)])
async def test_an_error_that_comes_as_a_200_is_an_error_again(gateway, upstream, code, status, streamed):
    error = {"message": "Overloaded.", "type": "server_error", "param": None, "code": code}

    async def script(asked):
        await asked.answer({"error": error})

    upstream.script = script
    got = await gateway.chat(stream=streamed)
    assert (got.status, got.json) == (status, {"error": error})
    assert not await gateway.stores()


ERRORS = {
    "nested": b"data: %s\n\n" % json.dumps({"error": OVERLOADED}).encode(),
    "nested, with an event line": b"event: error\ndata: %s\n\n" % json.dumps({"error": OVERLOADED}).encode(),
    "flat, with an event line": b"event: error\ndata: %s\n\n" % json.dumps(OVERLOADED).encode(),
    "nested, and [DONE] after it": b"data: %s\n\n" % json.dumps({"error": OVERLOADED}).encode() + DONE,
}


@MODES
@pytest.mark.parametrize("before", [b"", FIRST], ids=["first", "later"])
@pytest.mark.parametrize("event", ERRORS.values(), ids=ERRORS.keys())
async def test_an_error_event_reaches_every_caller_in_the_form_that_clients_raise(
    gateway, upstream, event, before, streamed
):
    upstream.script = sends(before + event)
    got = await gateway.chat(stream=streamed)
    if streamed and before:
        *events, last = got.events
        assert [json.loads(each) for each in events] == [CHUNKS[1]]
        assert json.loads(last) == {"error": OVERLOADED}
    else:
        assert (got.status, got.json) == (502, {"error": OVERLOADED})
    assert not await gateway.stores()
    with pytest.raises(openai.APIError, match="Overloaded"):
        await official(gateway, streamed)


@pytest.mark.parametrize("data", [b'data: {"error": "Overloaded."}\n\n', b"event: error\ndata: Overloaded.\n\n"])
async def test_an_error_that_is_a_mere_text_becomes_an_error_object(gateway, upstream, data):
    upstream.script = sends(FIRST + data)
    _, last = (await gateway.chat(stream=True)).events
    assert json.loads(last)["error"]["message"] == "Overloaded."


async def test_a_null_error_in_a_chunk_is_no_error(gateway, upstream):
    upstream.script = sends(*(b"data: %s\n\n" % json.dumps({**each, "error": None}).encode() for each in CHUNKS), DONE)
    assert (await gateway.chat(stream=True)).events[-1] == "[DONE]"


# Nobody there, too slow, and refusals


@MODES
async def test_a_refused_connection_is_a_bad_gateway(start_gateway, upstream, streamed):
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        nobody = {"name": "nobody", "kind": "openai", "base_url": f"http://127.0.0.1:{bound.getsockname()[1]}/v1"}
        gateway = await start_gateway(upstreams=[{**nobody, "models": ["*"]}])
        got = await gateway.chat(stream=streamed)
    assert (got.status, got.json["error"]["code"]) == (502, "upstream_unreachable")
    assert b"127.0.0.1" not in got.body


@MODES
async def test_a_connection_that_closes_without_an_answer_is_a_bad_gateway(gateway, upstream, streamed):
    async def script(asked):
        asked.reset()

    upstream.script = script
    got = await gateway.chat(stream=streamed)
    assert (got.status, got.json["error"]["type"]) == (502, "upstream_error")


@MODES
@pytest.mark.parametrize("begun", [True, False])
async def test_an_upstream_that_falls_silent_is_timed_out(start_gateway, upstream, begun, streamed):
    async def script(asked):
        if begun:
            await asked.head()
            await asked.send(FIRST)
        await asked.gate("never")

    upstream.script = script
    scripted = {"name": "scripted", "kind": "openai", "base_url": upstream.base_url, "models": ["*"], "idle_timeout_s": 0.1}
    gateway = await start_gateway(upstreams=[scripted])
    got = await gateway.chat(stream=streamed)
    if begun and streamed:
        assert (got.status, json.loads(got.events[-1])["error"]["code"]) == (200, "upstream_timeout")
    else:
        assert (got.status, got.json["error"]["code"]) == (504, "upstream_timeout")
    await upstream.asked[0].gone.wait()
    assert not await gateway.stores()


REFUSALS = {
    "an error object": (400, b'{"error":  {"message": "Too long.", "code": "x", "new": [1]}}', "application/json"),
    "another JSON": (422, b'{"detail": [{"loc": ["body", "n"], "msg": "bad"}]}', "application/json"),
    "a text": (503, b"overloaded, sorry", "text/plain; charset=utf-8"),
    "a page": (502, b"<html>Bad gateway</html>", "text/html"),
    "nothing": (429, b"", "application/json"),
}


@MODES
@pytest.mark.parametrize(("status", "body", "kind"), REFUSALS.values(), ids=REFUSALS.keys())
async def test_a_refusal_passes_through_as_it_came_and_is_not_stored(gateway, upstream, status, body, kind, streamed):
    async def script(asked):
        await asked.answer(
            body, status, kind, retry_after="7", x_request_id="req_theirs", x_should_retry="false", set_cookie="a=b"
        )

    upstream.script = script
    got = await gateway.chat(stream=streamed)
    assert (got.status, got.body) == (status, body)
    expected = {"Content-Type": kind, "Retry-After": "7", "X-Request-Id": "req_theirs", "x-should-retry": "false"}
    assert {name: got.headers[name] for name in expected} == expected
    assert "Set-Cookie" not in got.headers
    assert len(upstream.asked) == 1
    assert not await gateway.stores()


LATE = [
    b'{"error": {"message": "Slow down."}}',
    b'{"error": {}}',
    b'{"error": {"code": "x"}}',
    b'{"error": "Slow."}',
    b"<html>",
    b"",
]


@pytest.mark.parametrize("body", LATE)
async def test_a_refusal_after_the_head_raises_in_the_official_client_whatever_its_body(start_gateway, upstream, body):
    async def script(asked):
        await asked.gate("head")
        await asked.answer(body, 429)

    upstream.script = script
    gateway = await start_gateway(server={"head_after_s": 0.01})
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="k", max_retries=0) as client:
        chunks = await client.chat.completions.create(model="model-1", messages=[], stream=True)
        upstream.gate("head").released.set()
        with pytest.raises(openai.APIError):
            _ = [each async for each in chunks]


# Asking the simpler way


def refuses(name, message=None):
    """A script that refuses requests that have a member of this name (or that ask for a stream)."""

    async def script(asked):
        if asked.json.get(name):
            error = {"message": message or f"Unknown parameter: '{name}'.", "param": name, "type": "x", "code": None}
            await asked.answer({"error": error}, 400)
        else:
            await say_hello(asked)

    return script


def ways(upstream):
    """How the upstream was asked since the last call: whether for a stream, and whether for its usage."""
    asked, upstream.asked[:] = [(body.get("stream", False), "stream_options" in body) for body in upstream.bodies], []
    return asked


WITH_USAGE, PLAIN, WHOLE = (True, True), (True, False), (False, False)


@MODES
async def test_an_upstream_that_refuses_stream_options_is_asked_without_and_that_is_remembered(gateway, upstream, streamed):
    upstream.script = refuses("stream_options")
    assert (await gateway.chat("a", stream=streamed)).status == 200
    assert ways(upstream) == [WITH_USAGE, PLAIN]
    assert await gateway.stores("a")
    assert (await gateway.chat("b", stream=streamed)).status == 200
    assert ways(upstream) == [PLAIN]
    assert (await gateway.chat("b", stream=streamed, headers={"Authorization": "Bearer other"})).status == 200
    assert ways(upstream) == [WITH_USAGE, PLAIN]
    assert (await gateway.chat("b", stream=streamed, model="model-2")).status == 200
    assert ways(upstream) == [WITH_USAGE, PLAIN]


async def test_an_upstream_that_refuses_to_stream_is_asked_for_the_whole_and_that_is_remembered(gateway, upstream):
    upstream.script = refuses("stream", "Your organization must be verified to stream this model.")
    assert content(await gateway.chat("a")) == "Hello world"
    assert ways(upstream) == [WITH_USAGE, WHOLE]
    assert content(await gateway.chat("b")) == "Hello world"
    assert ways(upstream) == [WHOLE]
    assert content(await gateway.chat("b", headers={"Authorization": "Bearer other"})) == "Hello world"
    assert ways(upstream) == [WITH_USAGE, WHOLE]


async def test_a_caller_who_wants_a_stream_is_told_that_there_is_none_but_hits_what_is_there(gateway, upstream):
    upstream.script = refuses("stream")
    refused = await gateway.chat(stream=True)
    assert (refused.status, refused.json["error"]["param"]) == (400, "stream")
    whole = await gateway.chat()
    hit = await gateway.chat(stream=True, stream_options={"include_usage": True})
    assert hit.cache_status.startswith("gateway; hit")
    assert assembled(CHAT, hit.events) == nameless(whole.json) == nameless(whole_answer("Hello world"))


async def test_both_refusals_are_survived_together(gateway, upstream):
    async def script(asked):
        await refuses("stream_options" if "stream_options" in asked.json else "stream")(asked)

    upstream.script = script
    assert content(await gateway.chat("a")) == "Hello world"
    assert ways(upstream) == [WITH_USAGE, PLAIN, WHOLE]
    assert content(await gateway.chat("b")) == "Hello world"
    assert ways(upstream) == [WHOLE]


@pytest.mark.parametrize(
    "refusal", [(400, "'n' is too large."), (429, "No streams today."), (500, "stream_options broke us.")]
)
async def test_any_other_refusal_is_not_asked_about_twice(gateway, upstream, refusal):
    status, message = refusal

    async def script(asked):
        await asked.answer({"error": {"message": message}}, status)

    upstream.script = script
    assert (await gateway.chat()).status == status
    assert ways(upstream) == [WITH_USAGE]


async def test_usage_that_the_caller_asked_for_itself_is_not_dropped_in_silence(gateway, upstream):
    upstream.script = refuses("stream_options")
    got = await gateway.chat(stream=True, stream_options={"include_usage": True})
    assert (got.status, got.json["error"]["param"]) == (400, "stream_options")


async def test_the_configuration_says_that_an_upstream_cannot_stream_or_count(start_gateway, upstream):
    common = {"kind": "openai", "base_url": upstream.base_url}
    gateway = await start_gateway(
        upstreams=[
            {"name": "whole", **common, "models": ["model-1"], "stream": False},
            {"name": "plain", **common, "models": ["model-2"], "ask_usage": False},
        ]
    )
    assert content(await gateway.chat()) == content(await gateway.chat(model="model-2")) == "Hello world"
    assert ways(upstream) == [WHOLE, PLAIN]


CUSTOM = {
    **whole_answer(""),
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "custom", "custom": {"name": "shell", "input": "ls -l /tmp"}}],
            },
            "finish_reason": "tool_calls",
        }
    ],
}
SPOKEN = {
    **whole_answer(""),
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "audio": {"id": "audio_1", "data": "SUQzBAAAAAAA", "expires_at": 1700003600, "transcript": "Hi there"},
            },
            "finish_reason": "stop",
        }
    ],
}
BEST = {
    "id": "cmpl-whole456789abcdefghijklmno",
    "object": "text_completion",
    "created": 1700000000,
    "model": "model-1",
    "choices": [{"index": 0, "text": "The best of two.", "logprobs": None, "finish_reason": "stop"}],
    "usage": USAGE,
}
UNSTREAMABLE = {
    "best_of": (COMPLETIONS, {"prompt": "hi", "best_of": 2}, BEST),
    "custom tools": (CHAT, {"messages": [], "tools": [{"type": "custom", "custom": {"name": "shell"}}]}, CUSTOM),
    "audio as mp3": (
        CHAT,
        {"messages": [], "modalities": ["text", "audio"], "audio": {"voice": "x", "format": "mp3"}},
        SPOKEN,
    ),
}


@pytest.mark.parametrize(("api", "members", "answer"), UNSTREAMABLE.values(), ids=UNSTREAMABLE.keys())
async def test_what_cannot_be_streamed_is_asked_whole_and_a_stream_that_hits_it_says_the_same(
    gateway, upstream, api, members, answer
):
    async def script(asked):
        await asked.answer(answer)

    upstream.script = script
    body = {"model": "model-1", **members}
    whole = await gateway.post(f"/v1/{api.path}", body)
    assert whole.json == answer
    assert ways(upstream) == [WHOLE]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    hit = await gateway.post(f"/v1/{api.path}", {**body, **options})
    assert hit.cache_status.startswith("gateway; hit")
    assert hit.events[-1] == "[DONE]"
    assert len(hit.events) > 3
    assert assembled(api, hit.events) == nameless(answer)
    assert not upstream.asked


# Callers who leave


async def two_parts(asked):
    """The first frame, a gate, and the rest; a caller's upstream connection may close meanwhile."""
    await asked.head()
    await asked.send(FIRST)
    await asked.gate("between")
    await asked.send(LAST + DONE)
    await asked.end()


async def leave(gateway, upstream, streamed, **headers):
    """A caller who goes away between the two parts."""
    asking = asyncio.ensure_future(first_block(gateway, headers) if streamed else gateway.chat(headers=headers))
    await upstream.gate("between").reached.wait()
    if not streamed:
        asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking


async def first_block(gateway, headers):
    async with gateway.opened(stream=True, headers=headers) as response:
        await next_block(response)
        response.close()


UNCACHEABLE = {"no-store": ({}, {"Cache-Control": "no-store"}), "disabled": ({"cache": {"mode": "off"}}, {})}


@MODES
@pytest.mark.parametrize(("sections", "headers"), UNCACHEABLE.values(), ids=UNCACHEABLE.keys())
async def test_an_answer_that_nobody_waits_for_and_nobody_will_store_is_given_up(
    start_gateway, upstream, sections, headers, streamed
):
    upstream.script = two_parts
    gateway = await start_gateway(**sections)
    await leave(gateway, upstream, streamed, **headers)
    await upstream.asked[0].gone.wait()


@MODES
async def test_a_caller_who_leaves_before_the_head_takes_an_uncacheable_call_along(gateway, upstream, streamed):
    async def script(asked):
        await asked.gate("head")

    upstream.script = script
    asking = asyncio.ensure_future(gateway.chat(stream=streamed, headers={"Cache-Control": "no-store"}))
    await upstream.gate("head").reached.wait()
    asking.cancel()
    await upstream.asked[0].gone.wait()


@MODES
async def test_an_answer_that_will_be_stored_is_finished_though_its_caller_left(gateway, upstream, streamed):
    upstream.script = two_parts
    await leave(gateway, upstream, streamed)
    upstream.gate("between").released.set()
    assert await gateway.stores()
    assert not upstream.asked[0].gone.is_set()
    assert content(await gateway.chat()) == "Hé\u2028"
    assert len(upstream.asked) == 1


# Shared streams


async def has_readers(gateway, count):
    """Waits until so many callers read the one flight that there is."""
    [flight] = gateway.service._flights._by_key.values()
    while flight.readers != count:
        await asyncio.sleep(0)


async def test_concurrent_identical_requests_make_one_call_and_each_gets_all_of_it(gateway, upstream):
    """Whoever joins late has what came before at once; the mode makes no difference."""
    upstream.script = two_parts
    async with gateway.opened(stream=True) as leader:
        first = await next_block(leader)
        async with gateway.opened(stream=True) as follower:
            assert follower.headers["Cache-Status"] == "gateway; fwd=miss; collapsed"
            assert await next_block(follower) == first
            whole = asyncio.ensure_future(gateway.chat())
            await has_readers(gateway, 3)
            upstream.gate("between").released.set()
            assert await rest_of(leader) == await rest_of(follower) == [LAST.decode()[6:-2], "[DONE]"]
            assert content(await whole) == "Hé\u2028"
            assert (await whole).cache_status == "gateway; fwd=miss; collapsed; stored"
    assert len(upstream.asked) == 1


async def test_requests_that_meet_before_the_upstreams_head_make_one_call(gateway, upstream):
    async def script(asked):
        await asked.gate("head")
        await say_hello(asked)

    upstream.script = script
    asking = [asyncio.ensure_future(gateway.chat(stream=place % 2 == 0)) for place in range(6)]
    await upstream.gate("head").reached.wait()
    await has_readers(gateway, 6)
    upstream.gate("head").released.set()
    answers = await asyncio.gather(*asking)
    assert sorted("collapsed" in got.cache_status for got in answers) == [False, *[True] * 5]
    assert len({got.body for got in answers[::2]}) == len({got.body for got in answers[1::2]}) == 1
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("control", ["no-store", "no-cache"])
async def test_who_asks_for_an_answer_of_its_own_joins_nobody(gateway, upstream, control):
    upstream.script = two_parts
    async with gateway.opened(stream=True) as leader, gateway.opened(stream=True, headers={"Cache-Control": control}) as own:
        assert "collapsed" not in own.headers["Cache-Status"]
        assert len(upstream.asked) == 2
        upstream.gate("between").released.set()
        assert await rest_of(leader) == await rest_of(own)


async def test_a_leader_who_leaves_does_not_disturb_its_followers(gateway, upstream):
    upstream.script = two_parts
    async with gateway.opened(stream=True) as leader, gateway.opened(stream=True) as follower:
        assert await next_block(leader) == await next_block(follower)
        leader.close()
        upstream.gate("between").released.set()
        assert await rest_of(follower) == [LAST.decode()[6:-2], "[DONE]"]
    assert not upstream.asked[0].gone.is_set()
    assert await gateway.stores()


async def test_a_reader_who_reads_nothing_slows_nobody_and_is_let_go(start_gateway, upstream):
    big = b"data: %s\n\n" % json.dumps(chunk({"content": "x" * 1_000_000})).encode()

    async def script(asked):
        await asked.head()
        await asked.send(FIRST)
        await asked.gate("both are there")
        for _ in range(16):
            await asked.send(big)
        await asked.send(LAST + DONE)
        await asked.end()

    upstream.script = script
    gateway = await start_gateway(server={"write_timeout_s": 0.2})
    async with gateway.opened(stream=True) as stalled, gateway.opened(stream=True) as reader:
        upstream.gate("both are there").released.set()
        [flight] = gateway.service._flights._by_key.values()
        assert (await reader.read()).endswith(LAST + DONE)
        while flight.readers:
            await asyncio.sleep(0)
        with pytest.raises(aiohttp.ClientPayloadError):
            await stalled.read()
    assert len(upstream.asked) == 1


async def test_a_failure_reaches_all_who_follow_and_nobody_after(gateway, upstream):
    async def script(asked):
        await asked.head()
        await asked.send(FIRST)
        await asked.gate("between")
        await asked.end()

    upstream.script = script
    async with gateway.opened(stream=True) as leader, gateway.opened(stream=True) as follower:
        await next_block(leader)
        upstream.gate("between").released.set()
        [leaders], [_, followers] = await rest_of(leader), await rest_of(follower)
        assert json.loads(leaders) == json.loads(followers)
        assert json.loads(leaders)["error"]["code"] == "upstream_broke"
    upstream.script = say_hello
    assert content(await gateway.chat()) == "Hello world"


# Shutdown


async def test_shutdown_ends_running_streams_with_an_error(gateway, upstream):
    upstream.script = two_parts
    async with gateway.opened(stream=True) as response:
        await next_block(response)
        whole = asyncio.ensure_future(gateway.chat())
        await has_readers(gateway, 2)
        await gateway.service.close()
        [last] = await rest_of(response)
    assert json.loads(last)["error"]["code"] == "shutting_down"
    got = await whole
    assert (got.status, got.json["error"]["code"]) == (503, "shutting_down")
    await upstream.asked[0].gone.wait()
    assert not await gateway.stores()


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_redirect_is_not_followed_with_the_callers_credential(start_gateway, upstream, streamed):
    async def redirect(asked):
        await asked.answer(b"", 307, location=f"{upstream.base_url}/elsewhere")

    upstream.script = redirect
    gateway = await start_gateway()
    got = await gateway.chat(stream=streamed, headers={"Authorization": "Bearer mine"})
    assert (got.status, got.json["error"]["code"]) == (502, "upstream_broke")
    assert [asked.path for asked in upstream.asked] == ["/v1/chat/completions"]


async def test_a_cookie_that_the_upstream_sets_travels_with_no_other_request(start_gateway, upstream):
    async def set_cookie(asked):
        if asked.path.endswith("/models"):
            await asked.answer({"object": "list", "data": []}, set_cookie="who=first; Path=/")
        else:
            await asked.answer(whole_answer("hi"), set_cookie="who=first; Path=/")

    upstream.script = set_cookie
    # By its name: cookie jars keep nothing for an address.
    named = {"name": "scripted", "kind": "openai", "base_url": f"http://localhost:{upstream.port}/v1", "models": ["*"]}
    gateway = await start_gateway(upstreams=[named])
    for _ in range(2):
        await gateway.chat(headers={"Cache-Control": "no-store"})
        async with gateway.session.get(f"{gateway.base_url}/models") as response:
            assert response.status == 200
    assert len(upstream.asked) == 4
    assert not any("cookie" in asked.headers for asked in upstream.asked)

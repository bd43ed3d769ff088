"""A cut stream goes on where it broke, over real sockets and a real Redis: on the replica that ran it, or on another."""

import asyncio
import json
import os
import random
import re
from dataclasses import dataclass
from typing import Any

import pytest
from openai import AsyncOpenAI
from running import Gateway, Got, next_block
from scripted import USAGE, chunk, text_chunk
from stores import until

MODES = pytest.mark.parametrize("usage", [False, True], ids=["plain", "usage"])
APIS = pytest.mark.parametrize("path", ["chat/completions", "completions"])
WITH_IDS = pytest.mark.parametrize("ids", [False, True], ids=["no-ids", "ids"])
WORDS = ["He", "llo", " wor", "ld\u2028", " \U0001f600"]
IDS = {"Gateway-Event-Ids": "?1"}
MINE, ANOTHERS = {"Authorization": "Bearer mine"}, {"Authorization": "Bearer another's"}
NO_CACHE = {"Cache-Control": "no-cache"}
DONE = b"data: [DONE]\n\n"
STREAM_ID = re.compile(r"[A-Za-z0-9_-]{80}")


def frames_of(asked, words=WORDS, finish="stop"):
    """The chunks of an answer: the last but one has an end, and the last one usage."""
    if asked.path.endswith("chat/completions"):
        chunks = [chunk({"content": word}) for word in words]
        return [chunk({"role": "assistant", "content": ""}), *chunks, chunk({}, finish), tail_of(chunk({}))]
    return [*(text_chunk(word) for word in words), text_chunk("", finish), tail_of(text_chunk(""))]


def tail_of(last):
    return {**last, "choices": [], "usage": USAGE}


def says(*words, finish="stop", after=None, fails=False):
    """An answer with a gate behind its chunk ``after``; ``fails``: it ends there, too early."""

    async def script(asked):
        await asked.head()
        for place, each in enumerate(frames_of(asked, words or WORDS, finish)):
            await asked.event({"usage": None} | each)
            if place == after:
                await asked.gate("middle")
                if fails:
                    return await asked.end()
        return await asked.done()

    return script


@dataclass
class Two:
    """Two replicas on one Redis."""

    one: Gateway
    other: Gateway

    def __iter__(self):
        return iter((self.one, self.other))


@pytest.fixture
async def start_two(start_gateway):
    async def start(**sections: Any) -> Two:
        shared = {"redis": {"prefix": f"two-{os.urandom(6).hex()}"}, **sections}
        return Two(await start_gateway(**shared), await start_gateway(**shared))

    return start


@pytest.fixture
async def two(start_two) -> Two:
    return await start_two()


def asked_of(path: str, *, usage: bool) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if path.startswith("chat") else {"prompt": "hi"}
    options = {"stream_options": {"include_usage": True}} if usage else {}
    return {"model": "model-1", "stream": True, **prompt, **options}


def opened(gateway: Gateway, path: str = "chat/completions", *, usage: bool = False, **headers: str) -> Any:
    return gateway.session.post(f"{gateway.base_url}/{path}", json=asked_of(path, usage=usage), headers=headers)


async def ask(gateway: Gateway, path: str = "chat/completions", **more: Any) -> Got:
    async with opened(gateway, path, **more) as response:
        return Got(response.status, response.headers, await response.read())


async def resume(gateway: Gateway, stream: str, after: object = None, *, last: str = "", **headers: str) -> Got:
    sent = {**headers, **({"Last-Event-ID": last} if last else {})}
    query = {} if after is None else {"after": str(after)}
    async with gateway.session.get(f"{gateway.base_url}/streams/{stream}", params=query, headers=sent) as response:
        return Got(response.status, response.headers, await response.read())


async def status(gateway: Gateway, stream: str, **headers: str) -> Any:
    async with gateway.session.get(f"{gateway.base_url}/streams/{stream}/status", headers=headers) as response:
        assert response.status == 200
        return await response.json()


async def cancel(gateway: Gateway, stream: str, **headers: str) -> Got:
    async with gateway.session.post(f"{gateway.base_url}/streams/{stream}/cancel", headers=headers) as response:
        return Got(response.status, response.headers, await response.read())


def id_of(answer: Any) -> str:
    return answer.headers["Gateway-Stream-Id"]


def blocks_of(body: bytes) -> list[bytes]:
    return [block + b"\n\n" for block in body.split(b"\n\n")[:-1]]


def without_ids(body: bytes) -> bytes:
    return re.sub(rb"(?m)^(id: .*|:.*)\n", b"", body)


def last_id(block: bytes) -> str:
    [found] = re.findall(rb"(?m)^id: (.*)$", block)
    return found.decode()


def code_of(got: Got) -> tuple[int, str]:
    error = got.json["error"]
    assert error["message"]
    assert error.keys() == {"message", "type", "param", "code"}
    return got.status, error["code"]


async def assert_goes_on_anywhere(two: Two, whole: Got, **headers: str) -> None:
    """Wherever it is cut: what was received and what comes then is the whole."""
    stream, blocks = id_of(whole), blocks_of(whole.body)
    for after in range(len(blocks) + 1):
        for gateway in two:
            got = await resume(gateway, stream, after, **headers)
            assert got.status == (200 if after < len(blocks) else 204)
            assert b"".join(blocks[:after]) + got.body == whole.body
            if whole.body.startswith(b"id: ") and after:
                assert (await resume(gateway, stream, last=last_id(blocks[after - 1]), **headers)).body == got.body


# What has an id


async def test_each_streamed_answer_has_an_id_of_its_own_and_nothing_else_has_one(two, upstream):
    upstream.script = says(after=2)
    async with opened(two.one) as miss, opened(two.one) as collapsed, opened(two.other) as far:
        upstream.gate("middle").released.set()
        answers = [miss, collapsed, far]
        for each in answers:
            await each.read()
        await asyncio.gather(two.one.landed(), two.other.landed())
    hits = [await ask(two.one), await ask(two.other)]
    resumed = await resume(two.other, id_of(miss), 1)
    kinds = ["fwd=miss", "collapsed", "collapsed", "hit", "hit", "detail=resumed"]
    for each, kind in zip([*answers, *hits, resumed], kinds, strict=True):
        assert STREAM_ID.fullmatch(id_of(each))
        assert kind in each.headers["Cache-Status"]
    assert len({id_of(each) for each in (*answers, *hits)}) == 5
    for headers in ({}, {"Cache-Control": "no-cache"}):
        assert "Gateway-Stream-Id" not in (await two.one.chat(headers=headers)).headers
    assert "Gateway-Stream-Id" not in (await two.one.chat(stream=True, headers={"Cache-Control": "no-store"})).headers
    assert "Gateway-Stream-Id" in (await two.one.chat(stream=True, headers=NO_CACHE)).headers


async def test_a_cache_that_is_off_gives_no_ids(start_gateway):
    gateway = await start_gateway(cache={"mode": "off"})
    assert "Gateway-Stream-Id" not in (await ask(gateway)).headers


# Wherever it is cut


@WITH_IDS
@MODES
@APIS
async def test_a_stream_that_has_ended_goes_on_wherever_it_was_cut(two, upstream, path, usage, ids):
    upstream.script = says()
    miss = await ask(two.one, path, usage=usage, **(IDS if ids else {}))
    await two.one.landed()
    await assert_goes_on_anywhere(two, miss)
    assert len(upstream.asked) == 1


@WITH_IDS
@MODES
@APIS
async def test_a_hit_goes_on_under_the_identity_that_it_began_with(two, upstream, path, usage, ids):
    upstream.script = says()
    await ask(two.one, path, usage=usage)
    await two.one.landed()
    hits = [await ask(two.other, path, usage=usage, **(IDS if ids else {})) for _ in range(2)]
    assert all("gateway; hit" in each.cache_status for each in hits)
    first, second = (
        json.loads(each.events[0] if not ids else without_ids(each.body).split(b"\n\n")[0][6:]) for each in hits
    )
    assert first["id"] != second["id"]
    for hit in hits:
        await assert_goes_on_anywhere(two, hit)


@WITH_IDS
@MODES
async def test_what_was_replaced_meanwhile_goes_on_as_it_was(two, upstream, usage, ids):
    headers = IDS if ids else {}
    upstream.script = says()
    miss = await ask(two.one, usage=usage, **headers)
    await two.one.landed()
    hit = await ask(two.one, usage=usage, **headers)
    upstream.script = says("quite", " different")
    await ask(two.other, usage=usage, **NO_CACHE)
    await two.other.landed()
    await until(lambda: not two.one.service._flights._by_key)  # what has just landed here is still served from here
    newer = await ask(two.one, usage=usage, **headers)
    assert b"quite" in newer.body
    for answer in (miss, hit, newer):
        await assert_goes_on_anywhere(two, answer)


@WITH_IDS
@MODES
@APIS
async def test_a_running_stream_goes_on_wherever_it_was_cut(two, upstream, path, usage, ids):
    """From every place before what has come, at it, and beyond it: up to the end that is yet to come."""
    headers = IDS if ids else {}
    upstream.script = says(after=3)
    async with opened(two.one, path, usage=usage, **headers) as response:
        stream = id_of(response)
        await upstream.gate("middle").reached.wait()
        for _ in range(4):
            await next_block(response)
        total = len(frames_of(upstream.asked[0])) - (not usage) + 1
        asking = [asyncio.ensure_future(resume(gateway, stream, after)) for after in range(total + 2) for gateway in two]
        reference = asyncio.ensure_future(ask(two.one, path, usage=usage))
        [flight] = two.one.service._flights._by_key.values()
        await until(lambda: flight.readers >= 1 + total + 2)
        upstream.gate("middle").released.set()
        await response.read()
    blocks = blocks_of((await reference).body)
    assert len(blocks) == total
    for place, got in enumerate(await asyncio.gather(*asking)):
        after = place // 2
        assert got.status == (200 if after < total else 204 if after == total else 400), after
        if after <= total:
            assert b"".join(blocks[:after]) + without_ids(got.body) == b"".join(blocks), after
    assert len(upstream.asked) == 1


async def test_a_stream_whose_head_did_not_wait_for_the_upstreams_can_be_resumed_anywhere(start_two, upstream):
    async def script(asked):
        await asked.gate("head")
        await says()(asked)

    upstream.script = script
    two = await start_two(server={"head_after_s": 0.01})
    async with opened(two.one) as response:
        asking = [asyncio.ensure_future(resume(gateway, id_of(response), 2)) for gateway in two]
        told = [await status(gateway, id_of(response)) for gateway in two]
        assert [(each["state"], each["frames"]) for each in told] == [("running", 0)] * 2
        upstream.gate("head").released.set()
        blocks = [block for block in blocks_of(await response.read()) if not block.startswith(b":")]
    for got in await asyncio.gather(*asking):
        assert [block for block in blocks_of(got.body) if not block.startswith(b":")] == blocks[2:]


async def test_a_place_that_turns_out_to_be_beyond_the_end_gets_an_error_and_no_frame(start_two, upstream):
    two = await start_two(server={"head_after_s": 0.01})
    upstream.script = says(after=2)
    async with opened(two.one) as response:
        await upstream.gate("middle").reached.wait()
        for _ in range(3):
            await next_block(response)
        async with two.one.session.get(f"{two.one.base_url}/streams/{id_of(response)}", params={"after": "99"}) as far:
            assert far.status == 200  # nobody knew better then
            upstream.gate("middle").released.set()
            body = await far.read()
    [error] = [block for block in blocks_of(body) if not block.startswith(b":")]
    assert json.loads(error.removeprefix(b"data: "))["error"]["param"] == "after"


@pytest.mark.parametrize("seed", range(6))
async def test_a_caller_that_is_cut_again_and_again_sees_one_stream(two, upstream, seed):
    """By whatever replica it is served, with what each event said of the place to go on from."""
    draw = random.Random(seed)
    letters = [draw.choice("abc é\u2028\U0001f600") * draw.randint(1, 3) for _ in range(30)]

    async def script(asked):
        await asked.head()
        for each in frames_of(asked, letters):
            await asked.event(each)
            await asyncio.sleep(0)
        await asked.done()

    upstream.script = script
    usage = draw.random() < 0.5
    seen, ids = b"", []
    response = await opened(draw.choice([*two]), usage=usage, **IDS)
    stream = id_of(response)
    while True:
        for _ in range(draw.randint(1, 12)):
            block = await next_block(response)
            if not block:
                break
            ids.append(last_id(block.encode()))
            seen += without_ids(block.encode() + b"\n\n")
        response.close()
        gateway = draw.choice([*two])
        response = await gateway.session.get(f"{gateway.base_url}/streams/{stream}", headers={"Last-Event-ID": ids[-1]})
        if response.status == 204:
            break
        assert response.status == 200
        assert id_of(response) == stream
    response.close()
    await two.one.landed()
    await two.other.landed()
    asked = upstream.asked[0]
    shown = frames_of(asked, letters)[: None if usage else -1]
    assert seen == b"".join(b"data: %s\n\n" % json.dumps(each).encode() for each in shown) + DONE
    assert [each.split(".")[1] for each in ids] == [str(number + 1) for number in range(len(ids))]
    assert len(upstream.asked) == 1


async def test_the_id_of_a_resumed_stream_goes_on_too(two, upstream):
    upstream.script = says()
    whole = await ask(two.one)
    blocks = blocks_of(whole.body)
    first = await resume(two.other, id_of(whole), 2)
    second = await resume(two.one, id_of(first), 4)
    assert b"".join(blocks[:4]) + second.body == whole.body


# Events with ids


async def test_each_event_says_where_to_go_on_and_the_last_one_that_nothing_comes(two, upstream):
    upstream.script = says()
    for answer in (await ask(two.one, **IDS), await ask(two.one, **IDS)):
        blocks = blocks_of(answer.body)
        for number, block in enumerate(blocks, 1):
            end = r"\.end" if number == len(blocks) else ""
            assert re.fullmatch(rf"{id_of(answer)}\.{number}\.[0-9a-f]+-[\w-]{{8}}{end}", last_id(block))
        assert without_ids(answer.body).endswith(DONE)
        await two.one.landed()
        for gateway in two:
            got = await resume(gateway, id_of(answer), last=last_id(blocks[-1]))
            assert (got.status, got.body) == (204, b"")


async def test_ids_are_as_configured_where_a_caller_does_not_say(start_gateway):
    gateway = await start_gateway(flights={"event_ids": True})
    assert b"id: " in (await ask(gateway)).body
    assert b"id: " not in (await ask(gateway, **{"Gateway-Event-Ids": "?0"})).body


async def test_a_slow_stream_with_ids_raises_nothing_in_the_official_client(start_gateway, upstream):
    gateway = await start_gateway(server={"keepalive_s": 0.02})
    upstream.script = says(after=2)

    async def watch():
        """What comes while the client waits, until it has waited for long enough."""
        async with opened(gateway, **IDS) as response:
            lines = []
            while sum(line.startswith(b":") for line in lines) < 4:
                lines.append(await response.content.readline())
            upstream.gate("middle").released.set()
            return b"".join(lines) + await response.read()

    async with AsyncOpenAI(base_url=gateway.base_url, api_key="k", max_retries=0, default_headers=IDS) as client:
        request = {"model": "model-1", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        chunks = await client.chat.completions.create(**request)
        watching = asyncio.ensure_future(watch())
        text = "".join([each.choices[0].delta.content or "" async for each in chunks])
        assert text == "".join(WORDS)
        hit = await client.chat.completions.create(**request)
        assert "".join([each.choices[0].delta.content or "" async for each in hit]) == text
    seen = await watching
    assert seen.count(b": keep-alive\n") >= 4
    assert all(b"\ndata: " in block for block in blocks_of(seen))


# What cannot be resumed


async def test_what_is_no_place_in_the_stream_is_refused(two, upstream):
    upstream.script = says()
    for answer in (await ask(two.one, **IDS), await ask(two.one)):
        stream, total = id_of(answer), len(blocks_of(answer.body))
        await two.one.landed()
        for gateway in two:
            assert (await resume(gateway, stream, total + 1)).status == 400
            for after in ("x", "-1", "1.5", "", "01", "1.0-abc", "9" * 20, "1e3"):
                got = await resume(gateway, stream, after)
                assert (got.status, got.json["error"]["param"]) == (400, "after")
            for last in ("x", stream, f"{stream}.", f"{stream}.x", f"{stream}x.1", "1"):
                got = await resume(gateway, stream, last=last)
                assert (got.status, got.json["error"]["param"]) == (400, "Last-Event-ID")


async def test_the_last_event_id_is_newer_than_the_address(two, upstream):
    upstream.script = says()
    answer = await ask(two.one, **IDS)
    blocks = blocks_of(answer.body)
    got = await resume(two.one, id_of(answer), 1, last=last_id(blocks[3]))
    assert b"".join(blocks[:4]) + got.body == answer.body


async def test_the_last_event_id_may_name_the_stream_as_an_earlier_resume_did_but_no_other_stream(two, upstream):
    upstream.script = says()
    answer, stranger = await ask(two.one), await ask(two.one, "completions")
    stream, blocks = id_of(answer), blocks_of(answer.body)
    await two.one.landed()
    resumed = await resume(two.other, stream, 1)
    assert id_of(resumed) != stream
    got = await resume(two.one, stream, last=f"{id_of(resumed)}.2")
    assert b"".join(blocks[:2]) + got.body == answer.body
    got = await resume(two.one, stream, last=f"{id_of(stranger)}.2")
    assert (got.status, got.json["error"]["param"]) == (400, "Last-Event-ID")


async def test_an_unknown_id_is_not_found(two, upstream):
    upstream.script = says()
    stream = id_of(await ask(two.one))
    tampered = [
        stream[:place] + ("A" if stream[place] != "A" else "B") + stream[place + 1 :] for place in (0, 2, 20, 50, 79)
    ]
    for each in ("x", "A" * 80, stream[:-1], f"{stream}A", *tampered):
        for got in (
            await resume(two.one, each),
            await cancel(two.one, each),
            await two.one.session.get(f"{two.one.base_url}/streams/{each}/status"),
        ):
            assert got.status == 404
    assert code_of(await resume(two.other, tampered[0])) == (404, "stream_not_found")


@pytest.mark.parametrize("ended", [False, True], ids=["running", "ended"])
async def test_a_stream_is_nobodys_but_its_own_callers(two, upstream, ended):
    upstream.script = says(after=3)
    async with opened(two.one, **MINE) as response:
        stream = id_of(response)
        await upstream.gate("middle").reached.wait()
        if ended:
            upstream.gate("middle").released.set()
            await two.one.landed()
        for gateway in two:
            for headers in (ANOTHERS, {}):
                assert code_of(await resume(gateway, stream, 1, **headers)) == (404, "stream_not_found")
                assert code_of(await cancel(gateway, stream, **headers)) == (404, "stream_not_found")
                async with gateway.session.get(f"{gateway.base_url}/streams/{stream}/status", headers=headers) as told:
                    assert told.status == 404
        upstream.gate("middle").released.set()
        whole = await response.read()
    assert whole.endswith(DONE)
    for gateway in two:
        assert whole.endswith((await resume(gateway, stream, 2, **MINE)).body)


async def test_a_hit_is_nobodys_but_its_own_callers(two, upstream):
    upstream.script = says()
    for _ in range(2):
        answer = await ask(two.one, **MINE)
        await two.one.landed()
    assert "hit" in answer.cache_status
    assert code_of(await resume(two.other, id_of(answer), 1, **ANOTHERS)) == (404, "stream_not_found")
    assert (await resume(two.other, id_of(answer), 1, **MINE)).status == 200


# What ended otherwise


async def test_what_was_not_to_be_stored_can_be_resumed_for_a_while(start_two, upstream):
    two = await start_two(flights={"resume_s": 300.0})
    upstream.script = says(finish="content_filter")
    answer = await ask(two.one)
    await two.one.landed()
    assert not await two.one.stores(stream=True)
    await assert_goes_on_anywhere(two, answer)
    for gateway in two:
        assert (await status(gateway, id_of(answer)))["state"] == "complete"


@WITH_IDS
async def test_a_stream_that_failed_can_be_resumed_to_its_error(two, upstream, ids):
    upstream.script = says(after=3, fails=True)
    upstream.gate("middle").released.set()
    answer = await ask(two.one, **(IDS if ids else {}))
    await two.one.landed()
    *_, error = blocks_of(without_ids(answer.body))
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "upstream_broke"
    await assert_goes_on_anywhere(two, answer)
    for gateway in two:
        told = await status(gateway, id_of(answer))
        assert (told["state"], told["frames"], told["error"]["code"]) == ("failed", 4, "upstream_broke")
    assert len(upstream.asked) == 1


async def test_after_a_while_a_stream_is_forgotten(start_two, upstream):
    two = await start_two(flights={"resume_s": 0.3})
    upstream.script = says(finish="content_filter")
    stream = id_of(await ask(two.one))
    await two.one.landed()
    async with asyncio.timeout(10):
        while (await two.other.session.get(f"{two.other.base_url}/streams/{stream}/status")).status == 200:
            await asyncio.sleep(0.01)
    for gateway in two:
        assert code_of(await resume(gateway, stream, 1)) == (404, "stream_not_found")
    assert code_of(await cancel(two.one, "x" * 80)) == (404, "stream_not_found")


async def test_a_stored_stream_can_be_resumed_for_as_long_as_it_is_stored(start_two, upstream):
    two = await start_two(flights={"resume_s": 0.1})
    upstream.script = says()
    answer = await ask(two.one)
    await two.one.landed()
    log = two.one.service._flights._by_key  # until it is gone here, and its log in Redis

    async def is_forgotten():
        while log or (await two.other.store.peek(name)).log:
            await asyncio.sleep(0.01)

    [flight] = log.values()
    name = flight.name
    await asyncio.wait_for(is_forgotten(), 10)
    await assert_goes_on_anywhere(two, answer)


# Cancelled


async def assert_cancelled(gateway: Gateway, stream: str) -> None:
    """Nothing is left of it; a replica that has yet to hear of that soon ends what it began to say."""
    while (got := await resume(gateway, stream, 1)).status != 204:
        assert b'"stream_cancelled"' in blocks_of(got.body)[-1]


@pytest.mark.parametrize("far", [False, True], ids=["here", "elsewhere"])
async def test_a_cancelled_stream_is_over_for_its_caller_and_for_nobody_else(two, upstream, far):
    upstream.script = says(after=3)
    async with opened(two.one) as mine, opened(two.one) as anothers, opened(two.other) as distant:
        await upstream.gate("middle").reached.wait()
        for each in (mine, anothers, distant):
            for _ in range(4):
                await next_block(each)
        got = await cancel(two.other if far else two.one, id_of(mine))
        assert (got.status, got.json) == (200, {"id": id_of(mine), "object": "stream", "cancelled": True})
        assert json.loads((await next_block(mine)).removeprefix("data: "))["error"]["code"] == "stream_cancelled"
        assert await next_block(mine) == ""
        for gateway in two:
            await assert_cancelled(gateway, id_of(mine))
            assert (await status(gateway, id_of(mine)))["cancelled"] is True
            assert (await status(gateway, id_of(anothers)))["cancelled"] is False
        upstream.gate("middle").released.set()
        assert await anothers.read() == await distant.read()
        assert (await status(two.one, id_of(distant)))["state"] == "complete"
    assert not upstream.asked[0].gone.is_set()


@pytest.mark.parametrize("far", [False, True], ids=["here", "elsewhere"])
@pytest.mark.parametrize("when", ["finish", "finish_if_cacheable", "cancel"])
async def test_the_call_ends_when_the_last_reader_is_cancelled(start_two, upstream, when, far):
    two = await start_two(flights={"when_abandoned": when})
    upstream.script = says(after=3)
    async with opened(two.one) as response:
        await upstream.gate("middle").reached.wait()
        for _ in range(4):
            await next_block(response)
        assert (await cancel(two.other if far else two.one, id_of(response))).status == 200
        assert "stream_cancelled" in (await response.read()).decode()
        await upstream.asked[0].gone.wait()
    await two.one.landed()
    told = await status(two.other, id_of(response))
    assert (told["state"], told["cancelled"]) == ("abandoned", True)
    assert not await two.one.stores()


async def test_a_cancelled_hit_cannot_be_resumed(two, upstream):
    upstream.script = says()
    await ask(two.one)
    await two.one.landed()
    hit, other = await ask(two.one), await ask(two.one)
    assert (await cancel(two.other, id_of(hit))).status == 200
    for gateway in two:
        assert (await resume(gateway, id_of(hit), 1)).status == 204
        assert (await resume(gateway, id_of(other), 1)).status == 200


# State


async def test_the_state_of_a_stream_is_the_same_wherever_it_is_asked_for(two, upstream):
    upstream.script = says(after=3)
    async with opened(two.one) as response, opened(two.other) as far:
        await upstream.gate("middle").reached.wait()
        for each in (response, far):
            for _ in range(4):
                await next_block(each)
        for gateway in two:
            for stream in (id_of(response), id_of(far)):
                told = await status(gateway, stream)
                assert told.keys() == {"id", "object", "state", "frames", "age_s", "readers", "cancelled"}
                assert (told["id"], told["object"], told["cancelled"]) == (stream, "stream", False)
                assert (told["state"], told["frames"]) == ("running", 4)
                assert 0 <= told["age_s"] < 60
        await until(lambda: two.one.service._flights.listeners(next(iter(two.one.service._flights._tasks))) == 1)
        assert [(await status(gateway, id_of(far)))["readers"] for gateway in two] == [2, 2]
        upstream.gate("middle").released.set()
        await response.read()
    await two.one.landed()
    for gateway in two:
        told = await status(gateway, id_of(response))
        assert (told["state"], told["frames"]) == ("complete", len(frames_of(upstream.asked[0])))
    hit = await ask(two.other)
    told = await status(two.one, id_of(hit))
    assert (told["state"], told["frames"], told["readers"]) == ("complete", len(frames_of(upstream.asked[0])), 0)


# Methods

METHODS = [
    ("HEAD", "", "GET"), ("POST", "", "GET"), ("DELETE", "", "GET"),
    ("GET", "/cancel", "POST"), ("HEAD", "/cancel", "POST"), ("PUT", "/cancel", "POST"),
    ("POST", "/status", "GET, HEAD"), ("DELETE", "/status", "GET, HEAD"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "allowed"), METHODS)
async def test_other_methods_are_refused(two, upstream, method, path, allowed):
    upstream.script = says()
    stream = id_of(await ask(two.one))
    async with two.one.session.request(method, f"{two.one.base_url}/streams/{stream}{path}") as response:
        body = await response.read()
        assert (response.status, response.headers["Allow"]) == (405, allowed)
        if method != "HEAD":
            assert json.loads(body)["error"]["code"] == "method_not_allowed"
    assert len(upstream.asked) == 1


async def test_asking_for_the_head_of_a_state_is_allowed(two, upstream):
    upstream.script = says()
    stream = id_of(await ask(two.one))
    async with two.one.session.head(f"{two.one.base_url}/streams/{stream}/status") as response:
        assert (response.status, await response.read()) == (200, b"")


async def test_a_paced_replay_ends_though_it_is_cancelled_on_another_replica(start_two, upstream):
    upstream.script = says()
    two = await start_two(replay={"pace": "fixed", "tokens_per_s": 0.01})
    await ask(two.one)
    await two.one.landed()
    async with opened(two.one) as replay:
        assert "hit" in replay.headers["Cache-Status"]
        assert (await cancel(two.other, id_of(replay))).status == 200
        assert b"stream_cancelled" in await replay.read()
    await until(lambda: not two.one.service._watches)

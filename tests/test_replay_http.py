"""Paces over sockets: what a caller asks for by ``Gateway-Replay``, and that a run can be repeated."""

import asyncio
import json
import time

import pytest
from scripted import chunk
from yarl import URL

WORDS = [f" w{number}" for number in range(12)]


async def says_words(asked):
    await asked.head()
    await asked.event(chunk({"role": "assistant", "content": ""}))
    for word in WORDS:
        await asked.event(chunk({"content": word}))
    await asked.event(chunk({}, "stop"))
    await asked.done()


@pytest.fixture
async def gateway(start_gateway, upstream):
    upstream.script = says_words
    gateway = await start_gateway(replay={"seed": 5})
    await gateway.chat()
    await gateway.landed()
    return gateway


def paced(text):
    return {"Gateway-Replay": text}


async def duration(gateway, text, **members):
    began = time.monotonic()
    got = await gateway.chat(headers=paced(text), **members)
    assert got.status == 200
    if members.get("stream"):
        said = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in got.events[:-1])
        assert (said, got.events[-1]) == ("".join(WORDS), "[DONE]")
    return time.monotonic() - began


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_caller_chooses_the_pace_of_a_stream_and_of_a_whole_answer(gateway, streamed):
    assert await duration(gateway, "rate=100", stream=streamed) >= 0.12
    assert await duration(gateway, "ttft=0.2, itl=0.001", stream=streamed) >= 0.211
    assert await duration(gateway, "rate=0.001, max_gap=0.001", stream=streamed) >= 0.012


async def test_each_frame_of_a_crowd_of_streams_comes_in_its_order_and_not_before_its_time(gateway):
    async def read(rate):
        began = time.monotonic()
        async with gateway.opened(stream=True, headers=paced(f"rate={rate}")) as response:
            lines = [(line, time.monotonic() - began) async for line in response.content if line.startswith(b"data: {")]
        said = [(json.loads(line[6:])["choices"][0]["delta"].get("content"), at_s) for line, at_s in lines]
        seen = [(word, at_s) for word, at_s in said if word]
        assert [said for said, _ in seen] == WORDS
        assert all(at_s >= place / rate for place, (_, at_s) in enumerate(seen, 1))

    await asyncio.gather(*(read(rate) for rate in (20, 50, 51, 100, 200) * 8))
    assert gateway.service.pacer._heap == []


async def test_an_old_client_gets_the_same_frames_without_chunks(gateway):
    expected = (await gateway.chat(stream=True)).events
    body = json.dumps({"model": "model-1", "messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", URL(gateway.origin).port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.0\r\nGateway-Replay: rate=500\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    head, _, told = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert b"transfer-encoding" not in head.lower()
    told_events = [block.removeprefix("data: ") for block in told.decode().split("\n\n")[:-1]]
    assert [anonymous(event) for event in told_events] == [anonymous(event) for event in expected]


def anonymous(event):
    return event if event == "[DONE]" else json.loads(event) | {"id": "", "created": 0}


async def test_what_is_sent_is_counted_however_it_is_sent(start_gateway, upstream, capsys):
    upstream.script = says_words
    gateway = await start_gateway(log={"access": True})
    for text in ("instant", "instant", "rate=1000"):
        await gateway.chat(stream=True, headers=paced(text))
        await gateway.landed()
    async with asyncio.timeout(10):
        lines = []
        while len(lines) < 3:
            await asyncio.sleep(0.01)
            lines += [line for line in capsys.readouterr().err.splitlines() if "/chat/completions" in line]
    _, at_once, in_turn = [int(next(word for word in line.split() if word.endswith("B"))[:-1]) for line in lines]
    assert in_turn > at_once  # by the chunks' heads


async def test_what_is_instant_is_sent_in_one_piece_whatever_is_configured(start_gateway, upstream):
    gateway = await start_gateway(replay={"pace": "fixed", "tokens_per_s": 0.1})
    await gateway.chat()
    await gateway.landed()
    got = await gateway.chat(stream=True, headers=paced("instant"))
    assert int(got.headers["Content-Length"]) == len(got.body)


@pytest.mark.parametrize("text", ["spede=2", "rate=0", "recorded, rate=5"])
async def test_a_pace_that_is_none_is_refused_also_for_a_miss(start_gateway, upstream, text):
    gateway = await start_gateway()
    got = await gateway.chat(headers=paced(text))
    assert (got.status, got.json["error"]["param"]) == (400, "Gateway-Replay")
    assert upstream.asked == []


async def schedules(gateway, monkeypatch, texts):
    """When the frames of one replay after the other are due."""
    found = []
    reader = type(gateway.service)._reader

    def spied(self, question, recording):
        made = reader(self, question, recording)
        made[0]._load()
        found.append(made[0]._schedule)
        return made

    monkeypatch.setattr(type(gateway.service), "_reader", spied)
    for text in texts:
        await gateway.chat(stream=True, headers=paced(text))
    monkeypatch.undo()
    return found


DRAWN = "ttft=0.001;sd=0.001, itl=0.001;sd=0.001"


async def test_what_is_drawn_differs_from_one_replay_to_the_next_and_not_from_one_run_to_the_next(
    gateway, start_gateway, monkeypatch
):
    first = await schedules(gateway, monkeypatch, [DRAWN] * 3)
    assert len({tuple(schedule) for schedule in first}) == 3
    # Another process over the same recordings.
    same = await start_gateway(redis={"prefix": gateway.store._keys.prefix}, replay={"seed": 5})
    assert await schedules(same, monkeypatch, [DRAWN] * 3) == first
    other = await start_gateway(redis={"prefix": gateway.store._keys.prefix}, replay={"seed": 6})
    assert (await schedules(other, monkeypatch, [DRAWN] * 3))[0] not in first


async def test_a_seed_of_the_callers_own_draws_the_same_each_time(gateway, monkeypatch):
    one, two, other = await schedules(gateway, monkeypatch, [f"{DRAWN}, seed=7"] * 2 + [f"{DRAWN}, seed=8"])
    assert one == two != other

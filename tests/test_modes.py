"""The modes: cache, record, replay, off. In replay mode nothing can ask a model, because there is nothing that could."""

import asyncio
import os
import sys
from urllib.error import HTTPError

import pytest
from scripted import chunk
from served import ENVIRON, PROGRAM, Served

from gateway.app import SystemClock
from gateway.config import load
from gateway.errors import ConfigError
from gateway.live import Live
from gateway.reload import differences
from gateway.upstreams.absent import AbsentUpstream
from gateway.upstreams.fleet import assemble

HIT, MISS = "gateway; hit", "gateway; fwd=miss"


@pytest.fixture
async def start_in_turn(start_gateway):
    """Starts one gateway after the other over the same store: what one records the next one replays."""
    shared, started = {"prefix": f"m{os.urandom(6).hex()}"}, []

    async def start(mode, environ=None, **sections):
        for gateway in started:
            if not sections.get("flights"):  # else what it asks for goes on
                await gateway.landed()
        cache = {"mode": mode, **sections.pop("cache", {})}
        started.append(await start_gateway(environ, redis=shared, cache=cache, **sections))
        return started[-1]

    return start


def says(*words):
    async def script(asked):
        if asked.json.get("stream"):
            await asked.head()
            for word in words:
                await asked.event(chunk({"content": word}))
            await asked.event(chunk({}, "stop"))
            await asked.done()
        else:
            raise AssertionError("the gateway asks for streams")

    return script


def text_of(got):
    return got.json["choices"][0]["message"]["content"]


# Record


async def test_record_mode_asks_each_time_and_each_answer_replaces_its_recording(start_in_turn, upstream):
    gateway = await start_in_turn("record")
    for word in ("one", "two"):
        upstream.script = says(word)
        got = await gateway.chat()
        assert text_of(got) == word
        assert got.cache_status == "gateway; fwd=bypass; fwd-status=200; stored; detail=record"
    assert len(upstream.asked) == 2
    replaying = await start_in_turn("replay")
    assert text_of(await replaying.chat()) == "two"


async def test_in_record_mode_no_answer_is_shared_and_only_if_cached_is_obeyed(start_in_turn, upstream):
    gateway = await start_in_turn("record")
    await asyncio.gather(*(gateway.chat(stream=True) for _ in range(3)))
    await gateway.landed()
    assert len(upstream.asked) == 3
    assert (await gateway.chat(headers={"Cache-Control": "only-if-cached"})).cache_status.startswith(HIT)
    assert (await gateway.chat("new", headers={"Cache-Control": "only-if-cached"})).status == 504
    assert len(upstream.asked) == 3


async def test_record_mode_fills_all_samples(start_in_turn, upstream):
    gateway = await start_in_turn("record", cache={"samples": 2})
    for word in ("one", "two"):
        upstream.script = says(word)
        await gateway.chat()
    replaying = await start_in_turn("replay", cache={"samples": 2})
    assert {text_of(await replaying.chat()) for _ in range(2)} == {"one", "two"}
    assert len(upstream.asked) == 2


# Replay


async def test_replay_mode_plays_what_was_recorded_and_asks_nobody(start_in_turn, upstream):
    recorded = await (await start_in_turn("cache", replay={"identity": "original"})).chat(stream=True)
    gateway = await start_in_turn("replay", replay={"identity": "original"})
    got = await gateway.chat(stream=True)
    assert (got.events, got.cache_status.startswith(HIT)) == (recorded.events, True)
    assert text_of(await gateway.chat()) == "Hello world"
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("cache_control", ["no-cache", "no-store", "max-age=0", "min-fresh=999999999", "only-if-cached"])
async def test_whatever_a_caller_says_of_caches_it_gets_the_recording(start_in_turn, upstream, cache_control):
    await (await start_in_turn("cache")).chat()
    gateway = await start_in_turn("replay")
    got = await gateway.chat(headers={"Cache-Control": cache_control})
    assert (got.status, got.cache_status.startswith(HIT)) == (200, True)
    assert len(upstream.asked) == 1


async def test_a_stale_recording_is_played_and_not_refreshed(start_in_turn, upstream):
    recording = await start_in_turn("cache", cache={"ttl_s": 0.001, "stale_s": 600})
    await recording.chat()
    gateway = await start_in_turn("replay", cache={"ttl_s": 0.001, "stale_s": 600})
    for _ in range(3):
        got = await gateway.chat()
        assert got.cache_status.startswith(f"{HIT}; ttl=-")
        assert "detail" not in got.cache_status
    assert len(upstream.asked) == 1


async def test_samples_that_are_missing_are_not_fetched(start_in_turn, upstream):
    await (await start_in_turn("cache")).chat()
    gateway = await start_in_turn("replay", cache={"samples": 4})
    for _ in range(5):
        assert (await gateway.chat()).cache_status.startswith(HIT)
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("streamed", [True, False])
async def test_what_is_not_recorded_is_refused_with_its_key_and_the_nearest_difference(start_in_turn, upstream, streamed):
    await (await start_in_turn("cache")).chat("What is a gateway?", temperature=0)
    gateway = await start_in_turn("replay")
    missed = await gateway.chat("What is a getaway?", temperature=0, stream=streamed)
    assert missed.status == 504
    assert missed.cache_status == "gateway; detail=not-recorded"
    assert missed.headers["x-should-retry"] == "false"
    error = missed.json["error"]
    assert (error["code"], error["type"], len(error["key"])) == ("not_recorded", "gateway_error", 40)
    first = error["nearest"]["first"]
    assert (error["nearest"]["differences"], first["path"], first["kind"]) == (1, "messages.0.content", "text")
    for part in (error["key"], error["nearest"]["key"], "messages.0.content", "gateway?", "getaway?"):
        assert part in error["message"]
    assert len(upstream.asked) == 1


async def test_nobody_is_told_what_others_have_recorded(start_in_turn):
    mine, others = {"Authorization": "Bearer sk-mine"}, {"Authorization": "Bearer sk-others"}
    await (await start_in_turn("cache")).chat("our secret", headers=others)
    gateway = await start_in_turn("replay")
    for content in ("our secret", "our secrets"):
        error = (await gateway.chat(content, headers=mine)).json["error"]
        assert error["nearest"] is None
        assert "each credential has its own" in error["message"]
    assert (await gateway.chat("our secret", headers=others)).status == 200


async def test_a_recording_under_another_model_is_told_by_that(start_in_turn):
    await (await start_in_turn("cache")).chat()
    gateway = await start_in_turn("replay")
    error = (await gateway.chat(model="model-2")).json["error"]
    assert error["nearest"]["differs_in"] == ["model"]
    assert "differs in: model" in error["message"]


async def test_a_crowd_of_misses_is_refused_though_not_everybody_is_told_the_nearest(start_in_turn, monkeypatch):
    monkeypatch.setattr("gateway.missing._MAX_WAITING", 2)
    await (await start_in_turn("cache")).chat("a")
    gateway = await start_in_turn("replay")
    missed = await asyncio.gather(*(gateway.chat(f"b{number}") for number in range(20)))
    assert {got.status for got in missed} == {504}
    nearest = [got.json["error"]["nearest"] for got in missed]
    assert any(nearest)
    assert not all(nearest)


async def test_a_store_that_is_away_is_no_miss(start_gateway, own_redis):
    gateway = await start_gateway(redis={"url": own_redis.url}, cache={"mode": "replay"})
    own_redis.stop()
    got = await gateway.chat()
    assert (got.status, got.json["error"]["code"]) == (503, "store_unavailable")


async def test_models_are_those_of_the_configuration_and_nothing_is_relayed(start_gateway, upstream):
    served = {"name": "own", "kind": "openai", "base_url": upstream.base_url, "models": ["m-1", "m-*"]}
    gateway = await start_gateway(cache={"mode": "replay"}, upstreams=[served])
    async with gateway.session.get(f"{gateway.base_url}/models") as response:
        assert [model["id"] for model in (await response.json())["data"]] == ["m-1"]
    async with gateway.session.get(f"{gateway.base_url}/models/m-2") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "model_not_found")
    got = await gateway.post("/v1/embeddings", {"model": "m-1", "input": "a"}, authorization="Bearer k")
    assert (got.status, got.json["error"]["code"]) == (504, "not_recorded")
    assert upstream.asked == []


async def test_a_resumed_stream_whose_replica_is_gone_is_not_gone_on_with(start_in_turn, upstream):
    async def script(asked):
        await asked.head()
        await asked.event(chunk({"content": "one"}))
        await asked.gate("more")

    upstream.script = script
    one = await start_in_turn("cache", flights={"lease_s": 0.2})
    async with one.opened(stream=True) as response:
        stream = response.headers["Gateway-Stream-Id"]
        replaying = await start_in_turn("replay", flights={"lease_s": 0.2})
        async with replaying.session.get(f"{replaying.base_url}/streams/{stream}?after=1") as rest:
            await one.service.close()  # which gives its call to whoever goes on with it
            assert b'"code":"stream_lost"' in (await rest.read()).replace(b" ", b"")
    assert len(upstream.asked) == 1


# Where the simulated model stands in


async def test_where_it_is_wanted_the_simulated_model_answers_and_says_so(start_in_turn, upstream):
    await (await start_in_turn("cache")).chat("recorded")
    simulated = {"name": "sim", "kind": "simulated", "ttft_s": 0, "tokens_per_s": 100_000, "models": ["s"]}
    real = {"name": "scripted", "kind": "openai", "base_url": upstream.base_url, "models": ["*"]}
    gateway = await start_in_turn("replay", replay={"on_miss": "simulate"}, upstreams=[real, simulated])
    for streamed in (True, False):
        got = await gateway.chat("not recorded", stream=streamed)
        assert got.status == 200
        assert got.headers["Gateway-Simulated"] == "?1"
        assert "detail=simulated" in got.cache_status
        assert got.headers["Cache-Control"].startswith("no-store")
    hit = await gateway.chat("recorded")
    assert (text_of(hit), hit.headers.get("Gateway-Simulated")) == ("Hello world", None)
    # It is not kept, and a caller who wants what is stored gets nothing else.
    assert (await gateway.chat("not recorded", headers={"Cache-Control": "only-if-cached"})).status == 504
    assert len(upstream.asked) == 1


# Nobody who could be asked


NOTHING_LOADED = """
import asyncio, sys
from pathlib import Path
from gateway.app import SystemClock
from gateway.config import load
from gateway.live import Live

async def main():
    live = Live(load(Path(sys.argv[1]), {}), SystemClock())
    print(sorted({type(each.upstream._upstream).__name__ for each in live._fleet.deployments}))
    await live.close()
    for name in ("openai", "httpx", "httpx2", "langchain_core", "gateway.upstreams.openai", "gateway.upstreams.langchain"):
        if name in sys.modules:
            print(name)

asyncio.run(main())
"""
EVERY_KIND = """
[cache]
mode = "replay"
[[upstreams]]
name = "o"
kind = "openai"
api_key_env = "NOT_SET"
[[upstreams]]
name = "f"
kind = "openai"
api_key_file = "/not/there"
[[upstreams]]
name = "l"
kind = "langchain"
target = "not_installed.Model"
arguments_env = {api_key = "NOT_SET_EITHER"}
arguments_file = {other = "/not/there/either"}
[[upstreams]]
name = "s"
kind = "simulated"
"""


async def test_in_replay_mode_no_client_is_made_and_no_library_of_one_is_loaded(tmp_path):
    (tmp_path / "gateway.toml").write_text(EVERY_KIND)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", NOTHING_LOADED, "gateway.toml",
        cwd=tmp_path, env=ENVIRON, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, errors = await process.communicate()
    assert (out.decode(), errors.decode()) == ("['AbsentUpstream']\n", "")


async def test_secrets_of_upstreams_need_not_be_there_and_are_not_read(tmp_path):
    path = tmp_path / "gateway.toml"
    path.write_text(EVERY_KIND)
    loaded = load(path, {"NOT_SET": "sk-set-after-all"})
    assert loaded.secrets == {}
    assert loaded.secret_files == ()
    assert loaded.warnings == ()
    with pytest.raises(ConfigError) as caught:
        load(path, {"GATEWAY_CACHE_MODE": "cache"})
    assert len(caught.value.problems) == 4
    with pytest.raises(ConfigError, match=r"admin\.key_env"):
        load(path, {"GATEWAY_ADMIN_KEY_ENV": "NOT_SET_AT_ALL"})


async def test_what_is_asked_all_the_same_refuses():
    loaded = load(None, {"GATEWAY_CACHE_MODE": "replay"})
    fleet = assemble(loaded, SystemClock())
    assert isinstance(fleet.deployments[0].upstream._upstream, AbsentUpstream)
    assert fleet.router.stand_in is None
    assert await fleet.router.upstreams[0].models({}) == []
    await fleet.close()


def test_a_running_process_does_not_become_one_that_asks_nobody_or_stop_being_one():
    def config(mode):
        return load(None, {"GATEWAY_CACHE_MODE": mode}).config

    free = {(old, new): dict(differences(config(old), config(new))) for old in MODES for new in MODES if old != new}
    assert all(found == {"cache.mode": "replay" not in pair} for pair, found in free.items())


MODES = ("cache", "record", "replay", "off")


async def test_a_change_to_replay_mode_is_refused_while_it_runs():
    live = Live(load(None, {}), SystemClock())
    with pytest.raises(ConfigError, match=r"cache\.mode: cannot change"):
        await live.change(load(None, {"GATEWAY_CACHE_MODE": "replay"}))
    assert await live.change(load(None, {"GATEWAY_CACHE_MODE": "record"})) == ["cache.mode"]
    await live.close()


# The command


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_mode_can_be_given_to_the_command(tmp_path, workers):
    (tmp_path / "config.toml").write_text('[cache]\nmode = "record"\n')
    with Served(tmp_path, "--mode", "replay", "--workers", workers) as gateway:
        assert "replay mode: no model is asked" in gateway.said
        with pytest.raises(HTTPError, match="504"):
            gateway.chat()
        assert gateway.end() == 0


async def test_a_configuration_is_checked_for_a_mode(tmp_path):
    (tmp_path / "config.toml").write_text(EVERY_KIND.replace('mode = "replay"', ""))
    found = {}
    for mode in ("replay", "record"):
        process = await asyncio.create_subprocess_exec(
            *PROGRAM, "check", "--mode", mode, cwd=tmp_path, env=ENVIRON,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, errors = await process.communicate()
        found[mode] = process.returncode, out.decode(), errors.decode()
    assert found["replay"][0] == 0, found
    assert "replay mode: no model is asked" in found["replay"][1]
    assert found["record"][0] == 2
    assert "NOT_SET is not set" in found["record"][2]


async def test_a_mode_that_is_none_is_a_wrong_command_line(tmp_path):
    process = await asyncio.create_subprocess_exec(
        *PROGRAM, "serve", "--mode", "reply", cwd=tmp_path, env=ENVIRON, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"invalid choice: 'reply'" in errors

"""Recordings on their way from one gateway to another one with another secret, and what must not travel with them."""

import json
from contextlib import suppress

import aiohttp
import pytest
from running import Got
from scripted import stream, whole_answer

from gateway.core.jsonl import order_of
from gateway.errors import StoreUnavailable
from gateway.http.recordings import CALLER
from gateway.recordings import FOREVER_S

ADMIN = "open-sesame"
ALICE = {"Authorization": "Bearer sk-alice-0123456789"}
BOB = {"Authorization": "Bearer sk-bob-0123456789"}
SHARED = {"scope": "shared"}


@pytest.fixture
def start(start_gateway, upstream):
    """Starts a gateway with a secret of its own and the upstream's key; ``fresh`` ids would differ between two answers."""

    async def start(name="scripted", **sections):
        entry = {"name": name, "kind": "openai", "base_url": upstream.base_url, "models": ["*"], "api_key_env": "KEY"}
        sections = {"replay": {"identity": "original"}, "upstreams": [entry], **sections}
        environ = {"ADMIN": ADMIN, "KEY": "sk-ours-0123456789", **sections.pop("environ", {})}
        return await start_gateway(environ, admin={"key_env": "ADMIN"}, **sections)

    return start


async def ask(gateway, method, query="", **options):
    headers = {"Authorization": f"Bearer {ADMIN}", **options.pop("headers", {})}
    url = f"{gateway.origin}/admin/recordings{query}"
    async with gateway.session.request(method, url, headers=headers, **options) as response:
        return Got(response.status, response.headers, await response.read())


async def export(gateway, query=""):
    got = await ask(gateway, "GET", query)
    assert (got.status, got.headers["Content-Type"]) == (200, "application/x-ndjson")
    return sorted((line for line in got.body.split(b"\n") if line), key=order_of)


async def take(gateway, lines, query="", **headers):
    got = await ask(gateway, "POST", query, data=b"\n".join(lines), headers=headers)
    assert got.status == 200, got.body
    told = got.json
    assert told.pop("object") == "cache.import"
    return told


def counted(errors=(), **counts):
    return {"imported": 0, "kept": 0, "expired": 0, "purged": 0, "failed": len(errors), **counts, "errors": list(errors)}


async def fill(gateway, *contents, **options):
    for content in contents:
        assert (await gateway.chat(content, stream=True, **options)).status == 200
    await gateway.landed()


async def replies(gateway, content, headers=None, **members):
    """All that a caller may get, byte for byte, and all of it from the cache."""
    headers = {**(headers or {}), "Cache-Control": "only-if-cached"}
    found = []
    for more in ({}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}):
        got = await gateway.chat(content, headers=headers, **members, **more)
        assert got.cache_status.startswith("gateway; hit"), got.body
        found.append(got.body)
    return found


async def misses(gateway, content, headers=None, **members):
    got = await gateway.chat(content, headers={**(headers or {}), "Cache-Control": "only-if-cached"}, **members)
    return got.status == 504


# There and back


async def test_a_recording_hits_in_another_deployment_with_the_very_same_bytes(start, upstream):
    here, there = await start(cache=SHARED), await start(cache=SHARED)
    assert here.store.secret != there.store.secret
    await fill(here, "hi", "grüß\ndich")
    lines = await export(here)
    assert len(lines) == 2
    asked = len(upstream.asked)
    assert await take(there, lines) == counted(imported=2)
    for content in ("hi", "grüß\ndich"):
        assert await replies(there, content) == await replies(here, content)
    assert len(upstream.asked) == asked
    assert await misses(there, "hello")


async def test_export_import_export_gives_the_same_bytes(start):
    here, there = await start(cache={**SHARED, "compress_from_bytes": 100}), await start(cache=SHARED)
    await fill(here, *(f"question {number}" for number in range(40)))
    await fill(here, "red", headers={"Gateway-Cache-Tags": "red", "Gateway-Cache-Namespace": "team-a"})
    await here.post("/v1/completions", {"model": "model-1", "prompt": "Say"})
    await here.landed()
    lines = await export(here)
    assert len(lines) == 42
    assert await take(there, lines) == counted(imported=42)
    assert await export(there) == lines
    assert await take(there, lines) == counted(imported=42)
    assert await export(there) == lines


async def test_timing_tags_and_samples_travel(start, upstream):
    here, there = await start(cache={**SHARED, "samples": 2}), await start(cache={**SHARED, "samples": 2})
    said = iter(["one", "two"])
    upstream.script = lambda asked: stream(asked, next(said))
    for _ in range(2):
        await fill(here, "hi", headers={"Gateway-Cache-Tags": "red"})
    lines = await export(here)
    assert sorted(json.loads(line)["request"].get("sample", 0) for line in lines) == [0, 1]
    assert await take(there, lines) == counted(imported=2)
    heard = {json.loads((await replies(there, "hi"))[0])["choices"][0]["message"]["content"] for _ in range(2)}
    assert heard == {"one", "two"}
    assert await export(there) == lines
    assert all(json.loads(line)["meta"]["tags"] == ["red"] for line in lines)


async def test_an_answer_that_was_not_streamed_travels_as_it_came(start, upstream):
    here, there = await start(cache=SHARED), await start(cache=SHARED)
    body = json.dumps(whole_answer("Hi  there"), indent=2).encode()

    upstream.script = lambda asked: asked.answer(body)
    await fill(here, "hi")
    lines = await export(here)
    assert await take(there, lines) == counted(imported=1)
    assert await replies(there, "hi") == await replies(here, "hi")
    assert (await replies(there, "hi"))[0] == body
    assert await export(there) == lines


async def test_a_recording_is_found_though_the_other_deployment_calls_its_upstream_otherwise(start):
    here, there = await start(cache=SHARED), await start("other", cache={**SHARED, "ignored_paths": ["seed"]})
    await fill(here, "hi", seed=3, model="fast", headers=ALICE)
    lines = await export(here)
    assert await take(there, lines, "?everyone=true") == counted(imported=1)
    assert await replies(there, "hi", seed=3, model="fast")
    assert await replies(there, "hi", seed=4, model="fast")  # by its own rules of what is in a key
    assert await misses(there, "hi", seed=3, model="slow")


async def test_what_a_fallback_has_said_stays_the_fallbacks(start, upstream):
    async def only_the_spare_one_answers(asked):
        if asked.json["model"] == "main":
            await asked.answer({"error": {"message": "down"}}, 503)
        else:
            await stream(asked, "spare")

    upstream.script = only_the_spare_one_answers
    both = [
        {"name": name, "kind": "openai", "base_url": upstream.base_url, "models": [name], "api_key_env": "KEY"}
        for name in ("main", "spare")
    ]
    sections = {"upstreams": both, "models": [{"names": ["main"], "fallbacks": ["spare"]}], "cache": SHARED}
    here, there = await start(**sections), await start(**sections)
    await fill(here, "hi", model="main")
    [line] = lines = await export(here)
    asked = json.loads(line)["request"]
    assert (asked["upstream"], asked["model"], asked["body"]["model"]) == ("spare", "spare", "main")
    assert await take(there, lines) == counted(imported=1)
    assert await replies(there, "hi", model="spare") == await replies(here, "hi", model="spare")
    assert await misses(there, "hi", model="main")


# Whose they are


async def test_no_credential_is_in_a_line(start, upstream):
    gateway = await start()
    await fill(gateway, "hi", headers=ALICE, user="alice", metadata={"key": "sk-alice-0123456789"})
    text = b"".join(await export(gateway))
    for secret in (b"sk-", b"Bearer", ADMIN.encode(), gateway.store.secret, gateway.store.secret.hex().encode()):
        assert secret not in text
    assert b'"owner":"tenant"' in text


async def test_a_tenants_recording_goes_to_whom_it_is_said_to_be_for(start, upstream):
    here, there, shared = [await start(cache=cache) for cache in ({}, {}, SHARED)]
    await fill(here, "hi", headers=ALICE)
    lines = await export(here)
    foreign = "request.owner: is a tenant of another deployment: say whose it is to be here"
    refused = counted([{"line": 1, "message": foreign}])
    assert await take(there, lines) == await take(shared, lines) == refused
    own = "request.owner: is everyone, but here callers have their own answers ([cache] scope): say whose it is to be"
    assert await take(there, lines, "?everyone=true") == counted([{"line": 1, "message": own}])
    assert await take(there, lines, **{CALLER: BOB["Authorization"]}) == counted(imported=1)
    assert await replies(there, "hi", BOB) == await replies(here, "hi", ALICE)
    assert await misses(there, "hi", ALICE)
    assert await take(shared, lines, "?everyone=true") == counted(imported=1)
    assert await replies(shared, "hi", BOB) == await replies(shared, "hi") == await replies(here, "hi", ALICE)


async def test_what_was_shared_needs_an_owner_where_nothing_is(start, upstream):
    here, there = await start(cache=SHARED), await start()
    await fill(here, "hi")
    lines = await export(here)
    assert (await take(there, lines))["failed"] == 1
    assert await take(there, lines, **{CALLER: ALICE["Authorization"]}) == counted(imported=1)
    assert await replies(there, "hi", ALICE)


async def test_a_namespace_is_the_same_everywhere(start, upstream):
    here, there = await start(), await start()
    team = {"Gateway-Cache-Namespace": "team-a"}
    await fill(here, "hi", headers={**team, **ALICE})
    assert await take(there, await export(here)) == counted(imported=1)
    assert await replies(there, "hi", {**team, **BOB})
    assert await misses(there, "hi", BOB)


async def test_where_callers_pay_themselves_a_namespace_needs_a_caller(start, upstream):
    passing = [{"name": "scripted", "kind": "openai", "base_url": upstream.base_url, "models": ["*"]}]
    here, there = await start(upstreams=passing), await start(upstreams=passing)
    team = {"Gateway-Cache-Namespace": "team-a"}
    await fill(here, "hi", headers={**team, **ALICE})
    lines = await export(here)
    assert (await take(there, lines))["failed"] == 1
    [error] = (await take(there, lines, "?everyone=true"))["errors"]
    assert "here callers pay with their own keys" in error["message"]
    assert await take(there, lines, **{CALLER: BOB["Authorization"]}) == counted(imported=1)
    assert await replies(there, "hi", {**team, **BOB})
    assert await misses(there, "hi", {**team, **ALICE})


async def test_with_the_same_secret_everybody_keeps_what_is_theirs(start, upstream):
    secret = {"environ": {"SECRET": "s" * 32}, "cache": {"key_secret_env": "SECRET", "keep_requests": False}}
    here, there, elsewhere = await start(**secret), await start(**secret), await start()
    await fill(here, "hi", headers=ALICE)
    await fill(here, "hi", "ho", headers=BOB)
    lines = await export(here)
    assert all(json.loads(line)["request"]["body"] is None for line in lines)
    assert await take(there, lines) == counted(imported=3)
    assert await replies(there, "hi", ALICE) == await replies(here, "hi", ALICE)
    assert await replies(there, "ho", BOB)
    assert await misses(there, "ho", ALICE)
    assert await export(there) == lines
    message = "request.body: was not kept, and its key means nothing under another secret"
    assert await take(elsewhere, lines) == counted([{"line": line, "message": message} for line in (1, 2, 3)])


# What is not taken in


async def test_bad_lines_are_told_by_number_and_all_others_are_taken(start):
    here, there = await start(cache=SHARED), await start(cache=SHARED)
    await fill(here, "one", "two", "three")
    one, two, three = await export(here)
    bad = json.loads(two)
    bad["answer"]["frames"].pop(1)
    cut = json.loads(three)
    cut["answer"]["frames"] = [frame.replace('"stop"', "null") for frame in cut["answer"]["frames"]]
    lines = [b"{", one, b"", b"[]", json.dumps(bad).encode(), json.dumps(cut).encode(), three, b"  "]
    told = await take(there, lines)
    assert told["imported"] == 2
    assert [(error["line"], error["message"].partition(":")[0]) for error in told["errors"]] == [
        (1, "it is not JSON"),
        (4, "it is not an object"),
        (5, "timing.at_us"),
        (6, "such an answer is not stored here (incomplete)"),
    ]
    assert await export(there) == [one, three]


async def test_a_later_recording_stays_and_what_has_expired_stays_out(start):
    gateway = await start(cache=SHARED)
    await fill(gateway, "hi")
    [line] = await export(gateway)
    older, stale = json.loads(line), json.loads(line)
    older["meta"]["started_at"] -= 60
    stale["meta"]["written_at"] -= 90_000
    stale["meta"]["flight"] = "0" * 16
    lines = [json.dumps(each).encode() for each in (older, stale)]
    assert await take(gateway, lines) == counted(kept=1, expired=1)
    assert await export(gateway) == [line]
    fresh = await start(cache=SHARED)
    assert await take(fresh, lines[1:]) == counted(expired=1)
    assert await misses(fresh, "hi")
    assert await take(fresh, lines[1:], "?ttl_s=600") == counted(imported=1)
    assert await replies(fresh, "hi")
    assert await take(fresh, lines[1:], f"?ttl_s={FOREVER_S}") == counted(imported=1)
    [line] = await export(fresh)
    assert json.loads(line)["meta"]["ttl_s"] == FOREVER_S


async def test_what_was_purged_does_not_come_back_by_a_copy(start):
    gateway = await start(cache=SHARED)
    await fill(gateway, "hi")
    lines = await export(gateway)
    async with gateway.session.post(
        f"{gateway.origin}/admin/purge", json={"all": True}, headers={"Authorization": f"Bearer {ADMIN}"}
    ) as response:
        assert response.status == 200
    assert await export(gateway) == []
    assert await take(gateway, lines) == counted(purged=1)
    assert await misses(gateway, "hi")


async def test_an_export_has_what_its_filters_admit(start):
    gateway = await start(cache=SHARED)
    await fill(gateway, "hi")
    await fill(gateway, "red", model="mini", headers={"Gateway-Cache-Tags": "red", "Gateway-Cache-Namespace": "team"})
    for query in ("?model=mi*", "?tag=red", "?namespace=team", "?tag=red&max_age_s=60"):
        [line] = await export(gateway, query)
        assert json.loads(line)["request"]["model"] == "mini"
    assert await export(gateway, "?min_age_s=60") == []
    for method, query in (("GET", "?limit=1"), ("GET", "?tag=a&tag=b"), ("POST", "?ttl_s=x"), ("POST", "?limit=1")):
        assert (await ask(gateway, method, query)).status == 400


async def test_lines_come_in_pieces_of_any_size(start):
    here, there = await start(cache=SHARED), await start(cache=SHARED)
    await fill(here, "one", "two")
    lines = await export(here)
    text = b"\n".join(lines)

    async def drops():
        for at in range(0, len(text), 7):
            yield text[at : at + 7]

    got = await ask(there, "POST", data=drops())
    assert got.json["imported"] == 2
    assert await export(there) == lines


async def test_what_does_not_load_is_left_out_and_the_rest_is_there(start):
    gateway = await start(cache=SHARED)
    await fill(gateway, "one", "two")
    lines = await export(gateway)
    [key, _] = await gateway.store.recent(2)
    await gateway.store._server.write(("HSET", gateway.store._keys.recording(key), "marks", "x"))
    left = await export(gateway)
    assert len(left) == 1
    assert left[0] in lines


# Faults


async def test_who_leaves_in_the_middle_of_an_import_leaves_no_task(start, no_task_is_left):
    here, there = await start(cache=SHARED), await start(cache=SHARED)
    await fill(here, "one", "two")
    lines = await export(here)

    async def some_then_gone():
        yield lines[0] + b"\n"
        raise ConnectionResetError

    with suppress(ConnectionResetError, aiohttp.ClientError):
        await ask(there, "POST", data=some_then_gone())
    assert await take(there, lines) == counted(imported=2)


async def test_without_the_store_there_is_neither(start, own_redis):
    gateway = await start(cache=SHARED, redis={"url": own_redis.url})
    await fill(gateway, "hi")
    lines = await export(gateway)
    own_redis.stop()
    for got in (await ask(gateway, "GET"), await ask(gateway, "POST", data=lines[0])):
        assert (got.status, got.json["error"]["code"]) == (503, "store_unavailable")


async def test_an_export_that_loses_the_store_ends_with_an_error(start, monkeypatch):
    gateway = await start(cache=SHARED)
    await fill(gateway, "hi")
    store, page = gateway.store, gateway.store.page

    async def pages(cursor=""):
        if cursor:
            raise StoreUnavailable("gone")
        found, cursor = await page("")
        while not found:  # others have keys on this server
            found, cursor = await page(cursor)
        return found, "1"

    monkeypatch.setattr(store, "page", pages)
    got = await ask(gateway, "GET")
    line, error, _ = got.body.split(b"\n")
    assert json.loads(line)["v"] == 1
    assert json.loads(error)["error"]["code"] == "store_unavailable"


async def test_no_more_than_a_few_recordings_are_held_at_a_time(start, monkeypatch):
    here, there = await start(cache=SHARED), await start(cache=SHARED)
    await fill(here, *map(str, range(90)))
    held, most = 0, 0

    def counting(act):
        async def counted(*args, **options):
            nonlocal held, most
            held += 1
            most = max(most, held)
            try:
                return await act(*args, **options)
            finally:
                held -= 1

        return counted

    monkeypatch.setattr(here.store, "inspect", counting(here.store.inspect))
    monkeypatch.setattr(there.store, "store", counting(there.store.store))
    lines = await export(here)
    assert 1 < most <= 32
    held = most = 0
    assert await take(there, lines) == counted(imported=90)
    assert 1 < most <= 32

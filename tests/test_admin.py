"""The administration: who may, what is told of what is stored, and how to be rid of it."""

import asyncio
import json
from dataclasses import replace

import pytest
from running import Got
from stores import META, RECORDING

from gateway.core.key import sample_key
from gateway.core.recording import Recorder
from gateway.eraser import Eraser, Wanted
from gateway.errors import StoreUnavailable
from gateway.http.admin import NDJSON

SECRET = "open-sesame"
PATHS = [
    ("GET", "/admin/"),
    ("GET", "/admin/entries"),
    ("GET", "/admin/entries/" + "0" * 40),
    ("DELETE", "/admin/entries/" + "0" * 40),
    ("POST", "/admin/purge"),
    ("GET", "/admin/stats"),
    ("GET", "/admin/live"),
    ("GET", "/admin/profile"),
    ("POST", "/admin/explain"),
    ("GET", "/admin/recordings"),
    ("POST", "/admin/recordings"),
]


@pytest.fixture
def start(start_gateway):
    """Starts a gateway whose administration is on."""

    async def start(environ=None, **sections):
        return await start_gateway({"ADMIN": SECRET, **(environ or {})}, admin={"key_env": "ADMIN"}, **sections)

    return start


async def ask(gateway, method, path, body=None, *, key=SECRET, **options):
    headers = {"Authorization": f"Bearer {key}", **options.pop("headers", {})}
    async with gateway.session.request(method, gateway.origin + path, json=body, headers=headers, **options) as response:
        return Got(response.status, response.headers, await response.read())


async def listed(gateway, query=""):
    """The entries of all pages."""
    found, cursor = [], ""
    while True:
        page = (await ask(gateway, "GET", f"/admin/entries?limit=10000&cursor={cursor}{query}")).json
        found += page["data"]
        cursor = page["cursor"]
        if not cursor:
            return found


async def purge(gateway, **wanted):
    got = await ask(gateway, "POST", "/admin/purge", wanted)
    assert got.status == 200, got.body
    return got.json


async def put(gateway, number, **members):
    """An entry without a request: as many as a test likes."""
    key = f"{number:040x}"
    meta = META._replace(**{"flight": f"{number:016x}", "ttl_s": 600.0, "written_at": gateway.now, **members})
    await gateway.store.store(key, replace(RECORDING, meta=meta))
    return key


@pytest.fixture
async def gateway(start):
    running = await start()
    running.now = running.service._clock.now()
    return running


# Who may


NO_KEYS = [
    {},
    {"Authorization": f"Basic {SECRET}"},
    {"Authorization": SECRET},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer wrong"},
    {"Authorization": f"Bearer {SECRET} x"},
    {"Authorization": "Bearer \u00e4"},
    {"X-Api-Key": SECRET},
]


async def test_without_the_key_every_path_says_the_same(gateway):
    answers = set()
    for headers in NO_KEYS:
        for method, path in [*PATHS, ("GET", "/admin"), ("GET", "/admin/nothing"), ("PATCH", "/admin/stats")]:
            async with gateway.session.request(method, gateway.origin + path, headers=headers) as response:
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert response.headers["Cache-Control"] == "no-store"
                answers.add((response.status, await response.text()))
    [(status, text)] = answers
    error = json.loads(text)["error"]
    assert (status, error["type"], error["code"]) == (401, "invalid_request_error", "invalid_api_key")
    assert SECRET not in text


async def test_the_key_opens_what_is_served_and_nothing_else(gateway):
    got = await ask(gateway, "GET", "/admin/")
    assert (got.status, got.headers["Cache-Control"]) == (200, "no-store")
    assert [(row["method"], row["path"]) for row in got.json["data"]] == [
        (method, path.replace("0" * 40, "{key}")) for method, path in PATHS
    ]
    for path in ("/admin/nothing", "/admin/entries/"):
        unknown = await ask(gateway, "GET", path)
        assert (unknown.status, unknown.json["error"]["code"]) == (404, "unknown_url")
        assert unknown.headers["Cache-Control"] == "no-store"
    for path, allowed in {"/admin": "GET", "/admin/purge": "POST", "/admin/entries/" + "0" * 40: "GET, DELETE"}.items():
        wrong = await ask(gateway, "PATCH", path)
        assert (wrong.status, wrong.headers["Allow"]) == (405, allowed)
    assert (await gateway.chat(headers={"Authorization": f"Bearer {SECRET}"})).status == 200
    lower = await ask(gateway, "GET", "/admin/stats", headers={"Authorization": f"bearer {SECRET}"})
    assert lower.status == 200


@pytest.mark.parametrize("admin", [{}, {"enabled": False, "key_env": "ADMIN"}])
async def test_where_it_is_off_there_is_nothing(start_gateway, admin):
    gateway = await start_gateway({"ADMIN": SECRET}, admin=admin)
    for method, path in PATHS:
        got = await ask(gateway, method, path)
        assert (got.status, got.json["error"]["code"]) == (404, "unknown_url")
    assert b"/admin" not in (await ask(gateway, "GET", "/openapi.json")).body


async def test_the_description_of_the_api_has_it_where_it_is_on(gateway):
    assert "/admin/purge" in (await ask(gateway, "GET", "/openapi.json")).json["paths"]


WRONG = [
    ("GET", "/admin/?x=1", None, "x"),
    ("GET", "/admin/entries?namespase=a", None, "namespase"),
    ("GET", "/admin/entries?tag=a&tag=b", None, "tag"),
    ("GET", "/admin/entries?min_age_s=-1", None, "min_age_s"),
    ("GET", "/admin/entries?max_age_s=nan", None, "max_age_s"),
    ("GET", "/admin/entries?min_bytes=1.5", None, "min_bytes"),
    ("GET", "/admin/entries?stale=yes", None, "stale"),
    ("GET", "/admin/entries?limit=0", None, "limit"),
    ("GET", "/admin/entries?cursor=nowhere", None, "cursor"),
    ("GET", "/admin/entries?cursor=-", None, "cursor"),
    ("GET", "/admin/entries?cursor=1-2-3-4", None, "cursor"),  # a cluster's
    ("GET", f"/admin/entries?cursor={'9' * 20}", None, "cursor"),
    ("GET", f"/admin/entries?model={'[' * 1001}", None, "model"),
    ("GET", f"/admin/entries/{'0' * 40}?part=tail", None, "part"),
    ("GET", "/admin/stats?scan=1", None, "scan"),
    ("DELETE", f"/admin/entries/{'0' * 40}?dry_run=true", None, "dry_run"),
    ("POST", "/admin/purge", {}, None),
    ("POST", "/admin/purge", [], None),
    ("POST", "/admin/purge", {"all": False, "model": None}, None),
    ("POST", "/admin/purge", {"namspace": "a"}, "namspace"),
    ("POST", "/admin/purge", {"namespace": ""}, "namespace"),
    ("POST", "/admin/purge", {"tag": ["a"]}, "tag"),
    ("POST", "/admin/purge", {"all": "true"}, "all"),
    ("POST", "/admin/purge", {"all": True, "tag": "a"}, "all"),
    ("POST", "/admin/purge", {"key": "x"}, "key"),
    ("POST", "/admin/purge", {"model": "[" * 1001}, "model"),
    ("POST", "/admin/purge", {"stream": "x"}, "stream"),
    ("POST", "/admin/explain", {"request": []}, "request"),
    ("POST", "/admin/explain", {"request": {}}, "model"),
    ("POST", "/admin/explain", {"api": "images", "request": {}}, "api"),
    ("POST", "/admin/explain", {"request": {}, "headers": {"a": 1}}, "headers"),
    ("POST", "/admin/explain", {"request": {}, "body": {}}, "body"),
    ("POST", "/admin/explain", {"request": {}, "headers": {"Gateway-Cache-Namespace": "("}}, "Gateway-Cache-Namespace"),
]


async def test_what_is_wrong_with_a_request_is_said(gateway):
    for method, path, body, param in WRONG:
        for accept in ("*/*", NDJSON):
            got = await ask(gateway, method, path, body, headers={"Accept": accept})
            assert (got.status, got.json["error"]["param"]) == (400, param), (path, body)


# What is stored


async def test_a_listing_shows_each_entry_and_filters(gateway):
    await gateway.chat("plain", stream=True)
    names = {"Gateway-Cache-Namespace": "team-a", "Gateway-Cache-Tags": "red, blue"}
    await gateway.chat("named", stream=True, headers=names)
    await gateway.landed()
    old = await put(gateway, 1, written_at=gateway.now - 1000, model="other", size_bytes=5000)
    [named] = await listed(gateway, "&namespace=team-a")
    assert named["object"] == "cache.entry"
    assert (named["state"], named["model"], named["upstream"], named["api"]) == ("fresh", "model-1", "scripted", "chat")
    assert (named["tags"], named["frames"]) == (["red", "blue"], 5)
    assert named["usage"]["total_tokens"] == 5
    assert 86390 < named["ttl_s"] <= named["life_s"] <= 86400
    assert len(await listed(gateway)) == 3
    queries = {"&tag=red": 1, "&tag=green": 0, "&model=model-*": 2, "&model=other": 1, "&namespace=": 2, "&stale=true": 1,
               "&min_age_s=900": 1, "&max_age_s=900": 2, "&min_bytes=5000": 1, "&model=other&tag=red": 0}  # fmt: skip
    for query, count in queries.items():
        assert len(await listed(gateway, query)) == count, query
    [stale] = await listed(gateway, "&stale=true")
    assert (stale["key"], stale["state"]) == (old, "stale")
    assert -410 < stale["ttl_s"] <= -400


async def test_a_listing_goes_on_where_it_ended_and_has_everything(gateway):
    for number in range(1, 451):
        await put(gateway, number)
    found, cursor, pages = [], "", 0
    while True:
        page = (await ask(gateway, "GET", f"/admin/entries?limit=10&cursor={cursor}")).json
        found += [entry["key"] for entry in page["data"]]
        cursor, pages = page["cursor"], pages + 1
        if not cursor:
            break
    assert pages > 1
    assert set(found) == {f"{number:040x}" for number in range(1, 451)}


async def test_a_listing_that_finds_nothing_stops_after_a_while_and_can_go_on(gateway, monkeypatch):
    monkeypatch.setattr("gateway.admin._LISTING_PAGES", 2)
    for number in range(1, 1000):
        await put(gateway, number)
    page = (await ask(gateway, "GET", "/admin/entries?tag=none")).json
    assert page["data"] == []
    assert page["cursor"]
    assert await listed(gateway, "&tag=none") == []


async def test_an_entry_that_comes_twice_is_listed_once(gateway, monkeypatch):
    await put(gateway, 1)
    page = gateway.store.page

    async def twice(cursor=""):
        found, cursor = await page(cursor)
        return found * 2, cursor

    monkeypatch.setattr(gateway.store, "page", twice)
    assert len(await listed(gateway)) == 1
    assert (await ask(gateway, "GET", "/admin/stats?scan=true")).json["stored"]["total"]["entries"] == 1
    assert (await purge(gateway, all=True, dry_run=True))["purged"] == 1


async def test_an_entry_tells_all_that_is_kept(gateway):
    live = await gateway.chat("hi", stream=True, user="somebody", stream_options={"include_usage": True})
    await gateway.landed()
    [row] = await listed(gateway)
    path = f"/admin/entries/{row['key']}"
    entry = (await ask(gateway, "GET", path)).json
    assert entry["samples"] == [row["key"]]
    assert entry["stream"] == live.events[:-1]
    assert entry["body"]["choices"][0]["message"]["content"] == "Hello world"
    assert entry["request"] == {"api": "chat", "body": {"model": "model-1", "messages": [{"role": "user", "content": "hi"}]}}
    timing = entry["timing"]
    assert timing["at_us"] == sorted(timing["at_us"])
    assert (len(timing["at_us"]), timing["ttft_us"]) == (5, timing["at_us"][0])
    assert timing["duration_us"] == entry["duration_us"] >= timing["at_us"][-1]
    assert list(timing["gaps_us"]) == ["p50", "p90", "p99", "max"]
    assert timing["gaps_us"]["max"] == max(b - a for a, b in zip(timing["at_us"], timing["at_us"][1:], strict=False))
    assert entry["size_bytes"] > 0 < entry["stored_bytes"]
    for part, expected in {"body": entry["body"], "timing": timing, "request": entry["request"]}.items():
        assert (await ask(gateway, "GET", f"{path}?part={part}")).json == expected
    text = await ask(gateway, "GET", f"{path}?part=stream")
    assert text.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert text.events == live.events[:-1]


async def test_an_entry_names_all_samples_of_its_question(gateway):
    first = await put(gateway, 7)
    third = sample_key(first, 3)
    await put(gateway, int(third, 16), flight="f" * 16, sample_of=first)
    for key in (first, third):
        assert (await ask(gateway, "GET", f"/admin/entries/{key}")).json["samples"] == [first, third]


async def test_an_entry_without_a_request_says_so(gateway):
    key = await put(gateway, 1)
    assert (await ask(gateway, "GET", f"/admin/entries/{key}")).json["request"] is None
    got = await ask(gateway, "GET", f"/admin/entries/{key}?part=request")
    assert (got.status, got.json["error"]["code"]) == (404, "entry_not_found")


async def test_an_unknown_key_is_404(gateway):
    for key in ("0" * 40, "x", "0" * 39 + "G"):
        got = await ask(gateway, "GET", f"/admin/entries/{key}")
        assert (got.status, got.json["error"]["code"], got.json["error"]["param"]) == (404, "entry_not_found", "key")


# Purges


async def is_stored(gateway, content, **options):
    return await gateway.stores(content, stream=True, **options)


async def fill(gateway):
    """Three entries; the answers to all are the same, with one id."""
    red = {"Gateway-Cache-Namespace": "a", "Gateway-Cache-Tags": "red"}
    await gateway.chat("plain", stream=True)
    await gateway.chat("red", stream=True, headers=red)
    await gateway.chat("mini", stream=True, model="mini")
    await gateway.landed()
    return {
        "plain": lambda: is_stored(gateway, "plain"),
        "red": lambda: is_stored(gateway, "red", headers=red),
        "mini": lambda: is_stored(gateway, "mini", model="mini"),
    }


@pytest.mark.parametrize(
    ("wanted", "gone"),
    [
        ({"namespace": "a"}, {"red"}),
        ({"tag": "red"}, {"red"}),
        ({"tag": "blue"}, set()),
        ({"model": "mini"}, {"mini"}),
        ({"model": "m*"}, {"plain", "red", "mini"}),
        ({"model": "model-*", "tag": "red"}, {"red"}),
        ({"model": "mini", "tag": "red"}, set()),
        ({"id": "chatcmpl-0123456789abcdefghijklmn"}, {"plain", "red", "mini"}),
        ({"id": "chatcmpl-0123456789abcdefghijklmn", "namespace": "a"}, {"red"}),
        ({"id": "chatcmpl-unknown"}, set()),
        ({"all": True}, {"plain", "red", "mini"}),
    ],
)
async def test_a_purge_deletes_what_fits_all_that_is_named_and_nothing_else(gateway, wanted, gone):
    stored = await fill(gateway)
    counted = await purge(gateway, **wanted, dry_run=True)
    assert (counted["purged"], counted["marked"], counted["dry_run"]) == (len(gone), False, True)
    done = await purge(gateway, **wanted)
    assert (done["purged"], done["scanned"], done["marked"], done["dry_run"]) == (len(gone), 3, True, False)
    assert bool(done["message"]) == (not gone)
    assert {name for name, is_there in stored.items() if not await is_there()} == gone
    marks, _ = await gateway.store.purges("0-0")
    assert {mark.selector.tag for mark in marks} == {wanted.get("tag")}


async def test_a_key_goes_with_all_its_samples(gateway):
    key, other = await put(gateway, 7), await put(gateway, 8)
    await put(gateway, int(sample_key(key, 5), 16), flight="5" * 16, sample_of=key)
    assert (await ask(gateway, "DELETE", f"/admin/entries/{key}")).json["purged"] == 2
    assert [entry["key"] for entry in await listed(gateway)] == [other]
    assert (await purge(gateway, key=other))["purged"] == 1
    again = await ask(gateway, "DELETE", f"/admin/entries/{other}")
    assert (again.status, again.json["purged"]) == (200, 0)


async def test_a_key_is_deleted_before_all_others_are_looked_at(gateway, monkeypatch):
    key = await put(gateway, 7)
    there = []

    async def page(cursor=""):
        there.append(await gateway.store.lookup(key, "meta"))
        return [], ""

    monkeypatch.setattr(gateway.store, "page", page)
    assert (await purge(gateway, key=key))["purged"] == 1
    assert there == [None]


async def test_the_fresh_id_of_a_hit_and_its_stream_name_the_answer_behind_it(gateway):
    for name in ("id", "stream"):
        for content in ("one", "two"):
            await gateway.chat(content, stream=True)
        await gateway.landed()
        hit = await gateway.chat("one", stream=True)
        assert "hit" in hit.cache_status
        value = json.loads(hit.events[0])["id"] if name == "id" else hit.headers["Gateway-Stream-Id"]
        assert (await purge(gateway, **{name: value, "tag": "none"}))["purged"] == 0
        assert (await purge(gateway, **{name: value}))["purged"] == 1
        assert not await is_stored(gateway, "one")
        assert await is_stored(gateway, "two")


async def test_the_stream_of_a_miss_names_its_answer(gateway):
    live = await gateway.chat("one", stream=True)
    await gateway.landed()
    [entry] = await listed(gateway)
    assert (await purge(gateway, stream=live.headers["Gateway-Stream-Id"], key=entry["key"]))["purged"] == 1


async def test_an_id_that_nobody_has_purges_nothing_and_says_so(gateway):
    await put(gateway, 1)
    done = await purge(gateway, id="chatcmpl-nobodys")
    assert (done["purged"], done["marked"]) == (0, True)
    assert "unknown" in done["message"]


async def test_an_alias_stands_for_the_upstreams_model(start, upstream):
    serves = {"models": ["m*"], "aliases": {"fast": "mini[1]"}}
    gateway = await start(upstreams=[{"name": "scripted", "kind": "openai", "base_url": upstream.base_url, **serves}])
    for model in ("fast", "model-1", "mini1"):
        await gateway.chat(model, stream=True, model=model)
    await gateway.landed()
    assert [entry["model"] for entry in await listed(gateway, "&model=fast")] == ["mini[1]"]
    assert (await purge(gateway, model="fast"))["purged"] == 1
    assert sorted(entry["model"] for entry in await listed(gateway)) == ["mini1", "model-1"]


async def test_a_purge_tells_how_far_it_is(gateway):
    for number in range(1, 451):
        await put(gateway, number, model="even" if number % 2 == 0 else "odd")
    got = await ask(gateway, "POST", "/admin/purge", {"model": "even"}, headers={"Accept": NDJSON})
    assert (got.headers["Content-Type"], got.headers["Cache-Control"]) == (NDJSON, "no-store")
    *steps, result = [json.loads(line) for line in got.body.splitlines()]
    assert len(steps) > 1
    assert all(step["object"] == "progress" for step in steps)
    assert [step["scanned"] for step in steps] == sorted(step["scanned"] for step in steps)
    assert (result["object"], result["scanned"], result["purged"]) == ("cache.purge", 450, 225)
    assert len(await listed(gateway)) == 225


@pytest.mark.parametrize("accept", ["*/*", NDJSON])
async def test_a_purge_goes_on_when_its_caller_leaves(gateway, monkeypatch, accept):
    await put(gateway, 1)
    page, reached, released = gateway.store.page, asyncio.Event(), asyncio.Event()

    async def held(cursor=""):
        reached.set()
        await released.wait()
        return await page(cursor)

    monkeypatch.setattr(gateway.store, "page", held)
    asking = asyncio.create_task(ask(gateway, "POST", "/admin/purge", {"all": True}, headers={"Accept": accept}))
    await reached.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    released.set()
    async with asyncio.timeout(5):
        while await gateway.store.lookup(f"{1:040x}", "meta"):
            await asyncio.sleep(0)


async def test_what_was_on_its_way_meanwhile_is_deleted_a_little_later(gateway, monkeypatch):
    service, page = gateway.service, gateway.store.page
    looks, released = [], asyncio.Event()

    async def held(cursor=""):
        if looks:
            await released.wait()
        found, cursor = await page(cursor)
        if not cursor:
            looks.append("one")
        return found, cursor

    monkeypatch.setattr(gateway.store, "page", held)
    eraser = Eraser(gateway.store, gateway.store, None, service._purges, service._clock, again_s=0.0)
    assert (await eraser.purge(Wanted(all=True)))["purged"] == 0
    key = await put(gateway, 1, started_at=gateway.now - 10)
    later = await put(gateway, 2, started_at=service._clock.now() + 10)
    released.set()
    await eraser._later
    assert await gateway.store.lookup(key, "meta") is None
    assert await gateway.store.lookup(later, "meta")
    await eraser.close()


async def test_all_replicas_are_told_before_anything_is_deleted(gateway, monkeypatch):
    await put(gateway, 1)
    order = []
    mark, erase = gateway.store.mark, gateway.store.erase

    async def marking(purge, *, life_s):
        order.append(("mark", life_s))
        await mark(purge, life_s=life_s)

    async def erasing(entries, *, began_by_us):
        order.append(("erase", gateway.service._purges.covers(entries[0][0], META)))
        return await erase(entries, began_by_us=began_by_us)

    monkeypatch.setattr(gateway.store, "mark", marking)
    monkeypatch.setattr(gateway.store, "erase", erasing)
    await purge(gateway, all=True)
    assert order == [("mark", gateway.service._purges.life_s), ("erase", True)]


# Statistics


PRICED = json.dumps([{"names": ["model-1"], "input_usd_per_million": 2.0, "output_usd_per_million": 10.0}])


async def test_statistics_count_and_price_what_was_saved(start):
    gateway = await start({"GATEWAY_MODELS": PRICED})
    assert (await ask(gateway, "GET", "/admin/stats")).json["models"] == []
    for _ in range(4):
        await gateway.chat("a", stream=True)
        await gateway.landed()
    await gateway.chat("a", stream=True, model="other")
    await gateway.landed()
    await gateway.chat("a", stream=True, model="other")
    stats = (await ask(gateway, "GET", "/admin/stats")).json
    assert abs(stats["since"] - gateway.service._clock.now()) < 60
    assert "stored" not in stats
    one, other = stats["models"]
    assert (one["model"], one["hits"], one["misses"], one["hit_rate"]) == ("model-1", 3, 1, 0.75)
    assert (one["saved_prompt_tokens"], one["saved_completion_tokens"]) == (9, 6)
    assert one["saved_usd"] == pytest.approx((9 * 2 + 6 * 10) / 1e6)
    assert (other["model"], other["hits"], other["saved_usd"], other["unpriced_prompt_tokens"]) == ("other", 1, None, 3)
    total = stats["total"]
    assert (total["hits"], total["misses"], total["hit_rate"]) == (4, 2, 0.6667)
    assert total["saved_usd"] == one["saved_usd"]
    assert (total["unpriced_prompt_tokens"], total["unpriced_completion_tokens"]) == (3, 2)


async def test_statistics_look_at_every_entry_where_that_is_asked(gateway):
    for number in range(1, 451):
        await put(gateway, number, model="even" if number % 2 == 0 else "odd", size_bytes=10 if number % 2 == 0 else 20)
    stored = (await ask(gateway, "GET", "/admin/stats?scan=true")).json["stored"]
    assert stored["models"] == [
        {"model": "odd", "entries": 225, "size_bytes": 4500},
        {"model": "even", "entries": 225, "size_bytes": 2250},
    ]
    assert stored["total"] == {"entries": 450, "size_bytes": 6750, "replaced": 0}
    lines = (await ask(gateway, "GET", "/admin/stats?scan=true", headers={"Accept": NDJSON})).body.splitlines()
    assert json.loads(lines[-2]) == {"object": "progress", "scanned": 450, "purged": 0}
    assert json.loads(lines[-1])["stored"] == stored


# What happens now


async def test_live_counts_are_of_all_processes_that_share_the_store(start):
    one, other = await start(redis={"prefix": "live"}), await start(redis={"prefix": "live"})
    await one.chat("hi", stream=True)
    await one.landed()
    await other.chat("hi", stream=True)
    await other.chat("hi")
    await other.chat("hi", model=5)
    async for found in changing(one, "/admin/live"):
        if sum(report["counts"]["requests"] for report in found["reports"]) == 4:
            break
    assert found["object"] == "cache.live"
    ours, theirs = sorted(found["reports"], key=lambda report: report["counts"]["hits"])
    assert {name: ours["counts"][name] for name in ("requests", "hits", "misses", "errors", "stored")} == {
        "requests": 1, "hits": 0, "misses": 1, "errors": 0, "stored": 1,
    }  # fmt: skip
    assert {name: theirs["counts"][name] for name in ("requests", "hits", "misses", "errors")} == {
        "requests": 3, "hits": 2, "misses": 0, "errors": 1,
    }  # fmt: skip
    frames = ours["counts"]["frames"]
    assert (theirs["counts"]["frames"], ours["open"], theirs["open"]) == (2 * frames, 0, 0)
    counted = {name: sum(count for _, count in pairs) for name, pairs in theirs["measured"].items()}
    assert counted == {"ttft_hit_us": 1, "ttft_miss_us": 0, "ttft_collapsed_us": 0, "gap_us": 0, "late_us": 0}
    counted = {name: sum(count for _, count in pairs) for name, pairs in ours["measured"].items()}
    assert counted["ttft_miss_us"] == 1
    assert counted["gap_us"] < frames


async def changing(gateway, path):
    """What it says there, again and again; in the end the test times out."""
    while True:
        yield (await ask(gateway, "GET", path)).json
        await asyncio.sleep(0.02)


async def test_streams_are_open_until_they_end_and_replays_that_keep_time_tell_how_late_they_are(start, upstream):
    gateway = await start(replay={"pace": "fixed", "tokens_per_s": 20.0})
    await gateway.chat("hi", stream=True)
    await gateway.landed()
    running = asyncio.ensure_future(gateway.chat("hi", stream=True))
    async for found in changing(gateway, "/admin/live"):
        [report] = found["reports"]
        if report["open"]:
            break
    await running
    [report] = (await ask(gateway, "GET", "/admin/live")).json["reports"]
    assert report["open"] == 0
    assert sum(count for _, count in report["measured"]["late_us"]) > 1
    assert sum(count for _, count in report["measured"]["gap_us"]) >= 1


# Profiles


def spoken(count, *, gap_us=20_000):
    """A recording in which so many tokens have come, the first after 100 ms."""
    recorder = Recorder()
    for place in range(count):
        delta = {"choices": [{"index": 0, "delta": {"content": "a"}}]}
        recorder.add(json.dumps({"id": "chatcmpl-1", "created": 5, **delta}).encode(), 100_000 + place * gap_us)
    return recorder.recording(META._replace(frames=count), b"{}")


async def store_spoken(gateway, number, count=5, **members):
    recording = spoken(count)
    meta = recording.meta._replace(flight=f"{number:016x}", ttl_s=600.0, written_at=gateway.now, usage=None, **members)
    await gateway.store.store(f"{number:040x}", replace(recording, meta=meta))


async def test_a_profile_tells_when_the_tokens_of_each_model_came(gateway):
    for number in range(3):
        await store_spoken(gateway, number, model="fast")
    await store_spoken(gateway, 9, count=11, model="slow", whole=True)
    found = (await ask(gateway, "GET", "/admin/profile")).json
    assert (found["object"], found["recordings"], found["complete"]) == ("cache.profile", 4, True)
    fast, slow = found["models"]
    assert (fast["model"], fast["recordings"], fast["timed"]) == ("fast", 3, 3)
    assert fast["ttft_us"]["p50"] == pytest.approx(100_000, rel=1 / 32)
    assert fast["gaps_us"]["p99"] == pytest.approx(20_000, rel=1 / 32)
    [(low, high, count)] = fast["gaps_us"]["histogram"]
    assert (low <= 20_000 < high, count) == (True, 12)
    assert fast["fitted"]["ttft_s"] == pytest.approx(0.1)
    assert fast["fitted"]["tokens_per_s"] == pytest.approx(50)
    assert (slow["model"], slow["timed"], slow["ttft_us"]["p50"]) == ("slow", 0, None)


async def test_a_profile_looks_at_no_more_than_it_is_told_and_only_at_what_fits(gateway):
    for number in range(450):
        await store_spoken(gateway, number, model="one" if number % 2 else "two", tags=("red",) if number < 3 else ())
    found = (await ask(gateway, "GET", "/admin/profile?limit=7")).json
    assert (found["recordings"], found["complete"]) == (7, False)
    assert found["scanned"] < 450
    assert (await ask(gateway, "GET", "/admin/profile?model=one")).json["recordings"] == 225
    assert (await ask(gateway, "GET", "/admin/profile?tag=red&namespace=")).json["recordings"] == 3
    assert (await ask(gateway, "GET", "/admin/profile?min_age_s=60")).json["recordings"] == 0
    lines = (await ask(gateway, "GET", "/admin/profile", headers={"Accept": NDJSON})).body.splitlines()
    assert json.loads(lines[0])["object"] == "progress"
    assert json.loads(lines[-1])["recordings"] == 450


async def test_what_was_purged_or_does_not_load_is_no_part_of_a_profile(gateway):
    for number in range(4):
        await store_spoken(gateway, number)
    await gateway.store._server.write(("HSET", gateway.store._keys.recording(f"{1:040x}"), "marks", b"x"))
    await purge(gateway, key=f"{2:040x}")
    assert (await ask(gateway, "GET", "/admin/profile")).json["recordings"] == 2


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "model=a&model=b", "cursor=1", "max_age_s=x"])
async def test_a_profile_of_what_nobody_can_mean_is_refused(gateway, query):
    assert (await ask(gateway, "GET", f"/admin/profile?{query}")).status == 400


# Explanations


def explained(gateway, content="hi", *, headers=None, api="chat", **members):
    request = {"model": "model-1", "messages": [{"role": "user", "content": content}], **members}
    return ask(gateway, "POST", "/admin/explain", {"api": api, "request": request, "headers": headers or {}})


async def test_an_explanation_finds_what_a_request_would_hit(gateway):
    await gateway.chat("hi", stream=True, user="me")
    await gateway.landed()
    found = (await explained(gateway, user="you", stream=False)).json
    [entry] = await listed(gateway)
    assert (found["key"], found["samples"], found["nearest"], found["why_not"]) == (entry["key"], [entry["key"]], None, "")
    assert found["entry"]["state"] == "fresh"
    assert (found["model"], found["upstream"], found["owner"], found["namespace"]) == ("model-1", "scripted", "tenant", "")
    assert found["left_out"] == ["stream", "user"]
    assert found["canonical"] == {"messages": [{"content": "hi", "role": "user"}]}


async def test_an_explanation_of_a_miss_tells_what_the_nearest_one_had_else(gateway):
    await gateway.chat("What is a gateway?", stream=True, temperature=0.5)
    await gateway.chat("something else entirely", stream=True, seed=4, top_p=1)
    await gateway.landed()
    near = (await explained(gateway, "What is a Gateway?", temperature=0.5)).json["nearest"]
    assert (near["differences"], near["compared"], near["differs_in"]) == (1, 2, [])
    assert (near["first"]["path"], near["first"]["at"]) == ("messages.0.content", 10)
    entries = {entry["key"]: entry for entry in await listed(gateway)}
    assert near["key"] in entries
    other = (await explained(gateway, "Something else entirely", seed=4, top_p=1)).json["nearest"]
    assert other["key"] in entries.keys() - {near["key"]}


BESIDE = [
    ({"Authorization": "Bearer callers-own"}, {}, ["tenant"]),
    ({"Gateway-Cache-Namespace": "a"}, {}, ["namespace"]),
    ({}, {"model": "model-2"}, ["model"]),
    ({"Authorization": "Bearer callers-own", "gateway-cache-namespace": "a"}, {}, ["tenant", "namespace"]),
]


async def test_where_the_requests_are_the_same_it_tells_what_else_tells_them_apart(gateway):
    await gateway.chat("hi", stream=True)
    await gateway.landed()
    for headers, members, expected in BESIDE:
        got = await explained(gateway, headers=headers, **members)
        assert b"callers-own" not in got.body
        near = got.json["nearest"]
        assert (near["differences"], near["first"], sorted(near["differs_in"])) == (0, None, sorted(expected))


async def test_an_explanation_tells_why_such_a_request_is_not_cached(gateway):
    assert (await explained(gateway, headers={"Cache-Control": "no-store"})).json["why_not"] == "no-store"
    assert (await explained(gateway, web_search_options={})).json["why_not"] == "live-data"


async def test_entries_without_a_request_or_of_another_api_are_not_compared(gateway):
    await put(gateway, 1)
    await gateway.post("/v1/completions", {"model": "model-1", "prompt": "hi"})
    await gateway.landed()
    assert (await explained(gateway)).json["nearest"] is None
    request = {"model": "model-1", "prompt": "ho"}
    got = await ask(gateway, "POST", "/admin/explain", {"api": "completions", "request": request})
    assert got.json["nearest"]["first"]["path"].startswith("prompt")


async def test_comparing_is_bounded(gateway, monkeypatch):
    for number in range(4):
        await gateway.chat(f"question {number}", stream=True)
        await gateway.landed()
    monkeypatch.setattr("gateway.nearby._MAX_CANDIDATES", 2)
    assert (await explained(gateway)).json["nearest"]["compared"] == 2
    monkeypatch.setattr("gateway.nearby._MAX_CANDIDATES_BYTES", 1)
    assert (await explained(gateway)).json["nearest"] is None


# The store away


async def test_a_store_that_is_away_is_503_everywhere_and_nothing_is_marked(start, own_redis):
    gateway = await start(redis={"url": own_redis.url})
    await gateway.chat("hi", stream=True)
    await gateway.landed()
    own_redis.stop()
    for method, path in PATHS[1:]:
        if path == "/admin/live":
            continue
        body = {"all": True, "request": {"model": "m", "messages": []}}
        if method == "POST":
            body.pop("request" if path.endswith("purge") else "all")
        for accept in ("*/*", NDJSON):
            got = await ask(gateway, method, path, body if method == "POST" else None, headers={"Accept": accept})
            assert (got.status, got.json["error"]["code"]) == (503, "store_unavailable"), path
            assert own_redis.url not in got.body.decode()
            if path.endswith("purge"):
                assert got.json["error"]["marked"] is False
    [report] = (await ask(gateway, "GET", "/admin/live")).json["reports"]  # its own it knows
    assert report["counts"]["misses"] == 1


@pytest.mark.parametrize("accept", ["*/*", NDJSON])
async def test_a_purge_that_the_store_cuts_short_says_what_is_done(gateway, monkeypatch, accept):
    for number in range(1, 451):
        await put(gateway, number)
    page, pages = gateway.store.page, []

    async def failing(cursor=""):
        pages.append(cursor)
        if len(pages) > 1:
            raise StoreUnavailable("gone")
        return await page(cursor)

    monkeypatch.setattr(gateway.store, "page", failing)
    got = await ask(gateway, "POST", "/admin/purge", {"all": True}, headers={"Accept": accept})
    assert got.status == (200 if accept == NDJSON else 503)
    error = json.loads(got.body.splitlines()[-1])["error"]
    assert (error["code"], error["marked"]) == ("store_unavailable", True)
    assert 0 < error["purged"] == error["scanned"] < 450
    assert "marked" in error["message"]

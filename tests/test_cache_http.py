"""What callers say of the cache and what they are told, in HTTP's own words, over a real socket."""

import asyncio
import json
import time
from itertools import product

import pytest
from redis.asyncio import Redis
from scripted import stream

APIS = pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"], ids=["chat", "completions"])
MODES = pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
HELD = "private, max-age=86400"


@pytest.fixture
async def gateway(start_gateway):
    return await start_gateway()


class Later:
    """A clock that is ahead of the real one."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.monotonic = time.monotonic

    def now(self):
        return time.time() + self.seconds


def pass_time(gateway, seconds):
    gateway.service._clock = Later(seconds)


def body_for(path, streamed, **members):
    asked = {"prompt": "hi"} if path.endswith("/v1/completions") else {"messages": [{"role": "user", "content": "hi"}]}
    return {"model": "model-1", "stream": streamed, **asked, **members}


async def ask(gateway, path, *, streamed=False, method="POST", headers=None, **members):
    url = f"{gateway.origin}{path}"
    async with gateway.session.request(method, url, json=body_for(path, streamed, **members), headers=headers) as response:
        body = await response.read()
        return response.status, response.headers, body


async def status(gateway, path, control="", **kwargs):
    code, headers, _ = await ask(gateway, path, headers={"Cache-Control": control}, **kwargs)
    await gateway.landed()
    return code, headers["Cache-Status"].removeprefix("gateway; ")


# Directives


@APIS
@MODES
@pytest.mark.parametrize(
    ("control", "after_s", "code", "says", "calls"),
    [
        ("", 10, 200, "hit", 0),
        ("no-cache", 10, 200, "detail=no-cache", 1),
        ("no-store", 10, 200, "detail=no-store", 1),
        ("no-cache, no-store", 10, 200, "detail=no-store", 1),
        ("max-age=5", 10, 200, "fwd=request", 1),
        ("max-age=20", 10, 200, "hit", 0),
        ("max-age=nonsense", 10, 200, "fwd=request", 1),
        ("min-fresh=80", 10, 200, "hit", 0),
        ("min-fresh=95", 10, 200, "fwd=request", 1),
        ("max-stale=60", 130, 200, "detail=max-stale", 0),
        ("max-stale", 130, 200, "detail=max-stale", 0),
        ("max-stale=20", 130, 200, "fwd=stale", 1),
        ("", 130, 200, "fwd=stale", 1),
        ("only-if-cached", 10, 200, "hit", 0),
        ("only-if-cached", 130, 504, "detail=not-cached", 0),
        ("only-if-cached, max-stale=60", 130, 200, "detail=max-stale", 0),
        ("only-if-cached, max-age=5", 10, 504, "detail=not-cached", 0),
        ("only-if-cached, min-fresh=95", 10, 504, "detail=not-cached", 0),
        ("only-if-cached, no-cache", 10, 504, "detail=not-cached", 0),
        ("only-if-cached, no-store", 10, 504, "detail=not-cached", 0),
        ("max-age=20, min-fresh=80, max-stale=5", 10, 200, "hit", 0),
        ("no-transform, immutable, x=y", 10, 200, "hit", 0),
    ],
)
async def test_each_directive_alone_and_combined(
    start_gateway, upstream, path, streamed, control, after_s, code, says, calls
):
    gateway = await start_gateway(cache={"ttl_s": 100, "stale_if_error_s": 900})
    await ask(gateway, path, streamed=streamed)
    await gateway.landed()
    pass_time(gateway, after_s)
    got, told = await status(gateway, path, control, streamed=streamed)
    assert got == code
    assert says in told.split("; ")
    assert len(upstream.asked) == 1 + calls


@APIS
async def test_no_cache_replaces_the_entry_and_no_store_does_not(gateway, upstream, path):
    await ask(gateway, path)
    upstream.script = lambda asked: stream(asked, "new")
    for control in ("no-store", "no-cache"):
        _, _, body = await ask(gateway, path, headers={"Cache-Control": control})
        assert b"new" in body
        await gateway.landed()
        _, hit, replayed = await ask(gateway, path)
        assert hit["Cache-Status"].startswith("gateway; hit")
        assert (b"new" in replayed) == (control == "no-cache")
    assert len(upstream.asked) == 3


async def test_only_if_cached_is_answered_with_the_error_object(gateway, upstream):
    code, headers, body = await ask(gateway, "/v1/chat/completions", headers={"Cache-Control": "only-if-cached"})
    assert (code, headers["Cache-Control"]) == (504, "no-store")
    assert b'"not_cached"' in body
    assert not upstream.asked


# The caller's own fields


async def life_s(gateway, redis):
    [name] = [name async for name in redis.scan_iter(f"{gateway.store._keys.prefix}:*:rec")]
    return await redis.pttl(name) / 1000


@pytest.mark.parametrize(
    ("headers", "members", "expected_s"),
    [
        ({}, {}, 100 + 900),
        ({"Gateway-Cache-TTL": "3600"}, {}, 3600 + 900),
        ({"Gateway-Cache-TTL": "7.5;why=later"}, {}, 7.5 + 900),
        ({}, {"cache": {"ttl": 60}}, 60 + 900),
        ({"Gateway-Cache-TTL": "50"}, {"cache": {"ttl": 60}}, 50 + 900),
        ({}, {"cache": {}}, 100 + 900),
    ],
)
async def test_how_long_an_answer_is_kept(start_gateway, shared_redis, headers, members, expected_s):
    gateway = await start_gateway(cache={"ttl_s": 100, "stale_s": 60, "stale_if_error_s": 900})
    await ask(gateway, "/v1/chat/completions", headers=headers, **members)
    await gateway.landed()
    async with Redis.from_url(shared_redis.url) as redis:
        assert expected_s - 20 < await life_s(gateway, redis) <= expected_s


async def test_an_answer_with_no_time_to_live_is_not_stored(gateway):
    _, headers, _ = await ask(gateway, "/v1/chat/completions", headers={"Gateway-Cache-TTL": "0"})
    assert headers["Cache-Status"] == "gateway; fwd=miss; fwd-status=200; detail=ttl"
    assert headers["Cache-Control"] == "no-store"
    assert (await status(gateway, "/v1/chat/completions", "only-if-cached"))[0] == 504


@APIS
@pytest.mark.parametrize("spelled", ["header", "body"])
async def test_namespaces_are_apart_and_shared_by_all_who_name_them(gateway, upstream, path, spelled):

    async def told(namespace, key):
        said = {"headers": {"Gateway-Cache-Namespace": f'"{namespace}"'}} if spelled == "header" else {}
        said.setdefault("headers", {})["Authorization"] = f"Bearer {key}"
        members = {} if spelled == "header" else {"cache": {"namespace": namespace}}
        _, headers, _ = await ask(gateway, path, **said, **members)
        return headers["Cache-Status"].split("; ")[1]

    gateway.service._questions._router.upstreams[0].passes_credential = False
    assert [await told(name, key) for name, key in (("a", "1"), ("b", "1"), ("a", "2"), ("b", "2"))] == [
        "fwd=miss", "fwd=miss", "hit", "hit",
    ]  # fmt: skip
    assert len(upstream.asked) == 2


async def test_litellms_body_object_never_reaches_the_upstream_and_is_not_in_the_key(gateway, upstream):
    path = "/v1/chat/completions"
    await ask(gateway, path, cache={"ttl": 60, "no-cache": False, "use-cache": True, "type": "other"})
    _, headers, _ = await ask(gateway, path, cache={"s-maxage": 600})
    assert headers["Cache-Status"].startswith("gateway; hit")
    [asked] = upstream.asked
    assert "cache" not in asked.json


@pytest.mark.parametrize(
    ("cache", "says"),
    [({"no-cache": True}, "detail=no-cache"), ({"no-store": True}, "detail=no-store"), ({"s-maxage": 0}, "detail=max-age")],
)
async def test_litellms_body_object_does_what_the_directives_do(gateway, cache, says):
    path = "/v1/chat/completions"
    await ask(gateway, path)
    _, headers, _ = await ask(gateway, path, cache=cache)
    assert says in headers["Cache-Status"]


async def test_a_body_object_that_is_null_is_none(gateway, upstream):
    told = [(await ask(gateway, "/v1/chat/completions", **members))[1]["Cache-Status"] for members in ({"cache": None}, {})]
    assert [each.split("; ")[1] for each in told] == ["fwd=miss", "hit"]
    assert "cache" not in upstream.asked[0].json


async def test_a_member_of_that_name_that_is_no_object_is_the_models_business(gateway, upstream):
    await ask(gateway, "/v1/chat/completions", cache=True)
    assert upstream.asked[0].json["cache"] is True


@APIS
@pytest.mark.parametrize(
    ("headers", "members", "param"),
    [
        ({"Gateway-Cache-TTL": "soon"}, {}, "Gateway-Cache-TTL"),
        ({"Gateway-Cache-TTL": "-1"}, {}, "Gateway-Cache-TTL"),
        ({"Gateway-Cache-Namespace": '"open'}, {}, "Gateway-Cache-Namespace"),
        ({"Gateway-Cache-Tags": "(a b)"}, {}, "Gateway-Cache-Tags"),
        ({}, {"cache": {"ttl": "60"}}, "cache.ttl"),
        ({}, {"cache": {"no-cache": 1}}, "cache.no-cache"),
        ({}, {"cache": {"namespace": 5}}, "cache.namespace"),
    ],
)
async def test_what_cannot_be_understood_is_refused_by_its_name(gateway, upstream, path, headers, members, param):
    code, _, body = await ask(gateway, path, headers=headers, **members)
    assert code == 400
    assert f'"{param}"'.encode() in body
    assert not upstream.asked


# QUERY


@APIS
@MODES
async def test_query_is_served_as_post_is_and_from_the_same_entries(gateway, upstream, path, streamed):
    answers = [await ask(gateway, path, streamed=streamed, method=method) for method in ("QUERY", "POST", "QUERY")]
    assert [headers["Cache-Status"].split("; ")[1] for _, headers, _ in answers] == ["fwd=miss", "hit", "hit"]
    assert {code for code, _, _ in answers} == {200}
    assert len(upstream.asked) == 1


@APIS
@pytest.mark.parametrize(("headers", "code"), [({}, 400), ({"Content-Type": "text/plain"}, 415)])
async def test_a_query_must_name_the_type_of_its_content(gateway, upstream, path, headers, code):
    url = f"{gateway.origin}{path}"
    data = json.dumps(body_for(path, streamed=False)).encode()
    async with gateway.session.request(
        "QUERY", url, data=data, headers=headers, skip_auto_headers=["Content-Type"]
    ) as response:
        assert response.status == code
        assert "error" in await response.json()
    assert not upstream.asked


# What caches on the way are told


@MODES
async def test_what_is_kept_here_may_be_kept_by_the_caller_for_as_long(gateway, streamed):
    path, ending = "/v1/chat/completions", ", no-transform" if streamed else ""
    _, miss, _ = await ask(gateway, path, streamed=streamed)
    assert miss["Cache-Control"] == ("no-store, no-transform" if streamed else HELD)
    pass_time(gateway, 1000)
    _, hit, _ = await ask(gateway, path, streamed=streamed)
    assert hit["Cache-Control"] == HELD + ending
    age_s, ttl_s = int(hit["Age"]), int(hit["Cache-Status"].partition("ttl=")[2])
    assert 1000 <= age_s < 1010
    assert age_s + ttl_s in (86399, 86400)  # both are rounded down
    assert "Authorization" in hit["Vary"]
    assert "Gateway-Cache-Namespace" in hit["Vary"]


@MODES
async def test_one_of_several_samples_is_not_to_be_kept_by_others(start_gateway, streamed):
    gateway = await start_gateway(cache={"samples": 2})
    for _ in range(3):
        _, headers, _ = await ask(gateway, "/v1/chat/completions", streamed=streamed)
        await gateway.landed()
        assert headers["Cache-Control"].startswith("no-store")
    assert "hit" in headers["Cache-Status"]


@MODES
async def test_a_stale_answer_is_not_to_be_kept_by_anybody(start_gateway, upstream, streamed):
    gateway = await start_gateway(cache={"ttl_s": 100, "stale_s": 900})
    path = "/v1/chat/completions"
    await ask(gateway, path, streamed=streamed)
    await gateway.landed()
    pass_time(gateway, 150)
    _, headers, _ = await ask(gateway, path, streamed=streamed)
    assert headers["Cache-Control"].startswith("no-store")
    assert 150 <= int(headers["Age"]) < 160
    assert headers["Cache-Status"].endswith("; detail=stale-while-revalidate")
    await gateway.landed()
    assert len(upstream.asked) == 2


@pytest.mark.parametrize(("control", "streamed"), list(product(["no-store", "no-cache"], [True, False])))
async def test_what_is_not_known_to_be_kept_is_not_to_be_kept_by_others(gateway, control, streamed):
    _, headers, _ = await ask(gateway, "/v1/chat/completions", streamed=streamed, headers={"Cache-Control": control})
    kept = control == "no-cache" and not streamed
    assert headers["Cache-Control"].startswith(HELD if kept else "no-store")


@pytest.mark.parametrize("path", ["/v1/streams/unknown", "/healthz", "/"])
async def test_what_is_no_answer_is_not_to_be_kept(gateway, path):
    async with gateway.session.get(f"{gateway.origin}{path}") as response:
        assert response.headers["Cache-Control"] == "no-store"


# In the place of an error


@APIS
@MODES
async def test_a_stale_answer_in_the_place_of_an_error_is_marked(start_gateway, upstream, path, streamed):
    gateway = await start_gateway(cache={"ttl_s": 100, "stale_if_error_s": 900})
    _, _, first = await ask(gateway, path, streamed=streamed)
    await gateway.landed()
    pass_time(gateway, 150)

    async def down(asked):
        await asked.answer(b'{"error": {"message": "down"}}', 503)

    upstream.script = down
    code, headers, body = await ask(gateway, path, streamed=streamed)
    assert code == 200
    assert headers["Cache-Status"] == "gateway; fwd=stale; fwd-status=503; ttl=-51; detail=stale-if-error"
    assert (headers["Age"], headers["Cache-Control"].split(",")[0]) == ("150", "no-store")
    assert len(body) == len(first)
    assert b"down" not in body
    # It can be resumed as any other replay.
    if streamed:
        url = f"{gateway.base_url}/streams/{headers['Gateway-Stream-Id']}?after=1"
        async with gateway.session.get(url) as response:
            rest = await response.read()
        assert body.endswith(rest)
        assert rest


async def test_an_upstream_that_is_gone_or_hangs_is_stood_in_for(start_gateway, upstream):
    gateway = await start_gateway(cache={"ttl_s": 100, "stale_if_error_s": 900}, flights={"first_byte_timeout_s": 0.2})
    path = "/v1/chat/completions"
    await ask(gateway, path)
    await gateway.landed()
    pass_time(gateway, 150)

    async def hang(asked):
        await asyncio.Event().wait()

    upstream.script = hang
    _, headers, _ = await ask(gateway, path)
    assert headers["Cache-Status"] == "gateway; fwd=stale; ttl=-51; detail=stale-if-error"
    await upstream.stop()
    _, headers, _ = await ask(gateway, path)
    assert headers["Cache-Status"] == "gateway; fwd=stale; ttl=-51; detail=stale-if-error"


# By model


async def test_rules_by_model(start_gateway, upstream):
    gateway = await start_gateway(
        models=[
            {"names": ["short-*"], "ttl_s": 5},
            {"names": ["off"], "enabled": False},
            {"names": ["short-*", "cut"], "finish_reasons": ["stop", "length", "weird"]},
        ]
    )
    path = "/v1/chat/completions"
    told = {model: (await ask(gateway, path, model=model))[1] for model in ("short-1", "off", "other")}
    assert told["short-1"]["Cache-Control"] == "private, max-age=5"
    assert told["off"]["Cache-Status"] == "gateway; fwd=bypass; fwd-status=200; detail=disabled"
    assert told["other"]["Cache-Control"] == HELD

"""The store as a whole: what it lists, erases and counts, on every server that it has to work on, and on the fake."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from fakes import FakeStore
from redis.asyncio import Redis
from running import RedisServer
from stores import (
    KEY,
    LOG,
    META,
    OTHER_LOG,
    RECORDING,
    Backend,
    batch,
    begun,
    commands_about,
    large,
    of_flight,
    on_any,
    until,
)

from gateway.config import RedisConfig
from gateway.core.key import CacheKey
from gateway.core.purge import Purge, Selector
from gateway.errors import StoreCorrupt, StoreError, StoreUnavailable
from gateway.ports import LOG_START, FlightId, Listed, LogName, Peeked, Writer
from gateway.store.redis import RedisStore, connect

pytestmark = pytest.mark.usefixtures("nothing_goes_wrong_unnoticed")

BY_THEN = int(META.started_at * 1e6)
LATER = BY_THEN + 10_000_000
KEYS = [CacheKey(f"{number:040x}") for number in range(450)]
CURRENT = FlightId("")
ASKED = b'{"api":"chat","body":{"model":"model-1"}}'


@pytest.fixture(params=["fake", "fakeredis", "shared_redis", "embedded_redis", "redis_cluster"])
async def stores(request: pytest.FixtureRequest) -> AsyncIterator[list[Any]]:
    """Two replicas' stores: for what the fake has to do as well."""
    if request.param == "fake":
        yield [(one := FakeStore()), one.replica_of("b")]
        return
    async with on_any(request) as backend:
        yield [await backend.store(), await backend.store()]


async def compressing(backend: Backend, from_bytes: int) -> RedisStore:
    config = RedisConfig(prefix=backend.prefix, lookup_timeout_s=2, command_timeout_s=5)
    store = RedisStore(backend.make_client(config), config, compress_from_bytes=from_bytes)
    return await backend.stack.enter_async_context(store)


async def pages(store: Any, between: Callable[[], Any] | None = None) -> list[Listed]:
    """What is on all pages; ``between`` is awaited after each."""
    listed, cursor = await store.page()
    while cursor:
        if between:
            await between()
        more, cursor = await store.page(cursor)
        listed += more
    return listed


def flights_of(listed: list[Listed]) -> set[tuple[CacheKey, str, bool]]:
    return {(each.key, each.meta.flight, each.replaced) for each in listed}


async def end_log(store: Any, log: LogName) -> None:
    writer = Writer(store.replica, "00000001")
    await store.append([batch(writer, 0, "ab", log=log, request=ASKED)])
    await store.end(log, writer, b"over")


# Recordings


async def test_a_lookup_of_the_meta_data_finds_only_them(backend):
    store = await backend.store()
    assert await store.lookup(KEY, "meta") is None
    await store.store(KEY, replace(RECORDING, request=ASKED))
    found = await store.lookup(KEY, "meta")
    assert (found.meta, found.sse, found.marks, found.body, found.request) == (META, None, None, None, b"")
    await backend.raw.hset(backend.name, "meta", "{")
    with pytest.raises(StoreCorrupt):
        await store.lookup(KEY, "meta")
    await store.delete(KEY)


async def test_a_lookup_of_the_meta_data_is_one_small_command(server):
    store = await server.store()
    await store.store(KEY, RECORDING)
    commands = await commands_about(server, lambda: store.lookup(KEY, "meta"))
    assert commands == [f"HMGET {server.name} v meta"]


async def test_a_recording_is_kept_while_it_is_fresh_and_then_while_it_is_stale(backend):
    store = await backend.store()
    await store.store(KEY, replace(RECORDING, meta=META._replace(ttl_s=1000.0, stale_s=4000.0)))
    assert 4_900_000 < await backend.raw.pttl(backend.name) <= 5_000_000


async def test_an_inspection_shows_all_that_is_stored(stores):
    store, other = stores
    assert await store.inspect(KEY) is None
    recording = replace(RECORDING, request=ASKED, meta=META._replace(stale_s=30.0, tags=("a", "b"), namespace="n"))
    await store.store(KEY, recording)
    seen = await other.inspect(KEY)
    assert (seen.key, seen.recording) == (KEY, recording)
    assert 80 < seen.life_s <= 90
    assert seen.stored_bytes > recording.size_bytes - 1


async def test_the_request_of_a_recording_without_one_is_not_that_of_the_one_before(backend):
    store = await backend.store()
    await store.store(KEY, replace(RECORDING, request=ASKED))
    await store.store(KEY, RECORDING)
    assert (await store.inspect(KEY)).recording == RECORDING


@pytest.mark.parametrize(
    ("from_bytes", "size_bytes"), [(0, 1_000_000), (1, 100), (32_768, 10_000), (32_768, 40_000), (32_768, 1_000_000)]
)
async def test_who_looks_up_a_recording_does_not_see_whether_it_is_compressed(backend, from_bytes, size_bytes):
    store, other = await compressing(backend, from_bytes), await compressing(backend, 0)
    recording = replace(large(size_bytes), request=b"[%s]" % (b"1," * size_bytes))
    await store.store(KEY, recording)
    shrinks = 0 < from_bytes <= size_bytes
    for field in ("sse", "body", "req"):
        [value] = await backend.raw.hmget(backend.name, field)
        assert (len(value) < size_bytes / 2 and value.startswith(b"\x28\xb5\x2f\xfd")) is shrinks
    for reader in (store, other):
        assert await reader.lookup(KEY, "stream") == replace(recording, body=None, request=b"")
        assert await reader.lookup(KEY, "whole") == replace(recording, sse=None, marks=None, request=b"")
        seen = await reader.inspect(KEY)
        assert seen.recording == recording
        assert (seen.stored_bytes < recording.size_bytes) is (shrinks and size_bytes > 1000)  # than which meta data are less


async def test_the_recording_that_a_flight_left_is_found_though_it_is_compressed(backend):
    store = await compressing(backend, 1)
    recording = replace(large(1_000_000), meta=META._replace(flight=LOG.flight))
    await store.store(KEY, recording)
    await store.store(KEY, of_flight(OTHER_LOG, 1))
    assert (await store.recording_of(LOG)).sse == recording.sse


@pytest.mark.parametrize("value", [b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8])
async def test_a_compressed_value_that_does_not_load_is_corrupt_and_deleted(backend, value):
    store = await backend.store()
    await store.store(KEY, RECORDING)
    await backend.raw.hset(backend.name, mapping={"sse": value, "req": value})
    with pytest.raises(StoreCorrupt):
        await store.inspect(KEY)
    assert await backend.raw.exists(backend.name)
    with pytest.raises(StoreCorrupt):
        await store.lookup(KEY, "stream")
    async with asyncio.timeout(5):
        while await backend.raw.exists(backend.name):
            await asyncio.sleep(0.005)


# Pages


async def test_pages_show_recordings_with_their_meta_data_and_their_lives(stores):
    store, other = stores
    assert await store.page() == ([], "") or await pages(store) == []
    await store.store(KEYS[0], replace(RECORDING, request=ASKED))
    await store.store(KEYS[1], of_flight(LogName(KEYS[1], LOG.flight)))
    await store.store(KEYS[1], of_flight(LogName(KEYS[1], OTHER_LOG.flight), 1, stale_s=40.0))
    listed = {(each.key, each.meta.flight): each for each in await pages(other)}
    assert flights_of(list(listed.values())) == {
        (KEYS[0], "", False),
        (KEYS[1], LOG.flight, True),
        (KEYS[1], OTHER_LOG.flight, False),
    }
    assert listed[KEYS[0], ""].meta == META
    assert 50 < listed[KEYS[0], ""].life_s <= 60
    assert 90 < listed[KEYS[1], OTHER_LOG.flight].life_s <= 100


async def fill(store: Any, keys: list[CacheKey]) -> None:
    await asyncio.gather(*(store.store(key, RECORDING) for key in keys))


async def test_what_is_there_all_the_time_is_listed_though_others_come_and_go(backend):
    store = await backend.store()
    await fill(store, KEYS[:300])
    going, coming = iter(KEYS[:50]), iter(KEYS[300:])

    async def change():
        for key in (next(going, None), next(going, None)):
            if key:
                await store.delete(key)
        await fill(store, [key for _, key in zip(range(20), coming, strict=False)])

    keys = {each.key for each in await pages(store, change)}
    assert keys >= set(KEYS[50:300])
    assert keys <= set(KEYS)


async def test_pages_are_of_a_few_hundred_and_of_meta_data_only(server):
    store = await server.store()
    await fill(store, KEYS)
    sizes = []

    async def read():
        listed, cursor = await store.page()
        sizes.append(len(listed))
        while cursor:
            listed, cursor = await store.page(cursor)
            sizes.append(len(listed))

    commands = await commands_about(server, read)
    assert max(sizes) < 400
    assert sum(sizes) >= len(KEYS)
    assert {command.partition(" ")[0] for command in commands} == {"SCAN", "HMGET", "PTTL"}
    assert all(command.endswith(" v meta") for command in commands if command.startswith("HMGET"))


async def test_what_is_not_ours_or_does_not_load_is_left_out_and_left_alone(backend):
    store, other = await backend.store(), await backend.store(prefix=f"{backend.prefix}:x")
    await fill(store, KEYS[:6])
    await other.store(KEY, RECORDING)
    name = f"{backend.prefix}:{{%s}}:rec"
    await backend.raw.hset(name % KEYS[0], "v", "1")
    await backend.raw.hset(name % KEYS[1], "meta", "{")
    await backend.raw.hdel(name % KEYS[2], "meta")
    await backend.raw.delete(name % KEYS[3])
    await backend.raw.set(name % KEYS[3], "no hash")
    await backend.raw.set(f"{backend.prefix}:{{\xff}}:rec", "no name")
    await backend.raw.hset(f"{backend.prefix}:{{{KEY}}}:record", "v", "2")
    assert {each.key for each in await pages(store)} == set(KEYS[4:6])
    assert {each.key for each in await pages(other)} == {KEY}
    assert await backend.raw.exists(name % KEYS[1])


@pytest.mark.parametrize("prefix", ["a.b", "a_b-c:d", "A1:"])
async def test_a_prefix_means_itself_and_no_other(backend, prefix):
    store = await backend.store(prefix=f"{backend.prefix}{prefix}")
    for other in ("axb", "a_b-c:d:e", "A1", "a1:", ""):
        await (await backend.store(prefix=f"{backend.prefix}{other}")).store(KEYS[1], RECORDING)
    await store.store(KEY, RECORDING)
    assert {each.key for each in await pages(store)} == {KEY}


async def test_a_recording_that_was_given_no_life_has_one_without_an_end(backend):
    store = await backend.store()
    await store.store(KEY, RECORDING)
    await backend.raw.persist(backend.name)
    assert [each.life_s for each in await pages(store)] == [float("inf")]


@pytest.mark.parametrize("cursor", ["nonsense", "1-2-3-4-5", "0-1-x-\xff"])
async def test_a_cursor_that_never_was_one_is_no_worse_than_a_store_that_is_away(backend, cursor):
    store = await backend.store()
    with pytest.raises(StoreError):
        await store.page(cursor)
    assert store.available


# Erasing


async def test_what_is_erased_is_gone_with_its_log(stores):
    store, other = stores
    for log in (LOG, OTHER_LOG):
        await end_log(store, log)
        await store.store(KEY, of_flight(log))
    assert flights_of(await pages(store)) == {(KEY, LOG.flight, True), (KEY, OTHER_LOG.flight, False)}
    assert await other.erase([LOG], began_by_us=BY_THEN) == 1
    assert flights_of(await pages(store)) == {(KEY, OTHER_LOG.flight, False)}
    assert await store.peek(LOG) == Peeked()
    assert (await store.peek(OTHER_LOG)).log
    assert await other.erase([OTHER_LOG, OTHER_LOG], began_by_us=BY_THEN) == 1
    assert await store.lookup(KEY, "whole") is None
    assert await store.peek(OTHER_LOG) == Peeked()


async def test_without_a_flight_the_current_recording_of_a_key_is_erased_with_its_log(stores):
    store, other = stores
    for log in (LOG, OTHER_LOG):
        await end_log(store, log)
        await store.store(KEY, of_flight(log))
    await store.store(KEYS[0], RECORDING)
    assert await other.erase([(KEY, CURRENT), (KEYS[0], CURRENT), (KEYS[1], CURRENT)], began_by_us=BY_THEN) == 2
    assert flights_of(await pages(store)) == {(KEY, LOG.flight, True)}
    assert await store.peek(OTHER_LOG) == Peeked()
    assert (await store.peek(LOG)).log


async def test_a_recording_of_a_later_flight_stays_with_its_log(stores):
    store, _ = stores
    await end_log(store, LOG)
    await store.store(KEY, of_flight(LOG, 0.000_01))
    assert await store.erase([LOG, (KEY, CURRENT)], began_by_us=BY_THEN) == 0
    assert await store.lookup(KEY, "whole")
    assert (await store.peek(LOG)).log
    assert await store.erase([LOG, (KEY, CURRENT)], began_by_us=BY_THEN + 10) == 1


async def test_another_flights_recording_of_the_same_key_stays(stores):
    store, _ = stores
    await store.store(KEY, of_flight(OTHER_LOG))
    assert await store.erase([LOG], began_by_us=LATER) == 0
    assert await store.lookup(KEY, "whole")


async def test_the_log_of_a_flight_that_still_runs_stays(stores):
    """Its recording may be there already: that of a flight which is taken over is written more than once."""
    store, _ = stores
    writer = Writer(store.replica, "00000001")
    await store.append([batch(writer, 0, "ab", request=ASKED)])
    await store.store(KEY, of_flight(LOG))
    assert await store.erase([LOG], began_by_us=LATER) == 1
    peeked = await store.peek(LOG)
    assert (peeked.count, peeked.request) == (2, ASKED)
    await store.release(LOG, writer)
    await store.erase([LOG], began_by_us=LATER)
    assert (await store.peek(LOG)).count == 2
    assert await store.take_over(LOG, writer, behind="00000001", joinable=True)
    await store.end(LOG, writer, b"over")
    await store.erase([LOG], began_by_us=LATER)
    assert await store.peek(LOG) == Peeked()


async def test_a_log_that_was_ended_but_whose_lease_is_held_stays(backend):
    store = await backend.store()
    await end_log(store, LOG)
    await backend.raw.set(backend.key("lease", LOG), "somebody", px=60_000)
    await store.erase([LOG], began_by_us=LATER)
    assert (await store.peek(LOG)).end == b"over"


async def test_many_are_erased_at_once(backend):
    store = await backend.store()
    await fill(store, KEYS)
    await store.store(KEYS[7], begun(20, b"later"))
    listed = [(each.key, FlightId(each.meta.flight)) for each in await pages(store)]
    assert await store.erase(listed, began_by_us=LATER) == len(KEYS) - 1
    assert {each.key for each in await pages(store)} == {KEYS[7]}
    assert await store.erase([], began_by_us=LATER) == 0


async def test_what_does_not_load_is_erased_without_a_flight(backend):
    store = await backend.store()
    await store.store(KEYS[0], RECORDING)
    await backend.raw.hset(f"{backend.prefix}:{{{KEYS[0]}}}:rec", mapping={"at": "soon", "meta": "{"})
    await backend.raw.set(f"{backend.prefix}:{{{KEYS[1]}}}:rec", "no hash")
    assert await store.erase([(key, CURRENT) for key in KEYS[:3]], began_by_us=0) == 2


async def test_a_log_that_does_not_load_does_not_keep_others_from_being_erased(backend):
    store = await backend.store()
    await fill(store, KEYS[:3])
    await backend.raw.set(f"{backend.prefix}:{{{KEYS[1]}}}:log:{LOG.flight}", "no stream")
    await store.store(KEYS[1], of_flight(LogName(KEYS[1], LOG.flight)))
    with pytest.raises(StoreError):
        await store.erase([(key, CURRENT) for key in KEYS[:3]], began_by_us=LATER)
    assert await pages(store) == []


# Purges


def purge(number: int) -> Purge:
    return Purge(number, Selector(tag=f"tag-{number}"))


async def test_purges_are_seen_by_all_replicas_each_from_where_it_was(stores):
    one, two = stores
    assert await two.purges(LOG_START) == ([], LOG_START)
    await one.mark(purge(1), life_s=60)
    await two.mark(Purge(2, Selector()), life_s=60)
    seen, cursor = await two.purges(LOG_START)
    assert seen == [purge(1), Purge(2, Selector())]
    assert await two.purges(cursor) == ([], cursor)
    await one.mark(purge(3), life_s=60)
    assert (await two.purges(cursor))[0] == [purge(3)]
    assert [each.at_us for each in (await one.purges(LOG_START))[0]] == [1, 2, 3]


async def test_marks_go_when_their_lives_are_over_and_not_before(backend):
    store = await backend.store()
    name = f"{backend.prefix}:purges"
    for number in range(2):
        await store.mark(purge(number), life_s=0.001)
    await store.mark(purge(2), life_s=1000)
    await store.mark(purge(3), life_s=0.001)
    assert 990_000 < await backend.raw.pttl(name) <= 1_000_000

    async def gone() -> bool:
        await store.mark(purge(4), life_s=10)
        return not {purge(0), purge(1)} & {*(await store.purges(LOG_START))[0]}

    async with asyncio.timeout(5):
        while not await gone():
            pass
    seen = (await store.purges(LOG_START))[0]
    assert seen[:2] == [purge(2), purge(3)]  # what is behind one that still counts may stay
    assert await backend.raw.pttl(name) > 900_000


async def test_all_purges_are_told_however_many_they_are(backend, monkeypatch):
    monkeypatch.setattr("gateway.store.inventory._PURGES_AT_ONCE", 4)
    store = await backend.store()
    for number in range(8):
        await store.mark(purge(number), life_s=60)
        seen, cursor = await store.purges(LOG_START)
        assert [each.at_us for each in seen] == list(range(number + 1))
    assert await store.purges(cursor) == ([], cursor)


async def test_a_purge_that_does_not_load_stands_in_no_others_way(backend, caplog):
    store = await backend.store()
    await store.mark(purge(1), life_s=60)
    for fields in ({"purge": "{"}, {"purge": '{"at_us":1,"selector":{"mood":"bad"}}'}, {"other": "1"}):
        await backend.raw.xadd(f"{backend.prefix}:purges", fields)
    await store.mark(purge(2), life_s=60)
    seen, cursor = await store.purges(LOG_START)
    assert seen == [purge(1), purge(2)]
    assert await store.purges(cursor) == ([], cursor)
    assert [record.levelname for record in caplog.records if record.name.startswith("gateway")] == ["WARNING"]


# What was stored last, and counters


async def test_what_was_stored_last_comes_first_and_once(stores):
    one, two = stores
    assert await one.recent(10) == []
    for store, number in ((one, 1), (two, 2), (one, 3), (two, 1)):
        await store.store(KEYS[number], RECORDING)
        async with asyncio.timeout(5):
            while await two.recent(1) != [KEYS[number]]:  # on a cluster it may come a little later
                await asyncio.sleep(0.002)
    assert await one.recent(10) == [KEYS[1], KEYS[3], KEYS[2]]
    assert await two.recent(2) == [KEYS[1], KEYS[3]]
    assert await two.recent(0) == []


async def test_only_some_of_what_was_stored_last_are_remembered(backend):
    store = await backend.store()
    await fill(store, KEYS[:300])
    await until_noted(store)
    assert len(set(await store.recent(1000)) & set(KEYS[:300])) == 256
    assert await backend.raw.llen(f"{backend.prefix}:recent") == 256
    assert await backend.raw.pttl(f"{backend.prefix}:recent") > 0


async def until_noted(store: RedisStore) -> None:
    await until(lambda: store._notes is None or store._notes.done())


async def test_keys_that_two_replicas_noted_at_once_come_once(backend):
    store = await backend.store()
    await backend.raw.rpush(f"{backend.prefix}:recent", KEYS[1], KEYS[2], KEYS[1], b"\xff")
    assert (await store.recent(3))[:2] == [KEYS[1], KEYS[2]]


async def test_a_write_and_its_note_are_one_round_trip(server, monkeypatch):
    store = await server.store()
    await store.store(KEY, RECORDING)
    sent = []
    send = store._server.wire.send

    async def seen(commands):
        sent.append([command[0] for command in commands])
        return await send(commands)

    monkeypatch.setattr(store._server.wire, "send", seen)
    await store.store(KEY, RECORDING)
    assert sent == [["EVALSHA", "LREM", "LPUSH", "LTRIM", "PEXPIRE"]]


async def test_a_list_that_is_none_fails_no_write(backend):
    store = await backend.store()
    await backend.raw.set(f"{backend.prefix}:recent", "no list")
    assert await store.store(KEY, RECORDING)
    await until_noted(store)
    assert store.available
    assert await store.lookup(KEY, "whole")
    with pytest.raises(StoreCorrupt):
        await store.recent(1)


async def test_counters_add_up_over_all_replicas(stores):
    one, two = stores
    began = time.time()
    assert await two.counts() == {}
    await one.count({"hits": 1, "dollars": 0.25})
    since = (await two.counts())["since"]
    await two.count({"hits": 2, "dollars": 1e-05, "misses": 3.0})
    await one.count({})
    assert await one.counts() == {"since": since, "hits": 3, "dollars": 0.25001, "misses": 3}
    assert isinstance(one, FakeStore) or abs(since - began) < 5


async def test_counters_that_do_not_load_are_corrupt(backend):
    store = await backend.store()
    await store.count({"hits": 1})
    assert 300 * 86_400 < await backend.raw.ttl(f"{backend.prefix}:stats") <= 365 * 86_400
    await backend.raw.hset(f"{backend.prefix}:stats", "hits", "many")
    with pytest.raises(StoreCorrupt):
        await store.counts()


async def test_what_each_process_has_told_last_is_known_to_all(stores):
    one, two = stores
    assert await two.reports() == []
    await one.report("a", b"1")
    await two.report("b", b"2")
    await one.report("a", b"3")
    assert sorted(await one.reports()) == sorted(await two.reports()) == [b"2", b"3"]
    await one.forget(["b", "nobody"])
    assert await two.reports() == [b"3"]


async def test_what_was_told_is_let_go_of_in_the_end_and_may_be_odd(backend):
    store = await backend.store()
    await store.report("a", b"1")
    assert 80_000 < await backend.raw.ttl(f"{backend.prefix}:pulse") <= 86_400
    await backend.raw.set(f"{backend.prefix}:pulse", "no hash")
    with pytest.raises(StoreCorrupt):
        await store.reports()
    with pytest.raises(StoreError):
        await store.report("a", b"1")
    assert store.available


# A server that is not well


def calls(store: Any) -> dict[str, Any]:
    """One call of each kind, not yet awaited."""
    return {
        "lookup": store.lookup(KEY, "meta"),
        "page": store.page(),
        "report": store.report("a", b"1"),
        "reports": store.reports(),
        "forget": store.forget(["a"]),
        "inspect": store.inspect(KEY),
        "erase": store.erase([LOG], began_by_us=LATER),
        "erase current": store.erase([(KEY, CURRENT)], began_by_us=LATER),
        "mark": store.mark(purge(1), life_s=60),
        "purges": store.purges(LOG_START),
        "recent": store.recent(10),
        "count": store.count({"hits": 1}),
        "counts": store.counts(),
    }


@pytest.fixture
async def own_store(own_redis: RedisServer) -> AsyncIterator[RedisStore]:
    config = RedisConfig(lookup_timeout_s=0.1, command_timeout_s=0.2, connect_timeout_s=1, cooldown_s=0.1)
    async with RedisStore(connect(config, own_redis.url), config) as store:
        await until(lambda: store.available)
        yield store


@pytest.mark.parametrize("fail", [RedisServer.stop, lambda server: server.signal(signal.SIGSTOP)], ids=["killed", "frozen"])
async def test_all_fail_in_time_with_a_store_error_and_at_once_when_it_is_away(own_redis, own_store, fail):
    await own_store.store(KEY, RECORDING)
    fail(own_redis)
    results = await asyncio.gather(*calls(own_store).values(), return_exceptions=True)
    assert {type(result) for result in results} == {StoreUnavailable}
    async with asyncio.timeout(5):
        while own_store.available:
            with pytest.raises(StoreUnavailable):
                await own_store.lookup(KEY, "meta")
    for call in calls(own_store).values():
        with pytest.raises(StoreUnavailable, match="away"):
            call.send(None)


async def read_only(admin: Redis) -> None:
    await admin.replicaof("127.0.0.1", 1)


async def full(admin: Redis) -> None:
    await admin.config_set("maxmemory-policy", "noeviction")
    await admin.config_set("maxmemory", 1)


async def forbidden(admin: Redis) -> None:
    await admin.execute_command("ACL", "SETUSER", "default", "-@write")


@pytest.mark.parametrize("refuse", [read_only, full, forbidden])
async def test_a_server_that_refuses_writes_can_still_be_listed(own_redis, own_store, refuse):
    await own_store.store(KEY, RECORDING)
    async with Redis.from_url(own_redis.url) as admin:
        await refuse(admin)
        for name in ("mark", "count", "erase"):
            waiting = calls(own_store)
            call = waiting.pop(name)
            for other in waiting.values():
                other.close()
            if (name, refuse) == ("erase", full):
                assert await call == 0  # this is how it is emptied
                continue
            with pytest.raises(StoreUnavailable):
                await call
        assert [each.key for each in await pages(own_store)] == [KEY]
        assert (await own_store.inspect(KEY)).recording == RECORDING
        assert await own_store.recent(10) == [KEY]
        assert await own_store.counts() == {}
        assert await own_store.purges(LOG_START) == ([], LOG_START)
        assert own_store.available


async def test_what_was_large_when_the_store_was_closed_says_so(own_store):
    await own_store.store(KEY, large(1 << 20))
    own_store._packer.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await own_store.lookup(KEY, "stream")

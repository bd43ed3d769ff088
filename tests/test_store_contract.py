"""The store's contract, on every server that it has to work on."""

import asyncio
import struct
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio.connection import AbstractConnection
from stores import (
    KEY,
    META,
    RECORDING,
    Backend,
    begun,
    commands_about,
    large,
)

from gateway.config import RedisConfig
from gateway.core.key import CacheKey
from gateway.core.recording import Marks, Recording
from gateway.errors import ConfigError, StoreCorrupt, StoreUnavailable
from gateway.store.client import FEWEST_CONNECTIONS
from gateway.store.redis import connect

pytestmark = pytest.mark.usefixtures("nothing_goes_wrong_unnoticed")


async def gone(backend: Backend, name: str) -> bool:
    """Whether the key is deleted before long."""
    deadline = time.monotonic() + 5
    while await backend.raw.exists(name):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.005)
    return True


@pytest.mark.parametrize("protocol", [2, 3])
async def test_what_is_stored_is_found_by_both_kinds_of_callers(backend, protocol):
    store = await backend.store(protocol=protocol)
    assert await store.lookup(KEY, "stream") is None
    assert await store.lookup(KEY, "whole") is None
    assert await store.store(KEY, RECORDING) is True
    assert await store.lookup(KEY, "stream") == replace(RECORDING, body=None)
    assert await store.lookup(KEY, "whole") == replace(RECORDING, sse=None, marks=None)
    assert await store.lookup(KEY, "whole", patient=True) == replace(RECORDING, sse=None, marks=None)


async def test_what_is_deleted_is_not_found(backend):
    store = await backend.store()
    await store.store(KEY, RECORDING)
    await store.delete(KEY)
    await store.delete(KEY)
    assert await store.lookup(KEY, "whole") is None


async def test_a_recording_of_eight_megabytes_is_written_and_read(backend):
    recording = large(8 << 20)
    store = await backend.store()
    assert await store.store(KEY, recording)
    assert (await store.lookup(KEY, "stream")).sse == recording.sse
    assert (await store.lookup(KEY, "whole")).body == recording.body


async def test_a_recording_lives_as_long_as_it_says(backend):
    store = await backend.store()
    await store.store(KEY, replace(RECORDING, meta=META._replace(ttl_s=5000)))
    assert 4_900_000 < await backend.raw.pttl(backend.name) <= 5_000_000
    await store.store(KEY, RECORDING)
    assert 50_000 < await backend.raw.pttl(backend.name) <= 60_000


async def test_a_life_that_no_server_can_count_is_a_long_one(backend):
    store = await backend.store()
    assert await store.store(KEY, replace(RECORDING, meta=META._replace(ttl_s=1e300)))
    assert await backend.raw.pttl(backend.name) > 1000 * 86_400_000


@pytest.mark.parametrize(("later_s", "body"), [(0.000_01, b"new"), (0, b"new"), (-0.000_01, b"old")])
async def test_a_recording_yields_only_to_one_whose_flight_began_no_earlier(backend, later_s, body):
    store = await backend.store()
    await store.store(KEY, begun(0, b"old"))
    assert await store.store(KEY, begun(later_s, b"new")) is (body == b"new")
    assert (await store.lookup(KEY, "whole")).body == body


@pytest.mark.parametrize("at", ["", "soon", "nan"])
async def test_a_broken_start_time_stands_against_no_recording(backend, at):
    store = await backend.store()
    await store.store(KEY, begun(0, b"old"))
    await backend.raw.hset(backend.name, "at", at)
    assert await store.store(KEY, begun(-5, b"new"))
    assert (await store.lookup(KEY, "whole")).body == b"new"


async def test_a_recording_replaces_a_key_of_another_type(backend):
    store = await backend.store()
    await backend.raw.set(backend.name, "no hash")
    assert await store.store(KEY, RECORDING)
    assert (await store.lookup(KEY, "whole")).body == RECORDING.body
    assert await backend.raw.pttl(backend.name) > 0


def corrupted(**fields: bytes) -> Callable[[Backend], Any]:
    return lambda backend: backend.raw.hset(backend.name, mapping=fields)


def without(field: str) -> Callable[[Backend], Any]:
    return lambda backend: backend.raw.hdel(backend.name, field)


async def of_another_type(backend: Backend) -> None:
    await backend.raw.delete(backend.name)
    await backend.raw.lpush(backend.name, "no hash")


HARM = {
    "an older schema": corrupted(v=b"0"),
    "a schema that is no number": corrupted(v=b"\xff"),
    "no schema": without("v"),
    "no meta data": without("meta"),
    "meta data that are no JSON": corrupted(meta=b"{"),
    "meta data that are no object": corrupted(meta=b"[]"),
    "meta data that lack a member": corrupted(meta=b'{"finish_reasons":[],"body_id":null,"body_created":null}'),
    "another type": of_another_type,
}
HARM_TO_STREAMS = {
    "no frames": without("sse"),
    "no marks": without("marks"),
    "empty marks": corrupted(marks=b""),
    "marks cut short": corrupted(marks=RECORDING.marks.pack()[:-1]),
    "marks that count too much": corrupted(marks=struct.pack("<4I", 1 << 30, 1 << 30, 0, 0)),
    "marks of other frames": corrupted(marks=Marks(53, 53, array("Q", [1])).pack()),
    "fewer frames than marks": corrupted(sse=RECORDING.sse[:27]),
}
HARM_TO_BODIES = {"no body": without("body")}


@pytest.mark.parametrize(
    ("want", "harm"),
    [
        *(pytest.param(want, harm, id=f"{want}-{name}") for want in ("stream", "whole") for name, harm in HARM.items()),
        *(pytest.param("stream", harm, id=name) for name, harm in HARM_TO_STREAMS.items()),
        *(pytest.param("whole", harm, id=name) for name, harm in HARM_TO_BODIES.items()),
    ],
)
async def test_what_does_not_load_is_corrupt_and_deleted(backend, want, harm):
    store = await backend.store()
    await store.store(KEY, RECORDING)
    await harm(backend)
    with pytest.raises(StoreCorrupt):
        await store.lookup(KEY, want)
    assert await gone(backend, backend.name)
    assert await store.lookup(KEY, want) is None
    assert store.available


async def test_many_who_find_the_same_corrupt_recording_delete_it_once(backend, caplog):
    store = await backend.store()
    await backend.raw.hset(backend.name, "v", "0")
    found = await asyncio.gather(*(store.lookup(KEY, "stream") for _ in range(200)), return_exceptions=True)
    assert {type(error) for error in found} == {StoreCorrupt}
    assert await gone(backend, backend.name)
    assert store.available
    assert [record.levelname for record in caplog.records if record.name.startswith("gateway")] == ["WARNING"]


async def test_many_corrupt_recordings_are_all_deleted(server):
    store = await server.store()
    names = [f"{server.prefix}:{{{number}}}:rec" for number in range(100)]
    for name in names:
        await server.raw.hset(name, "v", "0")
    lookups = [store.lookup(CacheKey(str(number)), "stream") for number in range(100)]
    await asyncio.gather(*lookups, return_exceptions=True)
    assert all([await gone(server, name) for name in names])
    assert store.available


async def test_a_recording_that_lacks_what_this_caller_does_not_need_still_serves_him(backend):
    store = await backend.store()
    await store.store(KEY, RECORDING)
    await backend.raw.hdel(backend.name, "body")
    assert await store.lookup(KEY, "stream")


async def test_concurrent_lookups_each_get_their_own_answer(backend):
    store = await backend.store()
    keys = [CacheKey(f"{number:040x}") for number in range(300)]
    for number in range(0, 300, 3):
        await store.store(keys[number], begun(0, b"%d" % number))
    found = await asyncio.gather(*(store.lookup(key, "whole") for key in keys))
    assert [recording and recording.body for recording in found] == [
        b"%d" % number if number % 3 == 0 else None for number in range(300)
    ]


async def test_a_bad_key_does_no_harm_to_the_others_of_its_batch(backend):
    store = await backend.store()
    bad, worse = CacheKey("bad"), CacheKey("worse")
    await store.store(KEY, RECORDING)
    await store.store(bad, RECORDING)
    await backend.raw.hset(f"{backend.prefix}:{{bad}}:rec", "meta", "{")
    await backend.raw.set(f"{backend.prefix}:{{worse}}:rec", "no hash")
    looked_up = [store.lookup(key, want) for key in (bad, KEY, worse) for want in ("stream", "whole")]
    found = await asyncio.gather(*looked_up, return_exceptions=True)
    assert [type(result) for result in found] == [StoreCorrupt] * 2 + [Recording] * 2 + [StoreCorrupt] * 2


async def test_callers_who_leave_harm_nobody(backend):
    store = await backend.store()
    await store.store(KEY, RECORDING)
    for turns in range(12):
        tasks = [asyncio.create_task(store.lookup(KEY, "whole")) for _ in range(6)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        assert all(await asyncio.gather(*tasks[1::2]))
        await asyncio.gather(*tasks[::2], return_exceptions=True)
    assert await store.lookup(KEY, "whole")
    assert store.available


@pytest.mark.parametrize("connections", [1, 4, 16])
@pytest.mark.parametrize("patient", [False, True])
async def test_more_callers_than_connections_wait_for_their_turn(server, connections, patient):
    before = {client["id"] for client in await server.raw.client_list()}
    store = await server.store(max_connections=connections)

    async def use(number: int) -> Recording | None:
        key = CacheKey(f"{number:040x}")
        await store.store(key, begun(0, b"%d" % number))
        return await store.lookup(key, "whole", patient=patient)

    found = await asyncio.gather(*(use(number) for number in range(60)))
    assert [recording.body for recording in found] == [b"%d" % number for number in range(60)]
    connected = {client["id"] for client in await server.raw.client_list()} - before
    assert 1 < len(connected) <= max(connections, FEWEST_CONNECTIONS) + len({"the bell"})


async def test_stores_agree_on_the_secret_that_the_first_of_them_wrote(backend):
    first, second = await backend.store(), await backend.store()
    assert first.secret == second.secret == await backend.raw.get(f"{backend.prefix}:secret")
    assert len(first.secret) >= 16
    assert await backend.raw.ttl(f"{backend.prefix}:secret") == -1


async def test_stores_that_start_together_agree_on_a_secret(server):
    stores = await asyncio.gather(*(server.store() for _ in range(10)))
    assert len({store.secret for store in stores}) == 1


async def test_stores_under_other_prefixes_have_other_secrets(backend):
    first, second = await backend.store(), await backend.store(prefix=f"{backend.prefix}2")
    assert first.secret != second.secret


async def test_a_secret_that_was_lost_is_written_again(backend, monkeypatch):
    monkeypatch.setattr("gateway.store.server._WATCH_UP_S", 0.02)
    store = await backend.store()
    secret = store.secret
    await backend.raw.delete(f"{backend.prefix}:secret")
    deadline = time.monotonic() + 5
    while await backend.raw.get(f"{backend.prefix}:secret") != secret:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert store.secret == secret


async def test_a_configured_secret_is_never_written(backend):
    store = await backend.store(secret=b"configured secret")
    await store.store(KEY, RECORDING)
    assert store.secret == b"configured secret"
    assert await backend.raw.exists(f"{backend.prefix}:secret") == 0


async def test_all_keys_have_the_prefix_and_those_of_a_cache_key_share_a_hash_tag(backend):
    store = await backend.store()
    await store.store(KEY, RECORDING)
    names = {name.decode() async for name in backend.raw.scan_iter(match=f"{backend.prefix}:*")}
    assert names == {f"{backend.prefix}:secret", f"{backend.prefix}:recent", f"{backend.prefix}:{{{KEY}}}:rec"}
    if backend.prefix == "t":
        assert await backend.raw.dbsize() == len(names)
    assert await (await backend.store(prefix="other")).lookup(KEY, "whole") is None


@pytest.mark.parametrize(("want", "fields"), [("stream", "v meta sse marks"), ("whole", "v meta body")])
@pytest.mark.parametrize("patient", [False, True])
async def test_a_lookup_is_one_command_for_what_is_wanted_only(server, want, fields, patient):
    store = await server.store()
    await store.store(KEY, RECORDING)
    commands = await commands_about(server, lambda: store.lookup(KEY, want, patient=patient))
    assert commands == [f"HMGET {server.name} {fields}"]


async def test_a_write_is_one_command(server):
    store = await server.store()
    await store.store(KEY, RECORDING)
    commands = await commands_about(server, lambda: store.store(KEY, RECORDING))
    scripts = [command for command in commands if command.startswith("EVALSHA")]
    assert len(scripts) == 1


async def test_lookups_of_one_turn_leave_in_one_pipeline(server, monkeypatch):
    store = await server.store()
    sent = []
    send = AbstractConnection.send_packed_command

    async def count(connection: AbstractConnection, command: Any, **options: Any) -> None:
        sent.append(b"".join(command))
        await send(connection, command, **options)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", count)
    await asyncio.gather(*(store.lookup(CacheKey(str(number)), "whole") for number in range(50)))
    assert [packet.count(b"HMGET") for packet in sent] == [50]


async def test_a_closed_store_leaves_nobody_waiting(backend):
    store = await backend.store()
    tasks = [asyncio.create_task(store.lookup(KEY, "whole", patient=number % 2 == 0)) for number in range(4)]
    await asyncio.sleep(0)
    await store.close()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert result is None or isinstance(result, StoreUnavailable)  # some are answered before it is closed
    for patient in (False, True):
        with pytest.raises(StoreUnavailable):
            await store.lookup(KEY, "whole", patient=patient)


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1/?foo=1", "redis://127.0.0.1/?db=one", "redis://:secret@127.0.0.1/?socket=a"]
)
async def test_a_url_that_the_client_does_not_understand_is_a_wrong_configuration(url):
    with pytest.raises(ConfigError, match=r"redis\.url") as caught:
        connect(RedisConfig(url=url), url)
    assert "secret" not in str(caught.value)

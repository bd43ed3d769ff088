"""Redis is killed, frozen, slow, full, forbidden or not there: callers must not notice, and it must be back by itself."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from scripted import chunk
from stores import KEY, LOG, OTHER_LOG, RECORDING, batch, begun, frame, large, on_fakeredis, until

from gateway.config import RedisConfig
from gateway.core.key import CacheKey
from gateway.errors import StoreUnavailable
from gateway.ports import LOG_START, Appended, LogName, Writer
from gateway.store.client import Single
from gateway.store.redis import RedisStore, connect

pytestmark = pytest.mark.usefixtures("nothing_goes_wrong_unnoticed")

Open = Callable[..., Any]


@pytest.fixture
async def open_store() -> AsyncIterator[Open]:
    async with AsyncExitStack() as stack:

        async def open_store(url: str, **settings: Any) -> RedisStore:
            config = RedisConfig(**{"lookup_timeout_s": 0.1, "command_timeout_s": 1, "cooldown_s": 0.1, **settings})
            return await stack.enter_async_context(RedisStore(connect(config, url), config))

        yield open_store


@pytest.fixture
async def admin(own_redis) -> AsyncIterator[Redis]:
    async with Redis.from_url(own_redis.url) as client:
        yield client


def kill(server: Any) -> None:
    server.stop()


def freeze(server: Any) -> None:
    server.signal(signal.SIGSTOP)


def thaw(server: Any) -> None:
    server.signal(signal.SIGCONT)


FAULTS = pytest.mark.parametrize(
    ("fail", "mend"),
    [pytest.param(kill, lambda server: server.start(), id="killed"), pytest.param(freeze, thaw, id="frozen")],
)


async def refused(store: RedisStore) -> str:
    with pytest.raises(StoreUnavailable) as caught:
        await store.lookup(KEY, "whole")
    return str(caught.value)


def refused_at_once(store: RedisStore) -> bool:
    """Whether a lookup fails before it has waited for anything."""
    with pytest.raises(StoreUnavailable, match="away"):
        store.lookup(KEY, "whole").send(None)  # type: ignore[attr-defined]
    with pytest.raises(StoreUnavailable, match="away"):
        store.store(KEY, RECORDING).send(None)  # type: ignore[attr-defined]
    return True


async def until_stored(store: RedisStore) -> None:
    """A machine under load may make a healthy server late."""
    await until(lambda: store.available)
    await store.store(KEY, RECORDING)
    await until_found(store)


async def until_found(store: RedisStore) -> None:
    async with asyncio.timeout(5):
        while True:
            try:
                assert await store.lookup(KEY, "whole")
            except StoreUnavailable:
                await asyncio.sleep(0.02)
            else:
                return


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@FAULTS
async def test_after_three_failures_in_a_row_nobody_waits_until_it_is_back(own_redis, open_store, fail, mend):
    store = await open_store(own_redis.url)
    await until_stored(store)
    fail(own_redis)
    for _ in range(3):
        assert store.available
        assert "away" not in await refused(store)
    assert not store.available
    assert refused_at_once(store)
    mend(own_redis)
    await until_stored(store)


async def test_a_hiccup_that_hits_many_lookups_counts_once(own_redis, open_store):
    store = await open_store(own_redis.url)
    await until_stored(store)
    freeze(own_redis)
    lookups = [store.lookup(CacheKey(str(number)), "whole") for number in range(100)]
    for result in await asyncio.gather(*lookups, return_exceptions=True):
        assert isinstance(result, StoreUnavailable)
    assert store.available
    thaw(own_redis)
    await until_found(store)
    freeze(own_redis)
    await refused(store)
    await refused(store)
    assert store.available
    thaw(own_redis)


async def until_hung_up(store: RedisStore) -> None:
    """The news of a closed connection take a turn of the loop or two."""
    idle = store._server.wire._idle
    assert idle
    await until(lambda: all(connection._reader.at_eof() for connection in idle))


async def test_a_restart_costs_no_lookup_where_connections_lie_idle(own_redis, open_store):
    store = await open_store(own_redis.url, lookup_timeout_s=2)
    await asyncio.gather(*(store.lookup(CacheKey(str(number)), "whole") for number in range(100)))
    await until_stored(store)
    own_redis.stop()
    own_redis.start()
    await until_hung_up(store)
    assert await store.lookup(KEY, "whole") is None


async def test_a_restart_of_a_server_on_tcp_costs_no_lookup_either(own_redis, proxy, open_store):
    store = await open_store(proxy.url, lookup_timeout_s=2)
    await until_stored(store)
    own_redis.stop()
    own_redis.start()
    await until_hung_up(store)
    assert await store.lookup(KEY, "whole") is None


async def test_a_server_that_comes_back_empty_is_told_the_same_secret(own_redis, open_store):
    store = await open_store(own_redis.url)
    secret = store.secret
    own_redis.stop()
    await until_away(store)
    own_redis.start()
    await until(lambda: store.available)
    assert store.secret == secret
    async with Redis.from_url(own_redis.url) as client:
        assert await client.get("gw:secret") == secret


async def until_away(store: RedisStore) -> None:
    async with asyncio.timeout(5):
        while store.available:
            await refused(store)


async def test_a_server_that_is_not_there_at_start_is_found_later(own_redis, open_store, caplog):
    own_redis.stop()
    store = await open_store(own_redis.url)
    assert not store.available
    assert refused_at_once(store)
    assert len(warnings(caplog)) == 1
    own_redis.start()
    await until_stored(store)
    assert warnings(caplog)[1:] == ["Redis is back"]


async def test_a_server_that_never_answers_holds_up_neither_start_nor_end(open_store):
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    began = time.monotonic()
    store = await open_store(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", connect_timeout_s=0.2)
    assert not store.available
    assert refused_at_once(store)
    await store.close()
    assert time.monotonic() - began < 3
    server.close()


async def test_a_wrong_password_is_told_and_not_shown(own_redis, admin, open_store, caplog):
    await admin.config_set("requirepass", "right")
    store = await open_store(own_redis.url.replace("unix://", "unix://:hunter2@"))
    assert not store.available
    assert len(warnings(caplog)) == 1
    assert "password" in caplog.text
    assert "hunter2" not in caplog.text
    await admin.config_set("requirepass", "hunter2")
    await until_stored(store)


async def test_an_outage_is_told_once(own_redis, open_store, caplog):
    store = await open_store(own_redis.url, cooldown_s=0.01)
    own_redis.stop()
    looks = count_looks(store)
    await until_away(store)
    await until(lambda: len(looks) > 5)
    assert len(warnings(caplog)) == 1
    own_redis.start()
    await until_stored(store)
    assert warnings(caplog)[1:] == ["Redis is back"]


async def test_a_store_that_comes_and_goes_does_not_fill_the_log(own_redis, open_store, caplog):
    store = await open_store(own_redis.url, cooldown_s=0.01)
    for _ in range(4):
        own_redis.stop()
        await until_away(store)
        own_redis.start()
        await until(lambda: store.available)
    assert len(warnings(caplog)) == 2


async def test_a_long_outage_is_told_again_after_an_interval(own_redis, open_store, caplog, monkeypatch):
    monkeypatch.setattr("gateway.store.server._LOG_INTERVAL_S", 0.1)
    store = await open_store(own_redis.url, cooldown_s=0.01)
    own_redis.stop()
    await until_away(store)
    await until(lambda: len(warnings(caplog)) >= 3)
    assert all("requests go on without the cache" in warning for warning in warnings(caplog))


def count_looks(store: RedisStore) -> list[None]:
    looks: list[None] = []
    look = store._server._look

    async def counted() -> None:
        looks.append(None)
        await look()

    store._server._look = counted  # type: ignore[method-assign]
    return looks


async def test_an_answer_that_came_while_the_loop_was_stalled_is_not_lost(own_redis, open_store):
    store = await open_store(own_redis.url, lookup_timeout_s=0.05, command_timeout_s=5)
    await until_stored(store)
    freeze(own_redis)
    lookup = asyncio.create_task(store.lookup(KEY, "whole"))
    for _ in range(10):
        await asyncio.sleep(0)
    thaw(own_redis)
    time.sleep(0.5)  # noqa: ASYNC251  # the fault
    assert await lookup


async def test_a_stall_of_the_loop_does_not_make_lookups_wait_for_ever(own_redis, open_store):
    store = await open_store(own_redis.url)
    await until_stored(store)
    freeze(own_redis)
    lookup = asyncio.create_task(store.lookup(KEY, "whole"))
    for _ in range(10):
        await asyncio.sleep(0)
    time.sleep(0.3)  # noqa: ASYNC251  # the fault
    with pytest.raises(StoreUnavailable, match="in time"):
        await lookup


async def test_writes_that_succeed_slowly_do_not_hide_that_lookups_are_late(proxy, open_store):
    store = await open_store(proxy.url, lookup_timeout_s=0.03, command_timeout_s=5)
    await until_stored(store)
    proxy.delay_s = 0.4
    for number in range(3):
        assert await store.store(KEY, begun(number, b"{}"))
        assert "in time" in await refused(store)
    assert not store.available


async def test_a_server_too_slow_for_lookups_is_not_back_until_it_is_quick(proxy, open_store):
    store = await open_store(proxy.url, lookup_timeout_s=0.02, connect_timeout_s=5, cooldown_s=0.02)
    await until_stored(store)
    proxy.delay_s = 0.25
    await until_away(store)
    await until(lambda: proxy.asked.count(b"gw:probe") >= 3, within_s=10)
    assert not store.available
    proxy.delay_s = 0
    await until_stored(store)


async def test_a_late_answer_costs_no_connection(proxy, open_store):
    store = await open_store(proxy.url, lookup_timeout_s=0.03, command_timeout_s=5)
    await until_stored(store)
    before = proxy.connections
    proxy.delay_s = 0.4
    await refused(store)
    await until(lambda: not store._server._lookups._running)
    proxy.delay_s = 0
    await until_found(store)
    assert proxy.connections == before


async def test_callers_who_leave_while_the_server_is_frozen_harm_nobody(own_redis, open_store):
    store = await open_store(own_redis.url, lookup_timeout_s=5, command_timeout_s=5)
    await until_stored(store)
    freeze(own_redis)
    tasks = [asyncio.create_task(store.lookup(KEY, "whole")) for _ in range(8)]
    for _ in range(10):
        await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.sleep(0)
    thaw(own_redis)
    assert all(await asyncio.gather(*tasks[1::2]))
    assert store.available


async def test_who_asks_for_a_stored_answer_only_waits_longer(own_redis, open_store):
    store = await open_store(own_redis.url, command_timeout_s=0.1)
    await until_stored(store)
    freeze(own_redis)
    patient = asyncio.create_task(store.lookup(KEY, "whole", patient=True))
    await until_away(store)
    assert not patient.done()
    thaw(own_redis)
    assert await patient


async def test_patient_callers_do_not_take_the_others_places(own_redis, open_store):
    store = await open_store(own_redis.url, command_timeout_s=0.1)
    await until_stored(store)
    freeze(own_redis)
    patient = [asyncio.create_task(store.lookup(CacheKey(str(number)), "whole", patient=True)) for number in range(100)]
    await until_away(store)
    thaw(own_redis)
    assert await asyncio.gather(*patient) == [None] * 100
    await until(lambda: store.available)


async def test_a_write_that_takes_too_long_is_given_up(own_redis, open_store):
    store = await open_store(own_redis.url, command_timeout_s=0.1)
    await until_stored(store)
    freeze(own_redis)
    with pytest.raises(StoreUnavailable):
        await store.store(KEY, RECORDING)
    thaw(own_redis)
    await until_stored(store)


async def test_writes_that_wait_are_given_up_once_the_server_is_away(own_redis, open_store):
    store = await open_store(own_redis.url, command_timeout_s=0.6)
    await until_stored(store)
    freeze(own_redis)
    writes = [asyncio.create_task(store.store(CacheKey(str(number)), RECORDING)) for number in range(200)]
    await until_away(store)
    for result in await asyncio.gather(*writes, return_exceptions=True):
        assert isinstance(result, StoreUnavailable)
    assert store._unwritten_bytes == 0


async def test_recordings_that_wait_to_be_written_do_not_fill_the_memory(own_redis, open_store, monkeypatch):
    monkeypatch.setattr("gateway.store.redis._MAX_UNWRITTEN_BYTES", 1_000_000)
    store = await open_store(own_redis.url, command_timeout_s=5)
    await until_stored(store)
    freeze(own_redis)
    recording = large(150_000)
    writes = [asyncio.create_task(store.store(CacheKey(str(number)), recording)) for number in range(6)]
    await asyncio.wait(writes, return_when=asyncio.FIRST_COMPLETED)
    done = [write for write in writes if write.done()]
    assert len(done) == 3
    for write in done:
        with pytest.raises(StoreUnavailable, match="too much"):
            await write
    thaw(own_redis)
    assert all(await asyncio.gather(*(set(writes) - set(done))))
    assert await store.store(KEY, large(2_000_000))


async def test_a_store_whose_server_is_frozen_in_a_large_write_can_be_closed(own_redis, open_store):
    store = await open_store(own_redis.url, connect_timeout_s=0.2)
    await until_stored(store)
    freeze(own_redis)
    write = asyncio.create_task(store.store(KEY, large(4_000_000)))
    for _ in range(10):
        await asyncio.sleep(0)
    await store.close()
    with pytest.raises(StoreUnavailable):
        await write


async def test_a_write_that_is_given_up_keeps_no_bytes_for_a_frozen_server(own_redis, open_store, monkeypatch):
    """redis-py closes its side gently, which waits for ever until all is sent."""
    transports = []
    connect = Single._connection

    async def seen(self):
        connection = await connect(self)
        transports.append(connection._writer.transport)
        return connection

    monkeypatch.setattr(Single, "_connection", seen)
    store = await open_store(own_redis.url, command_timeout_s=0.2)
    await until_stored(store)
    freeze(own_redis)
    with pytest.raises(StoreUnavailable):
        await store.store(KEY, large(4_000_000))
    assert transports[-1].get_write_buffer_size() == 0


async def read_only(admin: Redis) -> None:
    await admin.replicaof("127.0.0.1", 1)


async def full(admin: Redis) -> None:
    await admin.config_set("maxmemory-policy", "noeviction")
    await admin.config_set("maxmemory", 1)


async def forbidden(admin: Redis) -> None:
    await admin.execute_command("ACL", "SETUSER", "default", "-hset")


@pytest.mark.parametrize("refuse_writes", [read_only, full, forbidden])
async def test_a_server_that_refuses_writes_is_still_read(own_redis, admin, open_store, caplog, refuse_writes):
    store = await open_store(own_redis.url)
    await until_stored(store)
    await refuse_writes(admin)
    for number in range(5):
        with pytest.raises(StoreUnavailable):
            await store.store(KEY, begun(number, b"{}"))
    assert store.available
    assert (await store.lookup(KEY, "whole")).body == RECORDING.body
    assert len(warnings(caplog)) == 1
    assert "refuses" in caplog.text


@pytest.mark.parametrize("refuse_writes", [read_only, full, forbidden])
async def test_a_server_that_refuses_writes_is_left_alone_with_them_for_a_moment(
    own_redis, admin, open_store, refuse_writes
):
    store = await open_store(own_redis.url)
    await until_stored(store)
    assert store.is_writable
    await refuse_writes(admin)
    with pytest.raises(StoreUnavailable):
        await store.store(KEY, begun(1, b"{}"))
    assert not store.is_writable
    for call in (store.store(KEY, RECORDING), store.claim(LOG, Writer(store.replica, "00000001"))):
        with pytest.raises(StoreUnavailable, match="refuses"):
            call.send(None)
    await admin.replicaof("NO", "ONE")
    await admin.config_set("maxmemory", 0)
    await admin.execute_command("ACL", "SETUSER", "default", "+hset")
    await until(lambda: store.is_writable)
    await store.store(KEY, begun(2, b"{}"))
    assert store.is_writable


async def test_a_secret_of_another_type_is_replaced(own_redis, admin, open_store, caplog):
    await admin.lpush("gw:secret", "of another type")
    store = await open_store(own_redis.url)
    assert store.available
    assert await admin.get("gw:secret") == store.secret
    assert len(warnings(caplog)) == 1


async def test_a_replica_that_takes_no_secret_is_read_under_the_one_it_has(own_redis, admin, open_store):
    await admin.set("gw:secret", b"the secret of the others")
    await read_only(admin)
    store = await open_store(own_redis.url)
    assert store.available
    assert store.secret == b"the secret of the others"


async def test_lookups_that_are_forbidden_delete_nothing(own_redis, admin, open_store):
    store = await open_store(own_redis.url)
    await until_stored(store)
    await admin.execute_command("ACL", "SETUSER", "default", "-hmget")
    for _ in range(3):
        assert "permission" in await refused(store)
    assert not store.available
    await admin.execute_command("ACL", "SETUSER", "default", "+hmget")
    await until(lambda: store.available)
    await until_found(store)


async def test_what_the_client_breaks_with_is_a_failure_like_any_other(own_redis, open_store, monkeypatch):
    store = await open_store(own_redis.url)

    async def break_down(*_: Any, **__: Any) -> None:
        raise RuntimeError("the handler is closed")

    with monkeypatch.context() as patch:
        patch.setattr(AbstractConnection, "send_packed_command", break_down)
        for _ in range(3):
            assert "handler" in await refused(store)
        assert not store.available
        looks = count_looks(store)
        await until(lambda: len(looks) > 1)
    await until_stored(store)


# Logs


def log_calls(store: RedisStore, number: int = 0) -> dict[str, Any]:
    """One call of each kind, not yet awaited."""
    log, writer = LogName(CacheKey(str(number)), LOG.flight), Writer(store.replica, "00000001")
    return {
        "claim": store.claim(log, writer),
        "append": store.append([batch(writer, 0, "ab", log=log)]),
        "read": store.read(log, LOG_START, readers=1),
        "take_over": store.take_over(log, writer, behind="00000001", joinable=True),
        "release": store.release(log, writer),
        "end": store.end(log, writer, b"over"),
        "peek": store.peek(log),
        "recording_of": store.recording_of(log),
        "cancel": store.cancel(log, "a reader"),
        "store": store.store(log.key, RECORDING, ends=log, writer=writer, end=b"over"),
    }


async def test_a_store_that_is_away_refuses_all_about_logs_at_once(own_redis, open_store):
    store = await open_store(own_redis.url)
    own_redis.stop()
    await until_away(store)
    for call in log_calls(store).values():
        with pytest.raises(StoreUnavailable, match="away"):
            call.send(None)


@FAULTS
async def test_all_about_logs_fails_in_time_and_works_again(own_redis, open_store, monkeypatch, fail, mend):
    monkeypatch.setattr("gateway.store.server._PATIENT_S", 0.3)
    store = await open_store(own_redis.url, command_timeout_s=0.2)
    await until_stored(store)
    fail(own_redis)
    began = time.monotonic()
    for result in await asyncio.gather(*log_calls(store).values(), return_exceptions=True):
        assert isinstance(result, StoreUnavailable)
    assert time.monotonic() - began < 2
    mend(own_redis)
    await until_stored(store)
    writer = Writer(store.replica, "00000001")
    assert await store.append([batch(writer, 0, "ab")]) == [Appended(2)]


async def test_a_claim_has_the_deadline_of_a_lookup(own_redis, open_store):
    store = await open_store(own_redis.url, lookup_timeout_s=0.05, command_timeout_s=60)
    await until_stored(store)
    freeze(own_redis)
    with pytest.raises(StoreUnavailable, match="in time"):
        await store.claim(LOG, Writer(store.replica, "00000001"), newer_than_us=1 << 60)
    thaw(own_redis)


async def test_a_claim_that_was_answered_too_late_is_no_obstacle(own_redis, open_store):
    store = await open_store(own_redis.url, lookup_timeout_s=0.05, command_timeout_s=60)
    await until_stored(store)
    writer = Writer(store.replica, "00000001")
    freeze(own_redis)
    with pytest.raises(StoreUnavailable):
        await store.claim(LOG, writer, newer_than_us=1 << 60)
    thaw(own_redis)
    assert await store.append([batch(writer, 0, "ab")]) == [Appended(2)]


async def test_an_append_that_was_given_up_is_made_again_without_doubling(own_redis, open_store):
    store = await open_store(own_redis.url, command_timeout_s=0.2)
    await until_stored(store)
    writer = Writer(store.replica, "00000001")
    freeze(own_redis)
    with pytest.raises(StoreUnavailable):
        await store.append([batch(writer, 0, "ab")])
    thaw(own_redis)
    # The server has the first append in its ears, and may hear the second one on another connection before it.
    [appended] = await store.append([batch(writer, 0, "abc")])
    assert appended.count in (2, 3)
    await store.append([batch(writer, appended.count, "abc"[appended.count :])])
    page = await store.read(LOG, LOG_START, readers=0)
    assert b"".join(frame for entry in page.entries for frame in entry.frames) == frame("a") + frame("b") + frame("c")


class Ears:
    def __init__(self) -> None:
        self.rings = 0

    def ring(self) -> None:
        self.rings += 1


async def rings_for_an_append(store: RedisStore, ears: Ears, log: LogName = LOG) -> None:
    """It does, in the end: what was away may take a while."""
    await until(lambda: store.available)
    ears.rings = 0
    async with asyncio.timeout(10):
        while not ears.rings:
            with suppress(StoreUnavailable):
                await store.append([batch(Writer(store.replica, os.urandom(4).hex()), 0, "a", log=log)])
                await store.delete(log.key)
            await asyncio.sleep(0.02)
            log = LogName(CacheKey(os.urandom(4).hex()), log.flight)


@FAULTS
async def test_the_bell_is_heard_again_after_an_outage(own_redis, open_store, caplog, monkeypatch, fail, mend):
    monkeypatch.setattr("gateway.store.bell._PING_EVERY_S", 0.1)
    store, told = await open_store(own_redis.url, connect_timeout_s=0.3), []
    store.on_called(told.append)
    ears, others = Ears(), Ears()
    await store.listen(LOG.flight, ears.ring)
    await store.listen(OTHER_LOG.flight, others.ring)
    fail(own_redis)
    await until(lambda: store._bell._away)
    async with asyncio.timeout(0.5):
        await store.listen(OTHER_LOG.flight, others.ring)
    ears.rings = others.rings = 0
    mend(own_redis)
    await until(lambda: ears.rings > 0 and others.rings > 0)
    await rings_for_an_append(store, ears)
    await rings_for_an_append(store, others, OTHER_LOG)
    await store.append([batch(Writer(store.replica, "00000001"), 0, "ab")])
    await store.cancel(LOG, "a reader")
    await until(lambda: told == [LOG.flight])
    assert not any(record.exc_info for record in caplog.records)


async def test_who_listens_while_there_is_no_server_is_rung_when_there_is(own_redis, open_store, caplog):
    own_redis.stop()
    store = await open_store(own_redis.url)
    ears = Ears()
    async with asyncio.timeout(0.9):
        await store.listen(LOG.flight, ears.ring)
    assert ears.rings == 0
    own_redis.start()
    await until(lambda: ears.rings > 0)
    await rings_for_an_append(store, ears)
    assert len(warnings(caplog)) == 2


async def test_a_bell_that_is_never_heard_delays_no_listener_for_long(open_store):
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    store = await open_store(url, connect_timeout_s=0.2, command_timeout_s=0.2)
    async with asyncio.timeout(1):
        await store.listen(LOG.flight, Ears().ring)
    await store.close()
    server.close()


async def test_connections_are_made_without_reading_files(own_redis, open_store, monkeypatch):
    """The package's metadata takes 2 ms for each, at every reconnect."""
    read = []
    monkeypatch.setattr("redis.utils.get_lib_version", lambda: read.append("metadata") or "0")
    store = await open_store(own_redis.url)
    await until_stored(store)
    assert not read


async def test_a_client_that_loses_the_cancellation_does_not_hold_up_the_end():
    """As that of the imitation does, which tells of a time-out instead."""
    async with on_fakeredis() as backend:
        store = await backend.store(cooldown_s=300.0)
        async with asyncio.timeout(20):
            await store.close()


@pytest.mark.parametrize("protocol", [2, 3])
async def test_a_quiet_bell_stays_connected(own_redis, admin, open_store, monkeypatch, protocol):
    monkeypatch.setattr("gateway.store.bell._PING_EVERY_S", 0.02)
    store, ears = await open_store(own_redis.url, protocol=protocol), Ears()
    await store.listen(LOG.flight, ears.ring)
    pings = 0
    async with asyncio.timeout(5):
        while pings < 5:
            await asyncio.sleep(0.02)
            pings = (await admin.info("commandstats")).get("cmdstat_ping", {}).get("calls", 0)
    assert ears.rings == 0
    assert not store._bell._away


async def test_a_server_that_forbids_to_ring_costs_only_time(own_redis, admin, open_store, caplog):
    await admin.execute_command("ACL", "SETUSER", "default", "resetchannels")
    store = await open_store(own_redis.url)
    await until_stored(store)
    async with asyncio.timeout(0.9):
        await store.listen(LOG.flight, Ears().ring)
    writer = Writer(store.replica, "00000001")
    assert await store.append([batch(writer, 0, "ab")]) == [Appended(2)]
    await store.cancel(LOG, "a reader")
    await store.end(LOG, writer, b"over")
    assert (await store.read(LOG, LOG_START, readers=1)).entries[-1].end == b"over"
    await until(lambda: len(warnings(caplog)) == 1)
    assert "refuses to ring" in caplog.text


@pytest.mark.parametrize("refuse_writes", [read_only, full])
async def test_logs_of_a_server_that_refuses_writes_are_still_read(own_redis, admin, open_store, refuse_writes):
    store = await open_store(own_redis.url)
    await until_stored(store)
    writer = Writer(store.replica, "00000001")
    await store.append([batch(writer, 0, "ab")])
    await refuse_writes(admin)
    for _ in range(4):
        page = await store.read(LOG, LOG_START, readers=1)
        assert page.entries[-1].count == 2
        assert (await store.peek(LOG)).log
        with pytest.raises(StoreUnavailable):
            await store.claim(LogName(CacheKey("other"), LOG.flight), writer)
        [refused_append] = await store.append([batch(writer, 2, "c")])
        assert isinstance(refused_append, StoreUnavailable)
    assert store.available


async def test_a_full_server_lets_running_flights_keep_their_leases(own_redis, admin, open_store):
    store = await open_store(own_redis.url)
    await until_stored(store)
    writer = Writer(store.replica, "00000001")
    await store.append([batch(writer, 0, "ab")])
    await full(admin)
    await admin.pexpire(f"gw:{{{KEY}}}:lease:{LOG.flight}", 500)
    assert await store.append([batch(writer, 2)]) == [Appended(2)]
    assert (await store.read(LOG, LOG_START, readers=0)).lease_s > 1


# Through the gateway


REDIS = {"lookup_timeout_s": 0.2, "command_timeout_s": 0.5, "connect_timeout_s": 0.5, "cooldown_s": 0.1}


@pytest.fixture
def quick_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come from Redis at once, not from the flight that has just ended."""
    monkeypatch.setattr("gateway.flights._LINGER_S", 0.0)
    monkeypatch.setattr("gateway.store.server._PATIENT_S", 0.3)


async def until_hit(gateway: Any, content: str) -> None:
    async with asyncio.timeout(5):
        while True:
            await until(lambda: not gateway.service._flights._by_key)
            answer = await gateway.chat(content)
            assert answer.status == 200
            if "gateway; hit" in answer.cache_status:
                return


async def health(gateway: Any) -> str:
    async with gateway.session.get(f"{gateway.origin}/healthz") as response:
        assert response.status == 200
        return (await response.json())["store"]


@FAULTS
@pytest.mark.usefixtures("quick_to_forget")
async def test_callers_are_served_while_redis_is_away_and_hit_when_it_is_back(
    start_gateway, own_redis, upstream, fail, mend
):
    gateway = await start_gateway(redis={"url": own_redis.url, **REDIS})
    await until_hit(gateway, "before")
    assert await health(gateway) == "ok"
    fail(own_redis)
    for number in range(5):
        answer = await gateway.chat(f"during {number}" if number else "before", stream=number % 2 == 0)
        assert answer.status == 200
        assert "Hello" in answer.body.decode()
        assert "fwd=miss" in answer.cache_status
        assert "detail=store-unavailable" in answer.cache_status
    assert await health(gateway) == "unavailable"
    mend(own_redis)
    await until(lambda: gateway.store.available)
    assert await health(gateway) == "ok"
    asked = len(upstream.asked)
    await until_hit(gateway, "before")
    if fail is freeze:
        assert len(upstream.asked) == asked


async def test_a_redis_that_freezes_in_mid_stream_holds_up_no_token(start_gateway, own_redis, upstream):
    async def talk(asked: Any) -> None:
        await asked.head()
        await asked.event(chunk({"role": "assistant", "content": "one"}))
        await asked.gate("middle")
        await asked.event(chunk({"content": "two"}, "stop"))
        await asked.done()

    upstream.script = talk
    gateway = await start_gateway(redis={"url": own_redis.url, **REDIS})
    answer = asyncio.create_task(gateway.chat(stream=True))
    await upstream.gate("middle").reached.wait()
    freeze(own_redis)
    upstream.gate("middle").released.set()
    assert (await answer).events[-1] == "[DONE]"
    thaw(own_redis)


@FAULTS
@pytest.mark.usefixtures("quick_to_forget")
async def test_only_if_cached_is_503_while_redis_is_away(start_gateway, own_redis, upstream, fail, mend):
    gateway = await start_gateway(redis={"url": own_redis.url, **REDIS})
    await until_hit(gateway, "hi")
    asked = len(upstream.asked)
    fail(own_redis)
    for _ in range(4):
        answer = await gateway.chat("hi", headers={"Cache-Control": "only-if-cached"})
        assert answer.status == 503
        assert answer.json["error"]["type"] == "gateway_error"
    mend(own_redis)
    await until(lambda: gateway.store.available)
    answer = await gateway.chat("hi", headers={"Cache-Control": "only-if-cached"})
    assert answer.status == (200 if fail is freeze else 504)
    assert len(upstream.asked) == asked


@pytest.mark.usefixtures("quick_to_forget")
async def test_a_gateway_starts_without_its_redis_and_says_so(start_gateway, own_redis, caplog):
    own_redis.stop()
    gateway = await start_gateway(redis={"url": own_redis.url, **REDIS})
    assert len(warnings(caplog)) == 1
    assert "requests go on without the cache" in caplog.text
    answer = await gateway.chat()
    assert answer.status == 200
    assert "detail=store-unavailable" in answer.cache_status
    own_redis.start()
    await until(lambda: gateway.store.available)
    await until_hit(gateway, "hi")


@pytest.mark.usefixtures("quick_to_forget")
async def test_a_corrupt_recording_is_a_miss_that_says_so(start_gateway, own_redis, admin, upstream):
    gateway = await start_gateway(redis={"url": own_redis.url, **REDIS, "lookup_timeout_s": 2.0})
    await until_hit(gateway, "hi")
    [name] = [name async for name in admin.scan_iter(match="*:rec")]
    await admin.hset(name, "meta", os.urandom(100))
    asked = len(upstream.asked)
    answer = await gateway.chat("hi")
    assert answer.status == 200
    assert "detail=store-corrupt" in answer.cache_status
    await until_hit(gateway, "hi")
    assert len(upstream.asked) == asked + 1

"""A Redis Cluster: keys on several nodes, slots that move, nodes that die. `test_store_logs` runs on one as well."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
from redis import Redis
from redis.crc import key_slot
from running import RedisNodes, RedisServer, next_block
from scripted import chunk
from stores import LOG, RECORDING, batch, begun, nothing_unnoticed, until

from gateway.config import RedisConfig
from gateway.core.key import CacheKey
from gateway.errors import ConfigError, StoreError, StoreUnavailable
from gateway.ports import LOG_START, Appended, LogName, Writer
from gateway.store.redis import RedisStore, connect

KEYS = [CacheKey(f"{number:040x}") for number in range(60)]
LOGS = [LogName(key, LOG.flight) for key in KEYS]


@pytest.fixture(autouse=True)
async def nothing_goes_wrong_unnoticed(no_task_is_left: None) -> AsyncIterator[None]:
    with nothing_unnoticed():
        yield


@pytest.fixture(scope="module")
def shared_nodes(shared_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisNodes]:
    """A cluster for the tests that leave it as it is. (The other fixture knows what to do where there is no server.)"""
    nodes = RedisNodes(tmp_path_factory.mktemp("nodes"))
    nodes.start()
    yield nodes
    nodes.stop()


@pytest.fixture
def own_nodes(shared_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisNodes]:
    """A cluster of the test's own, which it may ill-treat."""
    nodes = RedisNodes(tmp_path_factory.mktemp("nodes"))
    nodes.start()
    yield nodes
    nodes.stop()


@pytest.fixture
async def open_store() -> AsyncIterator[Any]:
    async with AsyncExitStack() as stack:

        async def open_store(nodes: RedisNodes, number: int = 0, **settings: Any) -> RedisStore:
            defaults = {"lookup_timeout_s": 2.0, "command_timeout_s": 5.0, "connect_timeout_s": 5.0, "cooldown_s": 0.1}
            config = RedisConfig(**{"cluster": True, **defaults, **settings})
            client = connect(config, f"redis://127.0.0.1:{nodes.ports[number]}")
            return await stack.enter_async_context(RedisStore(client, config))

        yield open_store


def node_of(name: str) -> int:
    """Which of the three nodes has a key at first."""
    return 3 * key_slot(name.encode()) // 16384


def home(key: CacheKey) -> int:
    return node_of(f"gw:{{{key}}}:rec")


def test_the_keys_of_these_tests_are_on_all_nodes():
    assert {home(key) for key in KEYS} == {0, 1, 2}


@pytest.mark.parametrize("protocol", [2, 3])
async def test_lookups_of_one_turn_are_answered_by_all_nodes(shared_nodes, open_store, protocol):
    store = await open_store(shared_nodes, protocol=protocol, prefix=f"p{protocol}")
    assert await asyncio.gather(*(store.store(key, begun(0, key.encode())) for key in KEYS[::2])) == [True] * 30
    for patient in (False, True):
        found = await asyncio.gather(*(store.lookup(key, "whole", patient=patient) for key in KEYS))
        assert [recording and recording.body for recording in found[::2]] == [key.encode() for key in KEYS[::2]]
        assert found[1::2] == [None] * 30
    await asyncio.gather(*(store.delete(key) for key in KEYS))
    assert await asyncio.gather(*(store.lookup(key, "stream") for key in KEYS)) == [None] * 60


async def test_appends_of_one_go_are_written_by_all_nodes(shared_nodes, open_store):
    store = await open_store(shared_nodes, prefix="appends")
    writer = Writer(store.replica, "00000001")
    assert await store.append([batch(writer, 0, "ab", log=log) for log in LOGS]) == [Appended(2)] * 60
    assert await store.append([batch(writer, 2, "c", log=log) for log in LOGS]) == [Appended(3)] * 60
    pages = await asyncio.gather(*(store.read(log, LOG_START, readers=1) for log in LOGS))
    assert [page.cursor for page in pages] == ["3-1"] * 60


async def test_stores_that_know_other_nodes_agree_on_the_secret(shared_nodes, open_store):
    stores = [await open_store(shared_nodes, number, prefix="secret") for number in range(3)]
    assert len({store.secret for store in stores}) == 1
    assert all(store.available for store in stores)


async def test_the_bell_rings_for_logs_on_all_nodes(shared_nodes, open_store):
    writes, listens = await open_store(shared_nodes, 0, prefix="bell"), await open_store(shared_nodes, 1, prefix="bell")
    writer, rung, told = Writer(writes.replica, "00000001"), [], []
    writes.on_called(told.append)
    logs = [next(log for log in LOGS if node_of(f"bell:{{{log.key}}}:rec") == number) for number in range(3)]
    await listens.listen(LOG.flight, lambda: rung.append(None))
    for number, log in enumerate(logs):
        await writes.append([batch(writer, 0, "ab", log=log)])
        await until(lambda number=number: len(rung) == number + 1)
    await listens.cancel(logs[0], "a reader")
    await until(lambda: told == [LOG.flight])


def move_slot(nodes: RedisNodes, slot: int, source: int, target: int, *, finish: bool = True) -> None:
    """Moves a slot with its keys, or stops halfway: the keys are there already, the slot is not."""
    clients = [Redis(port=port) for port in nodes.ports]
    ids = [client.execute_command("CLUSTER MYID").decode() for client in clients]
    clients[target].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
    clients[source].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
    if names := clients[source].execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
        clients[source].execute_command("MIGRATE", "127.0.0.1", nodes.ports[target], "", 0, 1000, "KEYS", *names)
    if finish:
        for number in (target, source):
            clients[number].execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])
    for client in clients:
        client.close()


async def test_slots_may_move_while_they_are_used(own_nodes, open_store):
    store = await open_store(own_nodes)
    writer = Writer(store.replica, "00000001")
    key, others = KEYS[0], KEYS[1:]
    log, slot, source = LOGS[0], key_slot(f"{{{KEYS[0]}}}".encode()), home(KEYS[0])
    target = (source + 1) % 3
    await store.store(key, RECORDING)
    await store.append([batch(writer, 0, "ab", log=log)])
    move_slot(own_nodes, slot, source, target, finish=False)
    assert await store.lookup(key, "whole")
    found = await asyncio.gather(store.lookup(key, "whole"), *(store.lookup(other, "whole") for other in others))
    assert [recording is not None for recording in found] == [True] + [False] * 59
    move_slot(own_nodes, slot, source, target)
    found = await asyncio.gather(store.lookup(key, "stream"), *(store.lookup(other, "whole") for other in others))
    assert [recording is not None for recording in found] == [True] + [False] * 59
    appended = await store.append([batch(writer, 2, "c", log=log), *(batch(writer, 0, "a", log=log) for log in LOGS[1:])])
    assert appended == [Appended(3)] + [Appended(1)] * 59
    assert (await store.read(log, LOG_START, readers=1)).cursor == "3-1"
    assert store.available


async def test_a_node_that_dies_takes_only_its_own_keys_along(own_nodes, open_store, caplog):
    store = await open_store(own_nodes)
    writer, rung = Writer(store.replica, "00000001"), []
    dead = next(number for number in (0, 1, 2) if number != node_of("gw:secret"))
    await asyncio.gather(*(store.store(key, RECORDING) for key in KEYS))
    await store.listen(LOG.flight, lambda: rung.append(None))
    own_nodes.stop(dead)
    expected = [StoreUnavailable if home(key) == dead else type(RECORDING) for key in KEYS]
    for _ in range(5):
        found = await asyncio.gather(*(store.lookup(key, "whole") for key in KEYS), return_exceptions=True)
        assert [type(result) for result in found] == expected
    appended = await store.append([batch(writer, 0, "ab", log=log) for log in LOGS])
    assert [isinstance(result, StoreError) for result in appended] == [home(key) == dead for key in KEYS]
    assert store.available
    # The bell may have been on that node.
    alive = next(log for log in LOGS if home(log.key) != dead)
    rung.clear()
    async with asyncio.timeout(10):
        while not rung:
            await store.end(alive, writer, b"over")
            await store.append([batch(writer, 0, "ab", log=alive._replace(key=key)) for key in KEYS])
            await asyncio.sleep(0.02)
            with suppress(StoreUnavailable):
                await store.cancel(alive, "a reader")
    assert not any(record.exc_info for record in caplog.records)


async def test_a_cluster_that_is_not_there_holds_up_neither_start_nor_end(own_nodes, open_store, caplog):
    own_nodes.stop()
    began = time.monotonic()
    store = await open_store(own_nodes)
    assert not store.available
    with pytest.raises(StoreUnavailable):
        await store.lookup(KEYS[0], "whole")
    await store.listen(LOG.flight, lambda: None)
    await store.close()
    assert time.monotonic() - began < 3
    assert [record.levelname for record in caplog.records if record.name.startswith("gateway")] == ["WARNING"]


async def test_a_cluster_that_dies_counts_as_away(own_nodes, open_store):
    store = await open_store(own_nodes)
    await store.store(KEYS[0], RECORDING)
    own_nodes.stop()
    async with asyncio.timeout(10):
        while store.available:
            with pytest.raises(StoreUnavailable):
                await store.lookup(KEYS[0], "whole")
    with pytest.raises(StoreUnavailable, match="away"):
        store.lookup(KEYS[0], "whole").send(None)


@pytest.mark.parametrize("url", ["unix:///run/redis.sock", "redis://127.0.0.1/1", "redis://:secret@127.0.0.1/?foo=1"])
async def test_a_url_that_cannot_be_that_of_a_cluster_is_a_wrong_configuration(url):
    with pytest.raises(ConfigError, match=r"redis\.url") as caught:
        connect(RedisConfig(url=url, cluster=True), url)
    assert "secret" not in str(caught.value)


async def test_replicas_on_a_cluster_share_one_call_and_all_keys_of_it_are_in_one_slot(
    shared_nodes, start_gateway, upstream
):
    redis = {"url": shared_nodes.url, "cluster": True, "prefix": "replicas"}
    one, two = [await start_gateway(redis=redis) for _ in range(2)]

    async def say_half(asked):
        await asked.head()
        await asked.event(chunk({"content": "half"}))
        await asked.gate("half")
        await asked.event(chunk({}, "stop"))
        await asked.done()

    upstream.script = say_half
    async with one.opened(stream=True) as first, two.opened(stream=True) as second:
        assert "half" in await next_block(first)
        assert "half" in await next_block(second)
        clients = [Redis(port=port) for port in shared_nodes.ports]
        names = [name for client in clients for name in client.keys("replicas:{*")]
        for client in clients:
            client.close()
        assert {name.rpartition(b"}:")[2].partition(b":")[0] for name in names} >= {b"now", b"lease", b"log", b"req"}
        assert len({key_slot(name) for name in names}) == 1
        upstream.gate("half").released.set()
        assert await first.read() == await second.read()
    stream_id = first.headers["Gateway-Stream-Id"]
    async with two.session.get(f"{two.base_url}/streams/{stream_id}?after=1") as rest:
        assert (await rest.read()).count(b"data: ") == 2
    assert len(upstream.asked) == 1

"""A Redis Cluster: keys on several nodes, slots that move, nodes that die. `test_store_logs` runs on one as well."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
from redis import Redis
from redis.crc import key_slot
from running import RedisNodes, RedisServer, next_block
from scripted import chunk
from stores import LOG, RECORDING, batch, begun, until

from gateway.config import RedisConfig
from gateway.core.key import CacheKey
from gateway.core.purge import Purge, Selector
from gateway.errors import ConfigError, StoreError, StoreUnavailable, UnknownCursor
from gateway.ports import LOG_START, Appended, FlightId, Listed, LogName, Writer
from gateway.store.redis import RedisStore, connect

pytestmark = pytest.mark.usefixtures("nothing_goes_wrong_unnoticed")

KEYS = [CacheKey(f"{number:040x}") for number in range(60)]
LOGS = [LogName(key, LOG.flight) for key in KEYS]


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
async def test_lookups_of_one_turn_are_answered_by_all_nodes(redis_cluster, open_store, protocol):
    store = await open_store(redis_cluster, protocol=protocol, prefix=f"p{protocol}")
    assert await asyncio.gather(*(store.store(key, begun(0, key.encode())) for key in KEYS[::2])) == [True] * 30
    for patient in (False, True):
        found = await asyncio.gather(*(store.lookup(key, "whole", patient=patient) for key in KEYS))
        assert [recording and recording.body for recording in found[::2]] == [key.encode() for key in KEYS[::2]]
        assert found[1::2] == [None] * 30
    await asyncio.gather(*(store.delete(key) for key in KEYS))
    assert await asyncio.gather(*(store.lookup(key, "stream") for key in KEYS)) == [None] * 60


async def test_appends_of_one_go_are_written_by_all_nodes(redis_cluster, open_store):
    store = await open_store(redis_cluster, prefix="appends")
    writer = Writer(store.replica, "00000001")
    assert await store.append([batch(writer, 0, "ab", log=log) for log in LOGS]) == [Appended(2)] * 60
    assert await store.append([batch(writer, 2, "c", log=log) for log in LOGS]) == [Appended(3)] * 60
    pages = await asyncio.gather(*(store.read(log, LOG_START, readers=1) for log in LOGS))
    assert [page.cursor for page in pages] == ["3-1"] * 60


async def test_stores_that_know_other_nodes_agree_on_the_secret(redis_cluster, open_store):
    stores = [await open_store(redis_cluster, number, prefix="secret") for number in range(3)]
    assert len({store.secret for store in stores}) == 1
    assert all(store.available for store in stores)


async def test_the_bell_rings_for_logs_on_all_nodes(redis_cluster, open_store):
    writes, listens = await open_store(redis_cluster, 0, prefix="bell"), await open_store(redis_cluster, 1, prefix="bell")
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


async def test_who_has_the_slots_of_a_node_that_hangs_is_asked_again(redis_cluster, open_store):
    """One that is frozen breaks no connection, and by now another one may have taken its place."""
    store = await open_store(redis_cluster)
    key = KEYS[0]
    frozen = redis_cluster._processes[home(key)]
    frozen.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await store._server.wire.send([("EXISTS", store._keys.recording(key))])
        assert store._server.wire._failed.endswith(f":{redis_cluster.ports[home(key)]}")
    finally:
        frozen.send_signal(signal.SIGCONT)


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


@pytest.mark.slow
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


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.store.inventory._PAGE_NAMES", 5)


async def listed_from(store: RedisStore, cursor: str) -> list[Listed]:
    """What is on the page with this cursor, and on all after it."""
    listed, cursor = await store.page(cursor)
    while cursor:
        more, cursor = await store.page(cursor)
        listed += more
    return listed


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("protocol", [2, 3])
async def test_pages_list_what_is_on_all_nodes(redis_cluster, open_store, protocol):
    store = await open_store(redis_cluster, protocol=protocol, prefix=f"pages{protocol}")
    other = await open_store(redis_cluster, prefix=f"pages{protocol}:x")
    await asyncio.gather(*(store.store(key, RECORDING) for key in KEYS), other.store(KEYS[0], RECORDING))
    listed = await listed_from(store, "")
    assert sorted(each.key for each in listed) == KEYS
    assert all(each.meta == RECORDING.meta for each in listed)
    current = [(key, FlightId("")) for key in KEYS]
    assert await store.erase(current, began_by_us=0) == 0
    assert await store.erase(current, began_by_us=1 << 60) == 60
    assert await listed_from(store, "") == []
    assert [each.key for each in await listed_from(other, "")] == KEYS[:1]


@pytest.mark.parametrize("cursor", ["5", "16384-0--", "a-1--", "1-2"])
async def test_a_cursor_that_no_cluster_gives_is_refused_as_such(redis_cluster, open_store, cursor):
    store = await open_store(redis_cluster)
    with pytest.raises(UnknownCursor):
        await store.page(cursor)


@pytest.mark.usefixtures("small_pages")
async def test_pages_miss_nothing_though_slots_move_from_node_to_node(redis_cluster, open_store):
    """The client is not told: it learns only of slots that it asks for."""
    store = await open_store(redis_cluster, prefix="moving")
    await asyncio.gather(*(store.store(key, RECORDING) for key in KEYS))
    first, last = ([key for key in KEYS if home(key) == node] for node in (0, 2))
    moved = [key_slot(f"{{{key}}}".encode()) for key in (first[0], last[0], last[1])]
    seen, cursor = await store.page()
    try:
        move_slot(redis_cluster, moved[0], 0, 1)  # out of what is being scanned
        while not cursor.startswith("5461-"):
            more, cursor = await store.page(cursor)
            seen += more
        move_slot(redis_cluster, moved[1], 2, 0)  # to where it is all done
        move_slot(redis_cluster, moved[2], 2, 1)  # to where it is being done
        seen += await listed_from(store, cursor)
        assert {each.key for each in seen} == set(KEYS)
        # From its beginning, with all slots where they are now.
        assert {each.key for each in await listed_from(store, "")} == set(KEYS)
    finally:
        for slot, node, back in zip(moved, (1, 0, 1), (0, 2, 2), strict=True):
            move_slot(redis_cluster, slot, node, back)


@pytest.mark.usefixtures("small_pages")
async def test_a_node_in_anothers_place_is_scanned_from_its_beginning(redis_cluster, open_store):
    """A cursor says where a node is in a table of its own."""
    store = await open_store(redis_cluster, prefix="place")
    await asyncio.gather(*(store.store(key, RECORDING) for key in KEYS))
    for cursor in (f"0-5460-{'a' * 40}-7", f"0-16383-{'a' * 40}-7"):
        assert {each.key for each in await listed_from(store, cursor)} == set(KEYS)
    with pytest.raises(UnknownCursor):
        await store.page(f"16384-16384-{'a' * 40}-7")


async def test_purges_counters_and_recent_keys_are_shared_by_stores_that_know_other_nodes(redis_cluster, open_store):
    stores = [await open_store(redis_cluster, number, prefix="shared", protocol=2 + number % 2) for number in range(3)]
    for number, store in enumerate(stores):
        await store.mark(Purge(number, Selector()), life_s=60)
        await store.count({"hits": 1})
        await store.store(KEYS[number], RECORDING)
    for store in stores:
        assert [purge.at_us for purge in (await store.purges(LOG_START))[0]] == [0, 1, 2]
        assert (await store.counts())["hits"] == 3
        async with asyncio.timeout(5):
            while set(await store.recent(3)) != set(KEYS[:3]):
                await asyncio.sleep(0.002)


@pytest.mark.usefixtures("small_pages")
async def test_a_node_that_cannot_be_reached_is_not_taken_for_an_empty_one(own_nodes, open_store):
    store = await open_store(own_nodes, command_timeout_s=0.5, connect_timeout_s=0.5)
    other = await open_store(own_nodes, command_timeout_s=0.5, connect_timeout_s=0.5)
    bad = node_of("gw:recent")
    keys = [key for key in KEYS if home(key) != bad]
    await asyncio.gather(*(store.store(key, RECORDING) for key in KEYS))
    await until(lambda: store._notes is None or store._notes.done())
    own_nodes._processes[bad].send_signal(signal.SIGSTOP)
    # Nobody waits until it is noted which keys were stored last.
    began = time.monotonic()
    assert all(await asyncio.gather(*(store.store(key, begun(1, b"{}")) for key in keys)))
    assert time.monotonic() - began < 0.4
    with pytest.raises(StoreUnavailable):
        await listed_from(store, "")
    own_nodes.stop(bad)
    for _ in range(5):
        with pytest.raises(StoreUnavailable):
            await listed_from(store, "")
    with pytest.raises(StoreUnavailable):
        await other.erase([(key, FlightId("")) for key in KEYS], began_by_us=1 << 60)
    assert await asyncio.gather(*(store.lookup(key, "meta") for key in keys)) == [None] * len(keys)
    assert store.available


@pytest.mark.parametrize("url", ["unix:///run/redis.sock", "redis://127.0.0.1/1", "redis://:secret@127.0.0.1/?foo=1"])
async def test_a_url_that_cannot_be_that_of_a_cluster_is_a_wrong_configuration(url):
    with pytest.raises(ConfigError, match=r"redis\.url") as caught:
        connect(RedisConfig(url=url, cluster=True), url)
    assert "secret" not in str(caught.value)


async def test_replicas_on_a_cluster_share_one_call_and_all_keys_of_it_are_in_one_slot(
    redis_cluster, start_gateway, upstream
):
    redis = {"url": redis_cluster.url, "cluster": True, "prefix": "replicas"}
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
        clients = [Redis(port=port) for port in redis_cluster.ports]
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


@pytest.mark.slow
async def test_callers_do_not_notice_that_slots_move_under_them(own_nodes, start_gateway, upstream, monkeypatch, caplog):
    """While it is looked up, streamed and stored, with the keys on both sides of a move that is not done."""
    monkeypatch.setattr("gateway.flights._LINGER_S", 0.0)
    gateway = await start_gateway(redis={"url": own_nodes.url, "cluster": True, "prefix": "moved"})
    clients = [Redis(port=port) for port in own_nodes.ports]

    def place() -> tuple[int, int]:
        """The slot of all that is stored, and who has it."""
        [(slot, node)] = {
            (key_slot(name), node) for node, client in enumerate(clients) for name in client.keys("moved:{*}:*")
        }
        return slot, node

    async def say_hello(asked):
        await asked.head()
        await asked.event(chunk({"role": "assistant", "content": "Hello"}))
        await asked.gate("middle")
        await asked.event(chunk({}, "stop"))
        await asked.done()

    upstream.script = say_hello
    asking = asyncio.create_task(gateway.chat(stream=True))
    await upstream.gate("middle").reached.wait()
    await until(lambda: any(client.keys("moved:{*}:log:*") for client in clients))
    slot, source = place()
    target = (source + 1) % 3
    move_slot(own_nodes, slot, source, target, finish=False)
    upstream.gate("middle").released.set()
    assert (await asking).events[-1] == "[DONE]"
    await gateway.landed()
    # With keys on both sides no script runs, so it was not stored.
    for stream in (True, False):
        assert (await gateway.chat(stream=stream)).status == 200
    await gateway.landed()
    move_slot(own_nodes, slot, source, target)
    async with asyncio.timeout(10):
        for stream in (True, False):
            while "; hit" not in (answer := await gateway.chat(stream=stream)).cache_status:
                assert answer.status == 200
                await gateway.landed()
    assert place() == (slot, target)
    assert not [record for record in caplog.records if "without the cache" in record.getMessage()]
    for client in clients:
        client.close()

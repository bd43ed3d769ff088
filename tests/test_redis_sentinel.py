"""A Redis that sentinels watch over: masters that die, hang or are demoted; sentinels that are away, late or forbidding."""

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError
from running import PortedRedis
from stores import KEY, RECORDING, until

from gateway.config import RedisConfig
from gateway.errors import StoreUnavailable
from gateway.store.redis import RedisStore, connect

pytestmark = pytest.mark.usefixtures("nothing_goes_wrong_unnoticed")

Open = Callable[..., Any]
HOST = "127.0.0.1"
SERVICE = "main"
# What is near to the truth within a second: sentinels choose who leads at random moments of one.
_CONFIG = """
sentinel monitor main 127.0.0.1 {port} {quorum}
sentinel down-after-milliseconds main 200
sentinel failover-timeout main 2000
"""


class Watched:
    """Two servers, the second one a replica of the first, and sentinels."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.servers: list[PortedRedis] = []
        self.sentinels: list[PortedRedis] = []

    def start(self, sentinels: int = 1, config: str = "") -> None:
        self.servers = [PortedRedis(self._folder / f"server-{number}") for number in range(2)]
        for server in self.servers:
            server.start()
        with self.on(self.servers[0]) as master, self.on(self.servers[1]) as replica:
            master.config_set("repl-diskless-sync-delay", 0)
            replica.replicaof(HOST, self.servers[0].port)
            until_true(lambda: master.info("replication").get("slave0", {}).get("state") == "online")
            until_true(lambda: replica.info("replication")["master_link_status"] == "up")
        config = _CONFIG.format(port=self.servers[0].port, quorum=sentinels // 2 + 1) + config
        for number in range(sentinels):
            self.sentinels.append(sentinel := PortedRedis(self._folder / f"sentinel-{number}", config=config))
            sentinel.start()

    def until_known(self) -> None:
        """Whether the sentinels know all that they need to agree on another master."""
        others = len(self.sentinels) - 1
        for sentinel in self.sentinels:
            with self.on(sentinel) as asked:
                until_true(lambda asked=asked: [each["flags"] for each in asked.sentinel_slaves(SERVICE)] == ["slave"])
                until_true(lambda asked=asked: len(asked.sentinel_sentinels(SERVICE)) == others)

    @staticmethod
    def on(server: PortedRedis, **options: Any) -> Redis:
        return Redis(host=HOST, port=server.port, protocol=2, **options)

    def url(self, *options: str, before: tuple[int, ...] = ()) -> str:
        ports = [*before, *(sentinel.port for sentinel in self.sentinels)]
        hosts = ",".join(f"{HOST}:{port}" for port in ports)
        return f"redis+sentinel://{hosts}/{SERVICE}" + ("?" + "&".join(options) if options else "")

    def announced(self) -> int:
        with self.on(self.sentinels[0]) as sentinel:
            return int(sentinel.sentinel_get_master_addr_by_name(SERVICE)[1])

    def stop(self) -> None:
        for server in [*self.sentinels, *self.servers]:
            server.stop()


def until_true(condition: Callable[[], Any], within_s: float = 15.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def watched(shared_redis: Any, tmp_path: Path) -> Iterator[Watched]:
    """Yet to be started."""
    watched = Watched(tmp_path)
    yield watched
    watched.stop()


@pytest.fixture
async def open_store() -> AsyncIterator[Open]:
    async with AsyncExitStack() as stack:

        async def open_store(url: str, **settings: Any) -> RedisStore:
            defaults = {"lookup_timeout_s": 2.0, "command_timeout_s": 5.0, "connect_timeout_s": 1.0, "cooldown_s": 0.1}
            config = RedisConfig(url=url, **{**defaults, **settings})
            return await stack.enter_async_context(RedisStore(connect(config, url), config))

        yield open_store


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def until_stored(store: RedisStore) -> None:
    await until(lambda: store.available)
    await store.store(KEY, RECORDING)
    assert await store.lookup(KEY, "whole")


GATEWAY = {"lookup_timeout_s": 0.2, "command_timeout_s": 0.5, "connect_timeout_s": 0.5, "cooldown_s": 0.5}


async def asked_until_hit(gateway: Any, content: str, within_s: float) -> list[str]:
    """Asks all the time, streaming and not; tells each ``Cache-Status`` up to the first hit."""
    seen: list[str] = []
    async with asyncio.timeout(within_s):
        while not seen or "; hit" not in seen[-1]:
            stream = len(seen) % 2 == 0
            answer = await gateway.chat(content, stream=stream)
            assert answer.status == 200
            assert answer.events[-1] == "[DONE]" if stream else "Hello" in answer.body.decode()
            seen.append(answer.cache_status)
            await asyncio.sleep(0.01)
    return seen


@pytest.fixture
def quick_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come from Redis at once, not from the flight that has just ended."""
    monkeypatch.setattr("gateway.flights._LINGER_S", 0.0)


@pytest.mark.usefixtures("quick_to_forget")
@pytest.mark.parametrize(
    "sentinels", [1, pytest.param(3, marks=pytest.mark.slow)]
)  # three take seconds until they know each other
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_callers_do_not_notice_a_failover_and_hit_after_it(start_gateway, watched, caplog, sentinels, fault):
    watched.start(sentinels)
    watched.until_known()
    old, new = watched.servers
    gateway = await start_gateway(redis={"url": watched.url(), **GATEWAY})
    await asked_until_hit(gateway, "before", 5)
    old.signal(fault)
    asking = asyncio.create_task(keep_asking(gateway, lambda: watched.announced() == new.port))
    await asking
    # A second until it is looked for, and as much for a machine that is busy.
    await asked_until_hit(gateway, "after", 2 + 2)
    await gateway.landed()  # a hit may be of what is still on its way there
    assert gateway.store.available
    assert len([text for text in warnings(caplog) if "without the cache" in text]) <= 1
    with watched.on(new) as redis:
        assert redis.keys("*:rec")
    if fault == signal.SIGSTOP:
        old.signal(signal.SIGCONT)


async def keep_asking(gateway: Any, ended: Callable[[], bool]) -> None:
    """New questions, as long as it takes: none waits for long."""
    number = 0
    while not await asyncio.to_thread(ended):
        async with asyncio.timeout(5):
            answer = await gateway.chat(f"during {number}", stream=number % 2 == 0)
        assert answer.status == 200
        assert "Hello" in answer.body.decode() or answer.events[-1] == "[DONE]"
        number += 1


@pytest.mark.slow
async def test_a_demoted_master_has_none_of_our_connections(watched, open_store):
    """It is told of it seconds later, and takes writes until then, which are lost."""
    watched.start()
    watched.until_known()
    old, new = watched.servers
    store = await open_store(watched.url("client_name=us"))
    await asyncio.gather(until_stored(store), *(store.lookup(KEY, "stream") for _ in range(8)))
    with watched.on(watched.sentinels[0]) as sentinel:
        until_true(lambda: begins_failover(sentinel))
    await until(lambda: watched.announced() == new.port, within_s=15)
    async with asyncio.timeout(5):
        while not await is_stored(store, new, watched):
            await asyncio.sleep(0.02)
    with watched.on(old) as redis:
        until_true(lambda: not [client for client in redis.client_list() if client["name"] == "us"])


def begins_failover(sentinel: Redis) -> bool:
    """Not if it has not heard of the replica lately."""
    try:
        sentinel.execute_command("SENTINEL", "FAILOVER", SERVICE)
    except ResponseError:
        return False
    return True


async def is_stored(store: RedisStore, server: PortedRedis, watched: Watched) -> bool:
    try:
        await store.store(KEY, RECORDING)
    except StoreUnavailable:
        return False
    with watched.on(server) as redis:
        return redis.role()[0] == b"master" and redis.exists(f"gw:{{{KEY}}}:rec") == 1


@pytest.mark.usefixtures("quick_to_forget")
async def test_what_sentinels_still_take_for_the_master_is_asked_itself(start_gateway, watched, caplog):
    """They notice late that one was demoted behind their back."""
    watched.start()
    old, new = watched.servers
    gateway = await start_gateway(redis={"url": watched.url("client_name=us"), **GATEWAY, "cooldown_s": 0.1})
    await asked_until_hit(gateway, "before", 5)
    watched.sentinels[0].signal(signal.SIGSTOP)
    with watched.on(old) as redis, watched.on(new) as other:
        other.replicaof("NO", "ONE")
        redis.replicaof(HOST, new.port)
        watched.sentinels[0].signal(signal.SIGCONT)
        number = 0
        while gateway.store.available:
            assert (await gateway.chat(f"new {number}")).status == 200
            await gateway.landed()
            number += 1
            assert number < 50
        assert not [client for client in redis.client_list() if client["name"] == "us" and client["sub"] == "0"]
        redis.replicaof("NO", "ONE")
    await asked_until_hit(gateway, "after", 2 + 2)
    assert len([text for text in warnings(caplog) if "without the cache" in text]) == 1


@pytest.mark.parametrize("silent", [False, True])
async def test_sentinels_that_are_away_hold_up_nothing_while_one_answers(watched, open_store, silent):
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    watched.start()
    server = await asyncio.start_server(say_nothing, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    if not silent:
        server.close()
    store = await open_store(watched.url(before=(port,)))
    assert store.available
    await until_stored(store)
    server.close()
    await store.close()
    await server.wait_closed()


async def test_sentinels_that_are_away_at_start_are_found_later(watched, open_store, caplog):
    watched.start()
    watched.sentinels[0].stop()
    store = await open_store(watched.url())
    assert not store.available
    [warning] = warnings(caplog)
    assert "no sentinel knows a master 'main'" in warning
    watched.sentinels[0].start()
    await until_stored(store)
    assert warnings(caplog)[1:] == ["Redis is back"]


async def test_sentinels_that_go_away_later_are_not_missed(watched, open_store):
    watched.start()
    store = await open_store(watched.url())
    await until_stored(store)
    watched.sentinels[0].stop()
    for _ in range(4):
        await until_stored(store)


async def test_a_service_that_no_sentinel_knows_is_told(watched, open_store, caplog):
    watched.start()
    store = await open_store(watched.url().replace(f"/{SERVICE}", "/other"))
    assert not store.available
    [warning] = warnings(caplog)
    assert "'other'" in warning
    assert "No such master" in warning


@pytest.mark.parametrize("protocol", [2, 3])
async def test_sentinels_and_master_have_passwords_of_their_own(watched, open_store, caplog, protocol):
    watched.start(config="requirepass watching\nsentinel auth-pass main mastering\n")
    with watched.on(watched.servers[0]) as master:
        master.config_set("masterauth", "mastering")
        master.config_set("requirepass", "mastering")
    url = watched.url("sentinel_password=watching").replace("://", "://:mastering@")
    good = await open_store(url, protocol=protocol)
    await until_stored(good)
    for wrong in ("watching", "mastering"):
        caplog.clear()
        bad = await open_store(url.replace(wrong, "hunter2"), protocol=protocol)
        assert not bad.available
        assert len(warnings(caplog)) == 1
        assert "hunter2" not in caplog.text


async def test_no_connection_is_left_to_servers_or_sentinels(watched, open_store):
    watched.start()
    store = await open_store(watched.url("client_name=us"))
    await until_stored(store)
    await store.close()
    for server in (watched.servers[0], watched.sentinels[0]):
        with watched.on(server) as redis:
            until_true(lambda redis=redis: len([each for each in redis.client_list() if is_client(each)]) == 1)


def is_client(connection: dict[str, str]) -> bool:
    """Not a replica, and not a sentinel's."""
    return connection["flags"] in {"N", "P"} and not connection["name"].startswith("sentinel-")

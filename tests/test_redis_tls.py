"""Redis over TLS: authorities, our certificate, names, and certificates that are no good; also cluster and sentinel."""

import asyncio
import datetime as dt
import logging
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis.asyncio.connection import SSLConnection
from running import PortedRedis, RedisNodes, find_redis
from stores import KEY, LOG, RECORDING, until

from gateway.config import RedisConfig
from gateway.core.key import CacheKey
from gateway.errors import ConfigError
from gateway.store.redis import RedisStore, connect

pytestmark = pytest.mark.usefixtures("nothing_goes_wrong_unnoticed")

Open = Callable[..., Any]
HOST = "127.0.0.1"
LONG_AGO = dt.datetime(2001, 1, 1, tzinfo=dt.UTC)


@dataclass
class Files:
    """What a side has: its certificate and key, and who it trusts."""

    cert: str
    key: str
    ca: str

    @classmethod
    def issue(cls, folder: Path, authority: trustme.CA, *names: str, **terms: Any) -> "Files":
        folder.mkdir()
        issued = authority.issue_cert(*names, **terms)
        files = cls(*(str(folder / f"{name}.pem") for name in ("cert", "key", "ca")))
        issued.cert_chain_pems[0].write_to_path(files.cert)
        issued.private_key_pem.write_to_path(files.key)
        authority.cert_pem.write_to_path(files.ca)
        return files

    @property
    def of_server(self) -> list[str]:
        return ["--tls-cert-file", self.cert, "--tls-key-file", self.key, "--tls-ca-cert-file", self.ca]

    @property
    def of_client(self) -> dict[str, str]:
        return {"tls_cert_file": self.cert, "tls_key_file": self.key, "tls_ca_file": self.ca}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def good(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files.issue(tmp_path_factory.mktemp("tls") / "good", authority, HOST)


@pytest.fixture(scope="module", autouse=True)
def _server_knows_tls(shared_redis: Any) -> None:
    program = find_redis()
    said = subprocess.run([program, "--tls-auth-clients", "perhaps"], capture_output=True, timeout=10, check=False)
    if b"one of the following" not in said.stdout + said.stderr:
        if os.environ.get("CI"):
            pytest.fail("CI must have a Redis server with TLS")
        pytest.skip("the Redis server here has no TLS")


StartServer = Callable[..., PortedRedis]


def tls_server(folder: Path, files: Files, clients: str) -> PortedRedis:
    options = ["--port", "0", "--tls-port", "PORT", *files.of_server, "--tls-auth-clients", clients]
    return PortedRedis(folder, *options)


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts a server over TLS; ``clients="yes"``: whose clients must have a certificate."""
    started = []

    def start(files: Files, clients: str = "no") -> PortedRedis:
        server = tls_server(tmp_path / f"server-{len(started)}", files, clients)
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture
async def open_store() -> AsyncIterator[Open]:
    async with AsyncExitStack() as stack:

        async def open_store(url: str, **settings: Any) -> RedisStore:
            defaults = {"lookup_timeout_s": 2.0, "command_timeout_s": 5.0, "connect_timeout_s": 2.0, "cooldown_s": 0.1}
            config = RedisConfig(url=url, **{**defaults, **settings})
            return await stack.enter_async_context(RedisStore(connect(config, url), config))

        yield open_store


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def works(store: RedisStore) -> None:
    """All of it: recordings, and the bell on its own connection."""
    await until(lambda: store.available)
    await store.store(KEY, RECORDING)
    assert (await store.lookup(KEY, "whole")).body == RECORDING.body
    rung: list[None] = []
    await store.listen(LOG.flight, lambda: rung.append(None))
    await store.cancel(LOG, "a reader")
    await until(lambda: bool(rung))


@pytest.mark.parametrize("protocol", [2, 3])
async def test_a_server_with_a_certificate_of_ones_own_authority(start_server, open_store, good, protocol):
    server = start_server(good)
    store = await open_store(f"rediss://{HOST}:{server.port}", tls_ca_file=good.ca, protocol=protocol)
    assert store.available
    await works(store)


async def test_a_server_that_asks_for_a_certificate(start_server, open_store, good, caplog):
    server = start_server(good, "yes")
    with_one = await open_store(f"rediss://{HOST}:{server.port}", **good.of_client)
    await works(with_one)
    assert warnings(caplog) == []
    without = await open_store(f"rediss://{HOST}:{server.port}", tls_ca_file=good.ca)
    assert not without.available
    assert len(warnings(caplog)) == 1


@pytest.fixture(params=["authority", "expired", "name", "plain"])
def bad(request: pytest.FixtureRequest, authority: trustme.CA, tmp_path: Path) -> tuple[str, Files | None]:
    """What is wrong, as it is told, and the files of such a server."""
    folder = tmp_path / "bad"
    if request.param == "authority":
        return "self-signed certificate", Files.issue(folder, trustme.CA(), HOST)
    if request.param == "expired":
        return "certificate has expired", Files.issue(folder, authority, HOST, not_before=LONG_AGO, not_after=LONG_AGO)
    if request.param == "name":
        return "IP address mismatch", Files.issue(folder, authority, "somewhere.example")
    return "", None


async def test_a_certificate_that_is_no_good_is_told_once_and_nobody_sees_an_error(
    start_gateway, start_server, good, bad, tmp_path, caplog
):
    told, files = bad
    server = start_server(files) if files else PortedRedis(tmp_path / "plain")
    if not files:
        server.start()
    settings = {
        "cooldown_s": 0.05,
        "connect_timeout_s": 0.3,
        "tls_ca_file": good.ca,
        "url": f"rediss://me:hunter2@{HOST}:{server.port}",
    }
    gateway = await start_gateway(redis=settings)
    looks = count_looks(gateway.store)
    for number in range(4):
        answer = await gateway.chat(str(number), stream=number % 2 == 0)
        assert answer.status == 200
        assert "detail=store-unavailable" in answer.cache_status
    await until(lambda: len(looks) > 2)
    [warning] = warnings(caplog)
    assert told in warning
    assert "hunter2" not in caplog.text
    server.stop()


def count_looks(store: RedisStore) -> list[None]:
    looks: list[None] = []
    look = store._server._look

    async def counted() -> None:
        looks.append(None)
        await look()

    store._server._look = counted  # type: ignore[method-assign]
    return looks


async def test_who_must_need_not_verify(start_server, open_store, authority, good, tmp_path):
    elsewhere = start_server(Files.issue(tmp_path / "elsewhere", authority, "somewhere.example"))
    url = f"rediss://{HOST}:{elsewhere.port}"
    assert (await open_store(url, tls_ca_file=good.ca, tls_server_name="somewhere.example")).available
    assert not (await open_store(url, tls_ca_file=good.ca, tls_server_name="somewhere.else.example")).available
    assert (await open_store(url, tls_ca_file=good.ca, tls_verify="ca")).available
    assert not (await open_store(url, tls_verify="ca")).available
    assert (await open_store(url, tls_verify="none")).available
    assert (await open_store(f"{url}?ssl_cert_reqs=none", tls_ca_file=good.ca)).available


async def test_a_server_that_comes_back_with_a_good_certificate_is_found(
    start_server, open_store, authority, good, tmp_path
):
    server = start_server(Files.issue(tmp_path / "bad", authority, HOST, not_before=LONG_AGO, not_after=LONG_AGO))
    store = await open_store(f"rediss://{HOST}:{server.port}", tls_ca_file=good.ca)
    assert not store.available
    server.stop()
    mended = tls_server(tmp_path / "mended", good, "no")
    mended.port = server.port
    mended.start()
    await works(store)
    mended.stop()


async def test_all_connections_share_one_context(start_server, open_store, good, monkeypatch):
    """Reading the system's authorities for each would hold up all streams for milliseconds."""
    made = []
    original = SSLConnection._connection_arguments

    def seen(self):
        arguments = original(self)
        made.append(arguments["ssl"])
        return arguments

    monkeypatch.setattr(SSLConnection, "_connection_arguments", seen)
    server = start_server(good)
    store = await open_store(f"rediss://{HOST}:{server.port}", tls_ca_file=good.ca)
    await asyncio.gather(store.lookup(KEY, "whole"), store.delete(KEY), store.store(CacheKey("other"), RECORDING))
    assert len(made) > 1
    assert len(set(map(id, made))) == 1


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize(("key", "text"), [("tls_ca_file", "No such file"), ("tls_cert_file", "No such file")])
async def test_a_file_that_is_not_there_is_a_wrong_configuration(key, text, cluster):
    config = RedisConfig(url="rediss://localhost", cluster=cluster, **{key: "/nowhere/x.pem"})
    with pytest.raises(ConfigError, match=rf"^redis\.{key}: cannot be read: {text}"):
        connect(config, config.url)


@pytest.mark.parametrize("url", ["rediss://localhost", "rediss+sentinel://localhost/main"])
async def test_a_file_that_holds_something_else_is_a_wrong_configuration(url, good, tmp_path):
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("garbage")
    for settings in ({"tls_ca_file": str(garbage)}, {"tls_cert_file": good.cert, "tls_key_file": str(garbage)}):
        config = RedisConfig(url=url, **settings)
        with pytest.raises(ConfigError, match="the files for TLS do not load"):
            connect(config, config.url)


@pytest.fixture
def tls_nodes(good: Files, tmp_path: Path) -> Iterator[RedisNodes]:
    files = {"host": HOST, "ssl": True, "ssl_ca_certs": good.ca, "ssl_certfile": good.cert, "ssl_keyfile": good.key}
    nodes = RedisNodes(tmp_path, good.of_server, **files)
    nodes.start()
    yield nodes
    nodes.stop()


async def test_a_cluster_over_tls(tls_nodes, open_store, good):
    store = await open_store(tls_nodes.url, cluster=True, **good.of_client)
    await works(store)
    keys = [CacheKey(f"{number:040x}") for number in range(30)]
    assert await asyncio.gather(*(store.store(key, RECORDING) for key in keys)) == [True] * 30
    assert all(await asyncio.gather(*(store.lookup(key, "whole") for key in keys)))


async def test_a_master_and_its_sentinel_over_tls(start_server, open_store, good, tmp_path):
    server = start_server(good, "yes")
    config = f"tls-replication yes\nsentinel monitor main {HOST} {server.port} 1\n"
    options = ["--port", "0", "--tls-port", "PORT", *good.of_server]
    sentinel = PortedRedis(tmp_path / "sentinel", *options, config=config)
    sentinel.start()
    store = await open_store(f"rediss+sentinel://{HOST}:{sentinel.port}/main", **good.of_client)
    await works(store)
    sentinel.stop()

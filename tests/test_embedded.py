"""The embedded server: it serves nobody but us, ends with us, and its data stay where they are told to."""

import asyncio
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError
from served import Served, gone
from stores import until

from gateway.errors import StoreUnavailable
from gateway.store import embedded
from gateway.store.embedded import EmbeddedServer, server_binary

BYTES = 50_000_000


@pytest.fixture(autouse=True)
def needs_a_server() -> None:
    try:
        server_binary()
    except StoreUnavailable:
        if os.environ.get("CI"):
            raise
        pytest.skip("there is no embedded server here")


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="gw") as directory:
        yield Path(directory)


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise StoreUnavailable("no embedded server for this platform")

    monkeypatch.setattr(embedded, "server_binary", fail)


async def ask(server: EmbeddedServer, *command: Any) -> Any:
    async with Redis.from_url(server.url) as client:
        return await client.execute_command(*command)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def until_it_answers(server: EmbeddedServer) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                await ask(server, "PING")
            except (RedisError, OSError):
                await asyncio.sleep(0.01)
            else:
                return


@pytest.mark.usefixtures("no_task_is_left")
async def test_it_listens_on_a_socket_of_ours_only_and_leaves_nothing_behind():
    async with EmbeddedServer(None, BYTES) as server:
        socket = Path(server.url.removeprefix("unix://"))
        pid = server._process.pid
        assert await ask(server, "CONFIG", "GET", "port") == {b"port": b"0"}
        assert mode(socket) == mode(socket.parent) == 0o700
        assert await ask(server, "CONFIG", "GET", "maxmemory") == {b"maxmemory": b"%d" % BYTES}
    assert gone(pid)
    assert not socket.parent.exists()


async def test_it_is_told_nothing_of_our_environment_which_holds_secrets(short, monkeypatch):
    real = server_binary()
    (told := short / "server").write_text(f'#!/bin/sh\n/usr/bin/env > {short}/told\nexec {real} "$@"\n')
    told.chmod(0o700)
    monkeypatch.setattr(embedded, "server_binary", lambda: told)
    monkeypatch.setenv("SOME_KEY", "sk-0123456789")
    async with EmbeddedServer(None, BYTES):
        assert "PWD=" in (environ := (short / "told").read_text())
        assert "sk-0123456789" not in environ


async def test_what_has_no_life_is_never_evicted_and_all_else_may_be():
    async with EmbeddedServer(None, 8_000_000) as server:
        await ask(server, "SET", "secret", "s")
        for number in range(200):
            await ask(server, "SET", f"k{number}", b"x" * 100_000, "PX", 60_000)
        assert await ask(server, "GET", "secret") == b"s"
        assert 1 < await ask(server, "DBSIZE") < 150


@pytest.mark.parametrize("name", ["data", "two words", "a/b"])
async def test_with_a_directory_the_data_survive_a_restart(short, name):
    for expected in (None, b"v"):
        async with EmbeddedServer(short / name, BYTES) as server:
            assert await ask(server, "GET", "k") == expected
            await ask(server, "SET", "k", "v")
    assert mode(short / name) == 0o700


@pytest.mark.parametrize("name", ["data", "~/data"])
async def test_the_directory_may_be_given_as_a_shell_would_take_it(short, monkeypatch, name):
    monkeypatch.chdir(short)
    monkeypatch.setenv("HOME", str(short))
    async with EmbeddedServer(Path(name), BYTES) as server:
        await until_it_answers(server)
    assert (short / "data" / "dump.rdb").exists() or (short / "data" / "valkey.log").exists()
    assert [each.name for each in short.iterdir()] == ["data"]


async def test_those_who_name_the_same_directory_share_one_server_even_if_they_start_together(short):
    servers = [EmbeddedServer(short, BYTES) for _ in range(5)]
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(server) for server in servers))
        assert [server._process for server in servers].count(None) == 4
        await ask(servers[0], "SET", "k", "v")
        assert await ask(servers[4], "GET", "k") == b"v"


async def test_a_shared_server_goes_on_when_the_one_who_started_it_ends(short, monkeypatch):
    monkeypatch.setattr(embedded, "_LOOK_EVERY_S", 0.02)
    first = await EmbeddedServer(short, BYTES).__aenter__()
    async with EmbeddedServer(short, BYTES) as second:
        assert second._process is None
        await ask(first, "SET", "k", "v")
        await first.__aexit__(None, None, None)
        await until_it_answers(second)
        assert await ask(second, "GET", "k") == b"v"


async def test_a_server_that_breaks_is_started_again(monkeypatch):
    monkeypatch.setattr(embedded, "_LOOK_EVERY_S", 0.02)
    async with EmbeddedServer(None, BYTES) as server:
        pid = server._process.pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: server._process.pid != pid)
        await until_it_answers(server)


async def test_a_socket_that_a_killed_server_left_does_not_stand_in_the_way(short, monkeypatch):
    monkeypatch.setattr(embedded, "_LOOK_EVERY_S", 60)
    for _ in range(2):
        async with EmbeddedServer(short, BYTES) as server:
            await until_it_answers(server)
            server._process.kill()
            server._process.wait()
    assert (short / "valkey.sock").exists()


async def refusal(directory: Path | None) -> str:
    with pytest.raises(StoreUnavailable) as caught:
        await EmbeddedServer(directory, BYTES).__aenter__()
    return str(caught.value)


async def test_a_path_that_is_too_long_for_a_socket_is_refused_as_such(short):
    assert "too long" in await refusal(short / ("x" * 100))


async def test_a_directory_that_cannot_be_made_is_refused_as_such(short):
    (short / "file").touch()
    assert str(short / "file") in await refusal(short / "file" / "data")


async def test_data_that_do_not_load_are_told_in_the_servers_own_words(short):
    (short / "dump.rdb").write_bytes(b"REDIS0011 and then rubbish")
    assert "Fatal error" in await refusal(short)


@pytest.mark.usefixtures("no_wheel")
async def test_without_the_wheel_nothing_is_left_behind(short, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    assert "no embedded server" in await refusal(None)
    assert list(short.iterdir()) == []


async def test_a_temporary_directory_that_cannot_be_made_is_refused_as_such(short, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(short / "nowhere"))
    assert "nowhere" in await refusal(None)


async def assert_it_serves_in_process(gateway: Any, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert reason in warning
    assert "kept in this process" in warning
    assert "fwd=miss" in (await gateway.chat(stream=True)).cache_status
    assert "gateway; hit" in (await gateway.chat()).cache_status


@pytest.mark.usefixtures("no_wheel")
async def test_without_the_wheel_the_gateway_keeps_its_cache_itself_and_says_so(start_gateway, caplog):
    gateway = await start_gateway(redis={"url": "embedded"})
    await assert_it_serves_in_process(gateway, caplog, "no embedded server")


async def test_without_its_directory_the_gateway_keeps_its_cache_itself_and_says_so(start_gateway, caplog, short):
    (short / "file").touch()
    gateway = await start_gateway(redis={"url": "embedded", "embedded_dir": str(short / "file")})
    await assert_it_serves_in_process(gateway, caplog, str(short / "file"))


@on_linux
def test_it_ends_with_its_parent_even_if_that_is_killed(short):
    with Served(short) as served:
        assert "embedded Valkey" in served.said
        [child] = served.children
        served.end(signal.SIGKILL)
        assert gone(child)


@on_linux
def test_it_is_ended_by_a_gateway_that_is_told_to_end(short):
    with Served(short) as served:
        [child] = served.children
        assert "fwd=miss" in served.chat()[0]
        assert "gateway; hit" in served.chat()[0]
        [directory] = short.glob("gateway-*")
        assert (directory / "valkey.sock").exists()
        assert served.end(signal.SIGTERM) == 0
        assert gone(child)
        assert not directory.exists()


@on_linux
def test_a_gateways_directory_keeps_its_cache_and_serves_a_second_one(short):
    environ = {"GATEWAY_REDIS_EMBEDDED_DIR": "cache"}
    with Served(short, **environ) as first:
        assert "fwd=miss" in first.chat()[0]
        with Served(short, **environ) as second:
            assert second.children == []
            assert "gateway; hit" in second.chat()[0]
            assert second.end() == 0
        assert first.end() == 0
    with Served(short, **environ) as third:
        assert "gateway; hit" in third.chat()[0]
        assert third.end() == 0

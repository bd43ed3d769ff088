"""Fixtures: a real Redis, a scripted upstream, and the gateway on a real socket with production's options."""

import asyncio
import gc
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from running import Gateway, RedisNodes, RedisServer, find_redis, run_gateway
from scripted import ScriptedUpstream
from stores import Backend, Proxy, embedded_server, nothing_unnoticed, on_any, on_server

from gateway.config import load


def pytest_collection_finish() -> None:
    """What all tests share stays: full collections of it stopped a test for up to a second, as a fault would."""
    gc.collect()
    gc.freeze()


def _needs_redis() -> None:
    if find_redis() is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have a Redis server")
        pytest.skip("there is no Redis server here")


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for the tests that leave it alone; they choose a prefix of their own."""
    _needs_redis()
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, which it may ill-treat."""
    _needs_redis()
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def embedded_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with embedded_server(tmp_path_factory) as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisNodes]:
    """A cluster for the tests that leave it as it is."""
    _needs_redis()
    nodes = RedisNodes(tmp_path_factory.mktemp("nodes"))
    nodes.start()
    yield nodes
    nodes.stop()


@pytest.fixture(params=["shared_redis", "embedded_redis"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """Servers that can be watched."""
    async with on_server(request.getfixturevalue(request.param)) as backend:
        yield backend


@pytest.fixture(params=["fakeredis", "shared_redis", "embedded_redis", "redis_cluster"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """All that the store has to work on."""
    async with on_any(request) as backend:
        yield backend


@pytest.fixture
async def nothing_goes_wrong_unnoticed(no_task_is_left: None) -> AsyncIterator[None]:
    with nothing_unnoticed():
        yield


@pytest.fixture
async def no_task_is_left() -> AsyncIterator[None]:
    """A task that outlives its test is a leak."""
    before = asyncio.all_tasks()
    yield
    left = {task for task in asyncio.all_tasks() - before - {asyncio.current_task()} if not task.done()}
    if left:
        # Transports and servers of the test's own end a turn or two after they are closed.
        _, left = await asyncio.wait(left, timeout=2.0)
    assert not left


@pytest.fixture
async def upstream(no_task_is_left: None) -> AsyncIterator[ScriptedUpstream]:
    scripted = ScriptedUpstream()
    await scripted.start()
    yield scripted
    await scripted.stop()
    assert not scripted.errors


@pytest.fixture
async def proxy(own_redis, no_task_is_left: None) -> AsyncIterator[Proxy]:
    proxy = Proxy()
    await proxy.start(own_redis.url.removeprefix("unix://"))
    yield proxy
    await proxy.stop()


StartGateway = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def start_gateway(
    shared_redis: RedisServer, upstream: ScriptedUpstream, tmp_path: Path
) -> AsyncIterator[StartGateway]:
    """Starts a gateway in this process: sections as keyword arguments are laid over the test's defaults."""
    async with AsyncExitStack() as stack:

        async def start(environ: dict[str, str] | None = None, **sections: Any) -> Gateway:
            prefix = f"t{os.urandom(6).hex()}"
            values: dict[str, Any] = {
                "redis": {"url": shared_redis.url, "prefix": prefix, "lookup_timeout_s": 2.0},
                "log": {"access": False},
                "retries": {"max_retries": 0},
                "upstreams": [upstream.configured()],
            }
            for name, section in sections.items():
                values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
            empty = tmp_path / "empty.toml"
            empty.touch()
            lists = {name: json.dumps(values.pop(name)) for name in ("models", "upstreams") if name in values}
            variables = {f"GATEWAY_{name.upper()}": text for name, text in lists.items()}
            loaded = load(empty, {**variables, **(environ or {})}, values)
            return await run_gateway(stack, loaded)

        yield start

"""A rolling restart of three replicas under load: what the callers notice of it."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest
from running import RedisServer
from served import Served, variables

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

REPLICAS, CALLERS = 3, 24
PATIENCE_S = 30.0
SIMULATED = {"name": "s", "kind": "simulated", "models": ["*"], "ttft_s": 0.05, "tokens_per_s": 60.0, "length_tokens": 60}


class Fleet:
    """Replicas that are restarted in place, each on its own port."""

    def __init__(self, redis: RedisServer, directory: Path, *, grace_s: str, workers: str) -> None:
        settings = {
            "redis_url": redis.url,
            "redis_prefix": f"t{os.urandom(6).hex()}",
            "redis_lookup_timeout_s": "2",
            "flights_lease_s": "30",  # no lease runs out: who goes on with a call was told to
            "log_access": "false",
            "server_shutdown_grace_s": grace_s,
            "upstreams": json.dumps([SIMULATED]),
        }
        self._environ = variables(**settings)
        self._directory = directory
        self._workers = workers
        self.replicas = [self._start() for _ in range(REPLICAS)]

    def _start(self, port: str = "0") -> Served:
        return Served(self._directory, "--port", port, "--workers", self._workers, **self._environ)

    def restart(self, place: int) -> None:
        served = self.replicas[place]
        assert served.end(signal.SIGTERM) == 0
        assert "Traceback" not in served.said
        with served:
            pass
        port = served.base_url.rsplit(":", 1)[-1].removesuffix("/v1")
        self.replicas[place] = self._start(port)

    def stop(self) -> None:
        for served in self.replicas:
            with served:
                pass


class Balancer:
    """Sends each request to the next replica that takes connections, and resumes streams that are told to."""

    def __init__(self, fleet: Fleet, session: aiohttp.ClientSession) -> None:
        self._fleet = fleet
        self._session = session
        self._turn = 0
        self.streams = 0
        self.resumed = 0
        self.refused = 0

    async def stream(self, content: str) -> list[str]:
        """The data of all events of an answer."""
        body = {"model": "any", "stream": True, "messages": [{"role": "user", "content": content}]}
        events, token = await self._events("POST", "chat/completions", json=body)
        while events[-1] != "[DONE]":
            error = json.loads(events.pop())["error"]
            assert error["code"] == "shutting_down", (error, events)
            self.resumed += 1
            rest, token = await self._events("GET", f"streams/{token}", params={"after": str(len(events))})
            events += rest
        self.streams += 1
        return events

    async def _events(self, method: str, path: str, **arguments: object) -> tuple[list[str], str]:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                self._turn += 1
                base_url = self._fleet.replicas[self._turn % REPLICAS].base_url
                # Who accepts no connection has lost nothing; any other failure fails the test.
                with suppress(aiohttp.ClientConnectorError):
                    async with self._session.request(method, f"{base_url}/{path}", **arguments) as response:
                        text = await response.text()
                        if response.status != 503:
                            assert response.status == 200, text
                            lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
                            return lines, response.headers["Gateway-Stream-Id"]
                        assert "shutting_down" in text
                self.refused += 1


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        yield session


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("grace_s", ["0", "20"])
async def test_a_rolling_restart_loses_no_stream(shared_redis, session, tmp_path, grace_s, workers):
    fleet = await asyncio.to_thread(Fleet, shared_redis, tmp_path, grace_s=grace_s, workers=workers)
    try:
        balancer, over = Balancer(fleet, session), asyncio.Event()
        answers: dict[str, list[str]] = {}

        async def caller(name: int) -> None:
            asked = 0
            while not over.is_set():
                asked += 1
                content = f"{name} asks for the {asked}. time"
                answers[content] = await balancer.stream(content)

        async with asyncio.TaskGroup() as callers:
            for name in range(CALLERS):
                callers.create_task(caller(name))
            for number in range(4 * REPLICAS):
                if number >= REPLICAS and (balancer.resumed or grace_s != "0"):
                    break  # else no stream happened to be running where a replica was restarted: once more
                before = balancer.streams
                await asyncio.to_thread(fleet.restart, number % REPLICAS)
                while balancer.streams < before + CALLERS:
                    await asyncio.sleep(0.01)
            over.set()
        # What the callers got is what is kept: whole, and of one piece.
        for content, events in answers.items():
            assert text_of(await balancer.stream(content)) == text_of(events)
        assert len(answers) > 3 * CALLERS
        assert (balancer.resumed > 0) == (grace_s == "0")
        print(f"streams {len(answers)}, resumed {balancer.resumed}, connections refused {balancer.refused}")
    finally:
        await asyncio.to_thread(fleet.stop)


def text_of(events: list[str]) -> str:
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])

"""Sentinels: who is the master now, and connections to nobody else.

Of the client's ways some do not fit: it asks one sentinel after the other, so one that hangs would hold up all
connections; it believes the first, who may be behind; and it does not ask the master itself.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.connection import AbstractConnection, Connection
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool, SentinelManagedConnection
from redis.exceptions import ConnectionError as LostError
from redis.exceptions import RedisError, ResponseError

from gateway.core.sentinel_url import SentinelUrl
from gateway.store.tls import TlsConnection

# Of the time for a new connection: the rest is the master's.
_ASKING_SHARE = 0.5


class MasterConnection(SentinelManagedConnection):
    """To the master that the sentinels tell of, which says itself that it is one: they may be late."""

    async def on_connect_check_health(self, check_health: bool = True) -> None:  # noqa: FBT001, FBT002  # as it is called
        await super().on_connect_check_health(check_health)
        await self.send_command("ROLE", check_health=False)
        try:
            role = await self.read_response()
        except ResponseError:
            return  # some may not ask
        if role[0] != b"master":
            raise LostError(f"{self.host}:{self.port} is not the master any longer")


class TlsMasterConnection(MasterConnection, TlsConnection):
    """The same, over TLS."""


class _MasterPool(SentinelConnectionPool):
    """Makes the connections; it closes the sentinels' with its own."""

    async def disconnect(self, inuse_connections: bool = True) -> None:  # noqa: FBT001, FBT002  # as it is called
        await super().disconnect(inuse_connections)
        if inuse_connections:
            await self.sentinel_manager.aclose()


class Sentinels(Sentinel):
    """Asks all of them at once, and believes the latest that most of them know."""

    def __init__(self, sentinels: Sequence[aioredis.Redis], names: Sequence[str], wait_s: float) -> None:
        super().__init__([])  # type: ignore[no-untyped-call]
        self.sentinels = list(sentinels)
        self._names = names
        self._wait_s = wait_s

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Its host and port. Raises `MasterNotFoundError`."""
        asked = {
            asyncio.create_task(_master(sentinel, service_name)): name
            for sentinel, name in zip(self.sentinels, self._names, strict=True)
        }
        try:
            states, problems = await self._most_answers(asked)
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        states = [state for state in states if self.check_master_state(state, service_name)]
        if not states:
            raise MasterNotFoundError("; ".join([f"no sentinel knows a master {service_name!r} that is up", *problems]))
        latest = max(states, key=lambda state: int(state["config-epoch"]))
        return latest["ip"], latest["port"]

    async def _most_answers(self, asked: dict[asyncio.Task[Any], str]) -> tuple[list[dict[str, Any]], list[str]]:
        """What more than half of them say, or all that answer; and what is wrong with the others."""
        states: list[dict[str, Any]] = []
        problems: list[str] = []
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._wait_s
        waiting: set[asyncio.Task[Any]] = set(asked)
        while waiting and len(states) <= len(asked) // 2:
            done, waiting = await asyncio.wait(waiting, timeout=until_s - loop.time(), return_when=asyncio.FIRST_COMPLETED)
            if not done:
                problems += [f"{asked[task]}: no answer in time" for task in waiting]
                break
            for task in done:
                error = task.exception()
                if error is None:
                    states.append(task.result())
                elif isinstance(error, RedisError | OSError):
                    problems.append(f"{asked[task]}: {error}")
                else:
                    raise error
        return states, problems


def master_client(url: SentinelUrl, options: dict[str, Any], ask: dict[str, Any], wait_s: float) -> aioredis.Redis:
    """A client of the master; ``options`` are those of its connections, ``ask`` those of the sentinels'."""
    connection_class = TlsConnection if url.tls else Connection
    names = url.shown.split("/")[2].split(",")
    pools = [
        aioredis.ConnectionPool(connection_class=connection_class, host=host, port=port, **ask)
        for host, port in url.sentinels
    ]
    sentinels = Sentinels([aioredis.Redis.from_pool(pool) for pool in pools], names, wait_s * _ASKING_SHARE)
    master_class: type[AbstractConnection] = TlsMasterConnection if url.tls else MasterConnection
    pool = _MasterPool(url.service, sentinels, connection_class=master_class, **options)  # type: ignore[no-untyped-call]
    return aioredis.Redis.from_pool(pool)


async def _master(sentinel: aioredis.Redis, service: str) -> dict[str, Any]:
    return await sentinel.execute_command("SENTINEL MASTER", service)  # type: ignore[no-any-return,no-untyped-call]

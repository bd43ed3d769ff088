"""How redis-py is set up, how commands leave through it, and what its failures mean."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from weakref import WeakSet

import redis.asyncio as aioredis
from hiredis import pack_command
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.driver_info import DriverInfo
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoScriptError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.maint_notifications import MaintNotificationsConfig

from gateway.config import RedisConfig
from gateway.core.sentinel_url import SentinelUrl
from gateway.errors import ConfigError, StoreCorrupt, StoreError, StoreUnavailable, UnknownCursor
from gateway.store.scripts import TEXTS
from gateway.store.sentinel import master_client
from gateway.store.tls import TlsConnection, shared_context, tls_options

# One each for lookups, patient lookups, reads of logs, writes, and the watch. The bell has one beside these.
FEWEST_CONNECTIONS = 5

# Else each connection reads and parses the package's metadata: 2 ms in which nothing else runs, at every reconnect.
_DRIVER = DriverInfo()

Client = aioredis.Redis | RedisCluster
Command = tuple[Any, ...]
"""Its first argument is a key, or it is a script's call."""

_NOT_NOW = (AskError, ClusterDownError, MasterDownError, MovedError, TryAgainError)


class StoreRefused(StoreUnavailable):
    """The server is there, but will not do this: read-only, out of memory, not allowed."""


def connect(config: RedisConfig, url: str) -> Client:
    """A client without retries: a dead cache must cost one time-out, not ten. Raises `ConfigError`."""
    options: dict[str, Any] = {
        "protocol": config.protocol,
        # Every call has a deadline of its own; the library's would cost a task and two timers a command.
        "socket_timeout": None,
        "socket_connect_timeout": config.connect_timeout_s,
        "retry": no_retry(),
        "driver_info": _DRIVER,
        # With them a connection that the server has closed is taken for a good one.
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
    if url.startswith("rediss"):
        options |= tls_options(config)
    try:
        if config.cluster:
            return _cluster_client(config, url, options)
        client = _sentinel_client(config, url, options) if SentinelUrl.is_one(url) else _single_client(config, url, options)
        # Looks at the URL's options, which otherwise the first command would do.
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    except (TypeError, ValueError, RedisClusterException) as error:
        raise ConfigError([f"redis.url: {error}"]) from None
    client.connection_pool.max_connections = _connections(config)
    return client


def _connections(config: RedisConfig) -> int:
    return max(FEWEST_CONNECTIONS, config.max_connections)


def _single_client(config: RedisConfig, url: str, options: dict[str, Any]) -> aioredis.Redis:
    client = aioredis.Redis.from_url(url, **options)
    pool = client.connection_pool
    if pool.connection_class is SSLConnection:
        pool.connection_class = TlsConnection
        pool.connection_kwargs |= _same_tls(config, pool.connection_kwargs)
    return client


def _cluster_client(config: RedisConfig, url: str, options: dict[str, Any]) -> RedisCluster:
    # Half a cluster still serves the keys that it has.
    client = RedisCluster.from_url(url, **options, max_connections=_connections(config), require_full_coverage=False)
    if client.connection_kwargs["connection_class"] is SSLConnection:
        nodes = client.nodes_manager.startup_nodes.values()
        tls = _same_tls(config, next(iter(nodes)).connection_kwargs)
        client.connection_kwargs |= {"connection_class": TlsConnection, **tls}
        for node in nodes:
            node.connection_class = TlsConnection
            node.connection_kwargs |= tls
    return client


def _sentinel_client(config: RedisConfig, url: str, options: dict[str, Any]) -> aioredis.Redis:
    parsed = SentinelUrl.parse(url)
    masters = {**options, **parse_url(parsed.plain)}
    for name in ("host", "port", "connection_class"):
        masters.pop(name, None)
    user = {name: masters.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    tls = {name: value for name, value in masters.items() if name.startswith("ssl_")}
    if parsed.tls:
        tls |= _same_tls(config, tls)
    return master_client(parsed, {**masters, **tls}, {**options, **user, **tls}, config.connect_timeout_s)


def _same_tls(config: RedisConfig, options: dict[str, Any]) -> dict[str, Any]:
    """What makes all connections share their TLS context. Raises `ConfigError`."""
    return {"like": shared_context(TlsConnection(**options)), "server_name": config.tls_server_name}


def no_retry() -> Retry:
    return Retry(NoBackoff(), 0)


class Wire(Protocol):
    """Where commands leave. Everything raises what the client raises."""

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """The answers, errors of the server among them, in one round trip."""
        ...

    async def extra_connection(self, turn: int) -> AbstractConnection:
        """A connection beside all others, not yet connected; of a cluster, to another node each turn."""
        ...

    async def scan(self, pattern: str, cursor: str, count: int) -> tuple[list[bytes], str]:
        """About so many of the names that fit, and the cursor of the next ones; it is empty at first, and behind the last.

        What is there all the time comes at least once. Raises where it cannot be looked for.
        """
        ...

    @property
    def may_move(self) -> bool:
        """Whether another server may take the place of the one that answers, which only `follow` finds out."""
        ...

    async def follow(self) -> None:
        """Goes to the server that has the place by now, if that can be learned. Raises nothing."""
        ...

    async def let_go(self) -> None:
        """Closes what lies idle: a server that hangs would take it for ever, and another one may have its place by now."""
        ...

    async def close(self) -> None: ...


class Single:
    """The way to one server: connections of redis-py's, used without its client, which costs as much again as a command."""

    def __init__(self, client: aioredis.Redis) -> None:
        self.client = client
        self._idle: list[AbstractConnection] = []
        self._address: tuple[str, int] | None = None
        """Where the latest connection goes: only sentinels tell of another."""
        self._extra: WeakSet[AbstractConnection] = WeakSet()

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        connection = await self._connection()
        transport = transport_of(connection)
        try:
            await connection.send_packed_command([pack_command(command) for command in commands])
            answers = [await _answer(connection) for _ in commands]
        except BaseException:
            # Half an answer may still be on its way, which the next command would take for its own.
            await drop(connection, transport)
            raise
        if _address(connection) == self._address:
            self._idle.append(connection)
        else:
            await drop(connection, transport)
        return answers

    async def _connection(self) -> AbstractConnection:
        """One that is connected. Those who send bound how many there are."""
        while self._idle:
            connection = self._idle.pop()
            if not _is_closed(connection):
                return connection
            await drop(connection, transport_of(connection))
        connection = self._new_connection()
        await connection.connect()  # type: ignore[no-untyped-call]
        await self._move_to(_address(connection))
        return connection

    @property
    def may_move(self) -> bool:
        return isinstance(self.client.connection_pool, SentinelConnectionPool)

    async def follow(self) -> None:
        pool = self.client.connection_pool
        if isinstance(pool, SentinelConnectionPool):
            with suppress(RedisError, OSError):  # the server may be well, though nobody watches over it
                await self._move_to(await pool.get_master_address())  # type: ignore[no-untyped-call]

    async def _move_to(self, address: tuple[str, int] | None) -> None:
        """A demoted master may go on for seconds as if it were none, and one that hangs for ever."""
        before, self._address = self._address, address
        if before in {None, address}:
            return
        await self.let_go()
        for connection in list(self._extra):
            if transport := transport_of(connection):
                transport.abort()

    async def let_go(self) -> None:
        while self._idle:
            connection = self._idle.pop()
            await drop(connection, transport_of(connection))

    async def scan(self, pattern: str, cursor: str, count: int) -> tuple[list[bytes], str]:
        if cursor and not cursor.isdecimal():
            raise UnknownCursor("it is not of one server")
        [answer] = await self.send([scan(pattern, cursor, count)])
        if isinstance(answer, Exception):
            raise answer
        return answer[1], next_cursor(answer[0])

    async def extra_connection(self, turn: int) -> AbstractConnection:  # noqa: ARG002  # there is one server only
        connection = self._new_connection()
        self._extra.add(connection)
        return connection

    def _new_connection(self) -> AbstractConnection:
        return self.client.connection_pool.make_connection()  # type: ignore[no-any-return,no-untyped-call]

    async def close(self) -> None:
        await self.let_go()
        await self.client.aclose()
        await asyncio.sleep(0)  # the turn in which what was dropped is closed


async def _answer(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


def transport_of(connection: AbstractConnection) -> asyncio.WriteTransport | None:
    """What is below: to be asked for before a command is sent, since redis-py lets go of it where sending fails."""
    return getattr(connection._writer, "transport", None)  # noqa: SLF001  # fakeredis' has none


def _address(connection: AbstractConnection) -> tuple[str, int] | None:
    """On a unix socket it has none."""
    return (connection.host, connection.port) if isinstance(connection, Connection) else None


async def drop(connection: AbstractConnection, transport: asyncio.WriteTransport | None) -> None:
    """Closes it at once: a server that takes nothing more would keep a closing one open for ever."""
    if transport:
        transport.abort()
    await connection.disconnect(nowait=True)


def _is_closed(connection: AbstractConnection) -> bool:
    """Whether the server has hung up: only the stream below knows it without a system call."""
    reader = connection._reader  # noqa: SLF001
    return reader is None or reader.at_eof()


def scan(pattern: str, cursor: str, count: int) -> Command:
    return "SCAN", cursor or "0", "MATCH", pattern, "COUNT", count


def next_cursor(answer: bytes | int) -> str:
    """Where a node's next names begin, as it says: empty behind the last ones."""
    at = int(answer)
    return str(at) if at else ""


async def send(wire: Wire, commands: Sequence[Command]) -> list[Any]:
    """The answers, errors among them. A script that a server does not know is sent to it in full."""
    answers = await wire.send(commands)
    unknown = [place for place, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
    if unknown:
        again = await wire.send([("EVAL", TEXTS[commands[place][1]], *commands[place][2:]) for place in unknown])
        for place, answer in zip(unknown, again, strict=True):
            answers[place] = answer
    return answers


def as_store_error(error: Exception) -> StoreError:
    """What a failure of the client means to us."""
    text = str(error) or type(error).__name__
    if isinstance(error, StoreError):
        return error
    if not isinstance(error, ResponseError) or isinstance(error, _NOT_NOW):
        return StoreUnavailable(text)
    return StoreCorrupt(text) if text.startswith("WRONGTYPE") else StoreRefused(text)


@contextmanager
def store_errors_only() -> Iterator[None]:
    """Turns the client's failures into ours."""
    try:
        yield
    except Exception as error:  # beside its own and the system's errors, the client lets some of the loop's through
        raise as_store_error(error) from error

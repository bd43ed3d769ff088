"""How redis-py is set up, and what its failures mean."""

from collections.abc import Iterator
from contextlib import contextmanager

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from gateway.config import RedisConfig
from gateway.errors import ConfigError, StoreCorrupt, StoreError, StoreUnavailable

# One each for lookups, patient lookups, writes, and the watch.
FEWEST_CONNECTIONS = 4


class StoreRefused(StoreUnavailable):
    """The server is there, but will not do this: read-only, out of memory, not allowed."""


def connect(config: RedisConfig, url: str) -> aioredis.Redis:
    """A client without retries: a dead cache must cost one time-out, not ten. Raises `ConfigError`."""
    try:
        client = aioredis.Redis.from_url(
            url,
            protocol=config.protocol,
            # Every call has a deadline of its own; the library's would cost a task and two timers a command.
            socket_timeout=None,
            socket_connect_timeout=config.connect_timeout_s,
            retry=Retry(NoBackoff(), 0),
            # With them a connection that the server has closed is taken for a good one.
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )
        # Looks at the URL's options, which otherwise the first command would do.
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    except (TypeError, ValueError) as error:
        raise ConfigError([f"redis.url: {error}"]) from None
    client.connection_pool.max_connections = max(FEWEST_CONNECTIONS, config.max_connections)
    return client


def as_store_error(error: Exception) -> StoreError:
    """What a failure of the client means to us."""
    text = str(error) or type(error).__name__
    if not isinstance(error, ResponseError):
        return StoreUnavailable(text)
    return StoreCorrupt(text) if text.startswith("WRONGTYPE") else StoreRefused(text)


@contextmanager
def store_errors_only() -> Iterator[None]:
    """Turns the client's failures into ours."""
    try:
        yield
    except Exception as error:  # beside its own and the system's errors, the client lets some of the loop's through
        raise as_store_error(error) from error

"""A Redis, how it is asked, and whether it is well.

After a few failures in a row it counts as away: nobody waits for it, until a watch sees that it answers in time again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

from redis.asyncio.cluster import RedisCluster

from gateway.config import RedisConfig
from gateway.errors import StoreCorrupt, StoreError, StoreUnavailable
from gateway.observe import StoreState
from gateway.store.client import (
    FEWEST_CONNECTIONS,
    Client,
    Command,
    Single,
    StoreRefused,
    Wire,
    as_store_error,
    send,
    store_errors_only,
)
from gateway.store.cluster import Cluster
from gateway.store.lookups import Lookups

log = logging.getLogger(__name__)

_PATIENT_S = 5.0
_FAILURES_TO_DOWN = 3
_WATCH_UP_S = 10.0
_LOG_INTERVAL_S = 30.0


class Server:
    """A server, or a cluster of them.

    ``greet`` is done at first and on every look; ``probe`` is a command that a lookup is like.
    """

    def __init__(self, client: Client, config: RedisConfig, greet: Callable[[], Awaitable[None]], probe: Command) -> None:
        self.wire: Wire = (
            Cluster(client, cooldown_s=config.cooldown_s) if isinstance(client, RedisCluster) else Single(client)
        )
        self.config = config
        self.available = False
        self._greet = greet
        self._probe = probe
        connections = max(FEWEST_CONNECTIONS, config.max_connections)
        quick, patient, reads = connections // 4, max(1, connections // 8), max(1, connections // 8)
        limit_s = config.command_timeout_s
        self._lookups = Lookups(self.wire, places=quick, wait_s=config.lookup_timeout_s, limit_s=limit_s)
        self._patient_lookups = Lookups(self.wire, places=patient, wait_s=_PATIENT_S, limit_s=limit_s)
        steady = Lookups(self.wire, places=reads, wait_s=limit_s, limit_s=limit_s)
        self._paces = {"quick": self._lookups, "patient": self._patient_lookups, "steady": steady}
        self._writes = asyncio.Semaphore(connections - quick - patient - reads - 1)
        self._failures = 0
        self._epoch = 0
        """How many failures in a row were counted: a call that began in an earlier epoch was hit by one that was counted."""
        self.on_corrupt: Callable[[Command, StoreCorrupt], object] = lambda *_: None
        """Called where a script has met something that is not ours."""
        self._refuses_until_s = float("-inf")
        self._closed = False
        self._fell = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._told_at: dict[str, float] = {}
        self._told_away = False
        self._counts = {"unavailable": 0, "refused": 0, "corrupt": 0}
        """Failures, by kind."""
        self._outages = 0

    @property
    def state(self) -> StoreState:
        late = self._lookups.late + self._patient_lookups.late
        return StoreState(self.available, dict(self._counts), self._outages, late)

    @property
    def is_writable(self) -> bool:
        """Whether it is there and has refused no write lately."""
        return self.available and _now() >= self._refuses_until_s

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around a write that costs something to try: once one is refused, nobody tries for a moment.

        Raises `StoreUnavailable`.
        """
        self._refuse_if_away()
        if not self.is_writable:
            raise StoreRefused("the store refuses to store")
        try:
            yield
        except StoreRefused:
            if not self.has_nodes:  # of which one does not speak for the others
                self._refuses_until_s = _now() + self.config.cooldown_s
            raise

    @property
    def has_nodes(self) -> bool:
        """Whether it is a cluster."""
        return isinstance(self.wire, Cluster)

    async def open(self) -> None:
        await self._look()
        self._watch = asyncio.create_task(self._keep_watch())

    async def close(self) -> None:
        self._closed = True  # Python 3.11's `asyncio.wait_for`, which clients use, may lose a cancellation
        self.available = False
        if self._watch:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await asyncio.gather(*(lookups.close() for lookups in self._paces.values()))
        with suppress(StoreError), store_errors_only():
            await self.wire.close()

    async def look_up(self, command: Command, *, patient: bool = False) -> Any:
        """By the hard deadline that callers wait for, or within seconds, then also where it is away. Raises `StoreError`."""
        if not patient:
            self._refuse_if_away()
        began = self._epoch
        try:
            answer = await (self._patient_lookups if patient else self._lookups).run(command)
        except StoreUnavailable as error:
            self._count_failure(error, began)
            raise
        self._failures = 0
        return answer

    async def run(self, command: Command, pace: Literal["quick", "patient", "steady"]) -> Any:
        """Runs a script that shares a pipeline with others: as fast as a lookup, as a patient one, or as all else.

        Raises `StoreError`.
        """
        self._refuse_if_away()
        began = self._epoch
        try:
            answer = await self._paces[pace].run(command)
        except StoreError as error:
            self._failed(error, began)
            if isinstance(error, StoreCorrupt):
                self.on_corrupt(command, error)
            raise
        if pace == "quick":
            self._failures = 0
        return answer

    def count_corrupt(self) -> None:
        """Something was there that does not load."""
        self._counts["corrupt"] += 1

    async def ask(self, command: Command) -> Any:
        """Outside of all deadlines and accounts: for those who have their own. Raises `StoreError`."""
        with store_errors_only():
            [answer] = await send(self.wire, [command])
        if isinstance(answer, Exception):
            raise as_store_error(answer)
        return answer

    async def scan(self, pattern: str, cursor: str, count: int) -> tuple[list[bytes], str]:
        """As `Wire.scan`. Says nothing of how well the server is: one node that fails is enough. Raises `StoreError`."""
        self._refuse_if_away()
        with store_errors_only():
            async with self._writes, asyncio.timeout(self.config.command_timeout_s):
                return await self.wire.scan(pattern, cursor, count)

    async def write(self, command: Command) -> Any:
        """Raises `StoreError`."""
        [answer] = await self.write_all([command])
        if isinstance(answer, StoreError):
            raise answer
        return answer

    async def write_all(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to the commands, each a `StoreError` where that one failed. Raises `StoreError` if none came."""
        self._refuse_if_away()
        async with self._writes:
            self._refuse_if_away()
            began = self._epoch
            try:
                with store_errors_only():
                    async with asyncio.timeout(self.config.command_timeout_s):
                        answers = await send(self.wire, commands)
            except StoreError as error:
                self._failed(error, began)
                raise
        answers = [as_store_error(answer) if isinstance(answer, Exception) else answer for answer in answers]
        for command, answer in zip(commands, answers, strict=True):
            if isinstance(answer, StoreCorrupt):
                self.on_corrupt(command, answer)
        failures = [answer for answer in answers if isinstance(answer, StoreError)]
        for failure in {type(failure): failure for failure in failures}.values():
            # One node of a cluster that fails does not speak for the others.
            if len(failures) == len(answers) or isinstance(failure, StoreRefused):
                self._failed(failure, began)
        return answers

    def warn(self, text: str, error: StoreError) -> bool:
        """One line of a kind an interval: an outage must not fill the log."""
        now = _now()
        if now - self._told_at.get(text, float("-inf")) < _LOG_INTERVAL_S:
            return False
        self._told_at[text] = now
        log.warning(text, error)
        return True

    def _refuse_if_away(self) -> None:
        if not self.available:
            raise StoreUnavailable("the store is away")

    def _failed(self, error: StoreError, began: int) -> None:
        """What the failure of more than a lookup says of the server."""
        if isinstance(error, StoreRefused):
            # No reason to stop looking things up.
            self._counts["refused"] += 1
            self.warn("Redis refuses to store: %s", error)
        elif isinstance(error, StoreCorrupt):
            self.count_corrupt()
        else:
            self._count_failure(error, began)

    def _count_failure(self, error: StoreError, began: int) -> None:
        """Failures count as in a row only if each call began after the last had failed: one hiccup hits many calls."""
        if self._closed:
            return
        self._counts["unavailable"] += 1
        if began == self._epoch:
            self._failures += 1
            self._epoch += 1
        if self.available and self._failures >= _FAILURES_TO_DOWN:
            self.available = False
            self._outages += 1
            self._fell.set()
        if not self.available and self.warn("Redis does not serve, requests go on without the cache: %s", error):
            self._told_away = True

    async def _keep_watch(self) -> None:
        """Notices that the store is back, and that it came back empty."""
        while not self._closed:
            self._fell.clear()
            try:
                well = self.available and not self.wire.may_move
                async with asyncio.timeout(_WATCH_UP_S if well else self.config.cooldown_s):
                    await self._fell.wait()
            except TimeoutError:
                await self._look()
            else:
                await self.wire.let_go()

    async def _look(self) -> None:
        began = self._epoch
        try:
            with store_errors_only():
                async with asyncio.timeout(
                    self.config.command_timeout_s if self.available else self.config.connect_timeout_s
                ):
                    if self.available:
                        await self.wire.follow()
                    await self._greet()
            if not self.available:
                # Slow is no better than gone: it is back when a lookup is answered in time.
                await self._lookups.run(self._probe)
        except StoreError as error:
            self._count_failure(error, began)
            return
        if not self.available:
            self.available = True
            self._failures = 0
            if self._told_away:
                self._told_away = False
                log.warning("Redis is back")


def _now() -> float:
    return asyncio.get_running_loop().time()

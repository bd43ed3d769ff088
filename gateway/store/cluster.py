"""The way to a Redis Cluster: of redis-py's client only what knows the nodes.

Its own ways to send do not fit: a dead node would fail the keys of all others in the same pipeline, without retries it
would not look for the new owners of slots, and it asks one node, which may be the dead one, what commands there are.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple, Self, cast

from redis.asyncio.cluster import ClusterNode, PipelineCommand, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError, ResponseError, SlotNotCoveredError

from gateway.errors import UnknownCursor
from gateway.store.client import Command, next_cursor, no_retry, scan

_LAST_SLOT = 16_383
# How often the nodes are asked who has a slot, before a scan is given up.
_LOOKS = 2


class _Place(NamedTuple):
    """How far a scan of all nodes has come: the slots before ``first`` are done, those up to ``last`` are a node's.

    Its ``cursor`` means nothing to any other node, also not to one that takes its place, so its id is kept as well.
    """

    first: int = 0
    last: int = 0
    node: str = ""
    cursor: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises `UnknownCursor`."""
        if not text:
            return cls()
        try:
            first, last, node, cursor = text.split("-")
            place = cls(int(first), int(last), node, cursor)
        except ValueError:
            raise UnknownCursor("it is not of a cluster") from None
        if place.first > _LAST_SLOT:
            raise UnknownCursor("there is no such slot")
        return place

    def __str__(self) -> str:
        return "-".join(map(str, self))

    def on(self, node: str, last: int) -> Self:
        """On this node, which has all slots up to ``last`` now: anew, if it was on another."""
        return self._replace(last=min(self.last, last)) if node == self.node else type(self)(self.first, last, node)

    def then(self, cursor: str) -> str:
        """The cursor of what comes next, where the node's own is known."""
        if cursor:
            return str(self._replace(cursor=cursor))
        return str(_Place(self.last + 1)) if self.last < _LAST_SLOT else ""


class Cluster:
    """One pipeline a node, so that a node that fails fails only its own keys.

    The nodes are asked again who has which slot after failures, but no more often than every ``cooldown_s``: each time,
    the client makes all its connections anew.
    """

    def __init__(self, client: RedisCluster, *, cooldown_s: float) -> None:
        self.client = client
        self._nodes = client.nodes_manager
        self._cooldown_s = cooldown_s
        self._failed: str | None = None
        self._look_at_s = 0.0

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        await self._know_nodes()
        batch = [PipelineCommand(place, *command) for place, command in enumerate(commands)]
        by_node: dict[ClusterNode, list[PipelineCommand]] = {}
        for command in batch:
            try:
                by_node.setdefault(self._home(command.args), []).append(command)
            except RedisError as error:
                command.result = error
        await asyncio.gather(*(self._send_to(node, part) for node, part in by_node.items()))
        return [command.result for command in batch]

    async def scan(self, pattern: str, cursor: str, count: int) -> tuple[list[bytes], str]:
        """The names in some slots that a node has side by side, then in the next: nodes come and go, slots are for ever.

        With each answer the node itself says which slots it has. What it has given away meanwhile is looked for at the new
        owner; only a key that moves while its slot is half here and half there may be missed.
        """
        place = _Place.parse(cursor)
        for _ in range(_LOOKS):
            await self._know_nodes()
            node = self._owner(place.first)
            asked = ("CLUSTER", "MYID"), ("CLUSTER", "SLOTS"), scan(pattern, place.cursor, count)
            id_, slots, (next_, names) = await self._ask(node, asked)
            own = [range(first, last + 1) for first, last, owner, *_ in slots if owner[2] == id_]
            around = next((slots for slots in own if place.first in slots), None)
            if around:
                here = place.on(id_.decode(), around[-1])
                # What came of another node's cursor is an accident. What is in the node's other slots has its own turn.
                others = [slots for slots in own if slots is not around]
                fits = [name for name in names if not any(key_slot(name) in slots for slots in others)]
                return (fits, here.then(next_cursor(next_))) if here.cursor == place.cursor else ([], str(here))
            self._failed, self._look_at_s = node.name, 0.0
        raise SlotNotCoveredError(f"nobody has slot {place.first}")

    async def extra_connection(self, turn: int) -> AbstractConnection:
        await self._know_nodes()
        nodes = sorted(self._nodes.nodes_cache.values(), key=lambda node: node.name)
        node = nodes[turn % len(nodes)]
        return node.connection_class(**node.connection_kwargs, retry=no_retry())

    @property
    def may_move(self) -> bool:
        """No: the nodes tell of each other."""
        return False

    async def follow(self) -> None:
        """Nothing, then."""

    async def let_go(self) -> None:
        """Nothing: to know the nodes anew makes all connections anew."""

    async def close(self) -> None:
        await self._nodes.aclose()
        await self._nodes.aclose("startup_nodes")

    async def _know_nodes(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._nodes.default_node is None:
            await self._nodes.initialize()
        elif self._failed and now_s >= self._look_at_s:
            failed, self._failed, self._look_at_s = self._failed, None, now_s + self._cooldown_s
            await self._nodes.initialize(last_failed_node_name=failed)

    def _home(self, command: Command) -> ClusterNode:
        key = command[3] if command[0] in {"EVAL", "EVALSHA"} else command[1]
        return cast("ClusterNode", self.client.get_node_from_key(key))  # None is for replicas

    def _owner(self, slot: int) -> ClusterNode:
        owners = self._nodes.slots_cache.get(slot)
        if not owners:
            self._failed = "nobody"  # may be known by now, where one looks again
            raise SlotNotCoveredError(f"nobody has slot {slot}")
        return owners[0]

    async def _ask(self, node: ClusterNode, commands: Sequence[Command]) -> list[Any]:
        """A node's own answers. Raises what is wrong with any of them."""
        pipeline = [PipelineCommand(place, *command) for place, command in enumerate(commands)]
        await self._send_to(node, pipeline)
        for command in pipeline:
            if isinstance(command.result, Exception):
                raise command.result
        return [command.result for command in pipeline]

    async def _send_to(self, node: ClusterNode, commands: list[PipelineCommand]) -> None:
        try:
            await node.execute_pipeline(commands)
        except asyncio.CancelledError:
            self._failed = node.name  # too slow for who asked: another one may have its slots by now
            raise
        except (RedisError, OSError) as error:
            for command in commands:
                command.result = error
        for command in commands:
            if isinstance(command.result, MovedError | AskError):
                await self._send_on(command, command.result)
            if _is_failure(command.result):
                self._failed = node.name

    async def _send_on(self, command: PipelineCommand, to: MovedError | AskError) -> None:
        """To the node that has the key's slot by now (moved), or has this key of it already (ask)."""
        try:
            if isinstance(to, MovedError):
                await self._nodes.move_slot(to)
            node = self._nodes.get_node(to.host, to.port)
            if node is None:
                self._failed = f"{to.host}:{to.port}"
                return
            asking = [PipelineCommand(0, "ASKING")] if isinstance(to, AskError) else []
            await node.execute_pipeline([*asking, command])
        except (RedisError, OSError, LookupError) as error:
            command.result = error


def _is_failure(answer: Any) -> bool:
    """Whether it makes one doubt who has which slot."""
    return isinstance(answer, ClusterDownError) or (isinstance(answer, Exception) and not isinstance(answer, ResponseError))

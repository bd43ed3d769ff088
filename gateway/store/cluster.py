"""The way to a Redis Cluster: of redis-py's client only what knows the nodes.

Its own ways to send do not fit: a dead node would fail the keys of all others in the same pipeline, without retries it
would not look for the new owners of slots, and it asks one node, which may be the dead one, what commands there are.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from redis.asyncio.cluster import ClusterNode, PipelineCommand, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError, ResponseError

from gateway.store.client import Command, no_retry


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

    async def extra_connection(self, turn: int) -> AbstractConnection:
        await self._know_nodes()
        nodes = sorted(self._nodes.nodes_cache.values(), key=lambda node: node.name)
        node = nodes[turn % len(nodes)]
        return node.connection_class(**node.connection_kwargs, retry=no_retry())

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

    async def _send_to(self, node: ClusterNode, commands: list[PipelineCommand]) -> None:
        try:
            await node.execute_pipeline(commands)
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

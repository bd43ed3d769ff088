"""How many calls a deployment has at a time, and who waits for a turn: first come, first served."""

import asyncio
from collections import deque

from gateway.errors import UpstreamBusy


class Slots:
    """``limit`` at a time (0: any number); of those beyond, ``max_queued`` wait, each for ``timeout_s`` at most."""

    def __init__(self, limit: int, max_queued: int, timeout_s: float) -> None:
        self._limit = limit
        self._max_queued = max_queued
        self._timeout_s = timeout_s
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.taken = 0

    def __repr__(self) -> str:
        return f"<Slots taken={self.taken} of={self._limit or 'any'} queued={len(self._waiting)}>"

    @property
    def load(self) -> int:
        """Those that have a slot, and those that wait for one."""
        return self.taken + len(self._waiting)

    @property
    def is_free(self) -> bool:
        return not self._limit or self.taken < self._limit

    @property
    def has_room(self) -> bool:
        """Whether one more could at least wait."""
        return self.is_free or len(self._waiting) < self._max_queued

    async def take(self) -> "Slot":
        """Raises `UpstreamBusy`, at once where too many wait already."""
        if self.is_free:  # then nobody waits: who leaves hands its place on
            self.taken += 1
            return Slot(self)
        if not self.has_room:
            raise UpstreamBusy(f"The upstream has all of its {self._limit} calls, and as many wait as may.")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._timeout_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.hand_on()  # its turn came in the very moment in which it gave up
            elif turn in self._waiting:
                self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise UpstreamBusy(f"The upstream was busy for {self._timeout_s:g} s.") from None
            raise
        return Slot(self)

    def hand_on(self) -> None:
        """A slot is free again, for whoever has waited longest."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.taken -= 1


class Slot:
    """One call's place. It can be given back more than once."""

    def __init__(self, slots: Slots) -> None:
        self._slots: Slots | None = slots

    def release(self) -> None:
        if self._slots:
            self._slots.hand_on()
            self._slots = None

"""Calls readers when their frames are due: one timer for all of them, on a clock that does not drift."""

import asyncio
import heapq
import math
from itertools import count
from typing import Protocol

from gateway.ports import Clock

# Timers of event loops count whole milliseconds, and one that is early has to be set again.
_TIMER_STEPS_PER_S = 1000
# So many are called in a row: what they write leaves only when the loop has its turn.
_AT_ONCE = 64


class Paced(Protocol):
    """Whoever is to be called at a time."""

    def tick(self, now_s: float) -> float | None:
        """It is due: when it wants to be called again, or None. It must not raise."""
        ...


class Turn:
    """That somebody is to be called at a time."""

    __slots__ = ("who",)

    def __init__(self, who: Paced) -> None:
        self.who: Paced | None = who


class Pacer:
    """Calls everybody in the order of due times, each not before its time."""

    def __init__(self, clock: Clock) -> None:
        self.now = clock.monotonic
        self._heap: list[tuple[float, int, Turn]] = []
        self._numbers = count()
        self._timer: asyncio.Handle | None = None
        self._rings_at_s = math.inf

    def call(self, who: Paced, at_s: float) -> Turn:
        """Has ``who`` called then, and on until it says that it is enough, or is forgotten."""
        turn = Turn(who)
        heapq.heappush(self._heap, (at_s, next(self._numbers), turn))
        if at_s < self._rings_at_s:
            self._set()
        return turn

    @staticmethod
    def forget(turn: Turn) -> None:
        """Nobody is called for it any more."""
        turn.who = None

    def _ring(self) -> None:
        heap, now_s = self._heap, self.now()
        for _ in range(_AT_ONCE):
            if not heap or heap[0][0] > now_s:
                break
            _, number, turn = heap[0]
            again_s = turn.who.tick(now_s) if turn.who else None
            if again_s is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (again_s, number, turn))
        self._set()

    def _set(self) -> None:
        """Sets the timer for the first who is due."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._rings_at_s = self._heap[0][0] if self._heap else math.inf
        if not self._heap:
            return
        loop, steps = asyncio.get_running_loop(), math.ceil((self._rings_at_s - self.now()) * _TIMER_STEPS_PER_S)
        self._timer = loop.call_later(steps / _TIMER_STEPS_PER_S, self._ring) if steps > 0 else loop.call_soon(self._ring)

"""How late the event loop is: measured for `Shedder`, many times a second, while ``[limits] max_lag_s`` asks for it."""

import asyncio
import time
from collections.abc import Callable

from gateway.limits import Shedder

# A measurement takes some microseconds: a thousandth of the processor.
_EVERY_S = 0.005


class Probe:
    """Measures what a newcomer waits for: from when a timer was due until the loop has been around once more.

    The timer alone is not enough. It is late by the rest of a turn of the loop, but a request that comes is read in one turn
    and answered in the next; and a timer that is set anew in each of many long turns is late by less than a turn.
    """

    def __init__(self, shedder: Shedder, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock``: not the loop's, which has no more than milliseconds where that is uvloop."""
        self._shedder = shedder
        self._clock = clock
        self._is_open = False
        self._handle: asyncio.Handle | None = None

    def open(self) -> None:
        self._is_open = True
        self.adjust()

    def close(self) -> None:
        self._is_open = False
        if self._handle:
            self._handle.cancel()
            self._handle = None

    def adjust(self) -> None:
        """To be called when the limit has changed: nothing is measured without one."""
        if self._is_open and self._handle is None:
            self._wait()

    def _wait(self) -> None:
        self._handle = None
        if self._shedder.max_lag_s:
            self._handle = asyncio.get_running_loop().call_later(_EVERY_S, self._due, self._clock() + _EVERY_S)

    def _due(self, due_s: float) -> None:
        # Whatever has been read by now, and waits for its turn, comes first; then sockets are looked at.
        self._handle = asyncio.get_running_loop().call_soon(self._begin_turn, due_s)

    def _begin_turn(self, due_s: float) -> None:
        self._handle = asyncio.get_running_loop().call_soon(self._end_turn, due_s)

    def _end_turn(self, due_s: float) -> None:
        now_s = self._clock()
        self._shedder.add(max(0.0, now_s - due_s), now_s)
        self._wait()

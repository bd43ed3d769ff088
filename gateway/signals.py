"""How a process is told to end."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Any


class Stop:
    """Whether the process is to end, and whether what it does may take its time until then."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._hurry = asyncio.Event()

    @property
    def is_asked(self) -> bool:
        return self._asked.is_set()

    @property
    def is_urgent(self) -> bool:
        return self._hurry.is_set()

    def ask(self) -> None:
        """Asks to end, within the grace."""
        self._asked.set()

    def hurry(self) -> None:
        """Asks to end now."""
        self._asked.set()
        self._hurry.set()

    def ask_again(self) -> None:
        """Asks to end; who has asked before does not want to wait for the grace."""
        (self.hurry if self.is_asked else self.ask)()

    async def asked(self) -> None:
        await self._asked.wait()

    async def urgent(self) -> None:
        await self._hurry.wait()

    async def wait_for(self, what: Awaitable[Any], within_s: float) -> bool:
        """Waits for it, but no longer than that, and not where there is no time; tells whether it came."""
        return await _comes_before(self._hurry, what, within_s)

    async def begins_with(self, what: Awaitable[Any]) -> bool:
        """Waits for what has to come before all else, until the process is asked to end; tells whether it came.

        Raises what it raises.
        """
        return await _comes_before(self._asked, what)


async def _comes_before(event: asyncio.Event, what: Awaitable[Any], within_s: float | None = None) -> bool:
    tasks = [asyncio.ensure_future(what), asyncio.ensure_future(event.wait())]
    try:
        done, _ = await asyncio.wait(tasks, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0] in done:
            tasks[0].result()
        return tasks[0] in done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def on_signal(number: int, then: Callable[[], object]) -> None:
    """Calls ``then`` in the running loop whenever that signal comes."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(number, then)
    except NotImplementedError:  # Windows
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(then))

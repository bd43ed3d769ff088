"""An event loop whose time passes at once: what would wait for an hour is there in a moment, to the microsecond."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time stands still while there is something to do, and else jumps to what is due next."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 1000.0
        select = self._selector.select  # type: ignore[attr-defined]

        def skip(timeout_s: float | None = None) -> Any:
            if timeout_s is None:
                raise AssertionError("nothing is left that could ever happen")
            self._now_s += timeout_s
            return select(0)

        self._selector.select = skip  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._now_s


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)

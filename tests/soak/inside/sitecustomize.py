"""Python loads this at its start, where it is on the path: on SIGUSR2 a process writes down what it holds.

So the soak looks into a gateway that is started as everybody starts it, and that knows nothing of the soak.
"""

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

_NAMED = 3
"""Looking for what holds a flight takes so long that it is done for the last few only."""
_DIRECTORY = os.environ.get("SOAK_COUNTS", "")


def _count(*_: object) -> None:
    gc.collect()
    _give_back()
    objects = gc.get_objects()
    tasks = _tasks()
    kinds = Counter(type(each).__qualname__ for each in objects if type(each).__module__.partition(".")[0] == "gateway")
    names = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in tasks)
    held = [each for each in objects if type(each).__qualname__ == "Flight"]
    told = {
        "tasks": names,
        "objects": len(objects),
        "blocks": sys.getallocatedblocks(),
        "in_use_bytes": _in_use_bytes(),
        "kinds": kinds,
        "flights": [_holders(each, (objects, held)) for each in held[:_NAMED]],
    }
    path = Path(_DIRECTORY, f"{os.getpid()}.json")
    path.with_suffix(".part").write_text(json.dumps(told))
    path.with_suffix(".part").rename(path)


def _give_back() -> None:
    """What the allocator keeps for later is not held. Only the GNU library can be told so."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` (mallinfo(3))."""

    _names_ = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names_.split()]


def _in_use_bytes() -> int:
    """What the C library has given out and not got back, from its heaps and as mappings; 0 where it cannot say."""
    try:
        tell = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    tell.restype = _MallInfo
    told = tell()
    return int(told.uordblks + told.hblkhd)


def _tasks() -> "set[Any]":
    """Those that are not done. Not the collector's, which leaves out what the service has frozen."""
    try:
        return sys.modules["asyncio"].all_tasks()
    except (KeyError, RuntimeError):
        return set()  # a process without a loop


def _holders(flight: Any, but: tuple[object, ...]) -> str:
    """A flight, and what keeps it."""
    holders = [
        each for each in gc.get_referrers(flight) if not any(each is one for one in but) and each is not sys._getframe(1)
    ]
    return f"{flight!r}: {_tables(flight)} {[f'{type(each).__qualname__} {str(each)[:150]}' for each in holders[:6]]}"


def _tables(flight: Any) -> list[str]:
    """The tables that it is in. The service has frozen them, so the collector does not tell of them."""
    owner = getattr(getattr(flight.on_unread, "func", None), "__self__", None)
    tables = {**vars(owner), **vars(owner._sharing)} if owner else {}
    return [
        name
        for name, table in tables.items()
        if isinstance(table, dict)
        and any(flight in (key, value, getattr(value, "flight", None)) for key, value in table.items())
    ]


if _DIRECTORY:
    signal.signal(signal.SIGUSR2, _count)

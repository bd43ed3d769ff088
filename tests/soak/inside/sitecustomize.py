"""Python loads this at its start, where it is on the path: on SIGUSR2 a process writes down what it holds.

So the soak looks into a gateway that is started as everybody starts it, and that knows nothing of the soak.
"""

import gc
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

_DIRECTORY = os.environ.get("SOAK_COUNTS", "")


def _count(*_: object) -> None:
    gc.collect()
    objects = gc.get_objects()
    asyncio = sys.modules.get("asyncio")
    # Not of the collector, which leaves out what the service has frozen.
    tasks = asyncio.all_tasks() if asyncio else ()
    kinds = Counter(type(each).__qualname__ for each in objects if type(each).__module__.partition(".")[0] == "gateway")
    names = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in tasks)
    told = {"tasks": names, "objects": len(objects), "kinds": kinds}
    path = Path(_DIRECTORY, f"{os.getpid()}.json")
    path.with_suffix(".part").write_text(json.dumps(told))
    path.with_suffix(".part").rename(path)


if _DIRECTORY:
    signal.signal(signal.SIGUSR2, _count)

"""The process behind `gateway.testing`: a gateway that replays a file of recordings, or makes one.

It is told what to do in one line of JSON on standard input, and says in one line on standard output where it listens. Once
that input ends it ends too, so it never outlives the tests; in the modes that record it has written the new recordings by
then.
"""

import asyncio
import logging
import os
import sys
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from gateway.admin import Filters
from gateway.app import LIMITS, RECORDINGS, RUNNER_OPTIONS, RUNNING, SERVICE, SystemClock, build_app, open_store, patience
from gateway.config import FALLBACK_UPSTREAM, Config, Loaded, SimulatedUpstreamConfig, load
from gateway.errors import CommandFailed, ConfigError
from gateway.http import rehearsing
from gateway.http.server import HttpServer
from gateway.live import Live
from gateway.recordings import FOREVER_S
from gateway.sockets import bind

# Recordings of tests are everybody's, and never grow old.
_FLAGS: dict[str, dict[str, Any]] = {
    "replay": {"on_miss": "refuse"},
    "redis": {"url": "embedded", "embedded_dir": ""},
    "cache": {"scope": "shared", "ttl_s": FOREVER_S, "stale_s": 0.0, "keep_requests": True, "recordings": ""},
    "flights": {"when_abandoned": "finish"},
    "admin": {"enabled": False},
    "log": {"access": False},
}
_LAST_ANSWERS_S = 60.0


class Task(NamedTuple):
    """What the tests want."""

    mode: str
    """``replay``: only what is recorded; ``record``: the model says all anew; ``cache``: it says what is not recorded."""
    recordings: str
    """The file that is replayed. It need not be there."""
    config: str
    """The gateway's configuration; empty for ``config.toml``, if there is one."""
    made: str
    """The file that new recordings are written to, in no order."""
    missed: str
    """The file that requests are noted in which no recording answers, a line of JSON each."""


def main() -> int:
    """Exit codes as those of `cli`."""
    task = Task(**orjson.loads(sys.stdin.buffer.readline()))
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        asyncio.run(_rehearse(task))
    except (ConfigError, CommandFailed, OSError) as error:
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        _say({"problems": problems})
        return 1
    return 0


async def _rehearse(task: Task) -> None:
    loaded = _load(task)
    async with AsyncExitStack() as stack:
        live = Live(loaded, SystemClock())
        stack.push_async_callback(live.close)
        store, _ = await open_store(stack, loaded)
        app = build_app(loaded.config, store, live.router)
        app.middlewares.append(rehearsing.middleware(partial(_note, task.missed)))
        server = HttpServer(app, app[RUNNING], patience(loaded.config), app[LIMITS], RUNNER_OPTIONS)
        stack.push_async_callback(server.close)
        await server.open()
        if task.mode != "record" and Path(task.recordings).exists():  # noqa: ASYNC240
            await app[RECORDINGS].take_file(Path(task.recordings), whose="everyone")
        [socket, *_] = sockets = bind("127.0.0.1", 0)
        await server.listen(sockets)
        _say({"base_url": f"http://127.0.0.1:{socket.getsockname()[1]}/v1"})
        await asyncio.to_thread(sys.stdin.buffer.read)
        await server.stop_listening()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_ANSWERS_S):
                await app[RUNNING].ended()
                await app[SERVICE].ended()
        if task.mode != "replay":
            with Path(task.made).open("wb") as file:  # noqa: ASYNC230
                async for lines in app[RECORDINGS].export(Filters()):
                    file.write(lines)
        await app[SERVICE].close()


def _load(task: Task) -> Loaded:
    """The configuration, less what tests have no use for. Raises `ConfigError`."""
    replays = task.mode == "replay"
    path = Path(task.config) if task.config else None
    flags = _FLAGS | {"cache": {**_FLAGS["cache"], "mode": task.mode}}
    loaded = load(path, os.environ, flags, secrets_needed=not replays)
    config = loaded.config
    if replays:
        config = _without_models(config)
    return _replaced(loaded, config)


def _without_models(config: Config) -> Config:
    """The same routes, and nobody behind them who could be asked: no client, no address, no key."""
    kept = ("name", "group", "models", "aliases", "default", "ignored_paths")
    upstreams = [
        SimulatedUpstreamConfig(kind="simulated", **{name: getattr(each, name) for name in kept})
        for each in config.upstreams or (FALLBACK_UPSTREAM,)
    ]
    return config.model_copy(update={"upstreams": tuple(upstreams)})


def _replaced(loaded: Loaded, config: Config) -> Loaded:
    models = tuple(model.model_copy(update={"ttl_s": None, "stale_s": None}) for model in config.models)
    return replace(loaded, config=config.model_copy(update={"models": models}))


def _note(missed: str, told: dict[str, Any]) -> None:
    with Path(missed).open("ab") as file:
        file.write(_line(told))


def _line(value: Any) -> bytes:
    return orjson.dumps(value) + b"\n"


def _say(what: dict[str, Any]) -> None:
    sys.stdout.buffer.write(_line(what))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

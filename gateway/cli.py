"""The commands. Exit codes: 0 for success, 1 where the service cannot run, 2 for a wrong configuration or command line."""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from gateway import __version__, commands, file_commands
from gateway.config import Loaded
from gateway.errors import CommandFailed, ConfigError
from gateway.logs import log_as, unhindered
from gateway.watching import Source


def main(arguments: list[str] | None = None) -> int:
    """The ``gateway`` command."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.command:
        parser.print_help()
        return 2
    try:
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except ConfigError as error:
        for problem in error.problems:
            _say(f"error: {problem}")
        return 2
    except CommandFailed as error:
        _say(f"error: {error}")
        return error.code
    except OSError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("gateway", description="An LLM streaming gateway with a Redis cache.")
    parser.add_argument("--version", action="version", version=f"gateway {__version__}")
    known = parser.add_subparsers(title="commands", dest="command", metavar="")
    serve = known.add_parser("serve", help="run the service", description="Runs the service until SIGINT or SIGTERM.")
    check = known.add_parser(
        "check", help="check the configuration", description="Checks the configuration and prints what would run."
    )
    for command, run in ((serve, _serve), (check, _check)):
        command.set_defaults(run=partial(_run, run), workers=None, worker=None, recordings=None)
        command.add_argument(
            "--mode",
            choices=("cache", "record", "replay", "off"),
            help="instead of [cache] mode: replay asks no model, record asks it for every answer, off keeps nothing",
        )
        command.add_argument(
            "--config", type=Path, metavar="FILE", help="the configuration (default: config.toml, if there is one here)"
        )
        command.add_argument("--host", help="the address to listen on, instead of [server] host")
        command.add_argument("--port", type=int, help="the port to listen on, instead of [server] port; 0: a free one")
    serve.add_argument("--workers", type=int, help="how many processes serve, instead of [server] workers")
    serve.add_argument(
        "--recordings",
        type=os.path.abspath,
        metavar="FILE",
        help="answer from this file of `gateway export` too, instead of [cache] recordings",
    )
    serve.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # a supervisor's: the file descriptor to hear it on
    commands.add_parsers(known)
    file_commands.add_parsers(known)
    return parser


def _run(run: Callable[[Source, Loaded], int], options: argparse.Namespace) -> int:
    """What needs the configuration in full. Raises `ConfigError`."""
    if options.worker is not None:
        return _work(options)
    source = Source(options.config, os.environ, _flags(options))
    loaded = source.load()
    for warning in loaded.warnings:
        _say(f"warning: {warning}")
    return run(source, loaded)


def _flags(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    places = {"server": ("host", "port", "workers"), "cache": ("mode", "recordings")}
    given = {
        section: {name: value for name in names if (value := getattr(options, name)) is not None}
        for section, names in places.items()
    }
    return {section: values for section, values in given.items() if values}


def _work(options: argparse.Namespace) -> int:
    """One of several processes that serve. What the configuration warns of, its supervisor has said."""
    from gateway.life import serve  # noqa: PLC0415
    from gateway.worker import Employed  # noqa: PLC0415

    employed = Employed(options.worker, options.config, os.environ, _flags(options))
    with unhindered():
        log_as(employed.loaded)
        _runner()(serve(employed.loaded, employed))
    return 0


def _serve(source: Source, loaded: Loaded) -> int:
    with unhindered():
        log_as(loaded)
        if loaded.config.server.workers > 1:
            from gateway.supervisor import supervise  # noqa: PLC0415

            if (code := asyncio.run(supervise(source, loaded, _say))) is not None:
                return code
        from gateway.life import serve_alone  # noqa: PLC0415  # `gateway --help` need not wait for the whole service to load

        _runner()(serve_alone(source, loaded, _say))
    return 0


def _runner() -> Callable[[Coroutine[Any, Any, None]], None]:
    """uvloop's where it is to be had."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return asyncio.run
    return uvloop.run


def _check(_: Source, loaded: Loaded) -> int:
    log_as(loaded)
    from gateway.app import MODES, describe_upstreams, rehearse  # noqa: PLC0415

    config = loaded.config
    asyncio.run(rehearse(loaded))
    server, cache = config.server, config.cache
    print(f"configuration: {loaded.source}")  # noqa: T201
    print(f"would listen on http://{server.host}:{server.port}/v1")  # noqa: T201
    where = "off" if cache.mode == "off" else config.redis.shown_url
    print(f"cache: {where}, kept for {cache.ttl_s:g} s{MODES.get(cache.mode, '')}")  # noqa: T201
    at = f" at {config.admin.listen}" if config.admin.listen else ""
    print(f"admin: {f'on{at}' if config.admin.is_open else 'off'}")  # noqa: T201
    print(describe_upstreams(config))  # noqa: T201
    print("ok")  # noqa: T201
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()

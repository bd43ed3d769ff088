"""The commands that administer a running gateway. They talk to it over HTTP: its store may live inside of it.

Exit codes: 0 for success, 1 where it failed, 2 for a wrong command line or configuration.
"""

import argparse
import asyncio
import json
import os
import re
import sys
from collections.abc import Callable, Coroutine, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

from gateway.config import load
from gateway.errors import CommandFailed

if TYPE_CHECKING:
    from gateway.remote import Remote

Command = Callable[["Remote", argparse.Namespace], Coroutine[Any, Any, int]]
_SHORTEST_INTERVAL_S, _LONGEST_INTERVAL_S = 0.05, 3600.0
SELECTORS = ("key", "id", "stream", "namespace", "model", "tag")

_EPILOG = """The gateway must have an admin key: [admin] key_env in its configuration names the variable that holds it.
Here it is taken from the same variable, or from the one that --key-env names.

example:
  {example}
"""


# The command line


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the commands; each sets ``run``, which takes the options and returns the exit code."""
    stats = new_parser(commands, "stats", "hits, misses, and what they saved", "gateway stats --scan", _stats)
    either = stats.add_mutually_exclusive_group()
    either.add_argument("--scan", action="store_true", help="look at every entry, and tell how many there are and how large")
    either.add_argument(
        "--watch", action="store_true", help="show what happens now, until Ctrl-C; with --json a line an interval"
    )
    stats.add_argument("--interval", type=_seconds, default=2.0, metavar="S", help="how often --watch looks (default: 2)")
    stats.add_argument("--count", type=positive, metavar="N", help="how many times --watch looks (default: without end)")
    listing = new_parser(commands, "list", "list what is stored", "gateway list --model 'gpt-*' --stale | head", _list)
    listing.add_argument("--namespace", help="only those of this namespace")
    listing.add_argument("--model", help="only those of this model, pattern or alias")
    listing.add_argument("--tag", help="only those with this tag")
    listing.add_argument("--min-age", type=float, metavar="S", help="only those that are so many seconds old")
    listing.add_argument("--max-age", type=float, metavar="S", help="only those that are not older")
    listing.add_argument("--min-bytes", type=int, metavar="N", help="only those that are so large")
    listing.add_argument("--stale", action="store_true", help="only those that are not fresh any more")
    listing.add_argument("--limit", type=positive, metavar="N", help="no more than so many")
    show = new_parser(commands, "show", "show one entry", "gateway show KEY --part body | jq .choices", _show)
    show.add_argument("key", type=_key, metavar="KEY", help="the entry's key, as `gateway list` tells it")
    show.add_argument("--part", choices=("body", "stream", "timing", "request"), help="only this, as it is stored")
    _add_purge(commands)
    _add_explain(commands)
    _add_profile(commands)


def _add_purge(commands: Any) -> None:
    purge = new_parser(commands, "purge", "delete what is stored", "gateway purge --model 'gpt-4*' --dry-run", _purge)
    purge.set_defaults(usage_error=purge.error)
    group = purge.add_argument_group("what to purge", "At least one; of several, all must fit.")
    group.add_argument("--key", help="an entry with all its samples")
    group.add_argument("--id", help="the answer with this response id, that of a hit too")
    group.add_argument("--stream", metavar="ID", help="the answer of this Gateway-Stream-Id")
    group.add_argument("--namespace", help="what is in this namespace")
    group.add_argument("--model", help="the answers of this model, pattern or alias")
    group.add_argument("--tag", help="what has this tag")
    group.add_argument("--all", action="store_true", help="everything")
    purge.add_argument("--dry-run", action="store_true", help="only count what is meant")
    purge.add_argument("--yes", action="store_true", help="do not ask before everything is purged")


def _add_explain(commands: Any) -> None:
    explain = new_parser(
        commands,
        "explain",
        "tell why a request is or is not answered from the cache",
        "gateway explain request.json",
        _explain,
    )
    explain.add_argument("file", metavar="FILE", help="the request's body (JSON); - reads it from standard input")
    explain.add_argument("--api", choices=("chat", "completions"), help="where it is sent to (default: as it looks)")
    explain.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="'NAME: VALUE'",
        help="a header that is sent with it; may be repeated",
    )
    explain.add_argument(
        "--caller-key-env", metavar="NAME", help="the variable that holds the caller's own key, whose view is wanted"
    )


def _add_profile(commands: Any) -> None:
    profile = new_parser(
        commands,
        "profile",
        "tell how fast the models of recordings are, and how to simulate them",
        "gateway profile --model 'gpt-*' --max-age 86400",
        _profile,
    )
    profile.add_argument("--namespace", help="only recordings of this namespace")
    profile.add_argument("--model", help="only those of this model, pattern or alias")
    profile.add_argument("--tag", help="only those with this tag")
    profile.add_argument("--max-age", type=float, metavar="S", help="only those that are not older")
    profile.add_argument(
        "--limit", type=positive, default=1000, metavar="N", help="look at no more than so many (default: 1000)"
    )


def new_parser(commands: Any, name: str, what: str, example: str, command: Command) -> argparse.ArgumentParser:
    """A command that talks to a running gateway."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}, in a running gateway.",
        epilog=_EPILOG.format(example=example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=lambda options: _run(command, options))
    parser.add_argument("--url", help="where the gateway is (default: [admin] listen, or [server] host and port)")
    parser.add_argument("--key-env", metavar="NAME", help="the variable that holds the admin key (default: [admin] key_env)")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="the configuration (default: config.toml, if there is one here)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def positive(text: str) -> int:
    """An option's value."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError("it must be a whole number, 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not _SHORTEST_INTERVAL_S <= seconds <= _LONGEST_INTERVAL_S:
        raise argparse.ArgumentTypeError(f"it must be a number from {_SHORTEST_INTERVAL_S:g} to {_LONGEST_INTERVAL_S:g}")
    return seconds


def _key(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{40}", text):
        raise argparse.ArgumentTypeError("it must be 40 hexadecimal digits, in lower case")
    return text


# Where the gateway is, and how to get in


def _run(command: Command, options: argparse.Namespace) -> int:
    from gateway.remote import Remote  # noqa: PLC0415  # `gateway --help` need not wait for an HTTP client

    url, key = _access(options)

    async def talk() -> int:
        async with Remote(url, key) as remote:
            return await command(remote, options)

    try:
        code = asyncio.run(talk())
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has enough. What is left in the buffer must not fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _access(options: argparse.Namespace) -> tuple[str, str]:
    """The gateway's address and its admin key. The configuration is read only for what the command line leaves open."""
    url, name, file = options.url, options.key_env, ""
    secrets: Mapping[str, str] = os.environ
    if not (url and name):
        # The secrets of the upstreams are the gateway's business.
        loaded = load(options.config, os.environ, secrets_needed=False)
        server, admin = loaded.config.server, loaded.config.admin
        url = url or (_url(*admin.address, "[admin] listen") if admin.address else _url(server.host, server.port))
        if not name:
            name, file = admin.key_name, admin.key_file
            secrets = {**os.environ, **loaded.secrets}
    if not name:
        raise CommandFailed("no admin key: name its variable in [admin] key_env of the configuration, or with --key-env", 2)
    key = secrets.get(name, "").strip()
    if not key and file:
        raise CommandFailed("no admin key: the file that [admin] key_file names cannot be read, or is empty", 2)
    if not key:
        raise CommandFailed("no admin key: the variable that --key-env or [admin] key_env names is not set", 2)
    if not key.isprintable():
        raise CommandFailed("the admin key has characters that no header can hold", 2)
    return _checked(url), key


def address(options: argparse.Namespace) -> str:
    """Where the gateway is, for those who need no key of its administration."""
    if options.url:
        return _checked(options.url)
    server = load(options.config, os.environ, secrets_needed=False).config.server
    return _url(server.host, server.port)


def _checked(url: str) -> str:
    if not _is_address(url):
        raise CommandFailed("--url must begin with http:// or https://, and have a host and no user or query", 2)
    return url.rstrip("/").removesuffix("/v1")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    rest = parts.username is not None or parts.query or parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not rest


def _url(host: str, port: int, key: str = "[server] port") -> str:
    if not port:
        raise CommandFailed(f"the port of {key} is 0, so nobody knows where the gateway listens: say it with --url", 2)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # to connect to, not to listen on
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# The commands


async def _stats(remote: "Remote", options: argparse.Namespace) -> int:
    from gateway import tables  # noqa: PLC0415

    if options.watch:
        return await _watch(remote, options)
    with tables.progress("looked at", None) as tell:
        path = "/admin/stats?scan=true" if options.scan else "/admin/stats"
        found = await remote.watch("GET", path, None, tell)
    tables.document(found) if options.json else tables.stats(found)
    return 0


async def _watch(remote: "Remote", options: argparse.Namespace) -> int:
    from gateway import tables  # noqa: PLC0415
    from gateway.core.rates import Watch  # noqa: PLC0415

    watch, looks, before_at = Watch(), 0, 0.0
    with tables.live() if not options.json else nullcontext(lambda figures: tables.lines([figures])) as show:
        while True:
            found = await remote.get("/admin/live")
            figures = watch.look(found["reports"], found["at"], found["at"] - before_at)
            if looks:
                show({"at": found["at"], **figures})
                sys.stdout.flush()
            if looks == options.count:
                return 0
            looks, before_at = looks + 1, found["at"]
            await asyncio.sleep(options.interval)


async def _list(remote: "Remote", options: argparse.Namespace) -> int:
    from gateway import tables  # noqa: PLC0415

    left, cursor, begun = options.limit, "", False
    while True:
        page = await remote.get("/admin/entries", _filters(options, left, cursor))
        entries = page["data"] if left is None else page["data"][:left]
        if options.json:
            tables.lines(entries)
        elif entries or not (page["cursor"] or begun):
            tables.entries(entries, head=not begun)
            begun = True
        cursor = page["cursor"]
        if left is not None:
            left -= len(entries)
        if not cursor or left == 0:
            return 0


def _filters(options: argparse.Namespace, left: int | None, cursor: str) -> dict[str, str]:
    given = {
        "namespace": options.namespace,
        "model": options.model,
        "tag": options.tag,
        "min_age_s": options.min_age,
        "max_age_s": options.max_age,
        "min_bytes": options.min_bytes,
        "stale": "true" if options.stale else None,
        "limit": min(left or 1000, 1000),
        "cursor": cursor or None,
    }
    return {name: str(value) for name, value in given.items() if value is not None}


async def _show(remote: "Remote", options: argparse.Namespace) -> int:
    from gateway import tables  # noqa: PLC0415

    path = f"/admin/entries/{options.key}"
    if options.part:
        tables.raw(await remote.raw(path, {"part": options.part}))
        return 0
    found = await remote.get(path)
    tables.document(found) if options.json else tables.entry(found)
    return 0


async def _purge(remote: "Remote", options: argparse.Namespace) -> int:
    from gateway import tables  # noqa: PLC0415

    wanted: dict[str, Any] = {name: getattr(options, name) for name in SELECTORS if getattr(options, name) is not None}
    if not (wanted or options.all):
        options.usage_error(f"say what to purge: {', '.join(f'--{name}' for name in SELECTORS)}, or --all")
    wanted |= {name: True for name in ("all", "dry_run") if getattr(options, name)}
    asks = options.all and not (options.yes or options.dry_run)
    if asks and not sys.stdin.isatty():
        options.usage_error("--all needs --yes where nobody can be asked")
    if asks and not tables.confirmed(f"Purge everything that {remote.url} has stored?"):
        raise CommandFailed("nothing was purged")
    with tables.progress("looked at", "meant" if options.dry_run else "purged") as tell:
        found = await remote.watch("POST", "/admin/purge", wanted, tell)
    tables.document(found) if options.json else tables.purge(found)
    return 0


async def _explain(remote: "Remote", options: argparse.Namespace) -> int:
    from gateway import tables  # noqa: PLC0415

    request = _read_request(options.file)
    api = options.api or ("completions" if "prompt" in request and "messages" not in request else "chat")
    headers = dict(map(header, options.header))
    if options.caller_key_env:
        headers["Authorization"] = f"Bearer {caller_key(options.caller_key_env)}"
    found = await remote.post("/admin/explain", {"api": api, "request": request, "headers": headers})
    tables.document(found) if options.json else tables.explanation(found)
    return 0


def caller_key(variable: str) -> str:
    """The key in the variable that ``--caller-key-env`` names. Raises `CommandFailed`."""
    key = os.environ.get(variable, "").strip()
    if not (key and key.isprintable()):
        raise CommandFailed("the variable that --caller-key-env names is not set, or holds no key", 2)
    return key


async def _profile(remote: "Remote", options: argparse.Namespace) -> int:
    from gateway import tables  # noqa: PLC0415
    from gateway.core.profile import config_of  # noqa: PLC0415

    given = {
        "namespace": options.namespace,
        "model": options.model,
        "tag": options.tag,
        "max_age_s": options.max_age,
        "limit": options.limit,
    }
    query = urlencode({name: value for name, value in given.items() if value is not None})
    with tables.progress("looked at", None) as tell:
        found = await remote.watch("GET", f"/admin/profile?{query}", None, tell)
    timed = [(row["model"], row["fitted"]) for row in found["models"] if row["timed"]]
    found["config"] = config_of(timed) if timed else ""
    tables.document(found) if options.json else tables.profile(found)
    return 0


def _read_request(file: str) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
        request = json.loads(text)
    except OSError as error:
        raise CommandFailed(f"{file} cannot be read: {error.strerror}", 2) from None
    except (ValueError, RecursionError) as error:
        raise CommandFailed(f"{file} is not JSON: {error}", 2) from None
    if not isinstance(request, Mapping):
        raise CommandFailed(f"{file} is not a request: it must be a JSON object", 2)
    return dict(request)


def header(text: str) -> tuple[str, str]:
    """The value of ``--header``. Raises `CommandFailed`."""
    name, colon, value = text.partition(":")
    if not (colon and name.strip()):
        raise CommandFailed("--header must be 'NAME: VALUE'", 2)
    return name.strip(), value.strip()

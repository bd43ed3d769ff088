"""The commands that carry recordings between a running gateway and files."""

import argparse
import asyncio
import importlib
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import orjson

from gateway.commands import address, caller_key, header, new_parser, positive
from gateway.core.jsonl import BadLine, Line, order_of
from gateway.core.lines import Lines
from gateway.core.redaction import Redact, Rule, by_rules
from gateway.errors import CommandFailed
from gateway.sorting import Sorter
from gateway.warm import COUNTED, Progress, Requests, State, Terms, Warmer

if TYPE_CHECKING:
    from gateway.remote import Remote

Write = Callable[[bytes], object]

_PATH = "/admin/recordings"
_LONGEST_LINE_BYTES = 268_435_456
# What is sent at a time: a gateway tells of no more than so many wrong lines.
_MOST_LINES = 1000
_MANY_BYTES = 4_194_304
_REDACTED = "[redacted]"
_OUTCOMES = {
    "imported": "imported",
    "kept": "not imported, since a later one is there",
    "expired": "not imported, since they are not fresh any more: --ttl keeps them",
    "purged": "not imported, since they were purged there a short while ago",
    "failed": "wrong",
}


def add_parsers(commands: Any) -> None:
    """Adds the commands; see `commands.add_parsers`."""
    out = new_parser(
        commands,
        "export",
        "write recordings to a file, one line of JSON each",
        "gateway export --tag ci -o ci.jsonl",
        _export,
    )
    out.add_argument("--output", "-o", type=Path, metavar="FILE", help="the file (default: standard output)")
    out.add_argument("--namespace", help="only those of this namespace")
    out.add_argument("--model", help="only those of this model, pattern or alias")
    out.add_argument("--tag", help="only those with this tag")
    out.add_argument("--min-age", type=float, metavar="S", help="only those that are so many seconds old")
    out.add_argument("--max-age", type=float, metavar="S", help="only those that are not older")
    out.add_argument(
        "--redact-pattern",
        action="append",
        default=[],
        metavar="REGEX",
        help=f"write {_REDACTED} for what this finds in questions and answers; may be repeated",
    )
    out.add_argument(
        "--redact",
        metavar="MODULE:FUNCTION",
        help="have this function change each line's object: it returns what is to be written, or None",
    )
    _add_warm(commands)
    into = new_parser(
        commands, "import", "take in what was exported", "gateway import ci.jsonl --everyone --ttl 86400", _import
    )
    into.add_argument("files", nargs="+", metavar="FILE", help="lines of JSON; - reads them from standard input")
    into.add_argument("--ttl", type=float, metavar="S", help="they are fresh for so long from now on (default: as before)")
    whose = into.add_mutually_exclusive_group()
    whose.add_argument("--everyone", action="store_true", help="they are for everyone, where answers are shared")
    whose.add_argument(
        "--caller-key-env", metavar="NAME", help="they are for the caller whose key is in this variable (default: as before)"
    )


def _add_warm(commands: Any) -> None:
    warm: argparse.ArgumentParser = commands.add_parser(
        "warm",
        help="fill the cache with the answers to a file of requests",
        description="Sends the requests of a file through a running gateway, so that their answers are stored.",
        epilog="A request is a line: OpenAI's Batch input format, or a plain body. Interrupted, it goes on from there when\n"
        "it is called again.\n\nexample:\n  gateway warm requests.jsonl --concurrency 16 --rate 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    warm.set_defaults(run=_run_warm)
    warm.add_argument("requests", type=Path, metavar="FILE", help="the requests, a line of JSON each")
    warm.add_argument("--url", help="where the gateway is (default: [server] host and port)")
    warm.add_argument(
        "--config", type=Path, metavar="FILE", help="the configuration (default: config.toml, if there is one here)"
    )
    warm.add_argument("--caller-key-env", metavar="NAME", help="the variable that holds the key of the caller to ask as")
    warm.add_argument(
        "--header", action="append", default=[], metavar="'NAME: VALUE'", help="sent with each request; may be repeated"
    )
    warm.add_argument("--concurrency", type=positive, default=8, metavar="N", help="how many at a time (default: 8)")
    warm.add_argument("--rate", type=_rate, metavar="N", help="no more than so many a second")
    warm.add_argument(
        "--retries", type=_retries, default=4, metavar="N", help="how many times what may pass is tried again (default: 4)"
    )
    warm.add_argument(
        "--failures", type=Path, metavar="FILE", help="where failures are written (default: FILE.failed.jsonl)"
    )
    warm.add_argument("--restart", action="store_true", help="begin anew, whatever was done before")
    warm.add_argument("--json", action="store_true", help="print JSON")


def _retries(text: str) -> int:
    return positive(text) if text != "0" else 0


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError("it must be a number above 0")
    return rate


# Out


async def _export(remote: "Remote", options: argparse.Namespace) -> int:
    from gateway import tables  # noqa: PLC0415

    redact = _redaction(options)
    seen = 0
    with Sorter() as sorter:
        with tables.progress("recordings", None) as tell:
            async for line in _lines(remote, options):
                if redacted := _redacted(line, redact):
                    sorter.add(_record(redacted))
                seen += 1
                tell(seen, 0)
        with _output(options.output) as write:
            written = _write(write, sorter.sorted())
    if options.output and options.json:
        tables.document({"written": written})
    elif options.output:
        tables.say(f"{written} recordings written")
    return 0


async def _lines(remote: "Remote", options: argparse.Namespace) -> AsyncIterator[bytes]:
    names = {"namespace": "namespace", "model": "model", "tag": "tag", "min_age": "min_age_s", "max_age": "max_age_s"}
    query = {name: str(value) for option, name in names.items() if (value := getattr(options, option)) is not None}
    lines = Lines(_LONGEST_LINE_BYTES)
    async for piece in remote.pieces(_PATH, query):
        for line in lines.feed(piece):
            if line:
                yield _checked(line)


def _checked(line: bytes) -> bytes:
    """The gateway's last word may be an error."""
    if line.startswith(b'{"error"'):
        raise CommandFailed(orjson.loads(line)["error"]["message"])
    return line


def _redaction(options: argparse.Namespace) -> list[Redact]:
    found: list[Redact] = [_function(options.redact)] if options.redact else []
    rules = [Rule(_pattern(text), _REDACTED) for text in options.redact_pattern]
    return [*found, by_rules(rules)] if rules else found


def _pattern(text: str) -> "re.Pattern[str]":
    try:
        return re.compile(text)
    except re.error as error:
        raise CommandFailed(f"--redact-pattern {text!r} is no regular expression: {error}", 2) from None


def _function(name: str) -> Redact:
    module, _, function = name.partition(":")
    sys.path.insert(0, "")  # a script beside the file that is written
    try:
        found: Redact = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise CommandFailed(f"--redact {name!r} is no MODULE:FUNCTION: {error}", 2) from None
    return found


def _redacted(line: bytes, redact: Iterable[Redact]) -> bytes | None:
    if not redact:
        return line
    value: Any = orjson.loads(line)
    digest = value["digest"]
    for each in redact:
        try:
            value = each(value)
        except Exception as error:
            raise CommandFailed(f"the redaction of {digest} has failed: {type(error).__name__}: {error}") from error
        if value is None:
            return None
    try:
        return Line.of(orjson.loads(orjson.dumps(value))).dumps()
    except (BadLine, TypeError) as error:
        raise CommandFailed(f"the redaction of {digest} has left no recording: {error}") from None


def _record(line: bytes) -> bytes:
    question, order = order_of(line)
    return b"\0".join((question, order, line))  # no JSON text holds a zero byte


def _write(write: Write, records: Iterable[bytes]) -> int:
    """Of each question the latest recording."""
    count, last = 0, b""
    for record in records:
        rest, _, line = record.rpartition(b"\0")
        question = rest.rpartition(b"\0")[0]
        if question != last:
            write(line + b"\n")
            count += 1
        last = question
    return count


@contextmanager
def _output(path: Path | None) -> Iterator[Write]:
    """A file is there in full, or as it was before."""
    if path is None:
        from gateway import tables  # noqa: PLC0415

        yield tables.raw
        return
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file.write
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# In


async def _import(remote: "Remote", options: argparse.Namespace) -> int:
    from gateway import tables  # noqa: PLC0415

    query = {"everyone": "true"} if options.everyone else {}
    if options.ttl is not None:
        query["ttl_s"] = str(options.ttl)
    headers = {"Gateway-Caller-Authorization": f"Bearer {caller_key(name)}"} if (name := options.caller_key_env) else {}
    total: dict[str, Any] = dict.fromkeys(_OUTCOMES, 0)
    with tables.progress("lines", None) as tell:
        for name in options.files:
            with _input(name) as file:
                for first, lines in _batches(file):
                    taken = await remote.send(_PATH, query, b"".join(lines), headers)
                    for error in taken["errors"]:
                        tables.complain(f"{name}:{first + error['line'] - 1}: {error['message']}")
                    total = {outcome: count + taken[outcome] for outcome, count in total.items()}
                    tell(sum(total.values()), 0)
    if options.json:
        tables.document(total)
    else:
        said = [f"{count} {_OUTCOMES[outcome]}" for outcome, count in total.items() if count or outcome == "imported"]
        tables.say("\n".join(said))
    return 0 if total["imported"] + total["kept"] == sum(total.values()) else 1


@contextmanager
def _input(name: str) -> Iterator[IO[bytes]]:
    if name == "-":
        yield sys.stdin.buffer
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(Path(name).open("rb"))
        except OSError as error:
            raise CommandFailed(f"{name} cannot be read: {error.strerror}", 2) from None
        yield file


def _batches(file: Iterable[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """Some lines at a time, with the number of the first one."""
    lines: list[bytes] = []
    first = size = 0
    for number, line in enumerate(file, 1):
        if lines and (len(lines) == _MOST_LINES or size + len(line) > _MANY_BYTES):
            yield first, lines
            lines, size = [], 0
        if not lines:
            first = number
        lines.append(line)
        size += len(line)
    if lines:
        yield first, lines


# Through the gateway


def _run_warm(options: argparse.Namespace) -> int:
    url = address(options)
    headers = dict(map(header, options.header))
    if options.caller_key_env:
        headers["Authorization"] = f"Bearer {caller_key(options.caller_key_env)}"
    failures = options.failures or options.requests.with_name(f"{options.requests.name}.failed.jsonl")
    with _input(str(options.requests)) as file:
        total = sum(1 for _ in file)
    began_s = time.monotonic()
    try:
        progress = asyncio.run(_warm(options, url, headers, failures, total))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command goes on from here\n")
        raise
    if not failures.stat().st_size:
        failures.unlink()
    _summarise(progress, failures, time.monotonic() - began_s, as_json=options.json)
    return 1 if progress.counts["errors"] else 0


async def _warm(options: argparse.Namespace, url: str, headers: dict[str, str], failures: Path, total: int) -> Progress:
    from gateway import tables  # noqa: PLC0415
    from gateway.remote import Caller  # noqa: PLC0415

    state = State(options.requests)
    if options.restart:
        state.forget()
    async with Caller(url, headers, options.concurrency) as caller:
        await caller.check()
        with _input(str(options.requests)) as file:
            requests = Requests(file)
            progress, left = state.load(requests)
            with (
                failures.open("ab" if requests.read else "wb") as failed,
                tables.warming(total, progress.done) as tell,
            ):
                terms = Terms(options.concurrency, options.rate, options.retries)
                warmer = Warmer(caller.ask, terms, progress, failed, lambda: tell(progress.count, progress.counts))
                await warmer.run(chain(left, requests), lambda: state.save(progress, requests))
    state.forget()
    return progress


def _summarise(progress: Progress, failures: Path, seconds: float, *, as_json: bool) -> None:
    from gateway import tables  # noqa: PLC0415

    counts = progress.counts
    found: dict[str, Any] = {name: counts[name] for name in ("hits", "misses", "errors", "retries")}
    found |= {"requests": sum(counts[name] for name in COUNTED), "unstored": dict(progress.unstored)}
    found |= {"failures": str(failures) if counts["errors"] else None, "seconds": round(seconds, 3)}
    tables.document(found) if as_json else tables.warmed(found)

"""A model for your tests: a pytest plugin that replays recordings from a file beside the tests, and makes it.

In the ``conftest.py`` at the root of your tests::

    pytest_plugins = ["gateway.testing"]

In a test::

    def test_an_answer(model_gateway):
        client = OpenAI(base_url=model_gateway.base_url, api_key="any")
        ...

``pytest --gateway-mode=record`` asks the models of your ``config.toml`` (or of the file that the ini option
``gateway_config`` names), and keeps what they say for ``test_x.py`` in ``test_x.recordings.jsonl``. From then on ``pytest``
replays it: no model is asked, no key is needed, and a test fails that asks for what is not recorded, with what is different.
``--gateway-mode=cache`` asks only for what is not recorded yet, where the gateway has the key, not each caller. The file is
that of `gateway.core.jsonl`: commit it.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import orjson
import pytest

from gateway.core.jsonl import Line, order_of

__all__ = ["ModelGateway", "gateway_config", "gateway_recordings", "gateway_redact", "model_gateway"]

Redact = Callable[[dict[str, Any]], dict[str, Any] | None]

_MODES = ("replay", "record", "cache")
_END_WITHIN_S = 90.0


class ModelGateway:
    """A running gateway, as one test sees it."""

    def __init__(self, process: "_Process") -> None:
        self.base_url: str = process.base_url
        """What an OpenAI client takes as its ``base_url``."""
        self.mode: str = process.mode
        self.recordings: Path = process.recordings
        self._process = process
        process.missed()  # what tests before this one have missed was theirs

    def missed(self) -> list[dict[str, Any]]:
        """The requests of this test that no recording answered, since it was last asked."""
        return self._process.missed()

    def check(self) -> None:
        """Fails the test where a request was not recorded. It is called when a test ends; call it earlier as you like."""
        if missed := self.missed():
            pytest.fail(_told(missed, self.recordings), pytrace=False)


# The fixtures


@pytest.fixture
def model_gateway(_gateway_process: "_Process") -> Iterator[ModelGateway]:
    """A gateway with the recordings of this module."""
    found = ModelGateway(_gateway_process)
    yield found
    found.check()  # for what other fixtures have asked while they went


@pytest.fixture(scope="module")
def gateway_recordings(request: pytest.FixtureRequest) -> Path:
    """The file of recordings: ``test_x.recordings.jsonl`` beside ``test_x.py``. Define your own to have another one."""
    return request.path.with_suffix(".recordings.jsonl")


@pytest.fixture(scope="module")
def gateway_redact() -> Redact | None:
    """What changes each line before it is written, as `gateway export --redact` does. Define your own to have one.

    A question that is changed is another one: its test would have to ask the changed one.
    """
    return None


@pytest.fixture(scope="session")
def gateway_config(request: pytest.FixtureRequest) -> Path | None:
    """The gateway's configuration: as the ini option ``gateway_config`` says, else ``config.toml`` in the root, if there."""
    root: Path = request.config.rootpath
    if named := str(request.config.getini("gateway_config")):
        return root / named
    return found if (found := root / "config.toml").exists() else None


@pytest.fixture(scope="module")
def _gateway_process(
    request: pytest.FixtureRequest,
    gateway_recordings: Path,
    gateway_config: Path | None,
    gateway_redact: Redact | None,
) -> Iterator["_Process"]:
    mode = request.config.getoption("gateway_mode")
    with tempfile.TemporaryDirectory() as folder:
        process = _Process(mode, gateway_recordings, gateway_config, Path(folder))
        with process:
            yield process
        if mode != "replay":
            keep(process.made.read_bytes(), gateway_recordings, gateway_redact)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gateway", "a gateway in the place of a model")
    group.addoption(
        "--gateway-mode",
        choices=_MODES,
        default="replay",
        help="replay: only what is recorded (default); record: the model says all anew; cache: it says what is not recorded",
    )
    parser.addini("gateway_config", "the gateway's configuration (default: config.toml, if there is one in the root)")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """A test fails for what it missed, also where it has taken the gateway's error for an answer."""
    found = getattr(item, "funcargs", {}).get("model_gateway")
    if not isinstance(found, ModelGateway):
        return (yield)
    try:
        result = yield
    except BaseException as error:
        if missed := found.missed():
            error.add_note(_told(missed, found.recordings))
        raise
    found.check()
    return result


# The process


class _Process:
    """`gateway.rehearsal` for one file of recordings. A context: leaving it ends the process."""

    def __init__(self, mode: str, recordings: Path, config: Path | None, folder: Path) -> None:
        self.mode = mode
        self.recordings = recordings
        self.base_url = ""
        self.made = folder / "made.jsonl"
        self._missed = folder / "missed.jsonl"
        self._read = 0
        self._log = folder / "log"
        self._task = {
            "mode": mode,
            "recordings": str(recordings),
            "config": str(config or ""),
            "made": str(self.made),
            "missed": str(self._missed),
        }

    def __enter__(self) -> None:
        command = [sys.executable, "-P", "-m", "gateway.rehearsal"]
        with self._log.open("wb") as log:
            # In a session of its own: what a terminal tells the tests is not for it. It ends when they do.
            self._process = subprocess.Popen(  # noqa: S603  # our own program
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        assert self._process.stdin  # noqa: S101
        assert self._process.stdout  # noqa: S101
        try:
            with suppress(BrokenPipeError):
                self._process.stdin.write(orjson.dumps(self._task) + b"\n")
                self._process.stdin.flush()
            said = self._process.stdout.readline()
            told: dict[str, Any] = orjson.loads(said) if said else {"problems": [self._log.read_text("utf-8", "replace")]}
            problems: list[str] = told.get("problems", [])
            if problems:
                pytest.fail("the gateway did not start:\n" + "\n".join(problems), pytrace=False)
        except BaseException:
            self._end()
            raise
        self.base_url = str(told["base_url"])

    def __exit__(self, *_: object) -> None:
        code = self._end()
        if code:
            pytest.fail(f"the gateway has failed:\n{self._log.read_text('utf-8', 'replace')}", pytrace=False)

    def _end(self) -> int:
        assert self._process.stdin  # noqa: S101
        assert self._process.stdout  # noqa: S101
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            return self._process.wait(_END_WITHIN_S)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._process.stdout.close()

    def missed(self) -> list[dict[str, Any]]:
        """What was missed since this was last asked. It is noted before the caller is told."""
        if not self._missed.exists():
            return []
        lines = self._missed.read_bytes().splitlines()
        new, self._read = lines[self._read :], len(lines)
        return [orjson.loads(line) for line in new]


def _told(missed: list[dict[str, Any]], recordings: Path) -> str:
    once = {orjson.dumps([each["path"], each["request"]]): each for each in missed}  # clients try again
    many = f"{len(once)} requests are" if len(once) > 1 else "a request is"
    lines = [f"{many} not recorded in {recordings}:"]
    for each in once.values():
        lines += [
            f"  POST {each['path']} {orjson.dumps(each['request']).decode()}",
            f"  key {each['key']}: {_difference(each['nearest'])}",
        ]
    return "\n".join([*lines, "pytest --gateway-mode=cache asks a model for it, and records what it says."])


def _difference(nearest: dict[str, Any] | None) -> str:
    """``nearest`` is what the explanation of a miss says."""
    if nearest is None:
        return "nothing that is recorded is like it"
    first = nearest["first"]
    if first is None:
        return f"a recording of the same request differs in {', '.join(nearest['differs_in'])}"
    ours, theirs = (orjson.dumps(first[name]).decode() for name in ("ours", "theirs"))
    places = nearest["differences"]
    more = f" (and in {places - 1} more places)" if places > 1 else ""
    return f"the nearest recording differs in {first['path']}: {ours} here, {theirs} there{more}"


# The file


def keep(made: bytes, path: Path, redact: Redact | None = None) -> None:
    """Adds new recordings to a file; of a question the latest stays. Tests in other processes may do so at the same time."""
    new = [line for text in made.splitlines() if text and (line := _everybodys(text, redact))]
    if not new:
        return
    with _locked(path) as file:
        lines: dict[bytes, bytes] = {}
        old = [_in_full(line) for line in file.read().splitlines() if line.strip()]
        for line in sorted([*old, *new], key=order_of):
            lines.setdefault(order_of(line)[0], line)
        file.seek(0)
        file.truncate()
        file.write(b"".join(line + b"\n" for line in lines.values()))


def _in_full(line: bytes) -> bytes:
    """One that was written by hand may be shorter than ours."""
    return line if line.startswith(b'{"v":1,"digest":') else Line.loads(line).dumps()


def _everybodys(text: bytes, redact: Redact | None) -> bytes | None:
    """Whose key paid for it is nothing to a test, and another one each time."""
    line: dict[str, Any] | None = orjson.loads(text)
    if redact and line:
        line = redact(line)
    if line is None:
        return None
    asked = line["request"]
    for name in ("tenant", "secret", "key"):
        asked.pop(name, None)
    asked["owner"] = "namespace" if asked.get("namespace") else "shared"
    return Line.of(line).dumps()


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    with path.open("a+b") as file:
        with suppress(ImportError):
            import fcntl  # noqa: PLC0415  # Windows has none

            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file

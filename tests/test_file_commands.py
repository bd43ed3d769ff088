"""``gateway export`` and ``gateway import``: files that are sorted, complete, and right on another machine."""

import json
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
from served import ENVIRON, PROGRAM, Served
from test_commands import exit_code, in_a_directory_with_a_request, run_main  # noqa: F401  # a fixture
from test_recordings import ALICE, SHARED, fill, misses, replies, start  # noqa: F401  # a fixture

from gateway.core.jsonl import order_of
from gateway.errors import StoreUnavailable


@pytest.fixture
async def here(start):  # noqa: F811
    return await start(cache=SHARED)


@pytest.fixture
async def there(start):  # noqa: F811
    return await start(cache=SHARED)


@pytest.fixture
def run(capsys):
    """Runs a command against a gateway; gives its exit code and what it printed."""

    async def run(gateway, *arguments):
        return await run_main(capsys, *arguments, "--url", gateway.origin, "--key-env", "ADMIN")

    return run


def lines_of(name):
    return read(name).splitlines()


def read(name):
    return Path(name).read_bytes()


def write(name, text):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())


def files(pattern):
    return [path.name for path in Path().glob(pattern)]


async def test_a_file_fills_another_gateway_and_is_the_same_when_it_comes_back(here, there, run):
    await fill(here, *(f"question {number}" for number in range(30)))
    code, out, _ = await run(here, "export", "--output", "one.jsonl")
    assert (code, out) == (0, "30 recordings written\n")
    assert lines_of("one.jsonl") == sorted(lines_of("one.jsonl"), key=order_of)
    assert (await run(there, "import", "one.jsonl"))[:2] == (0, "30 imported\n")
    assert await replies(there, "question 7") == await replies(here, "question 7")
    await run(there, "export", "-o", "two.jsonl")
    assert read("one.jsonl") == read("two.jsonl")
    code, out, _ = await run(there, "export")
    assert out.encode() == read("one.jsonl")
    assert files("*one*") == ["one.jsonl"]


async def test_a_new_recording_is_one_more_line(here, run):
    await fill(here, *map(str, range(10)))
    await run(here, "export", "-o", "before.jsonl")
    await fill(here, "new")
    await run(here, "export", "-o", "after.jsonl")
    after = lines_of("after.jsonl")
    [new] = set(after) - set(lines_of("before.jsonl"))
    after.remove(new)
    assert after == lines_of("before.jsonl")


async def test_filters_are_the_gateways(here, run):
    await fill(here, "hi")
    await fill(here, "red", headers={"Gateway-Cache-Tags": "red", "Gateway-Cache-Namespace": "team-a"})
    for options in (["--tag", "red"], ["--namespace", "team-a", "--max-age", "60", "--model", "model-*"]):
        code, out, _ = await run(here, "export", *options)
        [line] = out.splitlines()
        assert (code, json.loads(line)["request"]["namespace"]) == (0, "team-a")
    assert (await run(here, "export", "--min-age", "60"))[1] == ""


async def test_wrong_lines_are_told_by_file_and_number_and_the_others_are_in(here, there, run, monkeypatch):
    monkeypatch.setattr("gateway.file_commands._MOST_LINES", 2)
    await fill(here, "one", "two", "three")
    await run(here, "export", "-o", "good.jsonl")
    one, two, three = lines_of("good.jsonl")
    write("bad.jsonl", b"\n".join([one, b"", two, b'{"v": 9}', three, b"no"]))
    code, out, err = await run(there, "import", "bad.jsonl")
    assert code == 1
    assert out == "3 imported\n2 wrong\n"
    assert [line.partition(": ")[0] for line in err.splitlines()] == ["bad.jsonl:4", "bad.jsonl:6"]
    assert "v: 9 is no version" in err
    code, out, _ = await run(there, "import", "good.jsonl", "bad.jsonl", "--json")
    assert (code, json.loads(out)) == (1, {"imported": 6, "kept": 0, "expired": 0, "purged": 0, "failed": 2})


async def test_what_is_stale_needs_a_time_to_live(here, there, run):
    await fill(here, "hi")
    await run(here, "export", "-o", "old.jsonl")
    [line] = map(json.loads, lines_of("old.jsonl"))
    line["meta"]["written_at"] -= 1e6
    write("old.jsonl", json.dumps(line))
    code, out, _ = await run(there, "import", "old.jsonl")
    assert code == 1
    assert "1 not imported, since they are not fresh any more: --ttl keeps them" in out
    assert (await run(there, "import", "old.jsonl", "--ttl", "60"))[:2] == (0, "1 imported\n")
    assert await replies(there, "hi")


async def test_a_tenants_recordings_are_given_to_everyone_or_to_a_caller(start, there, run, monkeypatch):  # noqa: F811
    here, closed = await start(), await start()
    monkeypatch.setenv("ALICE", ALICE["Authorization"].removeprefix("Bearer "))
    await fill(here, "hi", headers=ALICE)
    await run(here, "export", "-o", "own.jsonl")
    assert (await run(there, "import", "own.jsonl"))[0] == 1
    assert (await run(there, "import", "own.jsonl", "--everyone"))[0] == 0
    assert await replies(there, "hi")
    assert (await run(closed, "import", "own.jsonl", "--everyone"))[0] == 1
    assert (await run(closed, "import", "own.jsonl", "--caller-key-env", "ALICE"))[0] == 0
    assert await replies(closed, "hi", ALICE)
    assert await misses(closed, "hi")
    assert exit_code("import", "own.jsonl", "--everyone", "--caller-key-env", "ALICE", "--url", "http://x") == 2


async def test_patterns_and_functions_redact_before_anything_is_written(here, there, run, monkeypatch):
    await fill(here, "my name is Alice Smith", "drop me", "keep me")
    write(
        "hooks.py",
        "def clean(line):\n"
        "    text = line['request']['body']['messages'][0]['content']\n"
        "    line['meta']['tags'] = ['cleaned']\n"
        "    return None if text == 'drop me' else line\n",
    )
    monkeypatch.syspath_prepend("")
    options = ["--redact", "hooks:clean", "--redact-pattern", "Al+ice", "--redact-pattern", "o w"]
    code, out, _ = await run(here, "export", "-o", "clean.jsonl", *options)
    assert (code, out) == (0, "2 recordings written\n")
    text = read("clean.jsonl").decode()
    assert "Alice" not in text
    assert "drop me" not in text
    assert (await run(there, "import", "clean.jsonl"))[0] == 0
    body = json.loads((await replies(there, "my name is [redacted] Smith"))[0])
    assert body["choices"][0]["message"]["content"] == "Hell[redacted]orld"
    sys.modules.pop("hooks")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--redact-pattern", "("], 2, "is no regular expression"),
        (["--redact", "nothing_there:x"], 2, "is no MODULE:FUNCTION"),
        (["--redact", "json:nothing"], 2, "is no MODULE:FUNCTION"),
        (["--redact", "json"], 2, "is no MODULE:FUNCTION"),
        (["--redact", "json:loads"], 1, "has failed: TypeError"),
        (["--redact", "operator:length_hint"], 1, "has left no recording"),
    ],
)
async def test_a_redaction_that_fails_leaves_no_file(here, run, options, code, message):
    await fill(here, "hi")
    write("old.jsonl", "as it was")
    found, out, err = await run(here, "export", "-o", "old.jsonl", *options)
    assert (found, out) == (code, "")
    assert message in err
    assert read("old.jsonl") == b"as it was"
    assert files("*old*") == ["old.jsonl"]


async def test_a_gateway_that_loses_its_store_in_the_middle_leaves_no_file(here, run, monkeypatch):
    await fill(here, "hi")
    page = here.store.page

    async def pages(cursor=""):
        if cursor:
            raise StoreUnavailable("gone")
        return (await page())[0], "1"

    monkeypatch.setattr(here.store, "page", pages)
    code, out, err = await run(here, "export", "-o", "new.jsonl")
    assert (code, out) == (1, "")
    assert "The store cannot be asked: gone" in err
    assert not files("*new*")


async def test_files_that_cannot_be_read_are_told(there, run):
    code, _, err = await run(there, "import", "missing.jsonl")
    assert code == 2
    assert "missing.jsonl cannot be read: No such file" in err


# A gateway that starts with a file


SIMULATED = {"model": "simulated", "max_tokens": 2}


@pytest.fixture
async def ci_file(start, run):  # noqa: F811
    """A file of what the simulated model has said, made by a gateway with tenants, and old."""
    here = await start(upstreams=[{"name": "simulated", "kind": "simulated", "models": ["simulated"], "tokens_per_s": 1e6}])
    await fill(here, "hi", **SIMULATED)
    await run(here, "export", "-o", "ci.jsonl")
    [line] = map(json.loads, lines_of("ci.jsonl"))
    line["meta"]["written_at"] -= 1e7
    line["meta"]["started_at"] -= 1e7
    write("ci.jsonl", json.dumps(line))


@pytest.mark.parametrize(
    "options",
    [["--recordings", "ci.jsonl"], ["--recordings", "ci.jsonl", "--workers", "2"], pytest.param([], marks=pytest.mark.slow)],
)
def test_a_gateway_starts_with_a_file_of_any_age(ci_file, options, tmp_path):
    environ = {"GATEWAY_CACHE_SCOPE": "shared"} | ({} if options else {"GATEWAY_CACHE_RECORDINGS": "ci.jsonl"})
    with Served(tmp_path, *options, **environ) as served:
        assert "1 recordings of " in served.said
        told = [served.chat("hi")[0] for _ in range(8)]
        assert all(status.startswith("gateway; hit") for status in told), told
        assert served.chat("ho")[0].startswith("gateway; fwd=miss")
        assert served.end() == 0


KEYLESS = '[{"name": "simulated", "kind": "openai", "models": ["simulated"]}]'


@pytest.mark.parametrize("upstreams", [{}, {"GATEWAY_UPSTREAMS": KEYLESS}])
def test_in_replay_mode_a_file_answers_everybody_and_nobody_else_does(ci_file, upstreams, tmp_path):
    with Served(tmp_path, "--mode", "replay", "--recordings", "ci.jsonl", **upstreams) as served:
        assert served.chat("hi")[0].startswith("gateway; hit")
        with pytest.raises(urllib.error.HTTPError) as missed:
            served.chat("ho")
        error = json.loads(missed.value.read())["error"]
        missed.value.close()
        assert (missed.value.code, error["code"]) == (504, "not_recorded")
        assert error["nearest"]["first"]["ours"] == "ho"


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_file_that_is_wrong_keeps_a_gateway_from_starting(ci_file, workers, tmp_path):
    arguments = ["serve", "--port", "0", "--workers", workers, "--recordings"]
    bad = read("ci.jsonl") + b"\n{}\n"
    for text, message in ((bad, ":2: v: is missing"), (read("ci.jsonl"), ":1: request.owner: is a tenant of another")):
        write("bad.jsonl", text)
        environ = {**ENVIRON, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
        if text == bad:
            environ["GATEWAY_CACHE_SCOPE"] = "shared"
        command = [*PROGRAM, *arguments, "bad.jsonl"]
        ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=40, check=False)
        assert ended.returncode == 2
        assert f"error: {tmp_path}/bad.jsonl{message}" in ended.stderr


def test_a_file_that_is_not_there_is_told(tmp_path):
    environ = {**ENVIRON, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [*PROGRAM, "serve", "--port", "0", "--recordings", "none.jsonl"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=40, check=False)
    assert (ended.returncode, "none.jsonl: cannot be read: No such file" in ended.stderr) == (2, True)


def test_without_its_store_a_gateway_does_not_start_with_a_file(ci_file, tmp_path):
    environ = {**ENVIRON, "HOME": str(tmp_path), "GATEWAY_REDIS_URL": f"unix://{tmp_path}/nobody.sock"}
    command = [*PROGRAM, "serve", "--port", "0", "--recordings", "ci.jsonl"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=40, check=False)
    assert (ended.returncode, "ci.jsonl cannot be loaded: The store cannot be asked" in ended.stderr) == (1, True)

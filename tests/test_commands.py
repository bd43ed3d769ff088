"""The commands that administer a running gateway: what they print, on a terminal and elsewhere, and their exit codes."""

import asyncio
import io
import json
import os
import pty
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from served import ENVIRON, PROGRAM, Served

from gateway.cli import main
from gateway.config import load

SECRET = "open-sesame"
COMMANDS = {
    "stats": [],
    "list": [],
    "show": ["0" * 40],
    "purge": ["--all", "--yes"],
    "explain": ["request.json"],
    "profile": [],
}


@pytest.fixture(autouse=True)
def in_a_directory_with_a_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("GATEWAY_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ADMIN", SECRET)
    request = {"model": "model-1", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    Path("request.json").write_text(json.dumps(request), "utf-8")


@pytest.fixture
async def gateway(start_gateway):
    return await start_gateway({"ADMIN": SECRET}, admin={"key_env": "ADMIN"})


@pytest.fixture
def run(gateway, capsys):
    """Runs a command against the gateway; gives its exit code and what it printed."""

    async def run(*arguments):
        return await run_main(capsys, *arguments, "--url", gateway.origin, "--key-env", "ADMIN")

    return run


async def run_main(capsys, *arguments):
    capsys.readouterr()
    code = await asyncio.to_thread(exit_code, *arguments)
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    return code, printed.out, printed.err


def exit_code(*arguments):
    try:
        return main(list(arguments))
    except SystemExit as end:
        return end.code


def write(name, text):
    Path(name).write_text(text, "utf-8")


async def entries(run, *arguments):
    code, out, _ = await run("list", "--json", *arguments)
    assert code == 0
    return [json.loads(line) for line in out.splitlines()]


async def fill(gateway):
    await gateway.chat("hi", stream=True)
    await gateway.chat("red", stream=True, headers={"Gateway-Cache-Tags": "red", "Gateway-Cache-Namespace": "team-a"})
    await gateway.chat("mini", stream=True, model="mini\x1b[2J[bold]")
    await gateway.landed()


# What they print


async def test_list_prints_each_entry_in_full_and_nothing_that_could_steer_a_terminal(gateway, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    await fill(gateway)
    code, out, err = await run("list")
    assert (code, err) == (0, "")
    head, *rows = out.splitlines()
    assert head.split() == ["KEY", "AGE", "TTL", "SIZE", "FRAMES", "STATE", "MODEL", "NAMESPACE", "TAGS"]
    assert {row.split()[0] for row in rows} == {entry["key"] for entry in await entries(run)}
    assert len(rows) == 3
    assert "\x1b" not in out
    assert r"mini\x1b[2J[bold]" in out
    assert sum("team-a" in row and row.endswith("red") for row in rows) == 1


async def test_list_filters_limits_and_goes_through_all_pages(gateway, run):
    await fill(gateway)
    assert [entry["tags"] for entry in await entries(run, "--tag", "red")] == [["red"]]
    assert len(await entries(run, "--namespace", "team-a", "--model", "model-*", "--max-age", "60")) == 1
    assert await entries(run, "--stale") == []
    assert await entries(run, "--min-bytes", "1000000", "--min-age", "5") == []
    assert len(await entries(run, "--limit", "2")) == 2
    code, out, _ = await run("list", "--stale")
    assert (code, out.split()[0]) == (0, "KEY")


async def test_profile_prints_percentiles_charts_and_a_configuration_that_can_be_used(gateway, run, tmp_path):
    await fill(gateway)
    code, out, _ = await run("profile")
    assert code == 0
    head, first, second, *_ = out.splitlines()
    assert head.split()[:3] == ["MODEL", "RECORDINGS", "TIMED"]
    assert first.split()[:3] == ["model-1", "2", "2"]
    assert second.startswith(r"mini\x1b[2J[bold]")
    assert "\x1b" not in out
    assert "model-1: time to the first token\n" in out
    assert "█" in out
    (tmp_path / "copied.toml").write_text(out.partition("\n# ")[2].partition("\n")[2], "utf-8")
    [upstream] = load(tmp_path / "copied.toml", {}).config.upstreams
    [row, _] = json.loads((await run("profile", "--json"))[1])["models"]
    assert upstream.behaviour("model-1").ttft_s == pytest.approx(row["fitted"]["ttft_s"], rel=1e-3)
    assert upstream.behaviour("mini\x1b[2J[bold]").length_tokens == row["fitted"]["length_tokens"]


async def test_profile_filters_and_samples(gateway, run):
    await fill(gateway)
    code, out, _ = await run("profile", "--limit", "1", "--model", "model-*")
    assert (code, "a sample: 1 of more recordings" in out) == (0, True)
    found = json.loads((await run("profile", "--json", "--tag", "red", "--max-age", "60"))[1])
    assert (found["recordings"], "[[upstreams.profiles]]" in found["config"]) == (1, True)
    none = json.loads((await run("profile", "--json", "--namespace", "nobody"))[1])
    assert (none["models"], none["config"]) == ([], "")


async def test_show_prints_what_an_entry_has(gateway, run):
    await fill(gateway)
    [red] = await entries(run, "--tag", "red")
    code, out, _ = await run("show", red["key"])
    assert code == 0
    for shown in (
        red["key"],
        "model-1 at scripted (chat)",
        "team-a",
        "Hello world",
        '"content": "red"',
        "first frame after",
    ):
        assert shown in out
    assert json.loads((await run("show", red["key"], "--json"))[1])["tags"] == ["red"]
    assert json.loads((await run("show", red["key"], "--part", "body"))[1])["object"] == "chat.completion"
    assert (await run("show", red["key"], "--part", "stream"))[1].startswith("data: {")


async def test_a_name_cannot_pass_for_a_line_of_the_table(gateway, run):
    await gateway.chat(model="a\nowner  b", stream=True)
    await gateway.landed()
    [entry] = await entries(run)
    write("odd.json", '{"model": "a\\nowner  b", "messages": [{"role": "user", "content": "hi"}]}')
    for command, argument in (("show", entry["key"]), ("explain", "odd.json")):
        code, out, _ = await run(command, argument)
        assert code == 0
        assert r"a\nowner  b at scripted" in out


async def test_stats_prints_what_was_saved(gateway, run):
    await fill(gateway)
    await gateway.chat("hi", stream=True)
    code, out, err = await run("stats", "--scan")
    assert (code, err) == (0, "")
    assert out.startswith("since 20")
    rows = [line.split() for line in out.splitlines()]
    assert ["model-1", "1", "0", "2"] in [row[:4] for row in rows]
    assert "5 of the saved tokens are of models without a price" in out
    assert ["total", "3"] in [row[:2] for row in rows]
    found = json.loads((await run("stats", "--json", "--scan"))[1])
    assert (found["total"]["hits"], found["stored"]["total"]["entries"]) == (1, 3)


async def test_purge_tells_what_went(gateway, run):
    await fill(gateway)
    code, out, err = await run("purge", "--tag", "red", "--model", "model-*", "--dry-run")
    assert (code, out, err) == (0, "1 would be purged, 3 looked at\n", "")
    assert (await run("purge", "--tag", "red", "--model", "model-*"))[:2] == (0, "1 purged, 3 looked at\n")
    code, out, _ = await run("purge", "--id", "chatcmpl-nobodys")
    assert (code, out.splitlines()[0]) == (0, "0 purged, 2 looked at")
    key = (await entries(run))[0]["key"]
    assert json.loads((await run("purge", "--key", key, "--json"))[1])["purged"] == 1
    assert len(await entries(run)) == 1
    code, _, err = await run("purge", "--all")
    assert (code, "--yes" in err) == (2, True)  # nobody is there to be asked
    assert (await run("purge", "--all", "--yes"))[0] == 0
    assert await entries(run) == []


async def test_purge_needs_to_be_told_what(run):
    code, out, err = await run("purge", "--yes")
    assert (code, out) == (2, "")
    assert "--namespace" in err
    assert "--all" in err
    code, _, err = await run("purge", "--namespace", "")
    assert (code, err) == (2, "error: 'namespace' must not be empty.\n")


@pytest.mark.parametrize(("said", "left"), [("y\n", 0), ("\n", 3), ("", 3)])
async def test_on_a_terminal_everything_is_purged_only_after_a_yes(gateway, run, monkeypatch, said, left):
    await fill(gateway)
    terminal = io.StringIO(said)
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    code, _, err = await run("purge", "--all")
    assert code == (1 if left else 0)
    assert gateway.origin in err
    assert len(await entries(run)) == left
    assert (await run("purge", "--all", "--yes"))[0] == 0


async def test_explain_says_what_would_be_found_and_what_was_nearest(gateway, run, monkeypatch):
    await gateway.chat("hi", stream=True)
    await gateway.landed()
    code, out, _ = await run("explain", "request.json")
    assert code == 0
    assert "model-1 at scripted" in out
    assert '"content": "hi"' in out.partition("canonical")[2]
    assert "yes: fresh" in out
    monkeypatch.setattr("sys.stdin", io.StringIO('{"model": "model-1", "messages": [{"role": "user", "content": "ho"}]}'))
    code, out, _ = await run("explain", "-")
    assert code == 0
    assert "messages.0.content (text, from 1 on)" in out
    assert '"hi"' in out
    assert '"ho"' in out


async def test_explain_takes_the_callers_view(gateway, run, monkeypatch):
    await fill(gateway)
    monkeypatch.setenv("CALLER", "callers-own-key")
    asked = "explain", "request.json", "--caller-key-env", "CALLER"
    code, out, _ = await run(*asked, "--header", "Gateway-Cache-Namespace: b")
    assert code == 0
    assert "callers-own-key" not in out
    assert "this caller's own, in the namespace b" in out
    found = json.loads((await run(*asked, "--json"))[1])
    assert found["nearest"]["differs_in"] == ["tenant"]


async def test_explain_sees_where_a_request_is_sent_to(run):
    write("completion.json", '{"model": "m", "prompt": "hi"}')
    assert json.loads((await run("explain", "completion.json", "--json"))[1])["api"] == "completions"


async def test_on_a_terminal_keys_are_whole_and_progress_is_shown(gateway, run):
    await fill(gateway)
    [red] = await entries(run, "--tag", "red")
    access = ["--url", gateway.origin, "--key-env", "ADMIN"]
    shown = await asyncio.to_thread(on_a_terminal, "list", *access)
    for each in (red["key"], "model-1", "team-a", "red", "TAGS"):  # though all that takes more than 80 columns
        assert each in shown
    assert "\x1b[2J" not in shown
    assert "model-1" in await asyncio.to_thread(on_a_terminal, "stats", *access)
    shown = await asyncio.to_thread(on_a_terminal, "purge", "--tag", "red", *access)
    assert "1 purged, 3 looked at" in shown
    assert "3 looked at, 1 purged" in shown  # beside a bar


async def test_stats_can_be_watched(gateway, run):
    await gateway.chat("hi", stream=True)
    await gateway.landed()
    watching = asyncio.ensure_future(run("stats", "--watch", "--json", "--interval", "0.3", "--count", "4"))
    while not watching.done():
        await gateway.chat("hi", stream=True)
    code, out, _ = await watching
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, len(lines)) == (0, 4)
    assert all(line["processes"] == 1 and line["errors_per_s"] == 0 for line in lines)
    assert any(line["requests_per_s"] > 0 and line["tokens_per_s"] > line["requests_per_s"] for line in lines)
    assert {line["hit_rate"] for line in lines} <= {1, None}
    busy = next(line for line in lines if line["ttft_hit_us"])
    assert 0 < busy["ttft_hit_us"]["p50"] <= busy["ttft_hit_us"]["p99"]
    assert busy["ttft_miss_us"] is None


async def test_what_is_watched_is_shown_in_one_place_on_a_terminal_and_line_by_line_elsewhere(gateway, run):
    access = ["--url", gateway.origin, "--key-env", "ADMIN"]
    watch = ["stats", "--watch", "--interval", "0.1", "--count", "2"]
    shown = await asyncio.to_thread(on_a_terminal, *watch, *access)
    assert shown.count("hit rate") >= 2
    assert "\x1b[1A" in shown  # over what was there before
    code, out, _ = await run(*watch)
    assert (code, out.count("busy processes       1\n"), "\x1b" in out) == (0, 2, False)


@pytest.mark.parametrize("interval", ["0", "-1", "x", "nan", "1e9"])
async def test_an_interval_that_nobody_can_wait_for_is_refused(run, interval):
    assert (await run("stats", "--watch", "--interval", interval))[0] == 2


def on_a_terminal(*arguments):
    """What a terminal of 80 columns is sent."""
    ours, theirs = pty.openpty()
    environ = {**ENVIRON, "ADMIN": SECRET, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen([*PROGRAM, *arguments], env=environ, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        sent = b""
        with suppress(OSError):  # as the end of a terminal is told
            while data := os.read(ours, 65536):
                sent += data
        os.close(ours)
        assert process.wait(30) == 0
    return sent.decode()


# What goes wrong


@pytest.mark.parametrize("command", COMMANDS)
async def test_each_command_says_clearly_why_it_failed(gateway, start_gateway, capsys, monkeypatch, command):
    monkeypatch.setenv("WRONG", "wrong-key")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    off = await start_gateway()
    arguments = [command, *COMMANDS[command]]
    cases = [
        (gateway.origin, "WRONG", 1, "does not take this admin key"),
        (off.origin, "ADMIN", 1, "[admin] key_env"),
        (nowhere, "ADMIN", 1, "cannot be reached: Connect"),
        (gateway.origin, "UNSET", 2, "is not set"),
        ("localhost:8080", "ADMIN", 2, "--url"),
    ]
    for url, variable, expected, text in cases:
        code, out, err = await run_main(capsys, *arguments, "--url", url, "--key-env", variable)
        assert (code, out) == (expected, ""), (url, variable)
        [line] = err.splitlines()
        assert line.startswith("error: ")
        assert text in line
        assert "wrong-key" not in line


async def test_a_store_that_is_away_is_told(start_gateway, own_redis, capsys):
    gateway = await start_gateway({"ADMIN": SECRET}, admin={"key_env": "ADMIN"}, redis={"url": own_redis.url})
    own_redis.stop()
    for command, arguments in COMMANDS.items():
        code, out, err = await run_main(capsys, command, *arguments, "--url", gateway.origin, "--key-env", "ADMIN")
        assert (code, out) == (1, "")
        assert "store cannot be asked" in err
        if command == "purge":
            assert "not marked" in err


async def test_what_is_no_gateway_is_told(upstream, capsys):
    async def page(asked):
        await asked.answer(b"<html>", status=502, content_type="text/html")

    upstream.script = page
    url = upstream.base_url.removesuffix("/v1")
    code, _, err = await run_main(capsys, "stats", "--url", url, "--key-env", "ADMIN")
    assert (code, err) == (1, f"error: what answers at {url} is no gateway (status 502)\n")


async def test_an_unknown_key_fails(run):
    assert await run("show", "0" * 40) == (1, "", "error: Nothing is stored under this key.\n")
    for key in ("", "../stats", "A" * 40):
        code, _, err = await run("show", key)
        assert code == 2
        assert err.endswith("error: argument KEY: it must be 40 hexadecimal digits, in lower case\n")


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://h:99999", "http://", "http://u:p@localhost", "http://localhost?x=1", "http://localhost#x"]
)
async def test_a_url_that_is_none_is_told(capsys, url):
    code, out, err = await run_main(capsys, "list", "--url", url, "--key-env", "ADMIN")
    assert (code, out) == (2, "")
    assert err.startswith("error: --url must begin with ")


async def test_a_key_that_no_header_can_hold_is_told(gateway, capsys, monkeypatch):
    monkeypatch.setenv("ODD", "two\nlines")
    code, _, err = await run_main(capsys, "list", "--url", gateway.origin, "--key-env", "ODD")
    assert (code, err) == (2, "error: the admin key has characters that no header can hold\n")


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5"])
async def test_a_limit_that_is_none_is_told(run, number):
    code, _, err = await run("list", "--limit", number)
    assert code == 2
    assert err.endswith("error: argument --limit: it must be a whole number, 1 or more\n")


@pytest.mark.parametrize("file", ["nowhere.json", "bad.json", "deep.json", "list.json"])
async def test_explain_needs_a_request(run, file):
    write("bad.json", "{")
    write("deep.json", "[" * 100_000)
    write("list.json", "[]")
    code, out, err = await run("explain", file)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {file} ")


# Where the gateway is


async def test_the_configuration_says_where_the_gateway_is_and_who_may(gateway, capsys, monkeypatch):
    port = gateway.origin.rpartition(":")[2]
    write("config.toml", f'[server]\nhost = "0.0.0.0"\nport = {port}\n[admin]\nkey_env = "ADMIN"\n')
    assert (await run_main(capsys, "stats"))[0] == 0
    assert (await run_main(capsys, "stats", "--url", f"{gateway.origin}/v1/"))[0] == 0
    monkeypatch.setenv("GATEWAY_SERVER_PORT", "0")
    code, _, err = await run_main(capsys, "stats")
    assert code == 2
    assert "--url" in err
    monkeypatch.delenv("GATEWAY_SERVER_PORT")
    monkeypatch.delenv("ADMIN")
    code, _, err = await run_main(capsys, "stats")
    assert code == 2
    assert "[admin] key_env names is not set" in err
    write("config.toml", "")
    code, _, err = await run_main(capsys, "stats", "--url", gateway.origin)
    assert code == 2
    assert "[admin] key_env" in err


async def test_only_the_admin_key_is_needed_and_no_other_secret(gateway, capsys):
    upstream = '[[upstreams]]\nname = "a"\nkind = "openai"\nbase_url = "http://localhost/v1"\napi_key_env = "UNSET"\n'
    write("config.toml", f'[cache]\nkey_secret_env = "UNSET"\n[admin]\nkey_env = "ADMIN"\n{upstream}')
    assert (await run_main(capsys, "stats", "--url", gateway.origin))[0] == 0
    assert (await run_main(capsys, "check"))[0] == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(capsys, command):
    assert exit_code(command, "--help") == 0
    assert f"gateway {command}" in capsys.readouterr().out.partition("example:")[2]


# As processes


def test_a_reader_who_has_enough_is_no_failure(tmp_path):
    environ = {"PATH": os.environ["PATH"], "ADMIN": SECRET, "GATEWAY_ADMIN_KEY_ENV": "ADMIN"}
    with Served(tmp_path, **{name: value for name, value in environ.items() if name != "PATH"}) as served:
        assert "admin: on at /admin/" in served.said
        served.chat()
        command = [*PROGRAM, "list", "--url", served.base_url, "--key-env", "ADMIN"]
        listing = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)
        assert (listing.returncode, listing.stderr, len(listing.stdout.splitlines())) == (0, "", 2)
        with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.close()
            assert (process.wait(30), process.stderr.read()) == (0, b"")


def test_help_does_not_load_what_only_some_commands_need():
    program = (
        "import gateway.cli, sys; print([name for name in ('rich', 'aiohttp', 'redis', 'openai') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "[]\n"

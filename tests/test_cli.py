"""The commands, their exit codes, and what they print."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from served import ENVIRON, PROGRAM, Served

from gateway import __version__
from gateway.cli import main

BAD = """
[server]
port = 99999
colour = "red"
[redis]
url = "http://localhost"
[[upstreams]]
name = "paid"
kind = "openai"
api_key_env = "NO_SUCH_VARIABLE_IS_SET"
"""
GOOD = """
[server]
port = 1234
[redis]
url = "redis://:hunter2@cache.example:6379/0"
[cache]
ttl_s = 60
[[upstreams]]
name = "paid"
kind = "openai"
api_key_env = "PAID_KEY"
models = ["gpt-*"]
"""


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("GATEWAY_"):
            monkeypatch.delenv(name)
    # What `main` does to the root logger would outlive the test.
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)


def run(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    environ = {**ENVIRON, "HOME": str(Path.cwd()), **environ}
    return subprocess.run([*PROGRAM, *arguments], env=environ, capture_output=True, text=True, timeout=30, check=False)


def exit_code(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as end:
        return end.code


def test_the_version_is_printed(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"gateway {__version__}\n"


def test_the_command_and_the_module_are_the_same():
    script = Path(sys.executable).with_name("gateway")
    for command in ([script], PROGRAM):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"gateway {__version__}\n", "")


def test_help_names_the_commands_and_their_flags(capsys):
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    assert "serve" in text
    assert "check" in text
    assert exit_code("serve", "--help") == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--config", "--host", "--port", "--workers"))
    assert "--worker " not in text


@pytest.mark.parametrize("arguments", [(), ("fly",), ("serve", "--fast"), ("serve", "--port", "http"), ("--port", "1")])
def test_a_wrong_command_line_is_code_2(arguments):
    assert exit_code(*arguments) == 2


def test_check_prints_what_would_run_and_no_secret(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.toml").write_text(GOOD)
    monkeypatch.setenv("PAID_KEY", "sk-secret")
    assert exit_code("check") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines()[-1] == "ok"
    for part in ("config.toml", "127.0.0.1:1234/v1", "redis://cache.example:6379/0", "60 s", "paid", "PAID_KEY", "gpt-*"):
        assert part in said.out
    assert "hunter2" not in said.out
    assert "sk-secret" not in said.out


def test_check_without_a_configuration_tells_of_the_defaults(capsys):
    assert exit_code("check") == 0
    text = capsys.readouterr().out
    assert "defaults" in text
    assert "embedded" in text
    assert "simulated" in text


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_wrong_configuration_is_code_2_and_every_problem_is_told(tmp_path, capsys, command):
    (tmp_path / "other.toml").write_text(BAD)
    assert exit_code(command, "--config", "other.toml") == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    for path in ("server.port", "server.colour", "redis.url", "upstreams.0.api_key_env"):
        assert len([line for line in lines if line.startswith(f"error: {path}: ")]) == 1
    assert len(lines) == 4


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_configuration_that_is_not_there_or_no_toml_is_code_2(tmp_path, capsys, command):
    assert exit_code(command, "--config", "nowhere.toml") == 2
    assert "nowhere.toml" in capsys.readouterr().err
    (tmp_path / "config.toml").write_text("[server")
    assert exit_code(command) == 2
    assert "TOML" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "serve"])
def test_an_upstream_that_cannot_be_made_is_code_2(tmp_path, capsys, command):
    target = "no_such_package.Model"
    (tmp_path / "config.toml").write_text(f'[[upstreams]]\nname = "l"\nkind = "langchain"\ntarget = "{target}"\n')
    assert exit_code(command) == 2
    assert "error: " in capsys.readouterr().err


def test_flags_beat_the_environment_which_beats_the_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.toml").write_text('[server]\nport = 1\nhost = "file.example"\n')
    monkeypatch.setenv("GATEWAY_SERVER_PORT", "2")
    assert exit_code("check") == 0
    assert "file.example:2/" in capsys.readouterr().out
    assert exit_code("check", "--port", "3", "--host", "flag.example") == 0
    assert "flag.example:3/" in capsys.readouterr().out


def test_a_variable_that_names_no_key_is_told(monkeypatch, capsys):
    monkeypatch.setenv("GATEWAY_REDIS_URI", "redis://typo")
    assert exit_code("check") == 0
    assert "warning: GATEWAY_REDIS_URI" in capsys.readouterr().err


def test_a_port_in_use_is_code_1_and_one_clear_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--port", str(port), GATEWAY_REDIS_URL="redis://127.0.0.1:1", GATEWAY_LOG_LEVEL="error")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert str(port) in line
    assert done.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_service_cleanly(tmp_path, number):
    with Served(tmp_path, GATEWAY_REDIS_URL="redis://127.0.0.1:1") as served:
        assert "without the cache" in served.said
        announced = served.said
        assert served.end(number) == 0
        assert served.said == announced


def test_a_url_that_the_redis_client_does_not_understand_is_code_2():
    done = run("serve", "--port", "0", GATEWAY_REDIS_URL="redis://127.0.0.1:1/?colour=red")
    assert done.returncode == 2
    assert "error: redis.url: " in done.stderr
    assert "Traceback" not in done.stderr

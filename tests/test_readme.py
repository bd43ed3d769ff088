"""The README's own commands, as a new user gives them: in a fresh copy, in a fresh virtual environment."""

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def command(name: str) -> str:
    found = re.search(rf"<!-- command: {name} -->\n```sh\n(.+)\n```", README)
    assert found, f"the README has no one-line command {name!r}"
    return found[1]


def asked() -> bytes:
    found = re.search(r"-d '(\{.*?\})'\n```", README, re.DOTALL)
    assert found
    return json.dumps(json.loads(found[1])).encode()


def ask(base_url: str) -> tuple[str, bytes]:
    request = urllib.request.Request(f"{base_url}/chat/completions", asked(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.headers["Cache-Status"], response.read()


def test_the_readme_has_two_commands_and_a_request():
    assert command("run").endswith("gateway serve")
    assert command("test").endswith("pytest")
    assert json.loads(asked())["stream"] is True


@pytest.mark.install
@pytest.mark.timeout(400)
def test_the_run_command_serves_a_miss_and_then_a_hit(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache"))
    environ = {**os.environ, "GATEWAY_SERVER_PORT": "0", "XDG_CACHE_HOME": str(tmp_path)}
    shell = subprocess.Popen(
        command("run"), shell=True, cwd=copy, env=environ, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert shell.stderr
    base_url = next((line.split()[-1] for line in shell.stderr if line.startswith("listening on ")), "")
    try:
        assert base_url, "the service did not start"
        miss, hit = ask(base_url), ask(base_url)
    finally:
        os.killpg(shell.pid, signal.SIGTERM)
        shell.stderr.read()
        shell.wait()
        shell.stderr.close()
    assert miss[0].startswith("gateway; fwd=miss")
    assert hit[0].startswith("gateway; hit")
    assert miss[1].count(b"data: ") == hit[1].count(b"data: ") > 50

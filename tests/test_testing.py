"""``gateway.testing``, as somebody else's tests use it: recorded once, replayed for ever, and failing where it must."""

import asyncio
import json
import re
import sys

import pytest
from served import ENVIRON

from gateway.testing import keep

TESTS = """
import json, os, urllib.error, urllib.request
import pytest

def ask(gateway, content, **members):
    body = {"model": "model-1", "messages": [{"role": "user", "content": content}], **members}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-" + os.environ.get("WHO", "me")}
    url = gateway.base_url + "/chat/completions"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=30) as response:
        return response.headers["Cache-Status"], response.read()

def test_whole(model_gateway):
    assert json.loads(ask(model_gateway, "hi")[1])["choices"][0]["message"]["content"] == "Hello world"

def test_stream(model_gateway):
    assert b"[DONE]" in ask(model_gateway, "hi", stream=True)[1]

def test_other(model_gateway):
    status, _ = ask(model_gateway, os.environ.get("ASKED", "ho"), temperature=0)
    assert status.startswith("gateway; hit") == (model_gateway.mode == "replay")

def test_who_takes_the_error_for_an_answer(model_gateway):
    try:
        ask(model_gateway, os.environ.get("ASKED", "ho"), temperature=0)
    except urllib.error.HTTPError as error:
        assert error.code == 504
        error.close()

def test_without():
    pass
"""
CONFIG = """
[[upstreams]]
name = "mine"
kind = "openai"
base_url = "{base_url}"
models = ["*"]
{key}
"""


@pytest.fixture
def project(tmp_path, upstream):
    """Somebody's tests, with a configuration whose upstream has a key of its own, or takes the caller's."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["gateway.testing"]\n', "utf-8")
    (tmp_path / "test_mine.py").write_text(TESTS, "utf-8")
    write_config(tmp_path, upstream.base_url, 'api_key_env = "KEY"')
    return tmp_path


def write_config(project, base_url, key=""):
    (project / "config.toml").write_text(CONFIG.format(base_url=base_url, key=key), "utf-8")


async def outcomes_of(project, *options, **environ):
    """Runs them; gives the outcome by the name of the test, and what was printed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-q", "--tb=short", *options]
    environ = {**ENVIRON, "HOME": str(project), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environ}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=project, env=environ, stdout=pipe, stderr=pipe)
    out, err = await process.communicate()
    said = (out + err).decode()
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR) \S+::(?:test_)?(\w+)", said, re.MULTILINE)
    return {name: outcome for outcome, name in outcomes}, said


def recordings(project):
    return project / "test_mine.recordings.jsonl"


NAMES = ("whole", "stream", "other", "who_takes_the_error_for_an_answer", "without")
ALL_PASS = dict.fromkeys(NAMES, "PASSED")


@pytest.mark.timeout(120)
async def test_what_was_recorded_is_replayed_and_what_was_not_fails_with_the_difference(project, upstream):
    found, said = await outcomes_of(project, "--gateway-mode=record", KEY="sk-paid-0123456789")
    assert found == ALL_PASS, said
    assert upstream.asked[0].headers["authorization"] == "Bearer sk-paid-0123456789"
    lines = recordings(project).read_bytes()
    assert [json.loads(line)["request"]["owner"] for line in lines.splitlines()] == ["shared", "shared"]
    assert b"sk-" not in lines
    assert sorted(path.name for path in project.iterdir() if path.name.startswith("test_mine")) == [
        "test_mine.py",
        "test_mine.recordings.jsonl",
    ]
    # Replayed without a key, for any caller, and nobody is asked.
    asked = len(upstream.asked)
    found, said = await outcomes_of(project, WHO="somebody else", ASKED="ha")
    missed = {"other": "FAILED", "who_takes_the_error_for_an_answer": "FAILED"}
    assert found == ALL_PASS | missed, said
    assert 'the nearest recording differs in messages.0.content: "ha" here, "ho" there' in said
    assert "--gateway-mode=cache" in said
    assert len(upstream.asked) == asked
    assert recordings(project).read_bytes() == lines


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_only_what_is_missing_is_asked_for_and_the_rest_of_the_file_stays(project, upstream):
    await outcomes_of(project, "--gateway-mode=record", KEY="sk-paid-0123456789")
    lines, asked = recordings(project).read_bytes().splitlines(), len(upstream.asked)
    found, said = await outcomes_of(project, "--gateway-mode=cache", "-k", "whole or takes", KEY="sk-paid", ASKED="ha")
    assert found == dict.fromkeys(("whole", "who_takes_the_error_for_an_answer"), "PASSED"), said
    assert len(upstream.asked) == asked + 1
    now = recordings(project).read_bytes().splitlines()
    assert len(set(now) - set(lines)) == 1
    assert set(lines) < set(now)


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_callers_own_key_pays_and_is_nothing_to_the_replay(project, upstream):
    write_config(project, upstream.base_url)
    found, said = await outcomes_of(project, "--gateway-mode=record", WHO="alice")
    assert found == ALL_PASS, said
    lines = recordings(project).read_bytes()
    await outcomes_of(project, "--gateway-mode=record", WHO="bob")
    assert len(recordings(project).read_bytes().splitlines()) == len(lines.splitlines()) == 2
    found, said = await outcomes_of(project, WHO="carol")
    assert found == ALL_PASS, said


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_gateway_that_does_not_start_is_told(project, upstream):
    recordings(project).write_text("{}\n", "utf-8")
    found, said = await outcomes_of(project)
    assert found == dict.fromkeys(NAMES, "ERROR") | {"without": "PASSED"}
    assert "test_mine.recordings.jsonl:1: v: is missing" in said
    (project / "config.toml").write_text("[cache]\nx = 1\n", "utf-8")
    assert "cache.x: is not a key of the configuration" in (await outcomes_of(project))[1]


async def test_two_processes_may_keep_what_they_have_made(tmp_path):
    line = json.dumps(
        {
            "v": 1,
            "request": {
                "api": "chat",
                "model": "m",
                "owner": "tenant",
                "tenant": "t" * 32,
                "secret": "s",
                "body": {"model": "m", "messages": [{"role": "user", "content": "%s"}]},
            },
            "answer": {"frames": [{"choices": [{"index": 0, "delta": {"content": "%s"}, "finish_reason": "stop"}]}]},
            "meta": {"started_at": 1.5},
        }
    )
    path = tmp_path / "both.jsonl"
    made = [(line.replace("%s", str(number)) + "\n").encode() for number in range(40)]
    await asyncio.gather(*(asyncio.to_thread(keep, text, path) for text in made))
    lines = path.read_bytes().splitlines()
    assert len(lines) == 40
    keep(made[7], path)
    assert path.read_bytes().splitlines() == lines
    keep(made[7].replace(b"1.5", b"2.5"), path, lambda told: told | {"meta": {"started_at": 3.5}})
    changed = set(path.read_bytes().splitlines()) - set(lines)
    assert [json.loads(each)["meta"]["started_at"] for each in changed] == [3.5]
    keep(made[7].replace(b'"7"', b'"70"'), path, lambda _: None)
    assert len(path.read_bytes().splitlines()) == 40

"""``gateway warm``: what it sends, how often, what it tells of it, and how it goes on after an interrupt."""

import asyncio
import io
import json
import signal
import subprocess
from pathlib import Path

import pytest
from scripted import say_hello
from served import ENVIRON, PROGRAM
from test_commands import in_a_directory_with_a_request, run_main  # noqa: F401  # a fixture

from gateway import warm
from gateway.warm import Progress, Reply, Requests, Terms, Warmer, retry_after_s


@pytest.fixture
async def gateway(start_gateway):
    return await start_gateway({"KEY": "sk-ours-0123456789"}, cache={"scope": "shared"})


@pytest.fixture
def run(gateway, capsys):
    """Runs the command on ``requests.jsonl``; gives its exit code, its summary, and what else it said."""

    async def run(*options):
        code, out, err = await run_main(capsys, "warm", "requests.jsonl", "--url", gateway.base_url, "--json", *options)
        return code, json.loads(out) if out else None, err

    return run


def chat(content, **members):
    return {"model": "model-1", "messages": [{"role": "user", "content": content}], **members}


def wished(content, name, path="/v1/chat/completions", **members):
    """In the Batch API's input format."""
    return {"custom_id": name, "method": "POST", "url": path, "body": chat(content, **members)}


def write(*requests):
    lines = [request if isinstance(request, str) else json.dumps(request) for request in requests]
    Path("requests.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def damage(name):
    Path(name).write_text("{", "utf-8")


def failures(name="requests.jsonl.failed.jsonl"):
    return [json.loads(line) for line in Path(name).read_text("utf-8").splitlines()]


def files():
    return sorted(path.name for path in Path().glob("requests.jsonl*"))


def counted(found, **counts):
    """What of a summary does not depend on how long it took."""
    names = ("requests", "hits", "misses", "errors", "retries")
    return {name: found[name] for name in names} == dict.fromkeys(names, 0) | counts


# What it sends


async def test_both_formats_fill_the_cache_and_the_second_run_hits(gateway, upstream, run):
    completion = {"model": "model-1", "prompt": "Say"}
    write(wished("one", "a"), chat("two", stream=True, stream_options={"include_usage": True}), "", completion)
    code, found, _ = await run()
    assert (code, counted(found, requests=3, misses=3)) == (0, True), found
    assert sorted(asked.path for asked in upstream.asked) == [
        "/v1/chat/completions",
        "/v1/chat/completions",
        "/v1/completions",
    ]
    assert await gateway.stores("one")
    assert await gateway.stores("two", stream=True)
    code, found, _ = await run()
    assert (code, counted(found, requests=3, hits=3)) == (0, True), found
    assert files() == ["requests.jsonl"]


async def test_headers_and_the_callers_key_are_sent(start_gateway, upstream, run, gateway, monkeypatch):
    monkeypatch.setenv("MINE", "sk-mine")
    write(chat("hi"))
    options = ["--header", "Gateway-Cache-Namespace: team", "--caller-key-env", "MINE"]
    assert (await run(*options))[0] == 0
    assert upstream.asked[0].headers["authorization"] == "Bearer sk-mine"
    assert await gateway.stores("hi", headers={"Gateway-Cache-Namespace": "team", "Authorization": "Bearer sk-mine"})


async def test_answers_that_are_not_stored_are_told_by_reason(gateway, run, upstream):
    write(chat("one"), chat("two"), chat("three"))
    code, found, _ = await run("--header", "Cache-Control: no-store")
    assert (code, found["misses"], found["unstored"]) == (0, 3, {"no-store": 3})


# What fails


async def test_failures_are_written_as_the_batch_api_writes_them(gateway, upstream, run):
    async def refuse_some(asked):
        if asked.json["messages"][0]["content"] == "bad":
            await asked.answer({"error": {"message": "no", "code": "nope"}}, 400, x_request_id="req_1")
        else:
            await say_hello(asked)

    upstream.script = refuse_some
    write(
        wished("good", "a"),
        wished("bad", "b"),
        "{",
        wished("x", "d", "/v1/embeddings"),
        "[]",
        {**wished("x", "f"), "body": 1},
        {"messages": 1},
    )
    code, found, _ = await run("--failures", "no.jsonl")
    assert (code, counted(found, requests=7, misses=1, errors=6)) == (1, True), found
    told = {each["custom_id"]: each for each in failures("no.jsonl")}
    assert len({each["id"] for each in told.values()}) == 6
    assert told["b"]["error"] is None
    assert told["b"]["response"] == {
        "status_code": 400,
        "request_id": "req_1",
        "body": {"error": {"message": "no", "code": "nope"}},
    }
    assert told["line-7"]["response"]["status_code"] == 400
    for name, message in {
        "line-3": "is not JSON",
        "d": "only POST to /v1/chat",
        "line-5": "is not an object",
        "f": "a body",
    }.items():
        assert told[name]["response"] is None
        assert told[name]["error"]["code"] == "invalid_request"
        assert message in told[name]["error"]["message"]
    assert await gateway.stores("good")


async def test_what_may_pass_is_tried_again_and_what_may_not_is_not(gateway, upstream, run):
    refusals = {"busy": [429, 503], "broken": [500] * 9, "wrong": [404]}

    async def refuse(asked):
        left = refusals.get(asked.json["messages"][0]["content"])
        if left:
            await asked.answer({"error": {"message": "no"}}, left.pop(0), retry_after="0")
        else:
            await say_hello(asked)

    upstream.script = refuse
    write(wished("busy", "a"), wished("broken", "b"), wished("wrong", "c"))
    code, found, _ = await run("--retries", "3")
    assert (code, counted(found, requests=3, misses=1, errors=2, retries=5)) == (1, True), found
    assert {each["custom_id"]: each["response"]["status_code"] for each in failures()} == {"b": 500, "c": 404}
    assert len(refusals["broken"]) == 5


@pytest.mark.parametrize(
    ("status", "headers", "again"),
    [
        (429, {}, True),
        (500, {}, True),
        (0, {}, True),
        (400, {}, False),
        (500, {"x-should-retry": "false"}, False),
        (429, {"x-should-retry": "false"}, True),
    ],
)
async def test_the_gateways_word_on_retries_holds(status, headers, again, monkeypatch):
    sleeps = clocked(monkeypatch)
    sent = []

    async def send(path, body):
        sent.append(body)
        return Reply(status, headers, b"{}")

    await warmed(send, [chat("hi")], Terms(retries=1))
    assert (len(sent), len(sleeps)) == ((2, 1) if again else (1, 0))


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [
        ("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("soon", None), ("", None), ("nan", 0.0),
        ("Tue, 14 Nov 2023 22:13:30 GMT", 10.0), ("Tue, 14 Nov 2023 22:13:10 GMT", 0.0), ("Tue, 99 Nov", None),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(value, wait_s):
    assert retry_after_s({"Retry-After": value} if value else {}, 1_700_000_000) == wait_s


# How fast


def clocked(monkeypatch):
    """A clock that only sleeping moves; gives the list of what was slept."""
    now, sleeps = [100.0], []

    async def sleep(seconds):
        sleeps.append(round(seconds, 6))
        now[0] += seconds

    monkeypatch.setattr(warm.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(warm.asyncio, "sleep", sleep)
    return sleeps


async def warmed(send, bodies, terms):
    """Fulfils wishes one after the other."""
    progress = Progress()
    warmer = Warmer(send, terms, progress, io.BytesIO(), lambda: None)
    for wish in Requests([json.dumps(body).encode() for body in bodies]):
        await warmer._fulfil(wish)
    return progress


async def test_a_rate_is_kept_and_a_retry_after_holds_all_up(monkeypatch):
    sleeps = clocked(monkeypatch)
    answers = [Reply(200, {}, b""), Reply(429, {"Retry-After": "7"}, b""), Reply(200, {}, b""), Reply(200, {}, b"")]

    async def send(path, body):
        return answers.pop(0)

    await warmed(send, [chat("1"), chat("2"), chat("3")], Terms(per_s=4.0))
    assert sleeps == [0.25, 7.0, 0.25]


async def test_no_more_than_asked_for_are_sent_at_a_time(gateway, upstream, run):
    running = most = 0

    async def count(asked):
        nonlocal running, most
        running += 1
        most = max(most, running)
        if most == 3:
            await asyncio.sleep(0)
        await say_hello(asked)
        running -= 1

    upstream.script = count
    write(*(chat(str(number)) for number in range(30)))
    assert (await run("--concurrency", "3"))[0] == 0
    assert 1 <= most <= 3
    assert len(upstream.asked) == 30


# Interrupts


async def test_an_interrupted_run_goes_on_where_it_was(gateway, upstream, run):
    async def hold_the_fifth(asked):
        if asked.json["messages"][0]["content"] == "4":
            await asked.gate("fifth")
        if asked.json["messages"][0]["content"] == "2":
            await asked.answer({"error": {"message": "no"}}, 400)
        else:
            await say_hello(asked)

    upstream.script = hold_the_fifth
    write(*(wished(str(number), f"wish {number}") for number in range(8)))
    command = [*PROGRAM, "warm", "requests.jsonl", "--url", gateway.origin, "--concurrency", "1"]
    process = await asyncio.create_subprocess_exec(*command, env=ENVIRON, stderr=subprocess.PIPE)
    await upstream.gate("fifth").reached.wait()
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert (process.returncode, b"goes on from here" in err) == (130, True)
    assert files() == ["requests.jsonl", "requests.jsonl.failed.jsonl", "requests.jsonl.warming"]
    upstream.gate("fifth").released.set()
    asked = len(upstream.asked)
    code, found, _ = await run()
    assert (code, found["requests"], found["errors"]) == (1, 8, 1)
    # The fifth call went on without whoever has asked for it.
    assert sorted(body["messages"][0]["content"] for body in upstream.bodies[asked:]) == ["5", "6", "7"]
    assert [each["custom_id"] for each in failures()] == ["wish 2"]
    assert files() == ["requests.jsonl", "requests.jsonl.failed.jsonl"]


def interrupt(count):
    """Leaves what a run leaves that has been interrupted after so many requests."""
    with Path("requests.jsonl").open("rb") as file:
        requests, progress = Requests(file), Progress()
        for wish in requests:
            if wish.line != 2:
                progress.add(wish.line)
            if wish.line == count:
                break
        warm.State(Path("requests.jsonl")).save(progress, requests)


async def test_only_what_was_not_done_is_sent_again(gateway, upstream, run):
    write(*(chat(str(number)) for number in range(6)))
    interrupt(4)
    assert (await run("--concurrency", "1"))[0] == 0
    assert [body["messages"][0]["content"] for body in upstream.bodies] == ["1", "4", "5"]


async def test_requests_that_have_changed_are_not_taken_for_those_before(gateway, upstream, run):
    write(*(chat(str(number)) for number in range(6)))
    interrupt(4)
    write(chat("other"), *(chat(str(number)) for number in range(1, 6)))
    code, _, err = await run()
    assert (code, "the requests have changed" in err) == (2, True)
    damage("requests.jsonl.warming")
    code, _, err = await run()
    assert (code, "is damaged" in err) == (2, True)
    assert upstream.asked == []
    code, found, _ = await run("--restart")
    assert (code, found["requests"]) == (0, 6)


# On the terminal


async def test_the_summary_is_for_people_without_json(gateway, capsys):
    write(chat("hi"), "{")
    code, out, _ = await run_main(capsys, "warm", "requests.jsonl", "--url", gateway.origin)
    assert code == 1
    facts = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in out.splitlines()}
    assert facts["requests"].startswith("2, in ")
    assert (facts["misses"], facts["errors"]) == ("1", "1, in requests.jsonl.failed.jsonl")


async def test_nobody_there_and_wrong_options_are_told(capsys):
    write(chat("hi"))
    code, _, err = await run_main(capsys, "warm", "requests.jsonl", "--url", "http://127.0.0.1:9")
    assert (code, "cannot be reached" in err) == (1, True)
    for options in (["--rate", "0"], ["--rate", "x"], ["--concurrency", "0"], ["--retries", "-1"]):
        assert (await run_main(capsys, "warm", "requests.jsonl", *options))[0] == 2
    assert (await run_main(capsys, "warm", "requests.jsonl", "--caller-key-env", "NONE"))[0] == 2
    assert (await run_main(capsys, "warm", "none.jsonl", "--url", "http://127.0.0.1:9"))[0] == 2

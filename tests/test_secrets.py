"""No secret is found anywhere but where it belongs: the environment, the files that hold it, and the call that it is for."""

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from redis import Redis
from running import RedisServer
from scripted import Asked, ScriptedUpstream, chunk, say_hello
from served import ENVIRON, PROGRAM, Served

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what processes were told is found in /proc")
PATIENCE_S = 20.0
NAMES = (
    "upstream_env", "upstream_second_env", "upstream_file", "admin", "key_secret", "redis", "redis_wrong", "langchain_env",
    "langchain_file", "langchain_inline", "proxy", "caller", "other_caller", "wrong_admin", "broken_file", "new_file",
)  # fmt: skip
LEAKY = '''
import asyncio

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk


class Leaky(BaseChatModel):
    api_key: str
    token: str
    password: str

    @property
    def _llm_type(self):
        return "leaky"

    def _generate(self, *args, **kwargs):
        raise NotImplementedError

    def _all(self):
        return f"{self.api_key} {self.token} {self.password}"

    async def _astream(self, messages, *args, **kwargs):
        text = messages[-1].content
        if "raises" in text:
            raise RuntimeError(f"401: wrong key {self._all()}")
        yield ChatGenerationChunk(message=AIMessageChunk(content="Hello"))
        if "breaks" in text:
            raise ConnectionError(f"cut off: {self._all()}")
        if "bug" in text:
            message = AIMessageChunk(content="")
            message.__dict__["additional_kwargs"] = Bug(self._all())
            yield ChatGenerationChunk(message=message)
            await asyncio.sleep(60)


class Bug(dict):
    """What a library hands out may fail when it is looked at."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def get(self, *_):
        raise RuntimeError(self.text)

'''


class Secrets:
    """One for each place; each is unlike any other text."""

    def __init__(self) -> None:
        self.values = {name: f"sk-{name[:3]}-{os.urandom(16).hex()}" for name in NAMES}

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    def in_text(self, text: bytes) -> set[str]:
        """The names of those that are in it, in part or in another form."""
        return {name for name, value in self.values.items() if any(form in text for form in forms(value))}


def forms(value: str) -> Iterator[bytes]:
    yield value[7:23].encode()  # a part says as much
    for text in (value, f"user:{value}", f":{value}"):
        yield base64.b64encode(text.encode()).rstrip(b"=")[:-2]
    yield quote(value, safe="").encode()
    yield value.encode().hex().encode()


class Everything:
    """All that could be seen, by where it was."""

    def __init__(self) -> None:
        self.seen: dict[str, bytes] = {}

    def add(self, where: str, text: str | bytes) -> None:
        self.seen[where] = self.seen.get(where, b"") + (text.encode() if isinstance(text, str) else text)


@pytest.fixture
def secrets() -> Secrets:
    return Secrets()


@pytest.fixture
def everything() -> Everything:
    return Everything()


@pytest.fixture
def redis(own_redis: RedisServer, secrets: Secrets) -> Iterator[Redis]:
    """A server with a password."""
    with Redis.from_url(own_redis.url) as client:
        client.config_set("requirepass", secrets["redis"])
        client.auth(secrets["redis"])
        yield client


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session:
        yield session


async def echoes(asked: Asked) -> None:
    """Upstreams that show what they were sent, in every way in which they can fail."""
    sent = asked.headers.get("authorization", "") + asked.headers.get("proxy-authorization", "")
    key = sent.rpartition(" ")[2]
    wrong = {"error": {"message": f"Incorrect API key provided: {key}. {sent}", "code": key, "param": sent}}
    text = asked.body.decode()
    if "ok" in text or asked.method == "GET":
        await say_hello(asked)
    elif "in-stream" in text:
        await asked.head(x_request_id=key)
        await asked.event(chunk({"role": "assistant", "content": "Hello"}))
        await asked.event(wrong)
        await asked.end()
    elif "reported" in text:
        await asked.answer(wrong)
    elif "html" in text:
        await asked.answer(f"<p>{sent}</p>".encode(), 401, f"text/html; was={key}")
    elif "moved" in text:
        await asked.answer(b"", 302, location=f"http://elsewhere.test/?key={key}")
    elif "garbage" in text:
        await asked.answer(f"{{{sent}".encode(), 200)
    elif "reset" in text:
        asked.reset()
    else:
        status = next((status for status in (429, 500, 404) if str(status) in text), 401)
        headers = {"x_request_id": f"req-{key}", "x_ratelimit_reset": key, "retry_after": key}
        await asked.answer(wrong, status, **headers)


CONTENTS = ["ok", "401", "429", "500", "404", "in-stream", "reported", "html", "moved", "garbage", "reset"]


def written(secrets: Secrets, upstream: ScriptedUpstream, redis_url: str, folder: Path) -> str:
    """The configuration, which names secrets; and one that somebody has put into it all the same."""
    for name in ("upstream_file", "langchain_file"):
        (folder / name).write_text(secrets[name])
    origin = f"http://127.0.0.1:{upstream.port}"
    return f"""
[server]
relay_paths = ["embeddings"]
[redis]
url = "{redis_url}"
[cache]
key_secret_env = "KEY_SECRET"
compress_from_bytes = 0
[admin]
key_env = "ADMIN"
listen = "127.0.0.1:0"
[log]
level = "debug"
[retries]
max_retries = 1
backoff_s = 0.0
[ejection]
enabled = false
[[upstreams]]
name = "own"
kind = "openai"
base_url = "{origin}/v1"
api_key_env = "UPSTREAM"
api_key_envs = ["UPSTREAM_2"]
models = ["own"]
[[upstreams]]
name = "by-file"
kind = "openai"
base_url = "{origin}/v1"
api_key_file = "{folder}/upstream_file"
models = ["by-file"]
[[upstreams]]
name = "passing"
kind = "openai"
base_url = "{origin}/v1"
models = ["passing"]
[[upstreams]]
name = "proxied"
kind = "openai"
base_url = "http://far.test/v1"
api_key_env = "UPSTREAM"
models = ["proxied"]
[[upstreams]]
name = "refused"
kind = "openai"
base_url = "http://127.0.0.1:9/v1"
api_key_env = "UPSTREAM"
models = ["refused"]
[[upstreams]]
name = "langchain"
kind = "langchain"
target = "leaky.Leaky"
models = ["langchain"]
arguments = {{ password = "{secrets["langchain_inline"]}" }}
arguments_env = {{ api_key = "LANGCHAIN" }}
arguments_file = {{ token = "{folder}/langchain_file" }}
"""


@pytest.fixture
def environ(secrets: Secrets, upstream: ScriptedUpstream, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/leaky.py").write_text(LEAKY)
    proxy = f"http://user:{secrets['proxy']}@127.0.0.1:{upstream.port}"
    return {
        "ADMIN": secrets["admin"],
        "KEY_SECRET": secrets["key_secret"],
        "UPSTREAM": secrets["upstream_env"],
        "UPSTREAM_2": secrets["upstream_second_env"],
        "LANGCHAIN": secrets["langchain_env"],
        "HTTP_PROXY": proxy,
        "PYTHONPATH": f"{ENVIRON['PYTHONPATH']}{os.pathsep}{tmp_path}/modules",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


class Watched:
    """A gateway, all that it says, and all that it answers."""

    def __init__(self, served: Served, session: aiohttp.ClientSession, everything: Everything) -> None:
        self.served = served
        self.everything = everything
        self._session = session
        self._heard = threading.Condition()
        self._hearing = threading.Thread(target=self._hear)
        self._hearing.start()

    def _hear(self) -> None:
        assert self.served.process.stderr
        for line in self.served.process.stderr:
            with self._heard:
                self.served.said += line
                self._heard.notify_all()

    def until_said(self, text: str, times: int = 1) -> None:
        with self._heard:
            assert self._heard.wait_for(lambda: self.served.said.count(text) >= times, PATIENCE_S), (text, self.served.said)

    @property
    def operators(self) -> str:
        [line] = [line for line in self.served.said.splitlines() if line.startswith("metrics: on at ")]
        return line.split()[-1].removesuffix("/metrics")

    async def ask(self, method: str, url: str, body: Any = None, key: str = "", **headers: str) -> bytes:
        sent = {**headers, **({"Authorization": f"Bearer {key}"} if key else {})}
        async with self._session.request(method, url, json=body, headers=sent) as response:
            text = await response.read()
            where = f"{method} {url.split('/', 3)[3]} {body or ''} -> {response.status}"
            self.everything.add(where, f"{response.headers}\n".encode() + text)
            return text

    async def chat(self, model: str, content: str, key: str = "", **members: Any) -> bytes:
        body = {"model": model, "messages": [{"role": "user", "content": content}], **members}
        return await self.ask("POST", f"{self.served.base_url}/chat/completions", body, key)

    def end(self) -> None:
        self.served.process.send_signal(signal.SIGTERM)
        assert self.served.process.wait(PATIENCE_S) == 0
        self._hearing.join()
        self.everything.add("what was printed", self.served.said)


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_no_secret_is_found_anywhere(secrets, everything, redis, own_redis, upstream, session, environ, tmp_path):
    upstream.script = echoes
    url = own_redis.url.replace("unix://", f"unix://:{secrets['redis']}@")
    file = tmp_path / "config.toml"
    file.write_text(written(secrets, upstream, url, tmp_path))
    known = {*tmp_path.rglob("*")}
    with Served(tmp_path, "--workers", "2", wait=False, **environ) as served:
        await asyncio.to_thread(served.announce)
        watched = Watched(served, session, everything)
        try:
            await provoke(watched, secrets)
            await administer(watched, secrets)
            see_processes(everything, served)
            see_redis(everything, redis)
            await refuse(watched, secrets, redis)
            await asyncio.to_thread(reload, watched, secrets, file)
        finally:
            await asyncio.to_thread(watched.end)
    await asyncio.to_thread(run_commands, everything, secrets, environ, file, watched.served.base_url)
    see_redis(everything, redis)
    for path in {*tmp_path.rglob("*")} - known:
        if path.is_file():
            everything.add(f"the file {path.name}", path.read_bytes())
    # What was asked for has happened, else nothing is proven.
    sent = {asked.headers.get("authorization", "").removeprefix("Bearer ") for asked in upstream.asked}
    assert {secrets[name] for name in ("upstream_env", "upstream_second_env", "upstream_file", "caller")} <= sent
    assert any("proxy-authorization" in asked.headers for asked in upstream.asked)
    assert b"Traceback" in everything.seen["what was printed"], "the bug was none"
    found = {where: names for where, text in everything.seen.items() if (names := secrets.in_text(text))}
    assert found == {}


@pytest.mark.parametrize("content", ["401", "429", "500", "404", "in-stream", "reported", "html"])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_an_upstream_repeats_of_a_key_is_hidden_from_callers_and_from_redis(
    start_gateway, upstream, shared_redis, secrets, content, stream
):
    upstream.script = echoes
    own = {"name": "own", "kind": "openai", "base_url": upstream.base_url, "models": ["own"], "api_key_env": "UPSTREAM"}
    passing = {"name": "passing", "kind": "openai", "base_url": upstream.base_url, "models": ["passing"]}
    prefix = f"t{os.urandom(6).hex()}"
    gateway = await start_gateway(
        {"UPSTREAM": secrets["upstream_env"]},
        redis={"url": shared_redis.url, "prefix": prefix, "lookup_timeout_s": 2.0},
        upstreams=[own, passing],
    )
    headers = {"Authorization": f"Bearer {secrets['caller']}"}
    for model in ("own", "passing"):
        got = await gateway.chat(content, model=model, stream=stream, headers=headers)
        assert b"Incorrect API key provided" in got.body or content in ("html", "reset")
        assert secrets.in_text(got.body + repr(got.headers).encode()) == set()
    await gateway.landed()
    with Redis.from_url(shared_redis.url) as redis:
        kept = [redis.xrange(name) for name in redis.scan_iter(f"{prefix}:*:log:*")]
    assert len(kept) == 2
    assert secrets.in_text(repr(kept).encode()) == set()


async def provoke(watched: Watched, secrets: Secrets) -> None:
    """All that can go well or wrong with an upstream, as a stream and whole."""
    for stream in (False, True):
        for model, key in (("own", ""), ("by-file", ""), ("proxied", ""), ("passing", secrets["caller"])):
            for content in CONTENTS:
                await watched.chat(model, content, key, stream=stream)
        for content in ("ok", "raises", "breaks", "bug"):
            await watched.chat("langchain", content, stream=stream)
        await watched.chat("refused", "ok", stream=stream)
        await watched.chat("passing", "401", secrets["other_caller"], stream=stream)
        await watched.chat("unknown", "ok", secrets["caller"], stream=stream)
    for model, key in (("own", ""), ("passing", secrets["caller"])):
        for content in ("401", "html", "500"):
            await watched.ask("POST", f"{watched.served.base_url}/embeddings", {"model": model, "input": content}, key)
    await watched.ask("GET", f"{watched.served.base_url}/models", key=secrets["caller"])
    await watched.ask("GET", f"{watched.served.base_url}/nothing", key=secrets["caller"])


async def administer(watched: Watched, secrets: Secrets) -> None:
    origin, key = watched.operators, secrets["admin"]
    for path in ("/metrics", "/healthz", "/readyz", "/openapi.json", "/nothing"):
        await watched.ask("GET", origin + path)
    for shown in ("", secrets["wrong_admin"]):
        await watched.ask("GET", f"{origin}/admin/stats", key=shown)
    for path in ("", "stats?scan=true", "nothing"):
        await watched.ask("GET", f"{origin}/admin/{path}", key=key)
    listed = json.loads(await watched.ask("GET", f"{origin}/admin/entries", key=key))["data"]
    assert len(listed) > 3
    for entry in listed:
        await watched.ask("GET", f"{origin}/admin/entries/{entry['key']}", key=key)
    asked = {"model": "passing", "messages": [{"role": "user", "content": "ok"}]}
    explained = {"request": asked, "headers": {"Authorization": f"Bearer {secrets['caller']}"}}
    await watched.ask("POST", f"{origin}/admin/explain", explained, key)


def see_processes(everything: Everything, served: Served) -> None:
    assert len(served.workers) == 2
    for pid in (served.process.pid, *served.children):
        everything.add(f"the arguments of {pid}", Path(f"/proc/{pid}/cmdline").read_bytes())


def see_redis(everything: Everything, redis: Redis) -> None:
    read: dict[bytes, Any] = {
        b"string": redis.get,
        b"hash": redis.hgetall,
        b"stream": redis.xrange,
        b"set": redis.smembers,
        b"zset": lambda name: redis.zrange(name, 0, -1),
        b"list": lambda name: redis.lrange(name, 0, -1),
    }
    names = list(redis.scan_iter())
    assert names
    for name in names:
        kind = redis.type(name)
        if kind != b"none":  # expired just now
            everything.add(f"in Redis {name.decode()}", name + repr(read[kind](name)).encode())


async def refuse(watched: Watched, secrets: Secrets, redis: Redis) -> None:
    """Redis has another password from now on."""
    redis.config_set("requirepass", secrets["redis_wrong"])
    redis.client_kill_filter(_type="normal", skipme=True)
    while "store-unavailable" not in str(watched.everything.seen):
        await watched.chat("own", "ok", stream=True)
    await asyncio.to_thread(watched.until_said, "Redis does not serve")
    redis.config_set("requirepass", secrets["redis"])
    await asyncio.to_thread(watched.until_said, "Redis is back")


BROKEN = (
    'url = "redis://:{secret}@host:port"',
    'url = "redis://user:{secret}@host/1@2"',
    'url = "{secret}"',
    'password = "{secret}"',
    'url = "redis://:{secret}',
    "url = redis://:{secret}@host",
    'prefix = "{secret} "',
)
BROKEN_UPSTREAMS = (
    'api_key = "{secret}"',
    'api_key_env = "{secret}"',
    'api_key_file = "{secret}"',
    'base_url = "http://user:{secret}@host/v1"',
    'base_url = "http://host/v1?api-key={secret}"',
    'base_url = "http://host/v1#{secret}"',
    'models = "{secret}"',
)


def broken(secrets: Secrets) -> Iterator[str]:
    secret = secrets["broken_file"]
    yield from ("[redis]\n" + line.replace("{secret}", secret) + "\n" for line in BROKEN)
    for line in BROKEN_UPSTREAMS:
        yield '[[upstreams]]\nname = "own"\nkind = "openai"\n' + line.replace("{secret}", secret) + "\n"


def reload(watched: Watched, secrets: Secrets, file: Path) -> None:
    good = file.read_text()
    for times, text in enumerate(broken(secrets), 1):
        file.write_text(text)
        watched.served.process.send_signal(signal.SIGHUP)
        watched.until_said("stays as it was", times)
    (file.parent / "upstream_file").write_text(secrets["new_file"])
    file.write_text(good)
    watched.served.process.send_signal(signal.SIGHUP)
    watched.until_said("is read again: new: secrets")


def run_commands(everything: Everything, secrets: Secrets, environ: dict[str, str], file: Path, url: str) -> None:
    wrong = {
        "GATEWAY_REDIS_URL": f"redis://user:{secrets['redis']}@localhost:port",
        "GATEWAY_ADMIN_KEY_ENV": secrets["admin"],
        "GATEWAY_UPSTREAMS": f'[{{"name": "{secrets["upstream_env"]}',
    }
    running = [
        subprocess.Popen(
            [*PROGRAM, *command],
            cwd=file.parent,
            env={**ENVIRON, **environ, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for command, more in ((["check"], {}), (["check"], wrong), (["list", "--url", url], {}))
    ]
    for process in running:
        said, _ = process.communicate(timeout=PATIENCE_S)
        assert said
        everything.add(f"the command {process.args}", said)


async def test_a_callers_key_is_shown_to_no_other_upstream_when_models_are_listed(start_gateway, upstream, secrets):
    """Whose it is nobody can tell, where several upstreams are asked with callers' own keys."""
    one = {"name": "one", "kind": "openai", "base_url": upstream.base_url, "models": ["one-*", "known"]}
    other = {**one, "name": "other", "models": ["other-*"]}
    headers = {"Authorization": f"Bearer {secrets['caller']}"}
    for upstreams, shown in (([one, other], False), ([one], True)):
        gateway = await start_gateway(upstreams=upstreams)
        async with gateway.session.get(f"{gateway.base_url}/models", headers=headers) as response:
            assert response.status == 200
            assert "known" in await response.text()
        assert any(secrets["caller"] in asked.headers.get("authorization", "") for asked in upstream.asked) is shown

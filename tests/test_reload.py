"""A new configuration for a gateway that runs: what is taken, what is refused, and that no stream is dropped for it."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from running import next_block
from scripted import Asked, ScriptedUpstream, two_parts
from served import Served, variables

from gateway import watching
from gateway.app import SystemClock
from gateway.config import Config, load
from gateway.errors import ConfigError
from gateway.live import Live
from gateway.ports import Answer
from gateway.reload import differences
from gateway.upstreams.fleet import assemble
from gateway.upstreams.leased import Leased
from gateway.watching import Source

PATIENCE_S = 15.0
SIMULATED = '[[upstreams]]\nname = "other"\nkind = "simulated"\nttft_s = 0.0\ntokens_per_s = 5000.0\nmodels = ["model-2"]\n'


def scripted(upstream: ScriptedUpstream, *lines: str) -> str:
    of = ['name = "scripted"', 'kind = "openai"', f'base_url = "{upstream.base_url}"', 'models = ["model-1"]', *lines]
    return "\n".join(["[[upstreams]]", *of, ""])


class Reloaded:
    """A gateway on a file of its own, and those who ask it."""

    def __init__(self, served: Served, file: Path, session: aiohttp.ClientSession) -> None:
        self.served = served
        self.file = file
        self._session = session

    def asks(self, model: str = "model-1", content: str = "hi", **members: Any) -> Any:
        body = {"model": model, "messages": [{"role": "user", "content": content}], **members}
        return self._session.post(f"{self.served.base_url}/chat/completions", json=body)

    async def told(self, model: str = "model-1", content: str = "hi") -> tuple[int, str]:
        """The status, and what is said of the cache."""
        async with self.asks(model, content) as response:
            await response.read()
            return response.status, response.headers["Cache-Status"]

    async def hears(self, text: str) -> str:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.to_thread(self.served.hear, text)

    async def reload(self, text: str, answer: str = "is read again") -> str:
        self.file.write_text(text)
        self.served.process.send_signal(signal.SIGHUP)
        return await self.hears(answer)


Start = Callable[..., Reloaded]


@pytest.fixture
async def start(upstream: ScriptedUpstream, tmp_path: Path) -> AsyncIterator[Start]:
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        running: list[Served] = []

        def start(text: str, *arguments: str, **settings: str) -> Reloaded:
            (file := tmp_path / "config.toml").write_text(text)
            running.append(Served(tmp_path, *arguments, **variables(**settings)))
            return Reloaded(running[-1], file, session)

        yield start
        for served in running:
            with served:
                assert await asyncio.to_thread(served.end) == 0
                assert "Traceback" not in served.said


async def test_upstreams_and_models_change_and_a_running_stream_keeps_its_upstream_to_its_end(start, upstream):
    async def two_parts_and_a_connection_that_stays(asked: Asked) -> None:
        await two_parts(asked)
        await asked.gone.wait()

    gateway = start(scripted(upstream))
    upstream.script = two_parts_and_a_connection_that_stays
    assert (await gateway.told("model-2"))[0] == 404
    async with gateway.asks(stream=True) as response:
        await next_block(response)
        line = await gateway.reload(f'[[models]]\nnames = ["model-2"]\nenabled = false\n{SIMULATED}')
        assert "new: models, upstreams" in line
        assert await gateway.told("model-2") == (200, "gateway; fwd=bypass; fwd-status=200; detail=disabled")
        assert (await gateway.told("model-1"))[0] == 404
        assert not upstream.asked[0].gone.is_set()
        upstream.gate("second part").released.set()
        assert (await response.text()).endswith("data: [DONE]\n\n")
    async with asyncio.timeout(PATIENCE_S):
        await upstream.asked[0].gone.wait()  # what it was is closed by now
    # And back, to an answer that is stored.
    await gateway.reload(scripted(upstream))
    assert (await gateway.told())[1].startswith("gateway; hit")
    assert (await gateway.told("model-2"))[0] == 404


async def test_an_upstream_that_has_not_changed_keeps_its_connections(start, upstream):
    gateway = start(scripted(upstream))
    await gateway.told()
    await gateway.reload(scripted(upstream) + SIMULATED)
    await gateway.told(content="another")
    assert len(upstream.asked) == 2
    assert upstream.asked[0].writer is upstream.asked[1].writer


async def test_a_key_in_a_file_is_taken_anew_as_soon_as_it_changes(start, upstream, tmp_path):
    (key := tmp_path / "key").write_text("sk-old\n")
    (admin := tmp_path / "admin").write_text("admin-old")
    gateway = start('[admin]\nkey_file = "admin"\n' + scripted(upstream, 'api_key_file = "key"'))
    await gateway.told()
    (tmp_path / "new").write_text("sk-new")
    (tmp_path / "new").rename(key)
    admin.write_text("admin-new")
    assert "new: secrets" in await gateway.hears("is read again")
    await gateway.told(content="another")
    assert [asked.headers["authorization"] for asked in upstream.asked] == ["Bearer sk-old", "Bearer sk-new"]
    origin = gateway.served.base_url.removesuffix("/v1")
    for shown, status in (("admin-old", 401), ("admin-new", 200)):
        async with gateway._session.get(f"{origin}/admin/", headers={"Authorization": f"Bearer {shown}"}) as response:
            assert response.status == status
    assert not any(secret in gateway.served.said for secret in ("sk-", "admin-old", "admin-new"))


async def test_what_is_wrong_is_refused_as_a_whole_and_everything_stays_as_it_was(start, upstream):
    gateway = start(scripted(upstream))
    upstream.script = two_parts
    async with gateway.asks(stream=True) as response:
        await next_block(response)
        wrong = {
            "[[upstreams": "is not TOML",
            f"{SIMULATED}colour = 1\n": "upstreams.0.colour: is not a key of the configuration",
            f'{SIMULATED}[server]\nhost = "0.0.0.0"\n': "server.host: cannot change while the gateway runs",
            f'{SIMULATED}[redis]\nurl = "redis://:hunter2@h"\n': "redis.url: cannot change while the gateway runs",
            '[[upstreams]]\nname = "l"\nkind = "langchain"\ntarget = "no_such.Model"\n': "upstreams.l.target",
            scripted(
                upstream, 'api_key_file = "nowhere"'
            ): "upstreams.0.api_key_file: the file that it names cannot be read",
            scripted(upstream, 'api_key_env = "NOT_SET"'): "NOT_SET is not set",
        }
        for text, problem in wrong.items():
            line = await gateway.reload(text, "the configuration stays as it was")
            assert problem in line
        assert (await gateway.told("model-2"))[0] == 404
        upstream.gate("second part").released.set()
        assert (await response.text()).endswith("data: [DONE]\n\n")
    assert (await gateway.told())[1].startswith("gateway; hit")
    gateway.file.unlink()
    gateway.served.process.send_signal(signal.SIGHUP)
    assert "config.toml: is gone" in await gateway.hears("the configuration stays as it was")
    await gateway.reload(SIMULATED)
    assert (await gateway.told("model-2"))[0] == 200
    assert "hunter2" not in gateway.served.said


# What may change


@pytest.mark.parametrize(
    ("section", "key", "value", "free"),
    [
        ("cache", "ttl_s", 5, True),
        ("cache", "scope", "shared", True),
        ("cache", "key_secret_env", "X", False),
        ("cache", "sample_seed", 5, False),
        ("replay", "pace", "recorded", True),
        ("log", "level", "debug", True),
        ("log", "access", False, False),
        ("flights", "lease_s", 2.0, False),
        ("limits", "max_streams", 5, True),
        ("limits", "max_connections", 5, True),
        ("limits", "max_lag_s", 0.005, True),
        ("retries", "max_retries", 5, True),
        ("ejection", "min_calls", 77, True),
        ("server", "port", 1, False),
        ("admin", "key_env", "X", False),  # that there is an administration is known from the start
    ],
)
def test_each_key_may_change_or_may_not(section, key, value, free):
    assert list(differences(Config(), Config.model_validate({section: {key: value}}))) == [(f"{section}.{key}", free)]


async def test_what_was_learned_of_an_upstream_is_kept_while_nothing_about_it_changes():
    def fleet(known=(), **environ):
        two = [
            {"name": "a", "kind": "openai", "api_key_env": "KEY_A"},
            {"name": "b", "kind": "openai", "api_key_env": "KEY_B"},
        ]
        keys = {"GATEWAY_UPSTREAMS": json.dumps(two), "KEY_A": "1", "KEY_B": "2"}
        return assemble(load(None, {**keys, **environ}), SystemClock(), known)

    first = fleet()
    same = fleet(first.deployments, GATEWAY_RETRIES_MAX_RETRIES="5")
    assert same.deployments == first.deployments
    new_key = fleet(first.deployments, KEY_B="3")
    assert [each in first.deployments for each in new_key.deployments] == [True, False]
    new_rules = fleet(first.deployments, GATEWAY_EJECTION_MIN_CALLS="99")
    assert not set(new_rules.deployments) & set(first.deployments)
    for each in (first, same, new_key, new_rules):
        await each.close()


async def test_a_part_of_a_wrong_configuration_is_not_taken():
    live = Live(load(None, {}), SystemClock())
    with pytest.raises(ConfigError, match=r"server\.port: cannot change"):
        await live.change(load(None, {"GATEWAY_SERVER_PORT": "1", "GATEWAY_UPSTREAMS": "[]", "GATEWAY_CACHE_TTL_S": "5"}))
    assert await live.change(load(None, {"GATEWAY_CACHE_TTL_S": "5"})) == ["cache.ttl_s"]
    await live.close()


# Files


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "_LOOK_EVERY_S", 0.01)
    (tmp_path / "config.toml").write_text("[cache]\nttl_s = 1\n")
    source = Source(tmp_path / "config.toml", {}, {})
    source.load()
    return source


async def test_a_file_that_is_still_being_written_is_not_read_yet(source, tmp_path):
    changed = asyncio.create_task(source.changed(asyncio.Event()))
    looks = 0

    def stamps(looked=source._stamps):
        nonlocal looks
        looks += 1
        if looks < 20:  # each time somebody has written something more
            (tmp_path / "config.toml").write_text("#" * looks)
        return looked()

    source._stamps = stamps
    await changed
    assert looks >= 20
    assert source.load().text == "#" * 19


async def test_a_file_that_changes_while_it_is_read_is_read_again(source, tmp_path, monkeypatch):
    def load_slowly(*arguments, **more):
        loaded = load(*arguments, **more)
        (tmp_path / "config.toml").write_text("[cache]\nttl_s = 300\n")
        return loaded

    monkeypatch.setattr(watching, "load", load_slowly)
    source.load()
    await asyncio.wait_for(source.changed(asyncio.Event()), PATIENCE_S)


async def test_what_has_not_changed_is_not_read_again_unless_asked(source):
    asked = asyncio.Event()
    changed = asyncio.create_task(source.changed(asked))
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(changed), 0.1)
    assert not changed.done()
    asked.set()
    await changed


# Upstreams that are dismissed


class Counted:
    name, passes_credential = "counted", False

    def __init__(self, made: list["Counted"]) -> None:
        self.closed = False
        made.append(self)

    @asynccontextmanager
    async def ask(self, call):
        assert not self.closed
        yield Answer({})
        assert not self.closed

    async def close(self):
        self.closed = True


async def test_a_dismissed_upstream_is_closed_by_its_last_user_and_made_again_for_one_that_comes_too_late():
    made: list[Counted] = []
    leased = Leased(lambda: Counted(made), None)
    async with leased.ask(None):
        async with leased.ask(None):
            await leased.dismiss()
        assert not made[0].closed
    assert made[0].closed
    async with leased.ask(None):
        assert len(made) == 2
    assert made[1].closed


async def test_an_upstream_that_nobody_uses_is_closed_when_it_is_dismissed():
    made: list[Counted] = []
    await Leased(lambda: Counted(made), None).dismiss()
    assert made[0].closed

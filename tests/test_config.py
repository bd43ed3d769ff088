"""Configuration: the file documents the defaults, the environment reaches every key, all problems show at once."""

import itertools
import json
import re
import tomllib
from pathlib import Path

import pytest

from gateway.config import (
    FALLBACK_UPSTREAM,
    Config,
    LangChainUpstreamConfig,
    ModelConfig,
    OpenAIUpstreamConfig,
    SimulatedUpstreamConfig,
    load,
)
from gateway.errors import ConfigError

CONFIG_TOML = Path(__file__).parents[1] / "config.toml"
SECTIONS = [name for name in Config.model_fields if name not in ("models", "upstreams")]
KEYS = [(section, key) for section in SECTIONS for key in Config.model_fields[section].annotation.model_fields]
KINDS = [OpenAIUpstreamConfig, LangChainUpstreamConfig, SimulatedUpstreamConfig]
OTHER_VALUES = {
    ("admin", "key_file"): __file__,
    ("redis", "url"): "redis://elsewhere:6380/1",
    ("redis", "tls_verify"): "ca",
    ("redis", "protocol"): 2,
    ("cache", "mode"): "record",
    ("cache", "scope"): "shared",
    ("cache", "sample_order"): "random",
    ("cache", "key_secret_env"): "KEY_SECRET",
    ("flights", "when_abandoned"): "cancel",
    ("retries", "budget"): 0.5,
    ("ejection", "error_rate"): 0.7,
    ("replay", "pace"): "fixed",
    ("replay", "identity"): "original",
    ("replay", "on_miss"): "simulate",
    ("admin", "key_env"): "KEY_SECRET",
    ("admin", "listen"): "127.0.0.1:9090",
    ("log", "level"): "debug",
    ("server", "relay_upstream"): "other",
    ("server", "cors_origins"): ["https://chat.example"],
}
SECRET = "hunter2hunter2hunter2"
OPENAI = {"name": "o", "kind": "openai"}


def write(folder, text):
    path = folder / "gateway.toml"
    path.write_text(text, "utf-8")
    return path


def problems_of(path=None, environ=None, flags=None):
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {}, flags)
    assert SECRET not in str(caught.value)
    return caught.value.problems


def upstreams_problems(*upstreams, **environ):
    return problems_of(environ={"GATEWAY_UPSTREAMS": json.dumps(upstreams), **environ})


def other_value(section, key):
    """A valid value that is not the default."""
    default = getattr(getattr(Config(), section), key)
    if (section, key) in OTHER_VALUES:
        return OTHER_VALUES[section, key]
    if isinstance(default, tuple | frozenset):
        return ["one", "two"]
    if isinstance(default, bool):
        return not default
    return default + type(default)(1)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# config.toml


def test_config_toml_is_the_defaults():
    loaded = load(CONFIG_TOML, {})
    assert loaded.config == Config()
    assert loaded.warnings == ()


def test_config_toml_names_every_key_in_the_order_of_the_model():
    sections = tomllib.loads(CONFIG_TOML.read_text("utf-8"))
    assert [(section, key) for section, keys in sections.items() for key in keys] == KEYS


def test_the_examples_in_config_toml_name_every_key_of_each_kind_at_its_default():
    examples = tomllib.loads("\n".join(re.findall(r"^#(\[\[.*|\w+ = .*)$", CONFIG_TOML.read_text("utf-8"), re.MULTILINE)))
    assert [example["kind"] for example in examples["upstreams"]] == ["openai", "langchain", "simulated"]
    for model, example in zip(KINDS, examples["upstreams"], strict=True):
        assert set(example) == set(model.model_fields)
        required = {name: example[name] for name, field in model.model_fields.items() if field.is_required()}
        assert model(**example) == model(**required)


def test_the_example_of_a_model_names_every_key_and_what_holds_without_it():
    examples = tomllib.loads("\n".join(re.findall(r"^#(\[\[.*|\w+ = .*)$", CONFIG_TOML.read_text("utf-8"), re.MULTILINE)))
    [model] = examples["models"]
    assert set(model) == set(ModelConfig.model_fields)
    cache = Config().cache
    assert {key: getattr(cache, key) for key in model if hasattr(cache, key)} == {
        key: value for key, value in vars(ModelConfig(**model)).items() if hasattr(cache, key)
    }


def test_models_from_the_environment():
    environ = {"GATEWAY_MODELS": '[{"names": ["gpt-*"], "ttl_s": 5, "samples": 3}]'}
    (model,) = load(None, environ).config.models
    assert (model.names, model.ttl_s, model.samples, model.stale_s) == (("gpt-*",), 5, 3, None)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({}, "models.0.names: is missing"),
        ({"names": []}, "models.0.names: "),
        ({"names": ["a"], "samples": 65}, "models.0.samples: "),
        ({"names": ["a"], "ttl_s": 0}, "models.0.ttl_s: "),
        ({"names": ["a"], "ttl": 5}, "models.0.ttl: is not a key of the configuration"),
        ({"names": ["a"], "finish_reasons": ["content_filter"]}, "models.0.finish_reasons: content_filter is never stored"),
    ],
)
def test_what_is_wrong_with_a_model_is_told_by_its_path(model, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        load(None, {"GATEWAY_MODELS": json.dumps([model])})


def test_every_line_with_a_key_in_config_toml_explains_it():
    lines = CONFIG_TOML.read_text("utf-8").splitlines()
    body = lines[: next(at for at, line in enumerate(lines) if line.startswith("# Upstreams"))]
    for before, line in itertools.pairwise(body):
        assert not re.match(r"\w+ = ", line) or " # " in line or before.startswith("# "), line


# The environment


@pytest.mark.parametrize(("section", "key"), KEYS, ids=".".join)
def test_every_key_can_be_set_from_the_environment(section, key):
    value = other_value(section, key)
    environ = {
        f"GATEWAY_{section}_{key}".upper(): ",".join(value) if isinstance(value, list) else str(value),
        "KEY_SECRET": SECRET,
        "GATEWAY_UPSTREAMS": json.dumps([OPENAI | {"name": "other"}]),
    }
    if key.startswith("tls_"):
        environ = {"GATEWAY_REDIS_URL": "rediss://localhost", "GATEWAY_REDIS_TLS_CERT_FILE": "cert.pem", **environ}
    changed = getattr(getattr(load(None, environ).config, section), key)
    assert changed != getattr(getattr(Config(), section), key)
    assert changed == (type(changed)(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("", None), ("127.0.0.1:9090", ("127.0.0.1", 9090)), ("localhost:0", ("localhost", 0)), ("[::1]:9", ("::1", 9)),
    ],
)  # fmt: skip
def test_the_address_of_operators_is_a_host_and_a_port(listen, address):
    assert load(None, {"GATEWAY_ADMIN_LISTEN": listen}).config.admin.address == address


@pytest.mark.parametrize("listen", ["9090", ":9090", "a b:1", "host:", "host:65536", "::1:9090", "http://host:1", "h:1/x"])
def test_an_address_that_is_none_is_refused(listen):
    (problem,) = problems_of(environ={"GATEWAY_ADMIN_LISTEN": listen})
    assert problem.startswith("admin.listen: must be a host and a port")


def test_no_two_keys_share_a_variable():
    names = [f"{section}_{key}" for section, key in KEYS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("text", "paths"),
    [("", ()), ("a, b.c", ("a", "b.c")), ('["a,b"]', ("a,b",)), (" [] ", ())],
)
def test_a_list_is_json_or_words_with_commas_between(text, paths):
    assert load(None, {"GATEWAY_CACHE_IGNORED_PATHS": text}).config.cache.ignored_paths == paths


def test_upstreams_from_the_environment_replace_those_of_the_file(tmp_path):
    path = write(tmp_path, '[[upstreams]]\nname = "file"\nkind = "simulated"\n')
    environ = {"GATEWAY_UPSTREAMS": '[{"name": "env", "kind": "openai", "aliases": {"a": "b"}}]'}
    (upstream,) = load(path, environ).config.upstreams
    assert (upstream.name, upstream.kind, upstream.aliases) == ("env", "openai", {"a": "b"})


def test_flags_beat_the_environment_which_beats_the_file_which_beats_the_defaults(tmp_path):
    path = write(tmp_path, '[server]\nhost = "file"\nport = 1\nkeepalive_s = 1\n')
    environ = {"GATEWAY_SERVER_HOST": "env", "GATEWAY_SERVER_PORT": "2"}
    server = load(path, environ, {"server": {"host": "flag"}}).config.server
    assert (server.host, server.port, server.keepalive_s, server.head_after_s) == ("flag", 2, 1, 5)


def test_a_flag_hides_a_wrong_variable():
    assert load(None, {"GATEWAY_SERVER_PORT": "tcp://10.0.0.1:80"}, {"server": {"port": 1}}).config.server.port == 1


def test_a_problem_says_from_which_variable_it_came():
    # Kubernetes sets this for a service that is called gateway-server.
    (problem,) = problems_of(environ={"GATEWAY_SERVER_PORT": "tcp://10.0.0.1:80"})
    assert problem.startswith("server.port: ")
    assert problem.endswith("(from GATEWAY_SERVER_PORT)")


def test_a_variable_that_names_no_key_is_only_warned_of():
    loaded = load(None, {"GATEWAY_SERVICE_HOST": SECRET, "GATEWAY_REDIS_URLS": SECRET})
    assert [warning.split()[0] for warning in loaded.warnings] == ["GATEWAY_REDIS_URLS", "GATEWAY_SERVICE_HOST"]
    assert SECRET not in str(loaded.warnings)


def test_a_variable_that_holds_a_named_secret_is_not_warned_of():
    loaded = load(None, {"GATEWAY_CACHE_KEY_SECRET_ENV": "GATEWAY_KEY_SECRET", "GATEWAY_KEY_SECRET": SECRET})
    assert loaded.warnings == ()


# Where it comes from


def test_without_a_file_the_defaults_hold():
    loaded = load(None, {"HOME": "/home/me"})
    assert (loaded.config, loaded.source, loaded.cache_dir) == (Config(), "defaults", Path("/home/me/.cache/gateway"))


def test_config_toml_in_the_working_directory_is_read_unasked(tmp_path):
    (tmp_path / "config.toml").write_text("[log]\naccess = false\n", "utf-8")
    loaded = load(None, {"XDG_CACHE_HOME": "/cache"})
    assert (loaded.config.log.access, loaded.source, loaded.cache_dir) == (False, "config.toml", Path("/cache/gateway"))


def test_a_missing_file_is_a_problem_when_it_was_asked_for(tmp_path):
    assert problems_of(tmp_path / "none.toml") == [f"{tmp_path}/none.toml: cannot be read: No such file or directory"]


def test_a_directory_in_the_place_of_the_file_is_a_problem(tmp_path):
    assert problems_of(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]


@pytest.mark.parametrize("text", [f'[redis]\nurl = "{SECRET}\n', "port: 8080", "[server]\n[server]\n"])
def test_what_is_not_toml_is_a_problem(tmp_path, text):
    path = write(tmp_path, text)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: is not TOML: ")


def test_bytes_that_are_no_text_are_a_problem(tmp_path):
    path = tmp_path / "gateway.toml"
    path.write_bytes(b"\xff")
    assert problems_of(path)[0].startswith(f"{path}: is not TOML: ")


# What is refused


def test_unknown_keys_are_refused_with_their_dotted_paths(tmp_path):
    path = write(
        tmp_path,
        """
        top = 1
        [server]
        prot = 1
        [sever]
        [[upstreams]]
        name = "a"
        kind = "simulated"
        [[upstreams]]
        name = "b"
        kind = "openai"
        openai = "a key may be called like a kind"
        """,
    )
    paths = ["server.prot", "upstreams.1.openai", "sever", "top"]
    assert sorted(problems_of(path)) == sorted(f"{path}: is not a key of the configuration" for path in paths)


def test_all_problems_are_reported_at_once(tmp_path):
    path = write(
        tmp_path,
        """
        server = 1
        [redis]
        url = "http://me:hunter2hunter2hunter2@host"
        [cache]
        key_secret_env = "UNSET"
        [[upstreams]]
        name = "a b"
        kind = "openai"
        api_key_env = "UNSET_TOO"
        [[upstreams]]
        kind = "langchain"
        target = "a.B"
        arguments_env = {api_key = "UNSET_THREE"}
        """,
    )
    environ = {"GATEWAY_CACHE_IGNORED_PATHS": "[", "GATEWAY_REPLAY_PACE": "fast", "GATEWAY_SERVER_PORT": "1"}
    assert [problem.split(": ")[0] for problem in problems_of(path, environ)] == [
        "cache.ignored_paths",
        "server",
        "redis.url",
        "cache.key_secret_env",
        "replay.pace",
        "upstreams.0.name",
        "upstreams.0.api_key_env",
        "upstreams.1.name",
        "upstreams.1.arguments_env.api_key",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("server = 1", "server: must be a table"),
        ("[upstreams]\n", "upstreams: must be a list"),
        ("upstreams = [1]", "upstreams.0: must be a table"),
        ("[[upstreams]]\n", 'upstreams.0.kind: must be "openai", "langchain" or "simulated"'),
        ('[[upstreams]]\nkind = "x"\n', 'upstreams.0.kind: must be "openai", "langchain" or "simulated"'),
        ('[[upstreams]]\nkind = "openai"\n', "upstreams.0.name: is missing"),
        ("[cache]\nignored_paths = 1", "cache.ignored_paths: must be a list"),
        ("[cache]\nfinish_reasons = 'stop'", "cache.finish_reasons: must be a list"),
        ('[cache]\nfinish_reasons = ["content_filter"]', "cache.finish_reasons: content_filter is never stored"),
        ('[server]\nrelay_upstream = "x"', "upstreams: none is called 'x', as server.relay_upstream says"),
    ],
)
def test_problems_are_put_in_words_of_the_file(tmp_path, text, problem):
    assert problems_of(write(tmp_path, text)) == [problem]


@pytest.mark.parametrize(
    "setting",
    [
        "SERVER_PORT=65536", "SERVER_PORT=x", "SERVER_HOST=", "SERVER_KEEPALIVE_S=0", "SERVER_HEAD_AFTER_S=inf",
        "SERVER_HEAD_AFTER_S=nan", "SERVER_SHUTDOWN_GRACE_S=-1", "SERVER_MAX_BODY_BYTES=1.5", "SERVER_RELAY_PATHS=/files",
        "REDIS_URL=", "REDIS_URL=localhost:6379", "REDIS_PREFIX={x}", "REDIS_PREFIX=", "REDIS_PROTOCOL=4",
        "CACHE_MODE=perhaps", "CACHE_IGNORED_PATHS=a..b", "CACHE_SCOPE=all", "REPLAY_SPEED=0", "LOG_LEVEL=loud",
        "UPSTREAMS=openai", 'UPSTREAMS={"name": "x"}',
    ],
)  # fmt: skip
def test_values_outside_their_range_are_refused(setting):
    variable, _, text = f"GATEWAY_{setting}".partition("=")
    (problem,) = problems_of(environ={variable: text})
    assert problem.startswith(variable.removeprefix("GATEWAY_").lower().replace("_", ".", 1).rstrip("."))
    assert problem.endswith(f"(from {variable})")


def test_upstreams_must_agree():
    twice = OPENAI | {"default": True}
    assert upstreams_problems(twice, twice, twice | {"name": "p"}) == [
        "upstreams: the name 'o' is used twice; only one can be the default (from GATEWAY_UPSTREAMS)"
    ]


def test_upstreams_of_one_group_must_agree():
    eu = OPENAI | {"name": "eu", "group": "o", "default": True}
    us = OPENAI | {"name": "us", "group": "o", "default": True}
    assert {each.group_name for each in load(None, {"GATEWAY_UPSTREAMS": json.dumps([eu, us])}).config.upstreams} == {"o"}
    (problem,) = upstreams_problems(eu | {"api_key_envs": ["SOME_KEY"]}, us | {"ignored_paths": ["seed"]}, SOME_KEY=SECRET)
    assert "some have keys and some pass on the caller's" in problem
    assert "do not agree on ignored_paths" in problem
    (problem,) = upstreams_problems(eu | {"aliases": {"a": "b"}}, us | {"aliases": {"b": "c"}})
    assert "'b' is an alias, and is what another one stands for" in problem


def test_each_key_of_an_upstream_is_a_secret_that_must_be_there():
    keyed = OPENAI | {"api_key_env": "KEY_A", "api_key_envs": ["KEY_B", "KEY_A"]}
    loaded = load(None, {"GATEWAY_UPSTREAMS": json.dumps([keyed]), "KEY_A": "a", "KEY_B": "b"})
    assert loaded.config.upstreams[0].secret_names == ("KEY_A", "KEY_B")
    assert loaded.secrets == {"KEY_A": "a", "KEY_B": "b"}
    assert "KEY_B is not set" in upstreams_problems(keyed, KEY_A="a")[0]


# Secrets


@pytest.mark.parametrize(
    "url",
    [
        f"redis//:{SECRET}@host", f"http://:{SECRET}@host", f"redis://:p#{SECRET}@host", f"redis://:p/{SECRET}@host",
        f"redis://:1/{SECRET}@host:6379", f"redis://u:1?{SECRET}@host", f"redis://:{SECRET}@host:port",
        f"redis://:[{SECRET}@host", f"redis://:\uff1a{SECRET}\u2100@host",
        f"redis+sentinel://:{SECRET}/x@host/main", f"redis+sentinel://:{SECRET}@host", f"redis+sentinel://host:x{SECRET}/main",
    ],
)  # fmt: skip
def test_a_redis_url_that_does_not_parse_is_a_problem_that_does_not_show_it(url):
    (problem,) = problems_of(environ={"GATEWAY_REDIS_URL": url})
    assert problem.startswith("redis.url: ")
    assert "host" not in problem


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tls_ca_file": "ca.pem"}, "redis.tls_ca_file: without rediss"),
        ({"url": "redis://host", "tls_verify": "none"}, "redis.tls_verify: without rediss"),
        ({"url": "redis+sentinel://host/main", "tls_server_name": "x"}, "redis.tls_server_name: without rediss"),
        ({"url": "rediss://host", "tls_key_file": "key.pem"}, "redis.tls_key_file: a key needs a certificate"),
        ({"url": "redis+sentinel://host/main", "cluster": True}, "redis.cluster: a cluster has no sentinels"),
    ],
)
def test_settings_of_redis_that_do_not_go_together_are_a_problem(settings, problem):
    assert problem in "\n".join(problems_of(flags={"redis": settings}))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("embedded", "embedded"),
        (f"redis://me:{SECRET}@host:6380/1?ssl_keyfile_password={SECRET}", "redis://host:6380/1"),
        (f"rediss://:{SECRET}@[::1]", "rediss://[::1]"),
        (f"unix://me:{SECRET}@/run/redis.sock?db=1", "unix:///run/redis.sock"),
        (f"redis+sentinel://me:{SECRET}@a,b:1/main?sentinel_password={SECRET}", "redis+sentinel://a:26379,b:1/main"),
        (f"rediss+sentinel://:{SECRET}@[::1]:2/main/3", "rediss+sentinel://[::1]:2/main"),
    ],
)
def test_a_redis_url_is_shown_without_credentials(url, shown):
    assert load(None, {"GATEWAY_REDIS_URL": url}).config.redis.shown_url == shown


@pytest.mark.parametrize(
    "url", [f"https://me:{SECRET}@host/v1", f"https://{SECRET}@host", "host/v1", "ftp://host", "https://", "https://h:x"]
)
def test_a_base_url_is_http_with_a_host_and_without_credentials(url):
    (problem,) = upstreams_problems(OPENAI | {"base_url": url})
    assert problem.startswith("upstreams.0.base_url: ")


def test_a_base_url_loses_its_last_slash():
    (upstream,) = Config(upstreams=[OPENAI | {"base_url": "http://[::1]:1/v1/"}]).upstreams
    assert upstream.base_url == "http://[::1]:1/v1"


def test_secrets_are_read_by_name_and_without_the_white_space_around_them():
    upstreams = [
        OPENAI | {"api_key_env": "A"},
        {"name": "l", "kind": "langchain", "target": "a.B", "arguments_env": {"api_key": "B"}},
    ]
    environ = {"A": f"{SECRET}\n", "B": "b", "C": "c" * 16, "D": "d"}
    loaded = load(None, environ | {"GATEWAY_UPSTREAMS": json.dumps(upstreams), "GATEWAY_CACHE_KEY_SECRET_ENV": "C"})
    assert loaded.secrets == {"A": SECRET, "B": "b", "C": "c" * 16}


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_a_named_secret_that_is_not_set_is_a_problem(value):
    environ = {} if value is None else {"THE_KEY": value}
    assert upstreams_problems(OPENAI | {"api_key_env": "THE_KEY"}, **environ) == [
        "upstreams.0.api_key_env: the environment variable THE_KEY is not set (from GATEWAY_UPSTREAMS)"
    ]


@pytest.mark.parametrize("secret", [SECRET, f"sk-{SECRET}", f"SK-{SECRET.upper()}"])
def test_a_secret_in_the_place_of_its_name_is_not_shown(secret):
    (problem,) = upstreams_problems(OPENAI | {"api_key_env": secret})
    assert problem == "upstreams.0.api_key_env: the environment variable that it names is not set (from GATEWAY_UPSTREAMS)"


@pytest.mark.parametrize("value", ["x" * 15, "x" * 65, f" {'x' * 15} "])
def test_a_key_secret_has_16_to_64_bytes(value):
    environ = {"GATEWAY_CACHE_KEY_SECRET_ENV": "K", "K": value}
    assert problems_of(environ=environ)[0].startswith("cache.key_secret_env: ")


def test_no_secret_shows_when_a_configuration_is_printed():
    upstreams = [{"name": "l", "kind": "langchain", "target": "a.B", "arguments": {"api_key": SECRET}}]
    environ = {
        "GATEWAY_REDIS_URL": f"redis://:{SECRET}@host",
        "GATEWAY_UPSTREAMS": json.dumps([*upstreams, OPENAI | {"api_key_env": "THE_KEY"}]),
        "THE_KEY": SECRET,
    }
    loaded = load(None, environ)
    assert SECRET not in f"{loaded} {loaded!r} {loaded.config} {loaded.config.redis!r} {loaded.config.upstreams}"


def test_what_serves_without_upstreams_is_the_simulated_model():
    assert Config().upstreams == ()
    assert (FALLBACK_UPSTREAM.kind, FALLBACK_UPSTREAM.default) == ("simulated", True)


# Simulated clusters

SIMULATED = {"name": "s", "kind": "simulated"}


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"profiles": [{"ttft_s": 1}]}, "upstreams.0.profiles.0.names: is missing"),
        ({"profiles": [{"names": ["a"], "speed": 1}]}, "upstreams.0.profiles.0.speed: is not a key of the configuration"),
        ({"profiles": [{"names": ["a"], "tokens_per_s": 0}]}, "upstreams.0.profiles.0.tokens_per_s: "),
        ({"batch_slowdown": 0.5, "batch_size": 5}, "upstreams.0.batch_slowdown: "),
        ({"batch_slowdown": 2}, "upstreams.0: batch_slowdown says how slow a full batch is"),
        ({"profiles": [{"names": ["a"], "batch_slowdown": 2}]}, "upstreams.0: batch_slowdown says how slow a full batch is"),
        ({"corpus_file": "nowhere.txt"}, "upstreams.0.corpus_file: cannot be read: No such file"),
    ],
)
def test_what_is_wrong_with_a_simulated_cluster_is_told_by_its_path(members, problem):
    [told] = upstreams_problems({**SIMULATED, **members})
    assert told.startswith(problem)


@pytest.mark.parametrize(("content", "problem"), [(b" \n", "is empty"), (b"\xff", "cannot be read: it is not UTF-8")])
def test_a_corpus_that_cannot_be_spoken_from_is_refused(tmp_path, content, problem):
    (tmp_path / "corpus.txt").write_bytes(content)
    [told] = upstreams_problems({**SIMULATED, "corpus_file": str(tmp_path / "corpus.txt")})
    assert told == f"upstreams.0.corpus_file: {problem} (from GATEWAY_UPSTREAMS)"


def test_of_the_profiles_that_fit_the_first_that_has_a_key_holds():
    profiles = [{"names": ["a"], "ttft_s": 1}, {"names": ["*"], "ttft_s": 2, "batch_size": 4, "batch_slowdown": 2}]
    config = SimulatedUpstreamConfig(**SIMULATED, profiles=profiles, tokens_per_s=7)
    one, other = config.behaviour("a"), config.behaviour("b")
    assert (one.ttft_s, one.batch_size, one.tokens_per_s) == (1, 4, 7)
    assert (other.ttft_s, other.batch_slowdown, other.length_tokens) == (2, 2, 120)

"""``config.toml`` and the environment as one frozen object, or every problem at once with its dotted path.

The only reader of the environment. Precedence: flags of ``gateway serve``, then ``GATEWAY_<SECTION>_<KEY>``, then
the file, then the defaults here.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gateway.core.pacing import Pace, PaceKind
from gateway.errors import ConfigError

DEFAULT_PATH = Path("config.toml")
PREFIX = "GATEWAY_"

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class ServerConfig(_Section):
    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8080, ge=0, le=65535)
    max_body_bytes: Count = 33_554_432
    head_after_s: Seconds = 5.0
    keepalive_s: Seconds = 10.0
    write_timeout_s: Seconds = 60.0
    shutdown_grace_s: float = Field(10.0, ge=0, allow_inf_nan=False)
    relay_paths: tuple[str, ...] = ("embeddings", "moderations")
    relay_upstream: str = ""


class RedisConfig(_Section):
    url: str = "embedded"
    prefix: str = Field("gw", pattern=r"^[A-Za-z0-9_.:-]{1,64}$")
    protocol: int = Field(3, ge=2, le=3)
    lookup_timeout_s: Seconds = 0.05
    command_timeout_s: Seconds = 2.0
    connect_timeout_s: Seconds = 1.0
    cooldown_s: Seconds = 1.0
    max_connections: Count = 16
    embedded_dir: str = ""
    embedded_max_bytes: Count = 268_435_456

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        if url != "embedded" and not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError('must be "embedded", or start with redis://, rediss:// or unix://')
        return url


class CacheConfig(_Section):
    enabled: bool = True
    ttl_s: Seconds = 86_400.0
    max_recording_bytes: Count = 8_388_608
    ignored_paths: tuple[str, ...] = ()
    finish_reasons: frozenset[str] = frozenset({"stop", "tool_calls", "function_call", "length"})
    scope: Literal["tenant", "shared"] = "tenant"
    key_secret_env: str = ""

    @field_validator("finish_reasons")
    @classmethod
    def _never_filtered(cls, reasons: frozenset[str]) -> frozenset[str]:
        if "content_filter" in reasons:
            raise ValueError("content_filter is never stored")
        return reasons


class ReplayConfig(_Section):
    pace: PaceKind = "instant"
    speed: float = Field(1.0, gt=0, allow_inf_nan=False)
    frames_per_s: float = Field(50.0, gt=0, allow_inf_nan=False)
    identity: Literal["fresh", "original"] = "fresh"

    def as_pace(self) -> Pace:
        return Pace(self.pace, self.speed, self.frames_per_s)


class LogConfig(_Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    access: bool = True


class _UpstreamConfig(_Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    models: tuple[str, ...] = ()
    aliases: dict[str, str] = {}
    default: bool = False
    ignored_paths: tuple[str, ...] = ()


class OpenAIUpstreamConfig(_UpstreamConfig):
    kind: Literal["openai"]
    base_url: str = Field("https://api.openai.com/v1", pattern=r"^https?://[^/\s]+")
    api_key_env: str = ""
    stream: bool = True
    ask_usage: bool = True
    connect_timeout_s: Seconds = 5.0
    idle_timeout_s: Seconds = 600.0
    max_connections: Count = 1000

    @field_validator("base_url")
    @classmethod
    def _no_credentials(cls, url: str) -> str:
        if "@" in url.split("//", 1)[1].split("/", 1)[0]:
            raise ValueError("must not hold a credential: name an environment variable in api_key_env")
        return url.rstrip("/")


class LangChainUpstreamConfig(_UpstreamConfig):
    kind: Literal["langchain"]
    target: str = Field(pattern=r"^[A-Za-z_][\w.]*\.[A-Za-z_]\w*$")
    arguments: dict[str, Any] = {}
    arguments_env: dict[str, str] = {}
    dropped_parameters: tuple[str, ...] = ()


class SimulatedUpstreamConfig(_UpstreamConfig):
    kind: Literal["simulated"]
    ttft_s: float = Field(0.3, ge=0, allow_inf_nan=False)
    tokens_per_s: float = Field(40.0, gt=0, allow_inf_nan=False)
    length_tokens: Count = 120


UpstreamConfig = Annotated[
    OpenAIUpstreamConfig | LangChainUpstreamConfig | SimulatedUpstreamConfig, Field(discriminator="kind")
]

FALLBACK_UPSTREAM = SimulatedUpstreamConfig(kind="simulated", name="simulated", models=("simulated",), default=True)
"""What serves where no upstream is configured at all."""


class Config(_Section):
    """All that can be configured, at its defaults."""

    server: ServerConfig = ServerConfig()
    redis: RedisConfig = RedisConfig()
    cache: CacheConfig = CacheConfig()
    replay: ReplayConfig = ReplayConfig()
    log: LogConfig = LogConfig()
    upstreams: tuple[UpstreamConfig, ...] = ()

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        names = [upstream.name for upstream in self.upstreams]
        if double := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"upstreams: the name {double[0]!r} is used twice")
        if [upstream.default for upstream in self.upstreams].count(True) > 1:
            raise ValueError("upstreams: only one can be the default")
        if self.server.relay_upstream and self.server.relay_upstream not in names:
            raise ValueError(f"server.relay_upstream: no upstream is called {self.server.relay_upstream!r}")
        return self


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid configuration, the secrets that it names, and what looks odd but does no harm."""

    config: Config
    secrets: Mapping[str, str]
    """The values of the environment variables that the configuration names, by their names."""
    warnings: tuple[str, ...]
    source: str
    cache_dir: Path
    """The user's folder for cached data."""


def load(path: Path | None, environ: Mapping[str, str], flags: Mapping[str, Mapping[str, Any]] | None = None) -> Loaded:
    """Reads ``path`` (by default ``config.toml``, if there is one), the environment and ``flags`` (by section).

    Raises `ConfigError` with every problem found.
    """
    values, source = _read(path)
    overrides, warnings = _from_environment(environ)
    for layer in (overrides, flags or {}):
        _lay_over(values, layer)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_problem(dict(detail)) for detail in error.errors()]) from None
    secrets, problems = _secrets(config, environ)
    if problems:
        raise ConfigError(problems)
    cache_dir = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or ".") / ".cache") / "gateway"
    return Loaded(config, secrets, tuple(warnings), source, cache_dir)


def _read(path: Path | None) -> tuple[dict[str, Any], str]:
    if path is None and not DEFAULT_PATH.exists():
        return {}, "defaults"
    path = path or DEFAULT_PATH
    try:
        return tomllib.loads(path.read_text("utf-8")), str(path)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: is not TOML: {error}"]) from None


def _from_environment(environ: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    warnings = []
    named = _names_by_variable()
    problems = []
    for variable in sorted(environ):
        if not variable.startswith(PREFIX):
            continue
        if variable not in named:
            # Not an error: Kubernetes puts GATEWAY_SERVICE_HOST and the like there for a service of that name.
            warnings.append(f"{variable} is set but names no key of the configuration: ignored")
            continue
        section, key = named[variable]
        try:
            value = _parse(environ[variable], section, key)
        except ValueError as error:
            problems.append(f"{section}{'.' if key else ''}{key}: {error} (from {variable})")
            continue
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    if problems:
        raise ConfigError(problems)
    return values, warnings


def _names_by_variable() -> dict[str, tuple[str, str]]:
    named = {f"{PREFIX}UPSTREAMS": ("upstreams", "")}
    for section, field in Config.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            named |= {f"{PREFIX}{section}_{key}".upper(): (section, key) for key in model.model_fields}
    return named


def _parse(text: str, section: str, key: str) -> Any:
    """Lists and tables are JSON; a list of words may also be given with commas between; all else is as it stands."""
    if not key:
        return _json(text)
    model = Config.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)  # noqa: S101  # _names_by_variable saw to it
    annotation = str(model.model_fields[key].annotation)
    if annotation.startswith(("tuple", "frozenset")):
        return _json(text) if text.lstrip().startswith("[") else [word.strip() for word in text.split(",") if word.strip()]
    return text


def _json(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None


def _lay_over(values: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for section, value in layer.items():
        if isinstance(value, Mapping) and isinstance(values.get(section, {}), dict):
            values.setdefault(section, {}).update(value)
        else:
            values[section] = value


def _problem(detail: dict[str, Any]) -> str:
    kinds = {"openai", "langchain", "simulated"}
    path = ".".join(str(part) for part in detail["loc"] if part not in kinds)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        message = "is not a key of the configuration"
    elif detail["type"] == "union_tag_not_found":
        path, message = f"{path}.kind", 'is missing: "openai", "langchain" or "simulated"'
    elif detail["type"] == "union_tag_invalid":
        path, message = f"{path}.kind", 'must be "openai", "langchain" or "simulated"'
    return f"{path}: {message}" if path else message


def _secrets(config: Config, environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    wanted = {"cache.key_secret_env": config.cache.key_secret_env}
    for at, upstream in enumerate(config.upstreams):
        if isinstance(upstream, OpenAIUpstreamConfig):
            wanted[f"upstreams.{at}.api_key_env"] = upstream.api_key_env
        if isinstance(upstream, LangChainUpstreamConfig):
            wanted |= {f"upstreams.{at}.arguments_env.{key}": name for key, name in upstream.arguments_env.items()}
    secrets, problems = {}, []
    for path, name in wanted.items():
        if name and environ.get(name):
            secrets[name] = environ[name]
        elif name:
            problems.append(f"{path}: the environment variable {name} is not set")
    secret = secrets.get(config.cache.key_secret_env, "")
    if secret and not 16 <= len(secret.encode()) <= 64:
        problems.append(f"cache.key_secret_env: the value of {config.cache.key_secret_env} must be 16 to 64 bytes long")
    return secrets, problems

"""``config.toml`` and the environment as one frozen object, or every problem at once with its dotted path.

The only reader of the environment. Precedence: flags of ``gateway serve``, then ``GATEWAY_<SECTION>_<KEY>``, then
the file, then the defaults here. No message and no ``repr`` shows a value that may hold a secret.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import SplitResult, urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # typeshed does not know it

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from gateway.core.faults import Fault, FaultKind, total_rate
from gateway.core.key import MAX_SAMPLES
from gateway.core.pacing import Pace, PaceKind
from gateway.core.policy import ModelRules, RuleBook
from gateway.core.sentinel_url import SentinelUrl
from gateway.core.simulation import Behaviour
from gateway.errors import ConfigError

WhenAbandoned = Literal["finish", "cancel", "finish_if_cacheable"]
DEFAULT_PATH = Path("config.toml")
PREFIX = "GATEWAY_"
_ALL = 1 + 1e-9
"""Shares that are added up."""
_MAX_CORPUS_BYTES = 67_108_864
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class _Environ(dict[str, str]):
    """The environment as the context of a validation. In replay mode the secrets of upstreams need not be there."""

    asks = True


def _is_set(name: str, info: ValidationInfo) -> str:
    """The environment is the context of the validation, so that a missing secret is listed with all other problems."""
    if name and info.context is not None and not info.context.get(name, "").strip():
        # Somebody may have put the secret itself here: those are rarely all in capitals.
        shown = name if name.isidentifier() and name.isupper() else "that it names"
        raise ValueError(f"the environment variable {shown} is not set")
    return name


def _is_readable(path: str, info: ValidationInfo) -> str:
    if path and info.context is not None:
        _read_secret(path)
    return path


def _read_secret(path: str) -> str:
    """Raises `ValueError` in words that show nothing of the path: somebody may have put the secret itself there."""
    try:
        secret = Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"the file that it names cannot be read: {reason}") from None
    if not secret:
        raise ValueError("the file that it names is empty")
    return secret


def _is_set_if_asked(name: str, info: ValidationInfo) -> str:
    return _is_set(name, info) if info.context is not None and info.context.asks else name


def _is_readable_if_asked(path: str, info: ValidationInfo) -> str:
    return _is_readable(path, info) if info.context is not None and info.context.asks else path


def read_corpus(path: str) -> str:
    """A text to speak from. Raises `ValueError`."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_CORPUS_BYTES + 1)
        text = content.decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {error.strerror if isinstance(error, OSError) else 'it is not UTF-8'}") from None
    if len(content) > _MAX_CORPUS_BYTES:
        raise ValueError(f"is larger than {_MAX_CORPUS_BYTES} bytes")
    if not text:
        raise ValueError("is empty")
    return text


def _is_corpus(path: str, info: ValidationInfo) -> str:
    if path and info.context is not None:
        read_corpus(path)
    return path


def _not_both(file: str, info: ValidationInfo) -> str:
    """For the file of a secret that a variable may hold as well, by the same name but for its end."""
    other = (info.field_name or "").removesuffix("file") + "env"
    if file and info.data.get(other):
        raise ValueError(f"{other} is given as well")
    return file


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
RateOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Slowdown = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Dollars = Annotated[float, Field(ge=0, allow_inf_nan=False)]
DottedPath = Annotated[str, Field(pattern=r"^[^.]+(\.[^.]+)*$")]
Variable = Annotated[str, AfterValidator(_is_set)]
"""The name of an environment variable that holds a secret."""
SecretFile = Annotated[str, AfterValidator(_is_readable)]
"""The path of a file that holds a secret, and nothing else: unlike a variable it can change while the gateway runs."""
UpstreamVariable = Annotated[str, AfterValidator(_is_set_if_asked)]
UpstreamFile = Annotated[str, AfterValidator(_is_readable_if_asked)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ServerConfig(_Section):
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    workers: Count = 1
    worker_timeout_s: SecondsOrZero = 30.0
    max_body_bytes: Count = 33_554_432
    head_after_s: Seconds = 5.0
    keepalive_s: Seconds = 10.0
    read_timeout_s: Seconds = 60.0
    write_timeout_s: Seconds = 60.0
    shutdown_delay_s: SecondsOrZero = 0.0
    shutdown_grace_s: SecondsOrZero = 7.0
    relay_paths: tuple[Annotated[str, Field(pattern=r"^[^/\s]\S*$")], ...] = ("embeddings", "moderations")
    relay_upstream: str = ""


class LimitsConfig(_Section):
    """Of each process; 0: any number."""

    max_connections: CountOrZero = 8192
    max_streams: CountOrZero = 4096
    max_flights: CountOrZero = 2048
    max_held_bytes: CountOrZero = 268_435_456
    max_streams_per_tenant: CountOrZero = 0
    max_flights_per_tenant: CountOrZero = 0


class RedisConfig(_Section):
    url: Annotated[str, Field(repr=False)] = "embedded"
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")] = "gw"
    protocol: Annotated[int, Field(ge=2, le=3)] = 3
    cluster: bool = False
    tls_ca_file: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""
    tls_verify: Literal["full", "ca", "none"] = "full"
    tls_server_name: str = ""
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
        if url == "embedded":
            return url
        if SentinelUrl.is_one(url):
            SentinelUrl.parse(url)
            return url
        if not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(
                'must be "embedded", or start with redis://, rediss://, unix://, redis+sentinel:// or rediss+sentinel://'
            )
        if "@" in "".join(_split(url)[2:]):
            raise ValueError(_NO_URL)
        return url

    @field_validator("cluster")
    @classmethod
    def _not_by_sentinels(cls, cluster: bool, info: ValidationInfo) -> bool:  # noqa: FBT001  # as it is called
        if cluster and SentinelUrl.is_one(info.data.get("url", "")):
            raise ValueError("a cluster has no sentinels")
        return cluster

    @field_validator("tls_ca_file", "tls_cert_file", "tls_key_file", "tls_verify", "tls_server_name")
    @classmethod
    def _over_tls(cls, value: str, info: ValidationInfo) -> str:
        if value not in {"", "full"} and not info.data.get("url", "rediss").startswith("rediss"):
            raise ValueError("without rediss:// or rediss+sentinel:// there is no TLS")
        if info.field_name == "tls_key_file" and value and not info.data.get("tls_cert_file", "unknown"):
            raise ValueError("a key needs a certificate: redis.tls_cert_file")
        return value

    @property
    def shown_url(self) -> str:
        """The URL without credentials and options, for people to read."""
        if self.url == "embedded":
            return self.url
        if SentinelUrl.is_one(self.url):
            return SentinelUrl.parse(self.url).shown
        parts = _split(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _never_filtered(reasons: frozenset[str]) -> frozenset[str]:
    if "content_filter" in reasons:
        raise ValueError("content_filter is never stored")
    return reasons


FinishReasons = Annotated[frozenset[str], AfterValidator(_never_filtered)]
Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]


class CacheConfig(_Section):
    mode: Literal["cache", "record", "replay", "off"] = "cache"
    ttl_s: Seconds = 86_400.0
    stale_s: SecondsOrZero = 0.0
    stale_if_error_s: SecondsOrZero = 0.0
    max_recording_bytes: Count = 8_388_608
    compress_from_bytes: CountOrZero = 32_768
    keep_requests: bool = True
    ignored_paths: tuple[DottedPath, ...] = ()
    finish_reasons: FinishReasons = frozenset({"stop", "tool_calls", "function_call", "length"})
    store_sampled: bool = True
    sampled_temperature: Temperature = 0.0
    store_live_data: bool = False
    samples: Samples = 1
    sample_order: Literal["turn", "random"] = "turn"
    sample_seed: int = 0
    scope: Literal["tenant", "shared"] = "tenant"
    key_secret_env: Variable = ""
    recordings: str = ""

    @field_validator("key_secret_env")
    @classmethod
    def _fits_the_digest(cls, name: str, info: ValidationInfo) -> str:
        if name and info.context is not None and not 16 <= len(info.context[name].strip().encode()) <= 64:
            raise ValueError("the environment variable that it names must hold 16 to 64 bytes")
        return name


class ReplayConfig(_Section):
    pace: PaceKind = "instant"
    speed: Rate = 1.0
    tokens_per_s: Rate = 50.0
    ttft_s: SecondsOrZero = 0.3
    ttft_sd_s: SecondsOrZero = 0.0
    itl_s: SecondsOrZero = 0.02
    itl_sd_s: SecondsOrZero = 0.0
    jitter: Share = 0.0
    max_gap_s: SecondsOrZero = 0.0
    seed: int = 0
    identity: Literal["fresh", "original"] = "fresh"
    on_miss: Literal["refuse", "simulate"] = "refuse"

    def as_pace(self) -> Pace:
        names = {field.name for field in fields(Pace)}
        return Pace(kind=self.pace, **{name: value for name, value in self if name in names})


class FaultsConfig(_Section):
    allowed: bool = False
    seed: int = 0


class FlightsConfig(_Section):
    lease_s: Annotated[float, Field(ge=0.1, le=3600)] = 5.0
    when_abandoned: WhenAbandoned = "finish_if_cacheable"
    abandon_grace_s: SecondsOrZero = 5.0
    max_flight_bytes: Count = 33_554_432
    resume_s: Seconds = 300.0
    event_ids: bool = False
    first_byte_timeout_s: Seconds = 600.0
    idle_timeout_s: Seconds = 600.0
    total_timeout_s: Seconds = 3600.0


class RetriesConfig(_Section):
    max_retries: CountOrZero = 2
    backoff_s: SecondsOrZero = 0.5
    max_backoff_s: SecondsOrZero = 8.0
    max_wait_s: SecondsOrZero = 10.0
    budget: Share = 0.2
    min_per_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0


class EjectionConfig(_Section):
    enabled: bool = True
    error_rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    min_calls: Count = 5
    window_s: Seconds = 30.0
    first_s: Seconds = 5.0
    longest_s: Seconds = 60.0


class AdminConfig(_Section):
    enabled: bool = True
    listen: str = ""
    key_env: Variable = ""
    key_file: SecretFile = ""

    _one_key = field_validator("key_file")(_not_both)

    @field_validator("listen")
    @classmethod
    def _is_address(cls, listen: str) -> str:
        if listen:
            _address(listen)
        return listen

    @property
    def address(self) -> tuple[str, int] | None:
        """The host and the port of the administration's own listener, where it has one."""
        return _address(self.listen) if self.listen else None

    @property
    def key_name(self) -> str:
        """By which `Loaded.secrets` knows the key."""
        return self.key_env or self.key_file

    @property
    def is_open(self) -> bool:
        return self.enabled and bool(self.key_name)


class FaultConfig(_Section):
    """A fault, and the share of answers that it befalls."""

    kind: FaultKind
    rate: Share = 1.0
    status: Annotated[int, Field(ge=400, le=599)] = 503
    retry_after_s: CountOrZero | None = None
    seconds: SecondsOrZero = 30.0
    after: CountOrZero | None = None

    def as_fault(self) -> Fault:
        return Fault(**dict(self))


def _befall_not_too_many(faults: "tuple[FaultConfig, ...] | None") -> "tuple[FaultConfig, ...] | None":
    if total_rate([fault.as_fault() for fault in faults or ()]) > _ALL:
        raise ValueError("their rates come to more than 1")
    return faults


def _address(listen: str) -> tuple[str, int]:
    """Raises `ValueError`."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:\s]+)):([0-9]{1,5})", listen)
    if not found or int(found[3]) > 65535:
        raise ValueError('must be a host and a port: "127.0.0.1:9090", "[::1]:9090"')
    return found[1] or found[2], int(found[3])


class MetricsConfig(_Section):
    enabled: bool = True
    public: bool = False


class ModelConfig(_Section):
    """What holds for some models; None: as in ``[cache]``."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    enabled: bool | None = None
    ttl_s: Seconds | None = None
    stale_s: SecondsOrZero | None = None
    stale_if_error_s: SecondsOrZero | None = None
    max_recording_bytes: Count | None = None
    finish_reasons: FinishReasons | None = None
    store_sampled: bool | None = None
    sampled_temperature: Temperature | None = None
    store_live_data: bool | None = None
    samples: Samples | None = None
    input_usd_per_million: Dollars | None = None
    output_usd_per_million: Dollars | None = None
    connect_timeout_s: Seconds | None = None
    first_byte_timeout_s: Seconds | None = None
    idle_timeout_s: Seconds | None = None
    total_timeout_s: Seconds | None = None
    retries: CountOrZero | None = None
    fallbacks: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    faults: Annotated[tuple[FaultConfig, ...] | None, AfterValidator(_befall_not_too_many)] = None

    def as_rules(self, *, faults_allowed: bool) -> dict[str, Any]:
        """As `RuleBook` takes them."""
        faults = tuple(fault.as_fault() for fault in self.faults or ()) if faults_allowed else ()
        return {**dict(self), "faults": faults or None}


class LogConfig(_Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    access: bool = True


class _UpstreamConfig(_Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    group: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{0,64}$")] = ""
    models: tuple[str, ...] = ()
    aliases: dict[str, str] = {}
    default: bool = False
    ignored_paths: tuple[DottedPath, ...] = ()
    weight: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    max_concurrent_calls: CountOrZero = 1000
    max_queued_calls: CountOrZero = 1000
    queue_timeout_s: Seconds = 10.0

    @property
    def group_name(self) -> str:
        """What it is called in the cache key, together with all that answer the same."""
        return self.group or self.name

    @property
    def secret_names(self) -> tuple[str, ...]:
        """By which `Loaded.secrets` knows what it needs: variables, and paths of files."""
        return ()

    @property
    def passes_credential(self) -> bool:
        """Whether the caller's own credential goes there."""
        return False


class OpenAIUpstreamConfig(_UpstreamConfig):
    kind: Literal["openai"]
    base_url: str = "https://api.openai.com/v1"
    api_key_env: UpstreamVariable = ""
    api_key_envs: tuple[UpstreamVariable, ...] = ()
    api_key_file: UpstreamFile = ""
    stream: bool = True
    ask_usage: bool = True
    connect_timeout_s: Seconds = 5.0
    idle_timeout_s: Seconds = 600.0

    _one_key = field_validator("api_key_file")(_not_both)

    @property
    def secret_names(self) -> tuple[str, ...]:
        """Its keys, each once, in the order in which they serve."""
        return tuple(dict.fromkeys(name for name in (self.api_key_env, self.api_key_file, *self.api_key_envs) if name))

    @property
    def passes_credential(self) -> bool:
        return not self.secret_names

    @field_validator("base_url")
    @classmethod
    def _no_credentials(cls, url: str) -> str:
        parts = _split(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must start with http:// or https:// and a host")
        if "@" in parts.netloc:
            raise ValueError("must not hold a credential: name what holds it in api_key_env or api_key_file")
        if parts.query or parts.fragment:
            raise ValueError("must end with its path: what follows would not be sent")
        return url.rstrip("/")


class LangChainUpstreamConfig(_UpstreamConfig):
    kind: Literal["langchain"]
    target: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*\.[A-Za-z_]\w*$")]
    arguments: Annotated[dict[str, Any], Field(repr=False)] = {}
    arguments_env: dict[str, UpstreamVariable] = {}
    arguments_file: dict[str, UpstreamFile] = {}
    dropped_parameters: tuple[str, ...] = ()

    @property
    def secret_names(self) -> tuple[str, ...]:
        return (*self.arguments_env.values(), *self.arguments_file.values())


class SimulatedProfile(_Section):
    """What is different for some of a simulated upstream's models; None: as the upstream has it."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    ttft_s: SecondsOrZero | None = None
    ttft_sd_s: SecondsOrZero | None = None
    prefill_tokens_per_s: RateOrZero | None = None
    tokens_per_s: Rate | None = None
    itl_sd_s: SecondsOrZero | None = None
    length_tokens: Count | None = None
    length_sd_tokens: RateOrZero | None = None
    batch_size: CountOrZero | None = None
    batch_slowdown: Slowdown | None = None


class SimulatedUpstreamConfig(_UpstreamConfig):
    kind: Literal["simulated"]
    max_concurrent_calls: CountOrZero = 0
    ttft_s: SecondsOrZero = 0.3
    ttft_sd_s: SecondsOrZero = 0.0
    prefill_tokens_per_s: RateOrZero = 0.0
    tokens_per_s: Rate = 40.0
    itl_sd_s: SecondsOrZero = 0.0
    length_tokens: Count = 120
    length_sd_tokens: RateOrZero = 0.0
    batch_size: CountOrZero = 0
    batch_slowdown: Slowdown = 1.0
    corpus_file: Annotated[str, AfterValidator(_is_corpus)] = ""
    seed: int = 0
    profiles: tuple[SimulatedProfile, ...] = ()

    def behaviour(self, model: str) -> Behaviour:
        """Of the profiles whose names fit, the first that has a key holds."""
        fitting = [each for each in self.profiles if any(fnmatchcase(model, name) for name in each.names)]
        return self._behaviour(fitting)

    def _behaviour(self, profiles: Sequence[SimulatedProfile]) -> Behaviour:
        keys = [field.name for field in fields(Behaviour)]
        layers = [*profiles, self]
        found = {key: next(value for each in layers if (value := getattr(each, key)) is not None) for key in keys}
        return Behaviour(**found)

    @model_validator(mode="after")
    def _slowdown_has_a_batch(self) -> Self:
        for layers in ([], *([profile] for profile in self.profiles)):
            behaviour = self._behaviour(layers)
            if behaviour.batch_slowdown > 1 and behaviour.batch_size < 2:
                raise ValueError("batch_slowdown says how slow a full batch is: it needs a batch_size of 2 or more")
        return self


UpstreamConfig = Annotated[
    OpenAIUpstreamConfig | LangChainUpstreamConfig | SimulatedUpstreamConfig, Field(discriminator="kind")
]

FALLBACK_UPSTREAM = SimulatedUpstreamConfig(kind="simulated", name="simulated", models=("simulated",), default=True)
"""What serves where no upstream is configured at all."""


class Config(_Section):
    """All that can be configured, at its defaults."""

    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    redis: RedisConfig = RedisConfig()
    cache: CacheConfig = CacheConfig()
    flights: FlightsConfig = FlightsConfig()
    retries: RetriesConfig = RetriesConfig()
    ejection: EjectionConfig = EjectionConfig()
    replay: ReplayConfig = ReplayConfig()
    faults: FaultsConfig = FaultsConfig()
    admin: AdminConfig = AdminConfig()
    metrics: MetricsConfig = MetricsConfig()
    log: LogConfig = LogConfig()
    models: tuple[ModelConfig, ...] = ()
    upstreams: Annotated[tuple[UpstreamConfig, ...], Field(validate_default=True)] = ()

    @property
    def is_replay(self) -> bool:
        """Whether no upstream is ever asked."""
        return self.cache.mode == "replay"

    def rule_book(self) -> RuleBook:
        """The rules of ``[cache]`` and of ``[[models]]``."""
        names = {field.name for field in fields(ModelRules)}
        cached = {name: value for name, value in self.cache if name in names}
        enabled = self.cache.mode != "off"
        default = ModelRules(**cached, enabled=enabled, retries=self.retries.max_retries)
        models = [(model.names, model.as_rules(faults_allowed=self.faults.allowed)) for model in self.models]
        if not enabled:
            models = [(names, {**rules, "enabled": False}) for names, rules in models]
        return RuleBook(default, models)

    @field_validator("upstreams")
    @classmethod
    def _names_agree(cls, upstreams: tuple[UpstreamConfig, ...], info: ValidationInfo) -> tuple[UpstreamConfig, ...]:
        names = [upstream.name for upstream in upstreams]
        problems = [f"the name {name!r} is used twice" for name in sorted(set(names)) if names.count(name) > 1]
        if len({upstream.group_name for upstream in upstreams if upstream.default}) > 1:
            problems.append("only one can be the default")
        problems += _disagreements(upstreams)
        server = info.data.get("server")
        if server and server.relay_upstream and server.relay_upstream not in names:
            problems.append(f"none is called {server.relay_upstream!r}, as server.relay_upstream says")
        if problems:
            raise ValueError("; ".join(problems))
        return upstreams


def _disagreements(upstreams: tuple[UpstreamConfig, ...]) -> Iterator[str]:
    """What keeps upstreams of one group from sharing their answers."""
    groups: dict[str, list[UpstreamConfig]] = {}
    for upstream in upstreams:
        groups.setdefault(upstream.group_name, []).append(upstream)
    for group, members in groups.items():
        if len({member.passes_credential for member in members}) > 1:
            yield f"of the group {group!r} some have keys and some pass on the caller's: its answers would be everybody's"
        if len({member.ignored_paths for member in members}) > 1:
            yield f"those of the group {group!r} do not agree on ignored_paths"
        aliases = {alias for member in members for alias in member.aliases}
        for own in sorted(aliases.intersection(*[{own for member in members for own in member.aliases.values()}])):
            if len(members) > 1:
                yield f"in the group {group!r} {own!r} is an alias, and is what another one stands for"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid configuration, the secrets that it names, and what looks odd but does no harm."""

    config: Config
    secrets: Mapping[str, str] = field(repr=False)
    """The values of the environment variables that the configuration names, by their names, and of files by their paths."""
    warnings: tuple[str, ...]
    source: str
    cache_dir: Path
    """The user's folder for cached data."""
    proxies: Mapping[str, str] = field(repr=False)
    """The HTTP proxies that the environment prescribes (``HTTPS_PROXY``, ``NO_PROXY`` …), by the upstreams' names."""
    text: str = field(default="", repr=False)
    """What is in the file."""
    secret_files: tuple[Path, ...] = ()

    @property
    def embedded_dir(self) -> Path | None:
        """Where the embedded server keeps its data, if it does."""
        name = self.config.redis.embedded_dir
        return self.cache_dir / name if name else None


def load(
    path: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    text: str | None = None,
    secrets_needed: bool = True,
) -> Loaded:
    """Reads ``path`` (by default ``config.toml``, if there is one), the environment and ``flags`` (by section).

    ``text`` is what was in the file, where it has been read already; ``secrets_needed``: whether the secrets that it names
    must be there. Raises `ConfigError` with every problem found.
    """
    source = str(path or DEFAULT_PATH)
    if text is None:
        text, source = _read(path)
    values = _parsed(text, source)
    flags = flags or {}
    hidden = {_variable(section, key) for section, keys in flags.items() for key in keys}
    settings = {variable: environ[variable] for variable in _variables() if variable in environ and variable not in hidden}
    overrides, problems = _from_environment(settings)
    for layer in (overrides, flags):
        _lay_over(values, layer)
    context = _Environ(environ)
    context.asks = not _is_replay(values)
    try:
        config = Config.model_validate(values, context=context if secrets_needed else None)
    except ValidationError as error:
        raise ConfigError(problems + [_problem(detail, settings) for detail in error.errors()]) from None
    if problems:
        raise ConfigError(problems)
    asked = () if config.is_replay else config.upstreams  # what nobody asks needs no secrets, and they are best not here
    files = [path for path in _secret_files(config, asked) if path]
    secrets = {name: environ[name].strip() for name in _secret_variables(config, asked) if name in environ}
    secrets |= _read_secrets(files, needed=secrets_needed)
    # Not an error: Kubernetes puts GATEWAY_SERVICE_HOST and the like there for a service of that name.
    unknown = sorted(
        name
        for name in environ.keys() - _variables().keys() - set(_secret_variables(config, config.upstreams))
        if name.startswith(PREFIX)
    )
    warnings = tuple(f"{variable} is set but names no key of the configuration: ignored" for variable in unknown)
    cache_dir = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or ".") / ".cache") / "gateway"
    proxies = _proxies(config, environ)
    return Loaded(config, secrets, warnings, source, cache_dir, proxies, text, tuple(Path(path) for path in files))


def _is_replay(values: Mapping[str, Any]) -> bool:
    cache = values.get("cache")
    return isinstance(cache, dict) and cache.get("mode") == "replay"


def _read(path: Path | None) -> tuple[str, str]:
    file = path or DEFAULT_PATH
    try:
        return file.read_text("utf-8"), str(file)
    except OSError as error:
        if path is None and isinstance(error, FileNotFoundError):
            return "", "defaults"
        raise ConfigError([f"{file}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{file}: is not TOML: {error}"]) from None


def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{source}: is not TOML: {error}"]) from None


def _variable(*path: str) -> str:
    return PREFIX + "_".join(path).upper()


def _variables() -> dict[str, tuple[tuple[str, ...], Any]]:
    """The path and the default value of the key that each variable sets."""
    found: dict[str, tuple[tuple[str, ...], Any]] = {}
    for section, value in Config():
        if isinstance(value, BaseModel):
            found |= {_variable(section, key): ((section, key), default) for key, default in value}
        else:
            found[_variable(section)] = (section,), value
    return found


def _from_environment(settings: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The values that the variables set, and a problem for each that cannot be read."""
    values: dict[str, Any] = {}
    problems = []
    variables = _variables()
    for variable, text in settings.items():
        path, default = variables[variable]
        try:
            value = _parse(text, default)
        except orjson.JSONDecodeError as error:
            problems.append(f"{'.'.join(path)}: is not JSON: {error} (from {variable})")
            continue
        *sections, key = path
        table = values
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = value
    return values, problems


def _parse(text: str, default: Any) -> Any:
    """Lists are JSON, or words with commas between; all else is as it stands."""
    if not isinstance(default, tuple | frozenset):
        return text
    if text.lstrip().startswith(("[", "{")):
        return orjson.loads(text)
    return [word.strip() for word in text.split(",") if word.strip()]


def _lay_over(values: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for section, value in layer.items():
        if not isinstance(value, Mapping):
            values[section] = value
        elif isinstance(below := values.setdefault(section, {}), dict):
            below.update(value)


_NO_URL = "is not a URL: what is odd in a password must be percent-encoded"


def _split(url: str) -> SplitResult:
    """Its failure shows nothing of the URL: the part that does not parse may be a password."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError(_NO_URL) from None
    return parts


_TABLE, _LIST, _KIND = "must be a table", "must be a list", 'must be "openai", "langchain" or "simulated"'
_WORDS = {
    "extra_forbidden": "is not a key of the configuration",
    "missing": "is missing",
    "model_type": _TABLE,
    "model_attributes_type": _TABLE,
    "dict_type": _TABLE,
    "tuple_type": _LIST,
    "frozen_set_type": _LIST,
    "union_tag_not_found": _KIND,
    "union_tag_invalid": _KIND,
}


def _problem(detail: ErrorDetails, settings: Mapping[str, str]) -> str:
    path = [str(part) for part in detail["loc"]]
    variable = _variable(*path[:2])
    if path[0] == "upstreams":
        variable = _variable("upstreams")
        del path[2:3]  # the kind, by which pydantic chose the model
    if detail["type"].startswith("union_tag"):
        path.append("kind")
    message = _WORDS.get(detail["type"]) or detail["msg"].removeprefix("Value error, ")
    source = f" (from {variable})" if variable in settings else ""
    return f"{'.'.join(path)}: {message}{source}"


def _proxies(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    schemes = ("http", "https", "all", "no")
    named = {scheme: environ.get(f"{scheme}_proxy") or environ.get(f"{scheme}_proxy".upper()) for scheme in schemes}
    proxies = {scheme: value for scheme, value in named.items() if value}
    found = {}
    for upstream in config.upstreams:
        if isinstance(upstream, OpenAIUpstreamConfig):
            url = urlsplit(upstream.base_url)
            proxy = proxies.get(url.scheme) or proxies.get("all")
            host = url.hostname or ""
            if proxy and host not in _LOOPBACK and not proxy_bypass_environment(host, proxies):
                found[upstream.name] = proxy
    return found


def _secret_variables(config: Config, upstreams: Iterable[UpstreamConfig]) -> Iterator[str]:
    yield config.cache.key_secret_env
    yield config.admin.key_env if config.admin.enabled else ""
    for upstream in upstreams:
        yield from set(upstream.secret_names) - set(_files_of(upstream))


def _secret_files(config: Config, upstreams: Iterable[UpstreamConfig]) -> Iterator[str]:
    yield config.admin.key_file if config.admin.enabled else ""
    for upstream in upstreams:
        yield from _files_of(upstream)


def _files_of(upstream: UpstreamConfig) -> Iterable[str]:
    if isinstance(upstream, OpenAIUpstreamConfig):
        return (upstream.api_key_file,)
    return upstream.arguments_file.values() if isinstance(upstream, LangChainUpstreamConfig) else ()


def _read_secrets(files: Iterable[str], *, needed: bool) -> dict[str, str]:
    secrets = {}
    for path in files:
        try:
            secrets[path] = _read_secret(path)
        except ValueError as error:  # it has changed since it was checked, or nobody needs it
            if needed:
                raise ConfigError([f"a secret: {error}"]) from None
    return secrets

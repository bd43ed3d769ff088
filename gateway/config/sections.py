"""The sections of ``config.toml`` but for the upstreams: the keys of each, at their defaults."""

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from gateway.config.secrets import SecretFile, Variable, not_both
from gateway.config.values import (
    NO_URL,
    Count,
    CountOrZero,
    Dollars,
    DottedPath,
    Rate,
    RateOrZero,
    Seconds,
    SecondsOrZero,
    Section,
    Share,
    Temperature,
    host_and_port,
    split_url,
)
from gateway.core.faults import Fault, FaultKind, total_rate
from gateway.core.key import MAX_SAMPLES
from gateway.core.pacing import Pace, PaceKind
from gateway.core.sentinel_url import SentinelUrl


class ServerConfig(Section):
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
    cors_origins: tuple[Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$")], ...] = ()


class LimitsConfig(Section):
    """Of each process; 0: any number."""

    max_connections: CountOrZero = 8192
    max_streams: CountOrZero = 4096
    max_flights: CountOrZero = 2048
    max_held_bytes: CountOrZero = 268_435_456
    max_streams_per_tenant: CountOrZero = 0
    max_flights_per_tenant: CountOrZero = 0
    max_lag_s: SecondsOrZero = 0.0


class RedisConfig(Section):
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
        if "@" in "".join(split_url(url)[2:]):
            raise ValueError(NO_URL)
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
        parts = split_url(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _never_filtered(reasons: frozenset[str]) -> frozenset[str]:
    if "content_filter" in reasons:
        raise ValueError("content_filter is never stored")
    return reasons


FinishReasons = Annotated[frozenset[str], AfterValidator(_never_filtered)]
Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]


class CacheConfig(Section):
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
        if name and info.context and not 16 <= len(info.context.environ[name].strip().encode()) <= 64:
            raise ValueError("the environment variable that it names must hold 16 to 64 bytes")
        return name


class ReplayConfig(Section):
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


class FaultsConfig(Section):
    allowed: bool = False
    seed: int = 0


class FlightsConfig(Section):
    lease_s: Annotated[float, Field(ge=0.1, le=3600)] = 5.0
    when_abandoned: Literal["finish", "cancel", "finish_if_cacheable"] = "finish_if_cacheable"
    abandon_grace_s: SecondsOrZero = 5.0
    max_flight_bytes: Count = 33_554_432
    resume_s: Seconds = 300.0
    event_ids: bool = False
    first_byte_timeout_s: Seconds = 600.0
    idle_timeout_s: Seconds = 600.0
    total_timeout_s: Seconds = 3600.0


class RetriesConfig(Section):
    max_retries: CountOrZero = 2
    backoff_s: SecondsOrZero = 0.5
    max_backoff_s: SecondsOrZero = 8.0
    max_wait_s: SecondsOrZero = 10.0
    budget: Share = 0.2
    min_per_s: RateOrZero = 1.0


class EjectionConfig(Section):
    enabled: bool = True
    error_rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    min_calls: Count = 5
    window_s: Seconds = 30.0
    first_s: Seconds = 5.0
    longest_s: Seconds = 60.0


class AdminConfig(Section):
    enabled: bool = True
    listen: str = ""
    key_env: Variable = ""
    key_file: SecretFile = ""

    _one_key = field_validator("key_file")(not_both)

    @field_validator("listen")
    @classmethod
    def _is_address(cls, listen: str) -> str:
        if listen:
            host_and_port(listen)
        return listen

    @property
    def address(self) -> tuple[str, int] | None:
        """The host and the port of the administration's own listener, where it has one."""
        return host_and_port(self.listen) if self.listen else None

    @property
    def key_name(self) -> str:
        """By which `Loaded.secrets` knows the key."""
        return self.key_env or self.key_file

    @property
    def is_open(self) -> bool:
        return self.enabled and bool(self.key_name)


class MetricsConfig(Section):
    enabled: bool = True
    public: bool = False


class LogConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    access: bool = True


class FaultConfig(Section):
    """A fault, and the share of answers that it befalls."""

    kind: FaultKind
    rate: Share = 1.0
    status: Annotated[int, Field(ge=400, le=599)] = 503
    retry_after_s: CountOrZero | None = None
    seconds: SecondsOrZero = 30.0
    after: CountOrZero | None = None

    def as_fault(self) -> Fault:
        return Fault(**dict(self))


def _befall_not_too_many(faults: tuple[FaultConfig, ...] | None) -> tuple[FaultConfig, ...] | None:
    if total_rate([fault.as_fault() for fault in faults or ()]) > 1 + 1e-9:  # they are added up
        raise ValueError("their rates come to more than 1")
    return faults


class ModelConfig(Section):
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

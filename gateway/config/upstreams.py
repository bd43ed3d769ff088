"""``[[upstreams]]``: what there is of each kind, and whether those of one group can share their answers."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from gateway.config.secrets import UpstreamFile, UpstreamVariable, not_both
from gateway.config.values import (
    Count,
    CountOrZero,
    DottedPath,
    Rate,
    RateOrZero,
    Seconds,
    SecondsOrZero,
    Section,
    Slowdown,
    split_url,
    why_unreadable,
)
from gateway.core.simulation import Behaviour

_MAX_CORPUS_BYTES = 67_108_864


class _Upstream(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    group: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{0,64}$")] = ""
    models: tuple[str, ...] = ()
    aliases: dict[str, str] = Field(default_factory=dict)
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
    def secret_variables(self) -> tuple[str, ...]:
        return ()

    @property
    def secret_files(self) -> tuple[str, ...]:
        return ()

    @property
    def secret_names(self) -> tuple[str, ...]:
        """By which `Loaded.secrets` knows what it needs: variables, and paths of files."""
        return (*self.secret_variables, *self.secret_files)

    @property
    def passes_credential(self) -> bool:
        """Whether the caller's own credential goes there."""
        return False


class OpenAIUpstreamConfig(_Upstream):
    kind: Literal["openai"]
    base_url: str = "https://api.openai.com/v1"
    api_key_env: UpstreamVariable = ""
    api_key_envs: tuple[UpstreamVariable, ...] = ()
    api_key_file: UpstreamFile = ""
    stream: bool = True
    ask_usage: bool = True
    connect_timeout_s: Seconds = 5.0
    idle_timeout_s: Seconds = 600.0

    _one_key = field_validator("api_key_file")(not_both)

    @property
    def secret_variables(self) -> tuple[str, ...]:
        return (self.api_key_env, *self.api_key_envs)

    @property
    def secret_files(self) -> tuple[str, ...]:
        return (self.api_key_file,)

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
        parts = split_url(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must start with http:// or https:// and a host")
        if "@" in parts.netloc:
            raise ValueError("must not hold a credential: name what holds it in api_key_env or api_key_file")
        if parts.query or parts.fragment:
            raise ValueError("must end with its path: what follows would not be sent")
        return url.rstrip("/")


class LangChainUpstreamConfig(_Upstream):
    kind: Literal["langchain"]
    target: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*\.[A-Za-z_]\w*$")]
    arguments: dict[str, Any] = Field(default_factory=dict, repr=False)
    arguments_env: dict[str, UpstreamVariable] = Field(default_factory=dict)
    arguments_file: dict[str, UpstreamFile] = Field(default_factory=dict)
    dropped_parameters: tuple[str, ...] = ()

    @property
    def secret_variables(self) -> tuple[str, ...]:
        return tuple(self.arguments_env.values())

    @property
    def secret_files(self) -> tuple[str, ...]:
        return tuple(self.arguments_file.values())


def read_corpus(path: str) -> str:
    """A text to speak from. Raises `ValueError`."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_CORPUS_BYTES + 1)
        text = content.decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {why_unreadable(error)}") from None
    if len(content) > _MAX_CORPUS_BYTES:
        raise ValueError(f"is larger than {_MAX_CORPUS_BYTES} bytes")
    if not text:
        raise ValueError("is empty")
    return text


def _is_corpus(path: str, info: ValidationInfo) -> str:
    if path and info.context:
        read_corpus(path)
    return path


class SimulatedProfile(Section):
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


class SimulatedUpstreamConfig(_Upstream):
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


def disagreements(upstreams: tuple[UpstreamConfig, ...]) -> Iterator[str]:
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

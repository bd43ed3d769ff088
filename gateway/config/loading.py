"""The file, the environment and the flags laid over one another, checked, with the secrets that they name."""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gateway.config import environment
from gateway.config.root import Config
from gateway.config.secrets import Surroundings, read_secret
from gateway.config.upstreams import UpstreamConfig
from gateway.errors import ConfigError

DEFAULT_PATH = Path("config.toml")


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
    config = _checked(values, environ, flags or {}, secrets_needed=secrets_needed)
    asked = () if config.is_replay else config.upstreams  # what nobody asks needs no secrets, and they are best not here
    files = [path for path in _secret_files(config, asked) if path]
    secrets = {name: environ[name].strip() for name in _secret_variables(config, asked) if name in environ}
    return Loaded(
        config=config,
        secrets=secrets | _read_secrets(files, needed=secrets_needed),
        warnings=tuple(environment.warnings(environ, _secret_variables(config, config.upstreams))),
        source=source,
        cache_dir=environment.cache_dir(environ),
        proxies=environment.proxies_of(config, environ),
        text=text,
        secret_files=tuple(Path(path) for path in files),
    )


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


def _checked(
    values: dict[str, Any], environ: Mapping[str, str], flags: Mapping[str, Mapping[str, Any]], *, secrets_needed: bool
) -> Config:
    """The file's values with the others over them."""
    hidden = [environment.variable(section, key) for section, keys in flags.items() for key in keys]
    settings = environment.settings(environ, hidden)
    overrides, problems = environment.overrides(settings)
    for layer in (overrides, flags):
        _lay_over(values, layer)
    surroundings = Surroundings(environ, asks_upstreams=not _is_replay(values)) if secrets_needed else None
    try:
        config = Config.model_validate(values, context=surroundings)
    except ValidationError as error:
        raise ConfigError(problems + [_problem(detail, settings) for detail in error.errors()]) from None
    if problems:
        raise ConfigError(problems)
    return config


def _lay_over(values: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for section, value in layer.items():
        if not isinstance(value, Mapping):
            values[section] = value
        elif isinstance(below := values.setdefault(section, {}), dict):
            below.update(value)


def _is_replay(values: Mapping[str, Any]) -> bool:
    cache = values.get("cache")
    return isinstance(cache, dict) and cache.get("mode") == "replay"


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
    variable = environment.variable(*path[:2])
    if path[0] == "upstreams":
        variable = environment.variable("upstreams")
        del path[2:3]  # the kind, by which pydantic chose the model
    if detail["type"].startswith("union_tag"):
        path.append("kind")
    message = _WORDS.get(detail["type"]) or detail["msg"].removeprefix("Value error, ")
    source = f" (from {variable})" if variable in settings else ""
    return f"{'.'.join(path)}: {message}{source}"


def _secret_variables(config: Config, upstreams: Iterable[UpstreamConfig]) -> Iterator[str]:
    yield config.cache.key_secret_env
    yield config.admin.key_env if config.admin.enabled else ""
    for upstream in upstreams:
        yield from upstream.secret_variables


def _secret_files(config: Config, upstreams: Iterable[UpstreamConfig]) -> Iterator[str]:
    yield config.admin.key_file if config.admin.enabled else ""
    for upstream in upstreams:
        yield from upstream.secret_files


def _read_secrets(files: Iterable[str], *, needed: bool) -> dict[str, str]:
    secrets = {}
    for path in files:
        try:
            secrets[path] = read_secret(path)
        except ValueError as error:  # it has changed since it was checked, or nobody needs it
            if needed:
                raise ConfigError([f"a secret: {error}"]) from None
    return secrets

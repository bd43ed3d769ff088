"""What the environment says: keys of the configuration in ``GATEWAY_<SECTION>_<KEY>``, HTTP proxies, the user's folder.

It comes as an argument: only the commands read the process's own.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # typeshed does not know it

import orjson
from pydantic import BaseModel

from gateway.config.root import Config
from gateway.config.upstreams import OpenAIUpstreamConfig

PREFIX = "GATEWAY_"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def variable(*path: str) -> str:
    """The variable that sets the key."""
    return PREFIX + "_".join(path).upper()


def settings(environ: Mapping[str, str], hidden: Collection[str]) -> dict[str, str]:
    """The variables that set a key, but for those that something else hides."""
    return {name: environ[name] for name in _variables() if name in environ and name not in hidden}


def overrides(settings: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The values that the variables set, as the file would have them, and a problem for each that cannot be read."""
    values: dict[str, Any] = {}
    problems = []
    variables = _variables()
    for name, text in settings.items():
        path, default = variables[name]
        try:
            value = _parse(text, default)
        except orjson.JSONDecodeError as error:
            problems.append(f"{'.'.join(path)}: is not JSON: {error} (from {name})")
            continue
        *sections, key = path
        table = values
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = value
    return values, problems


def _variables() -> dict[str, tuple[tuple[str, ...], Any]]:
    """The path and the default value of the key that each variable sets."""
    found: dict[str, tuple[tuple[str, ...], Any]] = {}
    for section, value in Config():
        if isinstance(value, BaseModel):
            found |= {variable(section, key): ((section, key), default) for key, default in value}
        else:
            found[variable(section)] = (section,), value
    return found


def _parse(text: str, default: Any) -> Any:
    """Lists are JSON, or words with commas between; all else is as it stands."""
    if not isinstance(default, tuple | frozenset):
        return text
    if text.lstrip().startswith(("[", "{")):
        return orjson.loads(text)
    return [word.strip() for word in text.split(",") if word.strip()]


def warnings(environ: Mapping[str, str], secrets: Iterable[str]) -> Iterator[str]:
    """A line for each variable that looks like a key's and is none's; ``secrets`` may be called as they like."""
    # Not an error: Kubernetes puts GATEWAY_SERVICE_HOST and the like there for a service of that name.
    for name in sorted(environ.keys() - _variables().keys() - set(secrets)):
        if name.startswith(PREFIX):
            yield f"{name} is set but names no key of the configuration: ignored"


def cache_dir(environ: Mapping[str, str]) -> Path:
    """The user's folder for cached data."""
    return Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or ".") / ".cache") / "gateway"


def proxies_of(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """The HTTP proxies that are prescribed (``HTTPS_PROXY``, ``NO_PROXY`` …), by the upstreams' names."""
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

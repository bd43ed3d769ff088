"""What a caller says of the cache beside ``Cache-Control``: in fields, or in the body, as LiteLLM's callers do."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from gateway.core.apis.base import RequestProblem
from gateway.core.policy import NO_DIRECTIVES, Directives

MAX_NAME_CHARS = 128
"""How long a namespace or a tag may be."""

MAX_TAGS = 16

MAX_TTL_S = 999_999_999_999_999
"""The greatest Integer of RFC 9651."""


class Controls(NamedTuple):
    """All that a caller says of the cache. ``ttl_s`` 0: the answer is not to be kept; None: as configured."""

    directives: Directives = NO_DIRECTIVES
    ttl_s: float | None = None
    namespace: str = ""
    tags: tuple[str, ...] = ()


NO_CONTROLS = Controls()


def from_body(cache: Mapping[str, Any], controls: Controls) -> Controls:
    """``controls``, which the headers said, with LiteLLM's body object ``cache`` laid under them.

    The headers' ``ttl`` and ``namespace`` hold; of two greatest ages the smaller does; ``no-cache`` and ``no-store`` add
    up. Null is absent, and members with other names are ignored. Raises `RequestProblem`.
    """
    said = controls.directives
    # LiteLLM reads both spellings (its DynamicCacheControl), and none with underscores.
    body_ages = (_seconds(cache, "s-maxage"), _seconds(cache, "s-max-age"))
    ages_s = [int(age_s) for age_s in (said.max_age_s, *body_ages) if age_s is not None]
    directives = replace(
        said,
        no_cache=_flag(cache, "no-cache") or said.no_cache,
        no_store=_flag(cache, "no-store") or said.no_store,
        max_age_s=min(ages_s, default=None),
    )
    ttl_s, namespace = _seconds(cache, "ttl"), _namespace(cache)
    return controls._replace(
        directives=directives,
        ttl_s=ttl_s if controls.ttl_s is None else controls.ttl_s,
        namespace=controls.namespace or namespace,
    )


def _seconds(cache: Mapping[str, Any], name: str) -> float | None:
    value = cache.get(name)
    if value is None:
        return None
    # By type, since a boolean is an int too; NaN and infinity are in no range.
    if type(value) not in (int, float) or not 0 <= value <= MAX_TTL_S:
        raise _problem(name, "a number of seconds, 0 or more")
    return float(value)


def _flag(cache: Mapping[str, Any], name: str) -> bool:
    value = cache.get(name)
    if value is not None and not isinstance(value, bool):
        raise _problem(name, "a boolean")
    return bool(value)


def _namespace(cache: Mapping[str, Any]) -> str:
    """An empty one is none, as it is to LiteLLM."""
    value = cache.get("namespace")
    if value is None:
        return ""
    # Namespaces are shown in logs and listings.
    if not (isinstance(value, str) and len(value) <= MAX_NAME_CHARS and value.isprintable()):
        raise _problem("namespace", f"a string of at most {MAX_NAME_CHARS} printable characters")
    return value


def _problem(name: str, expected: str) -> RequestProblem:
    return RequestProblem(f"Invalid value for 'cache.{name}': expected {expected}.", f"cache.{name}")

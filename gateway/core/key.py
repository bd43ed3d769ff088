"""The cache key: a keyed digest of everything that the caller sent, but a short named list."""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, NewType

import orjson

from gateway.core.apis.base import Api, Json
from gateway.core.recording import SCHEMA_VERSION

CacheKey = NewType("CacheKey", str)
"""40 hexadecimal digits. Without the deployment's secret nobody can tell a request from it."""

MAX_SAMPLES = 64
"""How many answers of one question may be kept side by side."""

_KEY_BYTES = 20
_TENANT_BYTES = 16


def cache_key(  # noqa: PLR0913  # they are what a key is made of
    secret: bytes, *, owner: str, api: Api, route: Sequence[str], body: Json, ignored: Iterable[str] = ()
) -> CacheKey:
    """The key of a request.

    ``owner`` is the tenant or namespace; ``route`` names upstream and model; ``body`` is the parsed request;
    ``ignored`` are dotted paths (``*`` for any item) that the configuration leaves out. ``secret`` is 16 to 64 bytes.
    """
    text = canonical_text(api, body, ignored)
    return CacheKey(_digest(secret, b"key", (str(SCHEMA_VERSION), owner, api.name, *route, text), _KEY_BYTES))


def sample_key(key: CacheKey, sample: int) -> CacheKey:
    """Where the sample with this number is kept: the first one under the key itself."""
    if not sample:
        return key
    return CacheKey(blake2b(key.encode(), key=b"%d" % sample, person=b"sample", digest_size=_KEY_BYTES).hexdigest())


def canonical_text(api: Api, body: Json, ignored: Iterable[str] = ()) -> bytes:
    """The canonical form of a validated request, as JSON text."""
    for path in ignored:
        body = without_path(body, path.split("."))
    return orjson.dumps(api.canonical(body))


def tenant_of(secret: bytes, credential: Sequence[str]) -> str:
    """Whose entries these are: a digest of what the caller identified itself with."""
    return _digest(secret, b"tenant", credential, _TENANT_BYTES)


def _digest(secret: bytes, purpose: bytes, parts: Iterable[str | bytes], size: int) -> str:
    """Each part goes in behind its length, so that no two lists of parts look the same when joined."""
    digest = blake2b(key=secret, person=purpose, digest_size=size)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def without_path(value: Any, path: Sequence[str]) -> Any:
    """``value`` without what ``path`` names; only what changes is copied."""
    name, *rest = path
    if isinstance(value, list):
        at = int(name) if name.isdecimal() else None
        if not rest:
            return [item for place, item in enumerate(value) if name != "*" and place != at]
        return [without_path(item, rest) if name == "*" or place == at else item for place, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if not rest:
        return {key: item for key, item in value.items() if name not in ("*", key)}
    return {key: without_path(item, rest) if name in ("*", key) else item for key, item in value.items()}

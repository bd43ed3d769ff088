"""A new configuration for a gateway that runs: all of it or nothing, and no stream is dropped for it."""

import logging
from collections.abc import Iterator

from gateway.app import Adjustable, build_upstreams
from gateway.config import Config, Loaded
from gateway.errors import ConfigError
from gateway.upstreams.leased import Leased
from gateway.upstreams.router import Router

_FREE_KEYS = {"log": ("level",), "admin": ("key_env", "key_file")}
# What keys and stored answers are made with, and how turns are taken, begins with the process.
_FIXED_KEYS = {"cache": ("key_secret_env", "compress_from_bytes", "sample_order", "sample_seed"), "replay": ()}


def differences(old: Config, new: Config) -> Iterator[tuple[str, bool]]:
    """What has changed, by its dotted path, each with whether it may change while the gateway runs."""
    for section, value in new:
        before = getattr(old, section)
        if isinstance(value, tuple):
            if value != before:
                yield section, True
            continue
        for key, now in value:
            if now != getattr(before, key):
                # Whether there is an administration at all is settled when the paths are.
                settled = section == "admin" and new.admin.is_open != old.admin.is_open
                yield f"{section}.{key}", _is_free(section, key) and not settled


def _is_free(section: str, key: str) -> bool:
    if section in _FIXED_KEYS:
        return key not in _FIXED_KEYS[section]
    return key in _FREE_KEYS.get(section, ())


class Live:
    """The upstreams of a running gateway, and all else that follows its configuration."""

    def __init__(self, loaded: Loaded) -> None:
        """Raises `ConfigError`."""
        upstreams = build_upstreams(loaded)
        self.router = Router(upstreams)
        self.adjustable: Adjustable | None = None
        self._loaded = loaded
        self._upstreams = [upstream for _, upstream in upstreams]
        self._dismissed: list[Leased] = []

    async def change(self, loaded: Loaded) -> list[str]:
        """Takes the new configuration, and tells what is different. Raises `ConfigError`; then the old one stays."""
        found = list(differences(self._loaded.config, loaded.config))
        if fixed := [path for path, free in found if not free]:
            raise ConfigError([f"{path}: cannot change while the gateway runs: restart it" for path in fixed])
        upstreams = build_upstreams(loaded, self._upstreams)
        if self.adjustable:
            self.adjustable.adjust(loaded, Router(upstreams))
        logging.getLogger().setLevel(loaded.config.log.level.upper())
        changed = [path for path, _ in found]
        if loaded.secrets != self._loaded.secrets:
            changed.append("secrets")
        self._loaded = loaded
        before, self._upstreams = self._upstreams, [upstream for _, upstream in upstreams]
        gone = [upstream for upstream in before if upstream not in self._upstreams]
        self._dismissed = [upstream for upstream in (*self._dismissed, *gone) if upstream.is_open]
        for upstream in gone:
            await upstream.dismiss()
        return changed

    async def close(self) -> None:
        for upstream in (*self._upstreams, *self._dismissed):
            await upstream.close()

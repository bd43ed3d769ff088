"""What of a configuration may change while the gateway runs, and what is said of it."""

import logging
from collections.abc import Iterator, Sequence

from gateway.config import Config, Loaded
from gateway.errors import ConfigError

log = logging.getLogger(__name__)

_FREE_KEYS = {"log": ("level",), "admin": ("key_env", "key_file")}
# What keys and stored answers are made with, and how turns are taken, begins with the process.
_FIXED_KEYS = {
    "cache": ("key_secret_env", "compress_from_bytes", "sample_order", "sample_seed"),
    "limits": (),
    "replay": (),
    "retries": (),
    "ejection": (),
}


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


def changes(old: Loaded, new: Loaded) -> list[str]:
    """What is different, by dotted paths. Raises `ConfigError` where it may not be."""
    found = list(differences(old.config, new.config))
    if fixed := [path for path, free in found if not free]:
        raise ConfigError([f"{path}: cannot change while the gateway runs: restart it" for path in fixed])
    return [path for path, _ in found] + (["secrets"] if old.secrets != new.secrets else [])


def tell_of_change(loaded: Loaded, changed: Sequence[str]) -> None:
    log.info("%s is read again: %s", loaded.source, f"new: {', '.join(changed)}" if changed else "nothing has changed")


def tell_of_refusal(problems: Sequence[str]) -> None:
    """In the words in which a start is refused."""
    for problem in problems:
        log.error("the configuration stays as it was: %s", problem)

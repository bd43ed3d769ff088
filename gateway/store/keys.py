"""The key schema: names of keys and channels, and what they hold.

Keys, all under ``[redis] prefix`` (``gw``); ``{K}`` is the cache key, ``F`` a flight:

| key                  | type   | holds                                                                      | lives        |
|----------------------|--------|----------------------------------------------------------------------------|--------------|
| `gw:{K}:rec`         | hash   | `v` schema version, `at` start of the flight (µs), `flight`, `meta` (JSON),| `ttl_s` and  |
|                      |        | `sse` (all frames, marked where a reply differs), `marks` (arrivals, and   | `stale_s`    |
|                      |        | what stood there), `body` (JSON), `req` (what was asked: JSON, or empty)   |              |
| `gw:{K}:rec:F`       | hash   | the recording of a flight, once another's has taken its place              | `resume_s`   |
| `gw:{K}:now`         | string | the flight that newcomers of the key join                                  | lease        |
| `gw:{K}:lease:F`     | string | who writes the log: `replica.run`                                          | lease        |
| `gw:{K}:log:F`       | stream | the log, see below                                                         | `resume_s`   |
| `gw:{K}:req:F`       | string | what a take-over needs of the request                                      | `resume_s`   |
| `gw:{K}:readers:F`   | hash   | replica → `readers:when this is stale` (ms, Redis' time)                   | a few leases |
| `gw:{K}:cancelled:F` | set    | readers that were cancelled for good                                       | `resume_s`   |
| `gw:{K}:mirrored:F`  | hash   | run → `read:until`: so much of the log a replica has read that mirrors it; | `resume_s`   |
|                      |        | until then (ms, Redis' time) its readers see nothing else, see `Mirrored`  |              |
| `gw:secret`          | string | the secret of the cache keys, where the configuration names none           | for ever     |
| `gw:purges`          | stream | `purge` (JSON), and `until` when it counts (ms, Redis' time); the ids are  | as its last  |
|                      |        | the server's, so that a cursor never has one come in before it             | purge        |
| `gw:recent`          | list   | the cache keys that were stored last, the latest first, 256 at most        | 30 days      |
| `gw:pulse`           | hash   | process → what it has counted since it began (JSON), told while it is busy | a day        |
| `gw:stats`           | hash   | counters of all replicas together, and `since` when (Unix seconds)         | a year       |

A recording's `sse`, `body` and `req` may each be compressed: see `packing`. The keys without a ``{K}`` are never in one
script with others: on a cluster each has a slot of its own. They live as long as is said once nothing writes them.

Entries of a log have the id ``{count}-{seq}``: ``count`` frames are in the log once it is there, so an entry that comes
twice is refused, and a cursor keeps its meaning where a lost log is written anew. All have `w`, who wrote them, and:

| entry     | has                                                                                                |
|-----------|----------------------------------------------------------------------------------------------------|
| head      | `h`; before any frame                                                                              |
| batch     | `d` frames, an empty line ends each; `t` their arrivals (µs, 8 bytes each, little-endian)          |
| take-over | `run`                                                                                              |
| release   | `rel`                                                                                              |
| end       | `end`, and `body` where the upstream did not stream; it is the last one                            |

Channels: `gw:bell:F` rings when a log has grown or a reader was cancelled, `gw:bell:{replica}` tells a replica of
which flight of its a reader was cancelled, or has come elsewhere. A ring that is lost, or not allowed, costs only time.
"""

import re

from gateway.core.key import CacheKey
from gateway.ports import LogName

_TYPES = {"rec": "hash", "now": "string", "lease": "string", "log": "stream"}
_TYPES |= {"req": "string", "readers": "hash", "cancelled": "set", "mirrored": "hash"}


class Keys:
    """The names of keys and channels under a prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.secret = f"{prefix}:secret"
        self.probe = f"{prefix}:probe"
        self.purges = f"{prefix}:purges"
        self.recent = f"{prefix}:recent"
        self.stats = f"{prefix}:stats"
        self.pulse = f"{prefix}:pulse"
        self.bells = f"{prefix}:bell:"
        self.recordings = f"{prefix}:{{*}}:rec*"
        """The pattern of the names of recordings, replaced ones too. No prefix that the configuration takes is a pattern."""
        self._about = re.compile(re.escape(prefix) + r":\{[\w-]+\}:(" + "|".join(_TYPES) + r")(?::[\w-]+)?")
        self._recording = re.compile(re.escape(f"{prefix}:{{").encode() + rb"([\w-]+)\}:rec(:[\w-]+)?")

    def key_of(self, name: bytes) -> tuple[CacheKey, bool] | None:
        """Whose recording has this name, and whether it was replaced; None where it is no recording's."""
        found = self._recording.fullmatch(name)
        return (CacheKey(found[1].decode()), bool(found[2])) if found else None

    def type_of(self, name: str) -> str:
        """What type a key has that is about a cache key; empty for others."""
        found = self._about.fullmatch(name)
        return _TYPES[found[1]] if found else ""

    def recording(self, key: CacheKey) -> str:
        return f"{self.prefix}:{{{key}}}:rec"

    def replaced(self, log: LogName) -> str:
        return self._of("rec", log)

    def now(self, log: LogName) -> str:
        return f"{self.prefix}:{{{log.key}}}:now"

    def lease(self, log: LogName) -> str:
        return self._of("lease", log)

    def log(self, log: LogName) -> str:
        return self._of("log", log)

    def request(self, log: LogName) -> str:
        return self._of("req", log)

    def readers(self, log: LogName) -> str:
        return self._of("readers", log)

    def cancelled(self, log: LogName) -> str:
        return self._of("cancelled", log)

    def mirrored(self, log: LogName) -> str:
        return self._of("mirrored", log)

    def bell(self, whose: str) -> str:
        """The channel of a flight, or of a replica."""
        return f"{self.bells}{whose}"

    def _of(self, what: str, log: LogName) -> str:
        return f"{self.prefix}:{{{log.key}}}:{what}:{log.flight}"

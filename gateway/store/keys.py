"""The key schema: names of keys and channels, and what they hold.

Keys, all under ``[redis] prefix`` (``gw``); ``{K}`` is the cache key, ``F`` a flight:

| key                  | type   | holds                                                                      | lives        |
|----------------------|--------|----------------------------------------------------------------------------|--------------|
| `gw:{K}:rec`         | hash   | `v` schema version, `at` start of the flight (µs), `flight`, `meta` (JSON),| `ttl_s`      |
|                      |        | `sse` (all frames, marked where a reply differs), `marks` (arrivals, and   |              |
|                      |        | what stood there), `body` (JSON)                                           |              |
| `gw:{K}:rec:F`       | hash   | the recording of a flight, once another's has taken its place              | `resume_s`   |
| `gw:{K}:now`         | string | the flight that newcomers of the key join                                  | lease        |
| `gw:{K}:lease:F`     | string | who writes the log: `replica.run`                                          | lease        |
| `gw:{K}:log:F`       | stream | the log, see below                                                         | `resume_s`   |
| `gw:{K}:req:F`       | string | what a take-over needs of the request                                      | `resume_s`   |
| `gw:{K}:readers:F`   | hash   | replica → `readers:when this is stale` (ms, Redis' time)                   | a few leases |
| `gw:{K}:cancelled:F` | set    | readers that were cancelled for good                                       | `resume_s`   |
| `gw:secret`          | string | the secret of the cache keys, where the configuration names none           | for ever     |

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

from gateway.core.key import CacheKey
from gateway.ports import LogName


class Keys:
    """The names of keys and channels under a prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.secret = f"{prefix}:secret"
        self.probe = f"{prefix}:probe"
        self.bells = f"{prefix}:bell:"

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

    def bell(self, whose: str) -> str:
        """The channel of a flight, or of a replica."""
        return f"{self.bells}{whose}"

    def _of(self, what: str, log: LogName) -> str:
        return f"{self.prefix}:{{{log.key}}}:{what}:{log.flight}"

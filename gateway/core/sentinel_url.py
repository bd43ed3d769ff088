"""URLs of a Redis that sentinels watch over.

The form is that of redis-sentinel-url, redisvl, Prefect and LangChain; redis-py has none of its own.
"""

import re
from typing import NamedTuple, Self

_SCHEMES = {"redis+sentinel": False, "rediss+sentinel": True}
_PORT = 26_379
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@\s]+)(?::(\d{1,5}))?")
_SERVICE = re.compile(r"/([^/\s]+)(?:/(\d*))?")
_FORM = "must be like redis+sentinel://user:password@a:26379,b:26379/service/0, with odd characters percent-encoded"


class SentinelUrl(NamedTuple):
    """``redis+sentinel://[user:password@]host[:port][,host[:port]…]/service[/db][?options]``, with ``rediss`` over TLS.

    The user and the options are Redis' own; ``sentinel_username`` and ``sentinel_password`` among them are the sentinels'.
    """

    tls: bool
    user: str
    """With the password, as it stands in the URL."""
    sentinels: tuple[tuple[str, int], ...]
    service: str
    db: str
    query: str

    @staticmethod
    def is_one(url: str) -> bool:
        """Whether the URL says that it is of this kind."""
        return url.partition("://")[0] in _SCHEMES

    @classmethod
    def parse(cls, url: str) -> Self:
        """Raises `ValueError`, which shows nothing of the URL: what does not parse may be a password."""
        scheme, _, rest = url.partition("://")
        rest, _, query = rest.partition("?")
        authority, slash, path = rest.partition("/")
        user, _, hosts = authority.rpartition("@")
        sentinels = [_HOST.fullmatch(host) for host in hosts.split(",")]
        service = _SERVICE.fullmatch(slash + path)
        if scheme not in _SCHEMES or service is None or not all(sentinels) or "@" in path + query:
            raise ValueError(_FORM)
        found = tuple((match[1].strip("[]"), int(match[2] or _PORT)) for match in sentinels if match)
        if not all(0 < port < 65_536 for _, port in found):
            raise ValueError(_FORM)
        return cls(_SCHEMES[scheme], user, found, service[1], service[2] or "0", query)

    @property
    def shown(self) -> str:
        """The URL without credentials and options, for people to read."""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.sentinels)
        return f"redis{'s' if self.tls else ''}+sentinel://{hosts}/{self.service}"

    @property
    def plain(self) -> str:
        """The URL of a server with the same user, database and options, which is not at that host."""
        user = f"{self.user}@" if self.user else ""
        query = f"?{self.query}" if self.query else ""
        return f"redis{'s' if self.tls else ''}://{user}sentinel/{self.db}{query}"

"""Takes secrets out of texts that others have written: an upstream may say in its error what it was sent."""

import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

HIDDEN = "***"
# What is shorter is no secret worth the name, and would be found in any text.
_SHORTEST = 8
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_SECRET_WORDS = frozenset({
    "apikey", "auth", "authorization", "cookie", "credential", "credentials", "header", "headers", "key", "password",
    "proxies", "proxy", "secret", "token",
})  # fmt: skip


class Hider:
    """Knows secrets, and the forms in which they travel."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._forms: tuple[str, ...] = ()
        self.learn(secrets)

    def __repr__(self) -> str:
        return f"<Hider of {len(self._forms)} forms>"

    def learn(self, secrets: Iterable[str]) -> None:
        """More of them; those that were known stay hidden."""
        new = {form for secret in secrets if len(secret) >= _SHORTEST for form in _forms(secret)}
        # The longest first: one may be a part of another.
        self._forms = tuple(sorted(new | set(self._forms), key=lambda form: (-len(form), form)))

    def __call__(self, text: str) -> str:
        for form in self._forms:
            if form in text:
                text = text.replace(form, HIDDEN)
        return text


def _forms(secret: str) -> set[str]:
    encoded = b64encode(secret.encode("utf-8", "surrogateescape")).decode()
    return {secret, quote(secret, safe="", errors="surrogateescape"), encoded}


def credentials_of(url: str) -> list[str]:
    """The passwords in a URL, and what a proxy is sent of one (RFC 7617)."""
    try:
        parts = urlsplit(url)
        password, user = unquote(parts.password or ""), unquote(parts.username or "")
    except ValueError:
        return [url]
    found = [value for name, value in parse_qsl(parts.query) if "password" in name]
    return [*found, password, f"{user}:{password}"] if password else found


def written_secrets(value: Any, *, within: bool = False) -> Iterator[str]:
    """What looks like a secret among the arguments: they are no place for one, but the file allows it."""
    if isinstance(value, str) and within:
        yield value
        yield value.rpartition(" ")[2]  # without the scheme of a header
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            words = {word.lower() for word in _WORD.findall(str(name))}
            yield from written_secrets(inner, within=within or bool(words & _SECRET_WORDS))
    elif isinstance(value, list):
        for inner in value:
            yield from written_secrets(inner, within=within)

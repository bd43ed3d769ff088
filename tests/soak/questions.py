"""What is asked, and what the answer is: a pure function, so that nobody needs to remember what was said.

An answer names its question at both ends and counts its words, so two that are mixed, cut or swapped cannot pass for one.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

# By credentials of the gateway's own, by those of the callers, and by an upstream that fails so often that others stand in.
SHARED, OWN, WEAK = "m-shared", "m-own", "m-weak"
MODELS = (SHARED, OWN, WEAK)
TENANTS = ("tenant-a", "tenant-b", "tenant-c")
_VOCABULARY = ("gate", "flöw", "日本", "\U0001f600", "a\u2028b", '"q"', "\\n", "tail\n", "x" * 40)
_WORDS = {"short": (3, 12), "long": (30, 60), "huge": (100, 150)}
_FILLER = {"huge": "." * 800}


class Identity(NamedTuple):
    """What an answer depends on."""

    api: str
    text: str
    owner: str


@dataclass(frozen=True)
class Question:
    """One question of one tenant."""

    model: str
    api: str
    text: str
    tenant: str

    @property
    def identity(self) -> Identity:
        return Identity(self.api, self.text, self.tenant if self.model == OWN else "")

    @property
    def answer(self) -> str:
        return "".join(words_of(self.identity))

    @property
    def path(self) -> str:
        return "chat/completions" if self.api == "chat" else "completions"

    def body(self, **members: Any) -> dict[str, Any]:
        if self.api == "chat":
            return {"model": self.model, "messages": [{"role": "user", "content": self.text}], "temperature": 0, **members}
        return {"model": self.model, "prompt": self.text, "temperature": 0, **members}


@lru_cache(maxsize=2048)
def words_of(identity: Identity) -> tuple[str, ...]:
    """The answer, word by word."""
    digest = hashlib.blake2b("|".join(identity).encode()).hexdigest()
    draw = random.Random(digest)
    size = identity.text.partition(" ")[0]
    least, most = _WORDS[size]
    count, filler = draw.randint(least, most), _FILLER.get(size, "")
    middle = [f"{place}:{draw.choice(_VOCABULARY)}{filler} " for place in range(count)]
    return (f"<{digest[:12]} {identity.text} ", *middle, f"{count} {digest[:12]}>")

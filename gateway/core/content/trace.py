"""How far a stream has come, in content: counted, digested, and found again in a log."""

import re
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from hashlib import blake2b

from gateway.core.apis.base import Json
from gateway.core.content.cutting import Diverged, cut_known
from gateway.core.content.leaves import Kind, Leaf, Walkers, reports_usage

_DIGEST_BYTES = 6
_POSITION = re.compile(r"(0|[1-9a-f][0-9a-f]{0,11})-([A-Za-z0-9_-]{8})")


class Trace:
    """How far a stream has come, counted and digested by its content alone."""

    def __init__(self) -> None:
        self.length = 0
        self._walkers = Walkers()
        self._hashes: dict[str, blake2b] = {}
        self._held: dict[str, str] = {}

    def add(self, chunk: Json) -> None:
        for _, _, leaves in self.choices(chunk):
            for leaf in leaves:
                if self.adds(leaf):
                    self.grow(leaf, leaf.text)

    def choices(self, chunk: Json) -> Iterator[tuple[int, Json, list[Leaf]]]:
        """The strings of the next chunk, which are not counted yet."""
        return self._walkers.choices(chunk)

    def adds(self, leaf: Leaf) -> bool:
        """Whether a string is content, and not the same name or end again."""
        if leaf.kind is Kind.HOLDS:
            return self._held.get(leaf.channel) != leaf.text
        return leaf.kind is not Kind.MARK

    def grow(self, leaf: Leaf, text: str) -> None:
        """Counts ``text``: the string, or the beginning of it."""
        if leaf.kind is Kind.HOLDS:
            self._held[leaf.channel] = text
        known = self._hashes.get(leaf.channel)
        if known is None:
            known = self._hashes[leaf.channel] = blake2b(digest_size=16)
        known.update(text.encode("utf-8", "surrogatepass"))
        self.length += len(text)

    def digest(self) -> str:
        """8 letters, digits, ``-`` and ``_``. It does not depend on how chunks were cut or channels interleaved."""
        total = blake2b(digest_size=_DIGEST_BYTES)
        for channel in sorted(self._hashes):
            name = channel.encode("utf-8", "surrogatepass")
            total.update(b"%d %b %b" % (len(name), name, self._hashes[channel].digest()))
        return urlsafe_b64encode(total.digest()).decode()

    def position(self) -> str:
        """Length and digest in one word, for a cursor."""
        return f"{self.length:x}-{self.digest()}"


def parse_position(text: str) -> tuple[int, str]:
    """Length and digest of a `Trace.position`; raises ValueError."""
    match = _POSITION.fullmatch(text)
    if match is None:
        raise ValueError("not a position")
    return int(match[1], 16), match[2]


class Skip:
    """Leaves out the beginning of a log that a client has seen, of which only `Trace.position` is known.

    ``reached`` tells whether the position was found: from then on chunks come out as they are. If it still is not when
    the log ends, the client saw more than the log has.
    """

    def __init__(self, length: int, digest: str) -> None:
        self._length = length
        self._digest = digest
        self._trace = Trace()
        self.reached = length == 0 and digest == self._trace.digest()

    def feed(self, chunk: Json) -> Json | None:
        """Takes the log's next chunk over; returns what of it the client has not seen, None where that is nothing.

        Raises `Diverged` where the log does not say what the client saw.
        """
        if self.reached:
            return chunk
        is_left = False
        for _, choice, leaves in self._trace.choices(chunk):
            left, _ = cut_known(choice, leaves, self._count_seen)
            is_left = is_left or left
        if self._trace.length < self._length:
            return None
        if self._trace.digest() != self._digest:
            raise Diverged("all channels", self._length, "the log differs from what the client saw")
        self.reached = True
        return chunk if is_left or reports_usage(chunk) else None

    def _count_seen(self, leaf: Leaf) -> int:
        left = self._length - self._trace.length
        if not left:
            return 0
        if not self._trace.adds(leaf):
            return len(leaf.text)
        self._trace.grow(leaf, leaf.text[:left])
        return min(left, len(leaf.text))

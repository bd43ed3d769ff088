"""What may be read, what may be stored, and how to say which it was (RFC 9111, RFC 9211)."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gateway.core.recording import Meta

_NAME = "gateway"

# A comma inside a quoted argument separates nothing.
_DIRECTIVE = re.compile(r'([^\s,="]+)(?:\s*=\s*("(?:[^"\\]|\\.)*"|[^\s,]*))?')

DispositionKind = Literal["hit", "miss", "collapsed", "bypass"]


@dataclass(frozen=True, slots=True)
class Directives:
    """The caller's ``Cache-Control`` (RFC 9111 5.2.1). Ages are whole seconds."""

    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    max_age_s: int | None = None
    min_fresh_s: int | None = None

    @classmethod
    def parse(cls, header: str) -> "Directives":
        """Unknown directives are ignored; an age that is no number allows nothing (RFC 9111 4.2.1)."""
        found: dict[str, str] = {}
        for name, value in _DIRECTIVE.findall(header):
            found.setdefault(name.lower(), value.strip('"'))
        return cls(
            no_cache="no-cache" in found,
            no_store="no-store" in found,
            only_if_cached="only-if-cached" in found,
            max_age_s=_seconds(found["max-age"], 0) if "max-age" in found else None,
            min_fresh_s=_seconds(found["min-fresh"], 1 << 62) if "min-fresh" in found else None,
        )

    def accept(self, meta: Meta, now: float) -> bool:
        """Whether a stored answer of this age will do."""
        # Ages are whole seconds, but 0 allows no stored answer, not even one of this second.
        if self.max_age_s is not None and (self.max_age_s == 0 or age_s(meta, now) > self.max_age_s):
            return False
        return self.min_fresh_s is None or remaining_s(meta, now) >= self.min_fresh_s


def _seconds(value: str, otherwise: int) -> int:
    return int(value[:18]) if value.isascii() and value.isdigit() else otherwise


NO_DIRECTIVES = Directives()


def age_s(meta: Meta, now: float) -> int:
    """Whole seconds since the answer was written; clocks of two replicas may differ, so never negative."""
    return max(0, int(now - meta.written_at))


def remaining_s(meta: Meta, now: float) -> int:
    """Whole seconds for which the answer stays fresh."""
    return math.floor(meta.written_at + meta.ttl_s - now)


@dataclass(frozen=True, slots=True)
class StoreRules:
    """What the configuration lets be stored."""

    finish_reasons: frozenset[str]
    max_recording_bytes: int

    def why_not(self, *, reasons: Mapping[int, str], choices: int, size_bytes: int, limits_tokens: bool) -> str | None:
        """A word for why an ended stream must not be stored; None if it may.

        ``reasons`` are the finish reasons by choice. Only a proven-complete answer is stored: ``[DONE]`` proves nothing.
        """
        if size_bytes > self.max_recording_bytes:
            return "too-large"
        if any(index not in reasons for index in range(choices)):
            return "incomplete"
        for reason in reasons.values():
            if reason not in self.finish_reasons or (reason == "length" and not limits_tokens) or reason == "content_filter":
                return "finish-reason"
        return None


class Disposition(NamedTuple):
    """What was done for a request. ``detail`` says why, in one token; ages are whole seconds."""

    kind: DispositionKind
    detail: str = ""
    age_s: int = 0
    ttl_s: int = 0
    fwd: Literal["miss", "request", "bypass", "stale"] = "miss"

    def cache_status(self, status: int | None = None) -> str:
        """The value of ``Cache-Status``; ``status`` is what the upstream answered, where that is known."""
        if self.kind == "hit":
            parts = [_NAME, "hit", f"ttl={self.ttl_s}"]
        else:
            parts = [_NAME, f"fwd={self.fwd}"]
            if status:
                parts.append(f"fwd-status={status}")
            if self.kind == "collapsed":
                parts.append("collapsed")
        if self.detail:
            parts.append(f"detail={self.detail}")
        return "; ".join(parts)


NOT_FORWARDED = f"{_NAME}; detail=local"
"""``Cache-Status`` of what the gateway answers of its own."""

"""What may be read, what may be stored, and how to say which it was (RFC 9111, RFC 9211)."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import orjson

from gateway.core.faults import Fault
from gateway.core.recording import Meta

_NAME = "gateway"

# A comma inside a quoted argument separates nothing.
_DIRECTIVE = re.compile(r'([^\s,="]+)(?:\s*=\s*("(?:[^"\\]|\\.)*"|[^\s,]*))?')
_FOREVER_S = 1 << 62
_LONGEST_DIGITS = 18
_MAX_KNOWN_MODELS = 4096

DispositionKind = Literal["hit", "miss", "collapsed", "bypass", "stale"]


@dataclass(frozen=True, slots=True)
class Directives:
    """The caller's ``Cache-Control`` (RFC 9111 5.2.1, RFC 5861 4). Ages are whole seconds."""

    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    max_age_s: int | None = None
    min_fresh_s: int | None = None
    max_stale_s: int | None = None
    stale_if_error_s: int | None = None

    @classmethod
    def parse(cls, header: str) -> "Directives":
        """Unknown directives are ignored, of one that comes twice the first holds, and a number that is none allows nothing
        (RFC 9111 4.2.1).
        """
        found: dict[str, str | None] = {}
        for directive in _DIRECTIVE.finditer(header):
            name, value = directive.groups()
            found.setdefault(name.lower(), value and value.strip('"'))
        return cls(
            no_cache="no-cache" in found,
            no_store="no-store" in found,
            only_if_cached="only-if-cached" in found,
            max_age_s=_seconds(found, "max-age", 0),
            min_fresh_s=_seconds(found, "min-fresh", _FOREVER_S),
            # Without a number, however stale it is.
            max_stale_s=_FOREVER_S if found.get("max-stale", "") is None else _seconds(found, "max-stale", 0),
            stale_if_error_s=_seconds(found, "stale-if-error", 0),
        )

    def refusal(self, meta: Meta, now: float, stale_s: float = 0.0) -> str:
        """A word for why a stored answer will not do; empty if it will.

        ``stale_s`` is for how long a stale one will do where the caller does not say: who names a ``max-age`` or a
        ``min-fresh`` without ``max-stale`` does not wish for a stale one (RFC 9111 5.2.1.1).
        """
        # Ages are whole seconds, but 0 allows no stored answer, not even one of this second.
        if self.max_age_s is not None and (self.max_age_s == 0 or age_s(meta, now) > self.max_age_s):
            return "max-age"
        if self.min_fresh_s is not None and remaining_s(meta, now) < self.min_fresh_s:
            return "min-fresh"
        allowed_s: float = stale_s if self.max_age_s is None and self.min_fresh_s is None else 0.0
        if self.max_stale_s is not None:
            allowed_s = self.max_stale_s
        if staleness_s(meta, now) <= allowed_s:
            return ""
        return "stale" if self.max_stale_s is None else "max-stale"

    def error_window_s(self, stale_if_error_s: float) -> float:
        """How stale an answer may be that stands in for an error; the caller's word holds before the configuration's."""
        if self.stale_if_error_s is not None:
            return self.stale_if_error_s
        if self.max_age_s is not None or self.min_fresh_s is not None:
            return 0.0
        return stale_if_error_s


def _seconds(found: Mapping[str, str | None], name: str, otherwise: int) -> int | None:
    """None where it is not said."""
    if name not in found:
        return None
    value = found[name] or ""
    return int(value[:_LONGEST_DIGITS]) if value.isascii() and value.isdigit() else otherwise


NO_DIRECTIVES = Directives()


def age_s(meta: Meta, now: float) -> int:
    """Whole seconds since the answer was written; clocks of two replicas may differ, so never negative."""
    return max(0, int(now - meta.written_at))


def remaining_s(meta: Meta, now: float) -> int:
    """Whole seconds for which the answer stays fresh; negative where it is stale."""
    return math.floor(meta.written_at + meta.ttl_s - now)


def staleness_s(meta: Meta, now: float) -> float:
    """Seconds for which the answer has been stale; negative as long as it is fresh."""
    return now - meta.written_at - meta.ttl_s


@dataclass(frozen=True, slots=True)
class ModelRules:
    """What the configuration says of the answers of one model."""

    enabled: bool = True
    ttl_s: float = 86_400.0
    stale_s: float = 0.0
    """For how long a stale answer is served while a fresh one is fetched (RFC 5861 3)."""
    stale_if_error_s: float = 0.0
    """For how long a stale answer may stand in for an upstream's failure (RFC 5861 4)."""
    max_recording_bytes: int = 8_388_608
    finish_reasons: frozenset[str] = frozenset({"stop", "tool_calls", "function_call", "length"})
    store_sampled: bool = True
    """Whether answers are kept that were drawn above ``sampled_temperature`` without a seed."""
    sampled_temperature: float = 0.0
    store_live_data: bool = False
    samples: int = 1
    """How many answers of one question are kept."""
    input_usd_per_million: float | None = None
    output_usd_per_million: float | None = None
    connect_timeout_s: float | None = None
    """This and the next three: None where the model has none of its own."""
    first_byte_timeout_s: float | None = None
    idle_timeout_s: float | None = None
    total_timeout_s: float | None = None
    retries: int = 2
    """How many times a call may be made again before its first token."""
    fallbacks: tuple[str, ...] = ()
    """The models that answer where this one cannot, in order; ``upstream/model`` names one of a certain upstream."""
    faults: tuple[Fault, ...] = ()
    """What goes wrong with its answers, and how often, to see how callers take it."""

    @property
    def kept_stale_s(self) -> float:
        """For how long an answer is kept when it is no longer fresh."""
        return max(self.stale_s, self.stale_if_error_s)

    def why_not_ask(self, body: Mapping[str, Any]) -> str:
        """A word for why the answer to this request is neither read from the cache nor stored; empty if it may be."""
        if not self.enabled:
            return "disabled"
        if not self.store_live_data and _asks_for_live_data(body):
            return "live-data"
        if not self.store_sampled and _is_sampled(body, self.sampled_temperature):
            return "sampled"
        return ""

    def why_not_keep(self, *, reasons: Mapping[int, str], choices: int, size_bytes: int, limits_tokens: bool) -> str:
        """A word for why an ended stream must not be stored; empty if it may.

        ``reasons`` are the finish reasons by choice. Only a proven-complete answer is stored: ``[DONE]`` proves nothing.
        """
        if size_bytes > self.max_recording_bytes:
            return "too-large"
        if any(index not in reasons for index in range(choices)):
            return "incomplete"
        for reason in reasons.values():
            if reason not in self.finish_reasons or (reason == "length" and not limits_tokens) or reason == "content_filter":
                return "finish-reason"
        return ""


_LIVE_DATA = ("web_search_options", "search_parameters")
"""Members by which OpenAI's and xAI's models are told to look things up."""


def _asks_for_live_data(body: Mapping[str, Any]) -> bool:
    if any(body.get(name) is not None for name in _LIVE_DATA):
        return True
    tools = body.get("tools")
    # Zhipu, Mistral and others take the search as a tool.
    return isinstance(tools, list) and any(
        isinstance(tool, dict) and str(tool.get("type")).startswith("web_search") for tool in tools
    )


def _is_sampled(body: Mapping[str, Any], above: float) -> bool:
    if body.get("seed") is not None:
        return False
    temperature = body.get("temperature")
    if not isinstance(temperature, int | float) or isinstance(temperature, bool):
        temperature = 1.0  # what OpenAI's API takes where nothing is said
    return temperature > above


def has_broken_arguments(answer: bytes) -> bool:
    """Whether a tool call of an assembled answer has arguments that are not JSON, so that nobody can run it."""
    if b'"arguments"' not in answer:
        return False
    return any(
        isinstance(arguments, str) and not _is_json(arguments)
        for choice in orjson.loads(answer).get("choices", ())
        for arguments in _arguments(choice.get("message"))
    )


def _arguments(message: Any) -> list[Any]:
    if not isinstance(message, dict):
        return []
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    functions.append(message.get("function_call"))
    return [function.get("arguments") for function in functions if isinstance(function, dict)]


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


class RuleBook:
    """The rules by model: of those ``(patterns, rules)`` whose patterns fit, the first that has a rule holds."""

    def __init__(self, default: ModelRules, models: Sequence[tuple[Sequence[str], Mapping[str, Any]]] = ()) -> None:
        self._default = default
        self._models = models
        self._known: dict[tuple[str, ...], ModelRules] = {}

    def become(self, other: "RuleBook") -> None:
        """From now on says what the other one says."""
        vars(self).update(vars(other))

    def of(self, *names: str) -> ModelRules:
        """The rules of a model by any of its names."""
        rules = self._known.get(names)
        if rules is None:
            if len(self._known) >= _MAX_KNOWN_MODELS:
                self._known.clear()
            rules = self._known[names] = self._found(names)
        return rules

    def _found(self, names: tuple[str, ...]) -> ModelRules:
        found: dict[str, Any] = {}
        known = {field.name for field in fields(ModelRules)}
        for patterns, rules in self._models:
            if any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
                found = {name: value for name, value in rules.items() if value is not None and name in known} | found
        return replace(self._default, **found)


class Disposition(NamedTuple):
    """What was done for a request. ``detail`` says why, in one token; ages are whole seconds.

    ``stale`` is a stale answer in the place of an upstream's failure; one that is served while a fresh one is fetched is a
    hit with a negative ``ttl_s``.
    """

    kind: DispositionKind
    detail: str = ""
    age_s: int = 0
    ttl_s: int = 0
    fwd: Literal["miss", "request", "bypass", "stale"] = "miss"
    stored: bool = False
    """Whether it is known that the answer was stored."""
    status: int = 0
    """What the upstream answered, where that is known."""

    @property
    def is_replay(self) -> bool:
        """Whether a stored answer is given."""
        return self.kind in ("hit", "stale")

    def cache_status(self) -> str:
        """The value of ``Cache-Status`` (RFC 9211)."""
        if self.kind == "hit":
            parts = [_NAME, "hit", f"ttl={self.ttl_s}"]
        else:
            parts = [_NAME, f"fwd={self.fwd}"]
            if self.status:
                parts.append(f"fwd-status={self.status}")
            if self.kind == "stale":
                parts.append(f"ttl={self.ttl_s}")
            if self.kind == "collapsed":
                parts.append("collapsed")
            if self.stored:
                parts.append("stored")
        if self.detail:
            parts.append(f"detail={self.detail}")
        return "; ".join(parts)


def only_detail(word: str) -> str:
    """``Cache-Status`` of what was neither a hit nor forwarded."""
    return f"{_NAME}; detail={word}"


NOT_FORWARDED = only_detail("local")
"""``Cache-Status`` of what the gateway answers of its own."""

"""Plausible values that fit a JSON schema: the arguments of a simulated tool call, or a structured answer."""

import math
import random
import re
from typing import Any, TypeGuard

import orjson

from gateway.upstreams.chunks import Json
from gateway.upstreams.prose import THINGS, quote

# A caller writes the schema, so what grows with it is bounded.
_MAX_STEPS = 1000
_MAX_DEPTH = 16
_MAX_ITEMS = 32
_MAX_STRING_CHARS = 4096
_LEAST_STEP = 1e-6
_TOO_LARGE = 1e15


class Example:
    """A value that fits a JSON schema, as far as the schemas of tools usually go; ``topic`` is what texts are about."""

    def __init__(self, schema: Any, rng: random.Random, topic: str) -> None:
        self._root = schema if isinstance(schema, dict) else {"type": "object"}
        self._rng = rng
        self._topic = quote(topic)
        self._left = _MAX_STEPS

    def json(self) -> str:
        return orjson.dumps(self._value(self._root, "", 0)).decode()

    def _value(self, schema: Any, name: str, depth: int) -> Any:
        schema = self._resolved(schema, _MAX_DEPTH)
        for member in ("const", "default"):
            if member in schema:
                return schema[member]
        for member in ("enum", "examples"):
            if isinstance(schema.get(member), list) and schema[member]:
                return self._rng.choice(schema[member])
        return self._of_type(schema, name, depth)

    def _of_type(self, schema: Json, name: str, depth: int) -> Any:
        match kind := _type_of(schema):
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, name, depth)
            case "integer" | "number":
                return self._number(schema, whole=kind == "integer")
            case "boolean":
                return self._rng.random() < 0.5
            case "null":
                return None
        return self._string(schema, name)

    def _resolved(self, schema: Any, hops: int) -> Json:
        """``schema`` with its references and combinations replaced by one schema that satisfies them."""
        self._left -= 1
        if not isinstance(schema, dict) or hops == 0 or self._left < 0:
            return {}
        if isinstance(schema.get("$ref"), str):
            rest = {name: value for name, value in schema.items() if name != "$ref"}
            return self._resolved(self._referred(schema["$ref"]), hops - 1) | rest
        for name in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(name), list) and branches:
                # Null is allowed there, but says nothing worth looking at.
                branch = next((item for item in branches if not _is_null(item)), branches[0])
                rest = {member: value for member, value in schema.items() if member != name}
                return self._resolved(rest, hops - 1) | self._resolved(branch, hops - 1)
        if isinstance(parts := schema.get("allOf"), list):
            rest = {member: value for member, value in schema.items() if member != "allOf"}
            return _all_of([rest, *(self._resolved(part, hops - 1) for part in parts)])
        return schema

    def _referred(self, reference: str) -> Any:
        found: Any = self._root
        for step in reference.removeprefix("#").split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, dict) else None
        return found

    def _object(self, schema: Json, depth: int) -> Json:
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        required = schema.get("required")
        names = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
        names = names or list(properties)
        return {name: self._value(properties.get(name), name, depth + 1) for name in names if self._may_grow(depth)}

    def _array(self, schema: Json, name: str, depth: int) -> list[Any]:
        most = _whole(schema.get("maxItems"), _MAX_ITEMS)
        count = min(max(1, _whole(schema.get("minItems"), 1)), most, _MAX_ITEMS)
        return [self._value(schema.get("items"), name, depth + 1) for _ in range(count) if self._may_grow(depth)]

    def _may_grow(self, depth: int) -> bool:
        return self._left > 0 and depth < _MAX_DEPTH

    def _number(self, schema: Json, *, whole: bool) -> float:
        low, high = _bounds(schema, whole=whole)
        step = schema.get("multipleOf")
        if _is_number(step) and step > _LEAST_STEP:
            return math.ceil(low / step) * step
        if whole:
            return self._rng.randint(math.ceil(low), max(math.ceil(low), math.floor(high)))
        exact = low + (high - low) * self._rng.uniform(0.25, 0.75)
        return rounded if low < (rounded := round(exact, 2)) < high else exact

    def _string(self, schema: Json, name: str) -> str:
        text = _FORMATS.get(str(schema.get("format"))) or _hint(name) or self._topic or self._rng.choice(THINGS)
        least = min(_whole(schema.get("minLength"), 0), _MAX_STRING_CHARS)
        if len(text) < least:
            text = (text + " ") * (least // (len(text) + 1) + 1)
            text = text[:least]
        return text[: _whole(schema.get("maxLength"), len(text))]


def _type_of(schema: Json) -> Any:
    kind = schema.get("type")
    if isinstance(kind, list):
        return next((item for item in kind if item != "null"), "null")
    return kind or ("object" if "properties" in schema else "array" if "items" in schema else "string")


def _is_null(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "null"


def _all_of(parts: list[Json]) -> Json:
    merged: Json = {}
    for part in parts:
        for name, value in part.items():
            old = merged.get(name)
            if name == "properties" and isinstance(old, dict) and isinstance(value, dict):
                merged[name] = old | value
            elif name == "required" and isinstance(old, list) and isinstance(value, list):
                merged[name] = [*old, *value]
            else:
                merged[name] = value
    return merged


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TOO_LARGE


def _whole(value: Any, otherwise: int) -> int:
    return max(0, int(value)) if _is_number(value) else otherwise


def _bounds(schema: Json, *, whole: bool) -> tuple[float, float]:
    """The least and the greatest number allowed; where one is open, it lies a little beyond the other."""
    beyond = 1 if whole else 0
    lows = [schema.get("minimum"), _moved(schema.get("exclusiveMinimum"), beyond)]
    highs = [schema.get("maximum"), _moved(schema.get("exclusiveMaximum"), -beyond)]
    low = max((value for value in lows if _is_number(value)), default=None)
    high = min((value for value in highs if _is_number(value)), default=None)
    if low is None:
        low = 1 if high is None or high > 1 else high - 9
    return low, low + 9 if high is None else high


def _moved(value: Any, by: int) -> Any:
    return value + by if _is_number(value) else None


def _hint(name: str) -> str | None:
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    return next((_HINTS[word] for word in words if word in _HINTS), None)


_FORMATS = {
    "date": "2026-06-21", "date-time": "2026-06-21T12:00:00Z", "time": "12:00:00Z", "duration": "PT15M",
    "email": "ada@example.org", "hostname": "example.org", "ipv4": "192.0.2.1", "ipv6": "2001:db8::1",
    "uri": "https://example.org/", "uuid": "6f1c9a52-3b0e-4d7a-9c46-2f5e8d1b7a30",
}  # fmt: skip
_HINTS = {
    "city": "Lisbon", "location": "Lisbon", "place": "Lisbon", "country": "Portugal", "street": "Rua Augusta",
    "address": "Rua Augusta 24, Lisbon", "name": "Ada Lovelace", "author": "Ada Lovelace", "email": "ada@example.org",
    "url": "https://example.org/", "date": "2026-06-21", "time": "12:00", "day": "Sunday", "language": "en",
    "currency": "EUR", "color": "teal", "colour": "teal", "unit": "celsius", "id": "a-1024", "path": "notes/today.md",
    "title": "A Stream Is a Log",
}  # fmt: skip

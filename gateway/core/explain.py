"""Why a request missed: what of it is not in its key, and how it differs from the one that was nearest."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import orjson

from gateway.core.apis.base import Api, Json
from gateway.core.key import without_path

_MAX_LEFT_OUT = 200
_MAX_DIFFERING = 1000
_EXCERPT_CHARS = 40
_VALUE_CHARS = 200
_CHUNK = 64
_WIDE_LEVELS = 8  # where requests have long lists; each level down to there may be written once more
_ABSENT = object()
_CONTAINERS = frozenset({dict, list})

K = TypeVar("K")
_Place = tuple[str, ...]
_Path = tuple[Any, str] | None
"""A name behind its parent's path, since most that are looked at are never shown."""
_Pair = tuple[_Path, Any, Any]
_NO_PAIR: _Pair = (None, _ABSENT, _ABSENT)

Kind = Literal["value", "text", "order", "only-ours", "only-theirs"]


# What is not in the key


def left_out(api: Api, body: Json, ignored: Iterable[str]) -> list[str]:
    """The dotted paths of a validated request that are not in its key: sorted, at most 200, none below another one.

    ``ignored`` are the configuration's paths, as `canonical_text` takes them. The model is in the key by its route.
    """
    places: set[_Place] = set()
    rest = body
    for path in ignored:
        names = path.split(".")
        places.update(_fitting(body, names, places))
        rest = without_path(rest, names)
    places.update(_dropped(body, api.canonical(rest), places))
    places.discard(("model",))
    topmost = (place for place in places if not any(place[:end] in places for end in range(1, len(place))))
    return sorted(".".join(place) for place in topmost)[:_MAX_LEFT_OUT]


def _fitting(body: Json, names: Sequence[str], gone: set[_Place]) -> list[_Place]:
    """What `without_path` takes away where ``gone`` is away already: positions count what is left."""
    found: list[tuple[_Place, Any]] = [((), body)]
    for name in names:
        found = [child for place, value in found for child in _children(value, place, name, gone)]
    return [place for place, _ in found]


def _children(value: Any, place: _Place, name: str, gone: set[_Place]) -> Iterator[tuple[_Place, Any]]:
    for position, (child, item) in enumerate(_left(value, place, gone)):
        position_fits = isinstance(value, list) and name.isdecimal() and int(name) == position
        if name == "*" or position_fits or (isinstance(value, dict) and name == child[-1]):
            yield child, item


def _left(value: Any, place: _Place, gone: set[_Place]) -> list[tuple[_Place, Any]]:
    """The members or items of a value, each with its place in the request, without what is ``gone``."""
    named: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        named = value.items()
    elif isinstance(value, list):
        named = enumerate(value)
    return [(child, item) for name, item in named if (child := (*place, str(name))) not in gone]


def _dropped(body: Json, canonical: Json, gone: set[_Place]) -> Iterator[_Place]:
    """What stands in ``body``, is not ``gone`` and has no counterpart in the canonical form."""
    pairs: list[tuple[_Place, Any, Any]] = [((), body, canonical)]
    while pairs:
        place, sent, kept = pairs.pop()
        if sent is kept or type(sent) is not type(kept):
            continue
        left = _left(sent, place, gone)
        if isinstance(sent, list):
            pairs.extend((child, item, twin) for (child, item), twin in zip(left, kept, strict=True))
            continue
        for child, item in left:
            if child[-1] in kept:
                pairs.append((child, item, kept[child[-1]]))
            else:
                yield child


# How two requests differ


class Difference(NamedTuple):
    """One place where two requests differ.

    ``kind`` says how: in a ``value``, in a ``text``, in the ``order`` of an object's members, or because only one of them
    has something there (the other value is None then). What is long is shown as an excerpt of its (JSON) text. ``at``
    is the first character that differs in a ``text``, and the first name that does in an ``order``: what is shown of the
    texts is what stands around it, of the names what comes from there on.
    """

    path: str
    kind: Kind
    ours: Any
    theirs: Any
    at: int | None = None


class Nearest(NamedTuple, Generic[K]):
    """The candidate with the fewest differing leaves: how many (at most 1000 are counted), and the first of them."""

    candidate: K
    differing: int
    first: Difference | None
    """None where nothing differs."""


class _Raw(NamedTuple):
    """A difference before it is shown."""

    path: _Path
    ours: Any
    theirs: Any
    order_at: int | None = None
    """Where the names of an object's members, which the others are then, are in another order."""


class _Further(list[Any]):
    """The items that only one of two lists has."""


def differences(ours: bytes, theirs: bytes) -> Iterator[Difference]:
    """Where two canonical JSON texts differ, lazily, in the order of ours; what only theirs has in an object comes last.

    None if and only if the texts are the same. Lists are compared by position; of what only one list has, its first item
    is told. Raises `ValueError` where a text is not JSON.
    """
    return map(_shown, _walk(orjson.loads(ours), orjson.loads(theirs)))


def nearest(ours: bytes, candidates: Iterable[tuple[K, bytes]]) -> Nearest[K] | None:
    """The canonical text that differs least from ours; None where there is no candidate.

    Of several it is the one whose first differing text has most in common with ours, else the first. Raises `ValueError`
    where a text is not JSON.
    """
    parsed = orjson.loads(ours)
    least, alike = _MAX_DIFFERING, -1
    found: tuple[K, _Raw | None] | None = None
    for candidate, theirs in candidates:
        differing, first = _distance(parsed, orjson.loads(theirs), min(least + 1, _MAX_DIFFERING))
        if differing <= least and (differing, -(in_common := _in_common(first))) < (least, -alike):
            found, least, alike = (candidate, first), differing, in_common
        if not least:
            break
    if found is None:
        return None
    candidate, first = found
    return Nearest(candidate, least, _shown(first) if first else None)


def _in_common(raw: _Raw | None) -> int:
    """How many characters two texts share at their beginnings and ends."""
    if raw is None or not (isinstance(raw.ours, str) and isinstance(raw.theirs, str)):
        return 0
    at = _first_difference(raw.ours, raw.theirs)
    return at + _first_difference(raw.ours[at:][::-1], raw.theirs[at:][::-1])


def _distance(ours: Any, theirs: Any, limit: int) -> tuple[int, _Raw | None]:
    """How many leaves differ, counted up to ``limit``, and the first difference."""
    differing, first = 0, None
    for raw in _walk(ours, theirs):
        first = first or raw
        differing += _weight(raw, limit)
        if differing >= limit:
            return limit, first
    return differing, first


def _weight(raw: _Raw, limit: int) -> int:
    if raw.order_at is not None:
        return 1
    return max(_leaves(raw.ours, limit), _leaves(raw.theirs, limit))


def _leaves(value: Any, limit: int) -> int:
    leaves, values = 0, [value]
    while values and leaves < limit:
        value = values.pop()
        if value and isinstance(value, dict):
            values.extend(value.values())
        elif value and isinstance(value, list):
            values.extend(value)
        else:
            leaves += 1
    return leaves


def _walk(ours: Any, theirs: Any) -> Iterator[_Raw]:
    """All differences in order, on a stack of its own: how deep a request may be is others' business."""
    levels: list[Iterator[_Pair]] = [iter([(None, ours, theirs)])]
    while levels:
        path, ours, theirs = next(levels[-1], _NO_PAIR)
        if ours is _ABSENT is theirs:
            levels.pop()
        elif type(ours) is type(theirs) is dict:
            yield from _other_order(path, ours, theirs)
            levels.append(_member_pairs(path, ours, theirs))
        elif type(ours) is type(theirs) is list:
            levels.append(_item_pairs(path, ours, theirs, by_text=len(levels) <= _WIDE_LEVELS))
        elif not _same(ours, theirs):
            yield _Raw(path, ours, theirs)


def _member_pairs(path: _Path, ours: Json, theirs: Json) -> Iterator[_Pair]:
    """The members that may differ."""
    for name, item in ours.items():
        other = theirs.get(name, _ABSENT)
        if item is not other and (type(item) in _CONTAINERS or not _same(item, other)):
            yield (path, name), item, other
    for name, other in theirs.items():
        if name not in ours:
            yield (path, name), _ABSENT, other


def _item_pairs(path: _Path, ours: list[Any], theirs: list[Any], *, by_text: bool) -> Iterator[_Pair]:
    """The items that may differ; ``by_text`` passes over the equal ones at the speed of writing them."""
    shared = min(len(ours), len(theirs))
    for start in range(0, shared, _CHUNK):
        some, others = ours[start : min(start + _CHUNK, shared)], theirs[start : min(start + _CHUNK, shared)]
        if by_text and len(some) == _CHUNK and (text := _text(some)) and text == _text(others):
            continue
        for position, (item, other) in enumerate(zip(some, others, strict=True), start):
            if item is not other and (type(item) in _CONTAINERS or not _same(item, other)):
                yield (path, str(position)), item, other
    if len(ours) > shared:
        yield (path, str(shared)), _Further(ours[shared:]), _ABSENT
    elif len(theirs) > shared:
        yield (path, str(shared)), _ABSENT, _Further(theirs[shared:])


def _text(value: Any) -> bytes | None:
    """The JSON text; None of what is nested more deeply than can be written."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return None


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two scalars have the same text: 1, 1.0 and true do not, nor do 0.0 and -0.0."""
    return type(ours) is type(theirs) and ours == theirs and (ours != 0 or repr(ours) == repr(theirs))


def _other_order(path: _Path, ours: Json, theirs: Json) -> Iterator[_Raw]:
    """The difference of two objects in the order of the members that both have, from where it begins."""
    if [*ours] == [*theirs]:
        return
    names = [name for name in ours if name in theirs]
    others = [name for name in theirs if name in ours]
    if names != others:
        at = next(at for at, (name, other) in enumerate(zip(names, others, strict=True)) if name != other)
        yield _Raw(path, names[at:], others[at:], at)


# How a difference is shown


def _shown(raw: _Raw) -> Difference:
    path, ours, theirs = _dotted(raw.path), raw.ours, raw.theirs
    if raw.order_at is not None:
        return Difference(path, "order", _shortened(ours), _shortened(theirs), raw.order_at)
    if theirs is _ABSENT:
        return Difference(path, "only-ours", _shortened(ours), None)
    if ours is _ABSENT:
        return Difference(path, "only-theirs", None, _shortened(theirs))
    if isinstance(ours, str) and isinstance(theirs, str):
        at = _first_difference(ours, theirs)
        return Difference(path, "text", _excerpt(ours, at), _excerpt(theirs, at), at)
    return Difference(path, "value", _shortened(ours), _shortened(theirs))


def _dotted(path: _Path) -> str:
    names = []
    while path:
        path, name = path
        names.append(name)
    return ".".join(reversed(names))


def _first_difference(ours: str, theirs: str) -> int:
    """By halves, since comparing slices is the work of memcmp."""
    same, end = 0, min(len(ours), len(theirs))
    while same < end:
        middle = (same + end + 1) // 2
        if ours[same:middle] == theirs[same:middle]:
            same = middle
        else:
            end = middle - 1
    return same


def _excerpt(text: str, at: int) -> str:
    """Some characters on both sides of the one at ``at``."""
    start, end = max(0, at - _EXCERPT_CHARS // 2), at + _EXCERPT_CHARS // 2
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


def _shortened(value: Any) -> Any:
    """The value itself, or the beginning of its text where that is long."""
    if type(value) is _Further:
        value = value[0]
    if isinstance(value, str):
        return value if len(value) <= _VALUE_CHARS else value[:_VALUE_CHARS] + "…"
    if (text := _text(value)) is None:
        return "…"
    return value if len(text) <= _VALUE_CHARS else text[:_VALUE_CHARS].decode(errors="ignore") + "…"

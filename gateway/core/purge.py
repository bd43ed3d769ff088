"""Which stored answers a purge is about. Pure."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import orjson


class Labels(NamedTuple):
    """What is known of an answer that is stored, or is still being made."""

    key: str
    model: str
    namespace: str = ""
    tags: tuple[str, ...] = ()
    flight: str = ""
    id: str = ""
    """The response's, as the upstream gave it."""
    sample_of: str = ""
    """The cache key of the question, where the answer is another sample than the first."""


class Selector(NamedTuple):
    """All that is set has to fit; ``model`` may be a pattern. Nothing set: everything."""

    key: str | None = None
    flight: str | None = None
    id: str | None = None
    namespace: str | None = None
    model: str | None = None
    tag: str | None = None

    def matches(self, labels: Labels) -> bool:
        """Whether the answer is one of those that are meant."""
        return (
            (self.key is None or self.key in (labels.key, labels.sample_of))
            and (self.flight is None or self.flight == labels.flight)
            and (self.id is None or self.id == labels.id)
            and (self.namespace is None or self.namespace == labels.namespace)
            and (self.model is None or fnmatchcase(labels.model, self.model))
            and (self.tag is None or self.tag in labels.tags)
        )


_NAMING = ("key", "flight", "id", "tag", "namespace")
"""What a selector may name exactly."""


class Purge(NamedTuple):
    """From ``at_us`` (Unix time) on, no answer may be served whose flight began by then and that ``selector`` means."""

    at_us: int
    selector: Selector

    def covers(self, labels: Labels, started_at: float) -> bool:
        """``started_at`` is when the answer's flight began, in Unix seconds."""
        return started_at * 1e6 <= self.at_us and self.selector.matches(labels)

    def dumps(self) -> bytes:
        """As JSON."""
        told = {name: value for name, value in self.selector._asdict().items() if value is not None}
        return orjson.dumps({"at_us": self.at_us, "selector": told})

    @classmethod
    def loads(cls, data: bytes) -> "Purge":
        """Raises `ValueError`."""
        try:
            told: Mapping[str, Any] = orjson.loads(data)
            selector = Selector(**told["selector"])
            if not all(value is None or isinstance(value, str) for value in selector):
                raise TypeError("a selector that is no string")  # noqa: TRY301  # as all else that is wrong
            return cls(int(told["at_us"]), selector)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a purge: {error!r}") from None


class Marks:
    """The purges that count. A replica may know thousands, and asks at every hit: they are found by what they name."""

    def __init__(self) -> None:
        self._all: set[Purge] = set()
        self._latest: dict[tuple[str, str], dict[Selector, int]] = {}
        """When each selector was marked last, by the first thing that it names exactly."""

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, purge: Purge) -> bool:
        """Whether it is a new one."""
        if purge in self._all:
            return False
        self._all.add(purge)
        self._place(purge)
        return True

    def cover(self, labels: Labels, started_at: float) -> bool:
        """As `Purge.covers`, of any of them."""
        began_us = started_at * 1e6
        return any(
            began_us <= at_us and selector.matches(labels)
            for named in _names_of(labels)
            if (found := self._latest.get(named))
            for selector, at_us in found.items()
        )

    def forget(self, before_us: float) -> None:
        """Those that were marked before."""
        if any(purge.at_us < before_us for purge in self._all):
            self._all = {purge for purge in self._all if purge.at_us >= before_us}
            self._latest.clear()
            for purge in self._all:
                self._place(purge)

    def _place(self, purge: Purge) -> None:
        found = self._latest.setdefault(_named_by(purge.selector), {})
        found[purge.selector] = max(purge.at_us, found.get(purge.selector, purge.at_us))


def _named_by(selector: Selector) -> tuple[str, str]:
    for name in _NAMING:
        if (value := getattr(selector, name)) is not None:
            return name, value
    return "", ""


def _names_of(labels: Labels) -> list[tuple[str, str]]:
    """What any selector that means it is found by."""
    tags = [("tag", tag) for tag in labels.tags]
    named = [("key", labels.key), ("key", labels.sample_of), ("flight", labels.flight), ("id", labels.id)]
    return [*named, *tags, ("namespace", labels.namespace), ("", "")]

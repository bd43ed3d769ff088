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

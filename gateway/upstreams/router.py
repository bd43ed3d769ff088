"""Which upstream serves a model: exact names and aliases first, then globs in the order of the file, then the default."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gateway.config import UpstreamConfig
from gateway.errors import ModelNotFound
from gateway.ports import Upstream


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: ``model`` is the upstream's own name for what the caller asked for."""

    upstream: Upstream
    model: str
    ignored_paths: tuple[str, ...] = ()


class Router:
    """The configured upstreams by the models that they serve."""

    def __init__(self, upstreams: Sequence[tuple[UpstreamConfig, Upstream]]) -> None:
        self.upstreams = tuple(upstream for _, upstream in upstreams)
        self.default: Upstream | None = None
        self._exact: dict[str, Route] = {}
        self._globs: list[tuple[str, Route]] = []
        self._default: Route | None = None
        for config, upstream in upstreams:
            self._add(config, upstream)

    def _add(self, config: UpstreamConfig, upstream: Upstream) -> None:
        paths = config.ignored_paths
        for alias, model in config.aliases.items():
            self._exact.setdefault(alias, Route(upstream, model, paths))
        for model in config.models:
            if is_glob(model):
                self._globs.append((model, Route(upstream, "", paths)))
            else:
                self._exact.setdefault(model, Route(upstream, model, paths))
        if config.default:
            self.default = upstream
            self._default = Route(upstream, "", paths)

    def become(self, other: "Router") -> None:
        """From now on routes as the other one: for all who hold this one, and at once."""
        vars(self).update(vars(other))

    def route(self, model: str) -> Route:
        """Raises `ModelNotFound`."""
        if found := self._exact.get(model):
            return found
        for pattern, route in self._globs:
            if fnmatchcase(model, pattern):
                return Route(route.upstream, model, route.ignored_paths)
        if self._default:
            return Route(self._default.upstream, model, self._default.ignored_paths)
        raise ModelNotFound(f"The model '{model}' does not exist or is not configured here.", param="model")

    def exact_models(self) -> Iterable[tuple[str, Upstream]]:
        """The models known by name, with their upstreams."""
        return ((model, route.upstream) for model, route in self._exact.items())

    def globs_of(self, upstream: Upstream) -> list[str]:
        """The patterns by which an upstream serves models; a default upstream serves all that it lists."""
        patterns = [pattern for pattern, route in self._globs if route.upstream is upstream]
        return ["*"] if upstream is self.default else patterns


def is_glob(model: str) -> bool:
    return any(char in model for char in "*?[")

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
    """The configured upstreams by the models that they serve. Those of one group are one upstream here."""

    def __init__(self, upstreams: Sequence[tuple[UpstreamConfig, Upstream]]) -> None:
        """In the order of the file: each entry with the upstream of its group."""
        self.upstreams = tuple(dict.fromkeys(upstream for _, upstream in upstreams))
        self.default: Upstream | None = None
        self.stand_in: Upstream | None = None
        """Who answers in replay mode what is not recorded."""
        self._exact: dict[str, Route] = {}
        self._globs: list[tuple[str, Upstream]] = []
        self._members: dict[str, list[UpstreamConfig]] = {}
        for config, upstream in upstreams:
            self._members.setdefault(upstream.name, []).append(config)
        for config, upstream in upstreams:
            self._add(config, upstream)

    def _add(self, config: UpstreamConfig, upstream: Upstream) -> None:
        for name in (*config.aliases, *(model for model in config.models if not is_glob(model))):
            if name not in self._exact:
                self._exact[name] = self._route(upstream, name)
        self._globs += [(model, upstream) for model in config.models if is_glob(model)]
        if config.default:
            self.default = upstream

    def _route(self, upstream: Upstream, name: str) -> Route:
        """The model is called as its deployments call it, or as callers do where these do not agree."""
        configs = self._members[upstream.name]
        if len(configs) == 1:
            return Route(upstream, configs[0].aliases.get(name, name), configs[0].ignored_paths)
        names = set(own_names(configs, name).values())
        return Route(upstream, names.pop() if len(names) == 1 else name, configs[0].ignored_paths)

    def become(self, other: "Router") -> None:
        """From now on routes as the other one: for all who hold this one, and at once."""
        vars(self).update(vars(other))

    def route(self, model: str) -> Route:
        """Raises `ModelNotFound`."""
        if found := self._exact.get(model):
            return found
        for pattern, upstream in self._globs:
            if fnmatchcase(model, pattern):
                return self._route(upstream, model)
        if self.default:
            return self._route(self.default, model)
        raise ModelNotFound(model)

    def fallback(self, name: str) -> Route:
        """What a name in ``fallbacks`` means: ``upstream/model``, or a model as callers call it. Raises `ModelNotFound`."""
        group, _, model = name.partition("/")
        for upstream in self.upstreams:
            if model and upstream.name == group:
                return self._route(upstream, model)
        return self.route(name)

    def exact_models(self) -> Iterable[tuple[str, Upstream]]:
        """The models known by name, with their upstreams."""
        return ((model, route.upstream) for model, route in self._exact.items())

    def globs_of(self, upstream: Upstream) -> list[str]:
        """The patterns by which an upstream serves models; a default upstream serves all that it lists."""
        patterns = [pattern for pattern, by in self._globs if by is upstream]
        return ["*"] if upstream is self.default else patterns


def own_names(configs: Sequence[UpstreamConfig], name: str) -> dict[str, str]:
    """The upstreams of a group that serve a model, each with its own name of it. Who names it does, else who is the default,
    else anybody.
    """
    named = {config.name: own for config in configs if (own := _own_name(config, name)) is not None}
    others = [config for config in configs if config.default] or configs
    return named or {config.name: name for config in others}


def _own_name(config: UpstreamConfig, name: str) -> str | None:
    if name in config.aliases:
        return config.aliases[name]
    known = name in config.aliases.values() or any(fnmatchcase(name, pattern) for pattern in config.models)
    return name if known else None


def is_glob(model: str) -> bool:
    return any(char in model for char in "*?[")

"""The configuration as a whole: its sections, and what must agree between them."""

from dataclasses import fields
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from gateway.config.sections import (
    AdminConfig,
    CacheConfig,
    EjectionConfig,
    FaultsConfig,
    FlightsConfig,
    LimitsConfig,
    LogConfig,
    MetricsConfig,
    ModelConfig,
    RedisConfig,
    ReplayConfig,
    RetriesConfig,
    ServerConfig,
)
from gateway.config.upstreams import UpstreamConfig, disagreements
from gateway.config.values import Section
from gateway.core.policy import ModelRules, RuleBook


class Config(Section):
    """All that can be configured, at its defaults."""

    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    redis: RedisConfig = RedisConfig()
    cache: CacheConfig = CacheConfig()
    flights: FlightsConfig = FlightsConfig()
    retries: RetriesConfig = RetriesConfig()
    ejection: EjectionConfig = EjectionConfig()
    replay: ReplayConfig = ReplayConfig()
    faults: FaultsConfig = FaultsConfig()
    admin: AdminConfig = AdminConfig()
    metrics: MetricsConfig = MetricsConfig()
    log: LogConfig = LogConfig()
    models: tuple[ModelConfig, ...] = ()
    upstreams: Annotated[tuple[UpstreamConfig, ...], Field(validate_default=True)] = ()

    @property
    def is_replay(self) -> bool:
        """Whether no upstream is ever asked."""
        return self.cache.mode == "replay"

    def rule_book(self) -> RuleBook:
        """The rules of ``[cache]`` and of ``[[models]]``."""
        names = {field.name for field in fields(ModelRules)}
        cached = {name: value for name, value in self.cache if name in names}
        enabled = self.cache.mode != "off"
        default = ModelRules(**cached, enabled=enabled, retries=self.retries.max_retries)
        models = [(model.names, model.as_rules(faults_allowed=self.faults.allowed)) for model in self.models]
        if not enabled:
            models = [(names, {**rules, "enabled": False}) for names, rules in models]
        return RuleBook(default, models)

    @field_validator("upstreams")
    @classmethod
    def _names_agree(cls, upstreams: tuple[UpstreamConfig, ...], info: ValidationInfo) -> tuple[UpstreamConfig, ...]:
        names = [upstream.name for upstream in upstreams]
        problems = [f"the name {name!r} is used twice" for name in sorted(set(names)) if names.count(name) > 1]
        if len({upstream.group_name for upstream in upstreams if upstream.default}) > 1:
            problems.append("only one can be the default")
        problems += disagreements(upstreams)
        server = info.data.get("server")
        if server and server.relay_upstream and server.relay_upstream not in names:
            problems.append(f"none is called {server.relay_upstream!r}, as server.relay_upstream says")
        if problems:
            raise ValueError("; ".join(problems))
        return upstreams

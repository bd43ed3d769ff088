"""``config.toml`` and the environment as one frozen object, or every problem at once with its dotted path.

Precedence: flags of ``gateway serve``, then ``GATEWAY_<SECTION>_<KEY>``, then the file, then the defaults of the sections.
No message and no ``repr`` shows a value that may hold a secret.
"""

from gateway.config.loading import DEFAULT_PATH, Loaded, load
from gateway.config.root import Config
from gateway.config.sections import AdminConfig, LimitsConfig, ModelConfig, RedisConfig, RetriesConfig, ServerConfig
from gateway.config.upstreams import (
    FALLBACK_UPSTREAM,
    LangChainUpstreamConfig,
    OpenAIUpstreamConfig,
    SimulatedUpstreamConfig,
    UpstreamConfig,
    read_corpus,
)

__all__ = [
    "DEFAULT_PATH",
    "FALLBACK_UPSTREAM",
    "AdminConfig",
    "Config",
    "LangChainUpstreamConfig",
    "LimitsConfig",
    "Loaded",
    "ModelConfig",
    "OpenAIUpstreamConfig",
    "RedisConfig",
    "RetriesConfig",
    "ServerConfig",
    "SimulatedUpstreamConfig",
    "UpstreamConfig",
    "load",
    "read_corpus",
]

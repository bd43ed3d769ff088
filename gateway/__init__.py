"""An LLM streaming gateway with a Redis cache."""

__version__ = "0.1.0"

"""The model that a configuration names: imported, and constructed from its arguments."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeGuard

from pydantic import ValidationError

from gateway.config import LangChainUpstreamConfig
from gateway.core.hiding import Hider
from gateway.errors import ConfigError
from gateway.upstreams.langchain.errors import foreign_errors, words

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel, BaseLLM

_INSTALL = "pip install 'llm-streaming-gateway[langchain]'"


def construct(config: LangChainUpstreamConfig, secrets: Mapping[str, str], hide: Hider) -> "BaseChatModel | BaseLLM":
    """Raises `ConfigError`."""
    at = f"upstreams.{config.name}"
    try:
        from langchain_core.language_models import BaseChatModel, BaseLLM  # noqa: PLC0415
    except ImportError:
        raise ConfigError([f"{at}.target: LangChain is not installed: {_INSTALL}"]) from None
    arguments = dict(config.arguments) | _secret_arguments(config, secrets)
    with warnings.catch_warnings():
        # The operator asked for this package, and its sunset is no news to every start of the gateway.
        warnings.filterwarnings("ignore", ".*langchain-community.*", DeprecationWarning)
        make = _target(config.target, f"{at}.target")
        if isinstance(make, type) and not issubclass(make, BaseChatModel | BaseLLM):
            raise ConfigError([f"{at}.target: {config.target} is not a chat model or LLM of LangChain"])
        with foreign_errors(lambda error: ConfigError(_refused_arguments(error, at, hide))):
            model = make(**arguments)
    if not isinstance(model, BaseChatModel | BaseLLM):
        raise ConfigError([f"{at}.target: {config.target} gives no chat model or LLM of LangChain"])
    return model


def _secret_arguments(config: LangChainUpstreamConfig, secrets: Mapping[str, str]) -> dict[str, str]:
    at = f"upstreams.{config.name}.arguments_env"
    if missing := {argument: name for argument, name in config.arguments_env.items() if name not in secrets}:
        raise ConfigError(
            [f"{at}.{argument}: the environment variable {name} is not set" for argument, name in missing.items()]
        )
    return {argument: secrets[name] for argument, name in (config.arguments_env | config.arguments_file).items()}


def _target(target: str, at: str) -> Callable[..., Any]:
    module_name, _, name = target.rpartition(".")
    module = _module(module_name, at)
    with foreign_errors(lambda error: ConfigError([f"{at}: {target} cannot be imported: {words(error)}"])):
        # Packages of LangChain import their classes only here, at the first access.
        make = getattr(module, name, None)
    if not callable(make):
        raise ConfigError([f"{at}: the module {module_name} has no class {name!r}"])
    return make  # type: ignore[no-any-return]  # whatever it is, it can be called


def _module(name: str, at: str) -> ModuleType:
    def refused(error: Exception) -> ConfigError:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing in ("langchain_core", "langchain_community"):
            return ConfigError([f"{at}: {missing} is not installed: {_INSTALL}"])
        if missing and f"{name}.".startswith(f"{missing}."):
            return ConfigError([f"{at}: there is no module {missing!r}: is its package installed?"])
        return ConfigError([f"{at}: {name} cannot be imported: {words(error)}"])

    with foreign_errors(refused):
        return importlib.import_module(name)


def _refused_arguments(error: Exception, at: str, hide: Hider) -> list[str]:
    """A line for each refused argument. Pydantic's own text would quote the values, and some are secrets."""
    if not isinstance(error, ValidationError):
        return [f"{at}.arguments: the model cannot be constructed: {type(error).__name__}: {words(error, hide)}"]
    details = error.errors(include_input=False, include_url=False, include_context=False)
    return [f"{'.'.join([at, 'arguments', *map(str, detail['loc'])])}: {words(detail['msg'], hide)}" for detail in details]


def is_chat(model: "BaseChatModel | BaseLLM") -> "TypeGuard[BaseChatModel]":
    from langchain_core.language_models import BaseChatModel  # noqa: PLC0415

    return isinstance(model, BaseChatModel)

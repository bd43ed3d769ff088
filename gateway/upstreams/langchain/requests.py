"""What a call asks, as LangChain takes it: inputs, tools, and what a caller may set beside them."""

import re
from typing import TYPE_CHECKING, Any

from gateway.core.apis import CHAT
from gateway.core.hiding import Hider
from gateway.errors import InvalidRequest
from gateway.ports import Call
from gateway.upstreams.chunks import Json, prompts_of
from gateway.upstreams.langchain.errors import foreign_errors, words
from gateway.upstreams.langchain.model import is_chat

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel, BaseLLM
    from langchain_core.messages import BaseMessage

# What the gateway itself understands, or what says nothing to a model.
_NOT_FOR_THE_MODEL = frozenset({
    "messages", "metadata", "model", "n", "prompt", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "stop", "store", "stream", "stream_options", "tool_choice", "tools", "user",
})  # fmt: skip
# Arguments of a call may override those of the construction: a caller who could say where a request goes, or by which
# client, could have the operator's own credential sent there.
_CONNECTION_WORDS = frozenset({
    "access", "api", "apikey", "auth", "authorization", "base", "baseurl", "callbacks", "cert", "client", "credential",
    "credentials", "endpoint", "extra", "fallbacks", "header", "headers", "host", "key", "password", "provider", "proxies",
    "proxy", "secret", "ssl", "uri", "url", "verify",
})  # fmt: skip
# LangChain's own arguments of `astream`, and of what it calls.
_LANGCHAIN_ARGUMENTS = frozenset({
    "config", "input", "ls_structured_output_format", "run_id", "run_manager", "self", "structured_output_format", "token",
})  # fmt: skip
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


def inputs_of(call: Call, model: "BaseChatModel | BaseLLM", hide: Hider) -> "list[list[BaseMessage] | str]":
    """One for each prompt. Raises `InvalidRequest`."""
    from langchain_core.messages import HumanMessage, get_buffer_string  # noqa: PLC0415  # see the package's docstring

    if call.api is CHAT:
        messages = _messages(call.body["messages"], hide)
        return [messages if is_chat(model) else get_buffer_string(messages)]
    prompts = [prompt for prompt in prompts_of(call.body) if isinstance(prompt, str)]
    if len(prompts) < len(prompts_of(call.body)):
        raise InvalidRequest("A LangChain model takes prompts as text, not as tokens.", param="prompt")
    return [[HumanMessage(prompt)] if is_chat(model) else prompt for prompt in prompts]


def _messages(messages: list[Json], hide: Hider) -> "list[BaseMessage]":
    from langchain_core.messages import convert_to_messages  # noqa: PLC0415

    def refused(error: Exception) -> InvalidRequest:
        return InvalidRequest(f"LangChain does not take these messages: {words(error, hide)}", param="messages")

    with foreign_errors(refused):
        # A message that only calls tools may come without content; LangChain wants the member there.
        return convert_to_messages([{"content": None, **message} for message in messages])


def with_tools(model: "BaseChatModel | BaseLLM", body: Json, hide: Hider) -> Any:
    """The model, able to call the request's tools. Raises `InvalidRequest`."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    # Not every model knows "none", but any model obeys it if it never hears of the tools.
    if not tools or choice == "none":
        return model

    def refused(error: Exception) -> InvalidRequest:
        reason = "it takes no tools" if isinstance(error, NotImplementedError) else words(error, hide)
        return InvalidRequest(f"The model {body['model']!r} cannot be given these tools: {reason}", param="tools")

    with foreign_errors(refused):
        if not is_chat(model):
            raise NotImplementedError
        return model.bind_tools(tools, **_tool_choice(choice))


def arguments_of(body: Json, dropped: tuple[str, ...]) -> Json:
    """What the model is called with beside its input. Raises `InvalidRequest`."""
    arguments = {name: value for name, value in body.items() if value is not None}
    for name in _NOT_FOR_THE_MODEL.union(dropped):
        arguments.pop(name, None)
    for name in arguments:
        if name in _LANGCHAIN_ARGUMENTS or not _CONNECTION_WORDS.isdisjoint(word.lower() for word in _WORD.findall(name)):
            raise InvalidRequest(f"The parameter {name!r} is not the caller's to set.", param=name)
    return arguments


def _tool_choice(choice: Any) -> Json:
    """OpenAI's ``tool_choice`` in the words that LangChain's models share: ``any``, or a tool's name."""
    if choice in (None, "auto"):
        return {}
    if choice == "required":
        return {"tool_choice": "any"}
    function = choice.get("function") if isinstance(choice, dict) else None
    return {"tool_choice": function["name"] if isinstance(function, dict) and "name" in function else choice}

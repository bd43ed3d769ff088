"""Any LangChain chat model, or LLM, as an upstream: named by import path, asked by ``astream``.

LangChain is imported when such an upstream is constructed, and never before: it costs half a second.
"""

import asyncio
import importlib
import re
import socket
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeGuard

import orjson
from pydantic import ValidationError

from gateway.config import LangChainUpstreamConfig
from gateway.core.apis import CHAT
from gateway.core.hiding import Hider, written_secrets
from gateway.errors import (
    ConfigError,
    GatewayError,
    InvalidRequest,
    PathNotFound,
    UpstreamBroke,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.ports import Answer, Call, Relayed
from gateway.upstreams.chunks import (
    DONE,
    ChunkWriter,
    Json,
    count_choices,
    fresh_id,
    model_objects,
    prompts_of,
    stop_sequences,
)

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel, BaseLLM
    from langchain_core.messages import BaseMessage

_MESSAGE_CHARS = 500
_INSTALL = "pip install 'llm-streaming-gateway[langchain]'"

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

_FINISH_REASONS = {
    "stop": {"complete", "completed", "end_turn", "eos", "eos_token", "finished", "stop", "stop_sequence"},
    "length": {"length", "max_length", "max_output_tokens", "max_tokens", "model_context_window_exceeded", "model_length"},
    "tool_calls": {"tool_call", "tool_calls", "tool_use"},
    "content_filter": {
        "blocklist", "content_filter", "content_filtered", "guardrail_intervened", "prohibited_content", "recitation",
        "refusal", "safety", "spii",
    },
}  # fmt: skip
_INPUT_DETAILS = {"cache_read": "cached_tokens", "cache_creation": "cache_write_tokens", "audio": "audio_tokens"}
_OUTPUT_DETAILS = {"reasoning": "reasoning_tokens", "audio": "audio_tokens"}
_OPENAI_REASON = {word: reason for reason, words in _FINISH_REASONS.items() for word in words}


class LangChainUpstream:
    """A LangChain model as an `Upstream`.

    Constructing it imports LangChain and constructs the model. Raises `ConfigError` with each problem on a line.
    """

    passes_credential = False

    def __init__(self, config: LangChainUpstreamConfig, secrets: Mapping[str, str]) -> None:
        self.name = config.name
        self._config = config
        self._hide = Hider([*secrets.values(), *written_secrets(config.arguments)])
        self._model = _construct(config, secrets, self._hide)

    @asynccontextmanager
    async def ask(self, call: Call) -> AsyncIterator[Answer]:
        """Enters when the first piece is there. Raises `InvalidRequest`, `UpstreamError`."""
        streams = self._streams(call)
        events: asyncio.Queue[_Event] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(stream, index, events)) for index, stream in enumerate(streams)]
        try:
            first = await events.get()
            if first.error:
                raise first.error
            async with aclosing(_batches(events, first, _Teller(call, len(streams)))) as batches:
                yield Answer({}, batches=batches)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def models(self, headers: Mapping[str, str]) -> list[Json]:  # noqa: ARG002  # the port's signature
        """Those that the configuration names exactly."""
        return model_objects(self._config.models, self.name)

    def relay(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],  # noqa: ARG002  # the port's signature
        body: AsyncIterator[bytes] | bytes | None,  # noqa: ARG002
    ) -> AbstractAsyncContextManager[Relayed]:
        """Raises `PathNotFound`: LangChain's models have no paths."""
        raise PathNotFound(f"{method} /v1/{path}: a LangChain model only serves chat/completions and completions.")

    async def close(self) -> None:
        """LangChain's models have no way to be closed."""

    def _streams(self, call: Call) -> list[AsyncGenerator[Any, None]]:
        """One stream for each choice, not yet running. Raises `InvalidRequest`."""
        count_choices(call)
        per_prompt = int(call.body.get("n") or 1)
        inputs = self._inputs(call)
        runnable = self._with_tools(call.body)
        stops = stop_sequences(call.body) or None
        arguments = _arguments(call.body, self._config.dropped_parameters)
        return [runnable.astream(given, stop=stops, **arguments) for given in inputs for _ in range(per_prompt)]

    def _inputs(self, call: Call) -> "list[list[BaseMessage] | str]":
        from langchain_core.messages import HumanMessage, get_buffer_string  # noqa: PLC0415  # see the module's docstring

        if call.api is CHAT:
            messages = self._messages(call.body["messages"])
            return [messages if _is_chat(self._model) else get_buffer_string(messages)]
        prompts = [prompt for prompt in prompts_of(call.body) if isinstance(prompt, str)]
        if len(prompts) < len(prompts_of(call.body)):
            raise InvalidRequest("A LangChain model takes prompts as text, not as tokens.", param="prompt")
        return [[HumanMessage(prompt)] if _is_chat(self._model) else prompt for prompt in prompts]

    def _messages(self, messages: list[Json]) -> "list[BaseMessage]":
        from langchain_core.messages import convert_to_messages  # noqa: PLC0415

        def refused(error: Exception) -> InvalidRequest:
            return InvalidRequest(f"LangChain does not take these messages: {_words(error, self._hide)}", param="messages")

        with _foreign_errors(refused):
            # A message that only calls tools may come without content; LangChain wants the member there.
            return convert_to_messages([{"content": None, **message} for message in messages])

    def _with_tools(self, body: Json) -> Any:
        """The model, able to call the request's tools. Raises `InvalidRequest`."""
        tools, choice = body.get("tools"), body.get("tool_choice")
        # Not every model knows "none", but any model obeys it if it never hears of the tools.
        if not tools or choice == "none":
            return self._model

        def refused(error: Exception) -> InvalidRequest:
            reason = "it takes no tools" if isinstance(error, NotImplementedError) else _words(error, self._hide)
            return InvalidRequest(f"The model {body['model']!r} cannot be given these tools: {reason}", param="tools")

        with _foreign_errors(refused):
            if not _is_chat(self._model):
                raise NotImplementedError
            return self._model.bind_tools(tools, **_tool_choice(choice))

    async def _pump(self, stream: AsyncGenerator[Any, None], index: int, events: "asyncio.Queue[_Event]") -> None:
        """Puts what comes into ``events``: pieces, then one end. The queue has no bound, as its reader never lags."""
        try:
            with _foreign_errors(self._failure):
                async with aclosing(stream) as pieces:
                    async for piece in pieces:
                        events.put_nowait(_Event(index, piece))
            events.put_nowait(_Event(index, ended=True))
        except GatewayError as error:
            events.put_nowait(_Event(index, error=error))
        except asyncio.CancelledError:
            # A library may cancel its own work, and then the reader must not wait for ever.
            events.put_nowait(_Event(index, error=UpstreamBroke("The model's stream was cancelled.")))
            raise

    def _failure(self, error: Exception) -> UpstreamError:
        message = f"{type(error).__name__}: {_words(error, self._hide)}"
        kinds = [kind.__name__ for kind in type(error).__mro__]
        # Each vendor brings its own client, so classes are known by name; a time-out is often a connection error too.
        if any("Timeout" in kind for kind in kinds):
            return UpstreamTimeout(message)
        if status := _status(error):
            content = {
                "error": {"message": message, "type": UpstreamRefused.type, "param": None, "code": UpstreamRefused.code}
            }
            return UpstreamRefused(status, orjson.dumps(content), "application/json", _retry_after(error))
        if isinstance(error, socket.gaierror) or any(kind.endswith(("ConnectionError", "ConnectError")) for kind in kinds):
            return UpstreamUnreachable(message)
        return UpstreamBroke(message)


@contextmanager
def _foreign_errors(as_ours: Callable[[Exception], Exception]) -> Iterator[None]:
    """Third-party errors leave as ours; ours leave as they are."""
    try:
        yield
    except (GatewayError, ConfigError):
        raise
    except Exception as error:  # noqa: BLE001  # a vendor's class may raise anything, and nothing of it may cross this file
        raise as_ours(error) from None


def _words(error: Exception | str, hide: Callable[[str], str] = str) -> str:
    """The error's own words, on one line, cut, and without what is to hide."""
    return hide(" ".join(str(error).split()))[:_MESSAGE_CHARS]


def _construct(config: LangChainUpstreamConfig, secrets: Mapping[str, str], hide: Hider) -> "BaseChatModel | BaseLLM":
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
        with _foreign_errors(lambda error: ConfigError(_refused_arguments(error, at, hide))):
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
    with _foreign_errors(lambda error: ConfigError([f"{at}: {target} cannot be imported: {_words(error)}"])):
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
        return ConfigError([f"{at}: {name} cannot be imported: {_words(error)}"])

    with _foreign_errors(refused):
        return importlib.import_module(name)


def _refused_arguments(error: Exception, at: str, hide: Hider) -> list[str]:
    """A line for each refused argument. Pydantic's own text would quote the values, and some are secrets."""
    if not isinstance(error, ValidationError):
        return [f"{at}.arguments: the model cannot be constructed: {type(error).__name__}: {_words(error, hide)}"]
    details = error.errors(include_input=False, include_url=False, include_context=False)
    return [f"{'.'.join([at, 'arguments', *map(str, detail['loc'])])}: {_words(detail['msg'], hide)}" for detail in details]


def _is_chat(model: "BaseChatModel | BaseLLM") -> "TypeGuard[BaseChatModel]":
    from langchain_core.language_models import BaseChatModel  # noqa: PLC0415

    return isinstance(model, BaseChatModel)


def _arguments(body: Json, dropped: tuple[str, ...]) -> Json:
    """What the model is called with beside its input. Raises `InvalidRequest`."""
    arguments = {name: value for name, value in body.items() if value is not None}
    for name in _NOT_FOR_THE_MODEL.union(dropped):
        arguments.pop(name, None)
    for name in arguments:
        words = {word.lower() for word in _WORD.findall(name)}
        if name in _LANGCHAIN_ARGUMENTS or words & _CONNECTION_WORDS:
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


def _status(error: Exception) -> int | None:
    """The HTTP status that the error carries, or that of the response that it carries."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status_code", "http_status", "status", "code"):
            status = getattr(holder, name, None)
            if isinstance(status, int) and 400 <= status <= 599:
                return int(status)
    return None


def _retry_after(error: Exception) -> dict[str, str]:
    headers = getattr(getattr(error, "response", None), "headers", None)
    value = headers.get("Retry-After") or headers.get("retry-after") if isinstance(headers, Mapping) else None
    return {"retry-after": str(value)} if value else {}


@dataclass(frozen=True, slots=True)
class _Event:
    """What one choice's stream has brought: a piece, its good end, or what it failed of."""

    index: int
    piece: Any = None
    ended: bool = False
    error: GatewayError | None = None


async def _batches(events: "asyncio.Queue[_Event]", first: _Event, teller: "_Teller") -> AsyncGenerator[list[bytes], None]:
    """The chunks of all choices as they come, each batch what had come by then. Raises `UpstreamError`."""
    waiting = [first]
    while True:
        batch: list[bytes] = []
        error = next((event.error for event in waiting if event.error), None)
        for event in waiting:
            if not event.error:
                batch += teller.tell(event)
        if batch:
            yield batch
        if error:
            raise error
        if teller.running == 0:
            return
        waiting = [await events.get()]
        while not events.empty():
            waiting.append(events.get_nowait())


class _Teller:
    """Tells LangChain's pieces in OpenAI's chunks."""

    def __init__(self, call: Call, choices: int) -> None:
        self.running = choices
        self._writer = ChunkWriter.fresh(call)
        self._chat = call.api is CHAT
        self._choices = [_Choice() for _ in range(choices)]
        self._usage: Json = {}

    def tell(self, event: _Event) -> list[bytes]:
        """Raises `UpstreamBroke`."""
        chunks = []
        try:
            for delta, logprobs in self._hear(event):
                chunks.append(self._writer.choice(event.index, self._said(delta), logprobs=logprobs))
        except orjson.JSONEncodeError as error:
            raise UpstreamBroke(f"The model's answer is not JSON: {error}") from None
        return chunks + self._end(event) if event.ended else chunks

    def _hear(self, event: _Event) -> Iterator[tuple[Json, Json | None]]:
        choice = self._choices[event.index]
        delta, logprobs = ({}, None) if event.ended else choice.hear(event.piece)
        _add_counts(self._usage, getattr(event.piece, "usage_metadata", None) or {})
        if self._chat and not choice.begun and (delta or event.ended):
            choice.begun = True
            # As OpenAI has it: an answer that begins with a call has no text, not an empty one.
            yield {"role": "assistant", "content": None if "tool_calls" in delta else ""}, None
        if delta:
            yield delta, logprobs

    def _said(self, delta: Json) -> Json:
        return {"delta": delta} if self._chat else {"text": delta.get("content", "")}

    def _end(self, event: _Event) -> list[bytes]:
        self.running -= 1
        reason = self._choices[event.index].finish_reason()
        chunks = [self._writer.choice(event.index, self._said({}), finish_reason=reason)]
        if self.running:
            return chunks
        return [*chunks, *([self._writer.usage(_usage(self._usage))] if self._usage else []), DONE]


class _Choice:
    """What is to be remembered of one choice while it grows."""

    def __init__(self) -> None:
        self.begun = False
        self._calls = _ToolCalls()
        self._reason: str | None = None

    def hear(self, piece: Any) -> tuple[Json, Json | None]:
        """The delta of one piece, and its log probabilities. A piece is a message, or an LLM's text."""
        if isinstance(piece, str):
            return ({"content": piece} if piece else {}), None
        metadata = piece.response_metadata
        for name in ("finish_reason", "stop_reason", "stopReason", "done_reason"):
            if reason := metadata.get(name):
                # Some vendors give an enumeration.
                self._reason = str(getattr(reason, "name", reason))
        delta = _spoken(piece)
        if calls := [self._calls.told(fragment) for fragment in _call_fragments(piece)]:
            delta["tool_calls"] = calls
        logprobs = metadata.get("logprobs")
        return delta, logprobs if isinstance(logprobs, dict) else None

    def finish_reason(self) -> str:
        """OpenAI's word for how it ended. A word that we do not know stays, so that nobody takes it for a good end."""
        reason = _OPENAI_REASON.get(self._reason.lower(), self._reason) if self._reason else "stop"
        return "tool_calls" if reason == "stop" and self._calls.count else reason


def _spoken(piece: Any) -> Json:
    """The texts of a message as members of a delta; those that say nothing are left out."""
    blocks = [piece.content] if isinstance(piece.content, str) else piece.content
    texts = {"content": "", "reasoning_content": "", "refusal": ""}
    for block in blocks:
        member, text = _block_text(block)
        texts[member] += text
    extra = piece.additional_kwargs
    for name in ("reasoning_content", "reasoning"):
        if isinstance(extra.get(name), str) and not texts["reasoning_content"]:
            texts["reasoning_content"] = extra[name]
    delta: Json = {member: text for member, text in texts.items() if text}
    return delta | ({"function_call": extra["function_call"]} if extra.get("function_call") else {})


def _block_text(block: Any) -> tuple[str, str]:
    """The member of a delta that a block of content belongs to, and its text; each vendor has its own blocks."""
    if isinstance(block, str):
        return "content", block
    kind = block.get("type")
    if kind in ("text", "output_text"):
        return "content", _string(block.get("text"))
    if kind == "refusal":
        return "refusal", _string(block.get("refusal"))
    if kind in ("reasoning", "thinking", "reasoning_content"):
        said = block.get(kind) or block.get("summary")
        parts = said if isinstance(said, list) else [said]
        return "reasoning_content", "".join(_string(part.get("text") if isinstance(part, dict) else part) for part in parts)
    return "content", ""


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _call_fragments(piece: Any) -> list[Json]:
    """Fragments of tool calls; where a model does not stream, its calls in one fragment each."""
    if fragments := getattr(piece, "tool_call_chunks", None):
        return list(fragments)
    calls = [*getattr(piece, "tool_calls", ()), *getattr(piece, "invalid_tool_calls", ())]
    return [
        call if isinstance(call["args"], str) else {**call, "args": orjson.dumps(call["args"]).decode()} for call in calls
    ]


@dataclass(slots=True)
class _ToolCall:
    """What a vendor has said of a call so far."""

    key: Any
    id: str
    name: str

    def continues(self, key: Any, call_id: str, name: str, *, last: bool) -> bool:
        """Whether a fragment belongs to this call."""
        if self.id and call_id:
            return self.id == call_id
        if key is None:
            return last and not name
        return bool(self.key == key and (not name or self.name in ("", name)))


class _ToolCalls:
    """The tool calls of one choice, numbered in the order in which they come.

    Vendors number them by content block, not at all, or all alike; OpenAI's clients need 0, 1, 2 ….
    """

    def __init__(self) -> None:
        self._known: list[_ToolCall] = []

    @property
    def count(self) -> int:
        return len(self._known)

    def told(self, fragment: Json) -> Json:
        """OpenAI's form of a fragment: id and name only where they are new."""
        key, call_id, name = fragment.get("index"), fragment.get("id") or "", fragment.get("name") or ""
        function = {"arguments": fragment.get("args") or ""}
        index = self._find(key, call_id, name)
        if index is None:
            self._known.append(_ToolCall(key, call_id, name))
            head = {"index": self.count - 1, "id": call_id or fresh_id("call_"), "type": "function"}
            return {**head, "function": {"name": name, **function}}
        call = self._known[index]
        if name and not call.name:
            call.name = function["name"] = name
        return {"index": index, "function": function}

    def _find(self, key: Any, call_id: str, name: str) -> int | None:
        for index in reversed(range(self.count)):
            if self._known[index].continues(key, call_id, name, last=index == self.count - 1):
                return index
        return None


def _add_counts(into: Json, counts: Mapping[str, Any]) -> None:
    for name, value in counts.items():
        if isinstance(value, Mapping):
            _add_counts(into.setdefault(name, {}), value)
        elif isinstance(value, int):
            into[name] = into.get(name, 0) + value


def _usage(counts: Json) -> Json:
    """LangChain's ``usage_metadata`` in OpenAI's words."""
    prompt, completion = counts.get("input_tokens", 0), counts.get("output_tokens", 0)
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": counts.get("total_tokens", prompt + completion),
    }
    for name, source, words in (
        ("prompt_tokens_details", "input_token_details", _INPUT_DETAILS),
        ("completion_tokens_details", "output_token_details", _OUTPUT_DETAILS),
    ):
        known = counts.get(source, {})
        if details := {words[word]: count for word, count in known.items() if word in words}:
            usage[name] = details
    return usage

"""Chat completions: ``POST /v1/chat/completions``."""

import base64
from collections.abc import Iterator
from typing import Any

from gateway.core.apis.base import (
    IGNORED_IN_MESSAGES,
    Api,
    Envelope,
    Json,
    RequestProblem,
    as_sent,
    canonical_members,
    check,
    check_common,
    keep_last,
    merge,
    normalise,
    numbered,
    one_or_many,
    split_answer,
    tokens,
)

_NUMBERS_AND_WORDS = (
    "frequency_penalty", "function_call", "logit_bias", "logprobs", "max_completion_tokens", "max_tokens",
    "modalities", "moderation", "n", "parallel_tool_calls", "prediction", "presence_penalty", "reasoning_effort",
    "seed", "temperature", "tool_choice", "top_logprobs", "top_p", "verbosity", "web_search_options", "audio",
)  # fmt: skip
_MESSAGE_MEMBERS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "function_call", "audio"})
_STREAMED_TEXTS = ("reasoning_content", "reasoning", "content", "refusal")


def _message(message: Any) -> Any:
    """A message's known members in canonical form; members that OpenAI does not know stay as they were sent."""
    if not isinstance(message, dict):
        return message
    return {
        name: normalise(message[name], IGNORED_IN_MESSAGES) if name in _MESSAGE_MEMBERS else message[name]
        for name in sorted(message)
        if name != IGNORED_IN_MESSAGES and (message[name] is not None or name not in _MESSAGE_MEMBERS)
    }


_NORMAL = {
    **dict.fromkeys(_NUMBERS_AND_WORDS, normalise),
    **dict.fromkeys(("tools", "functions", "response_format"), as_sent),
    "stop": one_or_many,
    "messages": lambda messages: [_message(message) for message in messages],
}


def _validate(body: Json) -> None:
    check_common(body)
    check(body, "messages", "an array of objects", lambda value: isinstance(value, list), required=True)
    for at, message in enumerate(body["messages"]):
        if not isinstance(message, dict):
            raise RequestProblem(f"Invalid type for 'messages[{at}]': expected an object.", f"messages[{at}]")


def _cannot_stream(body: Json) -> bool:
    audio = body.get("audio")
    if isinstance(audio, dict) and audio.get("format") not in (None, "pcm16"):
        return True
    tools = body.get("tools")
    return isinstance(tools, list) and any(isinstance(tool, dict) and tool.get("type") == "custom" for tool in tools)


class _Choice:
    """One choice as it grows."""

    def __init__(self) -> None:
        self.members: Json = {}
        self.message: Json = {}
        self.tool_calls: dict[int, Json] = {}
        self.audio_parts: list[str] = []

    def add(self, choice: Json) -> None:
        for name, value in choice.items():
            if name == "delta":
                self._add_delta(value if isinstance(value, dict) else {})
            elif name == "logprobs":
                merge(self.members, {name: value})
            elif name != "index":
                keep_last(self.members, name, value)

    def _add_delta(self, delta: Json) -> None:
        if delta.get("tool_calls"):
            self._add_tool_calls(delta.pop("tool_calls"))
        audio = delta.get("audio")
        if isinstance(audio, dict) and isinstance(data := audio.get("data"), str):
            self.audio_parts.append(data)
        self._take_parts(delta)
        merge(self.message, delta)

    def _take_parts(self, delta: Json) -> None:
        """Mistral's reasoning models send a list of parts while they think, then text: the answer is a list of parts."""
        content, more = self.message.get("content"), delta.get("content")
        if content and more and (isinstance(content, list) or isinstance(more, list)):
            self.message["content"] = _join_parts(_as_parts(content), _as_parts(delta.pop("content")))

    def _add_tool_calls(self, calls: Any) -> None:
        for place, call in numbered(calls):
            index = place if isinstance(call.pop("index", None), int) else self._unnumbered(call, place)
            merge(self.tool_calls.setdefault(index, {}), call)

    def _unnumbered(self, call: Json, place: int) -> int:
        """Where servers do not number their calls, a new id begins one, and a lone fragment goes on with the last."""
        last = max(self.tool_calls, default=-1)
        if call.get("id"):
            return next((index for index, old in self.tool_calls.items() if old.get("id") == call["id"]), last + 1)
        return place or max(last, 0)

    def body(self, index: int) -> Json:
        message = {"role": None, "content": None, **self.message}
        message["role"] = message["role"] or "assistant"
        if self.tool_calls:
            message["tool_calls"] = [self.tool_calls[at] for at in sorted(self.tool_calls)]
        if len(self.audio_parts) > 1 and isinstance(message.get("audio"), dict):
            message["audio"] = {**message["audio"], "data": _join_base64(self.audio_parts)}
        head = {"logprobs": self.members["logprobs"]} if "logprobs" in self.members else {}
        return {"index": index, "message": message, **head, "finish_reason": None, **self.members}


def _as_parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _join_parts(parts: list[Any], more: list[Any]) -> list[Any]:
    """Neighbours of one type are pieces of one part."""
    for part in more:
        if isinstance(part, dict) and isinstance(parts[-1], dict) and part.get("type") == parts[-1].get("type"):
            merge(parts[-1], part)
        else:
            parts.append(part)
    return parts


def _join_base64(parts: list[str]) -> str:
    """Padding inside a joined text would end it early, so padded parts are joined as bytes."""
    if not any(part.endswith("=") for part in parts[:-1]):
        return "".join(parts)
    try:
        return base64.b64encode(b"".join(base64.b64decode(part, validate=True) for part in parts)).decode()
    except ValueError:
        return "".join(parts)


class _Assembler:
    def __init__(self) -> None:
        self._envelope = Envelope("chat.completion")
        self._choices: dict[int, _Choice] = {}

    def add(self, chunk: Json) -> None:
        self._envelope.add(chunk)
        for index, choice in numbered(chunk.get("choices")):
            self._choices.setdefault(index, _Choice()).add(choice)

    def body(self) -> Json:
        return self._envelope.body([self._choices[index].body(index) for index in sorted(self._choices)])


def _split(body: Json) -> list[Json]:
    return split_answer(body, "chat.completion.chunk", _split_choice)


def _split_choice(index: int, choice: Json) -> Iterator[Json]:
    message: Json = {"role": "assistant", **(choice["message"] if isinstance(choice.get("message"), dict) else {})}
    calls = message.pop("tool_calls") if message.get("tool_calls") else ()
    texts = {name: message[name] for name in _STREAMED_TEXTS if isinstance(message.get(name), str)}
    by_token = _logprobs_by_token(texts.get("content"), choice.get("logprobs"))
    silent: Json = {"logprobs": None} if "logprobs" in choice else {}
    head = {"index": index, "delta": {}, **silent, "finish_reason": None}

    def part(delta: Json, **members: Any) -> Json:
        return {**head, "delta": delta, **members}

    yield part({**message, **dict.fromkeys(texts, "")})
    for name, text in texts.items():
        if name == "content" and by_token:
            for token, logprobs in by_token:
                yield part({name: token}, logprobs=logprobs)
        else:
            for token in tokens(text):
                yield part({name: token})
    for at, call in enumerate(calls if isinstance(calls, list) else ()):
        for fragment in _split_tool_call(call):
            yield part({"tool_calls": [{"index": at, **fragment}]})
    told = ("index", "message", "delta", "logprobs") if by_token else ("index", "message", "delta")
    yield {**head, **{name: value for name, value in choice.items() if name not in told}}


def _logprobs_by_token(text: str | None, logprobs: Any) -> list[tuple[str, Json]]:
    """Each token of ``text`` with its own log probabilities, where they are such that joining them loses nothing."""
    if not isinstance(logprobs, dict) or set(logprobs) - {"content", "refusal"} or logprobs.get("refusal") is not None:
        return []
    items = logprobs.get("content")
    if not items or not all(isinstance(item, dict) and isinstance(item.get("token"), str) for item in items):
        return []
    if "".join(item["token"] for item in items) != text:
        return []
    return [(item["token"], {**logprobs, "content": [item]}) for item in items]


def _split_tool_call(call: Any) -> Iterator[Json]:
    call = {name: value for name, value in call.items() if name != "index"} if isinstance(call, dict) else {}
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(arguments := function.get("arguments"), str):
        yield call
        return
    yield {**call, "function": {**function, "arguments": ""}}
    for token in tokens(arguments):
        yield {"function": {"arguments": token}}


CHAT = Api(
    name="chat",
    path="chat/completions",
    id_prefix="chatcmpl-",
    validate=_validate,
    canonical=lambda body: canonical_members(body, _NORMAL),
    choices=lambda body: int(body.get("n") or 1),
    limits_tokens=lambda body: body.get("max_tokens") is not None or body.get("max_completion_tokens") is not None,
    cannot_stream=_cannot_stream,
    assembler=_Assembler,
    split=_split,
)

"""Chat completions: ``POST /v1/chat/completions``."""

import base64
import binascii
from collections.abc import Iterator
from typing import Any

from gateway.core.apis.base import (
    Api,
    Envelope,
    Json,
    RequestProblem,
    as_sent,
    canonical_members,
    check,
    check_common,
    merge,
    normalise,
    one_or_many,
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
        name: normalise(value) if name in _MESSAGE_MEMBERS else value
        for name in sorted(message)
        if (value := message[name]) is not None or name not in _MESSAGE_MEMBERS
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
        delta = choice.get("delta")
        members = {name: value for name, value in choice.items() if name not in ("delta", "index")}
        merge(self.members, members)
        self.members.update((name, None) for name in members if name not in self.members)
        if isinstance(delta, dict):
            self._add_delta(dict(delta))

    def _add_delta(self, delta: Json) -> None:
        calls = delta.pop("tool_calls", None)
        for place, call in enumerate(calls if isinstance(calls, list) else ()):
            if isinstance(call, dict):
                self._add_tool_call(dict(call), place)
        audio = delta.get("audio")
        if isinstance(audio, dict) and isinstance(data := audio.get("data"), str):
            self.audio_parts.append(data)
        merge(self.message, delta)
        for name in delta:
            self.message.setdefault(name, None)

    def _add_tool_call(self, call: Json, place: int) -> None:
        index = call.pop("index", None)
        index = index if isinstance(index, int) else place
        merge(self.tool_calls.setdefault(index, {}), call)

    def body(self, index: int) -> Json:
        message = dict(self.message)
        ordered: Json = {"role": message.pop("role", None) or "assistant", "content": message.pop("content", None)}
        if self.tool_calls:
            # Some servers open a text delta beside the calls; OpenAI's answer to a call has no text then.
            ordered["content"] = ordered["content"] or None
            ordered["tool_calls"] = [self.tool_calls[at] for at in sorted(self.tool_calls)]
        if len(self.audio_parts) > 1 and isinstance(message.get("audio"), dict):
            message["audio"] = {**message["audio"], "data": _join_base64(self.audio_parts)}
        members = dict(self.members)
        head = {"logprobs": members.pop("logprobs")} if "logprobs" in members else {}
        reason = members.pop("finish_reason", None)
        return {"index": index, "message": {**ordered, **message}, **head, "finish_reason": reason, **members}


def _join_base64(parts: list[str]) -> str:
    """Padding inside a joined text would end it early, so padded parts are joined as bytes."""
    if not any(part.endswith("=") for part in parts[:-1]):
        return "".join(parts)
    try:
        return base64.b64encode(b"".join(base64.b64decode(part, validate=True) for part in parts)).decode()
    except binascii.Error:
        return "".join(parts)


class _Assembler:
    def __init__(self) -> None:
        self._envelope = Envelope("chat.completion")
        self._choices: dict[int, _Choice] = {}

    def add(self, chunk: Json) -> None:
        self._envelope.add(chunk)
        choices = chunk.get("choices")
        for place, choice in enumerate(choices if isinstance(choices, list) else ()):
            if isinstance(choice, dict):
                index = choice.get("index")
                index = index if isinstance(index, int) else place
                self._choices.setdefault(index, _Choice()).add(choice)

    def body(self) -> Json:
        return self._envelope.body([self._choices[index].body(index) for index in sorted(self._choices)])


def _split(body: Json) -> list[Json]:
    envelope = {name: value for name, value in body.items() if name not in ("choices", "usage")}
    envelope["object"] = "chat.completion.chunk"
    chunks = [
        {**envelope, "choices": [choice_delta]}
        for place, choice in enumerate(body.get("choices") or ())
        for choice_delta in _split_choice(choice, place)
    ]
    if body.get("usage") is not None:
        chunks.append({**envelope, "choices": [], "usage": body["usage"]})
    return chunks


def _split_choice(choice: Json, place: int) -> Iterator[Json]:
    index = choice.get("index", place)
    message = dict(choice.get("message") or {})
    calls = message.pop("tool_calls", None)
    texts = {name: message.pop(name) for name in _STREAMED_TEXTS if isinstance(message.get(name), str)}
    logprobs = choice.get("logprobs")
    last = {name: value for name, value in choice.items() if name not in ("index", "message", "logprobs")}
    last.setdefault("finish_reason", None)

    def part(delta: Json, **members: Any) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **members}

    yield part({"role": message.pop("role", "assistant"), **message, **dict.fromkeys(texts, "")})
    by_token = _logprobs_by_token(texts.get("content"), logprobs)
    for name, text in texts.items():
        if name == "content" and by_token:
            for token, token_logprobs in by_token:
                yield part({name: token}, logprobs=token_logprobs)
        else:
            for token in tokens(text):
                yield part({name: token})
    for at, call in enumerate(calls if isinstance(calls, list) else ()):
        for fragment in _split_tool_call(call):
            yield part({"tool_calls": [{"index": at, **fragment}]})
    yield part({}, **last, logprobs=None if by_token else logprobs)


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

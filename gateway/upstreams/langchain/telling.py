"""LangChain's pieces of an answer in OpenAI's chunks: texts, tool calls, finish reasons, usage."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.core.apis import CHAT
from gateway.errors import GatewayError, UpstreamBroke
from gateway.ports import Call
from gateway.upstreams.chunks import DONE, ChunkWriter, Json, fresh_id

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


@dataclass(frozen=True, slots=True)
class Event:
    """What one choice's stream has brought: a piece, its good end, or what it failed of."""

    index: int
    piece: Any = None
    ended: bool = False
    error: GatewayError | None = None


class Teller:
    """Tells LangChain's pieces in OpenAI's chunks."""

    def __init__(self, call: Call, choices: int) -> None:
        self.running = choices
        self._writer = ChunkWriter.fresh(call)
        self._chat = call.api is CHAT
        self._choices = [_Choice() for _ in range(choices)]
        self._usage: Json = {}

    def tell(self, event: Event) -> list[bytes]:
        """Raises `UpstreamBroke`."""
        chunks = []
        try:
            for delta, logprobs in self._hear(event):
                chunks.append(self._writer.choice(event.index, self._said(delta), logprobs=logprobs))
        except orjson.JSONEncodeError as error:
            raise UpstreamBroke(f"The model's answer is not JSON: {error}") from None
        return chunks + self._end(event) if event.ended else chunks

    def _hear(self, event: Event) -> Iterator[tuple[Json, Json | None]]:
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

    def _end(self, event: Event) -> list[bytes]:
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

"""What the upstreams that write their own chunks share: the chunks' envelope, and how they read a request."""

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import orjson

from gateway.core.apis import CHAT
from gateway.errors import InvalidRequest
from gateway.ports import Call

Json = dict[str, Any]

DONE = b"[DONE]"
MAX_CHOICES = 128
"""OpenAI's own limit of ``n``; each choice costs the memory of a text, or a call of a model."""

_ID_BYTES = 14


@dataclass(frozen=True, slots=True)
class ChunkWriter:
    """Writes the chunks of one answer, all under the same identity. ``created`` is in Unix seconds."""

    id: str
    object: str
    created: int
    model: str

    @classmethod
    def fresh(cls, call: Call) -> Self:
        """Under an identity of its own: two answers never share one, however alike they are."""
        kind = "chat.completion.chunk" if call.api is CHAT else "text_completion"
        return cls(fresh_id(call.api.id_prefix), kind, int(time.time()), call.body["model"])

    def choice(self, index: int, said: Json, *, logprobs: Json | None = None, finish_reason: str | None = None) -> bytes:
        """A chunk about one choice; ``said`` is its ``delta`` or its ``text``."""
        return self._chunk([{"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}])

    def usage(self, usage: Json) -> bytes:
        """The chunk after all choices have ended."""
        return self._chunk([], usage=usage)

    def _chunk(self, choices: list[Json], **members: Json) -> bytes:
        return orjson.dumps({
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **members,
        })  # fmt: skip


def fresh_id(prefix: str) -> str:
    """``prefix`` and 28 letters and digits that nobody has had before."""
    return prefix + secrets.token_hex(_ID_BYTES)


def count_choices(call: Call) -> int:
    """How many choices are asked for. Raises `InvalidRequest` where they are too many."""
    choices = call.api.choices(call.body)
    if choices > MAX_CHOICES:
        raise InvalidRequest(f"This model gives at most {MAX_CHOICES} choices, not {choices}.", param="n")
    return choices


def stop_sequences(body: Json) -> list[str]:
    """The member ``stop`` as a list, empty where there is none. Raises `InvalidRequest`."""
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(item, str) for item in stops):
        raise InvalidRequest("Invalid type for 'stop': expected a string or an array of strings.", param="stop")
    return [item for item in stops if item]


def prompts_of(body: Json) -> list[str | list[int]]:
    """The member ``prompt`` of a completions request as a list of texts and token arrays."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return prompt
    return ["" if prompt is None else prompt]


def model_objects(names: Iterable[str], owner: str) -> list[Json]:
    """OpenAI's model objects for those ``names`` that are exact, not patterns."""
    exact = [name for name in names if not set(name) & set("*?[")]
    return [{"id": name, "object": "model", "created": 0, "owned_by": owner} for name in exact]

"""Legacy completions: ``POST /v1/completions``."""

from collections.abc import Iterator
from typing import Any

from gateway.core.apis.base import (
    Api,
    Envelope,
    Json,
    canonical_members,
    check,
    check_common,
    merge,
    normalise,
    one_or_many,
    tokens,
)

_NORMAL = {
    **dict.fromkeys(
        (
            "best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n",
            "presence_penalty", "prompt", "seed", "suffix", "temperature", "top_p",
        ),
        normalise,
    ),
    "stop": one_or_many,
}  # fmt: skip


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return True
    if not isinstance(value, list):
        return False
    return (
        all(isinstance(item, str) for item in value)
        or all(map(_is_token, value))
        or all(isinstance(item, list) and all(map(_is_token, item)) for item in value)
    )


def _validate(body: Json) -> None:
    check_common(body)
    check(body, "prompt", "a string, or an array of strings, of tokens or of token arrays", _is_prompt)


def _choices(body: Json) -> int:
    """Several prompts × ``n`` answer with choice indexes ``prompt * n + i``."""
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not _is_token(prompt[0]) else 1
    return prompts * int(body.get("n") or 1)


def _cannot_stream(body: Json) -> bool:
    best_of = body.get("best_of")
    return isinstance(best_of, int | float) and best_of > 1


class _Assembler:
    def __init__(self) -> None:
        self._envelope = Envelope("text_completion")
        self._choices: dict[int, Json] = {}

    def add(self, chunk: Json) -> None:
        self._envelope.add(chunk)
        choices = chunk.get("choices")
        for place, choice in enumerate(choices if isinstance(choices, list) else ()):
            if isinstance(choice, dict):
                self._add_choice(choice, place)

    def _add_choice(self, choice: Json, place: int) -> None:
        members = dict(choice)
        index = members.pop("index", None)
        into = self._choices.setdefault(index if isinstance(index, int) else place, {})
        merge(into, members)
        for name in members:
            into.setdefault(name, None)

    def body(self) -> Json:
        return self._envelope.body([
            {"text": "", "index": index, "logprobs": None, "finish_reason": None, **self._choices[index]}
            for index in sorted(self._choices)
        ])  # fmt: skip


def _split(body: Json) -> list[Json]:
    envelope = {name: value for name, value in body.items() if name not in ("choices", "usage")}
    chunks = [
        {**envelope, "choices": [part]}
        for place, choice in enumerate(body.get("choices") or ())
        for part in _split_choice(choice, place)
    ]
    if body.get("usage") is not None:
        chunks.append({**envelope, "choices": [], "usage": body["usage"]})
    return chunks


def _split_choice(choice: Json, place: int) -> Iterator[Json]:
    index = choice.get("index", place)
    text = choice.get("text")
    for token in tokens(text) if isinstance(text, str) else ():
        yield {"text": token, "index": index, "logprobs": None, "finish_reason": None}
    last = {name: value for name, value in choice.items() if name not in ("index", "text")}
    yield {"text": "" if isinstance(text, str) else text, "index": index, "logprobs": None, "finish_reason": None, **last}


COMPLETIONS = Api(
    name="completions",
    path="completions",
    id_prefix="cmpl-",
    validate=_validate,
    canonical=lambda body: canonical_members(body, _NORMAL),
    choices=_choices,
    limits_tokens=lambda body: body.get("max_tokens") is not None,
    cannot_stream=_cannot_stream,
    assembler=_Assembler,
    split=_split,
)

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
    keep_last,
    merge,
    normalise,
    numbered,
    one_or_many,
    split_answer,
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
        for index, choice in numbered(chunk.get("choices")):
            self._add_choice(self._choices.setdefault(index, {}), choice)

    @staticmethod
    def _add_choice(into: Json, choice: Json) -> None:
        for name, value in choice.items():
            if name in ("text", "logprobs"):
                merge(into, {name: value})
            elif name != "index":
                keep_last(into, name, value)

    def body(self) -> Json:
        return self._envelope.body([
            {"text": "", "index": index, "logprobs": None, "finish_reason": None, **self._choices[index]}
            for index in sorted(self._choices)
        ])  # fmt: skip


def _split(body: Json) -> list[Json]:
    return split_answer(body, "text_completion", _split_choice)


def _split_choice(index: int, choice: Json) -> Iterator[Json]:
    head = {"text": "", "index": index, "logprobs": None, "finish_reason": None}
    text = choice.get("text")
    rest = {name: value for name, value in choice.items() if name != "index"}
    if isinstance(text, str):
        rest["text"] = ""
        for token in tokens(text):
            yield {**head, "text": token}
    yield {**head, **rest}


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

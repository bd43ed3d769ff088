"""Recordings to measure with."""

import random
import re
import time
from pathlib import Path

import orjson

from gateway.core.apis import CHAT
from gateway.core.recording import Meta, Recorder, Recording

# Text that people wrote: what repeats itself compresses too well.
_TEXT = Path(__file__).parents[2] / "README.md"


def recording(tokens: int) -> Recording:
    """An answer of random words, in the chunks that OpenAI sends."""
    words, draw, recorder = (
        re.findall(r"\s*\S+", _TEXT.read_text("utf-8")),
        random.Random(tokens),
        Recorder(CHAT.assembler()),
    )
    head = {"id": f"chatcmpl-{tokens:029}", "object": "chat.completion.chunk", "created": 1_700_000_000}
    for number in range(tokens):
        choice = {"index": 0, "delta": {"content": draw.choice(words)}, "logprobs": None, "finish_reason": None}
        chunk = {**head, "model": "gpt-4o-mini-2024-07-18", "system_fingerprint": "fp_0aa8d3e20b", "choices": [choice]}
        recorder.add(orjson.dumps(chunk), number * 20_000)
    meta = Meta("chat", "m", "u", time.time(), time.time(), tokens * 20_000, 3600.0, "chatcmpl-1", tokens, flight="ab" * 8)
    return recorder.recording(meta, orjson.dumps({"choices": []}))

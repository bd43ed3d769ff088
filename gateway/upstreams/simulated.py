"""A model of our own: always there, free, deterministic, and as slow as a cluster that serves real ones.

For demonstrations, load tests and a first run without any credential. The same request is always answered by
the same text, under a fresh identity; how long it takes is drawn from a seed. From one call to the next nothing is kept
but their number, and who runs in which batch.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

from gateway.config import SimulatedUpstreamConfig, read_corpus
from gateway.core.apis import CHAT
from gateway.core.apis.base import tokens
from gateway.core.key import canonical_text
from gateway.core.simulation import MAX_LENGTH_TOKENS, Batch, Behaviour
from gateway.errors import ConfigError, InvalidRequest, PathNotFound
from gateway.ports import Answer, Call, Relayed
from gateway.upstreams.chunks import DONE, ChunkWriter, Json, count_choices, model_objects, prompts_of, stop_sequences
from gateway.upstreams.example import Example
from gateway.upstreams.prose import AGAIN, LIVE, passage, prose, quote

_TOKENS_PER_MESSAGE = 4

_Turn = asyncio.Future[float]
"""Of one call: when it came into the batch, by the clock of the loop."""


class SimulatedUpstream:
    """The deterministic models as an `Upstream`. They always stream, a token of each choice at a time."""

    passes_credential = False

    def __init__(self, config: SimulatedUpstreamConfig) -> None:
        """Raises `ConfigError` where the corpus cannot be read."""
        self.name = config.name
        self._config = config
        self._calls = 0
        self._batches: dict[str, Batch[_Turn]] = {}
        """Of the models that are being called."""
        try:
            self._corpus = read_corpus(config.corpus_file) if config.corpus_file else ""
        except ValueError as error:
            raise ConfigError([f"upstreams.{config.name}.corpus_file: {error}"]) from None

    @asynccontextmanager
    async def ask(self, call: Call) -> AsyncIterator[Answer]:
        """The head is there at once; the first token comes when there is room in the batch. Raises `InvalidRequest`."""
        behaviour = self._config.behaviour(call.body["model"])
        with self._turn(call.body["model"], behaviour) as (turn, batch):
            scripts = _Author(call, behaviour, self._config.seed, self._corpus).scripts()
            self._calls += 1
            draws = random.Random(f"{self._config.seed}:{self._calls}")  # noqa: S311  # nothing secret hangs on it
            async with aclosing(_perform(call, scripts, _Pace(behaviour, batch, draws), turn)) as batches:
                yield Answer({}, batches=batches)

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
        """Raises `PathNotFound`: there is nothing behind this model to pass a request on to."""
        raise PathNotFound(f"{method} /v1/{path}: a simulated model only serves chat/completions and completions.")

    async def close(self) -> None:
        """Nothing is held open."""

    @contextmanager
    def _turn(self, model: str, behaviour: Behaviour) -> Iterator[tuple[_Turn, Batch[_Turn]]]:
        """A place in the model's batch, or in the queue before it, from now on."""
        batch = self._batches.setdefault(model, Batch(behaviour.batch_size))
        loop = asyncio.get_running_loop()
        turn: _Turn = loop.create_future()
        if batch.enter(turn):
            turn.set_result(loop.time())
        try:
            yield turn, batch
        finally:
            turn.cancel()
            next_one = batch.leave(turn)
            if next_one and not next_one.done():  # who has just given up hands its place on
                next_one.set_result(loop.time())
            if batch.is_empty:
                self._batches.pop(model, None)


class _Pace:
    """How fast one call goes among those that run with it."""

    def __init__(self, behaviour: Behaviour, batch: Batch[_Turn], draws: random.Random) -> None:
        self.behaviour = behaviour
        self.batch = batch
        self.draws = draws
        self._alone_s = behaviour.gaps_s(draws)

    def first_token_s(self, prompt_tokens: int) -> float:
        return self._slowed(self.behaviour.first_token_s(self.draws, prompt_tokens))

    def gap_s(self) -> float:
        return self._slowed(self._alone_s())

    def _slowed(self, alone_s: float) -> float:
        return alone_s * self.behaviour.slowdown(self.batch.running)


async def _perform(call: Call, scripts: "list[_Script]", pace: _Pace, turn: _Turn) -> AsyncGenerator[list[bytes], None]:
    now_s = asyncio.get_running_loop().time
    prompt_tokens = _prompt_tokens(call)
    # Due times count from the token before, not from when that was sent, so that lateness never adds up.
    due_s = await turn + pace.first_token_s(prompt_tokens)
    writer = ChunkWriter.fresh(call)
    steps, step = max(script.steps for script in scripts), 0
    while step < steps:
        await asyncio.sleep(due_s - now_s())
        batch, until_s = [], now_s()
        while step < steps and due_s <= until_s:
            batch += [chunk for script in scripts for chunk in script.chunks_at(step, writer)]
            step += 1
            due_s += pace.gap_s()
        if step == steps:
            batch += (writer.usage(_usage(prompt_tokens, scripts)), DONE)
        if batch:
            yield batch


@dataclass(frozen=True, slots=True)
class _Script:
    """What one choice says, a token a step, and how it ends."""

    index: int
    tokens: list[str]
    finish_reason: str
    chat: bool
    tool_call: Json | None = None
    """The head of the call whose arguments the tokens are; None where they are text."""
    echo: str = ""
    logprobs: list[Json] | None = None

    @property
    def steps(self) -> int:
        return max(1, len(self.tokens))

    def chunks_at(self, step: int, writer: ChunkWriter) -> Iterator[bytes]:
        if step >= self.steps:
            return
        if step == 0:
            yield from (writer.choice(self.index, said) for said in self._opening())
        if step < len(self.tokens):
            logprobs = self.logprobs[step] if self.logprobs else None
            yield writer.choice(self.index, self._said(self.tokens[step]), logprobs=logprobs)
        if step == self.steps - 1:
            yield writer.choice(self.index, {"delta": {}} if self.chat else {"text": ""}, finish_reason=self.finish_reason)

    def _opening(self) -> Iterator[Json]:
        if not self.chat:
            yield from [{"text": self.echo}] if self.echo else []
        elif self.tool_call:
            yield {"delta": {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **self.tool_call}]}}
        else:
            yield {"delta": {"role": "assistant", "content": ""}}

    def _said(self, token: str) -> Json:
        if not self.chat:
            return {"text": token}
        if self.tool_call:
            return {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": token}}]}}
        return {"delta": {"content": token}}


def _topics(call: Call) -> list[str]:
    """What each prompt is about. Token arrays are about nothing: there is no telling what they spell."""
    if call.api is CHAT:
        return [_last_words(call.body["messages"])]
    return [prompt if isinstance(prompt, str) else "" for prompt in prompts_of(call.body)]


class _Author:
    """Writes what each choice of one answer says. All chance of it is the same for the same request, in any process."""

    def __init__(self, call: Call, behaviour: Behaviour, seed: int, corpus: str) -> None:
        self._call = call
        self._body = call.body
        self._behaviour = behaviour
        self._seed = seed
        self._corpus = corpus

    def scripts(self) -> list[_Script]:
        """Of all choices. Raises `InvalidRequest`."""
        count_choices(self._call)
        per_prompt = int(self._body.get("n") or 1)
        write_one = self._chat if self._call.api is CHAT else self._completion
        topics = [topic for topic in _topics(self._call) for _ in range(per_prompt)]
        return [write_one(topic, self._random(index), index) for index, topic in enumerate(topics)]

    def _random(self, index: int) -> random.Random:
        digest = blake2b(b"%d" % self._seed, digest_size=16)
        api, body = self._call.api, self._body
        for part in (api.name.encode(), body["model"].encode(), canonical_text(api, body), b"%d" % index):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return random.Random(digest.digest())  # noqa: S311  # nothing secret hangs on it

    def _chat(self, topic: str, rng: random.Random, index: int) -> _Script:
        body = self._body
        tool = _demanded_tool(body)
        if tool is not None:
            said, reason = _cut(Example(tool.get("parameters"), rng, topic).json(), body, "tool_calls", stops=[])
            function = {"name": tool["name"], "arguments": ""}
            head = {"id": f"call_{rng.randbytes(12).hex()}", "type": "function", "function": function}
            return _Script(index, said, reason, chat=True, tool_call=head)
        text = _json_answer(body.get("response_format"), rng, topic) or self._text(topic, rng, index)
        said, reason = _cut(text, body, "stop", stops=stop_sequences(body))
        logprobs = _chat_logprobs(said, rng, body.get("top_logprobs")) if body.get("logprobs") else None
        return _Script(index, said, reason, chat=True, logprobs=logprobs)

    def _completion(self, topic: str, rng: random.Random, index: int) -> _Script:
        body = self._body
        echo = topic if body.get("echo") else ""
        said, reason = _cut("\n\n" + self._text(topic, rng, index), body, "stop", stops=stop_sequences(body))
        wanted = body.get("logprobs")
        logprobs = _text_logprobs(said, rng, wanted, len(echo)) if isinstance(wanted, int) else None
        return _Script(index, said, reason, chat=False, echo=echo, logprobs=logprobs)

    def _text(self, topic: str, rng: random.Random, index: int) -> str:
        length = self._length(rng)
        return passage(self._corpus, rng, length) if self._corpus else prose(rng, topic, index, length)

    def _length(self, rng: random.Random) -> int:
        """As drawn, but what vLLM's servers are told by load generators holds: ``min_tokens`` and ``ignore_eos``."""
        limit = _limit(self._body, "max_completion_tokens", "max_tokens")
        if self._body.get("ignore_eos") is True and limit is not None:
            # One more, so that it is the limit that ends it.
            return min(limit, MAX_LENGTH_TOKENS) + 1
        least = _limit(self._body, "min_tokens") or 0
        return max(self._behaviour.length(rng), min(least, MAX_LENGTH_TOKENS))


def _cut(text: str, body: Json, reason: str, *, stops: list[str]) -> tuple[list[str], str]:
    """The tokens that the request leaves of ``text``, and why it ends there. Raises `InvalidRequest`."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        text = text[: min(found)]
    said = tokens(text)
    limit = _limit(body, "max_completion_tokens", "max_tokens")
    if limit is not None and len(said) > limit:
        return said[:limit], "length"
    return said, reason


def _limit(body: Json, *names: str) -> int | None:
    """The first of these numbers that the request has. Raises `InvalidRequest`."""
    for name in names:
        limit = body.get(name)
        if limit is None:
            continue
        if isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 0 or limit != int(limit):
            raise InvalidRequest(f"Invalid value for '{name}': expected a whole number, not below 0.", param=name)
        return int(limit)
    return None


def _last_words(messages: list[Json]) -> str:
    """The text of the user's last message that has one."""
    users = (message for message in reversed(messages) if message.get("role") == "user")
    return next((text for message in users if (text := _text(message.get("content")).strip())), "")


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return " ".join(text for text in texts if isinstance(text, str))


def _usage(prompt: int, scripts: list[_Script]) -> Json:
    """Counts as plausible as the tokens are: these are pieces of about a token's length."""
    completion = sum(len(script.tokens) for script in scripts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _prompt_tokens(call: Call) -> int:
    if call.api is CHAT:
        return sum(_TOKENS_PER_MESSAGE + len(tokens(_text(message.get("content")))) for message in call.body["messages"])
    return sum(len(tokens(prompt) if isinstance(prompt, str) else prompt) for prompt in prompts_of(call.body))


def _chat_logprobs(said: list[str], rng: random.Random, wanted: Any) -> list[Json]:
    alternatives = min(wanted, 20) if isinstance(wanted, int) else 0

    def entry(token: str, logprob: float) -> Json:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    logprobs = []
    for token in said:
        own, others = _chances(token, said, rng, alternatives)
        ranked = [entry(token, own), *(entry(other, logprob) for other, logprob in others.items())][:alternatives]
        logprobs.append({"content": [{**entry(token, own), "top_logprobs": ranked}], "refusal": None})
    return logprobs


def _text_logprobs(said: list[str], rng: random.Random, wanted: int, offset: int) -> list[Json]:
    logprobs = []
    for token in said:
        own, others = _chances(token, said, rng, min(wanted, 5))
        top = [{token: own, **others}] if wanted else [None]
        logprobs.append({"tokens": [token], "token_logprobs": [own], "top_logprobs": top, "text_offset": [offset]})
        offset += len(token)
    return logprobs


def _chances(token: str, said: list[str], rng: random.Random, alternatives: int) -> tuple[float, dict[str, float]]:
    """The log probability of ``token``, and of tokens that might have stood in its place, each less likely."""
    own = latest = round(-rng.expovariate(4.0), 4)
    others: dict[str, float] = {}
    for other in rng.sample(said, min(alternatives, len(said))):
        if other != token and other not in others and len(others) + 1 < alternatives:
            latest = others[other] = round(latest - 0.2 - rng.expovariate(1.0), 4)
    return own, others


def _demanded_tool(body: Json) -> Json | None:
    """The function that ``tool_choice`` demands a call of; None where the model may answer in text."""
    choice = body.get("tool_choice")
    if choice in (None, "auto", "none"):
        return None
    allowed = choice.get("allowed_tools") if isinstance(choice, dict) else None
    if isinstance(allowed, dict):
        if allowed.get("mode") != "required":
            return None
        names = [tool["name"] for tool in _functions(allowed.get("tools"))]
    elif isinstance(choice, dict):
        names = [tool["name"] for tool in _functions([choice])]
    elif choice == "required":
        names = [tool["name"] for tool in _functions(body.get("tools"))]
    else:
        raise InvalidRequest("Invalid value for 'tool_choice'.", param="tool_choice")
    demanded = next((tool for tool in _functions(body.get("tools")) if tool["name"] in names), None)
    if demanded is None:
        raise InvalidRequest("'tool_choice' demands a call, but 'tools' has no such function.", param="tool_choice")
    return demanded


def _functions(tools: Any) -> list[Json]:
    listed = [tool.get("function") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    return [function for function in listed if isinstance(function, dict) and isinstance(function.get("name"), str)]


def _json_answer(wanted: Any, rng: random.Random, topic: str) -> str:
    """The answer as JSON text, where ``response_format`` asks for it."""
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "json_schema":
        described = wanted.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        return Example(schema, rng, topic).json()
    if kind == "json_object":
        answer = {"question": quote(topic), "answer": rng.choice(LIVE), "next_time": rng.choice(AGAIN), "cached": False}
        return orjson.dumps(answer).decode()
    return ""

"""A model of our own: always there, free, deterministic, and paced like a real one.

For demonstrations, load tests and a first run without any credential. The same request is always answered by
the same text, under a fresh identity. Nothing is kept from one call to the next.
"""

import asyncio
import math
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeGuard

import orjson

from gateway.config import SimulatedUpstreamConfig
from gateway.core.apis import CHAT
from gateway.core.apis.base import tokens
from gateway.core.key import canonical_text
from gateway.core.pacing import due_by
from gateway.errors import InvalidRequest, PathNotFound
from gateway.ports import Answer, Call, Relayed
from gateway.upstreams.chunks import DONE, ChunkWriter, Json, count_choices, model_objects, prompts_of, stop_sequences

_QUOTE_CHARS = 72
_TOKENS_PER_MESSAGE = 4

# A caller writes the schema, so what grows with it is bounded.
_MAX_STEPS = 1000
_MAX_DEPTH = 16
_MAX_ITEMS = 32
_MAX_STRING_CHARS = 4096
_LEAST_STEP = 1e-6
_TOO_LARGE = 1e15


class SimulatedUpstream:
    """The deterministic model as an `Upstream`. It always streams, at ``tokens_per_s`` for each choice."""

    passes_credential = False

    def __init__(self, config: SimulatedUpstreamConfig) -> None:
        self.name = config.name
        self._config = config

    @asynccontextmanager
    async def ask(self, call: Call) -> AsyncIterator[Answer]:
        """The head is there at once, the first token after ``ttft_s``. Raises `InvalidRequest`."""
        started_s = asyncio.get_running_loop().time()
        scripts = _write(call, self._config.length_tokens)
        async with aclosing(self._perform(call, scripts, started_s)) as batches:
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

    async def _perform(self, call: Call, scripts: "list[_Script]", started_s: float) -> AsyncGenerator[list[bytes], None]:
        now_s = asyncio.get_running_loop().time
        writer = ChunkWriter.fresh(call)
        steps = max(script.steps for script in scripts)
        # Due times count from the start, not from the token before, so that lateness never adds up.
        due_s = [self._config.ttft_s + step / self._config.tokens_per_s for step in range(steps)]
        sent = 0
        while sent < steps:
            due = due_by(due_s, sent, now_s() - started_s)
            if due == sent:
                await asyncio.sleep(started_s + due_s[sent] - now_s())
                continue
            batch = [chunk for step in range(sent, due) for script in scripts for chunk in script.chunks_at(step, writer)]
            if due == steps:
                batch += (writer.usage(_usage(call, scripts)), DONE)
            sent = due
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


def _write(call: Call, length_tokens: int) -> list[_Script]:
    """The scripts of all choices. Raises `InvalidRequest`."""
    count_choices(call)
    per_prompt = int(call.body.get("n") or 1)
    write_one = _write_chat if call.api is CHAT else _write_completion
    return [
        write_one(call.body, topic, _random(call, index), index, length_tokens)
        for index, topic in enumerate(topic for topic in _topics(call) for _ in range(per_prompt))
    ]


def _topics(call: Call) -> list[str]:
    """What each prompt is about. Token arrays are about nothing: there is no telling what they spell."""
    if call.api is CHAT:
        return [_last_words(call.body["messages"])]
    return [prompt if isinstance(prompt, str) else "" for prompt in prompts_of(call.body)]


def _random(call: Call, index: int) -> random.Random:
    """All chance of one choice: the same for the same request, in any process."""
    digest = blake2b(digest_size=16)
    for part in (call.api.name.encode(), call.body["model"].encode(), canonical_text(call.api, call.body), b"%d" % index):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return random.Random(digest.digest())  # noqa: S311  # nothing secret hangs on it


def _write_chat(body: Json, topic: str, rng: random.Random, index: int, length_tokens: int) -> _Script:
    tool = _demanded_tool(body)
    if tool is not None:
        said, reason = _cut(_Example(tool.get("parameters"), rng, topic).json(), body, "tool_calls", stops=[])
        function = {"name": tool["name"], "arguments": ""}
        head = {"id": f"call_{rng.randbytes(12).hex()}", "type": "function", "function": function}
        return _Script(index, said, reason, chat=True, tool_call=head)
    text = _json_answer(body.get("response_format"), rng, topic) or _prose(rng, topic, index, length_tokens)
    said, reason = _cut(text, body, "stop", stops=stop_sequences(body))
    logprobs = _chat_logprobs(said, rng, body.get("top_logprobs")) if body.get("logprobs") else None
    return _Script(index, said, reason, chat=True, logprobs=logprobs)


def _write_completion(body: Json, topic: str, rng: random.Random, index: int, length_tokens: int) -> _Script:
    echo = topic if body.get("echo") else ""
    text = "\n\n" + _prose(rng, topic, index, length_tokens)
    said, reason = _cut(text, body, "stop", stops=stop_sequences(body))
    wanted = body.get("logprobs")
    logprobs = _text_logprobs(said, rng, wanted, len(echo)) if isinstance(wanted, int) else None
    return _Script(index, said, reason, chat=False, echo=echo, logprobs=logprobs)


def _cut(text: str, body: Json, reason: str, *, stops: list[str]) -> tuple[list[str], str]:
    """The tokens that the request leaves of ``text``, and why it ends there. Raises `InvalidRequest`."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        text = text[: min(found)]
    said = tokens(text)
    limit = _limit(body)
    if limit is not None and len(said) > limit:
        return said[:limit], "length"
    return said, reason


def _limit(body: Json) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
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


def _usage(call: Call, scripts: list[_Script]) -> Json:
    """Counts as plausible as the tokens are: these are pieces of about a token's length."""
    prompt = _prompt_tokens(call)
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
        return _Example(schema, rng, topic).json()
    if kind == "json_object":
        answer = {"question": _quote(topic), "answer": rng.choice(_LIVE), "next_time": rng.choice(_AGAIN), "cached": False}
        return orjson.dumps(answer).decode()
    return ""


class _Example:
    """A value that fits a JSON schema, as far as the schemas of tools usually go; ``topic`` is what texts are about."""

    def __init__(self, schema: Any, rng: random.Random, topic: str) -> None:
        self._root = schema if isinstance(schema, dict) else {"type": "object"}
        self._rng = rng
        self._topic = _quote(topic)
        self._left = _MAX_STEPS

    def json(self) -> str:
        return orjson.dumps(self._value(self._root, "", 0)).decode()

    def _value(self, schema: Any, name: str, depth: int) -> Any:
        schema = self._resolved(schema, _MAX_DEPTH)
        for member in ("const", "default"):
            if member in schema:
                return schema[member]
        for member in ("enum", "examples"):
            if isinstance(schema.get(member), list) and schema[member]:
                return self._rng.choice(schema[member])
        return self._of_type(schema, name, depth)

    def _of_type(self, schema: Json, name: str, depth: int) -> Any:
        match kind := _type_of(schema):
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, name, depth)
            case "integer" | "number":
                return self._number(schema, whole=kind == "integer")
            case "boolean":
                return self._rng.random() < 0.5
            case "null":
                return None
        return self._string(schema, name)

    def _resolved(self, schema: Any, hops: int) -> Json:
        """``schema`` with its references and combinations replaced by one schema that satisfies them."""
        self._left -= 1
        if not isinstance(schema, dict) or hops == 0 or self._left < 0:
            return {}
        if isinstance(schema.get("$ref"), str):
            rest = {name: value for name, value in schema.items() if name != "$ref"}
            return self._resolved(self._referred(schema["$ref"]), hops - 1) | rest
        for name in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(name), list) and branches:
                # Null is allowed there, but says nothing worth looking at.
                branch = next((item for item in branches if not _is_null(item)), branches[0])
                rest = {member: value for member, value in schema.items() if member != name}
                return self._resolved(rest, hops - 1) | self._resolved(branch, hops - 1)
        if isinstance(parts := schema.get("allOf"), list):
            rest = {member: value for member, value in schema.items() if member != "allOf"}
            return _all_of([rest, *(self._resolved(part, hops - 1) for part in parts)])
        return schema

    def _referred(self, reference: str) -> Any:
        found: Any = self._root
        for step in reference.removeprefix("#").split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, dict) else None
        return found

    def _object(self, schema: Json, depth: int) -> Json:
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        required = schema.get("required")
        names = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
        names = names or list(properties)
        return {name: self._value(properties.get(name), name, depth + 1) for name in names if self._may_grow(depth)}

    def _array(self, schema: Json, name: str, depth: int) -> list[Any]:
        most = _whole(schema.get("maxItems"), _MAX_ITEMS)
        count = min(max(1, _whole(schema.get("minItems"), 1)), most, _MAX_ITEMS)
        return [self._value(schema.get("items"), name, depth + 1) for _ in range(count) if self._may_grow(depth)]

    def _may_grow(self, depth: int) -> bool:
        return self._left > 0 and depth < _MAX_DEPTH

    def _number(self, schema: Json, *, whole: bool) -> float:
        low, high = _bounds(schema, whole=whole)
        step = schema.get("multipleOf")
        if _is_number(step) and step > _LEAST_STEP:
            return math.ceil(low / step) * step
        if whole:
            return self._rng.randint(math.ceil(low), max(math.ceil(low), math.floor(high)))
        exact = low + (high - low) * self._rng.uniform(0.25, 0.75)
        return rounded if low < (rounded := round(exact, 2)) < high else exact

    def _string(self, schema: Json, name: str) -> str:
        text = _FORMATS.get(str(schema.get("format"))) or _hint(name) or self._topic or self._rng.choice(_THINGS)
        least = min(_whole(schema.get("minLength"), 0), _MAX_STRING_CHARS)
        if len(text) < least:
            text = (text + " ") * (least // (len(text) + 1) + 1)
            text = text[:least]
        return text[: _whole(schema.get("maxLength"), len(text))]


def _type_of(schema: Json) -> Any:
    kind = schema.get("type")
    if isinstance(kind, list):
        return next((item for item in kind if item != "null"), "null")
    return kind or ("object" if "properties" in schema else "array" if "items" in schema else "string")


def _is_null(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "null"


def _all_of(parts: list[Json]) -> Json:
    merged: Json = {}
    for part in parts:
        for name, value in part.items():
            old = merged.get(name)
            if name == "properties" and isinstance(old, dict) and isinstance(value, dict):
                merged[name] = old | value
            elif name == "required" and isinstance(old, list) and isinstance(value, list):
                merged[name] = [*old, *value]
            else:
                merged[name] = value
    return merged


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TOO_LARGE


def _whole(value: Any, otherwise: int) -> int:
    return max(0, int(value)) if _is_number(value) else otherwise


def _bounds(schema: Json, *, whole: bool) -> tuple[float, float]:
    """The least and the greatest number allowed; where one is open, it lies a little beyond the other."""
    beyond = 1 if whole else 0
    lows = [schema.get("minimum"), _moved(schema.get("exclusiveMinimum"), beyond)]
    highs = [schema.get("maximum"), _moved(schema.get("exclusiveMaximum"), -beyond)]
    low = max((value for value in lows if _is_number(value)), default=None)
    high = min((value for value in highs if _is_number(value)), default=None)
    if low is None:
        low = 1 if high is None or high > 1 else high - 9
    return low, low + 9 if high is None else high


def _moved(value: Any, by: int) -> Any:
    return value + by if _is_number(value) else None


def _hint(name: str) -> str | None:
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    return next((_HINTS[word] for word in words if word in _HINTS), None)


def _quote(text: str) -> str:
    """The beginning of ``text`` on one line, cut between words."""
    line = " ".join(text.split())
    if len(line) <= _QUOTE_CHARS:
        return line
    head, _, cut_off = line[:_QUOTE_CHARS].rpartition(" ")
    return (head or cut_off).rstrip(",;:.") + "…"


def _prose(rng: random.Random, topic: str, index: int, length_tokens: int) -> str:
    """English of exactly ``length_tokens`` tokens: about what was asked, what the gateway does with it, and more."""
    sentences: list[str] = []
    room = length_tokens
    for sentence in _sentences(rng, _quote(topic), index):
        if room <= len(_CLOSINGS):
            break
        size = len(tokens(sentence))
        if size <= room:
            sentences.append(sentence)
            room -= size
    if room:
        sentences.append(_CLOSINGS[room - 1])
    # White space belongs to the token after it, so paragraphs cost nothing.
    paragraphs = [" ".join(sentences[at : at + 4]) for at in range(0, len(sentences), 4)]
    return "\n\n".join(paragraphs)


def _sentences(rng: random.Random, quote: str, index: int) -> Iterator[str]:
    """Without end. Each choice opens in its own way, even where chance would make two alike."""
    if quote:
        yield rng.choice(_OPENINGS).format(quote=quote)
    else:
        yield rng.choice(_SILENCES)
    if index:
        yield f"This is answer number {index + 1}, told in its own way."
    for variants in (_LIVE, _RECORDED, _AGAIN, _TOGETHER):
        yield rng.choice(variants)
    deck = [*_ASIDES, *_SCENES]
    while True:
        rng.shuffle(deck)
        for sentence in deck:
            yield sentence.format(
                city=rng.choice(_CITIES), thing=rng.choice(_THINGS), many=rng.randrange(200, 9000), few=rng.randrange(3, 60)
            )


_OPENINGS = (
    "“{quote}” — a good thing to ask of a model that is made of nothing but arithmetic and patience.",
    "You said: “{quote}”. I am a simulated model, so take what follows for its rhythm rather than its wisdom.",
    "“{quote}”, you write, and somewhere between your question and this sentence a stream has opened.",
    "So: “{quote}”. I cannot answer that, but I can tell you what is happening while you read.",
    "“{quote}” has arrived safely, and deserves a better mind than mine; let me offer a view of the machinery instead.",
)
_SILENCES = (
    "You sent no words, which is the hardest kind of question, so I shall talk about the place we are in.",
    "A prompt without words: very well, then I choose the subject, and the subject is this stream.",
)
_LIVE = (
    "These words reach you one at a time: each token is an event on the wire, sent on in the moment it exists.",
    "What you see is live: one token, one event, nothing held back to look tidy.",
    "I am speaking live now, a token every few hundredths of a second, and nobody between us waits for the end.",
)
_RECORDED = (
    "While they pass, the gateway writes each of them down, together with the instant at which it came.",
    "As it flows by, the gateway keeps the stream: every frame, in order, with its place in time.",
    "Behind the scenes a recording grows with every word, and it counts only once the last one is safe.",
)
_AGAIN = (
    "Ask me the same again and I shall not even be woken: the very same tokens come out of Redis, comma for comma.",
    "Put the same question once more, and these tokens return from Redis, at once or at the pace I kept today.",
    "If all this appeared in a blink, you are not listening to me at all but to Redis, which remembers me perfectly.",
)
_TOGETHER = (
    "And whoever asks it right now joins this very stream, catches up, and reads on beside you: one call, many readers.",
    "Should a thousand others ask it this second, I still speak only once; they all read over the same shoulder.",
    "Nobody else has to pay for it meanwhile: a second caller is simply one more reader with a cursor of its own.",
)
_ASIDES = (
    "A player piano keeps a performance as holes in paper; a cache keeps one as bytes with a time to live.",
    "Heraclitus held that nobody steps into the same river twice, but then he had no Redis.",
    "An echo is a replay at the recorded pace.",
    "A library is a cache for everyone who could not ask the author.",
    "The light of Sirius is more than eight years old when you see it: the oldest hit most people ever notice.",
    "In 1858 ninety-eight words of Queen Victoria took sixteen hours to cross the Atlantic, and New York lit fireworks.",
    "Alfred Vail counted the letters in a printer’s cases and gave E a single dot: compression, and that in 1838.",
    "Monks copied books by hand for a thousand years, and by their mistakes we know who copied from whom.",
    "A song on the radio is one transmitter and many listeners; whoever tunes in late still hears the end.",
    "Café, naïve, Ærøskøbing, Ελλάδα, 東京: whatever the alphabet, the bytes arrive in the order in which they left.",
    "A slow reader slows nobody down, because each one pulls from the same log at its own place.",
    "The hard part of remembering is to know when to forget, and so every entry here has an end.",
    "Silence is not a full stop: a stream that breaks off must never look like one that has finished.",
    "The cheapest request is the one that was answered yesterday.",
    "Ships once kept their speed on a knotted line paid out astern, which is why we still write things down in a log.",
    "Only a story that was told to its end is worth keeping; half an answer, served quickly, is still half an answer.",
)
_SCENES = (
    "In {city} somebody has just asked for {thing}, as {many} did before, and nobody had to think about it again.",
    "Imagine {few} screens in {city}, all lit by the same sentence, all a little surprised that it cost so little.",
    "A clerk in {city} kept {many} letters in one drawer and found any of them faster than he could have written it.",
    "There is a shop in {city} that sells {thing} and nothing else, {few} steps from the river.",
    "Of {many} questions asked in {city} today, all but {few} had been asked before.",
    "They say that in {city} {thing} is passed on from hand to hand {few} times before anyone asks where it came from.",
)
_CITIES = ("Lisbon", "Kyōto", "Tromsø", "Valparaíso", "Kraków", "Zürich", "Nairobi", "Reykjavík", "Montréal", "Trieste")
_THINGS = ("a map of the tides", "a paper lantern", "the morning’s bread", "a jar of quince jam", "an old brass key",
           "the news from the harbour", "a spare violin string", "a ticket for the night train")  # fmt: skip
# The place in the row is the number of tokens less one: with these any length can be met.
_CLOSINGS = (
    "Enough.",
    "That’s all.",
    "So it ends.",
    "And there it rests.",
    "With that, I fall silent.",
    "The rest is for another day.",
    "Thank you for watching the words arrive.",
    "Ask again, and see how fast they return.",
    "Here the stream ends, as all good streams must.",
    "Ask once more, and Redis will answer before I do.",
    "Nothing here was held back, and nothing more is to come.",
    "Here the first telling ends; every later one starts in Redis itself.",
)
_FORMATS = {
    "date": "2026-06-21", "date-time": "2026-06-21T12:00:00Z", "time": "12:00:00Z", "duration": "PT15M",
    "email": "ada@example.org", "hostname": "example.org", "ipv4": "192.0.2.1", "ipv6": "2001:db8::1",
    "uri": "https://example.org/", "uuid": "6f1c9a52-3b0e-4d7a-9c46-2f5e8d1b7a30",
}  # fmt: skip
_HINTS = {
    "city": "Lisbon", "location": "Lisbon", "place": "Lisbon", "country": "Portugal", "street": "Rua Augusta",
    "address": "Rua Augusta 24, Lisbon", "name": "Ada Lovelace", "author": "Ada Lovelace", "email": "ada@example.org",
    "url": "https://example.org/", "date": "2026-06-21", "time": "12:00", "day": "Sunday", "language": "en",
    "currency": "EUR", "color": "teal", "colour": "teal", "unit": "celsius", "id": "a-1024", "path": "notes/today.md",
    "title": "A Stream Is a Log",
}  # fmt: skip

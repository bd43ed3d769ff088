"""What the simulated model says: English that is about what was asked, and about what the gateway is doing meanwhile."""

import random
from collections.abc import Iterator

from gateway.core.apis.base import tokens

_QUOTE_CHARS = 72
_CHARS_PER_TOKEN = 8


def quote(text: str) -> str:
    """The beginning of ``text`` on one line, cut between words."""
    line = " ".join(text.split())
    if len(line) <= _QUOTE_CHARS:
        return line
    head, _, cut_off = line[:_QUOTE_CHARS].rpartition(" ")
    return (head or cut_off).rstrip(",;:.") + "…"


def prose(rng: random.Random, topic: str, index: int, length_tokens: int) -> str:
    """English of exactly ``length_tokens`` tokens: about what was asked, what the gateway does with it, and more."""
    sentences: list[str] = []
    room = length_tokens
    for sentence in _sentences(rng, quote(topic), index):
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


def passage(corpus: str, rng: random.Random, length_tokens: int) -> str:
    """Exactly ``length_tokens`` tokens of a text that is not empty, from the beginning of a line on, and round its end."""
    start = corpus.rfind("\n", 0, rng.randrange(len(corpus)) + 1) + 1
    size = _CHARS_PER_TOKEN * length_tokens
    while True:
        rest = corpus[start : start + size]
        while len(rest) < size:
            rest += "\n" + corpus[: size - len(rest)]
        # The last piece may be cut: what is asked for has to end before it.
        found = tokens(rest.lstrip())
        if len(found) > length_tokens:
            return "".join(found[:length_tokens])
        size *= 2


def _sentences(rng: random.Random, quote: str, index: int) -> Iterator[str]:
    """Without end. Each choice opens in its own way, even where chance would make two alike."""
    if quote:
        yield rng.choice(_OPENINGS).format(quote=quote)
    else:
        yield rng.choice(_SILENCES)
    if index:
        yield f"This is answer number {index + 1}, told in its own way."
    for variants in (LIVE, _RECORDED, AGAIN, _TOGETHER):
        yield rng.choice(variants)
    deck = [*_ASIDES, *_SCENES]
    while True:
        rng.shuffle(deck)
        for sentence in deck:
            yield sentence.format(
                city=rng.choice(_CITIES), thing=rng.choice(THINGS), many=rng.randrange(200, 9000), few=rng.randrange(3, 60)
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
LIVE = (
    "These words reach you one at a time: each token is an event on the wire, sent on in the moment it exists.",
    "What you see is live: one token, one event, nothing held back to look tidy.",
    "I am speaking live now, a token every few hundredths of a second, and nobody between us waits for the end.",
)
_RECORDED = (
    "While they pass, the gateway writes each of them down, together with the instant at which it came.",
    "As it flows by, the gateway keeps the stream: every frame, in order, with its place in time.",
    "Behind the scenes a recording grows with every word, and it counts only once the last one is safe.",
)
AGAIN = (
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
THINGS = ("a map of the tides", "a paper lantern", "the morning’s bread", "a jar of quince jam", "an old brass key",
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

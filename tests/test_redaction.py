"""Redaction: what is looked for is nowhere in the file any more, however the model's stream was cut."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import chunk, text_chunk, whole_answer
from test_jsonl import compact, recording

from gateway.core.apis import CHAT
from gateway.core.jsonl import Line
from gateway.core.redaction import Rule, by_rules

SECRET = "4111-1111-1111-1111"
CARD = Rule(re.compile(r"\d{4}(-\d{4}){3}"), "[card]")


def line_of(payloads, whole=None, **options):
    return json.loads(Line(recording(payloads, whole, **options)).dumps())


def redacted(value, *rules):
    """The line as it would be written."""
    return Line.of(by_rules(rules or [CARD])(value))


def said(line, index=0):
    return json.loads(line.recording.body)["choices"][index]["message"]["content"]


@given(st.lists(st.integers(0, 60)), st.sampled_from([compact, lambda value: json.dumps(value).encode()]))
def test_a_stream_may_be_cut_anywhere(cuts, style):
    text = f"Your card {SECRET} and {SECRET}. Grüße"
    at = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(at)]
    line = redacted(line_of([style(chunk({"content": piece})) for piece in pieces] + [style(chunk({}, "stop"))]))
    assert said(line) == "Your card [card] and [card]. Grüße"
    assert line.recording.meta.frames == len(pieces) + 1
    assert b"1111" not in line.dumps()


def test_choices_tool_calls_and_reasoning_are_texts_of_their_own():
    def call(arguments, index):
        return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}

    parts = [
        chunk({"content": "4111-1111-", "reasoning_content": "4111-11"}),
        chunk({"content": "x"}, index=1),
        chunk(call('{"card": "4111-', 0)),
        chunk(call('{"no": "1', 1)),
        chunk({"content": "1111-1111", "reasoning_content": "11-1111-1111"}),
        chunk(call('1111-1111-1111"}', 0)),
        chunk(call('"}', 1)),
        chunk({}, "tool_calls"),
        chunk({}, "stop", index=1),
    ]
    line = redacted(line_of(map(compact, parts)))
    one, other = json.loads(line.recording.body)["choices"]
    assert (one["message"]["content"], one["message"]["reasoning_content"]) == ("[card]", "[card]")
    calls = [call["function"]["arguments"] for call in one["message"]["tool_calls"]]
    assert calls == ['{"card": "[card]"}', '{"no": "1"}']
    assert other["message"]["content"] == "x"


def test_logprobs_go_where_they_would_repeat_it_and_stay_elsewhere():
    def with_logprobs(text, index, **members):
        made = chunk({"content": text}, index=index, **members)
        made["choices"][0]["logprobs"] = {"content": [{"token": text, "bytes": list(text.encode())}]}
        return made

    parts = [with_logprobs(text, index) for text in ("4111-1111-", "1111-1111") for index in (0, 1)]
    parts[1]["choices"][0]["delta"]["content"] = "no "
    parts += [chunk({}, "stop"), chunk({}, "stop", index=1)]
    line = redacted(line_of(map(compact, parts)))
    one, other = json.loads(line.recording.body)["choices"]
    assert (one["message"]["content"], one["logprobs"]) == ("[card]", None)
    assert other["message"]["content"] == "no 1111-1111"
    assert other["logprobs"]


def test_questions_tags_completions_and_whole_answers_are_redacted_too():
    body = {"model": SECRET, "messages": [{"role": "user", "content": [{"type": "text", "text": SECRET}]}], "stop": [SECRET]}
    made = line_of([compact(chunk({"content": "no"}, "stop"))], request=body, tags=(SECRET, "red"))
    line = redacted(made)
    assert line.body == {
        **body,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "[card]"}]}],
        "stop": ["[card]"],
    }
    assert line.recording.meta.tags == ("[card]", "red")
    assert SECRET.encode() not in line.dumps().replace(f'"model":"{SECRET}"'.encode(), b"")
    parts = [text_chunk("4111-1111"), text_chunk("-1111-1111"), text_chunk("", "stop")]
    asked = {"model": "m", "prompt": f"is {SECRET}"}
    line = redacted(line_of(map(compact, parts), api="completions", request=asked))
    assert json.loads(line.recording.body)["choices"][0]["text"] == "[card]"
    assert line.body["prompt"] == "is [card]"
    whole = json.dumps(whole_answer(f"It is {SECRET}"), indent=1).encode()
    payloads = [compact(part) for part in CHAT.split(json.loads(whole))]
    assert said(redacted(line_of(payloads, whole))) == "It is [card]"


def test_what_has_nothing_to_hide_keeps_every_byte():
    payloads = [json.dumps(chunk({"content": "nothing"})).encode(), compact(chunk({}, "stop"))]
    line = Line(recording(payloads))
    assert redacted(json.loads(line.dumps())) == line


@pytest.mark.parametrize(("instead", "expected"), [(r"<\g<0>>", "<ab><ab>"), ("", "")])
def test_the_replacement_is_a_template(instead, expected):
    parts = [chunk({"content": "a"}), chunk({"content": "ba"}), chunk({"content": "b"}), chunk({}, "stop")]
    assert said(redacted(line_of(map(compact, parts)), Rule(re.compile("ab|x*"), instead))) == expected

import itertools

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.opening import Opening
from gateway.errors import UpstreamBroke, UpstreamReported


def frame(**choice):
    return orjson.dumps({"id": "x", "choices": [{"index": 0, **choice}]})


SILENT = [
    frame(delta={"role": "assistant"}),
    frame(delta={"role": "assistant", "content": ""}, finish_reason=None),
    frame(delta={"role": "assistant", "content": None, "refusal": None}),
    frame(delta={}),
    frame(text="", finish_reason=None),
    b'{"choices": []}',
    b'{"choices": [], "prompt_filter_results": [{"prompt_index": 0}]}',
    b'{"choices": [], "usage": {"total_tokens": 3}}',
]
SPEAKING = [
    frame(delta={"content": "x"}),
    frame(delta={"reasoning_content": "hm"}),
    frame(delta={"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]}),
    frame(delta={"audio": {"data": "AAAA"}}),
    frame(delta={}, finish_reason="stop"),
    frame(text="x"),
    frame(text="", finish_reason="length"),
]


@pytest.mark.parametrize("payload", SILENT)
def test_what_says_nothing_is_held_back(payload):
    opening = Opening()
    assert not opening.feed([payload])
    assert opening.held == [payload]


@pytest.mark.parametrize("payload", SPEAKING)
def test_what_says_something_is_the_first_token(payload):
    opening = Opening()
    assert not opening.feed([SILENT[0]])
    assert opening.feed([payload])
    assert opening.held == [SILENT[0], payload]


@pytest.mark.parametrize("payload", [b"<oops>", b"[1]", b'{"id": "x", "choi'])
def test_what_is_no_chunk_is_a_broken_stream(payload):
    with pytest.raises(UpstreamBroke):
        Opening().feed([SILENT[0], payload])


def test_an_error_before_the_first_token_is_raised_and_one_after_it_is_not_looked_at():
    error = b'{"error": {"message": "Overloaded."}}'
    with pytest.raises(UpstreamReported, match="Overloaded"):
        Opening().feed([SILENT[0], error])
    assert Opening().feed([SPEAKING[0], error])


def test_an_end_is_an_answer_only_after_something():
    assert Opening().feed([SILENT[0], b"[DONE]"])
    with pytest.raises(UpstreamBroke):
        Opening().feed([b"[DONE]"])


def test_whoever_says_nothing_for_long_is_not_held_back_for_ever():
    opening = Opening()
    assert [opening.feed([SILENT[0]]) for _ in range(64)].index(True) == 63
    assert Opening().feed([frame(delta={"content": "", "padding": ["x" * 70_000]})])


@given(st.lists(st.sampled_from([*SILENT, *SPEAKING, b"[DONE]", b"<oops>", b'{"error": "x"}', b""]), max_size=8), st.data())
def test_how_frames_come_together_makes_no_difference(payloads, data):
    def outcome(batches):
        opening, fed = Opening(), 0
        try:
            for batch in batches:
                fed += len(batch)
                if opening.feed(batch):
                    assert opening.held == payloads[:fed]
                    return "speaks"
        except (UpstreamBroke, UpstreamReported) as error:
            return type(error)
        return "silent"

    cuts = sorted(data.draw(st.sets(st.integers(0, len(payloads)))))
    edges = [0, *cuts, len(payloads)]
    batches = [payloads[start:end] for start, end in itertools.pairwise(edges)]
    assert outcome(batches) == outcome([[payload] for payload in payloads])

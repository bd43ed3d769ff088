"""Recordings as lines of JSON: every byte comes back, whatever the model sent and whoever has rewritten the line."""

import json
from dataclasses import replace

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import USAGE, chunk, text_chunk, whole_answer

from gateway.core.apis import APIS
from gateway.core.jsonl import BadLine, Line, fingerprint, order_of
from gateway.core.recording import Identity, Meta, Recorder, body_spans

SECRET = fingerprint(b"s" * 32)
TENANT = "0123456789abcdef0123456789abcdef"
FRESH = Identity(b'"chatcmpl-fresh"', b"1800000000")
META = Meta(
    api="chat",
    model="model-1",
    upstream="scripted",
    started_at=1_700_000_000.25,
    written_at=1_700_000_001.5,
    duration_us=900,
    ttl_s=60.0,
    id="",
    flight="f" * 16,
    owner="shared",
    tags=("red", "release 7"),
)
BODY = {"model": "fast", "messages": [{"role": "user", "content": "Grüße, what is a gateway?"}], "temperature": 0.5}
HELLO = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "Hel lo"}),
    chunk({"content": "wörld"}),
    chunk({}, "stop"),
    {**chunk({}), "choices": [], "usage": USAGE},
]


def compact(value):
    return orjson.dumps(value)


def recording(payloads, whole=None, request=BODY, **members):
    """As a flight would have left it."""
    meta = META._replace(**members)
    api = APIS[meta.api]
    assembler = api.assembler()
    recorder = Recorder(assembler)
    for place, payload in enumerate(payloads := list(payloads)):
        recorder.add(payload, 100 * (place + 1))
    body = orjson.dumps(assembler.body()) if whole is None else whole
    body_id, body_created = body_spans(body)
    meta = meta._replace(
        id=recorder.id,
        frames=len(payloads),
        finish_reasons=tuple(recorder.finish_reasons.values()),
        usage=recorder.usage,
        body_id=body_id,
        body_created=body_created,
        whole=whole is not None,
    )
    asked = b"" if request is None else orjson.dumps({"api": meta.api, "body": request})
    return recorder.recording(meta, body, asked)


def assert_comes_back(line):
    text = line.dumps()
    assert b"\n" not in text
    again = Line.loads(text)
    assert again == line
    assert again.dumps() == text
    for usage in (True, False):
        assert again.recording.stream(FRESH, usage=usage) == line.recording.stream(FRESH, usage=usage)
        assert again.recording.stream(None, usage=usage) == line.recording.stream(None, usage=usage)
    assert again.recording.whole(FRESH) == line.recording.whole(FRESH)
    # Who reads and writes the line keeps every byte of the answer, as long as it knows JSON.
    assert Line.loads(json.dumps(json.loads(text), indent=1).encode()) == line
    return json.loads(text)


def test_a_stream_comes_back_byte_for_byte_and_reads_well():
    value = assert_comes_back(Line(recording(map(compact, HELLO))))
    assert list(value) == ["v", "digest", "request", "answer", "timing", "meta"]
    assert value["request"]["body"] == BODY
    assert value["request"]["canonical"] == {name: BODY[name] for name in ("messages", "temperature")}
    assert value["answer"] == {"frames": HELLO}
    assert value["timing"] == {"duration_us": 900, "at_us": [100, 200, 300, 400, 500]}
    assert value["meta"]["tags"] == ["red", "release 7"]


@pytest.mark.parametrize("text", [json.dumps, lambda value: json.dumps(value, indent=1).replace("\n", " ")])
def test_what_is_not_written_compactly_comes_back_too(text):
    value = assert_comes_back(Line(recording([text(part).encode() for part in HELLO])))
    assert value["answer"]["frames"] == list(map(text, HELLO))


@pytest.mark.parametrize(
    "text", [json.dumps, lambda value: json.dumps(value, indent=2), lambda value: compact(value).decode()]
)
def test_an_answer_that_was_not_streamed_is_kept_as_it_came(text):
    body = text(whole_answer("Hello  world\n\u2028 x")).encode()
    payloads = [orjson.dumps(part) for part in APIS["chat"].split(json.loads(body))]
    value = assert_comes_back(Line(recording(payloads, body)))
    assert list(value["answer"]) == ["body"]


def test_a_body_and_frames_that_do_not_follow_from_each_other_are_both_kept():
    payloads = list(map(compact, HELLO))
    other = orjson.dumps({**whole_answer("Hello"), "more": 1})
    value = assert_comes_back(Line(recording(payloads, other)))
    assert value["meta"]["whole"] is True
    line = Line(recording(payloads))
    line = line._replace(
        recording=replace(line.recording, body=line.recording.body.replace(b"w\xc3\xb6rld", b"w\xc3\xb6rlD"))
    )
    assert set(assert_comes_back(line)["answer"]) == {"frames", "body"}


@pytest.mark.parametrize(
    ("owner", "namespace", "told"),
    [
        ("shared", "", {"owner": "shared"}),
        ("ns:team a", "team a", {"owner": "namespace"}),
        (TENANT, "", {"owner": "tenant", "tenant": TENANT, "secret": SECRET}),
        (f"{TENANT}/ns:team/ns:a", "team/ns:a", {"owner": "tenant", "tenant": TENANT, "secret": SECRET}),
    ],
)
def test_whose_it_is_comes_back(owner, namespace, told):
    value = assert_comes_back(_bound(recording(map(compact, HELLO), owner=owner, namespace=namespace)))
    assert value["request"].items() >= told.items()
    assert ("secret" in value["request"]) == ("secret" in told)


def _bound(made):
    return Line(made, secret=SECRET if TENANT in made.meta.owner else "")


def test_completions_samples_runs_and_ignored_paths_come_back():
    parts = [text_chunk("a"), text_chunk("b"), text_chunk("", "stop")]
    made = recording(map(compact, parts), request={"model": "m", "prompt": "x", "seed": 3}, api="completions", content="c")
    made = replace(made, meta=made.meta._replace(runs=(("0123abcd", 0), ("4567abcd", 2)), stale_s=5.0))
    value = assert_comes_back(Line(made, sample=2, ignored=("seed",)))
    assert value["request"]["canonical"] == {"prompt": "x"}


def test_without_a_request_the_key_stands_in_for_it():
    value = assert_comes_back(Line(recording(map(compact, HELLO), request=None), key="a" * 40, secret=SECRET))
    assert value["request"]["body"] is value["request"]["canonical"] is None
    assert (value["request"]["key"], value["request"]["secret"]) == ("a" * 40, SECRET)


NAMES = st.text(max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
STYLES = st.sampled_from(
    [compact, lambda value: json.dumps(value).encode(), lambda value: json.dumps(value, indent=1).encode()]
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(), st.dictionaries(NAMES, VALUES, max_size=3), STYLES), max_size=5), st.booleans())
def test_whatever_a_model_says_comes_back(said, null_usage):
    """Unknown members in the chunks and in the deltas, in any style; with usage or without."""
    more = {"usage": None} if null_usage else {}
    payloads = [
        style({**unknown, **chunk({"content": text, **{f"x_{name}": value for name, value in unknown.items()}}), **more})
        for text, unknown, style in said
        if not unknown.get("error")
    ]
    assert_comes_back(Line(recording([*payloads, compact(chunk({}, "stop"))])))


def test_the_digest_tells_questions_apart_and_nothing_else():
    def digest(line):
        return json.loads(line.dumps())["digest"]

    line = Line(recording(map(compact, HELLO)))
    same = [
        Line(recording(map(compact, HELLO[1:]), request={**BODY, "model": "other alias"}, flight="e" * 16, ttl_s=5.0)),
        Line(recording(map(compact, HELLO), request={**BODY, "n": None})),
    ]
    assert {digest(each) for each in same} == {digest(line)}
    others = [
        Line(recording(map(compact, HELLO), request={**BODY, "n": 2})),
        Line(recording(map(compact, HELLO), model="model-2")),
        Line(recording(map(compact, HELLO), owner="ns:a", namespace="a")),
        Line(recording(map(compact, HELLO)), sample=1),
    ]
    assert len({digest(each) for each in [line, *others]}) == 5


def test_of_one_question_the_latest_recording_comes_first():
    lines = [Line(recording(map(compact, HELLO), started_at=at)).dumps() for at in (5.0, 1_700_000_000.25, 7.0)]
    questions = {order_of(line)[0] for line in lines}
    assert len(questions) == 1
    assert sorted(lines, key=order_of) == [lines[1], lines[2], lines[0]]


def test_a_line_may_be_written_by_hand():
    text = {"v": 1, "request": {"api": "chat", "body": {**BODY, "stream": True}}, "answer": {"frames": HELLO}}
    line = Line.loads(json.dumps(text).encode())
    assert line.recording.meta.owner == "shared"
    assert line.recording.meta.model == "fast"
    assert json.loads(line.recording.body)["choices"][0]["message"]["content"] == "Hel lowörld"
    assert "stream" not in line.body
    whole = Line.loads(json.dumps({**text, "answer": {"body": whole_answer("Hi")}}).encode())
    assert whole.recording.meta.whole


GOOD = json.loads(Line(recording(map(compact, HELLO))).dumps())


def changed(path, value):
    """A good line with another value there; without the member where the value is `...`."""
    line = json.loads(json.dumps(GOOD))
    *parents, last = path.split(".")
    place = line
    for name in parents:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return line


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("v", ..., "v: is missing"),
        ("v", 2, "v: 2 is no version"),
        ("v", True, "v: has a wrong type"),
        ("more", 1, "more: is not a member"),
        ("request", ..., "request: is missing"),
        ("request", [], "request: has a wrong type"),
        ("request.api", "chats", "request.api: must be one of chat, completions"),
        ("request.body", ..., "request.body: is missing"),
        ("request.body", {"messages": []}, "request.body: Missing required parameter: 'model'"),
        ("request.owner", "me", "request.owner: must be one of"),
        ("request.owner", "namespace", "request.owner: does not fit the namespace"),
        ("request.namespace", "a", "request.owner: does not fit the namespace"),
        ("request.sample", 64, "request.sample: must be from 0 to 63"),
        ("request.ignored", [1], "request.ignored.0: has a wrong type"),
        ("request.extra", 1, "request.extra: is not a member"),
        ("answer", {}, "answer: has neither frames nor body"),
        ("answer.frames", [{"error": {"message": "no"}}] * 5, "answer.frames.0: reports an error"),
        ("answer.frames", [1] * 5, "answer.frames.0: a chunk is not a JSON object"),
        ("answer.frames", ["{"] * 5, "answer.frames.0: a chunk is not JSON"),
        ("answer", {"body": {"choices": []}}, "answer.body: is not of the API's shape"),
        ("answer", {"body": "x"}, "answer.body: is not of the API's shape"),
        ("answer.body", 5, "answer.body: a chunk is not a JSON object"),
        ("timing.at_us", [1], "timing.at_us: has 1 times, and there are 5 frames"),
        ("timing.at_us", [1, 2, 3, 4, -5], "timing.at_us.4: has a wrong type"),
        ("timing.duration_us", -1, "timing.duration_us: must be 0 or more"),
        ("meta.ttl_s", "60", "meta.ttl_s: has a wrong type"),
        ("meta.ttl_s", -1, "meta.ttl_s: must be 0 or more"),
        ("meta.tags", [None], "meta.tags.0: has a wrong type"),
        ("meta.runs", [["0123abcd"]], "meta.runs.0: has a wrong type"),
        ("meta.runs", [["0123abcg", 0]], "meta.runs.0: has a wrong type"),
        ("meta.flight", "mine", "meta.flight: must be 16 hexadecimal digits"),
        ("meta.expires", 1, "meta.expires: is not a member"),
    ],
)
def test_what_is_wrong_with_a_line_is_told_by_its_path(path, value, message):
    with pytest.raises(BadLine, match=f"^{message}"):
        Line.loads(json.dumps(changed(path, value)).encode())


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"1", b"\xff", b'{"v": 1', b"null"])
def test_what_is_no_object_is_no_line(text):
    with pytest.raises(BadLine, match=r"^it is not"):
        Line.loads(text)

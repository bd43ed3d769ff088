import contextlib
import json
import string
from array import array
from itertools import product

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.recording import (
    CorruptRecording,
    Identity,
    MalformedChunk,
    Marks,
    Meta,
    Recorder,
    Recording,
    body_spans,
)
from gateway.core.sse import Decoder

ID = "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT"
CREATED = 1741569952
TOKEN = string.ascii_letters + string.digits + "ab"
NOW = 1999999999
META = Meta("chat", "gpt-4o", "openai", 1.0, 2.0, 1500, 60.0, ID)
USAGE = {"prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29}


def chunk(delta=None, *, finish_reason=None, **members):
    choices = [{"index": 0, "delta": delta or {}, "logprobs": None, "finish_reason": finish_reason}]
    return {
        "id": ID,
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": "gpt-4o",
        "choices": choices,
        **members,
    }


def text(content, **members):
    return chunk({"content": content}, **members)


OPENAI = [
    chunk({"role": "assistant", "content": "", "refusal": None}, usage=None, obfuscation="kT3"),
    *[text(word, usage=None, obfuscation=word[:2]) for word in ("Hel", "lo", "ab wörld")],
    *[text(word, usage=None, obfuscation="xyz") for word in (' "id":"x",', ',"usage":null')],
    chunk(finish_reason="stop", usage=None, obfuscation=""),
    chunk(usage=USAGE) | {"choices": []},
]  # fmt: skip
LLAMA_CPP = [
    {"choices": [{"finish_reason": None, "index": 0, "delta": {"role": "assistant", "content": None}}], **rest}
    for rest in [{"created": CREATED, "id": ID, "model": "m", "system_fingerprint": "b1", "object": "chat.completion.chunk"}]
    * 3
] + [{"choices": [{"finish_reason": "stop", "index": 0, "delta": {}}], "created": CREATED, "id": ID}]
USAGE_FIRST = [chunk(usage=USAGE) | {"choices": []}, text("a"), chunk(finish_reason="stop")]
AZURE = [
    {"choices": [], "created": 0, "id": "", "model": "", "object": "", "prompt_filter_results": [{"prompt_index": 0}]},
    *[text(word, usage=None, content_filter_offsets={"usage": None}) for word in "abc"],
    chunk(finish_reason="stop", usage=None),
    chunk(usage=USAGE) | {"choices": []},
]
ALL_IN_ONE = [text("a", usage={"total_tokens": 1}), text("b", finish_reason="stop", usage=USAGE)]
ODD_ORDER = [
    {"usage": None, "choices": [{"delta": {"content": "a"}}], "id": ID, "x": {"id": 1, "usage": 2}, "created": CREATED},
    {"created": CREATED, "usage": None, "id": ID, "choices": [{"delta": {}, "finish_reason": "stop"}]},
    {"created": CREATED, "id": ID, "usage": None, "choices": []},
]  # fmt: skip
NO_IDENTITY = [{"choices": [{"delta": {"content": "a"}}]}, {"id": None, "created": None, "usage": None}, {"usage": USAGE}]
SHORT_IDS = [text("a", usage=None) | {"id": "chatcmpl-7"}, text("b", usage=None) | {"id": "chatcmpl-7", "created": 5}]
STREAMS = {
    "openai": OPENAI, "llama.cpp": LLAMA_CPP, "usage first": USAGE_FIRST, "azure": AZURE, "all in one": ALL_IN_ONE,
    "odd order": ODD_ORDER, "no identity": NO_IDENTITY, "short ids": SHORT_IDS, "empty": [],
}  # fmt: skip


def compact(value):
    return orjson.dumps(value)


def spaced(value):
    return json.dumps(value).encode()


def over_lines(value, line_end="\n"):
    return json.dumps(value, indent=1).replace("\n", line_end).encode()


def record(chunks, write=compact):
    recorder = Recorder()
    for at, value in enumerate(chunks):
        assert recorder.add(write(value), at * 1000) is None
    return recorder


def without_usage(value):
    """What a caller reads who did not ask for usage; None where that is nothing."""
    if value.get("usage") and not value.get("choices"):
        return None
    return {name: member for name, member in value.items() if name != "usage"}


def under(identity, value):
    """``value`` under another identity; what had none has none."""
    fresh = dict(value)
    if value.get("id"):
        fresh["id"] = json.loads(identity.id)
    if value.get("created"):
        fresh["created"] = json.loads(identity.created)
    return fresh


def parsed(stream):
    decoder = Decoder()
    return [json.loads(event.data) for event in decoder.feed(stream)]


@pytest.mark.parametrize("write", [compact, spaced, over_lines])
@pytest.mark.parametrize("chunks", STREAMS.values(), ids=STREAMS)
def test_full_is_the_chunk_and_plain_is_the_chunk_without_usage(chunks, write):
    frames = record(chunks, write).frames
    assert [json.loads(frame.payload) for frame in frames] == chunks
    assert [parsed(frame.full) for frame in frames] == [[value] for value in chunks]
    assert [parsed(frame.plain) for frame in frames] == [
        [plain] if (plain := without_usage(value)) else [] for value in chunks
    ]
    assert [frame.at_us for frame in frames] == [at * 1000 for at in range(len(chunks))]


@pytest.mark.parametrize("chunks", STREAMS.values(), ids=STREAMS)
def test_frames_are_the_upstreams_own_bytes(chunks):
    for frame, value in zip(record(chunks, spaced).frames, chunks, strict=True):
        assert frame.payload == spaced(value)
        assert frame.full == b"data: " + spaced(value) + b"\n\n"


@pytest.mark.parametrize("write", [compact, spaced, over_lines])
@pytest.mark.parametrize("chunks", STREAMS.values(), ids=STREAMS)
def test_a_recording_replays_what_the_live_stream_was(chunks, write):
    recorder = record(chunks, write)
    recording = recorder.recording(META, b"{}")
    assert recording.frames(None, usage=True) == [frame.full for frame in recorder.frames]
    assert recording.frames(None, usage=False) == [frame.plain for frame in recorder.frames]
    assert len(recording.stream(None, usage=True)) == recorder.size_bytes
    assert len(recording.sse) == recording.marks.size == recording.size_bytes - 2
    assert list(recording.marks.at_us) == [frame.at_us for frame in recorder.frames]


IDENTITIES = [
    None,
    Identity.fresh(ID, TOKEN, NOW),
    Identity(b'"x"', b"1"),
    Identity(b'"' + b"y" * 99 + b'"', b"12345678901"),
]


@pytest.mark.parametrize("write", [compact, spaced, over_lines])
@pytest.mark.parametrize("chunks", STREAMS.values(), ids=STREAMS)
def test_a_stream_is_its_frames_joined(chunks, write):
    recording = record(chunks, write).recording(META, b"{}")
    for identity, usage in product(IDENTITIES, (True, False)):
        assert recording.stream(identity, usage=usage) == b"".join(recording.frames(identity, usage=usage))


@pytest.mark.parametrize("line_end", ["\n", "\r", "\r\n"])
def test_a_frame_is_one_line_however_the_chunk_was_written(line_end):
    (frame,) = record([OPENAI[1]], lambda value: over_lines(value, line_end)).frames
    assert frame.payload == over_lines(OPENAI[1], " " * len(line_end))


@pytest.mark.parametrize("write", [compact, spaced])
@pytest.mark.parametrize("chunks", STREAMS.values(), ids=STREAMS)
def test_a_fresh_identity_changes_id_and_created_and_nothing_else(chunks, write):
    recording = record(chunks, write).recording(META, b"{}")
    for identity in IDENTITIES[1:]:
        fresh = [under(identity, value) for value in chunks]
        assert recording.stream(identity, usage=True) == b"".join(b"data: " + write(value) + b"\n\n" for value in fresh)
        assert parsed(recording.stream(identity, usage=False)) == [
            plain for value in fresh if (plain := without_usage(value))
        ]


NAMES = st.sampled_from(["id", "created", "usage", "choices", "obfuscation", "finish_reason", "x", '"id":'])
TEXT = st.text(max_size=6) | st.sampled_from([
    '"id":"x"', ',"usage":null', ',"usage":null}', '"finish_reason":"stop"', '"error":{}',
    f'"id":"{ID}"', '\\"', "\\", "\n\n",
    "data: [DONE]\n\n", "}", '{"id":"', f'{{"id":"{ID}","created":{CREATED},', '","obfuscation":"abc"}', "\u2028", "😀",
])  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | TEXT, inner, max_size=3),
    max_leaves=6,
)
CHOICES = st.lists(
    st.fixed_dictionaries(
        {"index": st.integers(0, 3), "delta": st.fixed_dictionaries({}, optional={"content": TEXT, "x": JSON})},
        optional={"finish_reason": st.none() | TEXT, "logprobs": JSON},
    ),
    max_size=2,
)  # fmt: skip
MEMBERS = {
    "id": st.sampled_from([ID, ID, ID, "other", "", None, 'q"uote']),
    "created": st.sampled_from([CREATED, CREATED, CREATED, 17415699521, 0, None, 7]),
    "choices": CHOICES,
    "usage": st.none() | st.just(USAGE) | st.just({}),
    "obfuscation": st.text(string.ascii_letters, max_size=4),
    "error": st.sampled_from([None, "", {}]),
    "x": JSON,
    "y": JSON,
}


@st.composite
def any_chunk(draw):
    names = draw(st.sampled_from([
        ["id", "created", "choices", "usage"], ["id", "created", "choices", "usage", "obfuscation"],
        ["id", "created", "choices"],
    ]) | st.lists(st.sampled_from(list(MEMBERS)), unique=True))  # fmt: skip
    return {name: draw(MEMBERS[name]) for name in names}


@given(st.lists(any_chunk(), max_size=5), st.sampled_from([compact, spaced, over_lines]), st.sampled_from(IDENTITIES[1:]))
@example([{"id": ID, "created": CREATED}, {"id": ID, "created": 17415699521}], compact, IDENTITIES[1])
@example([{"id": ID, "created": CREATED, "x": {"usage": None}}] * 2, compact, IDENTITIES[1])
@example([{"id": ID, "created": CREATED, "usage": None, "x": ',"usage":null'}] * 2, compact, IDENTITIES[1])
@example([{"id": ID, "created": CREATED, "usage": None, "x": {"a": 1, "usage": None}}] * 2, compact, IDENTITIES[1])
@example([{"id": ID, "created": CREATED, "usage": USAGE, "x": {"a": 1, "usage": None}}] * 2, compact, IDENTITIES[1])
def test_whatever_chunks_say_only_id_created_and_usage_are_touched(chunks, write, identity):
    recorder = record(chunks, write)
    recording = recorder.recording(META, b"{}")
    fresh = [under(identity, value) for value in chunks]
    assert [json.loads(frame.payload) for frame in recorder.frames] == chunks
    assert parsed(b"".join(frame.plain for frame in recorder.frames)) == [
        plain for value in chunks if (plain := without_usage(value)) is not None
    ]
    assert parsed(recording.stream(identity, usage=True)) == fresh
    assert parsed(recording.stream(identity, usage=False)) == [
        plain for value in fresh if (plain := without_usage(value)) is not None
    ]
    for usage in (True, False):
        assert recording.stream(identity, usage=usage) == b"".join(recording.frames(identity, usage=usage))
        assert recording.stream(None, usage=usage) == b"".join(recording.frames(None, usage=usage))


def test_a_stream_tells_id_finish_reasons_and_usage():
    recorder = record(OPENAI)
    assert (recorder.id, recorder.finish_reasons, recorder.usage) == (ID, {0: "stop"}, USAGE)
    recorder = record(AZURE)
    assert (recorder.id, recorder.finish_reasons, recorder.usage) == (ID, {0: "stop"}, USAGE)
    assert record([text("a"), text("b") | {"id": "other"}]).id == ID
    recorder = record(ALL_IN_ONE)
    assert (recorder.id, recorder.finish_reasons, recorder.usage) == (ID, {0: "stop"}, USAGE)


@pytest.mark.parametrize(
    ("choices", "reasons"),
    [
        ([[{"index": 1, "finish_reason": "stop"}], [{"index": 0, "finish_reason": "length"}]], {1: "stop", 0: "length"}),
        ([[{"finish_reason": "stop"}, {"finish_reason": "length"}]], {0: "stop", 1: "length"}),
        ([[{"finish_reason": "stop"}], [{"finish_reason": ""}], [{"finish_reason": None}], [{}]], {0: "stop"}),
        ([[{"index": 0, "finish_reason": 5}], [None, "x"], "stop", {"finish_reason": "stop"}, None], {}),
        ([[{"index": 0, "delta": {"finish_reason": "stop", "content": '"finish_reason":"stop"'}}]], {}),
    ],
)  # fmt: skip
def test_a_finish_reason_is_that_of_its_choice_and_the_last_one_that_says_something(choices, reasons):
    assert record([{"id": ID, "choices": value} for value in choices]).finish_reasons == reasons


@pytest.mark.parametrize("error", [{"message": "boom"}, "boom", True, ["boom"]])
def test_a_chunk_that_reports_an_error_is_returned_and_not_kept(error):
    recorder = record(OPENAI[:2])
    before = recorder.recording(META, b"{}").sse
    assert recorder.add(compact({"error": error}), 5) == {"error": error}
    assert recorder.add(compact(text("x", error=error)), 5) == text("x", error=error)
    assert len(recorder.frames) == 2
    assert recorder.recording(META, b"{}").sse == before


@pytest.mark.parametrize("value", [text("x", error=None), text('{"error":{"message":"x"}}'), {"choices": [{"error": "x"}]}])
def test_what_only_looks_like_an_error_is_kept(value):
    assert [json.loads(frame.payload) for frame in record([value]).frames] == [value]


@pytest.mark.parametrize(
    "payload",
    [
        b"", b" ", b"[DONE]", b"[]", b"null", b'"text"', b"Internal Server Error", b"<html>",
        b"{", b"{]", b"[{}]", b'{"id":"x"',
        b'{"id":"x","created":1,"choices":[{"delta":{"content":"a}', b'{"id":"x","created":1}}',
        b'{"id":"x\n"}', b'{"id":"\xff"}',
        compact(OPENAI[1])[:-1], compact(OPENAI[1])[:-2] + b"}", compact(OPENAI[1]) + b"}", compact(OPENAI[1])[:40] + b"}",
    ],
)  # fmt: skip
def test_a_chunk_that_is_no_json_object_is_refused_wherever_it_stands(payload):
    for recorder in (Recorder(), record(OPENAI)):
        count = len(recorder.frames)
        with pytest.raises(MalformedChunk):
            recorder.add(payload, 0)
        assert len(recorder.frames) == count


@given(st.integers(0, 200))
def test_a_chunk_that_is_cut_is_refused(at):
    payload = compact(OPENAI[2])
    recorder = record(OPENAI[:2])
    with pytest.raises(MalformedChunk):
        recorder.add(payload[: at % len(payload)], 0)


# Marks and meta


U32 = st.integers(0, 2**32 - 1)
VALUES = st.lists(st.binary(max_size=9), max_size=4).map(tuple)
ANY_MARKS = st.builds(
    Marks,
    U32,
    U32,
    st.lists(st.integers(0, 2**64 - 1), max_size=5).map(lambda numbers: array("Q", numbers)),
    st.lists(U32, max_size=3).map(lambda numbers: array("I", numbers)),
    VALUES,
    VALUES,
    VALUES,
)


@given(ANY_MARKS)
def test_marks_survive_packing(marks):
    assert Marks.unpack(marks.pack()) == marks


@given(ANY_MARKS, st.data())
def test_marks_that_are_cut_short_or_too_long_are_corrupt(marks, data):
    packed = marks.pack()
    for wrong in (packed[: data.draw(st.integers(0, len(packed) - 1))], packed + b"\0", packed * 2):
        with pytest.raises(CorruptRecording):
            Marks.unpack(wrong)


@given(st.binary(max_size=64))
def test_arbitrary_marks_raise_nothing_but_corrupt_recording(data):
    with contextlib.suppress(CorruptRecording):
        Marks.unpack(data)


def test_packed_marks_are_little_endian_and_tell_their_counts():
    packed = record([{"id": "abc", "created": 1, "usage": None}]).recording(META, b"").marks.pack()
    numbers = (29, 29, 1, 0, 1, 1, 1, 0, 0, 13, 5, 1)
    assert packed == b"".join(number.to_bytes(4, "little") for number in numbers) + b',"usage":null"abc"1'


def test_what_is_alike_in_all_frames_is_kept_once():
    recording = record(OPENAI).recording(META, b"")
    assert recording.marks.ids == (json.dumps(ID).encode(),)
    assert recording.marks.created == (b"%d" % CREATED,)
    assert len(recording.sse) < len(recording.stream(None, usage=True))


METAS = st.builds(
    Meta,
    api=st.text(max_size=3), model=st.text(max_size=3), upstream=st.text(max_size=3), id=st.text(max_size=3),
    started_at=st.floats(0, 1e10), written_at=st.floats(0, 1e10), duration_us=st.integers(0, 2**53), ttl_s=st.floats(0, 1e7),
    frames=st.integers(0, 10**6), finish_reasons=st.lists(st.text(max_size=3), max_size=2).map(tuple),
    usage=st.none() | st.just(USAGE), body_id=st.none() | st.tuples(st.integers(0, 9), st.integers(10, 20)),
    body_created=st.none() | st.tuples(st.integers(0, 9), st.integers(10, 20)), whole=st.booleans(),
    flight=st.text(max_size=3), runs=st.lists(st.tuples(st.text(max_size=3), st.integers(0, 10**6)), max_size=2).map(tuple),
    stale_s=st.floats(0, 1e7), size_bytes=st.integers(0, 2**53), tags=st.lists(st.text(max_size=3), max_size=2).map(tuple),
)  # fmt: skip


@given(METAS)
def test_meta_survives_being_written(meta):
    assert Meta.loads(meta.dumps()) == meta


def test_meta_that_is_cut_short_is_corrupt():
    written = META.dumps()
    for end in range(len(written)):
        with pytest.raises(CorruptRecording):
            Meta.loads(written[:end])


@pytest.mark.parametrize(
    "members",
    [
        {"unknown": 1},
        {"written_at": "x"},
        {"written_at": None},
        {"ttl_s": []},
        {"id": None},
        {"finish_reasons": 5},
        {"body_id": 5},
    ],
)
def test_meta_with_members_of_another_shape_is_corrupt(members):
    with pytest.raises(CorruptRecording):
        Meta.loads(compact({**json.loads(META.dumps()), **members}))


@pytest.mark.parametrize("name", ["api", "written_at", "id", "finish_reasons", "body_id"])
def test_meta_that_lacks_a_member_is_corrupt(name):
    with pytest.raises(CorruptRecording):
        Meta.loads(compact({key: value for key, value in json.loads(META.dumps()).items() if key != name}))


@pytest.mark.parametrize("data", [b"[]", b"null", b"5", b'"x"', b"{}", b"[[1,2]]", b"\xff"])
def test_meta_that_is_no_meta_is_corrupt(data):
    with pytest.raises(CorruptRecording):
        Meta.loads(data)


@pytest.mark.parametrize("recording", [Recording(META), Recording(META, b""), Recording(META, marks=Marks())])
def test_a_recording_without_the_asked_part_says_so(recording):
    with pytest.raises(CorruptRecording):
        recording.stream(None, usage=True)
    with pytest.raises(CorruptRecording):
        recording.frames(None, usage=True)
    with pytest.raises(CorruptRecording):
        recording.whole(None)
    assert recording.size_bytes == 0


# Identity and the whole body


@pytest.mark.parametrize(
    ("original", "fresh"),
    [
        (ID, "chatcmpl-" + TOKEN[:29]),
        ("cmpl-" + "x" * 28, "cmpl-" + TOKEN[:28]),
        ("cmpl-" + "x" * 23, "cmpl-" + TOKEN[:32]),
        ("chatcmpl-123", "chatcmpl-" + TOKEN[:32]),
        ("chatcmpl-" + "x" * 64, "chatcmpl-" + TOKEN[:64]),
        ("chatcmpl-" + "x" * 65, "chatcmpl-" + TOKEN[:32]),
        ("0195c1e5-9a4e-7d6c-8d1c-3b1c2f0a9e77", TOKEN[:36]),
        ("", TOKEN[:32]),
        ("gen-1741569952-AbCdEfGh", "gen-" + TOKEN[:32]),
        ("cmpl-" + "x" * 24, "cmpl-" + TOKEN[:24]),
        ("msg_01ABCDEFGHIJKLMNOPQRSTUVWXYZABC", "msg_" + TOKEN[:31]),
    ],
)
def test_a_fresh_identity_has_the_shape_of_the_original(original, fresh):
    assert Identity.fresh(original, TOKEN, NOW + 0.9) == Identity(compact(fresh), b"1999999999")


WHOLE = {
    "id": ID,
    "object": "chat.completion",
    "created": CREATED,
    "choices": [{"id": "inner", "created": 5}],
    "usage": USAGE,
}


@pytest.mark.parametrize("write", [compact, spaced, over_lines, lambda value: b"\r\n " + spaced(value) + b"\n"])
@pytest.mark.parametrize("body", [WHOLE, dict(reversed(WHOLE.items())), {"choices": []}, {"created": CREATED}, {"id": ID}])
@pytest.mark.parametrize("identity", IDENTITIES[1:])
def test_a_whole_answer_is_patched_in_id_and_created_only(write, body, identity):
    original = write(body)
    body_id, body_created = body_spans(original)
    meta = Meta.loads(META._replace(body_id=body_id, body_created=body_created).dumps())
    recording = Recording(meta, body=original)
    assert recording.whole(None) == original
    assert recording.whole(identity) == write(under(identity, body))


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"oops", b'{"id":"x"'])
def test_a_body_that_is_no_json_object_has_no_spans(body):
    with pytest.raises(MalformedChunk):
        body_spans(body)


def test_frames_that_begin_alike_keep_what_each_of_them_says():
    """Ids, times and usages of the same length at the same places, one usage before the id, and one id that is another's."""
    other = ID[:-1] + "X"
    chunks = [
        text("a", usage=None),
        text("b", usage=None) | {"id": other},
        text("c", usage=None) | {"created": CREATED + 1},
        {"usage": None, **text("d")},
        {"usage": None, **text("e")},
        text("f", usage=None),
        text("g"),
    ]
    recorder = Recorder()
    for each in chunks:
        recorder.add(orjson.dumps(each), 0)
    recording = recorder.recording(META, b"{}")
    loaded = Recording(META, recording.sse, Marks.unpack(recording.marks.pack()))
    said = [b"data: %s\n\n" % orjson.dumps(each) for each in chunks]
    assert loaded.frames(None, usage=True) == said
    assert loaded.stream(None, usage=True) == b"".join(said)
    fresh = [orjson.loads(frame[6:]) for frame in loaded.frames(Identity(b'"fresh"', b"7"), usage=True)]
    assert fresh == [each | {"id": "fresh", "created": 7} for each in chunks]

import contextlib
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.sse import Decoder, Event, EventTooLarge, comment, encode

LIMIT = 1 << 20


def decode(*pieces, limit=LIMIT):
    decoder = Decoder(limit)
    return [event for piece in pieces for event in decoder.feed(piece)]


def byte_by_byte(data):
    return [data[at : at + 1] for at in range(len(data))]


def reference(stream):  # noqa: C901  # it follows the standard's text
    """The WHATWG text, word by word (https://html.spec.whatwg.org/#event-stream-interpretation), on bytes."""
    stream = stream.removeprefix(b"\xef\xbb\xbf")
    lines, line, skip_lf = [], b"", False
    for byte in byte_by_byte(stream):
        if skip_lf and byte == b"\n":
            skip_lf = False
            continue
        skip_lf = byte == b"\r"
        if byte in b"\r\n":
            lines.append(line)
            line = b""
        else:
            line += byte
    events = []
    data_buffer = event_type_buffer = last_event_id_buffer = b""
    for line in lines:
        if line == b"":
            if data_buffer:
                events.append(Event(data_buffer[:-1], event_type_buffer, last_event_id_buffer))
            data_buffer = event_type_buffer = b""
            continue
        if line.startswith(b":"):
            continue
        field, value = line, b""
        if b":" in line:
            field, value = line[: line.index(b":")], line[line.index(b":") + 1 :]
            value = value[1:] if value[:1] == b" " else value
        if field == b"event":
            event_type_buffer = value
        elif field == b"data":
            data_buffer += value + b"\n"
        elif field == b"id" and b"\x00" not in value:
            last_event_id_buffer = value
    return events


FIELD = st.sampled_from([
    b"data", b"data:", b"data: ", b"data:  x", b"data: {}", b"data: a:b", b"data: \xef\xbb\xbf", b"datax: y", b" data: y",
    b"event: ping", b"event", b"id: 7", b"id:", b"id: a\0b", b"retry: 10", b": comment", b":", b"nonsense", b"", b"", b"",
])  # fmt: skip
LINE_END = st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"])
STREAM = st.builds(
    lambda bom, lines, rest: bom + b"".join(part for line in lines for part in line) + rest,
    st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xef\xbb", b"\xef"]),
    st.lists(st.tuples(FIELD, LINE_END), max_size=16),
    st.sampled_from([b"", b"data: cut", b"\xef\xbb\xbf"]),
) | st.binary(max_size=60)  # fmt: skip
CUTS = st.lists(st.integers(0, 200), max_size=6)
VALUE = st.binary(max_size=20).map(lambda value: value.replace(b"\r", b"").replace(b"\n", b""))
EVENTS = st.builds(
    Event,
    data=st.lists(VALUE, min_size=1, max_size=3).map(b"\n".join),
    event=VALUE,
    id=VALUE.map(lambda value: value.replace(b"\0", b"")),
)


@given(STREAM)
@example(b"\xef\xbb\xbfdata: x\r\n\r\n")
@example(b"data: x\r\rdata: y\r\r")
@example(b"\n\ndata: x\n\n\n\ndata:y\n\n")
def test_decodes_as_the_whatwg_text_does(stream):
    assert decode(stream) == reference(stream)


@given(STREAM, CUTS)
def test_how_the_bytes_are_cut_does_not_matter(stream, cuts):
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    pieces = [stream[start:end] for start, end in pairwise(edges)]
    assert decode(*pieces) == decode(*byte_by_byte(stream)) == decode(stream) == decode(b"", stream, b"")


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 40))
def test_arbitrary_bytes_raise_nothing_but_event_too_large(pieces, limit):
    with contextlib.suppress(EventTooLarge):
        decode(*pieces, limit=limit)


@given(STREAM, st.integers(1, 30))
@example(b"data\ndata: \ndata:  x\ndata: a:b\n\n", 30)
def test_whether_an_event_is_too_large_does_not_depend_on_the_cuts(stream, limit):
    def verdict(pieces):
        try:
            return decode(*pieces, limit=limit)
        except EventTooLarge:
            return "too large"

    assert verdict([stream]) == verdict(byte_by_byte(stream))


@given(EVENTS)
def test_decoding_an_encoded_event_gives_it_back(event):
    assert decode(encode(event.data, event=event.event, id=event.id)) == [event]


@given(st.lists(EVENTS, max_size=6))
def test_encoded_events_do_not_touch_each_other(events):
    stream = b"".join(encode(event.data, event=event.event, id=event.id) + comment(b"idle") for event in events)
    assert [event[:2] for event in decode(stream)] == [event[:2] for event in events]


@given(st.binary(max_size=40))
def test_an_encoded_event_is_one_event_whatever_its_data(data):
    (event,) = decode(encode(data))
    assert event.data == data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: This is the first message.\n\ndata: This is the second message, it\ndata: has two lines.\n\n",
         [Event(b"This is the first message."), Event(b"This is the second message, it\nhas two lines.")]),
        (b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\n",
         [Event(b"73857293", b"add"), Event(b"2153", b"remove")]),
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [Event(b"YHOO\n+2\n10")]),
        (b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
         [Event(b"first event", id=b"1"), Event(b"second event"), Event(b" third event")]),
        (b"data\n\ndata\ndata\n\ndata:", [Event(b""), Event(b"\n")]),
        (b"data:test\n\ndata: test\n\n", [Event(b"test"), Event(b"test")]),
    ],
)  # fmt: skip
def test_the_examples_of_the_standard(stream, events):
    assert decode(stream) == events


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: [DONE]\n\n", [Event(b"[DONE]")]),
        (b"data: cut off", []),
        (b"data: no blank line\n", []),
        (b"data:\n\n", [Event(b"")]),
        (b"event: ping\n\ndata: {}\n\n", [Event(b"{}")]),
        (b"id: 1\n\ndata: a\n\ndata: b\n\nid\ndata: c\n\n", [Event(b"a", id=b"1"), Event(b"b", id=b"1"), Event(b"c")]),
        (b"id: 1\ndata: a\n\nid: 2\0\ndata: b\n\n", [Event(b"a", id=b"1"), Event(b"b", id=b"1")]),
        (b": keep-alive\n\ndata: a\n\n", [Event(b"a")]),
        (b": glued\ndata: a\n\n", [Event(b"a")]),
        (b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n", [Event(b"a")]),
        (b"Data: a\n\n", []),
        ('data: "\u2028\x85\x0b"\n\n'.encode(), [Event('"\u2028\x85\x0b"'.encode())]),
    ],
)
def test_what_servers_send_besides(stream, events):
    assert decode(stream) == decode(*byte_by_byte(stream)) == events


@pytest.mark.parametrize("piece", [b"x" * 100, b"data: x\n", b": comment" * 9, b"data:\n" * 20])
def test_an_endless_event_is_refused_before_it_fills_the_memory(piece):
    decoder = Decoder(10_000)
    tracemalloc.start()
    try:
        with pytest.raises(EventTooLarge):
            [decoder.feed(piece) for _ in range(20_000)]
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("cut", [0, 1, 60, 107])
def test_an_event_at_the_limit_passes_and_does_not_count_for_the_next(cut):
    stream = b"data: " + b"x" * 94 + b"\n\ndata: " + b"y" * 94 + b"\n\n"
    assert len(decode(stream[:cut], stream[cut:], limit=100)) == 2
    with pytest.raises(EventTooLarge):
        decode(stream[:cut], stream[cut:], limit=99)


def test_an_endless_stream_of_small_events_is_no_large_event():
    decoder = Decoder(100)
    assert sum(len(decoder.feed(b"data: 12345678\n\n: x\n\nid: 1\ndata: 1\r\n\r\n")) for _ in range(1000)) == 2000

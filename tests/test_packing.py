"""Values that are compressed: what is packed is unpacked, and nothing else is taken for it."""

import asyncio
import threading
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import RECORDING, large

from gateway.core.recording import CorruptRecording
from gateway.errors import StoreCorrupt, StoreUnavailable
from gateway.store import packing
from gateway.store.packing import FIELDS, VERSION, CompressionParameter, Packer, ZstdCompressor, unpack

TEXT = b"".join(b'data: {"id":"chatcmpl-1","choices":[{"delta":{"content":"%d"}}]}\n\n' % number for number in range(300))
MAGIC = b"\x28\xb5\x2f\xfd"
VALUE = Packer(1).pack(TEXT)
# RFC 8878, 3.1.1: a single segment whose content size has 8 bytes, then one last block that repeats a byte.
BOMB = MAGIC + b"\xe0" + (10 << 30).to_bytes(8, "little") + b"\x03\x00\x10" + b"x"


def zstd(text: bytes, **options: int) -> bytes:
    names = {getattr(CompressionParameter, name): value for name, value in options.items()}
    return ZstdCompressor(options=names).compress(text, ZstdCompressor.FLUSH_FRAME)


def of_fields(**fields: bytes) -> list[bytes]:
    """All fields of a stored recording."""
    stored = {
        "v": VERSION,
        "meta": RECORDING.meta.dumps(),
        "sse": RECORDING.sse,
        "marks": RECORDING.marks.pack(),
        "body": RECORDING.body,
        "req": b"",
        **fields,
    }
    return [stored[name] for name in FIELDS["all"]]


PACKER = Packer(1)


@given(st.one_of(st.binary(), st.text().map(str.encode), st.binary(max_size=9).map(lambda text: text * 5000)))
def test_what_is_packed_is_unpacked(text):
    if not text.startswith(MAGIC):  # as no text does
        assert unpack(PACKER.pack(text)) == text


@given(st.text().map(str.encode))
def test_no_text_begins_as_a_compressed_value_does(text):
    assert not text.startswith(MAGIC)


@pytest.mark.parametrize("size", [131_071, 131_072, 131_073, 262_144, 1 << 20])
def test_sizes_of_whole_blocks_come_back(size):
    text = (TEXT * (size // len(TEXT) + 1))[:size]
    assert PACKER.pack(text) != text
    assert unpack(PACKER.pack(text)) == text


@pytest.mark.parametrize(("from_bytes", "packed"), [(0, False), (1, True), (len(TEXT), True), (len(TEXT) + 1, False)])
def test_only_what_is_large_enough_is_compressed(from_bytes, packed):
    assert Packer(from_bytes).pack(TEXT).startswith(MAGIC) is packed


def test_what_does_not_shrink_stays_as_it_is():
    noise = bytes(range(256))
    assert PACKER.pack(noise) == noise
    assert PACKER.pack(b"") == b""


def test_a_packer_that_compressed_something_else_before_does_it_the_same():
    packer = Packer(1)
    packer.pack(TEXT * 40)
    assert packer.pack(TEXT) == VALUE


def test_every_beginning_of_a_value_is_corrupt():
    for end in range(len(MAGIC), len(VALUE)):
        with pytest.raises(CorruptRecording):
            unpack(VALUE[:end])


def test_a_bit_that_flipped_is_found_out():
    for place in range(8 * len(MAGIC), 8 * len(VALUE)):
        value = bytearray(VALUE)
        value[place // 8] ^= 1 << place % 8
        try:
            text = unpack(bytes(value))
        except CorruptRecording:
            continue
        assert text == TEXT, place  # some bits of a header say how to do it, not what


@given(st.binary())
def test_whatever_begins_like_a_value_is_text_or_corrupt(rest):
    with suppress(CorruptRecording):
        unpack(MAGIC + rest)


@pytest.mark.parametrize("behind", [b"\0", VALUE, MAGIC, b"\x50\x2a\x4d\x18\x00\x00\x00\x00"])
def test_a_value_with_something_behind_it_is_corrupt(behind):
    with pytest.raises(CorruptRecording):
        unpack(VALUE + behind)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(BOMB, id="that it is huge"),
        pytest.param(zstd(TEXT, content_size_flag=0), id="nothing"),
        pytest.param(zstd(b""), id="that it is nothing"),
    ],
)
def test_what_a_value_says_of_its_size_has_to_be_sensible(value, monkeypatch):
    def never():
        raise AssertionError("it is not to be decompressed")

    monkeypatch.setattr(packing, "ZstdDecompressor", never)
    with pytest.raises(CorruptRecording, match="says"):
        unpack(value)


def test_a_value_that_becomes_more_than_it_says_is_corrupt():
    said = (len(TEXT) - 256).to_bytes(2, "little")
    at = VALUE.index(said)
    assert at < 9
    for more in (-1, 1):
        with pytest.raises(CorruptRecording):
            unpack(VALUE[:at] + (len(TEXT) - 256 + more).to_bytes(2, "little") + VALUE[at + 2 :])


@pytest.mark.parametrize("name", ["sse", "body", "req"])
@pytest.mark.parametrize("value", [BOMB, VALUE[:-1], VALUE + b"\0", MAGIC])
async def test_a_recording_with_such_a_value_is_corrupt(name, value):
    packer = Packer(1)
    with pytest.raises(StoreCorrupt):
        await packer.load("all", of_fields(**{name: value}))
    packer.close()


async def test_what_is_large_is_packed_and_unpacked_in_a_thread(monkeypatch):
    used = []

    def noted(pack):
        def act(*args):
            used.append(threading.current_thread())
            return pack(*args)

        return act

    packer = Packer(1)
    monkeypatch.setattr(packing, "_load", noted(packing._load))
    monkeypatch.setattr(Packer, "_packed", noted(Packer._packed))
    for recording, elsewhere in ((RECORDING, False), (large(1 << 20), True)):
        used.clear()
        sse, body, request = await packer.pack_all([recording.sse, recording.body, TEXT])
        fields = of_fields(sse=sse, body=body, req=request, marks=recording.marks.pack())
        assert await packer.load("all", fields) == replace(recording, request=TEXT)
        assert {thread is not threading.main_thread() for thread in used} == {elsewhere}
    packer.close()


async def test_large_values_at_once_come_back_each_as_itself():
    packer = Packer(1)
    texts = [large(600_000 + number).sse for number in range(8)]
    values = await asyncio.gather(*(packer.pack_all([text]) for text in texts))
    assert [unpack(value) for [value] in values] == texts
    packer.close()


async def test_a_closed_packer_says_that_the_store_is_closed():
    packer = Packer(1)
    [value] = await packer.pack_all([large(1 << 20).sse])
    packer.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await packer.load("all", of_fields(sse=value))
    with pytest.raises(StoreUnavailable, match="closed"):
        await packer.pack_all([large(1 << 20).sse])

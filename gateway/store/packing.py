"""How a recording is kept in a hash: which fields it has, and which of them are compressed (zstd, RFC 8878).

A compressed value is known by the four bytes that zstd begins with. No text does: the second of them, B5, continues a
character in UTF-8, and the first, ``(``, is one of its own; frames begin with ``data:`` besides, and JSON never with ``(``.
"""

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gateway.core.recording import SCHEMA_VERSION, CorruptRecording, Marks, Meta, Recording
from gateway.errors import StoreCorrupt, StoreUnavailable

if sys.version_info >= (3, 14):
    from compression.zstd import CompressionParameter, ZstdCompressor, ZstdDecompressor, ZstdError, get_frame_info
else:
    from backports.zstd import CompressionParameter, ZstdCompressor, ZstdDecompressor, ZstdError, get_frame_info

FIELDS = {
    "meta": ("v", "meta"),
    "stream": ("v", "meta", "sse", "marks"),
    "whole": ("v", "meta", "body"),
    "timed": ("v", "meta", "marks", "body"),
    "all": ("v", "meta", "sse", "marks", "body", "req"),
}
"""What is loaded of a recording for whom. Only an inspection needs all."""
VERSION = b"%d" % SCHEMA_VERSION

_MAGIC = b"\x28\xb5\x2f\xfd"
# A level more compresses frames no further, at half as much again. The checksum finds what was changed behind our back.
_OPTIONS: Mapping[int, int] = {CompressionParameter.compression_level: 1, CompressionParameter.checksum_flag: 1}
_WORTH_IT = 0.9
# Of what a value may say that it becomes: a few bytes can say anything.
_MAX_BYTES = 268_435_456
# From here on a thread does it: half a millisecond and more, for text that is compressed or decompressed.
_MANY_BYTES_TO_PACK = 262_144
_MANY_BYTES_TO_UNPACK = 524_288
_THREADS = 2

Done = TypeVar("Done")


def unpack(value: bytes) -> bytes:
    """The text of a value, compressed or not. Raises `CorruptRecording`."""
    if not value.startswith(_MAGIC):
        return value
    size = _unpacked_size(value)
    decompressor = ZstdDecompressor()
    try:
        # With room for one byte more, so that it comes to its end, and a frame that says too little is found out.
        text = decompressor.decompress(value, size + 1)
    except ZstdError as error:
        raise CorruptRecording(f"a field does not decompress: {error}") from None
    if not decompressor.eof or decompressor.unused_data or len(text) != size:
        raise CorruptRecording("a compressed field is not as long as it says")
    return text


def _unpacked_size(value: bytes) -> int:
    """How many bytes a compressed value says that it becomes. Raises `CorruptRecording` where it says none, or too many."""
    try:
        size = get_frame_info(value).decompressed_size
    except ZstdError as error:
        raise CorruptRecording(f"a field does not decompress: {error}") from None
    if not size or size > _MAX_BYTES:
        raise CorruptRecording(f"a compressed field says that it has {size} bytes")
    return size


class Packer:
    """Compresses what has ``from_bytes`` bytes or more (0: nothing), and loads what is stored, compressed or not.

    Both take a thread where the event loop would stand still for too long.
    """

    def __init__(self, from_bytes: int) -> None:
        self._from_bytes = from_bytes
        # Made once: that takes longer than a small value. It serves this thread only, or a large value would hold it up.
        self._compressor = ZstdCompressor(options=_OPTIONS)
        # Of its own: models of LangChain's may hold all threads of the loop's.
        self._threads = ThreadPoolExecutor(_THREADS, "packing")

    def pack(self, text: bytes) -> bytes:
        """The value that is stored for a text."""
        return self._packed(text, self._compressor)

    async def pack_all(self, texts: Sequence[bytes]) -> list[bytes]:
        """The values that are stored for texts. Raises `StoreUnavailable` once it is closed."""
        if not self._from_bytes or sum(map(len, texts)) < _MANY_BYTES_TO_PACK:
            return [self.pack(text) for text in texts]
        return await self._in_thread(self._pack_many, texts)

    async def load(self, want: str, fields: Sequence[bytes | None]) -> Recording | None:
        """The recording of a hash's `FIELDS`, or None if there is none. Raises `StoreCorrupt`, and as `pack_all`."""
        try:
            compressed = [field for field in fields if field and field.startswith(_MAGIC)]
            if compressed and sum(map(_unpacked_size, compressed)) >= _MANY_BYTES_TO_UNPACK:
                return await self._in_thread(_load, want, fields)
            return _load(want, fields)
        except CorruptRecording as error:
            raise StoreCorrupt(str(error)) from None

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    def _pack_many(self, texts: Sequence[bytes]) -> list[bytes]:
        compressor = ZstdCompressor(options=_OPTIONS)
        return [self._packed(text, compressor) for text in texts]

    def _packed(self, text: bytes, compressor: ZstdCompressor) -> bytes:
        if not self._from_bytes or len(text) < self._from_bytes:
            return text
        value = compressor.compress(text, ZstdCompressor.FLUSH_FRAME)
        return value if len(value) <= len(text) * _WORTH_IT else text

    async def _in_thread(self, act: Callable[..., Done], *args: object) -> Done:
        try:
            working = asyncio.get_running_loop().run_in_executor(self._threads, act, *args)
        except RuntimeError:
            raise StoreUnavailable("the store is closed") from None
        return await working


def _load(want: str, fields: Sequence[bytes | None]) -> Recording | None:
    """Raises `CorruptRecording`."""
    version, meta, *parts = fields
    if version is None and all(field is None for field in fields):
        return None
    if version != VERSION:
        raise CorruptRecording(f"its schema is {version!r}, not {VERSION!r}")
    if meta is None or None in parts:
        raise CorruptRecording("a field is missing")
    loaded = Meta.loads(meta)
    if want == "meta":
        return Recording(loaded)
    if want == "whole":
        return Recording(loaded, body=unpack(parts[0] or b""))
    if want == "timed":
        return Recording(loaded, marks=Marks.unpack(parts[0] or b""), body=unpack(parts[1] or b""))
    sse, marks = unpack(parts[0] or b""), Marks.unpack(parts[1] or b"")
    if marks.size != len(sse):
        raise CorruptRecording("the marks are of other frames")
    if want == "stream":
        return Recording(loaded, sse, marks)
    return Recording(loaded, sse, marks, unpack(parts[2] or b""), unpack(parts[3] or b""))

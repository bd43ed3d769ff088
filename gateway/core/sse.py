"""Server-sent events, as the WHATWG HTML standard section 9.2 reads and writes them."""

from typing import NamedTuple

_BOM = b"\xef\xbb\xbf"
_LF, _CR = b"\n\r"  # as numbers, which are found in bytes at once


class Event(NamedTuple):
    """One server-sent event. ``event`` is empty where the stream named no type."""

    data: bytes
    event: bytes = b""
    id: bytes = b""


class EventTooLarge(ValueError):
    """An event is over the decoder's limit: an endless line would fill the memory."""


class Decoder:
    """Bytes in, events out; how the bytes were cut does not matter.

    Lines end with LF, CR or CRLF; a leading BOM is dropped; an event without any ``data`` line is not
    dispatched, but its ``id`` sticks; an event that the stream's end leaves open is dropped.
    No line, together with the data before it in its event, may be larger than ``max_event_bytes``.
    """

    def __init__(self, max_event_bytes: int = 64 << 20) -> None:
        self._max_event_bytes = max_event_bytes
        self._tail = bytearray()
        self._at_start = True
        self._after_cr = False
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._event = b""
        self._id = b""

    def feed(self, data: bytes) -> list[Event]:
        """Returns the events that ``data`` completes; raises `EventTooLarge`, and is of no use after that."""
        if not data:
            return []
        if self._at_start:
            return self._feed_start(data)
        if not (self._tail or self._data or self._event or self._after_cr) and _CR not in data:
            return self._feed_fast(data)
        return self._feed_slow(data)

    def _feed_start(self, data: bytes) -> list[Event]:
        self._tail += data
        if len(self._tail) < len(_BOM) and _BOM.startswith(self._tail):
            return []
        rest = bytes(self._tail).removeprefix(_BOM)
        self._tail.clear()
        self._at_start = False
        return self.feed(rest)

    def _feed_fast(self, data: bytes) -> list[Event]:
        """Whole events of one ``data:`` line each, which is what every model server sends."""
        events: list[Event] = []
        start = 0
        while (end := data.find(b"\n\n", start)) >= 0:
            block = data[start:end]
            if not block.startswith(b"data:") or _LF in block or len(block) > self._max_event_bytes:
                return events + self._feed_slow(data[start:])
            events.append(Event(block[6:] if block[5:6] == b" " else block[5:], b"", self._id))
            start = end + 2
        if start < len(data):
            events += self._feed_slow(data[start:])
        return events

    def _feed_slow(self, data: bytes) -> list[Event]:
        if self._after_cr:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if _CR in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        # The tail holds no line end, so only the new bytes are searched.
        events: list[Event] = []
        if _LF in data:
            *lines, data = (bytes(self._tail) + data).split(b"\n")
            self._tail.clear()
            events = [event for line in lines if (event := self._line(line)) is not None]
        self._tail += data
        self._admit(len(self._tail))
        return events

    def _admit(self, line_bytes: int) -> None:
        if line_bytes and self._data_bytes + line_bytes > self._max_event_bytes:
            raise EventTooLarge(f"an event is larger than {self._max_event_bytes} bytes")

    def _line(self, line: bytes) -> Event | None:
        if not line:
            return self._dispatch()
        self._admit(len(line))
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(line) + 1
        elif name == b"event":
            self._event = value
        elif name == b"id" and b"\0" not in value:
            self._id = value
        return None

    def _dispatch(self) -> Event | None:
        data, self._data, self._data_bytes = self._data, [], 0
        event, self._event = self._event, b""
        return Event(b"\n".join(data), event, self._id) if data else None


def encode(data: bytes, *, event: bytes = b"", id: bytes = b"") -> bytes:  # noqa: A002  # the field's name
    """One event as bytes. Line breaks in ``data`` become several ``data`` lines; ``event`` and ``id`` have none."""
    head = (b"event: " + event + b"\n" if event else b"") + (b"id: " + id + b"\n" if id else b"")
    if b"\n" in data or b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\ndata: ")
    return head + b"data: " + data + b"\n\n"


def comment(text: bytes) -> bytes:
    """A comment as a block of its own: what keeps an idle stream alive."""
    return b": " + text + b"\n\n"

"""A model of a flight and its readers: whatever happens in whatever order, the laws hold.

No loop runs: all that is tested here happens at once.
"""

from dataclasses import dataclass

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
from scripted import USAGE, chunk

from gateway import reader as reader_module
from gateway.core.apis import CHAT
from gateway.core.content import Trace
from gateway.core.key import CacheKey
from gateway.core.stream_id import Cursor
from gateway.errors import (
    GatewayError,
    InvalidRequest,
    ReaderTooSlow,
    StreamCancelled,
    StreamLost,
    UpstreamBroke,
)
from gateway.flight import Complete, Failed, Flight
from gateway.ports import FlightId, LogName
from gateway.reader import EventIds, FlightReader

MAX_BYTES = 2000
PIECE_BYTES = 600
NAME = LogName(CacheKey("a" * 40), FlightId("b" * 16))
TOKEN = "t" * 80
KINDS = ("text", "usage beside text", "no usage yet", "usage only")


@dataclass(frozen=True)
class Said:
    """One chunk as the upstream sent it, and what each kind of caller may see of it."""

    payload: bytes
    full: bytes
    plain: bytes

    @classmethod
    def of(cls, kind: str, size: int) -> "Said":
        plain = chunk({"content": "x" * size})
        if kind == "usage only":
            payload = orjson.dumps({**plain, "choices": [], "usage": USAGE})
            return cls(payload, framed(payload), b"")
        payload = orjson.dumps(
            plain | {"usage beside text": {"usage": USAGE}, "no usage yet": {"usage": None}}.get(kind, {})
        )
        return cls(payload, framed(payload), framed(orjson.dumps(plain)))

    def shown(self, *, usage: bool) -> bytes:
        return self.full if usage else self.plain


def framed(payload: bytes) -> bytes:
    return b"data: " + payload + b"\n\n"


@dataclass(eq=False)
class Caller:
    """A reader, and what it should see: all that is said from the event ``after`` on."""

    reader: FlightReader
    usage: bool
    after: int
    too_late: bool
    seen: bytes = b""
    cancelled: bool = False
    backlog_when_cut: int = 0
    looked_at: int = 0

    @property
    def nonce(self) -> str:
        return self.reader.nonce


class FlightModel(RuleBasedStateMachine):
    callers = Bundle("callers")

    def __init__(self):
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(reader_module, "_PIECE_BYTES", PIECE_BYTES)
        self.unread = 0
        self.flight = Flight(CHAT, NAME, "00000001", started_at=0.0, max_bytes=MAX_BYTES)
        self.flight.on_unread = self._count_unread
        self.flight.land_head({})
        self.said: list[Said] = []
        self.present: list[Caller] = []
        self.joined = 0

    def teardown(self):
        self._patch.undo()

    def _count_unread(self):
        self.unread += 1

    def shown(self, usage, first=0, last=None):
        """What such a caller may see of the chunks from ``first`` to ``last``."""
        return [data for each in self.said[first:last] if (data := each.shown(usage=usage))]

    def backlog(self, caller):
        """The bytes of what it has not read, or, while its place is not known, of what came after it last looked."""
        if caller.reader._place:
            return sum(len(each.full) for each in self.said[caller.looked_at :])
        place, events = 0, caller.after + self.events_in(caller)
        while place < len(self.said) and events:
            events -= bool(self.said[place].shown(usage=caller.usage))
            place += 1
        # Where nothing but usage follows, a caller who sees none of it may stand behind it or before it.
        while not caller.usage and place < len(self.said) and not self.said[place].plain and place < caller.reader.at:
            place += 1
        return sum(len(each.full) for each in self.said[place:])

    def events_in(self, caller):
        return caller.seen.count(b"data: ")

    # What may happen

    @precondition(lambda self: self.flight.outcome is None)
    @rule(batch=st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([0, 5, 300, 900, 2500])), min_size=1, max_size=4))
    def append(self, batch):
        before = sum(len(frame.full) for frame in self.flight.frames)
        new = [Said.of(kind, size) for kind, size in batch]
        self.flight.append([each.payload for each in new], len(self.said))
        self.said += new
        cut_now = self._note_who_was_cut()
        if before + sum(len(each.full) for each in new) > MAX_BYTES:
            self._check_that_nothing_is_kept_in_vain(cut_now)

    def _note_who_was_cut(self):
        """Only who is behind by more than the bound, and all of these."""
        cut_now = False
        for caller in self.present:
            behind = self.backlog(caller)
            if caller.cancelled or caller.too_late or caller.backlog_when_cut:
                continue
            error = caller.reader._error
            assert isinstance(error, ReaderTooSlow) == (behind > MAX_BYTES), (error, behind)
            if error:
                caller.backlog_when_cut = behind
                cut_now = True
        return cut_now

    def _check_that_nothing_is_kept_in_vain(self, cut_now):
        """Past the bound, what all have read is let go of."""
        flight = self.flight
        assert flight.overflowed
        needed_from = min((follower.at for follower in flight.followers), default=flight.count)
        assert flight.base == needed_from or cut_now

    @rule(target=callers, usage=st.booleans(), ids=st.booleans(), data=st.data())
    def join(self, usage, ids, data):
        """From the start, or behind the event of a cursor that an earlier connection got, as far as beyond the end."""
        known = len(self.shown(usage))
        after = data.draw(st.just(0) | st.integers(0, known + 3), "after")
        position = data.draw(st.booleans(), "position") and 0 < after <= known
        cursor = Cursor(after, self._position(usage, after) if position else "")
        reader = FlightReader(
            self.flight, usage=usage, cursor=cursor, run=self.flight.run, ids=EventIds(TOKEN) if ids else None
        )
        self.joined += 1
        reader.nonce = str(self.joined)
        reader._seeks()  # as the head of its answer does
        gone = len(self.shown(usage, 0, self.flight.base))
        caller = Caller(reader, usage, after, too_late=after < gone, looked_at=len(self.said))
        assert isinstance(reader._error, StreamLost) == caller.too_late
        self.present.append(caller)
        return caller

    def _position(self, usage, after):
        trace = Trace()
        for each in self.said:
            if after == 0:
                break
            trace.add(orjson.loads(each.payload))
            after -= bool(each.shown(usage=usage))
        return trace.position()

    @rule(caller=callers)
    def read_a_piece(self, caller):
        self._take(caller)

    @rule(caller=callers)
    def read_on(self, caller):
        while self._take(caller):
            pass

    def _take(self, caller):
        data = caller.reader.take()
        caller.looked_at = len(self.said)
        caller.seen += self._without_ids(caller, data)
        return data

    def _without_ids(self, caller, data):
        """The ids tell the number of each event: none is left out, none comes twice."""
        if not caller.reader.ids:
            return data
        number, plain = caller.after + self.events_in(caller), b""
        for event in data.split(b"\n\n")[:-1]:
            stamp, rest = event.split(b"\n", 1)
            number += 1
            assert stamp.startswith(b"id: %b.%d" % (TOKEN.encode(), number))
            plain += rest + b"\n\n"
        return plain

    @rule(caller=consumes(callers))
    def leave(self, caller):
        before, self.unread = len(self.present), 0
        self.present.remove(caller)
        caller.reader.leave()
        assert self.unread == (before == 1 and self.flight.outcome is None)
        assert caller.reader not in self.flight.followers

    @rule(caller=callers)
    def cancel(self, caller):
        told = caller.reader._error
        self.flight.cancel([caller.nonce])
        if told is None:
            assert isinstance(caller.reader.error, StreamCancelled)
        caller.cancelled = True

    @precondition(lambda self: self.flight.outcome is None)
    @rule(well=st.booleans())
    def close(self, well):
        self.flight.close(Complete() if well else Failed(UpstreamBroke("It broke.")))

    # The laws

    @invariant()
    def memory_is_bounded(self):
        assert sum(len(frame.full) for frame in self.flight.frames) <= MAX_BYTES

    @invariant()
    def the_log_counts_all_that_was_said(self):
        flight = self.flight
        assert flight.count == len(self.said)
        assert [frame.full for frame in flight.frames] == [each.full for each in self.said[flight.base :]]
        assert flight.overflowed or flight.base == 0
        assert flight.readers == len(self.present)

    @invariant()
    def each_reader_has_seen_what_it_may_see_in_order(self):
        for caller in self.present:
            events = self.shown(caller.usage)[caller.after :]
            assert b"".join(events).startswith(caller.seen)
            assert b"".join(events[: self.events_in(caller)]) == caller.seen

    @invariant()
    def who_is_at_the_end_has_seen_all_or_knows_why_not(self):
        for caller in self.present:
            reader = caller.reader
            if reader.at_end:
                assert self.flight.outcome or reader._error
            if reader.at_end and not reader._error:
                assert caller.seen == b"".join(self.shown(caller.usage)[caller.after :])

    @invariant()
    def only_who_has_a_reason_is_cut(self):
        for caller in self.present:
            error = caller.reader._error
            beyond = caller.after > len(self.shown(caller.usage)) + 1
            if error and error is self.flight.error:  # who has seen more than there is, is told why there is no more
                assert beyond
                continue
            reasons = {
                UpstreamBroke: beyond and error is self.flight.error,  # else it might have come to there
                type(None): True,
                StreamCancelled: caller.cancelled,
                ReaderTooSlow: caller.backlog_when_cut > MAX_BYTES,
                StreamLost: caller.too_late,
                InvalidRequest: beyond and self.flight.outcome is not None,
            }
            assert reasons.get(type(error), False), error

    @invariant()
    def the_end_says_how_it_ended(self):
        for caller in self.present:
            reader = caller.reader
            if not reader.at_end:
                continue
            end = reader.end()
            total = len(self.shown(caller.usage))
            if reader.over:
                assert end == b""
                assert caller.after == total + 1
            elif isinstance(reader.error, GatewayError):
                assert orjson.loads(end.split(b"data: ")[1])["error"]["message"] == reader.error.message
            else:
                assert end.endswith(b"data: [DONE]\n\n")
            final = bool(reader.ids) and reader._error is None and not reader.over
            assert (b"id: %b.%d" % (TOKEN.encode(), total + 1) in end) == final


TestFlightModel = FlightModel.TestCase
TestFlightModel.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)

"""A flight that another replica writes, as this one reads it: once, however many readers it has here."""

import asyncio
import logging
from typing import Any, Literal

import orjson

from gateway.errors import StoreError, StreamDiverged, StreamLost, retold
from gateway.flight import Abandoned, Complete, Failed, Flight
from gateway.ports import LOG_START, Entry, FlightId, LogName, Mirrored, Page, Store

log = logging.getLogger(__name__)

# The doorbell tells what has come; a slow look is the net for a ring that was lost.
_LOOKS_PER_LEASE = 2.5
_AGAIN_S = 0.25
# A lease is gone a moment after it should be, not before.
_SLACK_S = 0.01
# Of a lease, in which others may rely on it that no call goes on alone here: the clocks of two machines differ a little.
_PROMISE_SHARE = 0.9

End = Literal["ended", "orphaned", "lost"]
"""The log has its end, nobody writes it any longer, or it is of no use: out of reach, or given up by its writer."""


class WrittenAnew(StreamDiverged):
    """The log was lost, and another run writes it anew: it goes on from what its replica had seen, which may be less than
    what was seen here.
    """


def was_abandoned(end: bytes) -> bool:
    """Whether that is the end of a log that was given up for want of readers: who has some goes on alone at once."""
    return bool(end) and orjson.loads(end)["outcome"] == "abandoned"


class Mirror:
    """Copies a shared log into ``flight``, and watches over its writer's lease.

    With each look it tells what it has read so far, and promises not to go on alone within a lease of when it last heard
    that the log has a writer. A promise counts from what it has heard, never from when it is told: that may be late.
    """

    def __init__(  # noqa: PLR0913  # they are what it reads, and how it judges
        self, store: Store, flight: Flight, name: LogName, *, lease_s: float, trust_s: float, goes_on: bool
    ) -> None:
        self._store = store
        self._flight = flight
        self._name = name
        self._lease_s = lease_s
        self._look_s = lease_s / _LOOKS_PER_LEASE
        self._cursor = LOG_START
        self._promised_until_ms = 0  # by the store's clock
        self._promised_until_s = 0.0  # by the loop's, which is no sooner
        self._rung = asyncio.Event()
        flight.on_read = self._rung.set  # the writer has to know, or it takes the stream for abandoned
        # A lease that is absent before its time was evicted, or lost with a restart of Redis: its holder takes it again.
        self._lease_until_s = asyncio.get_running_loop().time() + trust_s
        self._end: Entry | None = None
        self._goes_on = goes_on

    async def run(self) -> End:
        """Returns when the log has ended, as the flight then has, or when nobody writes it any longer."""
        flight: FlightId = self._name.flight
        try:
            await self._listen(flight)
            while True:
                self._rung.clear()
                end = await self._look()
                if end:
                    return end
                await self._ring(self._wait_s())
        finally:
            self._store.stop_listening(flight, self._rung.set)

    async def catch_up(self) -> None:
        """Reads what is left of a log whose writer is gone. Raises `StoreError`."""
        while self._take(await self._store.read(self._name, self._cursor, readers=self._flight.readers)).more:
            pass

    async def leave(self) -> None:
        """Reads the log no longer; if a reader was cancelled, the writer has to know that none is left."""
        try:
            await self._store.read(self._name, self._cursor, readers=0, mirrored=self._mirrored())
            for reader in () if self._end else self._flight.cancelled:
                await self._store.cancel(self._name, reader)
        except StoreError as error:
            log.debug("%r is left without a word: %s", self._flight, error)

    async def may_go_alone(self) -> bool:
        """Whether a call may be gone on with that is to be in no log; where not yet, it takes a moment to say so."""
        left_s = self._promised_until_s - asyncio.get_running_loop().time()
        if left_s > 0:
            await asyncio.sleep(min(left_s + _SLACK_S, _AGAIN_S))
        return self._promised_until_s <= asyncio.get_running_loop().time()

    async def _listen(self, flight: FlightId) -> None:
        try:
            await self._store.listen(flight, self._rung.set)
        except StoreError as error:
            log.debug("the doorbell of %r is not heard: %s", self._flight, error)

    async def _look(self) -> End | None:
        loop, cursor, was_over = asyncio.get_running_loop(), self._cursor, self._is_over()
        try:
            # A store that does not answer must not hold up what is due when the lease is over.
            async with asyncio.timeout_at(max(self._lease_until_s, loop.time() + _AGAIN_S)):
                try:
                    page = self._take(await self._read())
                except WrittenAnew:
                    if not await self._holds_what_was_seen():
                        return "lost"
                    self._cursor = cursor
                    self._rung.set()
                    return None
        except (StoreError, TimeoutError) as error:
            log.debug("the log of %r cannot be read: %s", self._flight, error)
            if not was_over and self._is_over():
                # In a process that was frozen all timers are due before any answer is read: so it is asked once more.
                self._rung.set()
            return "lost" if was_over else None
        if self._end:
            if self._goes_on and self._flight.readers and was_abandoned(self._end.end):
                return "lost"
            await self._close(self._end)
            return "ended"
        if page.more:
            self._rung.set()
        released = bool(page.entries) and page.entries[-1].released and not page.lease_s
        return "orphaned" if released or (not page.lease_s and self._expired()) else None

    async def _read(self) -> Page:
        return await self._store.read(self._name, self._cursor, readers=self._flight.readers, mirrored=self._mirrored())

    def _mirrored(self) -> Mirrored:
        """What its readers have seen of the log by now."""
        has_end = self._end is not None and self._flight.outcome is not None
        return Mirrored(self._flight.run, self._flight.runs[-1][0], self._flight.count + has_end, self._promised_until_ms)

    def _take(self, page: Page) -> Page:
        if page.lease_s:
            now_s = asyncio.get_running_loop().time()
            self._lease_until_s = now_s + page.lease_s
            if not self._promised_until_ms:
                self._rung.set()  # the first promise is given at once
            self._promised_until_ms = page.at_ms + int(self._lease_s * _PROMISE_SHARE * 1000)
            self._promised_until_s = now_s + self._lease_s
        self._cursor = page.cursor
        for entry in page.entries:
            self._apply(entry)
        self._flight.cancel(page.cancelled)
        return page

    async def _holds_what_was_seen(self) -> bool:
        """Whether the log, which another run has written anew, goes on from no earlier place than has been read here."""
        flight, head = self._flight, (await self._store.peek(self._name)).head
        runs: list[tuple[str, int]] = [(run, first) for run, first in orjson.loads(head)["runs"]] if head else []
        known = [place for place, (run, _) in enumerate(runs) if run == flight.runs[-1][0]]
        followed_by = runs[known[0] + 1 :] if known else runs
        if not runs or any(first < flight.count for _, first in followed_by):
            return False
        flight.runs = runs
        return True

    def _apply(self, entry: Entry) -> None:
        flight = self._flight
        if entry.head:
            self._apply_head(orjson.loads(entry.head))
        if (entry.frames or entry.end) and entry.by != flight.runs[-1][0]:
            raise WrittenAnew("Another run has written the shared log anew.")
        if entry.frames:
            known = flight.count - (entry.count - len(entry.frames))
            if known < 0:
                raise StreamLost("What comes next is no longer kept.")
            flight.copy(entry.frames[known:], entry.at_us[known:])
            flight.in_doubt = False
        if entry.run and entry.run not in [run for run, _ in flight.runs]:
            flight.runs.append((entry.run, entry.count))
            flight.in_doubt = entry.count > 0
        if entry.end:
            self._end = entry

    def _apply_head(self, head: dict[str, Any]) -> None:
        flight = self._flight
        flight.runs = [(run, first) for run, first in head["runs"]]
        flight.started_at = head["started_at"]
        flight.streamed = head["streamed"]
        flight.land_head(head["headers"])

    async def _close(self, entry: Entry) -> None:
        flight, end = self._flight, orjson.loads(entry.end)
        if end["outcome"] != "complete":
            error = retold(end)
            flight.close(Failed(error) if end["outcome"] == "failed" else Abandoned(error))
            return
        if flight.count < entry.count:
            await self._take_recording()
        # What was not streamed is kept as it came: assembled from its frames it might be written otherwise.
        if not flight.streamed and (body := entry.body or await self._stored_body()):
            flight.keep_whole(body)
        flight.close(Complete())

    async def _take_recording(self) -> None:
        """The log was lost and not written anew, since there was nothing more to say. Raises `StreamLost`."""
        flight = self._flight
        try:
            recording = await self._store.recording_of(self._name)
        except StoreError:
            recording = None
        if recording is None or recording.marks is None:
            raise StreamLost("The end of the stream is no longer kept.")
        frames, at_us = recording.frames(None, usage=True), recording.marks.at_us
        flight.streamed = not recording.meta.whole
        flight.copy(frames[flight.count :], at_us[flight.count :])
        if flight.headers is None:
            flight.land_head({})

    async def _stored_body(self) -> bytes:
        try:
            recording = await self._store.lookup(self._name.key, "whole", patient=True)
        except StoreError:
            return b""
        return recording.body or b"" if recording and recording.meta.flight == self._name.flight else b""

    def _is_over(self) -> bool:
        """Whether nothing stands against going on alone where the log cannot be read."""
        return self._expired() and self._promised_until_s <= asyncio.get_running_loop().time()

    def _expired(self) -> bool:
        return asyncio.get_running_loop().time() >= self._lease_until_s

    def _wait_s(self) -> float:
        now_s = asyncio.get_running_loop().time()
        left_s = self._lease_until_s - now_s
        if left_s > 0:
            return min(self._look_s, left_s + _SLACK_S)
        left_s = self._promised_until_s - now_s
        return min(_AGAIN_S, left_s + _SLACK_S) if left_s > 0 else _AGAIN_S

    async def _ring(self, within_s: float) -> None:
        timer = asyncio.get_running_loop().call_later(within_s, self._rung.set)
        try:
            await self._rung.wait()
        finally:
            timer.cancel()

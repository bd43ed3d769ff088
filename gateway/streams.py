"""Streams after their request: to resume one from any replica, to cancel one for good, and to tell its state."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import orjson

from gateway.core.apis import APIS, Api
from gateway.core.policy import Disposition, age_s, remaining_s
from gateway.core.recording import Identity, Recording
from gateway.core.stream_id import NO_RUN, Cursor, StreamId, UnknownStream, identity_digits, mint, open_token
from gateway.errors import (
    GatewayError,
    InvalidRequest,
    StoreAway,
    StoreCorrupt,
    StoreError,
    StreamCancelled,
    StreamDiverged,
    StreamLost,
    StreamNotFound,
    retold,
)
from gateway.flight import Complete, Failed, Flight
from gateway.flights import Flights
from gateway.mirror import was_abandoned
from gateway.ports import Clock, FlightId, LogName, Peeked, Store
from gateway.pump import Plan
from gateway.purges import Purges
from gateway.questions import Questions, Tenants
from gateway.reader import EventIds, FlightReader, RecordingReader
from gateway.service import Opened, Service

_RESUMED = Disposition("collapsed", "resumed")
_STORED_SOON_S = 0.02
_UNKNOWN = "The stream is unknown, or has expired."
_AWAY = "The store cannot be reached, so nobody can say what is left of the stream."


class Streams:
    """What can be done with a stream by its id. Every method raises `StreamNotFound` for an id that is not the caller's."""

    def __init__(  # noqa: PLR0913, PLR0917  # all that a stream may be left in
        self,
        service: Service,
        questions: Questions,
        flights: Flights,
        store: Store,
        tenants: Tenants,
        clock: Clock,
        purges: Purges,
    ) -> None:
        self._service = service
        self._questions = questions
        self._flights = flights
        self._store = store
        self._tenants = tenants
        self._clock = clock
        self._purges = purges

    async def resume(self, token: str, cursor: Cursor, headers: Mapping[str, str]) -> Opened | None:
        """A reader from the cursor on; None where there is nothing more for this reader. Raises `GatewayError`."""
        stream = self._stream(token, headers)
        name, nonce = _name(stream), stream.nonce.hex()
        if stream.kind == "hit":
            peeked = await self._peek(name)
            if nonce in peeked.cancelled:
                return None
            return self._replay(stream, await self._recording(name), cursor, token)
        found = await self._flight(stream, name, headers, counted=cursor.is_only_a_number)
        if found is None or nonce in found[0].cancelled:
            return None
        flight, mirrored, writer = found
        if not stream.event_ids:
            # A number alone says nothing without whose run it counts: from here on it is this replica's.
            owner = self._tenants.owner(headers, shared=stream.shared)
            token, _ = mint(self._store.secret, owner, stream._replace(run=flight.run))
        ids = EventIds(token) if stream.event_ids else None
        reader = FlightReader(
            flight, usage=stream.usage, cursor=cursor, run=stream.run, mirrored=mirrored, writer=writer, ids=ids
        )
        reader.nonce = nonce
        return Opened(reader, _RESUMED, stream_id=token)

    def check_same(self, token: str, other: str, headers: Mapping[str, str]) -> None:
        """Raises `InvalidRequest` where two ids are not of one reader's stream."""
        one, two = self._stream(other, headers), None
        with suppress(StreamNotFound):
            two = self._stream(token, headers)
        if two is None or one._replace(run=two.run) != two:
            raise InvalidRequest("Last-Event-ID is of another stream.", param="Last-Event-ID")

    async def cancel(self, token: str, headers: Mapping[str, str]) -> None:
        """Ends this reader for good, wherever it is; the upstream's call too, if nobody else reads it."""
        stream = self._stream(token, headers)
        name, nonce = _name(stream), stream.nonce.hex()
        flight = self._flights.named(name, stream.run) if stream.kind == "flight" else None
        try:
            await self._store.cancel(name, nonce)
        except StoreError:
            if flight is None:
                raise StoreAway("The store cannot be reached, so the stream cannot be cancelled now.") from None
        if flight:
            flight.cancel([nonce])
        for replay in [replay for replay in self._service.replays if replay.nonce == nonce]:
            replay.cut(StreamCancelled("The stream was cancelled."))

    async def status(self, token: str, headers: Mapping[str, str]) -> dict[str, Any]:
        """The stream's state, frames, age and readers (in all replicas), and why it ended if it ended early."""
        stream = self._stream(token, headers)
        name = _name(stream)
        flight = self._flights.named(name, stream.run) if stream.kind == "flight" else None
        if flight and flight.resolution != "followed":
            readers = flight.readers + self._flights.listeners(flight)
            told = self._told(_state(flight), flight.count, flight.started_at, readers, flight.error)
        else:
            told = await self._status_elsewhere(stream, name)
        cancelled = flight is not None and stream.nonce.hex() in flight.cancelled
        return {"id": token, "object": "stream", **told, "cancelled": cancelled or told["cancelled"]}

    async def _status_elsewhere(self, stream: StreamId, name: LogName) -> dict[str, Any]:
        peeked = await self._peek(name)
        cancelled = stream.nonce.hex() in peeked.cancelled
        if stream.kind == "flight" and (peeked.log or peeked.lease_s):
            started_at = orjson.loads(peeked.head)["started_at"] if peeked.head else self._clock.now()
            end = orjson.loads(peeked.end) if peeked.end else {}
            state = end.get("outcome") or ("running" if peeked.lease_s else "orphaned")
            error = retold(end) if "error" in end else None
            return self._told(state, peeked.count, started_at, peeked.readers, error) | {"cancelled": cancelled}
        meta = (await self._recording(name)).meta
        return self._told("complete", meta.frames, meta.started_at, 0, None) | {"cancelled": cancelled}

    def _told(self, state: str, frames: int, started_at: float, readers: int, error: GatewayError | None) -> dict[str, Any]:
        age_s = round(max(0.0, self._clock.now() - started_at), 3)
        told = {"state": state, "frames": frames, "age_s": age_s, "readers": readers, "cancelled": False}
        return {**told, **error.body()} if error else told

    def _stream(self, token: str, headers: Mapping[str, str]) -> StreamId:
        try:
            return open_token(self._store.secret, lambda shared: self._tenants.owner(headers, shared=shared), token)
        except UnknownStream:
            raise StreamNotFound(_UNKNOWN) from None

    async def _flight(
        self, stream: StreamId, name: LogName, headers: Mapping[str, str], *, counted: bool
    ) -> tuple[Flight, int | None, str] | None:
        """The flight, as this replica has it, or can read it, and what its `FlightReader` has to know: how much of it was
        ``mirrored``, and its ``writer``. None where this reader was cancelled. ``counted``: the cursor is only a number.
        """
        known = self._flights.named(name, stream.run)
        try:
            peeked = await self._peek(name, stream.run)
        except StoreAway:
            if known and (known.knows(stream.run) or not counted):
                return known, 0, ""
            raise
        if stream.nonce.hex() in peeked.cancelled:
            return None
        flight = self._flights.named(name, stream.run, peeked.writer)
        if flight is None:
            flight = await self._flight_elsewhere(APIS[stream.api], name, peeked, headers)
        mirrored = None if peeked.promised and not was_abandoned(peeked.end) else peeked.mirrored
        return flight, mirrored, peeked.writer.rpartition(".")[2]

    async def _flight_elsewhere(self, api: Api, name: LogName, peeked: Peeked, headers: Mapping[str, str]) -> Flight:
        if peeked.log or peeked.lease_s:
            return self._flights.follow(api, name, partial(self._plan, peeked.request, name, headers))
        if peeked.recording:
            return self._flights.replay(api, name, await self._recording(name))
        raise StreamNotFound(_UNKNOWN)

    def _plan(self, noted: bytes, name: LogName, headers: Mapping[str, str]) -> Plan:
        if not noted:
            raise StreamLost("Who ran the call is gone, and what was asked is not known any more.")
        if self._service.replays_only:
            raise StreamLost("Who ran the call is gone, and in replay mode no model is asked to go on with it.")
        return self._questions.plan_of(noted, headers, name.key)

    async def _peek(self, name: LogName, run: str = "") -> Peeked:
        try:
            return await self._store.peek(name, run)
        except StoreError:
            raise StoreAway(_AWAY) from None

    async def _recording(self, name: LogName) -> Recording:
        recording = await self._stored(name)
        # Its own replica replays it from the moment that it is complete, and may still be storing it.
        while recording is None and (await self._peek(name)).lease_s:
            await asyncio.sleep(_STORED_SOON_S)
            recording = await self._stored(name)
        recording = recording or await self._stored(name)
        if recording is None or self._purges.covers(name.key, recording.meta):
            raise StreamNotFound(_UNKNOWN)
        return recording

    async def _stored(self, name: LogName) -> Recording | None:
        try:
            return await self._store.recording_of(name)
        except StoreCorrupt:
            return None
        except StoreError:
            raise StoreAway(_AWAY) from None

    def _replay(self, stream: StreamId, recording: Recording, cursor: Cursor, token: str) -> Opened:
        """The rest of a hit, at once, under the identity that it began with."""
        identity = None
        if stream.fresh:
            original = recording.meta.id or APIS[stream.api].id_prefix
            identity = Identity.fresh(original, identity_digits(self._store.secret, stream), stream.created)
        ids = EventIds(token) if stream.event_ids else None
        if cursor.is_only_a_number and stream.run not in (NO_RUN, recording.meta.run):
            raise StreamDiverged("Another run has recorded the answer anew, and a number does not say what was seen.")
        pacer = self._service.pacer
        reader = RecordingReader(recording, identity, usage=stream.usage, pacer=pacer, cursor=cursor, ids=ids)
        reader.nonce = stream.nonce.hex()
        self._service.begin_replay(reader)
        meta, now = recording.meta, self._clock.now()
        disposition = Disposition("hit", "resumed", age_s=age_s(meta, now), ttl_s=remaining_s(meta, now))
        return Opened(reader, disposition, stream_id=token)


def _name(stream: StreamId) -> LogName:
    return LogName(stream.key, FlightId(stream.flight))


def _state(flight: Flight) -> str:
    if flight.outcome is None:
        return "running"
    if isinstance(flight.outcome, Complete):
        return "complete"
    return "failed" if isinstance(flight.outcome, Failed) else "abandoned"

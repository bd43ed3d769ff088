"""Which answers go wrong, and how: only where the configuration allows it, and the same ones from the same seed."""

import asyncio
import random
from collections.abc import Mapping

from gateway.core.dialects.openai import error_event
from gateway.core.faults import Fault, drawn
from gateway.errors import GatewayError, InjectedFault, InvalidRequest
from gateway.questions import CacheRules, Questions, Request
from gateway.reader import Push, Reader, RecordingReader, takes_nothing

_MAX_TURNS = 4096
_EVENT_END = b"\n\n"
_DATA = b"data: "
_HALF_A_CHUNK = b'data: {"id":"chatcmpl-\n\n'


class Faults:
    """Chooses the fault of a request: of those that it asks for, else of those that its model has."""

    def __init__(self, questions: Questions, rules: CacheRules) -> None:
        self._questions = questions
        self._rules = rules
        self._turns: dict[str, int] = {}

    def of(self, request: Request) -> Fault | None:
        """Raises `GatewayError` where there is no such model, or no fault may be asked for."""
        wish = request.faults
        if not self._rules.faults_allowed:
            if wish:
                raise InvalidRequest(
                    "Faults are not allowed here: see [faults] in the configuration.", param="Gateway-Fault"
                )
            return None
        route = self._questions.route(request)
        faults = wish.faults if wish else self._questions.rules(request, route).faults
        if not faults:
            return None
        seed = f"{self._rules.fault_seed}:{route.model}:{self._turn(route.model)}"
        if wish and wish.seed is not None:
            seed = str(wish.seed)
        return drawn(faults, random.Random(seed))  # noqa: S311  # to be repeated, not to be safe

    def _turn(self, model: str) -> int:
        if len(self._turns) >= _MAX_TURNS:
            self._turns.clear()
        turn = self._turns[model] = self._turns.get(model, -1) + 1
        return turn


class CutOff(ConnectionResetError):
    """The connection is to break here."""


class FaultyReader:
    """What another reader reads, until something goes wrong with it. That one, and who else reads there, notice nothing.

    Where a stream ends before the place of its fault, the fault comes at the end.
    """

    def __init__(self, reader: Reader, fault: Fault) -> None:
        self.reader = reader
        self._fault = fault
        self._left = fault.after or 0
        """How many events there are until it comes."""
        self._reached = not self._left
        self._happened = not fault.is_midway
        self._is_mangling = False
        self._rest = b""
        self._error: InjectedFault | None = None

    @property
    def at_end(self) -> bool:
        return self._error is not None or (self._happened and not self._rest and self.reader.at_end)

    @property
    def over(self) -> bool:
        return self.reader.over

    @property
    def error(self) -> GatewayError | None:
        """Why the stream ended early, if it did."""
        return self._error or self.reader.error

    @property
    def keep_alive(self) -> bytes:
        return self.reader.keep_alive

    def at_once(self) -> bytes | None:
        return None

    async def head(self, within_s: float | None) -> Mapping[str, str] | None:
        """See `FlightReader.head`; a first token that is slow keeps the head back, too.

        What goes wrong before the first frame waits for none, and so for no head.
        """
        if self._reached and self._fault.kind in ("cut", "error"):
            return {}
        await self._be_slow()
        return await self.reader.head(within_s)

    async def next(self, idle_s: float, push: Push = takes_nothing) -> bytes | None:
        """See `FlightReader.next`. Raises `CutOff`."""
        if self._reached and not self._happened:
            await self._happen()
        if self._error:
            return b""
        data: bytes | None = self._rest
        if data:
            self._rest = b""
        else:
            data = await self.reader.next(idle_s, push if self._happened and not self._is_mangling else takes_nothing)
        if self._is_mangling and (data or self.reader.at_end):
            data, self._is_mangling = _mangled(data or b""), False
        return data if self._happened else self._up_to_the_place(data)

    def _up_to_the_place(self, data: bytes | None) -> bytes | None:
        events = (data or b"").split(_EVENT_END)[:-1]
        before, after = events[: self._left], events[self._left :]
        self._left -= len(before)
        self._reached = not self._left or self.reader.at_end
        self._rest = _joined(after)
        return _joined(before) if data else data

    async def _happen(self) -> None:
        self._happened = True
        if self._fault.kind == "stall":
            await asyncio.sleep(self._fault.seconds)
        elif self._fault.kind == "malformed":
            self._is_mangling = True
        elif self._fault.kind == "error":
            self._error = InjectedFault(self._fault)
        else:
            await asyncio.sleep(0)  # what is written has left by then
            raise CutOff

    def end(self) -> bytes:
        """The event that ends the stream."""
        return error_event(self._error) if self._error else self.reader.end()

    async def whole(self) -> bytes:
        """See `FlightReader.whole`. Raises `InjectedFault`."""
        await self._be_slow()
        body = await self.reader.whole()
        if self._fault.kind == "stall":
            await asyncio.sleep(self._fault.seconds)
        if self._fault.kind == "error":
            raise InjectedFault(self._fault)
        return body[: len(body) // 2] if self._fault.kind == "malformed" else body

    async def outcome(self, within_s: float) -> tuple[bool | None, str]:
        """See `FlightReader.outcome`."""
        return await self.reader.outcome(within_s)

    async def _be_slow(self) -> None:
        if self._fault.kind != "slow":
            return
        if isinstance(self.reader, RecordingReader):
            self.reader.began_s += self._fault.seconds  # all the rest is as much later
        await asyncio.sleep(self._fault.seconds)


def _joined(events: list[bytes]) -> bytes:
    return b"".join(event + _EVENT_END for event in events)


def _mangled(data: bytes) -> bytes:
    """The same, but of the first event's data only one half is there."""
    start = data.find(_DATA)
    end = data.find(_EVENT_END, start)
    if start < 0 or end < 0:
        return data + _HALF_A_CHUNK
    middle = (start + len(_DATA) + end) // 2
    return data[:middle] + data[end:]

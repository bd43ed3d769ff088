"""How much a process takes on at a time: connections, streams, flights, bytes; in all, and of each tenant.

Nothing here waits, and nothing that runs is ended: a limit only keeps what is new from beginning.
"""

import logging
import random
import time
from collections.abc import Callable
from typing import Any, Self

from gateway.config import LimitsConfig
from gateway.core.shedding import Shedding
from gateway.errors import Overloaded, TenantOverloaded

log = logging.getLogger(__name__)

_TELL_EVERY_S = 10.0
# Those who are refused in the same moment shall not all come back in the same moment.
_LONGEST_RETRY_AFTER_S = 3
# Calls hold more and more, hits let go at once: so the last quarter is left to those.
_SHARE_OF_CALLS = 0.75


class Teller:
    """Counts what is refused for one reason, and logs it: at once, then no more than once in a while."""

    def __init__(self, reason: str, clock: Callable[[], float]) -> None:
        self.count = 0
        self._reason = reason
        self._clock = clock
        self._told = 0
        self._told_s = float("-inf")

    def add(self) -> None:
        self.count += 1
        if (now_s := self._clock()) - self._told_s >= _TELL_EVERY_S:
            log.warning("%s: %d refused", self._reason, self.count - self._told)
            self._told, self._told_s = self.count, now_s


class Place:
    """One of what there may be so many of. It can be given back more than once, or at the end of a ``with``."""

    __slots__ = ("_places", "_tenant")

    def __init__(self, places: "Places", tenant: str) -> None:
        self._places: Places | None = places
        self._tenant = tenant

    def release(self) -> None:
        places, self._places = self._places, None
        if places:
            places.give_back(self._tenant)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Places:
    """How many there are of one thing, in all and of each tenant, and how many there may be (0: any number)."""

    def __init__(self, what: str, clock: Callable[[], float], draw: Callable[[], float]) -> None:
        self.limit = self.limit_per_tenant = 0
        self.taken = 0
        self.refused = Teller(f"limits.max_{what} is reached", clock)
        self.refused_to_tenants = Teller(f"limits.max_{what}_per_tenant is reached", clock)
        self._what = what
        self._draw = draw
        self._by_tenant: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<Places {self._what} taken={self.taken} of={self.limit or 'any'} tenants={len(self._by_tenant)}>"

    def of_tenant(self, tenant: str) -> int:
        """How many it has."""
        return self._by_tenant.get(tenant, 0)

    def has_room(self, tenant: str) -> bool:
        return not (self._is_full or self._is_full_for(tenant))

    def take(self, tenant: str) -> Place:
        """Raises `TenantOverloaded` and `Overloaded`."""
        if self._is_full_for(tenant):  # first: only this caller can mend it
            self.refused_to_tenants.add()
            message = f"Rate limit reached: at most {self.limit_per_tenant} {self._what} of one tenant at a time."
            raise TenantOverloaded(message, retry_after_s=retry_after_s(self._draw()))
        if self._is_full:
            self.refused.add()
            message = f"The gateway has all of its {self.limit} {self._what}."
            raise Overloaded(message, retry_after_s=retry_after_s(self._draw()))
        return self.take_anyway(tenant)

    def take_anyway(self, tenant: str) -> Place:
        """For what cannot be refused any more."""
        self.taken += 1
        self._by_tenant[tenant] = self._by_tenant.get(tenant, 0) + 1
        return Place(self, tenant)

    def give_back(self, tenant: str) -> None:
        self.taken -= 1
        left = self._by_tenant[tenant] - 1
        if left:
            self._by_tenant[tenant] = left
        else:
            del self._by_tenant[tenant]

    @property
    def _is_full(self) -> bool:
        return 0 < self.limit <= self.taken

    def _is_full_for(self, tenant: str) -> bool:
        return 0 < self.limit_per_tenant <= self._by_tenant.get(tenant, 0)

    def snapshot(self) -> dict[str, int]:
        return {
            "now": self.taken,
            "limit": self.limit,
            "refused": self.refused.count,
            "limit_per_tenant": self.limit_per_tenant,
            "refused_to_tenants": self.refused_to_tenants.count,
        }


class Holding:
    """One holder's share of the bytes that are held: of a body, of a log, of a recording."""

    __slots__ = ("_held", "size_bytes")

    def __init__(self, held: "Held") -> None:
        self._held = held
        self.size_bytes = 0

    def become(self, size_bytes: int) -> None:
        """It holds so many now; 0 in the end."""
        self._held.size_bytes += size_bytes - self.size_bytes
        self.size_bytes = size_bytes

    def grow(self, size_bytes: int) -> None:
        """So many more have come. Raises `Overloaded` where that is more than may be held."""
        self.become(self.size_bytes + size_bytes)
        self._held.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.become(0)


class Held:
    """How many bytes of others are in memory, and how many may be (0: any number)."""

    def __init__(self, clock: Callable[[], float], draw: Callable[[], float]) -> None:
        self.limit_bytes = 0
        self.size_bytes = 0
        """Of bodies, logs and recordings."""
        self.unsent_bytes: Callable[[], int] = lambda: 0
        """Of what was written, and not taken yet."""
        self.refused = Teller("limits.max_held_bytes is reached", clock)
        self._draw = draw

    def __repr__(self) -> str:
        return f"<Held {self.size_bytes} + {self.unsent_bytes()} of={self.limit_bytes or 'any'}>"

    def holding(self) -> Holding:
        return Holding(self)

    def check(self, more_bytes: int = 0) -> None:
        """Raises `Overloaded` where no more can be taken in, or not so many."""
        self._check(self.limit_bytes, more_bytes)

    def check_for_call(self) -> None:
        """Raises `Overloaded` where so much is held that only hits are served."""
        self._check(self.limit_bytes * _SHARE_OF_CALLS)

    def has_room_for_call(self) -> bool:
        return not self._is_over(self.limit_bytes * _SHARE_OF_CALLS)

    def _check(self, limit_bytes: float, more_bytes: int = 0) -> None:
        if self._is_over(limit_bytes, more_bytes):
            self.refused.add()
            message = "The gateway holds all the bytes that it may."
            raise Overloaded(message, retry_after_s=retry_after_s(self._draw()))

    def _is_over(self, limit_bytes: float, more_bytes: int = 0) -> bool:
        return 0 < limit_bytes < self.size_bytes + more_bytes + self.unsent_bytes()

    def snapshot(self) -> dict[str, int]:
        now = self.size_bytes + self.unsent_bytes()
        return {"now": now, "limit": self.limit_bytes, "refused": self.refused.count}


class Shedder:
    """Refuses newcomers, a share of them, while the event loop is late; those who resume a stream last."""

    def __init__(self, clock: Callable[[], float], draw: Callable[[], float]) -> None:
        self.refused = Teller("limits.max_lag_s is reached", clock)
        self._shedding = Shedding()
        self._clock = clock
        self._draw = draw
        self._waiting_since_s: dict[object, float] = {}

    def __repr__(self) -> str:
        return f"<Shedder of={self.max_lag_s or 'any'} lag={self._shedding.lag_s:.4f} share={self._shedding.share:.2f}>"

    @property
    def max_lag_s(self) -> float:
        """0: any lag."""
        return self._shedding.max_lag_s

    @property
    def is_shedding(self) -> bool:
        return self._shedding.share > 0

    def become(self, max_lag_s: float) -> None:
        self._shedding.become(max_lag_s)

    def add(self, lag_s: float, now_s: float) -> None:
        """How late the loop was, and when that was measured, by this clock.

        Newcomers who are left waiting for a turn wait for no less than since there was nobody of them.
        """
        waited_s = now_s - min(self._waiting_since_s.values(), default=now_s)
        self._shedding.add(max(lag_s, waited_s), now_s)

    def newcomers_wait(self, where: object) -> None:
        """Some were left waiting there, when all had been taken that may be at a time."""
        self._waiting_since_s.setdefault(where, self._clock())

    def nobody_waits(self, where: object) -> None:
        self._waiting_since_s.pop(where, None)

    def refuses(self, *, resumes: bool) -> bool:
        """Draws whether one more is refused: to be asked once for each."""
        share = self._shedding.share_of_resumed if resumes else self._shedding.share
        return share > 0 and self._draw() < share

    def refusal(self) -> Overloaded:
        """What to tell whoever is refused, who is counted."""
        self.refused.add()
        message = "The gateway has more to do than it can do in time."
        return Overloaded(message, retry_after_s=retry_after_s(self._draw()))

    def check(self, *, resumes: bool) -> None:
        """Raises `Overloaded`."""
        if self.refuses(resumes=resumes):
            raise self.refusal()

    def snapshot(self) -> dict[str, float]:
        return {
            "now": self._shedding.lag_s,
            "limit": self.max_lag_s,
            "refused": self.refused.count,
            "refused_share": self._shedding.share,
        }


class Limits:
    """All of ``[limits]``, and what of each there is now."""

    def __init__(
        self,
        config: LimitsConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] | None = None,
    ) -> None:
        draw = draw or random.Random().random  # noqa: S311  # when somebody may come again is no secret
        self.connections = Places("connections", clock, draw)
        self.streams = Places("streams", clock, draw)
        self.flights = Places("flights", clock, draw)
        self.held = Held(clock, draw)
        self.lag = Shedder(clock, draw)
        self.evicted = 0
        """How many idle connections were closed to make room."""
        self.unaccepted = Teller("the process has no more file descriptors (ulimit -n)", clock)
        self.draw = draw
        self.become(config or LimitsConfig())

    def become(self, config: LimitsConfig) -> None:
        """From now on these hold. What is beyond them goes on."""
        self.connections.limit = config.max_connections
        self.streams.limit, self.streams.limit_per_tenant = config.max_streams, config.max_streams_per_tenant
        self.flights.limit, self.flights.limit_per_tenant = config.max_flights, config.max_flights_per_tenant
        self.held.limit_bytes = config.max_held_bytes
        self.lag.become(config.max_lag_s)

    def check_call(self, tenant: str) -> bool:
        """Whether one more call may begin that nobody waits for: it is not counted as refused."""
        return self.flights.has_room(tenant) and self.held.has_room_for_call()

    def begin_call(self, tenant: str) -> Place:
        """Raises `Overloaded` and `TenantOverloaded`."""
        self.held.check_for_call()
        return self.flights.take(tenant)

    def snapshot(self) -> dict[str, Any]:
        """What there is of each, its limit, and how much was refused since the start; for metrics."""
        return {
            "connections": {**self.connections.snapshot(), "evicted": self.evicted, "unaccepted": self.unaccepted.count},
            "streams": self.streams.snapshot(),
            "flights": self.flights.snapshot(),
            "held_bytes": self.held.snapshot(),
            "lag": self.lag.snapshot(),
        }


def retry_after_s(draw: float) -> int:
    """``draw`` is a number from 0 to 1."""
    return 1 + int(draw * _LONGEST_RETRY_AFTER_S)

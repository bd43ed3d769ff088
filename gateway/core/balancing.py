"""Which of several deployments is asked, and which are left alone for a while. The clock and the draws are arguments."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

State = Literal["well", "probed", "ejected"]
"""``probed``: its time is over, and one call may find out how it is."""

_MAX_DOUBLINGS = 16
_MAX_RESTS = 4096


@dataclass(frozen=True, slots=True)
class EjectionRules:
    """When a deployment is left alone, and for how long."""

    enabled: bool = True
    error_rate: float = 0.5
    """The share of failures, of the calls of the last ``window_s``, from which on it is."""
    min_calls: float = 5
    """Of fewer calls nothing is concluded."""
    window_s: float = 30.0
    first_s: float = 5.0
    """Doubled each time that it is no better."""
    longest_s: float = 60.0


class Ticket(NamedTuple):
    """One call, as the health of its deployment knows it."""

    epoch: int
    is_probe: bool


class Health:
    """How a deployment has done lately. Each call is begun, and ends as one of `succeed`, `fail` or `drop`."""

    def __init__(self, rules: EjectionRules) -> None:
        self._rules = rules
        self._calls = self._failures = 0.0  # those of a window ago count for 1/e
        self._at = 0.0
        self._epoch = 0
        """Of calls that began before it was ejected nothing more is concluded."""
        self._ejected_until: float | None = None
        self._ejections = 0
        self._well_since = 0.0
        self._probing = False

    def __repr__(self) -> str:
        state = "well" if self._ejected_until is None else f"ejected until {self._ejected_until:.1f}"
        return f"<Health {state} calls={self._calls:.1f} failures={self._failures:.1f}>"

    def state(self, now: float) -> State:
        if self._ejected_until is None:
            return "well"
        return "probed" if now >= self._ejected_until and not self._probing else "ejected"

    def begin(self, now: float) -> Ticket:
        """A call is sent."""
        is_probe = self.state(now) == "probed"
        self._probing = self._probing or is_probe
        return Ticket(self._epoch, is_probe)

    def succeed(self, ticket: Ticket, now: float) -> None:
        """It has begun to answer."""
        self._end_probe(ticket)
        if ticket.epoch != self._epoch:
            return
        if self._ejected_until is not None:
            self._ejected_until = None
            self._well_since = now
            self._epoch += 1
            self._probing = False
            self._calls = self._failures = 0.0
        self._count(now, failures=0)

    def fail(self, ticket: Ticket, now: float, *, spoke: bool = False) -> float:
        """It failed; ``spoke``: after it had begun to answer. Tells for how long it is to be left alone from now on."""
        self._end_probe(ticket)
        if ticket.epoch != self._epoch:
            return 0.0
        if self._ejected_until is not None:
            return self._eject(now) if ticket.is_probe else 0.0
        self._count(now, failures=1, calls=0 if spoke and self._calls >= 1.0 else 1)
        rules = self._rules
        # They fade while they come, so that five calls never quite count for five.
        if rules.enabled and self._calls >= rules.min_calls - 0.5 and self._failures >= rules.error_rate * self._calls:
            return self._eject(now)
        return 0.0

    def drop(self, ticket: Ticket) -> None:
        """Nothing is known of how it went: its caller has gone, or it was the caller's fault."""
        self._end_probe(ticket)

    def _end_probe(self, ticket: Ticket) -> None:
        if ticket.is_probe and ticket.epoch == self._epoch:
            self._probing = False

    def _eject(self, now: float) -> float:
        rules = self._rules
        if self._ejected_until is None and now - self._well_since > rules.longest_s:
            self._ejections = 0  # it has been well for long
        left_alone_s = min(rules.longest_s, rules.first_s * 2.0 ** min(self._ejections, _MAX_DOUBLINGS))
        self._ejections += 1
        self._epoch += 1
        self._probing = False
        self._ejected_until = now + left_alone_s
        return left_alone_s

    def _count(self, now: float, *, failures: int, calls: int = 1) -> None:
        fade = math.exp(-max(0.0, now - self._at) / self._rules.window_s)
        self._at = max(self._at, now)
        self._calls = self._calls * fade + calls
        self._failures = min(self._calls, self._failures * fade + failures)


class KeyRing:
    """Several keys of one account or of many. One serves until it is refused: providers cache prompts by key."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(dict.fromkeys(keys))
        self._current = 0
        self._rests: dict[tuple[str, str], float] = {}

    def __repr__(self) -> str:
        return f"<KeyRing of {len(self._keys)}>"

    def __len__(self) -> int:
        return len(self._keys)

    def pick(self, model: str, now: float, refused: Collection[str] = ()) -> str | None:
        """The key to use for a model: of those not ``refused``, the next one that does not rest, else the one that soonest
        will not; None where all are.
        """
        best: tuple[float, int] | None = None
        for step in range(len(self._keys)):
            place = (self._current + step) % len(self._keys)
            if self._keys[place] in refused:
                continue
            rank = max(now, self._rests.get((self._keys[place], model), 0.0)), step
            if best is None or rank < best:
                best = rank
        if best is None:
            return None
        self._current = (self._current + best[1]) % len(self._keys)
        return self._keys[self._current]

    def rest(self, key: str, model: str, until: float) -> None:
        """It is not used for that model for a while, as long as there are others."""
        if len(self._rests) >= _MAX_RESTS:
            self._rests.clear()
        self._rests[key, model] = until

    def ready_in_s(self, model: str, now: float) -> float:
        """Until the first of them can be used for that model."""
        return max(0.0, min(self._rests.get((key, model), 0.0) for key in self._keys) - now)


class Candidate(NamedTuple):
    """A deployment that could be asked."""

    load: int
    """How many calls it has, those that wait included."""
    weight: float
    is_free: bool
    """Whether it could be asked without waiting."""
    has_room: bool
    """Whether one more could at least wait."""
    state: State = "well"
    rests: bool = False
    """Whether it has said that it has had enough for now."""


def choose(candidates: Sequence[Candidate], draw: float, *, desperate: bool = False) -> int | None:
    """The place of the one to ask: the least loaded by its weight of those that can answer at once, else of those where one
    can wait; of several, at random by weight. ``desperate``: rather one that rests or is ejected than none.
    """
    best: list[int] = []
    best_rank: tuple[int, float] | None = None
    for place, candidate in enumerate(candidates):
        tier = _tier(candidate, desperate=desperate)
        if tier is None:
            continue
        rank = tier, candidate.load / candidate.weight
        if best_rank is None or rank < best_rank:
            best, best_rank = [place], rank
        elif rank == best_rank:
            best.append(place)
    return _drawn(best, [candidates[place].weight for place in best], draw)


def _tier(candidate: Candidate, *, desperate: bool) -> int | None:
    """0 is the best; None: not to be asked."""
    if not candidate.has_room:
        return None
    doubt = 2 if candidate.state == "ejected" else int(candidate.rests)
    if doubt and not desperate:
        return None
    return 2 * doubt + (not candidate.is_free)


def _drawn(places: Sequence[int], weights: Sequence[float], draw: float) -> int | None:
    if not places:
        return None
    left = draw * sum(weights)
    for place, weight in zip(places, weights, strict=True):
        left -= weight
        if left < 0:
            return place
    return places[-1]

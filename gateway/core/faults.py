"""Faults on demand: what is to go wrong with an answer, for callers who test how they take it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

FaultKind = Literal["status", "slow", "stall", "cut", "malformed", "error"]
LIKELY_FRAMES = 8
"""Where nobody says after how many frames a fault comes, it comes after fewer than this."""


class Draw(Protocol):
    """Chance, as `random.Random` makes it of a seed."""

    def random(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Fault:
    """One way in which an answer goes wrong, for the caller who gets it and for nobody else.

    ``status``: a refusal with that status; ``slow``: the first token comes ``seconds`` late; ``stall``: ``after`` so many
    frames nothing comes for ``seconds``; ``cut``: the connection breaks; ``malformed``: one frame is no JSON; ``error``: the
    stream ends with an error event. Of all answers it befalls the share ``rate``.
    """

    kind: FaultKind
    status: int = 503
    retry_after_s: int | None = None
    seconds: float = 30.0
    after: int | None = None
    """None: drawn."""
    rate: float = 1.0

    def __str__(self) -> str:
        """As a structured field says it."""
        value = {"status": f"={self.status}", "slow": f"={self.seconds:g}", "stall": f"={self.seconds:g}"}.get(self.kind, "")
        retry = "" if self.retry_after_s is None or self.kind != "status" else f";retry_after={self.retry_after_s}"
        after = "" if self.after is None or not self.is_midway else f";after={self.after}"
        return f"{self.kind}{value}{retry}{after}"

    @property
    def is_midway(self) -> bool:
        """Whether it comes after some frames."""
        return self.kind in ("stall", "cut", "malformed", "error")


class FaultWish(NamedTuple):
    """The faults that a caller asks for, in the place of the configured ones; with a seed the same one each time."""

    faults: tuple[Fault, ...] = ()
    seed: int | None = None


def total_rate(faults: Sequence[Fault]) -> float:
    """How often any of them comes."""
    return sum(fault.rate for fault in faults)


def drawn(faults: Sequence[Fault], draw: Draw) -> Fault | None:
    """The one that befalls an answer, if any does, and after how many frames."""
    chance, place = draw.random(), draw.random()
    for fault in faults:
        chance -= fault.rate
        if chance < 0:
            return replace(fault, after=int(place * LIKELY_FRAMES)) if fault.after is None else fault
    return None

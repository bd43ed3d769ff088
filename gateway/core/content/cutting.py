"""Cutting from a chunk what is known already, so that only what is new is left."""

from collections.abc import Callable, Iterable

from gateway.core.apis.base import Json
from gateway.core.content.leaves import Kind, Leaf

_CHANNEL_SHOWN = 100  # characters of a channel's name in a message: the names are the upstream's


class Diverged(ValueError):
    """Two streams do not say the same: ``channel`` tells where, ``at`` at which of its characters."""

    def __init__(self, channel: str, at: int, why: str = "the new run differs from what was shown") -> None:
        super().__init__(f"{why}, at character {at} of {channel[:_CHANNEL_SHOWN]}")
        self.channel = channel
        self.at = at


def cut_known(choice: Json, leaves: Iterable[Leaf], count_known: Callable[[Leaf], int]) -> tuple[bool, bool]:
    """Cuts from a choice what is known already: of each string as many characters as ``count_known`` says.

    Returns whether anything is left, and whether anything was cut. Raises `Diverged` where that cannot be cut.
    """
    gone: list[Leaf] = []
    left = cut = False
    text_left: Leaf | None = None
    text_known = False
    for leaf in leaves:
        count = count_known(leaf)
        is_text = leaf.kind in (Kind.GROWS, Kind.WHOLE)  # a name that is said again is no reason not to cut
        text_known = text_known or (is_text and count > 0)
        if count >= len(leaf.text):
            gone.append(leaf)
            continue
        left = True
        text_left = leaf if is_text else text_left
        if count:
            _cut_leaf(leaf, count)
            cut = True
    cut = _cut_logprobs(choice, text_left, known=text_known) or cut
    for leaf in reversed(gone):  # so that places in lists stay true
        _remove(leaf)
    return left, cut or bool(gone)


def _cut_leaf(leaf: Leaf, count: int) -> None:
    if leaf.kind is not Kind.GROWS:
        raise Diverged(leaf.channel, count, "the border is inside of what cannot be cut")
    leaf.holder[leaf.name] = leaf.text[count:]


def _remove(leaf: Leaf) -> None:
    if leaf.kind is Kind.GROWS:
        leaf.holder[leaf.name] = ""
    elif leaf.is_finish:
        leaf.holder[leaf.name] = None
    elif not leaf.is_unnumbered_id:
        del leaf.holder[leaf.name]


def _cut_logprobs(choice: Json, text_left: Leaf | None, *, known: bool) -> bool:
    """They are per token: they stay or go with all of a chunk's text."""
    logprobs = choice.get("logprobs")
    if not known or not logprobs or (isinstance(logprobs, dict) and not any(logprobs.values())):
        return False
    if text_left:
        raise Diverged(text_left.channel, 0, "a chunk with logprobs cannot be cut")
    choice["logprobs"] = None
    return True

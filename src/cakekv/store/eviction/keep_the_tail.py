"""Early chunks go before late ones, because they are cheap to compute again."""

from __future__ import annotations

from collections.abc import Iterable

from cakekv.restore.costs import TYPICAL, ComputeShape
from cakekv.store.eviction.base import Candidate, Eviction, ages


class KeepTheTail(Eviction):
    """By the seconds of compute that a stored byte saves, over the time since it was last of use.

    A late chunk attends to more tokens and costs more to compute; its bytes are as many as an early one's. And a
    restore from both ends computes the head anyway. The idea of pricing chunks by position is Pensieve's (arXiv
    2312.05516) and AsymCache's (arXiv 2606.02964); dividing by age is hyperbolic caching (Blankstein et al., USENIX ATC
    2017).

    Parameters
    ----------
    cost : ComputeShape
        What computing costs; only the ratio of its linear to its quadratic part matters.
    """

    name = "keep_the_tail"
    needs_position = True

    def __init__(self, cost: ComputeShape = TYPICAL) -> None:
        self._cost = cost

    def saved_s_per_byte(self, candidate: Candidate) -> float:
        """Seconds of compute saved per byte stored, up to a common factor."""
        seconds = self._cost.seconds(candidate.position, candidate.tokens) - self._cost.fixed
        return seconds / max(candidate.size, 1)

    def order(self, candidates: Iterable[Candidate], now: float) -> list[Candidate]:
        aged = sorted(ages(candidates, now), key=lambda aged: self.saved_s_per_byte(aged[0]) / aged[1])
        return [candidate for candidate, _ in aged]

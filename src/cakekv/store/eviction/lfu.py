"""The chunk that is read least often for its age goes first."""

from __future__ import annotations

from collections.abc import Iterable

from cakekv.store.eviction.base import Candidate, Eviction, ages


class LeastFrequentlyUsed(Eviction):
    """By uses over the time since the last one, so that what was popular once does not stay for ever.

    Hyperbolic caching (Blankstein et al., USENIX ATC 2017, section 3), with the age counted from the last use.
    """

    name = "lfu"

    def order(self, candidates: Iterable[Candidate], now: float) -> list[Candidate]:
        aged = sorted(ages(candidates, now), key=lambda aged: (1 + aged[0].uses) / aged[1])
        return [candidate for candidate, _ in aged]

"""Evicts the chunk that is read least often for its age."""

from __future__ import annotations

from cakekv.store.eviction.base import Held
from cakekv.store.eviction.sampled import Sampled, age


class LeastFrequentlyUsed(Sampled):
    """By uses over the time since the last one, so that what was popular once does not stay for ever.

    Hyperbolic caching (Blankstein et al., USENIX ATC 2017, section 3), with the age counted from the last use.
    """

    name = "lfu"

    def worth(self, chunk: Held, now: float) -> float:
        return (1 + chunk.uses) / age(chunk, now)

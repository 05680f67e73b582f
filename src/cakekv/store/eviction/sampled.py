"""For policies whose ranking changes with time: evicts the least valuable chunk of a sample."""

from __future__ import annotations

import random
from abc import abstractmethod

from cakekv.keys import ChunkKey
from cakekv.store.eviction.base import Eviction, Held

SAMPLE = 32
"""Chunks among which the one that goes is chosen, as in hyperbolic caching (Blankstein et al., USENIX ATC 2017)."""
SAME_S = 10.0
"""Chunks that were used within about so many seconds of each other, such as those of one prompt, are equally old."""


class Sampled(Eviction):
    """Evicts the least worthy of `SAMPLE` chunks drawn at random; of all chunks if there are no more.

    The draws are seeded: the same calls lead to the same victims.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn_from: list[Held] = []
        self._places: dict[ChunkKey, int] = {}
        self._random = random.Random(0)

    @abstractmethod
    def worth(self, chunk: Held, now: float) -> float:
        """How much a chunk is worth keeping."""

    def _victim(self, now: float) -> Held:
        chunks = self._drawn_from
        if len(chunks) > SAMPLE:
            chunks = self._random.choices(chunks, k=SAMPLE)
        return min(chunks, key=lambda chunk: (self.worth(chunk, now), chunk.used_at))

    def _came(self, chunk: Held) -> None:
        self._places[chunk.key] = len(self._drawn_from)
        self._drawn_from.append(chunk)

    def _went(self, chunk: Held) -> None:
        place = self._places.pop(chunk.key)
        last = self._drawn_from.pop()
        if last is not chunk:
            self._drawn_from[place] = last
            self._places[last.key] = place


def age(chunk: Held, now: float) -> float:
    """Seconds since the last use, at least `SAME_S`."""
    return max(now - chunk.used_at, 0.0) + SAME_S

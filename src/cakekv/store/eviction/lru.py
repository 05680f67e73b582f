"""The least recently used chunk goes first."""

from __future__ import annotations

from collections.abc import Iterable

from cakekv.store.eviction.base import Candidate, Eviction


class LeastRecentlyUsed(Eviction):
    """By the time of the last use alone."""

    name = "lru"
    lasting = True

    def order(self, candidates: Iterable[Candidate], now: float) -> list[Candidate]:
        return sorted(candidates, key=lambda candidate: candidate.used_at)

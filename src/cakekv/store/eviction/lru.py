"""Evicts the least recently used chunk."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count

from cakekv.store.eviction.base import Eviction, Held


class LeastRecentlyUsed(Eviction):
    """By the time of the last use alone.

    A heap by last use, in which a chunk that was read since stands where it was until it comes to the top; so a disk's
    chunks may be found in any order.
    """

    name = "lru"

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[float, int, Held]] = []
        self._counter = count()

    def _came(self, chunk: Held) -> None:
        heappush(self._heap, self._entry(chunk))
        if len(self._heap) > 2 * len(self._held) + 64:  # most are of chunks that were removed
            self._heap = [self._entry(held) for held in self._held.values()]
            heapify(self._heap)

    def _redated(self, chunks: Sequence[Held], now: float) -> None:
        ahead = {chunk.key for chunk in chunks}
        others = (chunk for key, chunk in self._held.items() if key not in ahead)
        self._heap = [self._entry(chunk) for chunk in (*others, *chunks)]
        heapify(self._heap)

    def _victim(self, now: float) -> Held:
        chunk = self._oldest()
        assert chunk is not None, "there is at least one"
        return chunk

    def _oldest(self) -> Held | None:
        """The least recently used one, which is in the heap no more; None if that is empty."""
        while self._heap:
            used_at, _, chunk = self._heap[0]
            if self._held.get(chunk.key) is not chunk:
                heappop(self._heap)
            elif chunk.used_at > used_at:
                heapreplace(self._heap, self._entry(chunk))
            else:
                heappop(self._heap)
                return chunk
        return None

    def _entry(self, chunk: Held) -> tuple[float, int, Held]:
        return chunk.used_at, next(self._counter), chunk

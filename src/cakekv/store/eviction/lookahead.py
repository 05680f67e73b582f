"""Evicts what no waiting request needs; of what they need, that of the one furthest back in the queue."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import count

from cakekv.keys import ChunkKey
from cakekv.store.base import Expected
from cakekv.store.eviction.base import Held
from cakekv.store.eviction.lru import LeastRecentlyUsed


class LookAhead(LeastRecentlyUsed):
    """By the queue, which is known, instead of by guesses about the future.

    What no waiting request needs goes by its last use. Only when nothing else is left, chunks go that one needs: whole
    prompts, from the last in the queue on. A chunk that several need counts for the first of them. While nobody waits,
    this is the least recently used.

    The rule is CachedAttention's (arXiv 2403.19708, section 3.3.2).
    """

    name = "lookahead"

    def __init__(self) -> None:
        super().__init__()
        self._turns: dict[ChunkKey, int] = {}
        """Of the chunks that waiting requests need, whose turn it is then."""
        self._needed: dict[ChunkKey, Held] = {}
        """Those of them that would have gone: the heap of the last uses is without them."""
        self._last: list[tuple[int, int, Held]] = []
        """A heap of these, the last turn first."""
        self._numbers = count()

    def expect(self, queue: Sequence[Expected]) -> None:
        turns: dict[ChunkKey, int] = {}
        for turn, one in enumerate(queue):
            for key in one.keys:
                turns.setdefault(key, turn)
        self._turns = turns
        needed, self._needed, self._last = self._needed, {}, []
        for key, chunk in needed.items():
            if key in turns:
                self._needed[key] = chunk
                self._last.append(self._last_entry(chunk))
            else:
                self._came(chunk)
        heapify(self._last)

    def _victim(self, now: float) -> Held:
        while (chunk := self._oldest()) is not None:
            if chunk.key not in self._turns:
                return chunk
            self._needed[chunk.key] = chunk
            heappush(self._last, self._last_entry(chunk))
        while True:
            chunk = heappop(self._last)[2]
            if self._needed.get(chunk.key) is chunk:
                return chunk

    def _went(self, chunk: Held) -> None:
        self._needed.pop(chunk.key, None)

    def _last_entry(self, chunk: Held) -> tuple[int, int, Held]:
        return -self._turns[chunk.key], next(self._numbers), chunk

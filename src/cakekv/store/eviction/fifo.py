"""Evicts the chunk that was written first."""

from __future__ import annotations

from collections import OrderedDict

from cakekv.keys import ChunkKey
from cakekv.store.eviction.base import Eviction, Held


class FirstInFirstOut(Eviction):
    """By the time of writing alone, whatever is read."""

    name = "fifo"

    def __init__(self) -> None:
        super().__init__()
        self._line: OrderedDict[ChunkKey, Held] = OrderedDict()

    def _came(self, chunk: Held) -> None:
        self._line[chunk.key] = chunk

    def _went(self, chunk: Held) -> None:
        del self._line[chunk.key]

    def _victim(self, now: float) -> Held:
        return next(iter(self._line.values()))

"""S3-FIFO: keeps what was read since it came, soon evicts what was not, and remembers that for a while."""

from __future__ import annotations

from collections import OrderedDict

from cakekv.keys import ChunkKey
from cakekv.store.eviction.base import Eviction, Held

_MOST_READS = 3
_SMALL_SHARE = 0.1


class SmallMainGhost(Eviction):
    """S3-FIFO (Yang et al., SOSP 2023): three queues, first in, first out.

    New chunks enter a small queue of a tenth of the bytes. What comes to its end goes on to the main queue if it was
    read meanwhile, else it goes, and its key is remembered until as many others went as there are chunks; if it is
    written again before that, it enters the main queue at once. What comes to the end of the main queue goes round
    again as often as it was read, three times at most.
    """

    name = "s3fifo"

    def __init__(self) -> None:
        super().__init__()
        self._small: OrderedDict[ChunkKey, Held] = OrderedDict()
        self._main: OrderedDict[ChunkKey, Held] = OrderedDict()
        self._ghosts: OrderedDict[ChunkKey, None] = OrderedDict()
        self._reads: dict[ChunkKey, int] = {}
        self._bytes = self._small_bytes = 0

    def _came(self, chunk: Held) -> None:
        self._reads[chunk.key] = 0
        self._bytes += chunk.size
        if chunk.key in self._ghosts:
            del self._ghosts[chunk.key]
            self._main[chunk.key] = chunk
        else:
            self._small[chunk.key] = chunk
            self._small_bytes += chunk.size

    def _before_read(self, chunk: Held, now: float) -> None:
        self._reads[chunk.key] = min(_MOST_READS, self._reads[chunk.key] + 1)

    def _went(self, chunk: Held) -> None:
        del self._reads[chunk.key]
        self._bytes -= chunk.size
        if self._main.pop(chunk.key, None) is None:
            del self._small[chunk.key]
            self._small_bytes -= chunk.size

    def _victim(self, now: float) -> Held:
        while True:
            if self._small and (self._small_bytes > _SMALL_SHARE * self._bytes or not self._main):
                key, chunk = next(iter(self._small.items()))
                if not self._reads[key]:
                    self._remember(key)
                    return chunk
                del self._small[key]
                self._small_bytes -= chunk.size
                self._main[key], self._reads[key] = chunk, 0
            else:
                key, chunk = next(iter(self._main.items()))
                if not self._reads[key]:
                    return chunk
                self._reads[key] -= 1
                self._main.move_to_end(key)

    def _remember(self, key: ChunkKey) -> None:
        self._ghosts[key] = None
        while len(self._ghosts) > len(self._held):
            self._ghosts.popitem(last=False)

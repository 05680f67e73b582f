"""Wraps a store, learns which part of every prompt restores compute anyway, and declines that part."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader, Store
from cakekv.store.eviction.prompts_seen import PromptsSeen
from cakekv.store.wrapper import WrappedStore

_UNREAD = 0.2
"""A part is declined if less than this share of its chunks that could have been read was."""
_PROBES = 16
"""One prompt in so many is taken whole: else nobody would notice that the heads are read now."""
_REMEMBERED = 1 << 16


class UnreadHeadsStore(WrappedStore):
    """Another store, but for those parts of prompts of which hardly anything is read.

    Compute begins at the front while loads come from the back; where they meet depends on the speeds of both, and on
    the prompt. This store knows neither: it sees which chunks are found when a prompt is looked up and which of them
    are read then. Look-ups, reads and writes have to go through the same object, as they do in a `Cake`; elsewhere
    nothing is declined.

    Parameters
    ----------
    inner : Store
        Where the other chunks go.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._seen = PromptsSeen()
        self._lookups = 0
        self._whole: OrderedDict[ChunkKey, None] = OrderedDict()
        """Chunks of prompts that are taken whole."""

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        sizes = self._inner.lookup(keys)
        with self._lock:
            self._seen.asked(keys, [size is not None for size in sizes])
            self._lookups += len(keys) > 1
            if self._lookups % _PROBES == 0:
                self._whole.update(dict.fromkeys(keys))
                while len(self._whole) > _REMEMBERED:
                    self._whole.popitem(last=False)
        return sizes

    def open(self, key: ChunkKey) -> ChunkReader:
        reader = self._inner.open(key)
        with self._lock:
            self._seen.read(key)
        return reader

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        with self._lock:
            place = self._seen.place(key)
            declined = place is not None and self.declines(place.part) and key not in self._whole
        return not declined and self._inner.write(key, data)

    def declines(self, part: int) -> bool:
        """Whether chunks of one of the parts of a prompt (see `PromptsSeen`) are not worth writing."""
        return self._seen.needed(part) < _UNREAD

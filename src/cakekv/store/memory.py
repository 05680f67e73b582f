"""The memory tier: chunks in this process's RAM."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from cakekv.chunk import peek_place
from cakekv.errors import BadInput, MissingChunk
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader, Evicted, Removal, Store, StoredChunk, StoreStats
from cakekv.store.eviction.base import Candidate, Eviction, Victims
from cakekv.store.eviction.lru import LeastRecentlyUsed
from cakekv.store.evictions import Evictions
from cakekv.store.removals import CAPACITY, REQUEST, RecentRemovals

EVICTION_BATCH = 4096
"""Among how many of the least recently used chunks the policy chooses."""


@dataclass(slots=True)
class _Entry:
    data: bytes
    used_at: float
    uses: int = 0


class MemoryStore(Store):
    """Chunks in RAM.

    A chunk that is evicted while it is read stays in RAM until its reader closes, outside the capacity.

    Parameters
    ----------
    capacity : int or None
        Bytes it may hold; None: no bound.
    evict : Eviction
        What goes first when that is not enough.

    Raises
    ------
    BadInput
        The capacity is not positive.
    """

    name = "memory"
    counts_cheaply = True

    def __init__(self, capacity: int | None = None, evict: Eviction | None = None) -> None:
        if capacity is not None and capacity <= 0:
            raise BadInput(f"a store's capacity is at least one byte, not {capacity}")
        self.capacity = capacity
        self._lock = threading.Lock()
        self._chunks: OrderedDict[ChunkKey, _Entry] = OrderedDict()  # least recently used first
        self._victims = Victims(evict or LeastRecentlyUsed())
        self._evictions = Evictions(self.name)
        self._bytes = 0
        self._identities: dict[str, dict[str, str]] = {}
        self._removals = RecentRemovals()

    @property
    def policy(self) -> Eviction:
        """What goes first when room is needed."""
        return self._victims.policy

    @property
    def evicted(self) -> Evicted:
        return self._evictions.total

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        with self._lock:
            return [len(self._chunks[key].data) if key in self._chunks else None for key in keys]

    def open(self, key: ChunkKey) -> ChunkReader:
        with self._lock:
            if key not in self._chunks:
                raise MissingChunk(f"chunk {key.short}… is not in memory")
            entry = self._chunks[key]
            if self.marks_use:
                entry.used_at, entry.uses = time.time(), entry.uses + 1
                self._chunks.move_to_end(key)
        return _MemoryReader(entry.data)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        with self._lock:
            if self.capacity is not None and len(data) > self.capacity:
                return False
            self._drop(key)
            while self.capacity is not None and self._bytes + len(data) > self.capacity:
                self._evict()
            self._chunks[key] = _Entry(bytes(data), time.time())
            self._bytes += len(data)
            return True

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        with self._lock:
            removed = [key for key in keys if self._drop(key)]
            self._removals.note(removed, REQUEST)
            return len(removed)

    def __iter__(self) -> Iterator[StoredChunk]:
        with self._lock:
            chunks = [StoredChunk(key, len(entry.data), entry.used_at) for key, entry in self._chunks.items()]
        return iter(chunks)

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(len(self._chunks), self._bytes, self.capacity)

    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        with self._lock:
            self._identities[root] = dict(fields)

    def identities(self) -> dict[str, dict[str, str]]:
        with self._lock:
            return {root: dict(fields) for root, fields in self._identities.items()}

    def removals(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, Removal]:
        """See `Store`; of about the last 16,000 that were removed."""
        with self._lock:
            return self._removals.find(keys)

    def _drop(self, key: ChunkKey) -> bool:
        entry = self._chunks.pop(key, None)
        if entry is None:
            return False
        self._bytes -= len(entry.data)
        return True

    def _evict(self) -> None:
        """Drop the chunk that is to go next."""
        victim = self._victims.next()
        if victim is None:
            oldest = islice(self._chunks.items(), EVICTION_BATCH)
            self._victims.refill((_candidate(key, entry) for key, entry in oldest), time.time())
        elif (entry := self._chunks.get(victim.key)) and entry.used_at == victim.used_at:
            self._drop(victim.key)
            self._removals.note([victim.key], CAPACITY)
            self._evictions.add(len(entry.data))


def _candidate(key: ChunkKey, entry: _Entry) -> Candidate:
    return Candidate(key, len(entry.data), entry.used_at, entry.uses, *peek_place(entry.data))


class _MemoryReader(ChunkReader):
    slice_bytes = 1 << 20

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = memoryview(data)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        data = self._data[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

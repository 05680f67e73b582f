"""The memory tier: chunks in this process's RAM."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from cakekv.chunk import peek_place
from cakekv.errors import BadInput, MissingChunk
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader, Evicted, Expected, Removal, Store, StoredChunk, StoreStats
from cakekv.store.eviction.base import Eviction, Held
from cakekv.store.eviction.lru import LeastRecentlyUsed
from cakekv.store.pins import PINNED_SHARE, Pins, check_share, most_pinned, new_pin
from cakekv.store.removals import CAPACITY, REQUEST, Evictions, RecentRemovals


class MemoryStore(Store):
    """Chunks in RAM.

    A chunk that is evicted while it is read stays in RAM until its reader closes, outside the capacity.

    Parameters
    ----------
    capacity : int or None
        Bytes it may hold; None: no bound.
    evict : Eviction or None
        What goes first when that is not enough, of its own; None: the least recently used.
    pin_share : float
        Of the capacity, what pins may take up.
    clock : callable
        Seconds since the epoch.

    Raises
    ------
    BadInput
        The capacity is not positive, or the share not between 0 and 1.
    """

    name = "memory"
    counts_cheaply = True

    def __init__(
        self,
        capacity: int | None = None,
        evict: Eviction | None = None,
        pin_share: float = PINNED_SHARE,
        clock: Callable[[], float] = lambda: time.time(),
    ) -> None:
        if capacity is not None and capacity <= 0:
            raise BadInput(f"a store's capacity is at least one byte, not {capacity}")
        self.capacity = capacity
        self._pin_share = check_share(pin_share)
        self._pins = Pins()
        self._lock = threading.Lock()
        self._chunks: dict[ChunkKey, bytes] = {}
        self._policy = LeastRecentlyUsed() if evict is None else evict
        self._evictions = Evictions(self.name)
        self._clock = clock
        self._bytes = 0
        self._identities: dict[str, dict[str, str]] = {}
        self._removals = RecentRemovals()

    @property
    def policy(self) -> Eviction:
        """What goes first when room is needed."""
        return self._policy

    @property
    def evicted(self) -> Evicted:
        return self._evictions.total

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        with self._lock:
            self._policy.asked(keys, self._clock())
            return [len(self._chunks[key]) if key in self._chunks else None for key in keys]

    def probe(self, keys: Sequence[ChunkKey]) -> list[bool]:
        with self._lock:
            return [key in self._chunks for key in keys]

    def open(self, key: ChunkKey) -> ChunkReader:
        with self._lock:
            if key not in self._chunks:
                raise MissingChunk(f"chunk {key.short}… is not in memory")
            if self.marks_use:
                self._policy.read(key, self._clock())
            return _MemoryReader(self._chunks[key])

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        with self._lock:
            if self.capacity is not None and len(data) > self.capacity:
                return False
            now, replaced = self._clock(), len(self._chunks.get(key, b""))
            self._pins = self._pins.at(now)
            self._policy.spare(self._pins.keys)
            while self.capacity is not None and self._bytes - replaced + len(data) > self.capacity:
                victim = self._policy.evict(now)
                if victim is None:  # all others are pinned
                    return False
                if victim.key == key:
                    replaced = 0
                self._bytes -= len(self._chunks.pop(victim.key))
                self._removals.note([victim.key], CAPACITY)
                self._evictions.add(victim.size)
            self._drop(key)
            self._chunks[key] = bytes(data)
            self._bytes += len(data)
            self._policy.wrote(Held(key, len(data), now, *peek_place(data)))
            return True

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        with self._lock:
            removed = [key for key in keys if self._drop(key)]
            self._removals.note(removed, REQUEST)
            return len(removed)

    def __iter__(self) -> Iterator[StoredChunk]:
        with self._lock:
            chunks = [StoredChunk(chunk.key, chunk.size, chunk.used_at) for chunk in self._policy.chunks()]
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

    def pin(self, name: ChunkKey, keys: Sequence[ChunkKey], ttl_s: float, chunk_bytes: int) -> None:
        with self._lock:
            now = self._clock()
            stored = {key: len(self._chunks[key]) for key in keys if key in self._chunks}
            pin, most = new_pin(keys, stored, chunk_bytes, ttl_s, now), most_pinned(self.capacity, self._pin_share)
            self._pins = self._pins.at(now).with_pin(name, pin, most, "memory")

    def release(self, name: ChunkKey) -> bool:
        with self._lock:
            before = self._pins = self._pins.at(self._clock())
            self._pins = before.without(name)
            return name in before.by_name

    def pins(self) -> Pins:
        with self._lock:
            self._pins = self._pins.at(self._clock())
            return self._pins

    def expect(self, queue: Sequence[Expected]) -> None:
        with self._lock:
            self._policy.expect(queue)

    def survives_fork(self) -> bool:
        """See `Store`; each process has its own chunks from then on."""
        return not self._lock.locked()

    def _drop(self, key: ChunkKey) -> bool:
        data = self._chunks.pop(key, None)
        if data is None:
            return False
        self._bytes -= len(data)
        self._policy.removed(key)
        return True


class _MemoryReader(ChunkReader):
    slice_bytes = 1 << 20

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = memoryview(data)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        data = self._data[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

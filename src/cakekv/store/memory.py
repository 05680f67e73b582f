"""The memory tier: chunks in this process's RAM, the least recently used evicted first."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

from cakekv.errors import BadInput, MissingChunk
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader, Store, StoredChunk, StoreStats


class MemoryStore(Store):
    """Chunks in RAM.

    A chunk that is evicted while it is read stays in RAM until its reader closes, outside the capacity.

    Parameters
    ----------
    capacity : int or None
        Bytes it may hold; None: no bound.

    Raises
    ------
    BadInput
        The capacity is not positive.
    """

    name = "memory"

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and capacity <= 0:
            raise BadInput(f"a store's capacity is at least one byte, not {capacity}")
        self.capacity = capacity
        self._lock = threading.Lock()
        self._chunks: OrderedDict[ChunkKey, tuple[bytes, float]] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._identities: dict[str, dict[str, str]] = {}

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        with self._lock:
            return [len(self._chunks[key][0]) if key in self._chunks else None for key in keys]

    def open(self, key: ChunkKey) -> ChunkReader:
        with self._lock:
            if key not in self._chunks:
                raise MissingChunk(f"chunk {key.short}… is not in memory")
            data, _ = self._chunks.pop(key)
            self._chunks[key] = data, time.time()
        return _MemoryReader(data)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        with self._lock:
            if self.capacity is not None and len(data) > self.capacity:
                return False
            self._drop(key)
            while self.capacity is not None and self._bytes + len(data) > self.capacity:
                self._drop(next(iter(self._chunks)))
            self._chunks[key] = bytes(data), time.time()
            self._bytes += len(data)
            return True

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        with self._lock:
            return sum(self._drop(key) for key in keys)

    def __iter__(self) -> Iterator[StoredChunk]:
        with self._lock:
            chunks = [StoredChunk(key, len(data), used_at) for key, (data, used_at) in self._chunks.items()]
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

    def _drop(self, key: ChunkKey) -> bool:
        entry = self._chunks.pop(key, None)
        if entry is None:
            return False
        self._bytes -= len(entry[0])
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

"""A store that passes everything on to another one; subclasses change some of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader, Evicted, Store, StoredChunk, StoreStats


class WrappedStore(Store):
    """Another store.

    Parameters
    ----------
    inner : Store
        The other store; closed with this one.
    """

    def __init__(self, inner: Store) -> None:
        self.name = inner.name
        self.parallel_reads = inner.parallel_reads
        self.counts_cheaply = inner.counts_cheaply
        self._inner = inner

    @property
    def parts(self) -> Sequence[Store]:
        return [self._inner]

    @property
    def evicted(self) -> Evicted:
        return self._inner.evicted

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        return self._inner.lookup(keys)

    def probe(self, keys: Sequence[ChunkKey]) -> list[bool] | None:
        return self._inner.probe(keys)

    def open(self, key: ChunkKey) -> ChunkReader:
        return self._inner.open(key)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        return self._inner.write(key, data)

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        return self._inner.delete(keys)

    def __iter__(self) -> Iterator[StoredChunk]:
        return iter(self._inner)

    def stats(self) -> StoreStats:
        return self._inner.stats()

    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        self._inner.remember_identity(root, fields)

    def identities(self) -> dict[str, dict[str, str]]:
        return self._inner.identities()

    def close(self) -> None:
        self._inner.close()


class WrappedReader(ChunkReader):
    """Another reader, for subclasses that change some of it.

    Parameters
    ----------
    inner : ChunkReader
        The other reader; closed with this one.
    """

    def __init__(self, inner: ChunkReader) -> None:
        self.size = inner.size
        self.slice_bytes = inner.slice_bytes
        self._inner = inner

    def announce(self, start: int, end: int) -> None:
        self._inner.announce(start, end)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        return self._inner.read_into(buffer, offset)

    def close(self) -> None:
        self._inner.close()

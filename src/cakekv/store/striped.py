"""Several stores as one, each chunk in the one that its key chooses: folders on several disks, read at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from xxhash import xxh3_64_intdigest

from cakekv.errors import BadInput, NotDeleted
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader, Evicted, Store, StoredChunk, StoreStats


class StripedStore(Store):
    """Chunks spread evenly over several stores of one kind.

    A chunk goes to the store that scores highest for its key (rendezvous hashing), so that a store added at the end
    takes its share from all others, and moves nothing else. The order of the stores must stay the same.

    Parameters
    ----------
    stores : sequence of Store
        Where to. They are closed with this one.

    Raises
    ------
    BadInput
        There are none.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        if not stores:
            raise BadInput("a striped store needs at least one store to put chunks into")
        self.name = stores[0].name
        self.parallel_reads = sum(store.parallel_reads for store in stores)
        self.counts_cheaply = all(store.counts_cheaply for store in stores)
        self._stores = list(stores)

    @property
    def parts(self) -> Sequence[Store]:
        return self._stores

    @property
    def evicted(self) -> Evicted:
        return Evicted(*map(sum, zip(*(store.evicted for store in self._stores), strict=True)))

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        sizes: dict[ChunkKey, int | None] = {}
        for store, share in self._shares(keys):
            sizes.update(zip(share, store.lookup(share), strict=True))
        return [sizes[key] for key in keys]

    def open(self, key: ChunkKey) -> ChunkReader:
        return self.place_of(key).open(key)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        return self.place_of(key).write(key, data)

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        """See `Store`; also where chunks lie that were written before a store was added."""
        deleted, trouble = 0, None
        for store in self._stores:
            try:
                deleted += store.delete(keys)
            except NotDeleted as error:
                deleted += error.deleted
                trouble = trouble or str(error)
        if trouble is not None:
            raise NotDeleted(trouble, deleted)
        return deleted

    def __iter__(self) -> Iterator[StoredChunk]:
        for store in self._stores:
            yield from store

    def stats(self) -> StoreStats:
        held = [store.stats() for store in self._stores]
        capacities = [stats.capacity for stats in held]
        return StoreStats(
            sum(stats.chunks for stats in held),
            sum(stats.bytes for stats in held),
            None if None in capacities else sum(capacity or 0 for capacity in capacities),
        )

    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        for store in self._stores:
            store.remember_identity(root, fields)

    def identities(self) -> dict[str, dict[str, str]]:
        return {root: fields for store in self._stores for root, fields in store.identities().items()}

    def close(self) -> None:
        for store in self._stores:
            store.close()

    def place_of(self, key: ChunkKey) -> Store:
        """The store in which a chunk is looked for."""
        return self._stores[self._index_of(key)]

    def _index_of(self, key: ChunkKey) -> int:
        return max(range(len(self._stores)), key=lambda index: xxh3_64_intdigest(key, seed=index))

    def _shares(self, keys: Sequence[ChunkKey]) -> Iterator[tuple[Store, list[ChunkKey]]]:
        shares: dict[int, list[ChunkKey]] = {}
        for key in keys:
            shares.setdefault(self._index_of(key), []).append(key)
        return ((self._stores[index], share) for index, share in shares.items())

"""Several stores as one: a chunk's key chooses its store, so folders on several disks are read at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from xxhash import xxh3_64_intdigest

from cakekv.errors import BadInput, NotDeleted, StoreError
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader, Evicted, Store, StoredChunk, StoreStats
from cakekv.store.sizes import Sizes, doubt_of, known_sizes


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
        known: dict[ChunkKey, int | None] = {}
        failed: dict[ChunkKey, StoreError] = {}
        doubt = None
        for store, share in self._shares(keys):
            try:
                sizes = store.lookup(share)
            except StoreError as error:
                failed |= dict.fromkeys(share, error)
            else:
                known |= zip(share, sizes, strict=True)
                doubt = doubt or doubt_of(sizes)
        if failed and not known:
            raise next(iter(failed.values()))
        found = known_sizes(keys, known, failed)
        return Sizes(found, doubt) if doubt and not failed else found

    def probe(self, keys: Sequence[ChunkKey]) -> list[bool] | None:
        """See `Store`; None unless all of its stores can be asked cheaply."""
        known: dict[ChunkKey, bool] = {}
        for store, share in self._shares(keys):
            found = store.probe(share)
            if found is None:
                return None
            known |= zip(share, found, strict=True)
        return [known[key] for key in keys]

    def open(self, key: ChunkKey) -> ChunkReader:
        return self.place_of(key).open(key)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        return self.place_of(key).write(key, data)

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        """See `Store`; also where chunks lie that were written before a store was added."""
        deleted, left = 0, dict[ChunkKey, str]()
        partly: NotDeleted | None = None
        trouble: list[StoreError] = []
        for store in self._stores:
            try:
                deleted += store.delete(keys)
            except NotDeleted as error:
                partly = error
                deleted += error.deleted
                left |= error.left
            except StoreError as error:
                trouble.append(error)
        if len(trouble) == len(self._stores):
            raise trouble[0]
        if trouble:  # who knows what was in there
            left |= dict.fromkeys(keys, str(trouble[0]))
        if left:
            raise NotDeleted.of(deleted, left)
        if partly is not None:
            raise NotDeleted(str(partly), deleted)
        return deleted

    def __iter__(self) -> Iterator[StoredChunk]:
        trouble: StoreError | None = None
        for store in self._stores:
            try:
                yield from store
            except StoreError as error:
                trouble = error
        if trouble is not None:
            raise trouble

    def stats(self) -> StoreStats:
        held: list[StoreStats] = []
        trouble: list[StoreError] = []
        for store in self._stores:
            try:
                held.append(store.stats())
            except StoreError as error:
                trouble.append(error)
        if not held:
            raise trouble[0]
        capacities = [stats.capacity for stats in held]
        return StoreStats(
            sum(stats.chunks for stats in held),
            sum(stats.bytes for stats in held),
            None if None in capacities else sum(capacity or 0 for capacity in capacities),
            tuple(map(str, trouble)) + sum((stats.uncounted for stats in held), ()),
        )

    def pin(self, name: ChunkKey, keys: Sequence[ChunkKey], ttl_s: float, chunk_bytes: int) -> None:
        """See `Store`; if one of the stores refuses, the others do not keep it either."""
        pinned: list[Store] = []
        try:
            for store, share in self._shares(keys):
                known = name in store.pins().by_name
                store.pin(name, share, ttl_s, chunk_bytes)
                pinned += [] if known else [store]
        except StoreError:
            for store in pinned:
                with suppress(StoreError):
                    store.release(name)
            raise

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

"""Striping: an even spread, and what a store more changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cakekv.errors import BadInput, NotDeleted, StoreError
from cakekv.keys import ChunkKey
from cakekv.store.base import Store, StoredChunk, StoreStats
from cakekv.store.disk import DiskStore
from cakekv.store.maintenance.listing import listing
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import open_store
from cakekv.store.sizes import doubt_of
from cakekv.store.striped import StripedStore

from .chunks import SIZE, chunk_of, key_of, read


def fill(store: Store, count: int) -> None:
    for number in range(count):
        store.write(key_of(number), memoryview(b"x"))


def test_the_spread_is_even() -> None:
    stores = [MemoryStore() for _ in range(4)]
    fill(StripedStore(stores), 1000)
    assert all(200 < store.stats().chunks < 300 for store in stores)


def test_a_store_more_takes_its_share_and_moves_nothing_else() -> None:
    stores = [MemoryStore() for _ in range(4)]
    fill(StripedStore(stores[:3]), 1000)
    found = StripedStore(stores).lookup([key_of(number) for number in range(1000)])
    assert 700 < sum(size is not None for size in found) < 800


def test_folders_by_url(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/a?stripe={tmp_path}/b,{tmp_path}/c%20d&capacity={30 * SIZE}&direct=false"
    with open_store(url) as store:
        assert store.parallel_reads == 3 * DiskStore.parallel_reads
        for number in range(6):
            store.write(key_of(number), chunk_of(number))
        assert store.stats().capacity == 30 * SIZE
        assert store.name == "disk"
    held = [DiskStore(tmp_path / name).stats().chunks for name in ("a", "b", "c d")]
    assert sum(held) == 6
    assert min(held) > 0
    with open_store(url) as store:
        for number in range(6):
            assert read(store, key_of(number)) == chunk_of(number)


def test_what_was_written_before_a_store_was_added_can_be_deleted() -> None:
    stores = [MemoryStore() for _ in range(2)]
    fill(stores[0], 100)
    store = StripedStore(stores)
    assert store.delete([chunk.key for chunk in store]) == 100
    assert store.stats().chunks == 0


@pytest.mark.parametrize("stripe", ["", "b", "/b,", "/a"])
def test_bad_folders(tmp_path: Path, stripe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput):
        open_store(f"file:///a?stripe={stripe}")


def test_nothing_to_stripe_over() -> None:
    with pytest.raises(BadInput, match="at least one"):
        StripedStore([])


def test_a_folder_that_fails_costs_its_own_chunks() -> None:
    class Away(MemoryStore):
        def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
            raise StoreError("away")

        def delete(self, keys: Sequence[ChunkKey]) -> int:
            raise StoreError("away")

        def stats(self) -> StoreStats:
            raise StoreError("away")

        def __iter__(self) -> Iterator[StoredChunk]:
            raise StoreError("away")

    stores = [MemoryStore(), MemoryStore(), Away()]
    store = StripedStore(stores)
    fill(store, 30)
    keys = [key_of(number) for number in range(30)]
    held = [store.place_of(key) is not stores[2] for key in keys]
    found = store.lookup(keys)
    assert found == [1 if there else None for there in held]
    assert f"{held.count(False)} of 30" in str(doubt_of(found))
    assert store.stats() == StoreStats(sum(held), sum(held), None, ("away",))
    listed = listing(store)
    assert (len(listed.chunks), listed.troubles) == (sum(held), ["away"])
    with pytest.raises(NotDeleted) as caught:
        store.delete(keys)
    assert caught.value.deleted == sum(held)
    assert [part.stats().chunks for part in stores[:2]] == [0, 0]
    store = StripedStore([Away()])
    for everything in (store.stats, lambda: store.lookup(keys), lambda: list(store), lambda: store.delete(keys)):
        with pytest.raises(StoreError, match="away"):
            everything()

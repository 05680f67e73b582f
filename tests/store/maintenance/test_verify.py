"""Verifying and repairing: tiers apart, sealed chunks, lengths that are lies."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cakekv.chunk import MAX_CHUNK_BYTES, seal, segments, verify_chunk
from cakekv.errors import CorruptChunk, NoAnswer, StoreError
from cakekv.keys import ChunkKey
from cakekv.packed_chunk import pack_chunk
from cakekv.store.base import ChunkReader, Store
from cakekv.store.disk import DiskStore
from cakekv.store.encrypted import EncryptedStore
from cakekv.store.keyring import Keyring
from cakekv.store.maintenance.copying import copy
from cakekv.store.maintenance.reading import read_anywhere, read_chunk
from cakekv.store.maintenance.verify import repair, verify
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.tiered import TieredStore, TierPlan
from cakekv.store.wrapper import WrappedStore
from tests.store.chunks import SIZE, chunk_of, coded_chunk_of, key_of, opener, packable_chunk_of, read

KEYS = [bytes([number]) * 32 for number in range(2)]


class Liar(WrappedStore):
    """Says that its chunks are longer than they are."""

    def __init__(self, inner: Any, size: int) -> None:
        super().__init__(inner)
        self.size = size
        self.asked: list[int] = []

    def open(self, key: ChunkKey) -> ChunkReader:
        store, reader = self, self._inner.open(key)

        class Lying(ChunkReader):
            size = store.size

            def read_into(self, buffer: memoryview, offset: int) -> int:
                store.asked.append(len(buffer))
                return reader.read_into(buffer, offset)

        return Lying()


def open_failing() -> Store:
    raise StoreError("nobody answers")


@pytest.fixture
def tiered(tmp_path: Path) -> Iterator[tuple[TieredStore, MemoryStore, DiskStore]]:
    """A tier that is down, and two that each hold two chunks."""
    stores: tuple[MemoryStore, DiskStore] = (MemoryStore(), DiskStore(tmp_path / "kv"))
    for store in stores:
        for number in range(2):
            store.write(key_of(number), chunk_of(number))
    openers = [open_failing, *map(opener, stores)]
    with TieredStore([TierPlan(Member(opener, "tier")) for opener in openers]) as tiered:
        yield tiered, *stores


def test_tiers_are_repaired_apart_and_one_that_is_down_is_named(
    tiered: tuple[TieredStore, MemoryStore, DiskStore],
) -> None:
    store, memory, disk = tiered
    memory.write(key_of(0), chunk_of(5))
    (disk.path / "incoming" / f"{SIZE}-0123456789abcdef.tmp").write_text("half")
    down, front, back = repair(store)
    assert "nobody answers" in str(down.found.error)
    assert (front.deleted, list(front.found.corrupt)) == (1, [key_of(0)])
    assert (back.deleted, back.found.corrupt) == (0, {})
    assert back.tidied == ["Removed 1 temporary file(s) of writers that died."]
    assert memory.lookup([key_of(0)]) == [None]
    assert read(disk, key_of(0)) == chunk_of(0)


def test_a_sound_copy_is_found_behind_a_corrupt_one(tiered: tuple[TieredStore, MemoryStore, DiskStore]) -> None:
    store, memory, disk = tiered
    memory.write(key_of(0), chunk_of(5))
    assert read_anywhere(store, key_of(0)) == chunk_of(0)
    disk.write(key_of(0), chunk_of(6))
    with pytest.raises(CorruptChunk):
        read_anywhere(store, key_of(0))


def test_a_store_that_fails_is_an_error() -> None:
    class Failing(WrappedStore):
        def open(self, key: ChunkKey) -> ChunkReader:
            raise StoreError("no luck")

    inner = MemoryStore()
    inner.write(key_of(0), chunk_of(0))
    for work in (verify, repair):
        with pytest.raises(StoreError, match="no luck"):
            work(Failing(inner))
    assert inner.lookup([key_of(0)]) == [SIZE]


def test_one_chunk_that_cannot_be_read_is_named_and_left_alone() -> None:
    class Failing(WrappedStore):
        def open(self, key: ChunkKey) -> ChunkReader:
            if key == key_of(1):
                raise StoreError("no luck")
            return super().open(key)

    inner = MemoryStore()
    for number in range(3):
        inner.write(key_of(number), chunk_of(number))
    damaged = chunk_of(2)
    damaged[5000] ^= 1
    inner.write(key_of(2), damaged)
    [done] = repair(Failing(inner))
    assert done.found.unreadable == {key_of(1): "no luck"}
    assert (list(done.found.corrupt), done.deleted, done.found.chunks) == ([key_of(2)], 1, 2)
    assert inner.lookup([key_of(0), key_of(1), key_of(2)]) == [SIZE, SIZE, None]


def test_a_few_chunks_that_cannot_be_read_do_not_end_a_tier() -> None:
    class Failing(WrappedStore):
        def open(self, key: ChunkKey) -> ChunkReader:
            if key != key_of(9):
                raise StoreError("no luck")
            return super().open(key)

    inner = MemoryStore()
    for number in range(10):
        inner.write(key_of(number), chunk_of(number))
    store = TieredStore([TierPlan(Member(lambda: Failing(inner), "tier"))])
    [found] = verify(store)
    assert (len(found.unreadable), found.chunks, found.error) == (9, 1, None)
    assert read_anywhere(store, key_of(9)) == chunk_of(9)
    assert len(copy(store, MemoryStore()).failed) == 9
    assert store.members[0].is_up


def test_what_cannot_be_opened_is_not_called_corrupt() -> None:
    inner = MemoryStore()
    EncryptedStore(inner, Keyring(KEYS[:1])).write(key_of(0), chunk_of(0))
    other = EncryptedStore(inner, Keyring(KEYS[1:]))
    other.write(key_of(1), chunk_of(1))
    [done] = repair(other)
    assert (done.found.unopenable, done.found.corrupt, done.deleted) == ([key_of(0)], {}, 0)
    [done] = repair(other, drop_unopenable=True)
    assert done.deleted == 1
    assert [chunk.key for chunk in inner] == [key_of(1)]


@pytest.mark.parametrize("cut", [1, 4096, SIZE])
def test_a_sealed_chunk_that_was_cut_is_found(cut: int) -> None:
    """Whatever length is left, also one that no sealed chunk has, and that the store itself passes over."""
    inner = MemoryStore()
    store = EncryptedStore(inner, Keyring(KEYS))
    store.write(key_of(0), chunk_of(0))
    inner.write(key_of(0), memoryview(read(inner, key_of(0)))[:-cut])
    [done] = repair(store)
    assert list(done.found.corrupt) == [key_of(0)]
    assert list(inner) == []


def test_a_large_thing_is_looked_at_before_memory_is_set_aside() -> None:
    inner = MemoryStore()
    inner.write(key_of(0), chunk_of(0))
    for size in (MAX_CHUNK_BYTES - 1, MAX_CHUNK_BYTES + 1, 1 << 60):
        liar = Liar(inner, size)
        with pytest.raises(CorruptChunk):
            read_chunk(liar, key_of(0))
        assert max(liar.asked, default=0) <= 8192


def test_no_threads_are_left_when_one_fails(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "kv")
    for number in range(50):
        store.write(key_of(number), chunk_of(number))

    class FailingOnce(WrappedStore):
        def open(self, key: ChunkKey) -> ChunkReader:
            if key == key_of(7):
                raise NoAnswer("no luck")
            return super().open(key)

    before = threading.active_count()
    with pytest.raises(StoreError):
        verify(FailingOnce(store))
    assert threading.active_count() == before


def test_packed_chunks_are_unpacked() -> None:
    """One of them has sound checksums and does not unpack."""
    store = MemoryStore()
    packed = pack_chunk(packable_chunk_of(0))
    assert packed is not None
    shape = verify_chunk(packed).shape
    store.write(key_of(0), packed)
    store.write(key_of(1), coded_chunk_of(1))
    hostile = memoryview(bytearray(packed))
    segment = segments(shape, hostile)[0]
    segment[:] = b"\xff" * len(segment)
    seal(shape, hostile, key_of(2), 0)
    store.write(key_of(2), hostile)
    [found] = verify(store)
    assert found.chunks == 3
    assert list(found.corrupt) == [key_of(2)]
    [repaired] = repair(store)
    assert repaired.deleted == 1
    assert store.lookup([key_of(0), key_of(2)]) == [len(packed), None]

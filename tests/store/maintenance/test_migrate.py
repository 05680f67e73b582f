"""Chunks under former options: older keys, none, other folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cakekv.errors import MissingChunk, UnknownKey
from cakekv.keys import ChunkKey
from cakekv.packed_chunk import pack_chunk, unpack_chunk
from cakekv.store.base import ChunkReader, Store
from cakekv.store.disk import DiskStore
from cakekv.store.encrypted import EncryptedStore
from cakekv.store.keyring import Keyring
from cakekv.store.maintenance.migrate import migrate
from cakekv.store.maintenance.reading import read_chunk
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.packed import Pack, PackedStore
from cakekv.store.redis import RedisStore
from cakekv.store.striped import StripedStore
from cakekv.store.tiered import TieredStore, TierPlan
from tests.store.chunks import SIZE, chunk_of, coded_chunk_of, key_of, opener, packable_chunk_of, read
from tests.store.conftest import Servers

OLD, NEW, LOST = (bytes([number]) * 32 for number in range(3))


def sealed(inner: Store, *keys: Any) -> Any:
    return EncryptedStore(inner, Keyring(keys))


def striped(folder: Path, names: Any) -> Any:
    return StripedStore([DiskStore(folder / name) for name in names])


def check(store: Store, count: int) -> None:
    assert {chunk.key: chunk.size for chunk in store} == {key_of(number): SIZE for number in range(count)}
    for number in range(count):
        assert read(store, key_of(number)) == chunk_of(number)


def test_after_a_rotation_the_old_key_is_not_needed_any_more() -> None:
    inner = MemoryStore()
    for number in range(4):
        (sealed(inner, OLD) if number < 3 else sealed(inner, NEW)).write(key_of(number), chunk_of(number))
    both = sealed(inner, NEW, OLD)
    assert migrate(both, dry_run=True).fates == {"resealed": 3}
    with pytest.raises(UnknownKey):
        sealed(inner, NEW).open(key_of(0))
    seen: list[Any] = []
    assert migrate(both, seen.append).fates == {"resealed": 3}
    assert sum(seen) >= 3 * SIZE
    check(sealed(inner, NEW), 4)
    assert migrate(both).fates == {}


def test_what_lay_in_the_open_is_sealed() -> None:
    inner = MemoryStore()
    for number in range(2):
        inner.write(key_of(number), chunk_of(number))
    assert migrate(sealed(inner, NEW)).fates == {"resealed": 2}
    check(sealed(inner, NEW), 2)
    assert bytes(chunk_of(0)[5000:5100]) not in read(inner, key_of(0))


def test_what_cannot_be_trusted_or_opened_stays_as_it_is() -> None:
    inner = MemoryStore()
    sealed(inner, LOST).write(key_of(0), chunk_of(0))
    inner.write(key_of(1), chunk_of(2))
    inner.write(key_of(2), memoryview(b"short"))
    before = {number: read(inner, key_of(number)) for number in range(3)}
    migrated = migrate(sealed(inner, NEW, OLD))
    assert set(migrated.corrupt) == {key_of(0), key_of(1), key_of(2)}
    assert "not in the keyring" in migrated.corrupt[key_of(0)]
    assert migrated.fates == {}
    assert {number: read(inner, key_of(number)) for number in range(3)} == before


def test_the_order_of_use_is_kept() -> None:
    inner = MemoryStore()
    numbers = {key_of(number): number for number in range(30)}
    for key, number in numbers.items():
        sealed(inner, OLD).write(key, chunk_of(number))
    migrate(sealed(inner, NEW, OLD))
    order = [numbers[chunk.key] for chunk in sorted(inner, key=lambda chunk: chunk.used_at)]
    assert all(abs(place - number) <= 2 * inner.parallel_reads for place, number in enumerate(order)), order


def test_a_full_store_is_not_emptied_by_it(tmp_path: Path) -> None:
    inner = DiskStore(tmp_path / "kv")
    for number in range(20):
        sealed(inner, OLD).write(key_of(number), chunk_of(number))
    inner = DiskStore(tmp_path / "kv", inner.stats().bytes)
    migrate(sealed(inner, NEW, OLD))
    kept = {chunk.key for chunk in inner}
    assert len(kept) >= 20 - 2 * inner.parallel_reads
    for key in kept:
        sealed(inner, NEW).open(key).close()


def test_a_server_too(shared: Servers, tmp_path: Path) -> None:
    with RedisStore("127.0.0.1", shared.valkey, prefix=f"{tmp_path}:") as inner:
        sealed(inner, OLD).write(key_of(0), chunk_of(0))
        inner.write(key_of(1), chunk_of(1))
        assert migrate(sealed(inner, NEW, OLD)).fates == {"resealed": 2}
        check(sealed(inner, NEW), 2)


def test_a_folder_more(tmp_path: Path) -> None:
    with striped(tmp_path, "ab") as former:
        for number in range(30):
            former.write(key_of(number), chunk_of(number))
    with striped(tmp_path, "abc") as latter:
        lost = sum(size is None for size in latter.lookup([key_of(number) for number in range(30)]))
        assert lost > 0
        assert migrate(latter, dry_run=True).fates == {"moved": lost}
        assert migrate(latter).fates == {"moved": lost}
        check(latter, 30)
        assert latter.parts[2].stats().chunks == lost
        assert migrate(latter).fates == {}


def test_a_chunk_that_was_computed_again_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with striped(tmp_path, "abc") as store:
        astray = next(part for part in store.parts if part is not store.place_of(key_of(0)))
        astray.write(key_of(0), chunk_of(9))
        store.write(key_of(0), chunk_of(0))
        assert migrate(store).fates == {"moved": 1}
        check(store, 1)


def test_sealed_chunks_in_other_folders_within_a_tier(tmp_path: Path) -> None:
    with striped(tmp_path, "ab") as former:
        for number in range(20):
            sealed(former, OLD).write(key_of(number), chunk_of(number))
    tier = sealed(striped(tmp_path, "abc"), NEW, OLD)
    with TieredStore([TierPlan(Member(lambda: tier, "disk"))]) as store:
        fates = migrate(store).fates
        assert fates["resealed"] == 20
        assert 0 < fates["moved"] < 20
    with sealed(striped(tmp_path, "abc"), NEW) as latter:
        check(latter, 20)


def test_a_store_without_such_options_has_nothing_to_migrate(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "kv") as store:
        store.write(key_of(0), chunk_of(0))
        assert (migrate(store).fates, migrate(store).corrupt) == ({}, {})


def test_a_chunk_that_vanishes_is_counted() -> None:
    class Vanishing(MemoryStore):
        def open(self, key: ChunkKey) -> ChunkReader:
            if key in opened:
                raise MissingChunk("gone")
            opened.add(key)
            return super().open(key)

    opened: set[Any] = set()
    inner = Vanishing()
    inner.write(key_of(0), chunk_of(0))
    assert migrate(sealed(inner, NEW)).fates == {"vanished": 1}


@pytest.mark.parametrize("seals", [False, True])
def test_chunks_are_packed_and_unpacked(seals: bool) -> None:
    bottom = MemoryStore()
    inner = sealed(bottom, NEW) if seals else bottom
    raw = [packable_chunk_of(number) for number in range(4)]
    coded = coded_chunk_of(9)
    for number, chunk in enumerate(raw):
        inner.write(key_of(number), chunk)
    inner.write(key_of(8), chunk_of(8))  # does not become smaller
    inner.write(key_of(9), coded)
    packing, unpacking, either = (PackedStore(inner, pack) for pack in (Pack.YES, Pack.NO, Pack.AUTO))
    before = bottom.stats().bytes
    assert migrate(either).fates == {}
    assert migrate(packing, dry_run=True).fates["packed"] == 5
    assert bottom.stats().bytes == before
    seen: list[Any] = []
    migrated = migrate(packing, seen.append)
    assert (migrated.fates.total(), migrated.corrupt, migrated.failed) == (migrated.fates["packed"], {}, {})
    assert migrated.fates["packed"] == 4
    assert sum(seen) >= sum(map(len, raw))
    assert bottom.stats().bytes < 0.9 * before
    assert [unpack_chunk(read_chunk(inner, key_of(number))) for number in range(4)] == raw
    assert migrate(packing).fates.total() == 0
    assert +migrate(unpacking).fates == {"unpacked": 4}
    assert [read(inner, key_of(number)) for number in (*range(4), 8, 9)] == [*raw, chunk_of(8), coded]
    assert bottom.stats().bytes == before


def test_damaged_chunks_keep_their_form() -> None:
    inner = MemoryStore()
    for number in range(2):
        data = packable_chunk_of(number)
        data[6000] ^= number
        inner.write(key_of(number), data)
    migrated = migrate(PackedStore(inner, Pack.YES))
    assert migrated.fates == {"packed": 1}
    assert list(migrated.corrupt) == [key_of(1)]


def test_each_tier_is_brought_into_its_own_form() -> None:
    front, back = MemoryStore(), MemoryStore()
    with TieredStore(
        [
            TierPlan(Member(opener(PackedStore(store, pack)), "memory"))
            for store, pack in ((front, Pack.NO), (back, Pack.YES))
        ]
    ) as store:
        packed = pack_chunk(packable_chunk_of(0))
        assert packed is not None
        front.write(key_of(0), packed)
        back.write(key_of(0), packable_chunk_of(0))
        assert migrate(store).fates == {"packed": 1, "unpacked": 1}
    assert read(front, key_of(0)) == packable_chunk_of(0)
    assert read(back, key_of(0)) == packed

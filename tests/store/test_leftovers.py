"""What repairing a folder removes, and what it leaves alone."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cakekv.store.base import StoreStats
from cakekv.store.disk import DiskStore
from cakekv.store.maintenance.collect import garbage

from .chunks import SIZE, chunk_of, key_of, read

DEAD, LIVING = f"{SIZE}-0123456789abcdef.tmp", f"{SIZE}-fedcba9876543210.tmp"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    with DiskStore(tmp_path / "kv") as store:
        for number in range(3):
            store.write(key_of(number), chunk_of(number))
        store.remember_identity(key_of(8).hex(), {"dtype": "float32"})
        yield store


def listed(folder: Path) -> set[Any]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_sound_store_is_left_as_it_is(store: DiskStore) -> None:
    before = listed(store.path)
    assert store.tidy() == []
    assert listed(store.path) == before


def test_what_the_dead_left_goes_and_what_the_living_hold_stays(store: DiskStore) -> None:
    incoming = store.path / "incoming"
    for name in (DEAD, LIVING):
        (incoming / name).write_bytes(b"half a chunk")
    with (incoming / LIVING).open() as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        assert store.tidy() == ["Removed 1 temporary file(s) of writers that died."]
        assert [path.name for path in incoming.iterdir()] == [LIVING]
    assert read(store, key_of(0)) == chunk_of(0)


def test_what_opening_removed_is_said(store: DiskStore) -> None:
    (store.path / "incoming" / DEAD).write_bytes(b"half a chunk")
    again = DiskStore(store.path)
    assert again.tidy() == ["Removed 1 temporary file(s) of writers that died."]
    assert again.tidy() == []


def test_notes_that_are_damaged_or_half_written_go(store: DiskStore) -> None:
    notes = store.path / "identities"
    (notes / f"{key_of(9).hex()}.json").write_text("{")
    (notes / f"{key_of(9).hex()}.json.new").write_text("{")
    (store.path / "cakekv-store.json.new").write_text("{")
    assert store.tidy() == ["Removed 3 identity note(s) that were damaged or half written."]
    assert store.identities() == {key_of(8).hex(): {"dtype": "float32"}}


def test_empty_folders_go_once_they_are_quiet(store: DiskStore) -> None:
    shard = store.path / "chunks" / key_of(0).hex()[:2]
    store.delete([key_of(0)])
    assert store.tidy() == []
    os.utime(shard, (1, 1))
    assert store.tidy() == ["Removed 1 empty folder(s)."]
    assert not shard.exists()
    store.write(key_of(0), chunk_of(0))
    assert read(store, key_of(0)) == chunk_of(0)


def test_a_folder_that_goes_while_chunks_are_listed_is_no_error(store: DiskStore) -> None:
    keys = iter(store)
    first = next(keys)
    for chunk in list(store):
        if chunk.key != first.key:
            store.delete([chunk.key])
            (store.path / "chunks" / chunk.key.hex()[:2]).rmdir()
    assert list(keys) == []


def test_wrong_counts_are_corrected(store: DiskStore) -> None:
    (store.path / "chunks" / key_of(0).hex()[:2] / f"{key_of(0).hex()[2:]}.chunk").unlink()
    assert store.tidy() == ["Corrected the count of chunks from 3 to 2."]
    assert store.stats() == StoreStats(2, 2 * SIZE, None)


def test_what_is_not_ours_is_named_and_left_alone(store: DiskStore, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("dear")
    shard = store.path / "chunks" / key_of(0).hex()[:2]
    foreign = [
        store.path / "thesis.txt",
        store.path / "chunks" / "mine",
        shard / "x.chunk",
        shard / f"{'0' * 62}.chunk.bak",
        store.path / "incoming" / "notes.txt",
        store.path / "identities" / "readme",
    ]
    for path in foreign:
        path.write_text("years of work")
    links = [shard / f"{'1' * 62}.chunk", store.path / "identities" / f"{'2' * 64}.json"]
    for link in links:
        link.symlink_to(secret)
    (store.path / "incoming" / "empty").mkdir()
    before = listed(store.path)
    [sentence] = store.tidy()
    assert sentence.startswith("Left alone 9 thing(s)")
    assert "thesis.txt" in sentence
    assert listed(store.path) == before
    assert secret.read_text() == "dear"


def test_chunks_dated_in_the_future_are_dated_now(store: DiskStore) -> None:
    os.utime(store._folder.file(key_of(1)), (4e9, 4e9))
    assert garbage(store, time.time(), older_than_s=60.0).undated == 1
    assert "Dated 1 chunk(s) from the future to now." in store.tidy()
    assert garbage(store, time.time(), older_than_s=60.0).undated == 0
    assert store.tidy() == []

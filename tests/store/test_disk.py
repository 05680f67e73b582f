"""The disk tier: what is in the folder, what survives, and what is taken for a chunk."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from cakekv.errors import BadInput, MissingChunk, StoreError
from cakekv.store.base import StoreStats
from cakekv.store.disk import DiskStore
from cakekv.store.folder import Folder

from .chunks import SIZE, chunk_of, key_of, read
from .disk_folder import file_of, fill, keys

# What is in the folder


def test_a_chunk_is_one_private_file_named_by_its_key(folder: Path) -> None:
    fill(DiskStore(folder), 0)
    file = file_of(folder, 0)
    assert file.read_bytes() == chunk_of(0)
    assert list((folder / "incoming").iterdir()) == []
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_chunks_are_found_again(folder: Path) -> None:
    with DiskStore(folder) as store:
        fill(store, 0, 1)
        store.remember_identity(key_of(9).hex(), {"dtype": "float32"})
    with DiskStore(folder, 10 * SIZE) as store:
        assert read(store, key_of(1)) == chunk_of(1)
        assert store.stats() == StoreStats(2, 2 * SIZE, 10 * SIZE)
        assert store.identities() == {key_of(9).hex(): {"dtype": "float32"}}


def test_the_order_of_use_is_found_again(folder: Path) -> None:
    store = DiskStore(folder, 3 * SIZE)
    fill(store, 0, 1, 2)
    store.open(key_of(0)).close()
    store = DiskStore(folder, 3 * SIZE)
    fill(store, 3)
    assert keys(store) == {key_of(0), key_of(2), key_of(3)}


def test_a_smaller_capacity_evicts_at_opening(folder: Path) -> None:
    fill(DiskStore(folder), 0, 1, 2)
    assert keys(DiskStore(folder, 2 * SIZE)) == {key_of(1), key_of(2)}


def test_room_is_made_before_the_chunk_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(folder, 2 * SIZE)
    fill(store, 0, 1)
    real_write = os.write

    def write(descriptor: Any, data: memoryview) -> Any:
        assert sum(file.stat().st_size for file in folder.rglob("*.chunk")) <= SIZE
        return real_write(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    fill(store, 2)


def test_the_folder_is_not_scanned_for_every_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(folder, 10 * SIZE)
    scans = []
    real_scan = Folder.scan
    monkeypatch.setattr(Folder, "scan", lambda self: scans.append(1) or real_scan(self))
    fill(store, *range(40))
    assert len(scans) <= 5
    assert store.stats().chunks == 10


def test_everything_is_synced_before_it_is_visible(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(folder)
    calls = []

    def log(name: str) -> None:
        real = getattr(os, name)

        def logged(target: Any, *rest: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            calls.append((name, os.path.relpath(path, folder).split("/")[0], Path(path).suffix))
            return real(target, *rest)

        monkeypatch.setattr(os, name, logged)

    for name in ("write", "fsync", "replace"):
        log(name)
    fill(store, 0)
    assert calls == [
        ("write", "incoming", ".tmp"),
        ("fsync", "incoming", ".tmp"),
        ("fsync", "chunks", ""),
        ("replace", "incoming", ".tmp"),
        ("fsync", "chunks", ""),
    ]


def test_short_writes_are_carried_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(folder)
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:1000]))
    fill(store, 0)
    assert read(store, key_of(0)) == chunk_of(0)


# Leftovers, and other writers


def test_what_dead_writers_left_is_removed_and_living_ones_keep_theirs(folder: Path) -> None:
    DiskStore(folder)
    dead, living, foreign = (
        folder / "incoming" / name
        for name in (f"{SIZE}-0123456789abcdef.tmp", f"{SIZE}-fedcba9876543210.tmp", "notes.txt")
    )
    for file in (dead, living, foreign):
        file.write_bytes(b"half a chunk")
    with living.open() as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        store = DiskStore(folder, 3 * SIZE)
        assert (dead.exists(), living.exists(), foreign.exists()) == (False, True, True)
        fill(store, 0, 1, 2)
        assert keys(store) == {key_of(1), key_of(2)}, "what a living writer has reserved counts"
    fill(store, 3)
    assert not living.exists()
    assert keys(store) == {key_of(1), key_of(2), key_of(3)}


def test_a_chunk_is_not_kept_when_living_writers_hold_the_capacity(folder: Path) -> None:
    store = DiskStore(folder, 2 * SIZE)
    fill(store, 0)
    other = folder / "incoming" / f"{SIZE + 1}-0123456789abcdef.tmp"
    other.touch()
    with other.open() as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        assert not store.write(key_of(1), chunk_of(1))
    assert keys(store) == {key_of(0)}


@pytest.mark.parametrize("state", [b"", b"changing" + bytes(16), b"settled\0", b"\xff" * 100])
def test_counts_that_cannot_be_trusted_are_made_anew(folder: Path, state: bytes) -> None:
    store = DiskStore(folder)
    fill(store, 0, 1)
    (folder / "cakekv.lock").write_bytes(state)
    assert store.stats() == StoreStats(2, 2 * SIZE, None)


def test_chunks_removed_by_hand_free_their_room(folder: Path) -> None:
    store = DiskStore(folder, 3 * SIZE)
    fill(store, 0, 1, 2)
    file_of(folder, 1).unlink()
    fill(store, 3)
    file_of(folder, 2).unlink()
    file_of(folder, 3).unlink()
    fill(store, 4, 5, 6, 7)
    assert keys(store) == {key_of(5), key_of(6), key_of(7)}
    assert store.stats() == StoreStats(3, 3 * SIZE, 3 * SIZE)


def test_opening_counts_anew(folder: Path) -> None:
    fill(DiskStore(folder), 0, 1)
    file_of(folder, 1).unlink()
    assert DiskStore(folder).stats() == StoreStats(1, SIZE, None)


def test_chunks_added_by_hand_do_not_upset_the_counts(folder: Path) -> None:
    store = DiskStore(folder)
    fill(store, 0, 1)
    (folder / "cakekv.lock").write_bytes(b"settled\0" + bytes(16))  # as if both had been added after the last count
    assert store.delete([key_of(0)]) == 1
    assert store.stats() == StoreStats(1, SIZE, None)


# Tricks


@pytest.mark.parametrize("trick", ["symlink", "pipe", "folder"])
def test_what_is_no_plain_file_is_no_chunk(folder: Path, trick: str) -> None:
    store = DiskStore(folder, 10 * SIZE)
    secret = folder.parent / "secret"
    secret.write_bytes(chunk_of(0))
    file = file_of(folder, 0)
    file.parent.mkdir()
    {"symlink": lambda: file.symlink_to(secret), "pipe": lambda: os.mkfifo(file), "folder": file.mkdir}[trick]()
    assert store.lookup([key_of(0)]) == [None]
    assert list(store) == []
    assert store.delete([key_of(0)]) == 0
    with pytest.raises(MissingChunk):
        store.open(key_of(0))
    if trick == "folder":
        with pytest.raises(StoreError):
            store.write(key_of(0), chunk_of(0))
    else:
        fill(store, 0)
        assert read(store, key_of(0)) == chunk_of(0)
        assert store.stats() == StoreStats(1, SIZE, 10 * SIZE)
    assert secret.read_bytes() == chunk_of(0)


def test_files_with_other_names_are_no_chunks(folder: Path) -> None:
    store = DiskStore(folder)
    fill(store, 0)
    shard = file_of(folder, 0).parent
    for name in ("x.chunk", "../zz.chunk", f"{'0' * 62}.chunk.bak", f"{'G' * 62}.chunk"):
        (shard / name).write_text("")
    (folder / "chunks" / "elsewhere").symlink_to(shard)
    assert keys(DiskStore(folder)) == {key_of(0)}


def test_identities_are_checked(folder: Path) -> None:
    store = DiskStore(folder)
    root = key_of(0).hex()
    store.remember_identity(root, {"dtype": "float32"})
    for bad in ("../../etc/passwd", "ab", root.upper()):
        with pytest.raises(BadInput, match="64 hexadecimal digits"):
            store.remember_identity(bad, {})
    with pytest.raises(BadInput, match="bytes of fields"):
        store.remember_identity(key_of(1).hex(), {"dtype": "x" * 100_000})
    notes = folder / "identities"
    for number, text in enumerate(["{", "[]", '{"a": 1}', "\xff", "[" * 50_000, json.dumps({"a": "x" * 70_000})], 1):
        (notes / f"{key_of(number).hex()}.json").write_text(text)
    os.mkfifo(notes / f"{key_of(8).hex()}.json")
    (notes / f"{key_of(9).hex()}.json").symlink_to(notes / f"{root}.json")
    (notes / "readme.json").write_text("{}")
    assert store.identities() == {root: {"dtype": "float32"}}

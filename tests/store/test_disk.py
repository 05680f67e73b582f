"""The disk tier: what is in the folder, what survives, and what happens when the folder or the device misbehaves."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from cakekv.chunk import verify_chunk
from cakekv.errors import BadInput, MissingChunk, StoreError, StoreFull
from cakekv.store.base import StoreStats
from cakekv.store.disk import DiskStore
from cakekv.store.folder import Folder

from .chunks import SIZE, chunk_of, key_of, read


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def file_of(folder, number):
    name = key_of(number).hex()
    return folder / "chunks" / name[:2] / f"{name[2:]}.chunk"


def fill(store, *numbers):
    for number in numbers:
        assert store.write(key_of(number), chunk_of(number))


def keys(store):
    return {chunk.key for chunk in store}


@pytest.fixture
def mount(tmp_path):
    """Mounts a small RAM disk, where the tests may."""
    mounted = []

    def mount_at(name, options):
        place = tmp_path / name
        place.mkdir()
        attempt = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)
        if attempt.returncode:
            pytest.skip("mounting needs root")
        mounted.append(place)
        return place

    yield mount_at
    for place in mounted:
        subprocess.run(["umount", place], check=True)


# What is in the folder


def test_a_chunk_is_one_private_file_named_by_its_key(folder):
    fill(DiskStore(folder), 0)
    file = file_of(folder, 0)
    assert file.read_bytes() == chunk_of(0)
    assert list((folder / "incoming").iterdir()) == []
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_chunks_are_found_again(folder):
    with DiskStore(folder) as store:
        fill(store, 0, 1)
        store.remember_identity(key_of(9).hex(), {"dtype": "float32"})
    with DiskStore(folder, 10 * SIZE) as store:
        assert read(store, key_of(1)) == chunk_of(1)
        assert store.stats() == StoreStats(2, 2 * SIZE, 10 * SIZE)
        assert store.identities() == {key_of(9).hex(): {"dtype": "float32"}}


def test_the_order_of_use_is_found_again(folder):
    store = DiskStore(folder, 3 * SIZE)
    fill(store, 0, 1, 2)
    store.open(key_of(0)).close()
    store = DiskStore(folder, 3 * SIZE)
    fill(store, 3)
    assert keys(store) == {key_of(0), key_of(2), key_of(3)}


def test_a_smaller_capacity_evicts_at_opening(folder):
    fill(DiskStore(folder), 0, 1, 2)
    assert keys(DiskStore(folder, 2 * SIZE)) == {key_of(1), key_of(2)}


def test_room_is_made_before_the_chunk_is_written(folder, monkeypatch):
    store = DiskStore(folder, 2 * SIZE)
    fill(store, 0, 1)
    real_write = os.write

    def write(descriptor, data):
        assert sum(file.stat().st_size for file in folder.rglob("*.chunk")) <= SIZE
        return real_write(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    fill(store, 2)


def test_the_folder_is_not_scanned_for_every_write(folder, monkeypatch):
    store = DiskStore(folder, 10 * SIZE)
    scans = []
    real_scan = Folder.scan
    monkeypatch.setattr(Folder, "scan", lambda self: scans.append(1) or real_scan(self))
    fill(store, *range(40))
    assert len(scans) <= 5
    assert store.stats().chunks == 10


def test_everything_is_synced_before_it_is_visible(folder, monkeypatch):
    store = DiskStore(folder)
    calls = []

    def log(name):
        real = getattr(os, name)

        def logged(target, *rest):
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


def test_short_writes_are_carried_on(folder, monkeypatch):
    store = DiskStore(folder)
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:1000]))
    fill(store, 0)
    assert read(store, key_of(0)) == chunk_of(0)


# Leftovers, and other writers


def test_what_dead_writers_left_is_removed_and_living_ones_keep_theirs(folder):
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


def test_a_chunk_is_not_kept_when_living_writers_hold_the_capacity(folder):
    store = DiskStore(folder, 2 * SIZE)
    fill(store, 0)
    other = folder / "incoming" / f"{SIZE + 1}-0123456789abcdef.tmp"
    other.touch()
    with other.open() as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        assert not store.write(key_of(1), chunk_of(1))
    assert keys(store) == {key_of(0)}


@pytest.mark.parametrize("state", [b"", b"changing" + bytes(16), b"settled\0", b"\xff" * 100])
def test_counts_that_cannot_be_trusted_are_made_anew(folder, state):
    store = DiskStore(folder)
    fill(store, 0, 1)
    (folder / "cakekv.lock").write_bytes(state)
    assert store.stats() == StoreStats(2, 2 * SIZE, None)


def test_chunks_removed_by_hand_free_their_room(folder):
    store = DiskStore(folder, 3 * SIZE)
    fill(store, 0, 1, 2)
    file_of(folder, 1).unlink()
    fill(store, 3)
    file_of(folder, 2).unlink()
    file_of(folder, 3).unlink()
    fill(store, 4, 5, 6, 7)
    assert keys(store) == {key_of(5), key_of(6), key_of(7)}
    assert store.stats() == StoreStats(3, 3 * SIZE, 3 * SIZE)


def test_opening_counts_anew(folder):
    fill(DiskStore(folder), 0, 1)
    file_of(folder, 1).unlink()
    assert DiskStore(folder).stats() == StoreStats(1, SIZE, None)


def test_chunks_added_by_hand_do_not_upset_the_counts(folder):
    store = DiskStore(folder)
    fill(store, 0, 1)
    (folder / "cakekv.lock").write_bytes(b"settled\0" + bytes(16))  # as if both had been added after the last count
    assert store.delete([key_of(0)]) == 1
    assert store.stats() == StoreStats(1, SIZE, None)


# Bad folders


def test_a_folder_of_something_else_is_left_alone(folder):
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match=r"not empty: it holds 'thesis.txt'"):
        DiskStore(folder, 1)
    assert [path.name for path in folder.rglob("*")] == ["thesis.txt"]


def test_a_folder_that_only_looks_like_a_store_is_refused(folder):
    (folder / "chunks" / "mine").mkdir(parents=True)
    with pytest.raises(StoreError, match="not a cakekv store"):
        DiskStore(folder)
    assert (folder / "chunks" / "mine").exists()


@pytest.mark.parametrize("marker", [b'{"cakekv_store": 2}', b"", b"\xff" * 1000])
def test_a_store_of_another_version_is_refused(folder, marker):
    fill(DiskStore(folder), 0)
    (folder / "cakekv-store.json").write_bytes(marker)
    with pytest.raises(StoreError, match="another version"):
        DiskStore(folder, 1)
    assert file_of(folder, 0).exists()


def test_an_opening_that_was_killed_can_be_repeated(folder):
    folder.mkdir()
    (folder / "cakekv.lock").touch()
    (folder / "cakekv-store.json.new").write_text("{")
    fill(DiskStore(folder), 0)


@pytest.mark.parametrize("path", ["file", "file/below", "/proc/cakekv"])
def test_a_folder_that_cannot_be_made_says_what_to_do(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot open the store in .*[Gg]ive another"):
        DiskStore(tmp_path / path)


def test_a_folder_that_cannot_be_written_says_what_to_do(mount):
    with pytest.raises(StoreError, match="can be written to"):
        DiskStore(mount("readonly", "ro"))


# A device that misbehaves


def test_a_full_disk_leaves_nothing_half_visible(mount):
    store = DiskStore(mount("small", f"size={6 * SIZE}") / "store")
    with pytest.raises(StoreFull, match="give the store a capacity"):
        fill(store, *range(10))
    stored = list(store)
    assert 0 < len(stored) < 10
    for chunk in stored:
        verify_chunk(memoryview(read(store, chunk.key)))
    assert store.stats().bytes == sum(chunk.size for chunk in stored)
    assert list((store.path / "incoming").iterdir()) == []
    with (store.path.parent / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)):
            pass
    again = DiskStore(store.path)
    assert read(again, stored[0].key)
    again.delete([chunk.key for chunk in stored[:2]])  # two: that they were removed is noted in a file
    fill(store, 20)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EFBIG, StoreFull),
        (errno.EIO, StoreError),
        (errno.EACCES, StoreError),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "mkdir"])
def test_a_failed_write_is_named_and_undone(folder, monkeypatch, call, number, error):
    store = DiskStore(folder)
    fill(store, 0)

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StoreError, match="cannot write chunk") as caught:
            store.write(key_of(1), chunk_of(1))
    assert type(caught.value) is error
    assert keys(store) == {key_of(0)}
    assert store.stats() == StoreStats(1, SIZE, None)
    assert list((folder / "incoming").iterdir()) == []


def test_a_chunk_whose_name_may_not_last_is_withdrawn(folder, monkeypatch):
    store = DiskStore(folder)
    fill(store, 0)
    file_of(folder, 1).parent.mkdir()
    real_fsync = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "no luck")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreError, match="no luck"):
        store.write(key_of(1), chunk_of(1))
    assert store.lookup([key_of(1)]) == [None]
    assert store.stats() == StoreStats(1, SIZE, None)


def test_a_failing_read_is_named(folder, monkeypatch):
    store = DiskStore(folder)
    fill(store, 0)
    reader = store.open(key_of(0))

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(StoreError, match="cannot read"):
            reader.read_into(memoryview(bytearray(10)), 0)
    reader.close()
    with pytest.raises(StoreError, match="closed"):
        reader.read_into(memoryview(bytearray(10)), 0)


def test_a_store_deleted_under_its_users(folder):
    store = DiskStore(folder)
    fill(store, 0)
    with store.open(key_of(0)) as reader:
        shutil.rmtree(folder)
        buffer = memoryview(bytearray(SIZE))
        assert reader.read_into(buffer, 0) == SIZE
        assert buffer == chunk_of(0)
    assert store.lookup([key_of(0)]) == [None]
    with pytest.raises(MissingChunk):
        store.open(key_of(0))
    for attempt in (lambda: store.write(key_of(1), chunk_of(1)), store.stats, lambda: list(store), store.identities):
        with pytest.raises(StoreError, match="was removed meanwhile"):
            attempt()
    assert not folder.exists()


# Tricks


@pytest.mark.parametrize("trick", ["symlink", "pipe", "folder"])
def test_what_is_no_plain_file_is_no_chunk(folder, trick):
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


def test_files_with_other_names_are_no_chunks(folder):
    store = DiskStore(folder)
    fill(store, 0)
    shard = file_of(folder, 0).parent
    for name in ("x.chunk", "../zz.chunk", f"{'0' * 62}.chunk.bak", f"{'G' * 62}.chunk"):
        (shard / name).write_text("")
    (folder / "chunks" / "elsewhere").symlink_to(shard)
    assert keys(DiskStore(folder)) == {key_of(0)}


def test_identities_are_checked(folder):
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

"""The disk tier when the folder is not one to keep chunks in, or the device misbehaves."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cakekv.chunk import verify_chunk
from cakekv.errors import MissingChunk, StoreError, StoreFull
from cakekv.store.base import StoreStats
from cakekv.store.disk import DiskStore

from .chunks import SIZE, chunk_of, key_of, read
from .disk_folder import file_of, fill, keys


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Mounts a small RAM disk, where the tests may."""
    mounted = []

    def mount_at(name: str, options: Any) -> Any:
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


# Bad folders


def test_a_folder_of_something_else_is_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match=r"not empty: it holds 'thesis.txt'"):
        DiskStore(folder, 1)
    assert [path.name for path in folder.rglob("*")] == ["thesis.txt"]


def test_a_folder_that_only_looks_like_a_store_is_refused(folder: Path) -> None:
    (folder / "chunks" / "mine").mkdir(parents=True)
    with pytest.raises(StoreError, match="not a cakekv store"):
        DiskStore(folder)
    assert (folder / "chunks" / "mine").exists()


@pytest.mark.parametrize("marker", [b'{"cakekv_store": 2}', b"", b"\xff" * 1000])
def test_a_store_of_another_version_is_refused(folder: Path, marker: bytes) -> None:
    fill(DiskStore(folder), 0)
    (folder / "cakekv-store.json").write_bytes(marker)
    with pytest.raises(StoreError, match="another version"):
        DiskStore(folder, 1)
    assert file_of(folder, 0).exists()


def test_an_opening_that_was_killed_can_be_repeated(folder: Path) -> None:
    folder.mkdir()
    (folder / "cakekv.lock").touch()
    (folder / "cakekv-store.json.new").write_text("{")
    fill(DiskStore(folder), 0)


@pytest.mark.parametrize("path", ["file", "file/below", "/proc/cakekv"])
def test_a_folder_that_cannot_be_made_says_what_to_do(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot open the store in .*[Gg]ive another"):
        DiskStore(tmp_path / path)


def test_a_folder_that_cannot_be_written_says_what_to_do(mount: Callable[..., Any]) -> None:
    with pytest.raises(StoreError, match="can be written to"):
        DiskStore(mount("readonly", "ro"))


# A device that misbehaves


def test_a_full_disk_leaves_nothing_half_visible(mount: Callable[..., Any]) -> None:
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
def test_a_failed_write_is_named_and_undone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, error: type[Exception]
) -> None:
    store = DiskStore(folder)
    fill(store, 0)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StoreError, match="cannot write chunk") as caught:
            store.write(key_of(1), chunk_of(1))
    assert type(caught.value) is error
    assert keys(store) == {key_of(0)}
    assert store.stats() == StoreStats(1, SIZE, None)
    assert list((folder / "incoming").iterdir()) == []


def test_a_chunk_whose_name_may_not_last_is_withdrawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(folder)
    fill(store, 0)
    file_of(folder, 1).parent.mkdir()
    real_fsync = os.fsync

    def fsync(descriptor: Any) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "no luck")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreError, match="no luck"):
        store.write(key_of(1), chunk_of(1))
    assert store.lookup([key_of(1)]) == [None]
    assert store.stats() == StoreStats(1, SIZE, None)


def test_a_child_forked_while_the_folder_is_locked_does_not_keep_the_lock(folder: Path) -> None:
    store = DiskStore(folder)
    with store._folder.locked():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        done = threading.Thread(target=store.stats, daemon=True)
        done.start()
        done.join(10)
        assert not done.is_alive()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_failing_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(folder)
    fill(store, 0)
    reader = store.open(key_of(0))

    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(StoreError, match="cannot read"):
            reader.read_into(memoryview(bytearray(10)), 0)
    reader.close()
    with pytest.raises(StoreError, match="closed"):
        reader.read_into(memoryview(bytearray(10)), 0)


def test_a_store_deleted_under_its_users(folder: Path) -> None:
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
    for attempt in (store.stats, lambda: list(store), store.identities):
        with pytest.raises(StoreError, match="was removed meanwhile"):
            attempt()
    assert not folder.exists()
    assert store.write(key_of(1), chunk_of(1))  # a server that runs for months saves again
    assert read(store, key_of(1)) == chunk_of(1)
    assert store.stats() == StoreStats(1, SIZE, None)


@pytest.mark.parametrize("part", ["incoming", "chunks", "cakekv.lock"])
def test_a_part_that_was_removed_is_made_again_by_the_next_write(tmp_path: Path, part: str) -> None:
    store = DiskStore(tmp_path / "store", capacity=1 << 20)
    first, second = key_of(1), key_of(2)
    store.write(first, chunk_of(1))
    gone = tmp_path / "store" / part
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    assert store.write(second, chunk_of(2))
    left = part in ("incoming", "cakekv.lock")
    assert store.lookup([first, second]) == [SIZE if left else None, SIZE]
    assert store.stats().chunks == 1 + left

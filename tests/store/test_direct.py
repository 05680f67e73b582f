"""Reading files past the page cache: that it is done where it can be, and that nothing changes where it cannot."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from cakekv.chunk import ALIGNMENT
from cakekv.store import direct
from cakekv.store.direct import FileReader

SIZE = 64 * ALIGNMENT
DATA = os.urandom(SIZE)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens a file of which nothing is in the page cache, and logs which reads are direct."""
    log = []
    real = os.preadv

    def preadv(descriptor: Any, buffers: Any, offset: int) -> Any:
        log.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        return real(descriptor, buffers, offset)

    def open_reader(data: bytes = DATA, cached: bool = False, **options: Any) -> FileReader:
        file = tmp_path / "file"
        file.write_bytes(data)
        descriptor = os.open(file, os.O_RDONLY)
        if not cached:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return FileReader(descriptor, len(data), **options)

    probe = os.open(tmp_path, os.O_RDWR | os.O_TMPFILE)
    try:
        fcntl.fcntl(probe, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        pytest.skip("this file system reads nothing directly")
    finally:
        os.close(probe)
    monkeypatch.setattr(os, "preadv", preadv)
    made: Any = open_reader
    made.log = log
    return made


def staging(size: int = SIZE) -> memoryview:
    return memoryview(mmap.mmap(-1, size))


def test_what_is_not_cached_is_read_directly(opened: Any) -> None:
    with opened() as reader:
        buffer = staging()
        for start in (0, SIZE // 2):
            assert reader.read_into(buffer[start : start + SIZE // 2], start) == SIZE // 2
    assert buffer == DATA
    assert opened.log == [True, True]


def test_what_is_cached_is_not(opened: Any) -> None:
    with opened(cached=True) as reader:
        buffer = staging()
        assert reader.read_into(buffer, 0) == SIZE
    assert buffer == DATA
    assert opened.log == [False]


def test_direct_reading_can_be_switched_off(opened: Any) -> None:
    with opened(direct=False) as reader:
        assert reader.read_into(staging(), 0) == SIZE
    assert opened.log == [False]


@pytest.mark.parametrize(("shift", "offset", "length"), [(1, 0, 4096), (0, 100, 4096), (0, 0, 100), (1, 4096, 4097)])
def test_reads_that_are_not_aligned_go_through_the_cache(opened: Any, shift: int, offset: int, length: int) -> None:
    with opened() as reader:
        buffer = staging()[shift : shift + length]
        assert reader.read_into(buffer, offset) == length
        assert buffer == DATA[offset : offset + length]
        assert opened.log == [False]
        whole = staging()
        assert reader.read_into(whole, 0) == SIZE
        assert whole == DATA
        assert opened.log == [False, True]


def test_an_odd_end_goes_through_the_cache(opened: Any) -> None:
    """As that of a packed chunk."""
    with opened() as reader:
        buffer = staging()[:8300]
        assert reader.read_into(buffer, 4096) == 8300
        assert buffer == DATA[4096 : 4096 + 8300]
        assert opened.log == [True, False]


def test_without_a_descriptor_to_spare_the_cache_is_read(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def mapped(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("mmap.mmap", mapped)
    with opened() as reader:
        monkeypatch.undo()
        assert reader.read_into(staging(), 0) == SIZE
    assert not any(opened.log)


def test_a_file_that_ends_in_mid_page(opened: Any) -> None:
    with opened(DATA[:5000]) as reader:
        buffer = staging(8192)
        assert reader.read_into(buffer, 0) == 5000
        assert buffer[:5000] == DATA[:5000]


@pytest.mark.parametrize("step", ["switch", "read"])
def test_a_file_system_that_refuses_is_read_through_the_cache(
    opened: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    real_fcntl, real_preadv = fcntl.fcntl, os.preadv

    def refuse_switch(descriptor: Any, command: Any, *rest: Any) -> Any:
        if command == fcntl.F_SETFL and rest[0] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not here")
        return real_fcntl(descriptor, command, *rest)

    def refuse_read(descriptor: Any, buffers: Any, offset: int) -> Any:
        if real_fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not here")
        return real_preadv(descriptor, buffers, offset)

    with opened() as reader:
        if step == "switch":
            monkeypatch.setattr(fcntl, "fcntl", refuse_switch)
        else:
            monkeypatch.setattr(os, "preadv", refuse_read)
        buffer = staging()
        assert reader.read_into(buffer, 0) == SIZE
        assert buffer == DATA
        assert opened.log == [False]


def test_without_direct_reads_at_all(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_MINCORE", None)
    with opened() as reader:
        buffer = staging()
        assert reader.read_into(buffer, 0) == SIZE
        assert buffer == DATA

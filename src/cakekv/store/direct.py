"""Reads a file past the page cache, where the file system and the buffer allow it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os

from cakekv.chunk import ALIGNMENT
from cakekv.errors import StoreError
from cakekv.store.base import ChunkReader

SLICE_BYTES = 2 << 20

_DIRECT = getattr(os, "O_DIRECT", 0)
_LOOKED_AT = 256 << 10


class FileReader(ChunkReader):
    """An open chunk in a file.

    A chunk that the page cache holds is read from there. Others are read directly (O_DIRECT): the device writes into
    the buffer, which costs no processor time and pushes nothing else out of the cache. Direct reads want addresses,
    offsets and lengths that are multiples of 4096, as those of chunks and staging buffers are; other reads, the odd end
    of a packed chunk, and file systems that refuse, are served by way of the cache.

    Parameters
    ----------
    descriptor : int
        The open file; the reader closes it.
    size : int
        Bytes of the file.
    direct : bool
        Whether to read directly at all.
    """

    slice_bytes = SLICE_BYTES

    def __init__(self, descriptor: int, size: int, direct: bool = True) -> None:
        self.size = size
        self._descriptor: int | None = descriptor
        self._direct = bool(direct and _DIRECT) and not _is_cached(descriptor, size)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        if self._descriptor is None:
            raise StoreError("the chunk's reader is closed")
        done = 0
        try:
            while done < len(buffer):
                count = self._read(self._descriptor, buffer[done:], offset + done)
                if not count:
                    break
                done += count
        except OSError as error:
            raise StoreError(f"cannot read a chunk: {error.strerror}") from error
        return done

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _read(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        whole = buffer[: len(buffer) // ALIGNMENT * ALIGNMENT]
        aligned = self._direct and len(whole) > 0 and _is_aligned(whole, offset)
        buffer = whole if aligned else buffer  # what is left of it comes next
        try:
            self._set_direct(descriptor, aligned)
            return os.preadv(descriptor, [buffer], offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not aligned:
                raise
        self._direct = False  # the file system does not do that
        self._set_direct(descriptor, False)
        return os.preadv(descriptor, [buffer], offset)

    def _set_direct(self, descriptor: int, wanted: bool) -> None:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if bool(flags & _DIRECT) != wanted:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags ^ _DIRECT)


def _is_aligned(buffer: memoryview, offset: int) -> bool:
    return not (_address(buffer) % ALIGNMENT or offset % ALIGNMENT)


def _is_cached(descriptor: int, size: int) -> bool:
    """Whether the page cache holds a file, as far as its beginning tells."""
    length = min(size, _LOOKED_AT)
    if _MINCORE is None or not length:
        return True
    resident = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
    try:
        with mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY) as view:
            failed = _MINCORE(ctypes.c_void_p(_address(view)), ctypes.c_size_t(length), resident)
    except (OSError, ValueError):  # no descriptor or memory is left for that, or the file has just been cut
        return True
    return not failed and b"\0" not in resident.raw


def _address(buffer: memoryview | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


_MINCORE = getattr(ctypes.CDLL(None), "mincore", None)

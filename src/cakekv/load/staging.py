"""Buffers that chunks are read into and placed from; they are reused, as allocating them is slow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StagingPool:
    """Hands out buffers of one size.

    Parameters
    ----------
    allocate : callable
        (bytes) to a writable buffer, for instance `Engine.staging`.
    size : int
        Bytes per buffer.
    """

    def __init__(self, allocate: Callable[[int], memoryview], size: int) -> None:
        self._allocate = allocate
        self._size = size
        self._free: list[memoryview] = []
        self._lock = threading.Lock()

    def new(self) -> memoryview:
        """A buffer that is not used again.

        Raises
        ------
        MemoryError
            There is no room for it.
        """
        try:
            return self._allocate(self._size)
        except (OSError, RuntimeError) as error:  # what mmap and torch say
            raise MemoryError(f"no room for a buffer of {self._size} bytes: {error}") from error

    @contextmanager
    def buffer(self) -> Iterator[memoryview]:
        """A buffer for the duration of the `with` block."""
        with self._lock:
            buffer = self._free.pop() if self._free else None
        if buffer is None:
            buffer = self.new()
        try:
            yield buffer
        finally:
            with self._lock:
                self._free.append(buffer)

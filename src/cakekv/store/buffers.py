"""Buffers for a transfer library that may still write to them after a transfer has failed."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque

from cakekv.errors import StoreError
from cakekv.quantities import format_bytes

KEPT_S = 1200.0
"""Longer than a kernel tries to send to a peer that is gone."""
MAX_KEPT_BYTES = 1 << 28

_used: set[KeptBuffers] = set()
"""What may be in use outlives its store."""


class Buffer:
    """Some memory.

    Attributes
    ----------
    view : memoryview
        Its bytes.
    address : int
        Where they are.
    """

    def __init__(self, size: int) -> None:
        data = bytearray(size)
        self.view = memoryview(data)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(data))


class KeptBuffers:
    """Buffers that may be in use for a while, although nobody waits. Methods may be called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[tuple[float, Buffer]] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, buffer: Buffer) -> None:
        """A transfer failed that may still be using a buffer."""
        with self._lock:
            self._kept.append((time.monotonic(), buffer))
            _used.add(self)

    def check(self) -> None:
        """Raise `StoreError` if there are so many that there should be no more transfers for now."""
        with self._lock:
            kept = sum(len(buffer.view) for _, buffer in self._kept)
        if kept > MAX_KEPT_BYTES:
            raise StoreError(
                f"transfers that failed in the last {KEPT_S / 60:.0f} minutes may still use {format_bytes(kept)}: see "
                "what is wrong with the network, or with the nodes"
            )

    def take_old(self) -> list[Buffer]:
        """Those that were kept for long enough; they are kept no longer."""
        old = []
        with self._lock:
            while self._kept and self._kept[0][0] + KEPT_S < time.monotonic():
                old.append(self._kept.popleft()[1])
            if not self._kept:
                _used.discard(self)
        return old

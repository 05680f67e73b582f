"""Puts a tier behind a link of a given bandwidth and latency, for experiments."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

from cakekv.errors import BadInput
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader, Store
from cakekv.store.wrapper import WrappedReader, WrappedStore

SLICE_S = 0.01
"""Seconds of the link that are handed out at a time."""
GRACE_S = 0.02
"""A reader that is back within this many seconds is taken not to have stopped: time lost to oversleeping and to the
work between two reads is made up for. An idle link saves up nothing."""


class ThrottledStore(WrappedStore):
    """Another store whose reads share a link. Writes are as fast as ever.

    Readers take turns, one slice of about 10 ms each. Turns follow an absolute schedule, so that the bandwidth is
    neither exceeded nor, while anyone reads, fallen short of.

    Parameters
    ----------
    inner : Store
        Where the chunks are.
    bandwidth : float
        Bytes per second; `math.inf` for no limit.
    latency_s : float
        Seconds before a look-up answers, and before the first byte of a chunk arrives.
    clock, sleep : callable
        Time in seconds, and waiting for some.

    Raises
    ------
    BadInput
        The bandwidth is not positive, or the latency negative or infinite.
    """

    def __init__(
        self,
        inner: Store,
        bandwidth: float,
        latency_s: float = 0.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not 0 <= latency_s < math.inf:
            raise BadInput(f"a latency is a finite number of seconds from 0 on, not {latency_s}")
        super().__init__(inner)
        self.parallel_reads = 2
        self.latency_s = latency_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_at = -math.inf  # when the link will have carried everything it was asked for
        self.set_bandwidth(bandwidth)

    def set_bandwidth(self, bandwidth: float) -> None:
        """Change the bandwidth, in bytes per second; slices on their way arrive as they would have."""
        if not bandwidth > 0:
            raise BadInput(f"a bandwidth is a positive number of bytes per second, not {bandwidth}")
        self.bandwidth = bandwidth

    @property
    def slice_bytes(self) -> int:
        """Bytes that the link carries in a turn."""
        return int(min(max(self.bandwidth * SLICE_S, 4096), 1 << 20))

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        found = self._inner.lookup(keys)
        self.wait_latency()
        return found

    def probe(self, keys: Sequence[ChunkKey]) -> list[bool] | None:
        found = self._inner.probe(keys)
        if found is not None:
            self.wait_latency()
        return found

    def open(self, key: ChunkKey) -> ChunkReader:
        return _ThrottledReader(self, self._inner.open(key))

    def wait_latency(self) -> None:
        """Let a round trip pass."""
        if self.latency_s:
            self._sleep(self.latency_s)

    def reserve(self, size: int) -> float:
        """Queue `size` bytes on the link. Returns the time, on the store's clock, at which they will have arrived."""
        with self._lock:
            now = self._clock()
            began_at = self._free_at if now - self._free_at <= GRACE_S else now
            self._free_at = began_at + size / self.bandwidth
            return self._free_at

    def wait_until(self, time_s: float) -> None:
        """Sleep until the store's clock shows `time_s`."""
        while (left := time_s - self._clock()) > 0:
            self._sleep(left)


class _ThrottledReader(WrappedReader):
    def __init__(self, store: ThrottledStore, inner: ChunkReader) -> None:
        super().__init__(inner)
        self.slice_bytes = store.slice_bytes
        self._store = store
        self._requested = False

    def read_into(self, buffer: memoryview, offset: int) -> int:
        if not self._requested:
            self._requested = True
            self._store.wait_latency()
        wanted = max(0, min(len(buffer), self.size - offset))
        done = 0
        while done < wanted:
            part = buffer[done : min(done + self._store.slice_bytes, wanted)]
            arrives_at = self._store.reserve(len(part))
            count = self._inner.read_into(part, offset + done)
            self._store.wait_until(arrives_at)
            done += count
            if count < len(part):
                break
        return done

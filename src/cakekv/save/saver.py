"""Write-behind: computed chunks go to the store while prefill and decoding go on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from cakekv.chunk import ChunkShape, seal, segments
from cakekv.errors import StoreError, StoreFull
from cakekv.keys import ChunkKey
from cakekv.load.staging import StagingPool
from cakekv.store.base import Store

Gather = Callable[[list[memoryview]], None]
"""Copies a chunk out of a cache into its per-layer segments."""


@dataclass
class SaveReport:
    """What became of the chunks handed to a `Saver` so far.

    Attributes
    ----------
    saved_chunks, saved_bytes : int
        Written.
    declined_chunks : int
        The tier chose not to keep them.
    failed_chunks : int
        Lost to an error of the tier.
    error : str or None
        The first such error.
    """

    saved_chunks: int = 0
    saved_bytes: int = 0
    declined_chunks: int = 0
    failed_chunks: int = 0
    error: str | None = None


class Saver:
    """Writes chunks in the background, in the order they come.

    The queue holds references to caches, no data: a chunk is gathered when its turn comes. A full queue makes `save`
    wait, so a slow tier holds the producer back instead of filling the memory.

    Parameters
    ----------
    store : Store
        Where to.
    shape : ChunkShape
        What a chunk looks like.
    staging : StagingPool
        Buffers of at least `shape.total_bytes`.
    limit : int
        Chunks that may wait in the queue.
    """

    def __init__(self, store: Store, shape: ChunkShape, staging: StagingPool, limit: int = 256) -> None:
        self._store = store
        self._shape = shape
        self._staging = staging
        self._queue: queue.Queue[tuple[ChunkKey, int, Gather] | None] = queue.Queue(limit)
        self._crash: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.report = SaveReport()

    @property
    def full(self) -> bool:
        """Whether `save` would have to wait."""
        return self._queue.full()

    def save(self, key: ChunkKey, position: int, gather: Gather) -> None:
        """Hand over a chunk whose region of the cache is covered and will not change; from any thread."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="cakekv-save", daemon=True)
                self._thread.start()
        self._queue.put((key, position, gather))

    def wait(self) -> SaveReport:
        """Block until everything handed over is stored or has failed; returns the totals since the saver began."""
        self._queue.join()
        if self._crash is not None:
            raise self._crash
        return self.report

    def close(self) -> None:
        """Finish what is queued and stop."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                if self._crash is None:
                    self._write(*job)
            except BaseException as crash:
                self._crash = crash
            finally:
                self._queue.task_done()
                del job  # it holds a cache, which may be large, until the next one comes
        self._queue.task_done()

    def _write(self, key: ChunkKey, position: int, gather: Gather) -> None:
        with self._staging.buffer() as buffer:
            gather(segments(self._shape, buffer))
            seal(self._shape, buffer, key, position)
            try:
                kept = self._store.write(key, buffer[: self._shape.total_bytes])
            except (StoreFull, StoreError) as error:
                self.report.failed_chunks += 1
                self.report.error = self.report.error or str(error)
                return
        if kept:
            self.report.saved_chunks += 1
            self.report.saved_bytes += self._shape.total_bytes
        else:
            self.report.declined_chunks += 1

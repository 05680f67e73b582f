"""Write-behind: computed chunks go to the store while prefill and decoding go on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from cakekv.chunk import seal, segments
from cakekv.codec.coder import ChunkCoder
from cakekv.errors import CannotEncode, StoreError, StoreFull
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
        Lost to an error of the tier, or not to be encoded.
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
    coder : ChunkCoder
        What a chunk looks like, and how it is encoded.
    staging : StagingPool
        Buffers of at least `coder.exact.total_bytes`.
    limit : int
        Chunks that may wait in the queue.
    """

    def __init__(self, store: Store, coder: ChunkCoder, staging: StagingPool, limit: int = 256) -> None:
        self.store = store
        self._coder = coder
        self._staging = staging
        self._queue: queue.Queue[tuple[ChunkKey, int, Gather, bool] | None] = queue.Queue(limit)
        self._crash: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.report = SaveReport()

    @property
    def full(self) -> bool:
        """Whether `save` would have to wait."""
        return self._queue.full()

    def save(self, key: ChunkKey, position: int, gather: Gather, exact: bool = False) -> None:
        """Hand over a chunk whose region of the cache is covered and will not change; from any thread.

        `exact`: it is stored as it is, whatever the codec.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="cakekv-save", daemon=True)
                self._thread.start()
        self._queue.put((key, position, gather, exact))

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

    def _write(self, key: ChunkKey, position: int, gather: Gather, exact: bool) -> None:
        coder = self._coder
        encodes = coder.encodes and not exact
        with self._staging.buffer() as buffer, self._staging.buffer() if encodes else nullcontext() as coded:
            gather(segments(coder.exact, buffer))
            try:
                chunk = coder.encode(buffer, coded, key, position) if coded is not None else None
                if chunk is None:
                    seal(coder.exact, buffer, key, position)
                    chunk = buffer[: coder.exact.total_bytes]
                kept = self.store.write(key, chunk)
            except (StoreFull, StoreError, CannotEncode) as error:
                self.report.failed_chunks += 1
                self.report.error = self.report.error or str(error)
                return
        if kept:
            self.report.saved_chunks += 1
            self.report.saved_bytes += len(chunk)
        else:
            self.report.declined_chunks += 1

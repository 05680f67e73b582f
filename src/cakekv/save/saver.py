"""Write-behind: computed chunks go to the store while prefill and decoding go on."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic

from cakekv.chunk import seal, segments
from cakekv.codec.coder import ChunkCoder
from cakekv.errors import CacheRewritten, CannotEncode, StoreError, StoreFull
from cakekv.keys import ChunkKey
from cakekv.load.staging import StagingPool
from cakekv.logs import emit
from cakekv.store.base import Store

Gather = Callable[[list[memoryview]], None]
"""Copies a chunk out of a cache into its per-layer segments."""
OnSave = Callable[[str, int, float], None]
"""(outcome, bytes, seconds) of a chunk; the outcome is "saved", "declined", or why it failed."""

_LOG = logging.getLogger(__name__)


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
        Lost to an error of the tier, not to be encoded, or overwritten in their cache before they were saved.
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
    wait, so a slow tier holds the producer back instead of filling the memory. One that hangs does not: nobody waits
    for it any more, and what does not fit the queue is given up.

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
    deadline_s : float
        Seconds after which a store that has not taken a chunk is taken to hang.
    on_save : callable or None
        Told what became of every chunk.
    """

    def __init__(
        self,
        store: Store,
        coder: ChunkCoder,
        staging: StagingPool,
        limit: int = 256,
        *,
        deadline_s: float = 30.0,
        on_save: OnSave | None = None,
    ) -> None:
        self.store = store
        self._coder = coder
        self._staging = staging
        self._deadline_s = deadline_s
        self._on_save = on_save or (lambda outcome, size, seconds: None)
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(limit)
        self._crash: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._busy_since: float | None = None
        self._abandoned = False
        self.report = SaveReport()

    @property
    def full(self) -> bool:
        """Whether `save` would have to wait."""
        return self._queue.full() and not self.hangs

    @property
    def hangs(self) -> bool:
        """Whether the store does not answer."""
        return self._left_s() <= 0

    def introduce(self, root: str, fields: Mapping[str, str]) -> None:
        """Leave an identity in the store, to explain misses later; see `Store.remember_identity`."""
        self._put(partial(self._note, root, fields))

    def save(self, key: ChunkKey, position: int, gather: Gather, exact: bool = False) -> None:
        """Hand over a chunk whose region of the cache is covered; from any thread.

        `gather` raises `CacheRewritten` if the region has changed since; the chunk is not saved then.
        `exact`: it is stored as it is, whatever the codec.
        """
        if not self._put(partial(self._write, key, position, gather, exact)):
            self._failed("late", self._silence())

    def wait(self) -> SaveReport:
        """Block until everything handed over is stored or has failed; returns the totals since the saver began.

        What waits for a store that hangs counts as failed, though it may be stored yet.
        """
        waiting = self._join()
        if self._crash is not None:
            raise self._crash
        if not waiting:
            return self.report
        failed = self.report.failed_chunks + waiting
        return replace(self.report, failed_chunks=failed, error=self.report.error or self._silence())

    def close(self) -> None:
        """Finish what is queued and stop. A store that hangs is left alone."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._join():
            self._abandoned = True
            emit(_LOG, logging.WARNING, "deadline_missed", tier=self.store.name, operation="write")
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        if not self._abandoned:
            thread.join()

    def _put(self, job: Callable[[], None]) -> bool:
        """Queue a job. False if there is no room, and will be none."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="cakekv-save", daemon=True)
                self._thread.start()
        while True:
            try:
                self._queue.put(job, timeout=max(self._left_s(), 1e-3))
                return True
            except queue.Full:
                if self.hangs:
                    return False

    def _join(self) -> int:
        """Wait until the queue is empty, or the store hangs. Returns how many jobs are left."""
        with self._queue.all_tasks_done:
            while self._queue.unfinished_tasks and (left_s := self._left_s()) > 0:
                self._queue.all_tasks_done.wait(left_s)
            return self._queue.unfinished_tasks

    def _left_s(self) -> float:
        """Seconds until the store is taken to hang, unless it finishes what it is at."""
        since = self._busy_since
        return self._deadline_s - (0.0 if since is None else monotonic() - since)

    def _silence(self) -> str:
        return f"the {self.store.name} store has not taken a chunk for more than {self._deadline_s:g} s"

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                if self._crash is None and not self._abandoned:
                    self._busy_since = monotonic()
                    job()
            except BaseException as crash:
                self._crash = crash
            finally:
                self._busy_since = None
                self._queue.task_done()
                del job  # it holds a cache, which may be large, until the next one comes

    def _next(self) -> Callable[[], None] | None:
        """The next job; None at the end."""
        if not self._abandoned:
            return self._queue.get()
        with suppress(queue.Empty):
            return self._queue.get_nowait()
        return None

    def _note(self, root: str, fields: Mapping[str, str]) -> None:
        with suppress(StoreError):  # the chunk that is saved next fails the same way, and is counted
            self.store.remember_identity(root, fields)

    def _write(self, key: ChunkKey, position: int, gather: Gather, exact: bool) -> None:
        coder, began = self._coder, monotonic()
        encodes = coder.encodes and not exact
        with self._staging.buffer() as buffer, self._staging.buffer() if encodes else nullcontext() as coded:
            try:
                gather(segments(coder.exact, buffer))
                chunk = coder.encode(buffer, coded, key, position) if coded is not None else None
                if chunk is None:
                    seal(coder.exact, buffer, key, position)
                    chunk = buffer[: coder.exact.total_bytes]
                kept = self.store.write(key, chunk)
            except (StoreFull, StoreError, CannotEncode, CacheRewritten) as error:
                self._failed(_kind(error), str(error))
                return
            size = len(chunk)
        with self._lock:
            self.report.saved_chunks += kept
            self.report.saved_bytes += size if kept else 0
            self.report.declined_chunks += not kept
        self._on_save("saved" if kept else "declined", size, monotonic() - began)

    def _failed(self, kind: str, reason: str) -> None:
        with self._lock:
            self.report.failed_chunks += 1
            first, self.report.error = self.report.error is None, self.report.error or reason
        if first:
            emit(_LOG, logging.WARNING, "save_failed", tier=self.store.name, reason=reason)
        self._on_save(kind, 0, 0.0)


def _kind(error: Exception) -> str:
    """As a label of a metric."""
    kinds = {StoreFull: "store full", StoreError: "store failed", CacheRewritten: "rewritten"}
    return next((name for kind, name in kinds.items() if isinstance(error, kind)), "not encodable")

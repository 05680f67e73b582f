"""A worker's write-behind: computed chunks are copied out of the paged cache at once and written while vLLM goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from time import monotonic

from cakekv.errors import CakeError, CannotEncode
from cakekv.keys import ChunkKey
from cakekv.store.base import Store
from cakekv.vllm.complaints import Complaints
from cakekv.vllm.messages import SaveOrder
from cakekv.vllm.metrics import CakeStats
from cakekv.vllm.threads import start_thread
from cakekv.vllm.working.shard import Shard

_WRITERS = 2


class SavePool:
    """Writes chunks in the background.

    The copy out of the paged cache is made, or ordered before whatever uses the blocks again, when `save` returns: that
    takes milliseconds, against the seconds for which a slow store would otherwise hold blocks back. What does not fit
    into the queue is not saved.

    Parameters
    ----------
    store : Store
        Where to.
    shards : sequence of Shard
        What this worker has of a chunk.
    capacity : int
        Bytes that may wait to be written; at least one chunk may.
    """

    def __init__(self, store: Store, shards: Sequence[Shard], capacity: int) -> None:
        self._store = store
        self._shards = shards
        self._sizes = [shard.coder.exact.total_bytes for shard in shards]
        self.pending = 0
        """Chunks taken over and not written yet."""
        self._room = max(1, capacity // sum(self._sizes))
        """Buffers that may still be allocated."""
        self._free: list[memoryview] = []
        self._queue: queue.SimpleQueue[tuple[SaveOrder, memoryview, list[Callable[[], None]]] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._unsaved: list[ChunkKey] = []
        self._stats = CakeStats()
        self._failed = Complaints("chunks could not be saved, so later prompts will have to be computed")
        self._odd = Complaints("a chunk is not saved")
        self._threads = [start_thread(f"cakekv-save-{number}", self._work) for number in range(_WRITERS)]

    def save(self, orders: Sequence[SaveOrder]) -> None:
        """Take over chunks that are complete in the paged cache."""
        for order in orders:
            try:
                buffer = self._buffer()
            except Exception:  # the system may have no pinned memory left
                self._odd.say("there is no memory for it", exc_info=True)
                self._lost(order.key, "crashed")
                continue
            if buffer is None:
                self._lost(order.key, "store too slow")
                continue
            try:
                waits = [shard.gather(order.block_ids, part) for shard, part in self._cut(buffer)]
            except Exception:  # a GPU may be out of memory for the moment; the request goes on
                self._odd.say("it could not be copied out of the KV cache", exc_info=True)
                self._lost(order.key, "crashed")
                with self._lock:
                    self._free.append(buffer)
                continue
            with self._lock:
                self.pending += 1
            self._queue.put((order, buffer, waits))

    def wait(self, timeout_s: float) -> None:
        """Until all is written, but no longer than `timeout_s` seconds."""
        with self._ended:
            self._ended.wait_for(lambda: not self.pending, timeout_s)

    @property
    def unsaid(self) -> int:
        """Chunks that are not written yet, and one more if `take_stats` has something to tell."""
        with self._lock:
            return self.pending + (not self._stats.is_empty())

    def take_unsaved(self) -> list[ChunkKey]:
        """Chunks that could not be saved since the last call."""
        with self._lock:
            unsaved, self._unsaved = self._unsaved, []
        return unsaved

    def take_stats(self) -> CakeStats | None:
        """What happened since the last call, if anything did."""
        with self._lock:
            stats, self._stats = self._stats, CakeStats()
        return None if stats.is_empty() else stats

    def close(self, timeout_s: float) -> None:
        """Write what is queued, as far as that takes no longer than `timeout_s` seconds."""
        until = monotonic() + timeout_s
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, until - monotonic()))

    def _buffer(self) -> memoryview | None:
        with self._lock:
            if self._free:
                return self._free.pop()
            if not self._room:
                return None
            self._room -= 1
        try:
            return self._shards[0].cache.allocate(sum(self._sizes))
        except BaseException:
            with self._lock:
                self._room += 1
            raise

    def _cut(self, buffer: memoryview) -> list[tuple[Shard, memoryview]]:
        """Each shard with its part of a buffer."""
        ends = list(accumulate(self._sizes, initial=0))
        return [(shard, buffer[begin:end]) for shard, begin, end in zip(self._shards, ends, ends[1:], strict=False)]

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            order, buffer, waits = job
            reason, kept, size = "declined by the store", True, 0
            try:
                for wait in waits:
                    wait()
                began = monotonic()
                for shard, part in self._cut(buffer):
                    written = shard.write(self._store, order.key, order.start, part, order.exact)
                    kept, size = kept and written > 0, size + written
            except CannotEncode as error:
                kept, reason = False, "cannot be encoded"
                self._failed.say(str(error))
            except CakeError as error:
                kept, reason = False, "store failed"
                self._failed.say(str(error))
            except Exception:
                kept, reason = False, "crashed"
                self._odd.say("the store failed in a way that no store should", exc_info=True)
            if not kept:
                self._lost(order.key, reason)
            with self._lock:
                self.pending -= 1
                self._free.append(buffer)
                if kept:
                    self._stats.add("cakekv:saved_chunks", 1)
                    self._stats.add("cakekv:saved_bytes", size)
                    self._stats.add("cakekv:save_seconds", monotonic() - began)
                self._ended.notify_all()

    def _lost(self, key: ChunkKey, reason: str) -> None:
        with self._lock:
            self._unsaved.append(key)
            self._stats.add("cakekv:unsaved_chunks", 1, reason)

"""A worker's I/O arm: threads that read, verify and place chunks, and a forward pass that waits for them.

Chunks are loaded in the order of the orders. In a layered step, the forward pass waits before each layer for that
layer's part of the prefix.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from time import monotonic

from cakekv.errors import CorruptChunk, MissingChunk, NoAnswer, StoreError, UnsupportedEngine
from cakekv.load.reading import Abandoned, Progress, failure_reason
from cakekv.store.base import Store
from cakekv.vllm.complaints import Complaints
from cakekv.vllm.messages import LoadOrder, LoadResult
from cakekv.vllm.threads import start_thread
from cakekv.vllm.working.shard import Shard


class _Job:
    """One load on this worker."""

    __slots__ = ("began", "cancelled", "order", "placing")

    def __init__(self, order: LoadOrder) -> None:
        self.order = order
        self.cancelled = False
        self.placing = False
        self.began: float | None = None


class LoadPool:
    """Loads what it is ordered to, one or several chunks at a time from every tier.

    Parameters
    ----------
    tiers : sequence of Store
        In the order that the scheduler numbers them in.
    threads : sequence of int
        Per tier, how many chunks to read at a time at the most.
    shards : sequence of Shard
        What this worker has of a chunk.
    groups : sequence of range
        The layers of each group of a layered finish.
    """

    def __init__(
        self, tiers: Sequence[Store], threads: Sequence[int], shards: Sequence[Shard], groups: Sequence[range]
    ) -> None:
        self.tiers = tiers
        self._shards = shards
        self._groups = groups
        self._changed = threading.Condition()
        self._queues: list[deque[_Job]] = [deque() for _ in tiers]
        self._at_a_time = list(threads)
        self._reading: list[list[_Job]] = [[] for _ in tiers]
        self._jobs: dict[int, _Job] = {}
        """Loads that were not reported as ended, by number."""
        self._begun: dict[int, float] = {}
        self._ended: dict[int, tuple[bool, str, Progress, float, float]] = {}
        self._closed = False
        self._odd = Complaints("a stored chunk is computed instead")
        for tier, (store, count) in enumerate(zip(tiers, threads, strict=True)):
            for number in range(count):
                start_thread(f"cakekv-load-{store.name}-{number}", lambda tier=tier: self._work(tier))  # type: ignore[misc]

    def submit(self, orders: Iterable[LoadOrder], at_a_time: Sequence[int]) -> None:
        """Queue loads; of each tier, read so many at a time from now on, not counting those that were given up."""
        with self._changed:
            self._at_a_time = list(at_a_time)
            for order in orders:
                job = self._jobs[order.number] = _Job(order)
                self._queues[order.tier].append(job)
            self._changed.notify_all()

    def cancel(self, numbers: Iterable[int]) -> None:
        """Give loads up. After this none of them writes into the cache: one that is doing so now is waited for."""
        with self._changed:
            jobs = [self._jobs[number] for number in numbers if number in self._jobs]
            for job in jobs:
                job.cancelled = True
                if job.began is None:
                    self._queues[job.order.tier].remove(job)
                    self._end(job, False, "", Progress())
            self._changed.notify_all()  # others may begin in their place
            self._changed.wait_for(lambda: not any(job.placing for job in jobs))

    def wait(self, numbers: Sequence[int], until: float) -> bool:
        """Wait until loads that were not reported as ended are in place; False if one is not, at the time `until`."""

        def state(number: int) -> bool | None:
            if number in self._ended:
                return self._ended[number][0]
            return None if number in self._jobs and not self._jobs[number].cancelled else False

        with self._changed:
            states: list[bool | None] = []
            while True:
                states = [state(number) for number in numbers]
                if all(states) or False in states or not self._changed.wait(max(0.0, until - monotonic())):
                    return all(state(number) for number in numbers)

    def take_events(self) -> tuple[dict[int, float], dict[int, LoadResult]]:
        """What began and what ended since the last call; times are seconds ago."""
        with self._changed:
            now = monotonic()
            begun = {number: now - began for number, began in self._begun.items()}
            ended = {
                number: LoadResult(placed, reason, read.bytes, now - began_at, now - ended_at, read.coded, read.silent)
                for number, (placed, reason, read, began_at, ended_at) in self._ended.items()
            }
            self._begun.clear()
            self._ended.clear()
        return begun, ended

    def close(self) -> None:
        """Stop, without waiting for reads that hang; nothing is placed after this."""
        self.cancel(list(self._jobs))
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self, tier: int) -> None:
        while (job := self._next(tier)) is not None:
            progress = Progress()
            placed, reason = False, ""
            try:
                placed = self._load(job, progress)
            except Abandoned:
                pass
            except (CorruptChunk, MissingChunk, StoreError) as error:
                reason, progress.silent = failure_reason(error), isinstance(error, NoAnswer)
            except UnsupportedEngine as error:
                reason = f"not to be moved: {error}"
            except Exception as error:
                self._odd.say("a load failed in a way that no store should", exc_info=True)
                reason = f"crashed: {error!r}"
            with self._changed:
                self._reading[tier].remove(job)
                self._end(job, placed, reason, progress)
                self._changed.notify_all()

    def _next(self, tier: int) -> _Job | None:
        queue = self._queues[tier]
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (queue and self._has_room(tier)))
            if self._closed:
                return None
            job = queue.popleft()
            self._reading[tier].append(job)
            job.began = self._begun[job.order.number] = monotonic()
            return job

    def _has_room(self, tier: int) -> bool:
        return sum(not job.cancelled for job in self._reading[tier]) < self._at_a_time[tier]

    def _load(self, job: _Job, progress: Progress) -> bool:
        """Read, verify and place a chunk; False if it was cancelled at the last moment."""
        order, store = job.order, self.tiers[job.order.tier]
        layers = self._groups[order.group] if order.group is not None else None
        with ExitStack() as stack:
            parts = [shard.read(store, order, layers, job, progress, stack) for shard in self._shards]
            with self._changed:
                if job.cancelled:
                    return False
                job.placing = True
            for shard, segments in zip(self._shards, parts, strict=True):
                shard.cache.place(order.block_ids, segments)
        return True

    def _end(self, job: _Job, placed: bool, reason: str, progress: Progress) -> None:
        """Note how a load ended; called with `_changed` held."""
        job.placing = False
        del self._jobs[job.order.number]
        if not self._jobs:
            for shard in self._shards:
                shard.forget_headers()
        now = monotonic()
        self._ended[job.order.number] = (placed, reason, progress, job.began or now, now)


class LayerGate:
    """Holds one forward pass up.

    vLLM cannot give a forward pass up. So one that lacks something goes on with whatever lies in the cache, and is
    `lost`: the scheduler throws its output away and has it computed again.

    Parameters
    ----------
    loads : LoadPool
        Where the loads go on.
    awaited : sequence of sequences of int
        Per group of layers, the loads that must be in place.
    patience_s : float
        Seconds after which the pass waits no more.
    """

    def __init__(self, loads: LoadPool, awaited: Sequence[Sequence[int]], patience_s: float) -> None:
        self._loads = loads
        self._awaited = awaited
        self._until = monotonic() + patience_s
        self._passed = 0
        """Groups that may be computed."""
        self.waited_s = 0.0
        self.lost = False

    def wait(self, group: int) -> None:
        """Wait until this group of layers, and those before it, may be computed."""
        while self._passed <= group and not self.lost:
            began = monotonic()
            self.lost = not self._loads.wait(self._awaited[self._passed], self._until)
            self.waited_s += monotonic() - began
            self._passed += 1

    def close(self) -> None:
        """The pass is over: if vLLM did not ask for every group, it did not wait for all it needed."""
        self.lost = self.lost or self._passed < len(self._awaited)

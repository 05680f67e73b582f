"""The threads that read what recalls ask for: of every tier as many as it reads chunks in parallel, for all together.

What a layer waits for goes first, since nobody else computes meanwhile; then what a first token needs, before what is
read behind one that has come. Among equals, who came first is served first. Nobody here waits for the compute arm, so
a recall that holds it while it waits for rows is always served.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from time import monotonic
from typing import Any, Protocol
from weakref import WeakSet

from cakekv.embedded.arms import Arms
from cakekv.errors import CorruptChunk, MissingChunk, StoreError
from cakekv.forks import on_fork
from cakekv.keys import ChunkKey
from cakekv.restore.flights import patience_s
from cakekv.store.base import ChunkReader, Store

AT_ONCE = 1 << 20
"""Bytes that are read in one go, if they stand next to each other."""
STUCK_S = 2.0
"""A read that nobody waits for any more ends with its next slice; after this long, its thread is stuck."""
_IDLE_READERS = 16
"""Open chunks that are kept for the next read, for each thread."""


class Urgency(IntEnum):
    """Who is served first."""

    LAYER = 0
    """A layer waits in mid-forward."""
    FIRST = 1
    """Needed before the first token."""
    ALL = 2
    """Somebody waits until all is there."""
    REST = 3
    """Read behind the first token, in case."""


class Recalling(Protocol):
    """A recall, as its readers see it. All but `read` and `place` is called with the lock held."""

    @property
    def urgency(self) -> Urgency:
        """How urgent its next read is."""

    def next_job(self) -> Job | None:
        """What to read next, if anything."""

    def key_of(self, sidecar: int) -> ChunkKey:
        """What one of its sidecars is stored under."""

    def read(self, job: Job, reader: ChunkReader) -> memoryview | None:
        """Read what a job says; None if it was given up meanwhile."""

    def place(self, job: Job, data: memoryview) -> None:
        """Verify what was read, and put it where it belongs."""

    def ended(self, job: Job) -> None:
        """A job is over, successful or not."""

    def failed(self, job: Job, error: Exception) -> None:
        """What a job should have read cannot be had."""

    def crashed(self, crash: BaseException) -> None:
        """A thread met with what no store may raise."""

    def lose(self, why: str) -> None:
        """Nothing more will come."""

    @property
    def stopped(self) -> bool:
        """Whether nothing more is to be read."""

    def forked(self) -> None:
        """This is a child process, in which nobody reads."""


@dataclass(eq=False)
class Job:
    """Rows to read in one go."""

    recall: Recalling
    sidecar: int
    """Which one of the recall's."""
    batch: Sequence[int]
    """Places of the recall."""
    size: int
    moved_at: float = field(default_factory=monotonic)
    """When it began, or the last slice of it came."""
    patience_s: float = math.inf
    """How long a slice is waited for."""
    late: bool = False
    unwanted_at: float = math.inf
    """Since when nobody is known to want it."""


class RecallReaders:
    """Reads from one tier.

    A thread that hangs in a read which was given up has another take its place until it is back; once as many again
    hang, all recalls of the tier are given up. Threads live only while a recall is open.

    Parameters
    ----------
    arms : Arms
        Has what the tier costs, which is learned from reads.
    tier : int
        Its number.
    store : Store
        What to read from.

    Attributes
    ----------
    lock : RLock
        Guards everything here, and the recalls. Reentrant: an answer that is given up ends its recall wherever the
        garbage collector finds it.
    """

    def __init__(self, arms: Arms[Any, Any], tier: int, store: Store) -> None:
        self._arms, self._tier, self._store = arms, tier, store
        self._all: WeakSet[Any] = WeakSet()
        self._begin()
        on_fork(self)

    def _begin(self) -> None:
        self.lock = threading.RLock()
        self._free = threading.Condition(self.lock)
        """Where idle threads wait."""
        self._gone = threading.Condition(self.lock)
        """Notified when a thread ends."""
        self._open: list[Recalling] = []
        self._workers = self._idle = 0
        self._jobs: list[Job] = []
        """In flight."""
        self._answered_at = -math.inf
        self._readers: list[tuple[Recalling, int, ChunkReader]] = []
        """Open chunks that nobody uses just now, the one used last at the end."""
        self._closing: list[ChunkReader] = []
        """Those that nobody will use any more."""
        self._area, self._area_at = 0.0, monotonic()
        """Reads in flight, summed over time."""

    def _forked(self) -> None:
        self._inherited = self._readers, self._closing  # to close them might close connections that the parent uses
        self._begin()
        for recall in list(self._all):
            recall.forked()

    # The following are called with the lock held.

    def open(self, recall: Recalling) -> None:
        """Begin to read for a recall."""
        self._all.add(recall)
        self._open.append(recall)
        self.wake()

    def close(self, recall: Recalling) -> None:
        """Read nothing more for a recall."""
        if recall in self._open:
            self._open.remove(recall)
            self._closing += [reader for one, _, reader in self._readers if one is recall]
            self._readers = [entry for entry in self._readers if entry[0] is not recall]
            self.wake()

    def wake(self) -> None:
        """There may be something to read."""
        if not self._open:
            self._free.notify_all()
        elif self._stuck() >= 2 * self._store.parallel_reads:
            self._give_up("late")  # each one that is stuck holds a buffer
        elif self._idle:
            self._free.notify()
        elif self._workers < self._places():
            self._hire()

    @property
    def hangs(self) -> bool:
        """Whether as many threads as the tier has places are stuck."""
        return self._stuck() >= self._store.parallel_reads

    def check_late(self, now: float) -> None:
        """Give up recalls one of whose reads has been waited for long enough: others may wait for those threads."""
        late = [job for job in self._jobs if not job.late and now - job.moved_at > job.patience_s]
        for job in late:
            job.late = True
            job.recall.lose("late")
        if late:
            self.wake()

    def is_silent(self, since: float, now: float, patience_s: float) -> bool:
        """Whether nobody was delivered anything since then, for longer than that."""
        return now - max(since, self._answered_at) > patience_s

    def is_busy_with(self, recall: Recalling) -> bool:
        """Whether anything is being read for a recall."""
        return any(job.recall is recall for job in self._jobs)

    def _hire(self) -> None:
        """Start a thread. If the system has none to spare, those at work will do; without any, nothing is read."""
        self._workers += 1  # whatever else `start` raises, the thread has begun
        try:
            threading.Thread(target=self._work, name=f"cakekv-recall-{self._store.name}", daemon=True).start()
        except RuntimeError as error:
            self._workers -= 1
            if self._workers <= self._stuck():
                self._give_up(f"no thread can be started to read it: {error}")

    def _give_up(self, why: str) -> None:
        for recall in list(self._open):
            recall.lose(why)

    def _stuck(self) -> int:
        now, stuck = monotonic(), 0
        for job in self._jobs:
            if job.recall.stopped and job.unwanted_at == math.inf:
                job.unwanted_at = now
            stuck += job.late or now - job.unwanted_at > STUCK_S
        return stuck

    def _places(self) -> int:
        reads = self._store.parallel_reads
        return reads + min(self._stuck(), reads)

    def _next(self) -> Job | None:
        while self._open and self._workers <= self._places():
            for recall in sorted(self._open, key=lambda one: one.urgency):
                try:
                    job = recall.next_job()
                except BaseException as crash:
                    recall.crashed(crash)
                    continue
                if job is not None:
                    self._count()
                    self._jobs.append(job)
                    self.wake()  # there may be more to read
                    return job
            self._idle += 1
            self._free.wait()
            self._idle -= 1
        return None

    def _count(self) -> None:
        now = monotonic()
        self._area += len(self._jobs) * (now - self._area_at)
        self._area_at = now

    # The following are called without it.

    def patience_s(self, size: int) -> float:
        """How many seconds a read of that size is waited for."""
        with self._arms.arbiter.lock:
            return patience_s(self._arms.tiers[self._tier].cost, size, self._arms.options.deadline_s)

    def join(self, timeout_s: float) -> None:
        """Wait until no thread is left, at most that long: one may hang in a tier that does not answer."""
        with self.lock:
            self._gone.wait_for(lambda: not self._workers, timeout_s)

    def await_last(self, recall: Recalling, timeout_s: float) -> None:
        """Wait until nothing is being read for a recall any more, at most that long."""
        with self.lock:
            self._gone.wait_for(lambda: not self.is_busy_with(recall), timeout_s)

    def _work(self) -> None:
        try:
            while True:
                with self.lock:
                    job = self._next()
                    closing, self._closing = self._closing, []
                _close(closing)
                if job is None:
                    return
                self._serve(job)
                del job
        except BaseException as crash:
            with self.lock:
                for recall in list(self._open):
                    recall.crashed(crash)
        finally:
            with self.lock:
                self._workers -= 1
                self._gone.notify_all()

    def _serve(self, job: Job) -> None:
        job.patience_s = self.patience_s(job.size)
        recall, crash = job.recall, None
        try:
            with ExitStack() as stack:
                reader = stack.enter_context(self._opened(job))
                data = self._timed(job, reader)
                if data is not None:
                    recall.place(job, data)
                    stack.pop_all()
                    self._keep(job, reader)
        except (CorruptChunk, MissingChunk, StoreError, MemoryError) as error:
            with self.lock:
                recall.failed(job, error)
        except BaseException as error:
            crash = error
        with self.lock:
            self._count()
            self._jobs.remove(job)
            self._answered_at = monotonic()
            if crash is not None:
                recall.crashed(crash)
            recall.ended(job)
            self._gone.notify_all()
            self.wake()

    def _timed(self, job: Job, reader: ChunkReader) -> memoryview | None:
        """Read, and learn from how long that took, unless chunks were loaded meanwhile, of which that is learned."""
        loader, lock, cost = self._arms.loader, self._arms.arbiter.lock, self._arms.tiers[self._tier].cost
        with lock:
            is_crowded = loader.is_loading(self._tier)
        with self.lock:
            self._count()
            area, began = self._area, self._area_at
        data = job.recall.read(job, reader)
        with self.lock:
            self._count()
            area, ended = self._area - area, self._area_at
        with lock:
            if data is not None and ended > began and not is_crowded and not loader.is_loading(self._tier):
                cost.observe_read(job.size, began, ended, area / (ended - began))
        return data

    def _opened(self, job: Job) -> ChunkReader:
        """A reader of the job's sidecar that nobody else uses."""
        with self.lock:
            for index, (recall, sidecar, reader) in enumerate(self._readers):
                if recall is job.recall and sidecar == job.sidecar:
                    del self._readers[index]
                    return reader
            key = job.recall.key_of(job.sidecar)
        return self._store.open(key)

    def _keep(self, job: Job, reader: ChunkReader) -> None:
        """Keep an open reader for the next read of that sidecar, and close the one that was not used for longest."""
        with self.lock:
            if job.recall in self._open:
                self._readers.append((job.recall, job.sidecar, reader))
            else:
                self._closing.append(reader)
            if len(self._readers) > _IDLE_READERS * self._store.parallel_reads:
                self._closing.append(self._readers.pop(0)[2])


def _close(readers: Sequence[ChunkReader]) -> None:
    for reader in readers:
        with suppress(StoreError):
            reader.close()

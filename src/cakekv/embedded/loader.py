"""The I/O arm: worker threads that read chunks, check them and place them into the caches, as the planners ask."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import monotonic
from typing import TYPE_CHECKING

from cakekv.chunk import ChunkHeader
from cakekv.codec.base import Segment
from cakekv.codec.coder import ChunkCoder
from cakekv.embedded.arbiter import Arbiter, Request
from cakekv.errors import CorruptChunk, MissingChunk, NoAnswer, StoreError
from cakekv.keys import ChunkKey
from cakekv.load.decoding import decoded_layers
from cakekv.load.reading import Abandoned, Progress, failure_reason, read_chunk
from cakekv.load.staging import StagingPool
from cakekv.logs import emit
from cakekv.restore.flights import Load
from cakekv.restore.planner import Planner
from cakekv.store.base import Store

if TYPE_CHECKING:
    from cakekv.codec.on_device import DeviceDecoder

Place = Callable[[int, int, "list[Segment | None]"], int]
"""(first position, tokens, segment per layer or None) to bytes copied."""

_LOG = logging.getLogger(__name__)

_STUCK_S = 2.0
"""A cancelled load is given up between two slices; if it is still there after this long, its worker is stuck."""


class Loading:
    """The loads of one restore.

    Parameters
    ----------
    request : Request
        Whose they are; woken whenever one of them has ended.
    restore : Planner
        The planner; only called with the arbiter's lock held.
    keys : sequence of ChunkKey
        Keys of the prompt's chunks.
    place : callable
        Copies segments into the cache.
    on_event : callable
        Called after every event.

    Attributes
    ----------
    placed_bytes : int
        Copied into the cache.
    parts : dict of int to int
        For the chunks placed, whole or in pieces, how many parts of them were read; 0 for those in the exact form.
    first_lossy : int or None
        The first chunk that ever was; what was computed behind it attended to it.
    crash : BaseException or None
        What a worker met with that no store may raise.
    """

    def __init__(
        self,
        request: Request,
        restore: Planner,
        keys: Sequence[ChunkKey],
        place: Place,
        on_event: Callable[[], None] = lambda: None,
    ) -> None:
        self.request = request
        self.restore = restore
        self.keys = keys
        self.place = place
        self.on_event = on_event
        self.headers: dict[tuple[int, int], ChunkHeader] = {}
        """By chunk and source: pieces after the first do not read the header again."""
        self.in_flight = 0
        self.placed_bytes = 0
        self.parts: dict[int, int] = {}
        self.first_lossy: int | None = None
        self.crash: BaseException | None = None

    def raise_crash(self) -> None:
        """Raise what a worker met with. Called with the lock held."""
        if self.crash is not None:
            raise self.crash

    def join(self, timeout_s: float) -> None:
        """Wait until no load is in flight any more, at most this long: one may hang in a tier that does not answer.

        Called with the lock held.
        """
        self.request.woken.wait_for(lambda: not self.in_flight, timeout_s)

    def release(self) -> None:
        """Let go of the cache. Workers that still hang in a tier will find their loads cancelled."""
        self.place = _nowhere


class Loader:
    """Loads what the open restores ask for, from every tier at once, several chunks at a time.

    A tier has as many workers as it reads chunks in parallel, however many restores there are; the arbiter says whose
    turn it is. A worker whose load was given up may hang for ever, so another takes its place until it is back; once as
    many again hang, nothing more is loaded. Workers live only while a restore is open.

    A load is read in slices straight into the staging buffer that it is placed from, and given up between two slices
    once compute has claimed its chunk. Nothing is placed that was not verified.

    Parameters
    ----------
    arbiter : Arbiter
        Orders the restores; its lock guards everything here.
    tiers : sequence of Store
        One per source of the restores.
    coder : ChunkCoder
        What a chunk of this model looks like, and how it is decoded: by the thread that read it.
    unwindowed : sequence of int
        The layers that every load needs; the others only where a sliding window can see the chunk.
    groups : sequence of range
        The layers of each group of a layered finish.
    staging : StagingPool
        Buffers of at least `coder.exact.total_bytes`.
    decoder : DeviceDecoder or None
        Decodes instead where the caches are. A load ends when it is decoded there, too.
    """

    def __init__(
        self,
        arbiter: Arbiter,
        tiers: Sequence[Store],
        coder: ChunkCoder,
        unwindowed: Sequence[int],
        groups: Sequence[range],
        staging: StagingPool,
        decoder: DeviceDecoder | None = None,
    ) -> None:
        self._arbiter = arbiter
        self._lock = arbiter.lock
        self._tiers = tiers
        self._coder = coder
        self._unwindowed = tuple(unwindowed)
        self._groups = groups
        self._staging = staging
        self._decoder = decoder
        self._open: dict[str, Loading] = {}
        self._free = [threading.Condition(self._lock) for _ in tiers]
        """Where the idle workers of each tier wait."""
        self._workers = [0] * len(tiers)
        self._in_flight: list[dict[Load, float]] = [{} for _ in tiers]
        """Loads of each tier, and since when they are known to be cancelled; infinity for never."""

    # The following are called with the lock held.

    def open(self, loading: Loading) -> None:
        """Begin to load for a restore."""
        self._open[loading.request.id] = loading
        self.wake()

    def close(self, loading: Loading) -> None:
        """Load nothing more for a restore, and give up what is in flight."""
        if self._open.pop(loading.request.id, None) is not None:
            loading.restore.cancel_loads()
            self.wake()

    def wake(self) -> None:
        """Something has happened to a restore: there may be something to load."""
        for source, free in enumerate(self._free):
            if not self._open:
                free.notify_all()
                continue
            if self._stuck(source) >= 2 * self._tiers[source].parallel_reads:
                self._give_up(source, "late")  # each one that is stuck holds a buffer
                continue
            while self._workers[source] < self._places(source) and self._hire(source):
                pass
            free.notify()

    def _hire(self, source: int) -> bool:
        """Start a worker. If the system has no thread to spare, those at work will do; without any, nothing loads."""
        name = f"cakekv-load-{self._tiers[source].name}"
        self._workers[source] += 1  # whatever else `start` raises, the thread has begun
        try:
            threading.Thread(target=self._work, args=(source,), name=name, daemon=True).start()
            return True
        except RuntimeError as error:
            self._workers[source] -= 1
            if self._workers[source] <= self._stuck(source):
                self._give_up(source, f"store failed: no thread can be started to read it ({error})")
            return False

    def _give_up(self, source: int, reason: str) -> None:
        """Have every chunk that this tier should deliver be computed, or delivered by another one."""
        for loading in self._open.values():
            now = monotonic()
            while (load := loading.restore.next_load(source, now)) is not None:
                loading.restore.failed(load, reason, 0, now)
            loading.request.woken.notify_all()

    def check_late(self, now: float) -> None:
        """Let every open restore give up what it has waited for long enough: others may wait for those workers."""
        waited_for = [load for loads in self._in_flight for load in loads if not load.late]
        for loading in self._open.values():
            loading.restore.check_late(now)
        for load in waited_for:
            if load.late:
                tier, waited_s = self._tiers[load.tier].name, round(now - load.began, 3)
                emit(_LOG, logging.WARNING, "deadline_missed", tier=tier, operation="load", waited_s=waited_s)
        self.wake()

    def hangs(self, source: int) -> bool:
        """Whether as many workers as the tier has places are stuck in loads that nobody waits for any more."""
        return self._stuck(source) >= self._tiers[source].parallel_reads

    def _stuck(self, source: int) -> int:
        now, stuck, loads = monotonic(), 0, self._in_flight[source]
        for load, cancelled in loads.items():
            if load.cancelled and cancelled == math.inf:
                loads[load] = now
            stuck += load.late or now - cancelled > _STUCK_S
        return stuck

    def _places(self, source: int) -> int:
        reads = self._tiers[source].parallel_reads
        return reads + min(self._stuck(source), reads)

    def _next(self, source: int) -> tuple[Loading, Load] | None:
        while self._open and self._workers[source] <= self._places(source):
            now = monotonic()
            for request in self._arbiter.load_order(source, now):
                loading = self._open.get(request.id)
                if loading is None or loading.crash is not None:
                    continue
                try:
                    load = loading.restore.next_load(source, now)
                except BaseException as crash:
                    self._crashed(loading, crash)
                    continue
                if load is not None:
                    loading.in_flight += 1
                    self._in_flight[source][load] = math.inf
                    self._free[source].notify()  # there may be more to load
                    return loading, load
            self._free[source].wait()
        return None

    def _crashed(self, loading: Loading, crash: BaseException) -> None:
        loading.crash = crash
        loading.request.woken.notify_all()

    # The following are called without it.

    def _work(self, source: int) -> None:
        try:
            while True:
                with self._lock:
                    job = self._next(source)
                    if job is None:
                        self._workers[source] -= 1
                        return
                self._serve(*job)
                del job
        except BaseException as crash:
            with self._lock:
                self._workers[source] -= 1
                for loading in self._open.values():
                    self._crashed(loading, crash)

    def _serve(self, loading: Loading, load: Load) -> None:
        try:
            crash = None
            self._perform(loading, load)
        except BaseException as error:
            crash = error
        with self._lock:
            del self._in_flight[load.tier][load]
            loading.in_flight -= 1
            if crash is not None:
                self._crashed(loading, crash)
            loading.request.woken.notify_all()
            self.wake()

    def _perform(self, loading: Loading, load: Load) -> None:
        restore = loading.restore
        decodes = self._coder.encodes
        to_buffer = decodes and self._decoder is None
        with ExitStack() as buffers:
            progress = Progress()
            try:
                buffer = buffers.enter_context(self._staging.buffer())
                decoded = buffers.enter_context(self._staging.buffer()) if to_buffer else None
                parts = self._read(loading, load, buffer, decoded, progress)
            except Abandoned:
                self._report(loading, lambda now: restore.abandoned(load, progress.bytes, now))
                return
            except (CorruptChunk, MissingChunk, StoreError, MemoryError) as error:
                reason = failure_reason(error)
                self._log_failure(load, loading.keys[load.chunk], error)
                silent = isinstance(error, NoAnswer)
                self._report(loading, lambda now: restore.failed(load, reason, progress.bytes, now, silent))
                return
            with self._lock:
                if decodes:
                    load.size = progress.bytes
                wanted = restore.arrived(load, monotonic())
            if not wanted:
                return
            copied = loading.place(load.start, load.tokens, parts)

            def placed(now: float) -> None:
                restore.placed(load, now)
                loading.placed_bytes += copied
                codec = self._coder.codec
                loading.parts[load.chunk] = (load.parts or codec.parts_read) if progress.coded else 0
                if progress.coded and codec.lossy:
                    first = loading.first_lossy
                    loading.first_lossy = load.chunk if first is None else min(first, load.chunk)

            self._report(loading, placed)

    def _log_failure(self, load: Load, key: ChunkKey, error: Exception) -> None:
        tier = self._tiers[load.tier].name
        if isinstance(error, CorruptChunk):
            fault, detail = error.fault.name.lower(), error.detail
            emit(_LOG, logging.WARNING, "chunk_corrupt", tier=tier, chunk=key.short, fault=fault, detail=detail)
        else:  # one by one these may be many; `restore_finished` counts them
            emit(_LOG, logging.DEBUG, "load_failed", tier=tier, chunk=key.short, reason=str(error))

    def _report(self, loading: Loading, event: Callable[[float], None]) -> None:
        with self._lock:
            event(monotonic())
            loading.on_event()

    def _read(
        self, loading: Loading, load: Load, buffer: memoryview, decoded: memoryview | None, progress: Progress
    ) -> list[Segment | None]:
        """Read, verify and decode what the load needs; the layers it does not need are None."""
        coder, key = self._coder, loading.keys[load.chunk]
        layers = self._layers(load)
        header = loading.headers.get((load.chunk, load.tier)) if load.group is not None else None
        with self._tiers[load.tier].open(key) as reader:
            header = read_chunk(reader, coder, key, load.start, layers, buffer, load, progress, load.parts, header)
        if load.group is not None:
            loading.headers[load.chunk, load.tier] = header
        parts: list[Segment | None] = [None] * coder.layers
        found = decoded_layers(coder, header, layers, buffer, load, decoded, self._decoder, load.parts)
        for layer, segment in found:
            parts[layer] = segment
        return parts

    def _layers(self, load: Load) -> list[int]:
        wanted = range(self._coder.layers) if load.windowed else self._unwindowed
        return [layer for layer in wanted if load.group is None or layer in self._groups[load.group]]


def _nowhere(start: int, tokens: int, parts: list[Segment | None]) -> int:
    raise AssertionError("a load was placed after the end of its restore")

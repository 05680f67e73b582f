"""The I/O arm: worker threads that read chunks, check them and place them into the caches, as the planners ask."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cakekv.chunk import ChunkHeader, Form, segments
from cakekv.codec.base import Segment
from cakekv.codec.coder import ChunkCoder
from cakekv.embedded.arbiter import Arbiter, Request
from cakekv.embedded.coders import Coders
from cakekv.errors import CorruptChunk, MissingChunk, NoAnswer, StoreError
from cakekv.keys import ChunkKey
from cakekv.load.decoding import decoded_layers
from cakekv.load.pieces import byte_ranges
from cakekv.load.reading import Abandoned, Cancellable, Headers, Progress, Wanted, failure_reason, fill, read_chunk
from cakekv.load.staging import StagingPool
from cakekv.logs import emit
from cakekv.restore.flights import Load
from cakekv.restore.planner import Planner
from cakekv.reuse.serving import Serving
from cakekv.store.base import Store

if TYPE_CHECKING:
    from cakekv.codec.on_device import DeviceDecoder

_LOG = logging.getLogger(__name__)

_STUCK_S = 2.0
"""A cancelled load is given up between two slices; if it is still there after this long, its worker is stuck."""


class Restoring(Protocol):
    """A restore, as the loader sees it. All but `place` is called with the arbiter's lock held."""

    request: Request
    """Whose it is; woken whenever a load has ended."""
    planner: Planner
    """Says what to load, and is told what became of it."""
    servings: Sequence[Serving | None]
    """Per chunk of the planner's, the stored chunk that serves it."""

    def place(self, load: Load, segments: Sequence[Segment | None]) -> int:
        """Copy a chunk's layers into the cache, None for those that are not needed; returns the bytes copied."""

    def placed(self, load: Load, coded: bool, size: int) -> None:
        """Of a load, which was in the coded form or in the exact one, `size` bytes are in the cache."""

    def changed(self) -> None:
        """Something has become of a load."""


class Kept(NamedTuple):
    """What was read of a chunk, in the coded form."""

    header: ChunkHeader
    segments: dict[int, bytes]
    """By number."""


class Unfinished(Protocol):
    """A chunk of which only parts were read."""

    @property
    def serving(self) -> Serving: ...
    @property
    def kept(self) -> Kept: ...


class Loads:
    """The loads of one restore, as the loader keeps track of them.

    Parameters
    ----------
    restore : Restoring
        Whose they are.

    Attributes
    ----------
    headers : Headers
        Of the chunks that it loads in pieces.
    kept : dict or None
        By number, what was read of chunks that were read in part, if somebody will want the rest.
    in_flight : int
        Loads that workers are at.
    crash : BaseException or None
        What a worker met with that no store may raise.
    """

    def __init__(self, restore: Restoring, keeps: bool = False) -> None:
        self.restore = restore
        self.headers: Headers = {}
        self.kept: dict[int, Kept] | None = {} if keeps else None
        self.in_flight = 0
        self.crash: BaseException | None = None

    def raise_crash(self) -> None:
        """Raise what a worker met with. Called with the lock held."""
        if self.crash is not None:
            raise self.crash

    def crashed(self, crash: BaseException) -> None:
        """A worker met with this. Called with the lock held."""
        self.crash = crash
        self.restore.request.woken.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait until no load is in flight any more, at most this long: one may hang in a tier that does not answer.

        Called with the lock held.
        """
        self.restore.request.woken.wait_for(lambda: not self.in_flight, timeout_s)


class Loader:
    """Loads what the open restores ask for, from every tier at once, several chunks at a time.

    A tier has as many workers as it reads chunks in parallel, however many restores there are; the arbiter says whose
    turn it is. A worker whose load was given up may hang for ever, so another takes its place until it is back; once as
    many again hang, nothing more is loaded from that tier. Workers live only while a restore is open.

    A load is read in slices, straight into the staging buffer that it is placed from. Between two slices it is given up
    if compute has claimed its chunk. Only what was verified is placed.

    Parameters
    ----------
    arbiter : Arbiter
        Orders the restores; its lock guards everything here.
    tiers : sequence of Store
        One per tier of the restores.
    coders : Coders
        What chunks of this model look like, and how the thread that read one decodes it.
    unwindowed : sequence of int
        The layers that every load needs; the others only where a sliding window can see the chunk.
    groups : sequence of range
        The layers of each group of a layered finish.
    staging : StagingPool
        Buffers as long as the longest chunk.
    decoder : DeviceDecoder or None
        Decodes instead where the caches are. A load ends when it is decoded there, too.
    """

    def __init__(
        self,
        arbiter: Arbiter,
        tiers: Sequence[Store],
        coders: Coders,
        unwindowed: Sequence[int],
        groups: Sequence[range],
        staging: StagingPool,
        decoder: DeviceDecoder | None = None,
    ) -> None:
        self._arbiter = arbiter
        self._lock = arbiter.lock
        self._tiers = tiers
        self._coders = coders
        self._unwindowed = tuple(unwindowed)
        self._groups = groups
        self._staging = staging
        self._decoder = decoder
        self._open: dict[str, Loads] = {}
        self._free = [threading.Condition(self._lock) for _ in tiers]
        """Where the idle workers of each tier wait."""
        self._workers = [0] * len(tiers)
        self._in_flight: list[dict[Load, float]] = [{} for _ in tiers]
        """Loads of each tier, and since when they are known to be cancelled; infinity for never."""

    # The following are called with the lock held.

    def open(self, loads: Loads) -> None:
        """Begin to load for a restore."""
        self._open[loads.restore.request.id] = loads
        self.wake()

    def close(self, loads: Loads) -> None:
        """Load nothing more for a restore, and give up what is in flight."""
        if self._open.pop(loads.restore.request.id, None) is not None:
            loads.restore.planner.cancel_loads()
            self.wake()

    def wake(self) -> None:
        """Something has happened to a restore: there may be something to load."""
        for tier, free in enumerate(self._free):
            if not self._open:
                free.notify_all()
                continue
            if self._stuck(tier) >= 2 * self._tiers[tier].parallel_reads:
                self._give_up(tier, "late")  # each one that is stuck holds a buffer
                continue
            while self._workers[tier] < self._places(tier) and self._hire(tier):
                pass
            free.notify()

    def _hire(self, tier: int) -> bool:
        """Start a worker. If the system has no thread to spare, those at work will do; without any, nothing loads."""
        name = f"cakekv-load-{self._tiers[tier].name}"
        self._workers[tier] += 1  # whatever else `start` raises, the thread has begun
        try:
            threading.Thread(target=self._work, args=(tier,), name=name, daemon=True).start()
            return True
        except RuntimeError as error:
            self._workers[tier] -= 1
            if self._workers[tier] <= self._stuck(tier):
                self._give_up(tier, f"store failed: no thread can be started to read it ({error})")
            return False

    def _give_up(self, tier: int, reason: str) -> None:
        """Have every chunk that this tier should deliver be computed, or delivered by another one."""
        for loads in self._open.values():
            now, planner = monotonic(), loads.restore.planner
            while (load := planner.next_load(tier, now)) is not None:
                planner.failed(load, reason, 0, now)
            loads.restore.request.woken.notify_all()

    def check_late(self, now: float) -> None:
        """Let every open restore give up what it has waited for long enough: others may wait for those workers."""
        waited_for = [load for in_flight in self._in_flight for load in in_flight if not load.late]
        for loads in self._open.values():
            loads.restore.planner.check_late(now)
        for load in waited_for:
            if load.late:
                tier, waited_s = self._tiers[load.tier].name, round(now - load.began, 3)
                emit(_LOG, logging.WARNING, "deadline_missed", tier=tier, operation="load", waited_s=waited_s)
        self.wake()

    def is_loading(self, tier: int) -> bool:
        """Whether anything is being loaded from a tier."""
        return bool(self._in_flight[tier])

    def hangs(self, tier: int) -> bool:
        """Whether as many workers as the tier has places are stuck in loads that nobody waits for any more."""
        return self._stuck(tier) >= self._tiers[tier].parallel_reads

    def _stuck(self, tier: int) -> int:
        now, stuck, in_flight = monotonic(), 0, self._in_flight[tier]
        for load, cancelled in in_flight.items():
            if load.cancelled and cancelled == math.inf:
                in_flight[load] = now
            stuck += load.late or now - cancelled > _STUCK_S
        return stuck

    def _places(self, tier: int) -> int:
        reads = self._tiers[tier].parallel_reads
        return reads + min(self._stuck(tier), reads)

    def _next(self, tier: int) -> tuple[Loads, Load] | None:
        while self._open and self._workers[tier] <= self._places(tier):
            now = monotonic()
            for request in self._arbiter.load_order(tier, now):
                loads = self._open.get(request.id)
                if loads is None or loads.crash is not None:
                    continue
                try:
                    load = loads.restore.planner.next_load(tier, now)
                except BaseException as crash:
                    loads.crashed(crash)
                    continue
                if load is not None:
                    loads.in_flight += 1
                    self._in_flight[tier][load] = math.inf
                    self._free[tier].notify()  # there may be more to load
                    return loads, load
            self._free[tier].wait()
        return None

    # The following are called without it.

    def _work(self, tier: int) -> None:
        try:
            while True:
                with self._lock:
                    job = self._next(tier)
                    if job is None:
                        self._workers[tier] -= 1
                        return
                self._serve(*job)
                del job
        except BaseException as crash:
            with self._lock:
                self._workers[tier] -= 1
                for loads in self._open.values():
                    loads.crashed(crash)

    def _serve(self, loads: Loads, load: Load) -> None:
        try:
            crash = None
            self._perform(loads, load)
        except BaseException as error:
            crash = error
        with self._lock:
            del self._in_flight[load.tier][load]
            loads.in_flight -= 1
            if crash is not None:
                loads.crashed(crash)
            loads.restore.request.woken.notify_all()
            self.wake()

    def _perform(self, loads: Loads, load: Load) -> None:
        restore, planner = loads.restore, loads.restore.planner
        serving = restore.servings[load.chunk]
        assert serving is not None, "only what is stored is loaded"
        with ExitStack() as buffers:
            progress = Progress()
            try:
                segments = self._read(
                    loads, load, serving, lambda: buffers.enter_context(self._staging.buffer()), progress
                )
            except Abandoned:
                with self._lock:
                    planner.abandoned(load, progress.bytes, monotonic())
                    restore.changed()
                return
            except (CorruptChunk, MissingChunk, StoreError, MemoryError) as error:
                self._log_failure(load, serving.key, error)
                with self._lock:
                    silent = isinstance(error, NoAnswer)
                    planner.failed(load, failure_reason(error), progress.bytes, monotonic(), silent)
                    restore.changed()
                return
            with self._lock:
                load.size = progress.bytes  # in another form it is another size than was expected
                wanted = planner.arrived(load, monotonic())
            if not wanted:
                return
            size = restore.place(load, segments)
            with self._lock:
                planner.placed(load, monotonic())
                restore.placed(load, progress.coded, size)
                restore.changed()

    def _log_failure(self, load: Load, key: ChunkKey, error: Exception) -> None:
        tier = self._tiers[load.tier].name
        if isinstance(error, CorruptChunk):
            fault, detail = error.fault.name.lower(), error.detail
            emit(_LOG, logging.WARNING, "chunk_corrupt", tier=tier, chunk=key.short, fault=fault, detail=detail)
        else:  # one by one these may be many; `restore_finished` counts them
            emit(_LOG, logging.DEBUG, "load_failed", tier=tier, chunk=key.short, reason=str(error))

    def _read(
        self, loads: Loads, load: Load, serving: Serving, room: Callable[[], memoryview], progress: Progress
    ) -> list[Segment | None]:
        """Read, verify and decode what the load needs, in buffers from `room`; layers it does not need are None."""
        buffer, coder, position = room(), self._coders.of(serving.tokens), serving.position
        wanted = Wanted(serving.key, position, self._layers(load), load.parts, is_piece=load.group is not None)
        header = read_chunk(self._tiers[load.tier], coder, wanted, buffer, load, progress, loads.headers)
        if loads.kept is not None:
            self._keep(loads.kept, load, coder, header, wanted, buffer)
        return self._decoded(coder, header, wanted, buffer, load, room)

    def _decoded(
        self,
        coder: ChunkCoder,
        header: ChunkHeader,
        wanted: Wanted,
        buffer: memoryview,
        load: Cancellable,
        room: Callable[[], memoryview],
    ) -> list[Segment | None]:
        decoded: list[Segment | None] = [None] * coder.layers
        for layer, segment in decoded_layers(coder, header, wanted, buffer, load, room, self._decoder):
            decoded[layer] = segment
        return decoded

    def _keep(
        self,
        kept: dict[int, Kept],
        load: Load,
        coder: ChunkCoder,
        header: ChunkHeader,
        wanted: Wanted,
        buffer: memoryview,
    ) -> None:
        """Copy what was read of a chunk, if that is only a part of it."""
        kept.pop(load.chunk, None)
        if header.shape.form is Form.CODED and load.parts is not None:
            views = segments(header.shape, buffer)
            indices = coder.segments_of(header.shape, wanted.layers, wanted.parts)
            kept[load.chunk] = Kept(header, {index: bytes(views[index]) for index in indices})

    def read_rest(
        self, tier: int, rest: Unfinished, load: Cancellable, progress: Progress, buffers: ExitStack
    ) -> list[Segment | None]:
        """Read what was left of a chunk, verify and decode all of it; layers that it was not read for are None.

        Raises
        ------
        CorruptChunk, MissingChunk, StoreError
            As for `read_chunk`.
        Abandoned
            The load was cancelled.
        """
        header, read = rest.kept
        serving, coder = rest.serving, self._coders.of(rest.serving.tokens)
        wanted = Wanted(serving.key, serving.position, sorted({index % coder.layers for index in read}))
        buffer = buffers.enter_context(self._staging.buffer())
        with self._tiers[tier].open(serving.key) as reader:
            left = [index for index in coder.segments_of(header.shape, wanted.layers) if index not in read]
            for start, end in byte_ranges(header.shape, left, with_header=False):
                fill(reader, buffer, start, end, load, progress)
        views = segments(header.shape, buffer)
        for index, code in read.items():
            views[index][:] = code
        return self._decoded(coder, header, wanted, buffer, load, lambda: buffers.enter_context(self._staging.buffer()))

    def _layers(self, load: Load) -> list[int]:
        wanted = range(self._coders.usual.layers) if load.windowed else self._unwindowed
        return [layer for layer in wanted if load.group is None or layer in self._groups[load.group]]

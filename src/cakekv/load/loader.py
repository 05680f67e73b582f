"""The I/O arm: worker threads that read chunks, check them and place them into the cache, as the planner asks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import monotonic
from types import TracebackType
from typing import Protocol, Self

from cakekv.chunk import ChunkHeader, ChunkShape, read_header, segments
from cakekv.errors import CorruptChunk, MissingChunk, StoreError
from cakekv.keys import ChunkKey
from cakekv.load.staging import StagingPool
from cakekv.restore.flights import Load
from cakekv.restore.planner import Restore
from cakekv.store.base import ChunkReader, Store

Place = Callable[[int, int, list[memoryview | None]], int]
"""(first position, tokens, segment per layer or None) to bytes copied."""


class Abandoned(Exception):
    """The load was cancelled in mid-read."""


class Cancellable(Protocol):
    """Something that a reader may be told to give up."""

    @property
    def cancelled(self) -> bool: ...


class Loader:
    """Loads what a `Restore` asks for, from every tier at once, several chunks at a time.

    A load is read in slices straight into the staging buffer that it is placed from, and given up between two slices
    once compute has claimed its chunk. Nothing is placed that was not verified.

    Parameters
    ----------
    restore : Restore
        The planner; guarded by `changed`.
    changed : threading.Condition
        Held for every call of the planner; notified after each.
    tiers : sequence of Store
        One per source of the restore.
    keys : sequence of ChunkKey
        Keys of the prompt's chunks.
    shape : ChunkShape
        What a chunk of this model looks like.
    unwindowed : sequence of int
        The layers that every load needs; the others only where a sliding window can see the chunk.
    groups : sequence of range
        The layers of each group of a layered finish.
    place : callable
        Copies segments into the cache.
    staging : StagingPool
        Buffers of at least `shape.total_bytes`.
    """

    def __init__(
        self,
        restore: Restore,
        changed: threading.Condition,
        tiers: Sequence[Store],
        keys: Sequence[ChunkKey],
        shape: ChunkShape,
        unwindowed: Sequence[int],
        groups: Sequence[range],
        place: Place,
        staging: StagingPool,
        on_event: Callable[[], None] = lambda: None,
    ) -> None:
        self._restore = restore
        self._changed = changed
        self._tiers = tiers
        self._keys = keys
        self._shape = shape
        self._unwindowed = tuple(unwindowed)
        self._groups = groups
        self._headers: dict[tuple[int, int], ChunkHeader] = {}
        """By chunk and source: pieces after the first do not read the header again."""
        self._place = place
        self._staging = staging
        self._on_event = on_event
        self._closed = False
        self._crash: BaseException | None = None
        self.placed_bytes = 0
        self._threads = [
            threading.Thread(target=self._work, args=(source,), name=f"cakekv-load-{tier.name}-{number}", daemon=True)
            for source, tier in enumerate(tiers)
            for number in range(tier.parallel_reads)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._restore.cancel_loads()
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait for the workers to stop, at most this long in all: one may hang in a tier that does not answer."""
        deadline = monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - monotonic()))

    def release(self) -> None:
        """Let go of the cache. Workers that still hang in a tier will find their loads cancelled."""
        self._place = _nowhere

    def raise_crash(self) -> None:
        """Raise what a worker died of, if one did. Called with `changed` held."""
        if self._crash is not None:
            raise self._crash

    def _work(self, source: int) -> None:
        try:
            while (load := self._next(source)) is not None:
                self._perform(load)
        except BaseException as crash:
            with self._changed:
                self._crash = crash
                self._changed.notify_all()

    def _next(self, source: int) -> Load | None:
        with self._changed:
            while not self._closed:
                load = self._restore.next_load(source, monotonic())
                if load is not None:
                    return load
                self._changed.wait()
        return None

    def _perform(self, load: Load) -> None:
        with self._staging.buffer() as buffer:
            progress = Progress()
            try:
                parts = self._read(load, buffer, progress)
            except Abandoned:
                self._report(lambda now: self._restore.abandoned(load, progress.bytes, now))
                return
            except (CorruptChunk, MissingChunk, StoreError) as error:
                reason = failure_reason(error)
                self._report(lambda now: self._restore.failed(load, reason, progress.bytes, now))
                return
            with self._changed:
                wanted = self._restore.arrived(load, monotonic())
            if not wanted:
                return
            copied = self._place(load.start, load.tokens, parts)

            def placed(now: float) -> None:
                self._restore.placed(load, now)
                self.placed_bytes += copied

            self._report(placed)

    def _report(self, event: Callable[[float], None]) -> None:
        with self._changed:
            event(monotonic())
            self._on_event()
            self._changed.notify_all()

    def _read(self, load: Load, buffer: memoryview, progress: Progress) -> list[memoryview | None]:
        """Read and verify what the load needs; the layers it does not need are None."""
        shape, key = self._shape, self._keys[load.chunk]
        layers = self._layers(load)
        header = self._headers.get((load.chunk, load.source)) if load.group is not None else None
        with self._tiers[load.source].open(key) as reader:
            for start, end in _ranges(shape, layers, with_header=header is None):
                fill(reader, buffer, start, end, load, progress)
                if header is None:
                    header = read_header(buffer[: min(shape.header_bytes, reader.size)], reader.size)
                    header.expect(shape, key, load.start)
                    self._headers[load.chunk, load.source] = header
        assert header is not None
        views = segments(shape, buffer)
        parts: list[memoryview | None] = [None] * len(views)
        for layer in layers:
            header.verify(layer, views[layer])
            parts[layer] = views[layer]
        return parts

    def _layers(self, load: Load) -> list[int]:
        wanted = range(len(self._shape.segment_bytes)) if load.windowed else self._unwindowed
        return [layer for layer in wanted if load.group is None or layer in self._groups[load.group]]


def _nowhere(start: int, tokens: int, parts: list[memoryview | None]) -> int:
    raise AssertionError("a load was placed after the end of its restore")


class Progress:
    """Bytes read so far by one load."""

    bytes = 0


def load_bytes(shape: ChunkShape, layers: Sequence[int], with_header: bool = True) -> int:
    """Bytes read for a chunk of which only `layers` are needed."""
    return sum(end - start for start, end in _ranges(shape, layers, with_header))


def _ranges(shape: ChunkShape, layers: Sequence[int], with_header: bool) -> list[tuple[int, int]]:
    """Byte ranges to read, adjacent ones joined; the first begins with the header, if that is wanted."""
    ranges = [(0, shape.header_bytes)] if with_header else []
    for layer in layers:
        start = shape.offsets[layer]
        end = shape.offsets[layer + 1] if layer + 1 < len(shape.offsets) else shape.total_bytes
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((start, end))
    return ranges


def fill(reader: ChunkReader, buffer: memoryview, start: int, end: int, load: Cancellable, progress: Progress) -> None:
    """Read a range of a chunk in slices; `Abandoned` is raised between two of them once `load` is cancelled."""
    offset, end = start, min(end, reader.size)
    while offset < end:
        if load.cancelled:
            raise Abandoned
        count = reader.read_into(buffer[offset : min(offset + reader.slice_bytes, end)], offset)
        if count == 0:
            break
        progress.bytes += count
        offset += count


def failure_reason(error: Exception) -> str:
    """Why a load failed, as reports say it."""
    if isinstance(error, CorruptChunk):
        return f"corrupt: {error.fault.name.lower().replace('_', ' ')}"
    if isinstance(error, MissingChunk):
        return "vanished from the store"
    return f"store failed: {error}"

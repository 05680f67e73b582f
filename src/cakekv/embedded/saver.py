"""Write-behind: computed chunks go to the store while prefill and decoding go on."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import NamedTuple

from cakekv.chunk import seal, segments
from cakekv.codec.coder import ChunkCoder
from cakekv.embedded.coders import Coders
from cakekv.embedded.executor import IDLE_S, LOOK_S, check
from cakekv.embedded.stored import Found
from cakekv.errors import CacheRewritten, CannotEncode, StoreError, StoreFull
from cakekv.keys import ChunkKey, Identity
from cakekv.load.staging import StagingPool
from cakekv.logs import emit
from cakekv.options import CakeOptions
from cakekv.reuse.truncated import Chain
from cakekv.store.base import Store

Gather = Callable[[list[memoryview]], None]
"""Copies a chunk out of a cache into its per-layer segments."""

_LOG = logging.getLogger(__name__)


@dataclass
class SaveReport:
    """What became of the chunks handed to a `Saver` so far.

    Attributes
    ----------
    saved_chunks, saved_bytes : int
        Written; the bytes are those before a store packs them.
    declined_chunks : int
        The tier chose not to keep them.
    failed_chunks : int
        Lost to an error of the tier or of the system, not to be encoded, or overwritten in their cache before they were
        saved.
    error : str or None
        The first such error.
    waiting_copies : int
        Of what was saved to a tiered store: copies to tiers that are written back which are still to be made.
    uncopied_chunks : int
        Such copies that could not be made.
    """

    saved_chunks: int = 0
    saved_bytes: int = 0
    declined_chunks: int = 0
    failed_chunks: int = 0
    error: str | None = None
    waiting_copies: int = 0
    uncopied_chunks: int = 0


class Source(NamedTuple):
    """The cache that a chunk is in."""

    cache: object
    held_bytes: int | None
    """Memory that it takes; None if that cannot be told."""
    wanted_chunks: int
    """About how many of its chunks are to be saved."""


UNKNOWN = Source(None, None, 1)
"""A cache of which nothing is known: the chunk is copied out of it at once."""


class _Job(NamedTuple):
    """A chunk that waits."""

    key: ChunkKey
    position: int
    coder: ChunkCoder
    exact: bool
    gather: Gather
    keeps: object
    """The cache that it is in, or the copy of it."""
    size: int
    """Bytes of that."""
    copy: memoryview | None
    replaces: ChunkKey | None
    may_be_stored: bool


class _Beside(NamedTuple):
    """What waits to be stored beside chunks."""

    key: ChunkKey
    make: Callable[[], memoryview]


class _Note(NamedTuple):
    """An identity that waits to be left in the store."""

    root: str
    fields: Mapping[str, str]


class Saver:
    """Writes chunks in the background, in the order they come.

    What waits is bounded by the memory that it keeps: a chunk keeps its whole cache, in which it stays until its turn
    comes, or a copy of its own if less than half of the cache is to be saved. Where there is no room, `save` waits, so
    a slow tier holds the producer back instead of filling the memory. One that hangs does not: nobody waits for it any
    more, and what finds no room is given up.

    Parameters
    ----------
    store : Store
        Where to.
    coders : Coders
        What chunks look like, and how they are encoded.
    staging : StagingPool
        Buffers as long as the longest chunk.
    options : CakeOptions
        Of the `Cake`. Its `save_queue` bounds what waits, but one chunk always may; a store that has not taken a chunk
        for `deadline_s` is taken to hang; its `metrics` are told what became of every chunk.
    """

    def __init__(self, store: Store, coders: Coders, staging: StagingPool, options: CakeOptions) -> None:
        self.store = store
        self._coders = coders
        self._staging = staging
        self._options = options
        self._introduced: set[bytes] = set()
        self._queue: queue.SimpleQueue[_Job | _Beside | _Note | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        """Guards the following, and the report."""
        self._kept: Counter[int] = Counter()
        """By `id`, the caches and copies that are kept, and how many jobs keep them."""
        self._kept_bytes = 0
        self._pending = 0
        """Jobs, of which there is one for every chunk that `_kept` counts, and the notes."""
        self._waiting = 0
        self._busy_since: float | None = None
        self._closed = False
        self._abandoned = False
        self.report = SaveReport()

    @property
    def chunk_tokens(self) -> int:
        """Tokens per chunk."""
        return self._coders.usual.exact.tokens

    @property
    def full(self) -> bool:
        """Whether somebody waits for room."""
        return self._waiting > 0

    @property
    def kept_bytes(self) -> int:
        """Memory that is kept by what waits or is being written."""
        return self._kept_bytes

    @property
    def hangs(self) -> bool:
        """Whether the store does not answer."""
        return self._left_s() <= 0

    def knows(self, identity: Identity) -> bool:
        """Whether chunks of this identity were saved."""
        return identity.root in self._introduced

    def introduce(self, identity: Identity) -> None:
        """Leave an identity in the store once, to explain misses later; see `Store.remember_identity`."""
        if self._closed or self.knows(identity):
            return
        self._introduced.add(identity.root)
        self._put(_Note(identity.root.hex(), identity.fields()))

    def save_beside(self, key: ChunkKey, make: Callable[[], memoryview]) -> None:
        """Have something be made and stored beside chunks; it is not missed where that fails."""
        if not self._closed and not self.hangs:
            self._put(_Beside(key, make))

    def _put(self, job: _Beside | _Note) -> None:
        with self._changed:
            self._pending += 1
        self._queue.put(job)
        self._begin()

    def save(
        self,
        key: ChunkKey,
        position: int,
        gather: Gather,
        exact: bool = False,
        source: Source = UNKNOWN,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
        tokens: int | None = None,
        replaces: ChunkKey | None = None,
        may_be_stored: bool = False,
    ) -> None:
        """Hand over a chunk whose region of the cache is covered; from any thread.

        Parameters
        ----------
        key, position
            The chunk's.
        gather : callable
            Copies it out of its cache; raises `CacheRewritten` if the region has changed since, and it is not saved.
        exact : bool
            Whether it is stored as it is, whatever the codec.
        source : Source
            That cache.
        waiting : callable
            Gives a context that is entered while there is no room.
        tokens : int or None
            Its length, if that is not the usual one.
        replaces : ChunkKey or None
            A chunk that is not needed any more once this one is stored, and is deleted then, if the store can do it.
        may_be_stored : bool
            Whether it may be stored already, which was not asked; it is not written again, then.
        """
        coder = self._coders.of(tokens or self.chunk_tokens)
        size, held = coder.exact.total_bytes, source.held_bytes
        if held is None or held > self._options.save_queue or 2 * source.wanted_chunks * size < held:
            job = _Job(key, position, coder, exact, gather, object(), size, None, replaces, may_be_stored)
        else:
            job = _Job(key, position, coder, exact, gather, source.cache, held, None, replaces, may_be_stored)
        if not self._take_room(job, waiting):
            return
        if job.keeps is not source.cache:
            try:
                copy = self._staging.new()
                gather(segments(coder.exact, copy))
                job = job._replace(gather=_nothing, copy=copy)
            except BaseException as error:
                self._failed(error)
                self._done(job)
                if isinstance(error, Exception):
                    return
                raise
        self._queue.put(job)
        self._begin()

    def wait(self) -> SaveReport:
        """Block until everything handed over is stored or has failed; returns the totals since the saver began.

        What waits for a store that hangs counts as failed, though it may be stored yet.
        """
        self._join()
        with self._changed:
            report, unfinished = replace(self.report), self._kept.total()
        report.waiting_copies, report.uncopied_chunks = self.store.waiting, self.store.uncopied
        if unfinished:
            report.failed_chunks += unfinished
            report.error = report.error or self._silence()
        return report

    def close(self) -> None:
        """Finish what is queued and stop. A store that hangs is left alone. May be called again."""
        self._closed = True
        if self._abandoned:
            return
        if not self._join():
            self._abandoned = True
            emit(_LOG, logging.WARNING, "deadline_missed", tier=self.store.name, operation="write")
            self._drop_all("late", self._silence())
        self._queue.put(None)
        while (thread := self._thread) is not None and thread.is_alive() and not self._abandoned:
            thread.join(LOOK_S)
            check()

    def _begin(self) -> None:
        """See to it that somebody works; if the system has no thread to spare, nothing of what waits is saved."""
        with self._changed:
            if self._thread is not None and self._thread.is_alive():
                return
            self._thread = threading.Thread(target=self._work, name="cakekv-save", daemon=True)
            try:
                self._thread.start()
                return
            except RuntimeError as error:
                self._thread = None
                reason = f"no thread can be started to save chunks: {error}"
        self._drop_all("no thread", reason)

    def _take_room(self, job: _Job, waiting: Callable[[], AbstractContextManager[None]]) -> bool:
        """Wait until the queue may keep what the job keeps. False if that is not to be."""
        took = self._took_room(job)
        if not took and not self._closed and not self.hangs:
            try:
                with waiting():
                    took = self._await_room(job)
            except BaseException:
                if took:
                    self._done(job)
                raise
        if not took:
            reason = "the Cake was closed before the chunk was saved" if self._closed else self._silence()
            self._lost("late", reason)
        return took

    def _await_room(self, job: _Job) -> bool:
        with self._changed:
            self._waiting += 1
            try:
                while not self._closed and not self.hangs:
                    if self._took_room(job):
                        return True
                    self._changed.wait(LOOK_S)
                    check()
            finally:
                self._waiting -= 1
        return False

    def _took_room(self, job: _Job) -> bool:
        """Take the room for a job, if there is enough."""
        with self._changed:
            more = 0 if id(job.keeps) in self._kept else job.size
            if self._closed or (self._kept and self._kept_bytes + more > self._options.save_queue):
                return False
            self._kept[id(job.keeps)] += 1
            self._kept_bytes += more
            self._pending += 1
            return True

    def _done(self, job: _Job | _Beside | _Note) -> None:
        """The job is over, one way or the other."""
        with self._changed:
            self._pending -= 1
            if isinstance(job, _Job):
                self._kept[id(job.keeps)] -= 1
                if not self._kept[id(job.keeps)]:
                    del self._kept[id(job.keeps)]
                    self._kept_bytes -= job.size
            self._changed.notify_all()

    def _join(self) -> bool:
        """Wait until all jobs are done. False if the store hangs."""
        while self._pending:
            if self.hangs:
                return False
            self._begin()
            with self._changed:
                if self._pending:
                    self._changed.wait(LOOK_S)
            check()
        return True

    def _drop_all(self, kind: str, reason: str) -> None:
        """Give up what waits."""
        with suppress(queue.Empty):
            while True:
                job = self._queue.get_nowait()
                if job is not None:
                    self._drop(job, kind, reason)

    def _drop(self, job: _Job | _Beside | _Note, kind: str, reason: str) -> None:
        if isinstance(job, _Job):
            self._lost(kind, reason)
        self._done(job)

    def _left_s(self) -> float:
        """Seconds until the store is taken to hang, unless it finishes what it is at."""
        since = self._busy_since
        return self._options.deadline_s - (0.0 if since is None else monotonic() - since)

    def _silence(self) -> str:
        return f"the {self.store.name} store has not taken a chunk for more than {self._options.deadline_s:g} s"

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if self._abandoned:
                self._drop(job, "late", self._silence())
                del job
                continue
            self._busy_since = monotonic()
            try:
                if isinstance(job, _Job):
                    self._write(job)
                elif isinstance(job, _Beside):
                    self.store.write(job.key, job.make())
                else:
                    self.store.remember_identity(job.root, job.fields)
            except BaseException as error:  # also what no store should raise, and a lack of memory: the next may do
                if isinstance(job, _Job):  # else the chunk that is saved next fails the same way, and is counted
                    self._failed(error)
            finally:
                self._busy_since = None
                self._done(job)
                del job  # what it keeps may be large, and the next one may take its time

    def _next(self) -> _Job | _Beside | _Note | None:
        """What comes next; None when the thread has to end, also because nothing has come for a while."""
        with suppress(queue.Empty):
            return self._queue.get(timeout=IDLE_S)
        with self._changed:  # whoever hands over a job looks for the thread behind it
            if self._queue.empty():
                self._thread = None
                return None
        return self._queue.get()

    def _write(self, job: _Job) -> None:
        if (self._is_stored(job) or self._stored(job)) and job.replaces is not None:
            with suppress(StoreError):  # what is left goes when the store needs the room
                self.store.delete([job.replaces])

    def _is_stored(self, job: _Job) -> bool:
        """Whether the store is known to have a chunk already."""
        with suppress(StoreError):
            return job.may_be_stored and self.store.probe([job.key]) == [True]
        return False

    def _stored(self, job: _Job) -> bool:
        """Store a chunk; whether the store keeps it."""
        coder, began = job.coder, monotonic()
        encodes = coder.encodes and not job.exact
        with ExitStack() as buffers:
            buffer = job.copy
            if buffer is None:
                buffer = buffers.enter_context(self._staging.buffer())
                job.gather(segments(coder.exact, buffer))
            chunk = None
            if encodes:
                chunk = coder.encode(buffer, buffers.enter_context(self._staging.buffer()), job.key, job.position)
            if chunk is None:
                seal(coder.exact, buffer, job.key, job.position)
                chunk = buffer[: coder.exact.total_bytes]
            kept, size = self.store.write(job.key, chunk), len(chunk)
        with self._changed:
            self.report.saved_chunks += kept
            self.report.saved_bytes += size if kept else 0
            self.report.declined_chunks += not kept
        self._tell("saved" if kept else "declined", size, monotonic() - began)
        return kept

    def _failed(self, error: BaseException) -> None:
        """A chunk was not saved because of this."""
        for kinds, kind in _KINDS.items():
            if isinstance(error, kinds):
                self._lost(kind, str(error) or type(error).__name__)
                return
        _LOG.error("a chunk could not be saved, for a reason that no store should give", exc_info=error)
        self._lost("crashed", f"{type(error).__name__}: {error}")

    def _lost(self, kind: str, reason: str) -> None:
        with self._changed:
            self.report.failed_chunks += 1
            first, self.report.error = self.report.error is None, self.report.error or reason
        if first:
            emit(_LOG, logging.WARNING, "save_failed", tier=self.store.name, reason=reason)
        self._tell(kind, 0, 0.0)

    def _tell(self, outcome: str, size: int, seconds: float) -> None:
        """Count what became of a chunk: it was "saved", "declined", or why it failed."""
        metrics = self._options.metrics
        if metrics is None:
            return
        try:
            metrics.add_save(outcome, size, seconds)
        except Exception:
            _LOG.exception("what became of a chunk could not be counted")


class PromptSaver:
    """Saves what is computed of one prompt.

    Parameters
    ----------
    saver : Saver
        Takes the chunks.
    found : Found
        The prompt's keys, and what computes it.
    cache : Cache
        The engine's, in which they are.
    waiting : callable
        As in `Saver.save`.
    copies : bool
        Whether chunks are copied out of the cache at once, because it is written to once the prompt is complete.
    """

    def __init__(
        self,
        saver: Saver,
        found: Found,
        cache: object,
        waiting: Callable[[], AbstractContextManager[None]],
        copies: bool = False,
    ) -> None:
        self._saver = saver
        self._cache = cache
        self._found = found
        self._waiting = waiting
        self._copies = copies

    def save(self, chunks: Sequence[int], wanted_chunks: int, chain: Chain | None) -> None:
        """Save chunks that a span has completed, unless what computes is not any more what the keys name.

        Parameters
        ----------
        chunks : sequence of int
            Those that no tier has.
        wanted_chunks : int
            About how many chunks of the prompt are to be saved, these among them.
        chain : Chain or None
            Under whose keys, given what the span attended to. None: nothing is saved.
        """
        found, engine, tokens = self._found, self._found.engine, self._saver.chunk_tokens
        if not found.still() or chain is None:
            return
        self._saver.introduce(found.named.identity)
        held = Source(self._cache, engine.held_bytes(self._cache), wanted_chunks)
        source = UNKNOWN if self._copies else held
        for chunk in chunks:
            start, length = chunk * tokens, min(tokens, found.prompt_tokens - chunk * tokens)
            gather = engine.gatherer(self._cache, start, length)
            is_exact = chunk >= found.exact_from
            tail = chain.tail.key if chain.tail is not None and chain.tail.position == start else None
            self._saver.save(chain.keys[chunk], start, gather, is_exact, source, self._waiting, length, tail)


_KINDS: dict[type[BaseException], str] = {
    StoreFull: "store full",
    StoreError: "store failed",
    CannotEncode: "not encodable",
    CacheRewritten: "rewritten",
    MemoryError: "no memory",
}
"""As labels of a metric."""


def _nothing(segments: list[memoryview]) -> None:
    """It was copied already."""

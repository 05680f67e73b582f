"""Several tiers as one store: fast ones in front, large ones behind, all loaded from at once."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from typing import NamedTuple, TypeVar

from cakekv.chunk import MAGIC, MAX_CHUNK_BYTES, verify_chunk
from cakekv.errors import BadInput, CorruptChunk, MissingChunk, NotDeleted, StoreError, StoreFull, TierDown
from cakekv.keys import ChunkKey
from cakekv.logs import emit
from cakekv.store.base import ChunkReader, Expected, Prefetch, Store, StoredChunk, StoreStats, count
from cakekv.store.lookahead import LookAhead
from cakekv.store.member import FAILURES, Member
from cakekv.store.sizes import Sizes, doubt_of
from cakekv.store.waiting_copies import WaitingCopies
from cakekv.store.wrapper import WrappedReader, WrappedStore

Answer = TypeVar("Answer")

QUEUE_CHUNKS = 1 << 16
"""Chunks that may wait to be copied to a tier. More than that are not copied, and counted."""
PROMOTIONS = 64
"""Chunks that may wait in memory to be copied to a faster tier. More than that are not."""
HANG_S = 30.0
"""Seconds after which a copy that does not end is not waited for when the store is closed."""
_LOOK_S = 0.02

_LOG = logging.getLogger(__name__)


class Writing(Enum):
    """How new chunks get into a tier."""

    THROUGH = "through"
    """Before `write` returns."""
    BACK = "back"
    """Later, out of a tier in front of it."""
    NEVER = "never"


class TierPlan(NamedTuple):
    """One tier of a tiered store."""

    member: Member
    write: Writing = Writing.THROUGH
    promote: bool = True
    """Whether chunks that were found behind this tier are copied into it when they are used."""


class TieredStore(Store):
    """Several tiers, the fastest first.

    Nothing that goes wrong in one tier is a matter for the others. Copies, back to slower tiers and up to faster ones,
    are made behind the scenes, one thread per tier; what cannot be copied is counted in `uncopied`, and logged. Chunks
    that wait to be copied back are noted in the first tier that is written through and can (disks, Redis); if this
    process dies, the next one that uses the store goes on.

    Parameters
    ----------
    plan : sequence of TierPlan
        The tiers. They are closed with this store.

    Raises
    ------
    BadInput
        There are no tiers, or none is written through.
    """

    name = "tiered"

    def __init__(self, plan: Sequence[TierPlan]) -> None:
        if not any(tier.write is Writing.THROUGH for tier in plan):
            raise BadInput("a tiered store needs a tier that is written through, to write to and to copy from")
        self._plan = list(plan)
        self.members = [tier.member for tier in plan]
        self.on_uncopied: Callable[[str, int], None] = lambda tier, chunks: None
        """Told of chunks that could not be copied to a tier."""
        self._copiers = [_Copier(tier.member, self) for tier in plan]
        self._backs = [copier for tier, copier in zip(plan, self._copiers, strict=True) if tier.write is Writing.BACK]
        self._owed: dict[ChunkKey, int] = {}
        """To how many tiers each chunk is still to be copied back."""
        self._given_up: set[ChunkKey] = set()
        """Those of them that could not be copied to all."""
        self._notes: WaitingCopies | None = None
        self._unnoted = False
        self._resumed = not self._backs
        self._lock = threading.Lock()
        self._promoting = [
            [copier for tier, copier in zip(plan[:index], self._copiers, strict=False) if tier.promote]
            for index in range(len(plan))
        ]
        front = next((index for index, tier in enumerate(plan) if tier.promote), len(plan))
        self._ahead = LookAhead(self.members[front : front + 1], self.members[front + 1 :], self.read)
        self.parallel_reads = sum(member.parallel_reads for member in self.members)

    @property
    def parts(self) -> Sequence[Store]:
        return self.members

    @property
    def plan(self) -> Sequence[TierPlan]:
        """The tiers, and what is to happen with each."""
        return self._plan

    @property
    def tiers(self) -> Sequence[Store]:
        self._resume()
        return [_Promoting(*pair) for pair in zip(self.members, self._promoting, strict=True)]

    @property
    def waiting(self) -> int:
        with self._lock:
            return sum(self._owed.values())

    @property
    def uncopied(self) -> int:
        return sum(copier.uncopied for copier in self._copiers)

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        """See `Store`; raises `StoreError` only if no tier can be asked."""
        self._resume()
        sizes: list[int | None] = [None] * len(keys)
        answers = self._each(lambda member: member.lookup(keys))
        for answer in answers:
            sizes = [size if size is not None else other for size, other in zip(sizes, answer, strict=True)]
        doubt = next(filter(None, map(doubt_of, answers)), None)
        return sizes if doubt is None else Sizes(sizes, doubt)

    def probe(self, keys: Sequence[ChunkKey]) -> list[bool] | None:
        """See `Store`; of those tiers that can be asked cheaply."""
        self._resume()
        answers = [answer for answer in self._each(lambda member: member.probe(keys)) if answer is not None]
        return [any(found) for found in zip(*answers, strict=True)] if answers else None

    def open(self, key: ChunkKey) -> ChunkReader:
        self._resume()
        trouble: StoreError | CorruptChunk | None = None
        for tier in self.tiers if self.marks_use else self.members:
            try:
                return tier.open(key)
            except MissingChunk:
                continue
            except (StoreError, CorruptChunk) as error:
                trouble = error
        raise trouble or MissingChunk(f"chunk {key.short}… is in no tier")

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        """See `Store`; True once a tier has it. If none of those that are written through do, the others are asked."""
        self._resume()
        self._owe(key)
        kept, trouble = False, None
        for writing in (Writing.THROUGH, Writing.BACK):
            for tier, copier in zip(self._plan, self._copiers, strict=True):
                if tier.write is not writing:
                    continue
                if kept and writing is Writing.BACK:
                    copier.copy(key)
                    continue
                try:
                    kept |= tier.member.write(key, data)
                except StoreError as error:
                    trouble = error
                if writing is Writing.BACK:
                    self.settle(key)
        if not kept and trouble is not None:
            raise trouble
        return kept

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        """See `Store`; deletes from every tier that can be reached, and raises `StoreError` if not all could."""
        unique = list(dict.fromkeys(keys))
        stored = sum(size is not None for size in self.lookup(unique))
        trouble: StoreError | None = None
        left: dict[ChunkKey, str] = {}
        for member, copier in zip(self.members, self._copiers, strict=True):
            copier.drop(unique)
            self._ahead.drop(unique)
            try:
                member.delete(unique)
            except NotDeleted as error:
                left |= {key: f"in the {member.name} tier: {reason}" for key, reason in error.left.items()}
                trouble = error
            except StoreError as error:
                trouble = StoreError(f"chunks may be left in the {member.name} tier: {error}")
        if trouble is not None:
            raise NotDeleted(str(trouble), max(0, stored - len(left)), left)
        return stored

    def __iter__(self) -> Iterator[StoredChunk]:
        """See `Store`; a chunk that is in several tiers comes once. Tiers that cannot be listed are passed over."""
        seen: set[ChunkKey] = set()
        trouble: list[StoreError] = []
        for member in self.members:
            try:
                for chunk in member:
                    if chunk.key not in seen:
                        seen.add(chunk.key)
                        yield chunk
            except StoreError as error:
                trouble.append(error)
        if len(trouble) == len(self.members):
            raise trouble[-1]

    def stats(self) -> StoreStats:
        """See `Store`; each chunk counts once."""
        return count(self)

    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        for tier in self._plan:
            if tier.write is not Writing.NEVER:
                with suppress(StoreError):  # it only serves to explain misses
                    tier.member.remember_identity(root, fields)

    def identities(self) -> dict[str, dict[str, str]]:
        return {
            root: fields for notes in self._each(lambda member: member.identities()) for root, fields in notes.items()
        }

    def expect(self, queue: Sequence[Expected]) -> None:
        super().expect([*queue, *self._ahead.tell(queue)])

    def prefetch(self, name: ChunkKey, keys: Sequence[ChunkKey]) -> Prefetch:
        coming = self._ahead.announce(Expected(name, keys))
        super().expect(self._ahead.queue)
        return coming

    def flush(self) -> None:
        """Wait until all copies are made, or given up."""
        self._ahead.flush()
        for copier in self._copiers:
            copier.flush()

    def close(self) -> None:
        """Finish copying, and close the tiers."""
        self._ahead.close()
        for copier in self._copiers:
            copier.close()
        if self._notes is not None:
            self._notes.close()
        for member in self.members:
            member.close()

    def _each(self, operation: Callable[[Member], Answer]) -> list[Answer]:
        """The answers of those tiers that give one; raises what the last one said if none does."""
        answers, trouble = [], None
        for member in self.members:
            try:
                answers.append(operation(member))
            except StoreError as error:
                trouble = error
        if not answers and trouble is not None:
            raise trouble
        return answers

    def settle(self, key: ChunkKey, *, copied: bool = True) -> None:
        """A copy back of a chunk needs not be made any more; or it was given up, and is for whoever comes next."""
        with self._lock:
            self._owed[key] = self._owed.get(key, 1) - 1
            if not copied:
                self._given_up.add(key)
            if self._owed[key] > 0:
                return
            del self._owed[key]
            forget = key not in self._given_up
            self._given_up.discard(key)
        if forget and self._notes is not None:
            with suppress(OSError, StoreError):  # it is copied once more, at the worst
                self._notes.remove(key)

    @property
    def notes_copies(self) -> bool:
        """Whether the copies that wait when this process ends are made by another one."""
        return self._notes is not None

    def _owe(self, key: ChunkKey) -> None:
        """A chunk that is about to be written is to be copied back."""
        if not self._backs:
            return
        with self._lock:
            self._owed[key] = self._owed.get(key, 0) + len(self._backs)
        self._note(lambda notes: notes.add([key]))

    def _resume(self) -> None:
        """Go on with what processes that died have not copied; not if a command only looks into the store."""
        if self._resumed or not self.marks_use:
            return
        with self._lock:
            if self._resumed:
                return
            self._resumed = True
        for key in self._note(lambda notes: notes.take_over()) or []:
            with self._lock:
                self._owed[key] = self._owed.get(key, 0) + len(self._backs)
            for copier in self._backs:
                copier.copy(key, if_missing=True)
        if self.waiting:
            emit(_LOG, logging.INFO, "copies_resumed", chunks=self.waiting)
        if self._notes is None and not all(member.is_up for member in self.members):
            self._resumed = False  # the tier with the notes may come up yet

    def _note(self, action: Callable[[WaitingCopies], Answer]) -> Answer | None:
        """Do something with the notes, if there is a place for them."""
        if self._notes is None:
            through = [tier.member for tier in self._plan if tier.write is Writing.THROUGH]
            with self._lock:
                self._notes = self._notes or next(filter(None, (one.waiting_copies() for one in through)), None)
        if self._notes is not None:
            try:
                return action(self._notes)
            except (OSError, StoreError) as error:
                if not self._unnoted:
                    self._unnoted = True
                    emit(_LOG, logging.WARNING, "copies_not_noted", reason=str(error))
        return None

    def read(self, key: ChunkKey, to: Member) -> memoryview | None:
        """A chunk's bytes, from the first tier but one that has it; None if none does, `StoreError` if one may."""
        trouble: StoreError | None = None
        for member in self.members:
            if member is to:
                continue
            try:
                with member.open(key) as reader:
                    if reader.size > MAX_CHUNK_BYTES:
                        continue
                    buffer = memoryview(bytearray(reader.size))
                    if reader.read_into(buffer, 0) == reader.size and _is_sound(buffer):
                        return buffer
            except (MissingChunk, CorruptChunk):
                continue
            except StoreError as error:
                trouble = error
        if trouble is not None:
            raise trouble
        return None


class _Promoting(WrappedStore):
    """One of the tiers. What is read from it goes to the ones in front of it, too."""

    def __init__(self, inner: Store, copiers: Sequence[_Copier]) -> None:
        super().__init__(inner)
        self.url = inner.url
        self._copiers = copiers

    def open(self, key: ChunkKey) -> ChunkReader:
        reader = self._inner.open(key)
        copiers = [copier for copier in self._copiers if copier.has_room]
        return _PromotingReader(reader, key, copiers) if copiers else reader

    def close(self) -> None:
        """Nothing: the tiered store closes its tiers."""


class _PromotingReader(WrappedReader):
    """Keeps what is read, and hands it on if that is the whole chunk in the end."""

    def __init__(self, inner: ChunkReader, key: ChunkKey, copiers: Sequence[_Copier]) -> None:
        super().__init__(inner)
        self._key = key
        self._copiers = copiers
        self._data = bytearray()

    def read_into(self, buffer: memoryview, offset: int) -> int:
        count = self._inner.read_into(buffer, offset)
        if offset == len(self._data):
            self._data += buffer[:count]
        return count

    def close(self) -> None:
        super().close()
        if len(self._data) == self.size and _is_sound(memoryview(self._data)):
            for copier in self._copiers:
                copier.promote(self._key, bytes(self._data))
        self._data = bytearray()


def _is_sound(data: memoryview) -> bool:
    """Whether what calls itself a chunk is one. What is sealed shows its damage when it is opened."""
    if data[: len(MAGIC)] != MAGIC:
        return True
    try:
        verify_chunk(data)
    except CorruptChunk:
        return False
    return True


class _Job(NamedTuple):
    """A chunk to write into a tier."""

    key: ChunkKey
    data: bytes | None = None
    """What was read of it, to promote it; None: it is read from another tier when its turn comes."""
    if_missing: bool = False
    """Whether it is passed over if the tier has it."""


class _Copier:
    """Writes chunks into a tier, one after the other, in a thread of its own."""

    def __init__(self, member: Member, store: TieredStore) -> None:
        self._member = member
        self._store = store
        self._queue: queue.Queue[_Job | None] = queue.Queue(QUEUE_CHUNKS)
        self._promotions: set[ChunkKey] = set()
        """Those that wait; what is deleted meanwhile is not among them any more."""
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closing = False
        self._copying_since: float | None = None
        self._failing = False
        self.uncopied = 0

    @property
    def has_room(self) -> bool:
        """Whether it would take a promotion."""
        return len(self._promotions) < PROMOTIONS and self._member.is_up

    def copy(self, key: ChunkKey, *, if_missing: bool = False) -> None:
        """Copy a chunk that was just written to another tier, once this one is up."""
        if not self._put(_Job(key, if_missing=if_missing)):
            self._lost(key, "too many wait already")

    def promote(self, key: ChunkKey, data: bytes) -> None:
        """Write these bytes, unless the tier has them or is down."""
        with self._lock:
            self._promotions.add(key)
        if not self._put(_Job(key, data)):
            self.drop([key])

    def drop(self, keys: Sequence[ChunkKey]) -> None:
        """Do not promote these any more."""
        with self._lock:
            self._promotions.difference_update(keys)

    def flush(self) -> None:
        """Wait until nothing is left to do, or nothing can be done."""
        while self._queue.unfinished_tasks and self._member.is_up:
            time.sleep(_LOOK_S)

    def close(self) -> None:
        """Finish what can be done, and stop."""
        if self._closing:
            return
        self._closing = True
        before = self.uncopied
        while self._thread is not None and not self._put(None) and not self._hangs():
            time.sleep(_LOOK_S)
        while self._thread is not None and self._thread.is_alive() and not self._hangs():
            self._thread.join(_LOOK_S)
        with self._queue.mutex:
            stuck = [job for job in self._queue.queue if job is not None and job.data is None]
        for job in stuck:
            self._lost(job.key, "the store was closed")
        self.uncopied += self._thread is not None and self._thread.is_alive()  # what it hangs in
        if (chunks := self.uncopied - before) > 0:
            later = "when the store is used again" if self._store.notes_copies else "never"
            emit(_LOG, logging.WARNING, "uncopied", tier=self._member.name, chunks=chunks, copied=later)

    def _hangs(self) -> bool:
        since = self._copying_since
        return since is not None and time.monotonic() - since > HANG_S

    def _put(self, job: _Job | None) -> bool:
        """Queue a job, or the end. Returns whether there was room."""
        with self._lock:
            if self._thread is None and job is not None:
                self._thread = threading.Thread(target=self._work, name=f"cakekv-copy-{self._member.name}", daemon=True)
                self._thread.start()
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            return False
        return True

    def _lost(self, key: ChunkKey, reason: str, *, for_good: bool = False) -> None:
        """A chunk is not copied; `for_good` if nobody could any more."""
        self.uncopied += 1
        self._store.on_uncopied(self._member.name, 1)
        self._store.settle(key, copied=for_good)
        if not self._failing and not self._closing:
            self._failing = True
            emit(_LOG, logging.WARNING, "copy_failed", tier=self._member.name, chunk=key.short, reason=reason)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                if job.data is not None:
                    self._promote(job.key, job.data)
                else:
                    self._copy(job)
            except (StoreError, CorruptChunk) as error:
                self._failed(job, str(error))
            except Exception as error:  # such as no memory: the next one may fare better
                _LOG.exception("a chunk could not be copied to the %s tier", self._member.name)
                self._failed(job, repr(error))
            finally:
                self._copying_since = None
                self._queue.task_done()

    def _failed(self, job: _Job, reason: str) -> None:
        if job.data is None:
            self._lost(job.key, reason)
        else:  # of a promotion nothing is lost
            self.uncopied += 1

    def _promote(self, key: ChunkKey, data: bytes) -> None:
        with self._lock:
            wanted = key in self._promotions
            self._promotions.discard(key)
        self._copying_since = time.monotonic()
        if wanted and self._member.lookup([key])[0] is None:
            self._member.write(key, memoryview(data))

    def _copy(self, job: _Job) -> None:
        """Copy a chunk. Failures are tried again until they have shown that the tier is down, and after that."""
        for attempt in range(FAILURES + 1):
            while not self._member.is_up and not self._closing:
                time.sleep(_LOOK_S)
            self._copying_since = time.monotonic()
            try:
                if not (job.if_missing and self._member.lookup([job.key])[0] is not None):
                    if not self._member.is_up:
                        raise TierDown(f"the {self._member.name} tier is down")
                    found = self._store.read(job.key, self._member)
                    if found is None:
                        self._lost(job.key, "no other tier has it any more", for_good=True)
                        return
                    if not self._member.write(job.key, found):
                        self._lost(job.key, "the tier declined it", for_good=True)
                        return
                self._failing = False
                self._store.settle(job.key)
                return
            except StoreFull:
                raise
            except StoreError:
                if attempt == FAILURES or self._closing:
                    raise

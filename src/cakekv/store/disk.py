"""The disk tier: chunks in a folder that any number of processes of one machine may share.

A chunk is written to `incoming`, synced, renamed into place under the folder's lock, and its folder synced.
"""

from __future__ import annotations

import errno
import heapq
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path

from cakekv.errors import BadInput, MissingChunk, StoreError, StoreFull
from cakekv.keys import ChunkKey
from cakekv.quantities import format_bytes
from cakekv.store.base import ChunkReader, Evicted, Removal, Store, StoredChunk, StoreStats
from cakekv.store.direct import FileReader
from cakekv.store.durable import sync_folder, write_all, write_file
from cakekv.store.eviction.base import Candidate, Eviction, Victims
from cakekv.store.eviction.lru import LeastRecentlyUsed
from cakekv.store.evictions import Evictions
from cakekv.store.folder import ABSENT, IDENTITIES, OPEN_CHUNK, REMOVALS, Counts, Folder
from cakekv.store.identities import encode_note, is_root, read_note
from cakekv.store.leftovers import clear_leftovers
from cakekv.store.removals import CAPACITY, REQUEST, RemovalLog

EVICTION_BATCH = 16384
"""Among how many of the least recently used chunks the policy chooses."""

_MOST_USES = 1 << 18
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ADVICE = {
    errno.EACCES: "Give a folder that this user may write to, or change its permissions.",
    errno.EPERM: "Give a folder that this user may write to, or change its permissions.",
    errno.EROFS: "Give a folder on a file system that can be written to.",
    errno.ENOENT: "The folder cannot be made there, or was removed meanwhile; give another, or open the store again.",
    errno.ENOTDIR: "A file is in the place of a folder; give another path.",
    errno.EEXIST: "A file is in the place of a folder; give another path.",
}


class DiskStore(Store):
    """Chunks in a folder: durable, found again after a restart, shared by all processes that open it.

    Parameters
    ----------
    path : str or path
        The folder; made if it does not exist. It must be on a local file system.
    capacity : int or None
        Bytes that the chunks, with those being written, may take; None: no bound. A process that opens the folder
        with a smaller capacity than others evicts down to it.
    evict : Eviction or None
        What goes first when that is not enough; None: the least recently used. Each process goes by its own.
    direct : bool
        Whether chunks that are not in the page cache are read past it (`FileReader`).

    Raises
    ------
    BadInput
        The capacity is not positive.
    StoreError
        The folder cannot be made or written, holds something else, or a store of another version.
    """

    name = "disk"
    counts_cheaply = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        capacity: int | None = None,
        evict: Eviction | None = None,
        *,
        direct: bool = True,
    ) -> None:
        if capacity is not None and capacity <= 0:
            raise BadInput(f"a store's capacity is at least one byte, not {capacity}")
        self.path = Path(path).absolute()
        self.capacity = capacity
        self.direct = direct
        self._folder = Folder(self.path)
        self._victims = Victims(evict or LeastRecentlyUsed())  # only touched under the folder's lock
        self._uses: Counter[ChunkKey] = Counter()
        self._removals = RemovalLog(self.path / REMOVALS)
        self._evictions = Evictions(self.name)
        with self._explained("open the store"):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.claim()
            with self._folder.locked() as counts:
                reserved = self._folder.reserved()
                if capacity is not None:
                    self._evict(counts, down_to=max(0, capacity - reserved))

    @property
    def policy(self) -> Eviction:
        """What goes first when room is needed."""
        return self._victims.policy

    @property
    def evicted(self) -> Evicted:
        return self._evictions.total

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        with self._explained("look for chunks"):
            return [self._folder.size(key) for key in keys]

    def open(self, key: ChunkKey) -> ChunkReader:
        with self._explained(f"open chunk {key.short}…"):
            try:
                descriptor = os.open(self._folder.file(key), OPEN_CHUNK)
            except OSError as error:
                if error.errno in ABSENT:
                    raise MissingChunk(f"chunk {key.short}… is not in {self.path}") from error
                raise
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                os.close(descriptor)
                raise MissingChunk(f"chunk {key.short}… in {self.path} is not a file")
            if self.marks_use:
                self._mark_use(key, descriptor)
            return FileReader(descriptor, status.st_size, self.direct)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        size = len(data)
        with self._explained(f"write chunk {key.short}… of {format_bytes(size)}"):
            with self._folder.locked() as counts:
                if not self._make_room(counts, size):
                    return False
                temporary, descriptor = self._folder.new_temporary(size)
            try:
                write_all(descriptor, data)
                now = time.time_ns()
                os.utime(descriptor, ns=(now, now))
                os.fsync(descriptor)
                with self._folder.locked() as counts:
                    replaced = self._folder.publish(temporary, key)
                    counts.chunks += replaced is None
                    counts.bytes += size - (replaced or 0)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
            finally:
                os.close(descriptor)
            try:
                sync_folder(self._folder.file(key).parent)
            except OSError:
                self.delete([key])
                raise
        return True

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        with self._explained("delete chunks"), self._folder.locked() as counts:
            removed = [key for key in keys if self._folder.remove(key, counts)]
            self._removals.note(removed, REQUEST)
            return len(removed)

    def __iter__(self) -> Iterator[StoredChunk]:
        with self._explained("list the chunks"):
            yield from self._folder.scan()

    def stats(self) -> StoreStats:
        with self._explained("count the chunks"), self._folder.locked() as counts:
            return StoreStats(counts.chunks, counts.bytes, self.capacity)

    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        """See `Store`; raises `BadInput` if `root` is not a digest in hexadecimal or the fields exceed 64 KiB."""
        text = encode_note(root, fields)
        file = self.path / IDENTITIES / f"{root}.json"
        with self._explained("note an identity"), self._folder.locked():
            if not file.exists():
                write_file(file, text)

    def identities(self) -> dict[str, dict[str, str]]:
        """See `Store`; notes that are damaged are left out: they only serve to explain misses."""
        found = {}
        with self._explained("read the identities"):
            for file in (self.path / IDENTITIES).iterdir():
                fields = read_note(file) if is_root(file.stem) and file.suffix == ".json" else None
                if fields is not None:
                    found[file.stem] = fields
        return found

    def removals(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, Removal]:
        """See `Store`; of the last 18,000 or more that were removed, by whichever process."""
        return self._removals.find(keys)

    def tidy(self) -> list[str]:
        """See `Store`; the chunks are counted anew. What is not this program's is named, and left alone."""
        with self._explained("tidy up"), self._folder.locked() as counts:
            return clear_leftovers(self._folder, counts)

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Turn an error of the system into the store's own."""
        try:
            yield
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise StoreFull(
                    f"cannot {action}: no room is left for {self.path} ({error.strerror}). "
                    "Free some, or give the store a capacity, so that it evicts in time."
                ) from error
            advice = _ADVICE.get(error.errno or 0, "")
            raise StoreError(f"cannot {action} in {self.path}: {error.strerror}. {advice}".rstrip()) from error

    def _make_room(self, counts: Counts, size: int) -> bool:
        if self.capacity is None:
            return True
        if size > self.capacity:
            return False
        down_to = self.capacity - size - self._folder.reserved()
        if down_to < 0:  # other writers have taken the capacity
            return False
        self._evict(counts, down_to)
        return True

    def _evict(self, counts: Counts, down_to: int) -> None:
        """Remove chunks until no more than `down_to` bytes are stored."""
        evicted: list[ChunkKey] = []
        while counts.bytes > down_to:
            victim = self._victims.next()
            if victim is None:
                oldest = heapq.nsmallest(EVICTION_BATCH, self._folder.counted(counts), key=attrgetter("used_at"))
                self._victims.refill(map(self._candidate, oldest), time.time())
                continue
            with suppress(FileNotFoundError):  # evicted by another process
                # One that was used since has to be judged anew.
                if os.lstat(self._folder.file(victim.key)).st_mtime == victim.used_at:
                    self._folder.remove(victim.key, counts)
                    del self._uses[victim.key]
                    evicted.append(victim.key)
                    self._evictions.add(victim.size)
        self._removals.note(evicted, CAPACITY)

    def _mark_use(self, key: ChunkKey, descriptor: int) -> None:
        with suppress(OSError):  # another user's chunk is read all the same
            now = time.time_ns()  # finer than the clock the kernel would stamp with
            os.utime(descriptor, ns=(now, now))
        if len(self._uses) >= _MOST_USES:  # most are of chunks that other processes have evicted
            self._uses.clear()
        self._uses[key] += 1

    def _candidate(self, chunk: StoredChunk) -> Candidate:
        place = self._folder.peek_place(chunk.key) if self._victims.policy.needs_position else (0, 1)
        return Candidate(*chunk, self._uses[chunk.key], *place)

"""The disk tier: chunks in a folder that any number of processes of one machine may share.

A chunk is written to `incoming`, synced, renamed into place under the folder's lock, and its folder synced.
"""

from __future__ import annotations

import errno
import heapq
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path

from cakekv.chunk import peek_place
from cakekv.errors import BadInput, MissingChunk, StoreError, StoreFull
from cakekv.keys import ChunkKey
from cakekv.quantities import format_bytes
from cakekv.store.base import ChunkReader, Evicted, Removal, Store, StoredChunk, StoreStats
from cakekv.store.direct import FileReader
from cakekv.store.durable import sync_folder, write_all, write_file
from cakekv.store.eviction.base import Eviction, Held
from cakekv.store.eviction.lru import LeastRecentlyUsed
from cakekv.store.evictions import Evictions
from cakekv.store.folder import ABSENT, IDENTITIES, OPEN_CHUNK, REMOVALS, Counts, Folder
from cakekv.store.identities import encode_note, is_root, read_note
from cakekv.store.leftovers import clear_leftovers
from cakekv.store.removals import CAPACITY, REQUEST, RemovalLog

FOUND_AT_A_TIME = 16384
"""How many of the least recently used chunks that the policy does not know of yet it is told of at a time."""

_SAME_TIME_S = 1e-3
_SEARCHED_AT_ONCE = 1024
"""A folder of no more chunks is searched whenever one is missing; a larger one in its time."""
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
        What goes first when that is not enough, of its own; None: the least recently used. Each process goes by its
        own, and finds from time to time what others have written, read and removed.
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
        self._policy = LeastRecentlyUsed() if evict is None else evict
        self._policy_lock = threading.Lock()  # taken after the folder's
        self._evictions_until_search = 0
        self._removals = RemovalLog(self.path / REMOVALS)
        self._evictions = Evictions(self.name)
        with self._explained("open the store"):
            self._make()
            with self._folder.locked() as counts:
                reserved = self._folder.reserved()
                if capacity is not None:
                    self._evict(counts, down_to=max(0, capacity - reserved))

    @property
    def policy(self) -> Eviction:
        """What goes first when room is needed."""
        return self._policy

    @property
    def evicted(self) -> Evicted:
        return self._evictions.total

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        with self._policy_lock:
            self._policy.asked(keys, time.time())
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
                now = time.time_ns()  # finer than the clock the kernel would stamp with
                with suppress(OSError):  # another user's chunk is read all the same
                    os.utime(descriptor, ns=(now, now))
                with self._policy_lock:
                    self._policy.read(key, now / 1e9)
            return FileReader(descriptor, status.st_size, self.direct)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        size = len(data)
        with self._explained(f"write chunk {key.short}… of {format_bytes(size)}"):
            try:
                begun = self._begin_write(size)
            except FileNotFoundError:  # somebody removed the folder, or a part of it
                self._make()
                begun = self._begin_write(size)
            if begun is None:
                return False
            temporary, descriptor = begun
            try:
                write_all(descriptor, data)
                now = time.time_ns()
                os.utime(descriptor, ns=(now, now))
                os.fsync(descriptor)
                with self._folder.locked() as counts:
                    replaced = self._folder.publish(temporary, key)
                    counts.chunks += replaced is None
                    counts.bytes += size - (replaced or 0)
                    if self.capacity is not None:
                        with self._policy_lock:
                            self._policy.wrote(Held(key, size, now / 1e9, *peek_place(data)))
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

    def _make(self) -> None:
        """Make the folder, or what is missing of it."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.claim()

    def _begin_write(self, size: int) -> tuple[Path, int] | None:
        """A file for a chunk of so many bytes, and its descriptor; None if there is no room for it."""
        with self._folder.locked() as counts:
            if not self._folder.whole:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return self._folder.new_temporary(size) if self._make_room(counts, size) else None

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        with self._explained("delete chunks"), self._folder.locked() as counts:
            removed = [key for key in keys if self._folder.remove(key, counts)]
            with self._policy_lock:
                for key in keys:
                    self._policy.removed(key)
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
            self._evictions_until_search -= 1
            with self._policy_lock:
                victim = self._policy.evict(time.time()) if self._evictions_until_search >= 0 else None
            if victim is None:
                self._search(counts)
                continue
            try:
                used_at = os.lstat(self._folder.file(victim.key)).st_mtime
            except FileNotFoundError:  # evicted by another process, or removed by hand: then the counts are wrong
                if len(self._policy) <= _SEARCHED_AT_ONCE:
                    self._evictions_until_search = 0
                continue
            if used_at > victim.used_at + _SAME_TIME_S:  # another process has read it
                with self._policy_lock:
                    self._policy.wrote(victim)
                    self._policy.read(victim.key, used_at)
            else:
                self._folder.remove(victim.key, counts)
                evicted.append(victim.key)
                self._evictions.add(victim.size)
        self._removals.note(evicted, CAPACITY)

    def _search(self, counts: Counts) -> None:
        """Tell the policy what happened in the folder without it."""
        stored = {chunk.key: chunk for chunk in self._folder.counted(counts)}
        unknown = []
        with self._policy_lock:
            for held in list(self._policy.chunks()):
                if held.key not in stored:
                    self._policy.removed(held.key)
            for chunk in stored.values():
                known = self._policy.get(chunk.key)
                if known is None:
                    unknown.append(chunk)
                elif chunk.used_at > known.used_at + _SAME_TIME_S:
                    self._policy.read(chunk.key, chunk.used_at)
        for chunk in heapq.nsmallest(FOUND_AT_A_TIME, unknown, key=attrgetter("used_at")):
            place = self._folder.peek_place(chunk.key) if self._policy.needs_position else (0, 1)
            with self._policy_lock:
                self._policy.wrote(Held(*chunk, *place))
        # Often enough that what is unknown is not spared for long, seldom enough that each eviction pays for a few
        # chunks of the search only.
        self._evictions_until_search = min(max(len(self._policy) // 8, 64), FOUND_AT_A_TIME // 2)

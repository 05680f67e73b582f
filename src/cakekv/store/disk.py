"""The disk tier: chunks in a folder that any number of processes on one machine may share.

A chunk is written to `incoming`, synced, renamed into place under the folder's lock, and its folder synced.
"""

from __future__ import annotations

import errno
import heapq
import logging
import os
import stat
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path

from cakekv.chunk import peek_place
from cakekv.errors import BadInput, MissingChunk, NotDeleted, ReadOnly, StoreError, StoreFull, Unreadable
from cakekv.keys import ChunkKey
from cakekv.logs import emit
from cakekv.quantities import format_bytes
from cakekv.store.base import ChunkReader, Evicted, Expected, Removal, Store, StoredChunk, StoreStats
from cakekv.store.direct import FileReader
from cakekv.store.durable import sync_folder, write_all, write_file
from cakekv.store.eviction.base import AHEAD_S, Eviction, Held
from cakekv.store.eviction.lru import LeastRecentlyUsed
from cakekv.store.folder import ABSENT, CHUNKS, IDENTITIES, OPEN_CHUNK, REMOVALS, Counts, Folder
from cakekv.store.identities import encode_note, is_root, read_note
from cakekv.store.leftovers import clear_leftovers
from cakekv.store.ownership import Mode, whose
from cakekv.store.pins import PINNED_SHARE, Pins, check_share, most_pinned, new_pin
from cakekv.store.pins_in_folder import PinsInFolder
from cakekv.store.removals import CAPACITY, REQUEST, Evictions, RemovalLog
from cakekv.store.sizes import known_sizes
from cakekv.store.waiting_in_folder import WaitingInFolder

FOUND_AT_A_TIME = 16384
"""How many of the least recently used chunks that the policy does not know of yet it is told of at a time."""

_LOG = logging.getLogger(__name__)

_SAME_TIME_S = 1e-3
_SEARCHED_AT_ONCE = 1024
"""A folder of no more chunks is searched whenever one is missing; a larger one in its time."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_USERS = (
    "Give a folder that this user may write to, or change its permissions; one that several users share is made with "
    "?mode=group."
)
_ADVICE = {
    errno.EACCES: _USERS,
    errno.EPERM: _USERS,
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
    pin_share : float
        Of the capacity, what pins may take up.
    direct : bool
        Whether chunks that are not in the page cache are read past it (`FileReader`).
    mode : {"private", "group"}
        Who may use what is written: this user, or the folder's group as well. A store that its group may write to stays
        so.

    Raises
    ------
    BadInput
        The capacity is not positive, or the share not between 0 and 1.
    StoreError
        The folder cannot be made or read, holds something else, or a store of another version. One that can be read
        but not written is opened for loading; then whatever writes raises `ReadOnly`.
    """

    name = "disk"
    counts_cheaply = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        capacity: int | None = None,
        evict: Eviction | None = None,
        *,
        pin_share: float = PINNED_SHARE,
        direct: bool = True,
        mode: Mode = "private",
    ) -> None:
        if capacity is not None and capacity <= 0:
            raise BadInput(f"a store's capacity is at least one byte, not {capacity}")
        self.path = Path(path).absolute()
        self.capacity = capacity
        self.direct = direct
        self._folder = Folder(self.path)
        self._pin_share = check_share(pin_share)
        self._pins = PinsInFolder(self._folder)
        self._policy = LeastRecentlyUsed() if evict is None else evict
        self._policy_lock = threading.Lock()  # taken after the folder's
        self._evictions_until_search = 0
        self._stuck = False
        self._removals = RemovalLog(self.path / REMOVALS, give=lambda file: self._folder.ownership.give(file))
        self._evictions = Evictions(self.name)
        self._read_only: str | None = None
        self._shared = mode == "group"
        with self._explained("open the store"):
            try:
                self._claim()
            except OSError as error:
                if error.errno not in _REFUSED or not self._folder.is_readable():
                    raise
                self._read_only = _reason(error)

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
        return self._sizes(keys)

    def probe(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [size is not None for size in self._sizes(keys)]

    def _sizes(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        known: dict[ChunkKey, int | None] = {}
        failed: dict[ChunkKey, StoreError] = {}
        for key in keys:
            try:
                with self._explained(f"look for chunk {key.short}…"):
                    known[key] = self._folder.readable_size(key)
            except StoreError as error:
                failed[key] = error
        if failed and not known:
            with self._explained("look for chunks"):
                os.scandir(self.path / CHUNKS).close()  # is it that one, or all?
        return known_sizes(keys, known, failed)

    def open(self, key: ChunkKey) -> ChunkReader:
        with self._explained(f"open chunk {key.short}…"):
            try:
                descriptor = os.open(self._folder.file(key), OPEN_CHUNK)
            except OSError as error:
                if error.errno in ABSENT:
                    raise MissingChunk(f"chunk {key.short}… is not in {self.path}") from error
                if isinstance(error, PermissionError):
                    raise Unreadable(f"cannot open chunk {key.short}…: {_reason(error)}") from error
                raise
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                os.close(descriptor)
                raise MissingChunk(f"chunk {key.short}… in {self.path} is not a file")
            if self.marks_use:
                now = time.time_ns()  # finer than the clock the kernel would stamp with
                try:
                    os.utime(descriptor, ns=(now, now))
                except OSError:  # another user's chunk
                    with suppress(OSError):  # it is read all the same
                        os.utime(descriptor)
                with self._policy_lock:
                    self._policy.read(key, now / 1e9)
            return FileReader(descriptor, status.st_size, self.direct)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        size = len(data)
        with self._writing(f"write chunk {key.short}… of {format_bytes(size)}"):
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

    def _begin_write(self, size: int) -> tuple[Path, int] | None:
        """A file for a chunk of so many bytes, and its descriptor; None if there is no room for it."""
        with self._folder.locked() as counts:
            if not self._folder.whole:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return self._folder.new_temporary(size) if self._make_room(counts, size) else None

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        removed: list[ChunkKey] = []
        stuck: dict[ChunkKey, str] = {}
        with self._writing("delete chunks"), self._folder.locked() as counts:
            for key in keys:
                try:
                    if self._folder.remove(key, counts):
                        removed.append(key)
                except OSError as error:
                    stuck[key] = _reason(error, named=True)
                    continue
                with self._policy_lock:
                    self._policy.removed(key)
            self._removals.note(removed, REQUEST)
        if stuck:
            raise NotDeleted.of(len(removed), stuck)
        return len(removed)

    def __iter__(self) -> Iterator[StoredChunk]:
        trouble: StoreError | None = None
        with self._explained("list the chunks"):
            shards = list(self._folder.shards())
        for shard in shards:
            try:
                with self._explained(f"list the chunks in {shard.name}"):
                    yield from self._folder.scan([shard])
            except StoreError as error:
                trouble = error
        if trouble is not None:
            raise trouble

    def stats(self) -> StoreStats:
        with self._explained("count the chunks"):
            if self._read_only is not None:
                sizes = [chunk.size for chunk in self._folder.scan()]
                return StoreStats(len(sizes), sum(sizes), self.capacity)
            with self._folder.locked() as counts:
                return StoreStats(counts.chunks, counts.bytes, self.capacity)

    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        """See `Store`; raises `BadInput` if `root` is not a digest in hexadecimal or the fields exceed 64 KiB."""
        text = encode_note(root, fields)
        file = self.path / IDENTITIES / f"{root}.json"
        with self._writing("note an identity"), self._folder.locked():
            if not file.exists():
                write_file(file, text, self._folder.ownership)

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

    def pin(self, name: ChunkKey, keys: Sequence[ChunkKey], ttl_s: float, chunk_bytes: int) -> None:
        with self._writing("pin chunks"), self._folder.locked():
            now = time.time()
            stored = {key: size for key in keys if (size := self._folder.size(key)) is not None}
            pin, most = new_pin(keys, stored, chunk_bytes, ttl_s, now), most_pinned(self.capacity, self._pin_share)
            self._pins.write(self._pins.at(now).with_pin(name, pin, most, f"{self.path}"))

    def release(self, name: ChunkKey) -> bool:
        with self._writing("release chunks"), self._folder.locked():
            pins = self._pins.at(time.time())
            if name in pins.by_name:
                self._pins.write(pins.without(name))
            return name in pins.by_name

    def pins(self) -> Pins:
        if self._read_only is not None:
            return self._pins.at(time.time())
        with self._explained("read the pins"), self._folder.locked():
            return self._pins.at(time.time())

    def expect(self, queue: Sequence[Expected]) -> None:
        with self._policy_lock:
            self._policy.expect(queue)

    def survives_fork(self) -> bool:
        return not self._policy_lock.locked()

    def waiting_copies(self) -> WaitingInFolder:
        return WaitingInFolder(self._folder)

    def tidy(self) -> list[str]:
        """See `Store`; the chunks are counted anew. What is not this program's is named, and left alone."""
        with self._writing("tidy up"), self._folder.locked() as counts:
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
            raise StoreError(f"cannot {action} in {self.path}: {_reason(error)}. {advice}".rstrip()) from error

    @contextmanager
    def _writing(self, action: str) -> Iterator[None]:
        """As `_explained`, for what changes the folder."""
        if self._read_only is not None:
            raise ReadOnly(
                f"cannot {action} in {self.path}, which could only be opened for loading: {self._read_only}. To write, "
                "give a folder that this user may write to."
            )
        with self._explained(action):
            yield

    def _make(self) -> None:
        """Make the folder, or what is missing of it."""
        if not self.path.is_dir():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._shared:
                self.path.chmod(0o2770)
        self._folder.claim(self._shared)

    def _claim(self) -> None:
        self._make()
        with self._folder.locked() as counts:
            reserved = self._folder.reserved()
            if self.capacity is not None:
                self._evict(counts, down_to=max(0, self.capacity - reserved))

    def _make_room(self, counts: Counts, size: int) -> bool:
        if self.capacity is None:
            return True
        if size > self.capacity:
            return False
        down_to = self.capacity - size - self._folder.reserved()
        if down_to < 0:  # other writers have taken the capacity
            return False
        return self._evict(counts, down_to)

    def _evict(self, counts: Counts, down_to: int) -> bool:
        """Remove chunks until no more than `down_to` bytes are stored; returns whether that could be done."""
        evicted: list[ChunkKey] = []
        stuck: set[ChunkKey] = set()
        if counts.bytes > down_to:
            pinned = self._pins.at(time.time()).keys
            with self._policy_lock:
                self._policy.spare(pinned)
        while counts.bytes > down_to:
            now = time.time()
            self._evictions_until_search -= 1
            with self._policy_lock:
                victim = self._policy.evict(now) if self._evictions_until_search >= 0 else None
            if victim is None:
                self._search(counts, stuck)
                if self._policy.may_evict:
                    continue
                break
            try:
                used_at = os.lstat(self._folder.file(victim.key)).st_mtime
                if victim.used_at + _SAME_TIME_S < used_at <= now + AHEAD_S:  # another process has read it
                    with self._policy_lock:
                        self._policy.wrote(victim)
                        self._policy.read(victim.key, used_at)
                    continue
                self._folder.remove(victim.key, counts)
            except FileNotFoundError:  # evicted by another process, or removed by hand: then the counts are wrong
                if len(self._policy) <= _SEARCHED_AT_ONCE:
                    self._evictions_until_search = 0
                continue
            except OSError as error:  # others go in its place
                stuck.add(victim.key)
                if not self._stuck:
                    self._stuck = True
                    emit(_LOG, logging.WARNING, "not_evicted", tier=self.name, reason=_reason(error, named=True))
                continue
            evicted.append(victim.key)
            self._evictions.add(victim.size)
        self._removals.note(evicted, CAPACITY)
        return counts.bytes <= down_to

    def _search(self, counts: Counts, stuck: Collection[ChunkKey]) -> None:
        """Tell the policy what happened in the folder without it, but for chunks that cannot be removed."""
        stored = {chunk.key: chunk for chunk in self._folder.counted(counts) if chunk.key not in stuck}
        now = time.time()
        unknown = []
        with self._policy_lock:
            for held in list(self._policy.chunks()):
                if held.key not in stored:
                    self._policy.removed(held.key)
            for chunk in stored.values():
                known = self._policy.get(chunk.key)
                if known is None:
                    unknown.append(chunk._replace(used_at=min(chunk.used_at, now)))
                elif known.used_at + _SAME_TIME_S < chunk.used_at <= now + AHEAD_S:
                    self._policy.read(chunk.key, chunk.used_at)
        for chunk in heapq.nsmallest(FOUND_AT_A_TIME, unknown, key=attrgetter("used_at")):
            place = self._folder.peek_place(chunk.key) if self._policy.needs_position else (0, 1)
            with self._policy_lock:
                self._policy.wrote(Held(chunk.key, chunk.size, chunk.used_at, *place))
        # Often enough that what is unknown is not spared for long, seldom enough that each eviction pays for a few
        # chunks of the search only.
        self._evictions_until_search = min(max(len(self._policy) // 8, 64), FOUND_AT_A_TIME // 2)


def _reason(error: OSError, named: bool = False) -> str:
    """What the system says, and of a file that this user may not use, whose it is; `named`: of any, which it is."""
    if error.filename is None or not (named or isinstance(error, PermissionError)):
        return f"{error.strerror}"
    file = Path(os.fsdecode(error.filename))
    return f"{error.strerror}: {whose(file) if isinstance(error, PermissionError) else file}"

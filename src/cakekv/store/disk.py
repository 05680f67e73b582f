"""The disk tier: one file per chunk, in a folder that any number of processes of one machine may share.

    cakekv-store.json      names the version of this arrangement
    cakekv.lock            flock'ed around every change; holds how many chunks and bytes are stored
    chunks/ab/cdef….chunk  complete chunks, named by their keys; the modification time says when one was last used
    incoming/SIZE-….tmp    chunks being written, each flock'ed by its writer as long as that lives
    identities/ROOT.json   whose chunks these are

A chunk is written to `incoming`, synced, renamed into place under the lock, and its folder synced. The counts in the
lock file are marked as changing while they are; whoever finds that mark left by a killed process counts afresh.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import json
import os
import re
import secrets
import stat
import struct
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from cakekv.errors import BadInput, MissingChunk, StoreError, StoreFull
from cakekv.keys import ChunkKey
from cakekv.quantities import format_bytes
from cakekv.store.base import ChunkReader, Store, StoredChunk, StoreStats
from cakekv.store.direct import FileReader
from cakekv.store.durable import make_folder, sync_folder, write_all, write_file
from cakekv.store.identities import MAX_NOTE_BYTES, decode_note, encode_note, is_root

STORE_VERSION = 1
MARKER, LOCK, CHUNKS, INCOMING, IDENTITIES = "cakekv-store.json", "cakekv.lock", "chunks", "incoming", "identities"
EVICTION_BATCH = 16384
"""How many of the oldest chunks one scan of the folder picks out, to be evicted as room is needed."""

_SHARD_NAME = re.compile(r"[0-9a-f]{2}")
_CHUNK_NAME = re.compile(r"([0-9a-f]{62})\.chunk")
_TEMPORARY_NAME = re.compile(r"([0-9]{1,19})-[0-9a-f]{16}\.tmp")

_COUNTS = struct.Struct("<8sQQ")
_SETTLED, _CHANGING = b"settled\0", b"changing"

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_ADVICE = {
    errno.EACCES: "Give a folder that this user may write to, or change its permissions.",
    errno.EPERM: "Give a folder that this user may write to, or change its permissions.",
    errno.EROFS: "Give a folder on a file system that can be written to.",
    errno.ENOENT: "The folder cannot be made there, or was removed meanwhile; give another, or open the store again.",
    errno.ENOTDIR: "A file is in the place of a folder; give another path.",
    errno.EEXIST: "A file is in the place of a folder; give another path.",
}


@dataclass
class _Counts:
    chunks: int = 0
    bytes: int = 0


class DiskStore(Store):
    """Chunks in a folder: durable, found again after a restart, shared by all processes that open it.

    Parameters
    ----------
    path : str or path
        The folder; made if it does not exist. It must be on a local file system.
    capacity : int or None
        Bytes that the chunks, with those being written, may take; None: no bound. A process that opens the folder
        with a smaller capacity than others evicts down to it.
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

    def __init__(self, path: str | os.PathLike[str], capacity: int | None = None, *, direct: bool = True) -> None:
        if capacity is not None and capacity <= 0:
            raise BadInput(f"a store's capacity is at least one byte, not {capacity}")
        self.path = Path(path).absolute()
        self.capacity = capacity
        self.direct = direct
        self._oldest: deque[StoredChunk] = deque()  # only touched under the folder's lock
        with self._explained("open the store"):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._claim()
            with self._locked() as counts:
                reserved = self._reserved()
                if capacity is not None:
                    self._evict(counts, down_to=max(0, capacity - reserved))

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        with self._explained("look for chunks"):
            return [self._size(key) for key in keys]

    def open(self, key: ChunkKey) -> ChunkReader:
        with self._explained(f"open chunk {key.short}…"):
            try:
                # Not blocking, so that a pipe in a chunk's place does not hang the reader.
                descriptor = os.open(self._file(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError as error:
                if error.errno in _ABSENT:
                    raise MissingChunk(f"chunk {key.short}… is not in {self.path}") from error
                raise
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                os.close(descriptor)
                raise MissingChunk(f"chunk {key.short}… in {self.path} is not a file")
            with suppress(OSError):  # another user's chunk is read all the same
                now = time.time_ns()  # finer than the clock the kernel would stamp with
                os.utime(descriptor, ns=(now, now))
            return FileReader(descriptor, status.st_size, self.direct)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        size = len(data)
        with self._explained(f"write chunk {key.short}… of {format_bytes(size)}"):
            with self._locked() as counts:
                if not self._make_room(counts, size):
                    return False
                temporary, descriptor = self._new_temporary(size)
            try:
                write_all(descriptor, data)
                now = time.time_ns()
                os.utime(descriptor, ns=(now, now))
                os.fsync(descriptor)
                with self._locked() as counts:
                    replaced = self._publish(temporary, key)
                    counts.chunks += replaced is None
                    counts.bytes += size - (replaced or 0)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
            finally:
                os.close(descriptor)
            try:
                sync_folder(self._file(key).parent)
            except OSError:
                self.delete([key])
                raise
        return True

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        with self._explained("delete chunks"), self._locked() as counts:
            return sum(self._remove(key, counts) for key in keys)

    def __iter__(self) -> Iterator[StoredChunk]:
        with self._explained("list the chunks"):
            yield from self._scan()

    def stats(self) -> StoreStats:
        with self._explained("count the chunks"), self._locked() as counts:
            return StoreStats(counts.chunks, counts.bytes, self.capacity)

    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        """See `Store`; raises `BadInput` if `root` is not a digest in hexadecimal or the fields exceed 64 KiB."""
        text = encode_note(root, fields)
        file = self.path / IDENTITIES / f"{root}.json"
        with self._explained("note an identity"), self._locked():
            if not file.exists():
                write_file(file, text)

    def identities(self) -> dict[str, dict[str, str]]:
        """See `Store`; notes that are damaged are left out: they only serve to explain misses."""
        found = {}
        with self._explained("read the identities"):
            for file in (self.path / IDENTITIES).iterdir():
                fields = _read_note(file) if is_root(file.stem) and file.suffix == ".json" else None
                if fields is not None:
                    found[file.stem] = fields
        return found

    # The folder

    def _claim(self) -> None:
        """Make the folder a store, unless it is one already; refuse one that is something else."""
        ours = {MARKER, f"{MARKER}.new", LOCK, CHUNKS, INCOMING, IDENTITIES}
        # Looked at before the lock file is made, so that a foreign folder is left as it was.
        self._refuse_if_foreign(allowed=ours)
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            marker = self.path / MARKER
            if marker.exists():
                with marker.open("rb") as stream:
                    text = stream.read(100).decode(errors="replace")
                if text != _marker_text():
                    raise StoreError(
                        f"{self.path} holds a store of another version ({text!r} instead of {_marker_text()!r}). "
                        "Give another folder, or delete this one if its chunks are no longer needed."
                    )
            else:
                self._refuse_if_foreign(allowed={f"{MARKER}.new", LOCK})
                write_file(marker, _marker_text())
            for name in (CHUNKS, INCOMING, IDENTITIES):
                make_folder(self.path / name)
            # Whoever locks next counts anew: someone's `rm` may have made the counts wrong.
            os.pwrite(descriptor, _COUNTS.pack(_CHANGING, 0, 0), 0)
        finally:
            os.close(descriptor)

    def _refuse_if_foreign(self, allowed: set[str]) -> None:
        names = set(os.listdir(self.path))
        foreign = sorted(names - allowed)
        if foreign and MARKER not in names:
            raise StoreError(
                f"{self.path} is not a cakekv store, and not empty: it holds {foreign[0]!r}. "
                "Give an empty or a new folder."
            )

    @contextmanager
    def _locked(self) -> Iterator[_Counts]:
        """Hold the folder against all other threads and processes; what is done to the counts is kept."""
        # A descriptor of its own each time: a flock belongs to the open file, which threads and forks would share.
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            counts = _Counts()
            state = os.pread(descriptor, _COUNTS.size, 0)
            if len(state) == _COUNTS.size and state.startswith(_SETTLED):
                _, counts.chunks, counts.bytes = _COUNTS.unpack(state)
            else:
                self._recount(counts)
            os.pwrite(descriptor, _COUNTS.pack(_CHANGING, 0, 0), 0)
            yield counts
            if min(counts.chunks, counts.bytes) >= 0:  # else someone put chunks there by hand: count again next time
                os.pwrite(descriptor, _COUNTS.pack(_SETTLED, counts.chunks, counts.bytes), 0)
        finally:
            os.close(descriptor)

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

    # Chunks. All below but `_file`, `_size` and `_scan` need the lock.

    def _file(self, key: ChunkKey) -> Path:
        name = key.hex()
        return self.path / CHUNKS / name[:2] / f"{name[2:]}.chunk"

    def _size(self, key: ChunkKey) -> int | None:
        try:
            status = os.lstat(self._file(key))
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def _scan(self) -> Iterator[StoredChunk]:
        with os.scandir(self.path / CHUNKS) as shards:
            for shard in shards:
                if _SHARD_NAME.fullmatch(shard.name) and shard.is_dir(follow_symlinks=False):
                    with os.scandir(shard.path) as files:
                        yield from filter(None, (_stored(shard.name, file) for file in files))

    def _recount(self, counts: _Counts) -> None:
        """Count what is stored, and pick out the chunks that have not been used for longest."""
        counts.chunks = counts.bytes = 0

        def counted() -> Iterator[StoredChunk]:
            for chunk in self._scan():
                counts.chunks += 1
                counts.bytes += chunk.size
                yield chunk

        self._oldest = deque(heapq.nsmallest(EVICTION_BATCH, counted(), key=attrgetter("used_at")))

    def _reserved(self) -> int:
        """Bytes that living writers have yet to turn into chunks. What dead ones left behind is removed."""
        reserved = 0
        for file in (self.path / INCOMING).iterdir():
            name = _TEMPORARY_NAME.fullmatch(file.name)
            if name and _is_written(file):
                reserved += int(name[1])
            elif name:
                file.unlink(missing_ok=True)
        return reserved

    def _make_room(self, counts: _Counts, size: int) -> bool:
        if self.capacity is None:
            return True
        if size > self.capacity:
            return False
        down_to = self.capacity - size - self._reserved()
        if down_to < 0:  # other writers have taken the capacity
            return False
        self._evict(counts, down_to)
        return True

    def _evict(self, counts: _Counts, down_to: int) -> None:
        """Remove the least recently used chunks until no more than `down_to` bytes are stored."""
        while counts.bytes > down_to:
            if not self._oldest:
                self._recount(counts)
                continue
            chunk = self._oldest.popleft()
            with suppress(FileNotFoundError):  # evicted by another process
                # Chunks that are not in `_oldest`, or were used since, are younger than all those that are.
                if os.lstat(self._file(chunk.key)).st_mtime == chunk.used_at:
                    self._remove(chunk.key, counts)

    def _remove(self, key: ChunkKey, counts: _Counts) -> bool:
        size = self._size(key)
        if size is None:
            return False
        self._file(key).unlink()
        counts.chunks -= 1
        counts.bytes -= size
        return True

    def _new_temporary(self, size: int) -> tuple[Path, int]:
        """A file that reserves `size` bytes until it is published or its writer is gone."""
        file = self.path / INCOMING / f"{size}-{secrets.token_hex(8)}.tmp"
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return file, descriptor

    def _publish(self, temporary: Path, key: ChunkKey) -> int | None:
        """Give a written chunk its name. Returns the size of the chunk that had it before, if one did."""
        replaced = self._size(key)
        file = self._file(key)
        make_folder(file.parent)
        temporary.replace(file)
        return replaced


def _marker_text() -> str:
    return json.dumps({"cakekv_store": STORE_VERSION})


def _stored(shard: str, file: os.DirEntry[str]) -> StoredChunk | None:
    """The chunk in a file; None if it is no chunk, or gone since the folder was listed."""
    name = _CHUNK_NAME.fullmatch(file.name)
    if not name or not file.is_file(follow_symlinks=False):
        return None
    try:
        status = file.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return StoredChunk(ChunkKey(bytes.fromhex(shard + name[1])), status.st_size, status.st_mtime)


def _is_written(file: Path) -> bool:
    """Whether the writer of a temporary file is alive."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _read_note(file: Path) -> dict[str, str] | None:
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            return decode_note(stream.read(MAX_NOTE_BYTES + 1))
    except OSError:
        return None

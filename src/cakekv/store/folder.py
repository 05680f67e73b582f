"""The folder behind the disk tier: one file per chunk, shared by any number of processes on one machine.

    cakekv-store.json      names the version of this arrangement
    cakekv.lock            flock'ed around every change; holds how many chunks and bytes are stored
    chunks/ab/cdef….chunk  complete chunks, named by their keys; the modification time says when one was last used
    incoming/SIZE-….tmp    chunks being written, each flock'ed by its writer as long as that lives
    identities/ROOT.json   whose chunks these are
    removals.log, .old     which chunks were removed last, and why
    uncopied/….keys        which chunks wait to be copied to another tier (see `waiting_in_folder`)
    pins.json              which chunks are not evicted, and until when (see `pins_in_folder`)

A chunk is written to `incoming`, synced, renamed into place under the lock, and its folder synced. The counts in the
lock file are marked as changing while they are; whoever finds that mark left by a killed process counts afresh.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cakekv.chunk import PEEK_BYTES, peek_place
from cakekv.errors import StoreError
from cakekv.keys import ChunkKey
from cakekv.logs import emit
from cakekv.store.base import StoredChunk
from cakekv.store.durable import make_folder, write_file
from cakekv.store.ownership import Ownership, is_readable, whose

_LOG = logging.getLogger(__name__)

STORE_VERSION = 1
MARKER, LOCK, CHUNKS, INCOMING, IDENTITIES = "cakekv-store.json", "cakekv.lock", "chunks", "incoming", "identities"
REMOVALS, UNCOPIED, PINS = "removals.log", "uncopied", "pins.json"

_SHARD_NAME = re.compile(r"[0-9a-f]{2}")
_CHUNK_NAME = re.compile(r"([0-9a-f]{62})\.chunk")
_TEMPORARY_NAME = re.compile(r"([0-9]{1,19})-[0-9a-f]{16}\.tmp")

_COUNTS = struct.Struct("<8sQQ")
_SETTLED, _CHANGING = b"settled\0", b"changing"

ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
"""Errors that mean there is no such file."""
OPEN_CHUNK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
"""Not blocking, so that a pipe in a chunk's place does not hang the reader."""


@dataclass
class Counts:
    """What a folder holds."""

    chunks: int = 0
    bytes: int = 0


class Folder:
    """A store's folder. What changes it has to hold its lock; system errors come through as they are.

    Parameters
    ----------
    path : path
        Absolute.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cleared = 0
        """Temporary files of dead writers that were removed."""
        self.ownership = Ownership()
        """Whose what is made here is; known once it is claimed."""
        self._named = False

    def claim(self, shared: bool = False) -> None:
        """Make the folder a store, unless it is one already; refuse one that is something else.

        Parameters
        ----------
        shared : bool
            Whether the folder's group may use it. That of a store which is there is known by its folders.
        """
        ours = {MARKER, f"{MARKER}.new", LOCK, CHUNKS, INCOMING, IDENTITIES}
        # Looked at before the lock file is made, so that a foreign folder is left as it was.
        self._refuse_if_foreign(allowed=ours)
        chunks = self.path / CHUNKS
        self.ownership = Ownership.of(chunks if chunks.is_dir() else self.path, shared)
        if not shared and not chunks.is_dir():
            self.ownership = self.ownership._replace(shared=False)
        descriptor = self._open_lock()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not self._has_marker():
                self._refuse_if_foreign(allowed={f"{MARKER}.new", LOCK})
                write_file(self.path / MARKER, _marker_text(), self.ownership)
            for name in (CHUNKS, INCOMING, IDENTITIES):
                make_folder(self.path / name, self.ownership)
            if shared and not chunks.stat().st_mode & stat.S_IWGRP:
                self._share()
            # Whoever locks next counts anew: someone's `rm` may have made the counts wrong.
            os.pwrite(descriptor, _COUNTS.pack(_CHANGING, 0, 0), 0)
        finally:
            _unlock(descriptor)

    def is_readable(self) -> bool:
        """Whether this is a store out of which this user may load, though perhaps not write.

        Raises
        ------
        StoreError
            It is one of another version.
        """
        try:
            return self._has_marker() and os.access(self.path / CHUNKS, os.R_OK | os.X_OK)
        except OSError:
            return False

    def _has_marker(self) -> bool:
        marker = self.path / MARKER
        if not marker.exists():
            return False
        with marker.open("rb") as stream:
            text = stream.read(100).decode(errors="replace")
        if text != _marker_text():
            raise StoreError(
                f"{self.path} holds a store of another version ({text!r} instead of {_marker_text()!r}). "
                "Give another folder, or delete this one if its chunks are no longer needed."
            )
        return True

    def _open_lock(self) -> int:
        with suppress(FileExistsError):
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            self.ownership.give(descriptor)
            return descriptor
        return os.open(self.path / LOCK, os.O_RDWR | os.O_NOFOLLOW)

    def _share(self) -> None:
        """Let the group use a store that was private; the chunks that are there stay private."""
        folders = [self.path / name for name in (CHUNKS, INCOMING, IDENTITIES)]
        for path in (self.path, *folders, *self.shards(), self.path / LOCK, self.path / MARKER):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                self.ownership.give(descriptor)
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
    def locked(self) -> Iterator[Counts]:
        """Hold the folder against all other threads and processes; what is done to the counts is kept."""
        # A descriptor of its own each time: a flock belongs to the open file, which threads would share. It is given
        # back by name: a child that was forked meanwhile has the open file, too, and would keep it.
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            counts = Counts()
            state = os.pread(descriptor, _COUNTS.size, 0)
            if len(state) == _COUNTS.size and state.startswith(_SETTLED):
                _, counts.chunks, counts.bytes = _COUNTS.unpack(state)
            else:
                for _ in self.counted(counts):
                    pass
            os.pwrite(descriptor, _COUNTS.pack(_CHANGING, 0, 0), 0)
            yield counts
            if min(counts.chunks, counts.bytes) >= 0:  # else someone put chunks there by hand: count again next time
                os.pwrite(descriptor, _COUNTS.pack(_SETTLED, counts.chunks, counts.bytes), 0)
        finally:
            _unlock(descriptor)

    @property
    def whole(self) -> bool:
        """Whether there are folders to write to."""
        return (self.path / CHUNKS).is_dir() and (self.path / INCOMING).is_dir()

    def file(self, key: ChunkKey) -> Path:
        """Where a chunk is, or would be."""
        name = key.hex()
        return self.path / CHUNKS / name[:2] / f"{name[2:]}.chunk"

    def size(self, key: ChunkKey) -> int | None:
        """Bytes of a chunk; None if it is not stored."""
        status = self._status(key)
        return None if status is None else status.st_size

    def readable_size(self, key: ChunkKey) -> int | None:
        """As `size`, but None, too, if this user may not read it, which is said once in the log."""
        file = self.file(key)
        try:
            status = self._status(key)
            if status is None or is_readable(file, status):
                return None if status is None else status.st_size
        except PermissionError:
            pass
        self._name(file)
        return None

    def _status(self, key: ChunkKey) -> os.stat_result | None:
        try:
            status = os.lstat(self.file(key))
        except OSError as error:
            if error.errno in ABSENT:
                return None
            raise
        return status if stat.S_ISREG(status.st_mode) else None

    def _name(self, path: Path) -> None:
        if not self._named:
            self._named = True
            emit(_LOG, logging.WARNING, "unreadable", path=str(path), reason=whose(path))

    def scan(self, shards: Iterable[Path] | None = None) -> Iterator[StoredChunk]:
        """The chunks in these folders; by default all."""
        for shard in self.shards() if shards is None else shards:
            try:
                with os.scandir(shard) as files:
                    yield from filter(None, (_stored(shard.name, file) for file in files))
            except FileNotFoundError:  # removed meanwhile, as it was empty
                continue
            except PermissionError:
                if shards is not None:
                    raise
                self._name(shard)

    def shards(self) -> Iterator[Path]:
        """The folders that chunks are in."""
        with os.scandir(self.path / CHUNKS) as shards:
            for shard in shards:
                if _SHARD_NAME.fullmatch(shard.name) and shard.is_dir(follow_symlinks=False):
                    yield Path(shard.path)

    @staticmethod
    def is_chunk(file: os.DirEntry[str]) -> bool:
        """Whether what is in a shard's folder is a chunk, as far as its name and kind tell."""
        return bool(_CHUNK_NAME.fullmatch(file.name)) and file.is_file(follow_symlinks=False)

    @staticmethod
    def is_temporary(name: str) -> bool:
        """Whether a file in `incoming` is named as writers name theirs."""
        return bool(_TEMPORARY_NAME.fullmatch(name))

    def reserved(self) -> int:
        """Bytes that living writers have yet to turn into chunks. What dead ones left behind is removed."""
        reserved = 0
        for file in (self.path / INCOMING).iterdir():
            name = _TEMPORARY_NAME.fullmatch(file.name)
            if name and _is_written(file):
                reserved += int(name[1])
            elif name:
                try:
                    file.unlink(missing_ok=True)
                    self.cleared += 1
                except OSError:  # another user's: its bytes stay where they are
                    reserved += int(name[1])
        return reserved

    def counted(self, counts: Counts) -> Iterator[StoredChunk]:
        """All chunks, counted afresh as they go by."""
        counts.chunks = counts.bytes = 0
        for chunk in self.scan():
            counts.chunks += 1
            counts.bytes += chunk.size
            yield chunk

    def peek_place(self, key: ChunkKey) -> tuple[int, int]:
        """As `chunk.peek_place`."""
        try:
            descriptor = os.open(self.file(key), OPEN_CHUNK)
        except OSError:
            return peek_place(b"")
        try:
            return peek_place(os.pread(descriptor, PEEK_BYTES, 0))
        finally:
            os.close(descriptor)

    def remove(self, key: ChunkKey, counts: Counts) -> bool:
        """Remove a chunk. Returns whether there was one."""
        size = self.size(key)
        if size is None:
            return False
        self.file(key).unlink()
        counts.chunks -= 1
        counts.bytes -= size
        return True

    def new_temporary(self, size: int) -> tuple[Path, int]:
        """A file that reserves `size` bytes until it is published or its writer is gone."""
        file = self.path / INCOMING / f"{size}-{secrets.token_hex(8)}.tmp"
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        self.ownership.give(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return file, descriptor

    def publish(self, temporary: Path, key: ChunkKey) -> int | None:
        """Give a written chunk its name. Returns the size of the chunk that had it before, if one did."""
        replaced = self.size(key)
        file = self.file(key)
        make_folder(file.parent, self.ownership)
        temporary.replace(file)
        return replaced


def _unlock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


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
    except PermissionError:  # another user's
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False

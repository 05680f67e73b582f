"""Chunks of a folder that wait to be copied to another tier, noted on disk.

    uncopied/….keys    one process's notes, flock'ed as long as it lives: "+" and a key for each chunk that waits, "-"
                       and a key for each that does not any more

Whoever opens the store next takes over the notes of processes that died.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cakekv.keys import ChunkKey
from cakekv.store.durable import make_folder, sync_folder, write_all
from cakekv.store.folder import UNCOPIED, Folder
from cakekv.store.waiting_copies import WaitingCopies

_RECORD_BYTES = 1 + ChunkKey.LENGTH
_FEW_RECORDS = 4096
"""A file of no more is not worth being written anew without what does not wait any more."""


class WaitingInFolder(WaitingCopies):
    """Notes in a folder.

    Parameters
    ----------
    folder : Folder
        The store's.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._path = folder.path / UNCOPIED
        self._lock = threading.Lock()
        self._waiting: dict[ChunkKey, None] = {}
        self._file: tuple[Path, int] | None = None
        self._records = 0

    def add(self, keys: Iterable[ChunkKey]) -> None:
        with self._lock:
            added = [key for key in dict.fromkeys(keys) if key not in self._waiting]
            if added:
                self._write(b"+", added)
                self._waiting.update(dict.fromkeys(added))

    def remove(self, key: ChunkKey) -> None:
        with self._lock:
            if key not in self._waiting or self._file is None:
                return
            del self._waiting[key]
            if not self._waiting:
                os.ftruncate(self._file[1], 0)
                self._records = 0
            elif self._records > max(_FEW_RECORDS, 4 * len(self._waiting)):
                self._forget_file(self._begin(list(self._waiting)))
            else:
                self._write(b"-", [key])

    def take_over(self) -> list[ChunkKey]:
        if not self._path.is_dir():
            return []
        found: dict[ChunkKey, None] = {}
        left: list[tuple[Path, int]] = []
        try:
            with self._folder.locked():
                for file in self._path.glob("*.keys"):
                    if self._file is None or file != self._file[0]:
                        with suppress(FileNotFoundError, BlockingIOError, PermissionError):
                            left.append((file, _locked(file, os.O_RDONLY)))
                for _, descriptor in left:
                    found.update(dict.fromkeys(_noted(descriptor)))
            self.add(found)
            for file, _ in left:
                file.unlink()
        finally:
            for _, descriptor in left:
                os.close(descriptor)
        return list(found)

    def close(self) -> None:
        with self._lock:
            file, self._file = self._file, None
            if file is not None:
                if self._waiting:
                    os.close(file[1])
                else:
                    self._forget_file(file)

    def _write(self, sign: bytes, keys: Iterable[ChunkKey]) -> None:
        if self._file is None:
            self._begin([])
        assert self._file is not None
        records = b"".join(sign + key for key in keys)
        write_all(self._file[1], memoryview(records))
        if sign == b"+":
            os.fdatasync(self._file[1])
        self._records += len(records) // _RECORD_BYTES

    def _begin(self, keys: list[ChunkKey]) -> tuple[Path, int] | None:
        """Begin a new file with these keys. Returns the one before."""
        before = self._file
        with self._folder.locked():  # so that nobody takes it for a dead process's before it is locked
            make_folder(self._path, self._folder.ownership)
            file = self._path / f"{secrets.token_hex(8)}.keys"
            self._file = file, _locked(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL)
            self._folder.ownership.give(self._file[1])
        self._records = 0
        if keys:
            self._write(b"+", keys)
        sync_folder(self._path)
        return before

    @staticmethod
    def _forget_file(file: tuple[Path, int] | None) -> None:
        if file is not None:
            file[0].unlink(missing_ok=True)
            os.close(file[1])


def _locked(file: Path, flags: int) -> int:
    """Open a file and lock it; raises `BlockingIOError` if a living process has it."""
    descriptor = os.open(file, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _noted(descriptor: int) -> dict[ChunkKey, None]:
    """The chunks that wait, by a file of notes; a record that is cut off is none."""
    waiting: dict[ChunkKey, None] = {}
    with open(descriptor, "rb", closefd=False) as stream:
        while len(record := stream.read(_RECORD_BYTES)) == _RECORD_BYTES:
            key = ChunkKey(record[1:])
            if record[:1] == b"+":
                waiting[key] = None
            else:
                waiting.pop(key, None)
    return waiting

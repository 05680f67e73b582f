"""What a tier removed: the last chunks and why, to explain misses; and how much it evicted, summed up in the log."""

from __future__ import annotations

import logging
import os
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from xxhash import xxh3_64_intdigest

from cakekv.keys import ChunkKey
from cakekv.logs import emit
from cakekv.quantities import is_time
from cakekv.store.base import Evicted, Removal

CAPACITY, REQUEST = "capacity", "request"
REASONS = (CAPACITY, REQUEST)

MAX_BYTES = 1 << 20
"""Length of each of the two files, at most."""
MOST_REMEMBERED = 1 << 14
"""Removals that are remembered in memory."""

SUMMARY_S = 10.0
"""Seconds between two summaries of evictions at least."""

_LOG = logging.getLogger(__name__)
_FIELDS = struct.Struct("<32sdB7x")
_RECORD = struct.Struct(f"<{_FIELDS.size}sQ")
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class RecentRemovals:
    """In memory. Whoever uses it sees to it that no two threads do at once."""

    def __init__(self) -> None:
        self._removals: OrderedDict[ChunkKey, Removal] = OrderedDict()

    def note(self, keys: Iterable[ChunkKey], reason: str) -> None:
        """These chunks have just been removed."""
        removal = Removal(time.time(), reason)
        for key in keys:
            self._removals[key] = removal
            self._removals.move_to_end(key)
        while len(self._removals) > MOST_REMEMBERED:
            self._removals.popitem(last=False)

    def find(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, Removal]:
        """The last removal of each chunk, as far as it is remembered."""
        return {key: self._removals[key] for key in keys if key in self._removals}


class RemovalLog:
    """In two files that take turns: when the first is full it becomes the second, and the former second is gone.

    A record has a fixed length and a checksum, and is appended, not synced: after a crash the last ones may be missing
    or torn, which costs their explanations. Whoever writes holds the folder's lock.

    Parameters
    ----------
    file : Path
        The first file; the second has ".old" behind its name.
    max_bytes : int
        Length of each, at most.
    give : callable
        Makes a new file's owner and mode what they should be, by its descriptor.
    """

    def __init__(
        self, file: Path, max_bytes: int = MAX_BYTES, give: Callable[[int], None] = lambda descriptor: None
    ) -> None:
        self._file = file
        self._old = file.with_name(f"{file.name}.old")
        self._give = give
        self._max_records = max_bytes // _RECORD.size

    def note(self, keys: Sequence[ChunkKey], reason: str) -> None:
        """These chunks have just been removed. That it cannot be written is no error: nothing depends on it."""
        if not keys:
            return
        now = time.time()
        fields = (_FIELDS.pack(key, now, REASONS.index(reason)) for key in keys[-self._max_records :])
        data = b"".join(_RECORD.pack(part, xxh3_64_intdigest(part)) for part in fields)
        with suppress(OSError):
            descriptor = self._opened()
            try:
                # Where a torn record ends, if one was left, is where the next begins.
                at = os.fstat(descriptor).st_size // _RECORD.size * _RECORD.size
                if at and at + len(data) > self._max_records * _RECORD.size:
                    self._file.replace(self._old)
                    full, descriptor, at = descriptor, self._opened(), 0
                    os.close(full)
                os.pwrite(descriptor, data, at)
            finally:
                os.close(descriptor)

    def find(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, Removal]:
        """The last removal of each chunk, as far as it is remembered."""
        wanted = set(keys)
        return {key: removal for key, removal in self._records() if key in wanted}  # the later ones win

    def _opened(self) -> int:
        with suppress(FileExistsError):
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
            self._give(descriptor)
            return descriptor
        return os.open(self._file, os.O_WRONLY | _FLAGS)

    def _records(self) -> Iterator[tuple[ChunkKey, Removal]]:
        for file in (self._old, self._file):
            try:
                with open(os.open(file, os.O_RDONLY | _FLAGS), "rb") as stream:
                    data = stream.read(self._max_records * _RECORD.size)
            except OSError:
                continue
            for fields, checksum in _RECORD.iter_unpack(data[: len(data) // _RECORD.size * _RECORD.size]):
                if xxh3_64_intdigest(fields) == checksum:
                    key, at, reason = _FIELDS.unpack(fields)
                    yield ChunkKey(key), Removal(at if is_time(at) else 0.0, REASONS[min(reason, len(REASONS) - 1)])


class Evictions:
    """Counts one tier's evictions. Whoever calls `add` holds the tier's lock.

    Parameters
    ----------
    tier : str
        Its name.
    """

    def __init__(self, tier: str) -> None:
        self.total = self._told = Evicted()
        self._tier = tier
        self._told_at = float("-inf")

    def add(self, size: int) -> None:
        """A chunk of `size` bytes was evicted."""
        self.total = Evicted(self.total.chunks + 1, self.total.bytes + size)
        now = time.monotonic()
        if now - self._told_at >= SUMMARY_S:
            chunks, size = self.total.chunks - self._told.chunks, self.total.bytes - self._told.bytes
            emit(_LOG, logging.INFO, "evicted", tier=self._tier, chunks=chunks, bytes=size)
            self._told, self._told_at = self.total, now

"""Fetches what waiting requests will need from slower tiers into the fastest one, before their turn.

As in CachedAttention (arXiv 2403.19708, section 3.3.1): in the order of the queue, and no more than the fastest tier
has room for. Which chunks that one spares meanwhile is its eviction policy's business (`eviction.lookahead`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from cakekv.errors import CakeError, StoreError
from cakekv.keys import ChunkKey
from cakekv.store.base import Expected, Prefetch
from cakekv.store.member import Member

ANNOUNCED = 64
"""Prompts that were announced, and are looked after at a time; the latest ones."""
ANNOUNCED_S = 600.0
"""Seconds after which a prompt that was announced is not waited for any more."""
_MOST_ASKED = 64
"""Requests of the queue that are looked at."""
_JOIN_S = 1.0
_LOOK_S = 0.02

_LOG = logging.getLogger(__name__)


class LookAhead:
    """Fetches one chunk at a time, in a thread of its own, so that restores hardly notice.

    Parameters
    ----------
    front : sequence of Member
        The tier to fetch into; empty if there is none.
    behind : sequence of Member
        Those to fetch from.
    read : callable
        A chunk's bytes, from another tier than this one; None if none has it.
    """

    def __init__(
        self,
        front: Sequence[Member],
        behind: Sequence[Member],
        read: Callable[[ChunkKey, Member], memoryview | None],
    ) -> None:
        self._front = front[0] if front and behind else None
        self._behind = behind
        self._read = read
        self._changed = threading.Condition()
        self._told: Sequence[Expected] = ()
        self._announced: OrderedDict[object, tuple[float, Expected]] = OrderedDict()
        self._gone: set[ChunkKey] = set()
        """Chunks that were deleted since the queue last changed."""
        self._version = self._done = 0
        """Of the queue, and of the one that all was fetched for."""
        self._thread: threading.Thread | None = None
        self._closed = False
        self.fetched = 0
        """Chunks."""

    @property
    def queue(self) -> list[Expected]:
        """Who waits, the next one first; who was announced comes after who has come."""
        with self._changed:
            until = time.monotonic() - ANNOUNCED_S
            while self._announced and next(iter(self._announced.values()))[0] < until:
                self._announced.popitem(last=False)
            return [*self._told, *(one for _, one in self._announced.values())]

    def tell(self, queue: Sequence[Expected]) -> list[Expected]:
        """These wait now. Returns who else does."""
        with self._changed:
            self._told = list(queue)
        self._wake()
        return self.queue[len(queue) :]

    def announce(self, one: Expected) -> Prefetch:
        """This prompt will come. Returns what will be fetched of it."""
        if self._front is None:
            return Prefetch()
        sizes = dict(self._missing([one]))
        held = sum(size is not None for size in self._lookup(self._front, one.keys))
        with self._changed:
            self._announced.pop(one.name, None)
            self._announced[one.name] = time.monotonic(), one
            while len(self._announced) > ANNOUNCED:
                self._announced.popitem(last=False)
        self._wake()
        return Prefetch(len(sizes), sum(sizes.values()), held)

    def drop(self, keys: Sequence[ChunkKey]) -> None:
        """These were deleted."""
        with self._changed:
            self._gone.update(keys)

    def flush(self) -> None:
        """Wait until everything is fetched, or cannot be."""
        while self._done < self._version and self._front is not None and self._front.is_up and not self._closed:
            time.sleep(_LOOK_S)

    def close(self) -> None:
        """Fetch nothing more. A tier that hangs is not waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _wake(self) -> None:
        if self._front is None:
            return
        wanted = any(one.fetch for one in self.queue)
        with self._changed:
            self._gone.clear()
            self._version += 1
            if self._thread is None and wanted and not self._closed:
                self._thread = threading.Thread(target=self._work, name="cakekv-lookahead", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # the system has no thread to spare: chunks are loaded from where they are
                    self._thread = None
            if self._thread is None:
                self._done = self._version
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._done < self._version or self._closed)
                if self._closed:
                    return
                version = self._version
            try:
                self._fetch(version)
            except CakeError as error:
                _LOG.debug("nothing more is fetched for the requests that wait: %s", error)
            except Exception:  # such as no memory: chunks are loaded from where they are
                _LOG.exception("chunks could not be fetched for the requests that wait")
            self._done = max(self._done, version)

    def _fetch(self, version: int) -> None:
        front = self._front
        assert front is not None
        for key, _ in self._missing([one for one in self.queue if one.fetch][:_MOST_ASKED]):
            data = self._read(key, front)
            if self._version != version or self._closed:
                return
            if data is not None and key not in self._gone and front.write(key, data):
                self.fetched += 1

    def _missing(self, queue: Sequence[Expected]) -> Iterator[tuple[ChunkKey, int]]:
        """What is to be fetched, with its bytes, until the front is full of what these requests need."""
        front = self._front
        assert front is not None
        room, seen = self._room(), set[ChunkKey]()
        for one in queue:
            keys = [key for key in one.keys if key not in seen]
            seen.update(keys)
            held = self._lookup(front, keys)
            behind = [self._lookup(member, keys) for member in self._behind]
            for key, size, *others in zip(keys, held, *behind, strict=True):
                needed = next((found for found in (size, *others) if found is not None), 0)
                if room is not None:
                    room -= needed
                    if room < 0:
                        return
                if size is None and needed:
                    yield key, needed

    def _room(self) -> int | None:
        """Bytes that the front may take up with this; None: no bound."""
        front = self._front
        assert front is not None
        capacity = front.stats().capacity if all(part.counts_cheaply for part in front.parts) else None
        return None if capacity is None else max(0, capacity - front.pins().bytes)

    @staticmethod
    def _lookup(member: Member, keys: Sequence[ChunkKey]) -> Sequence[int | None]:
        try:
            return member.lookup(keys) if keys else []
        except StoreError:
            return [None] * len(keys)

"""What requests ask of the stores, and what the queue says they will need: told to the stores beside the scheduler.

A tier that hangs holds up the hints behind it, and nothing else.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cakekv.errors import CakeError
from cakekv.keys import ChunkKey
from cakekv.store.base import Expected, Store
from cakekv.vllm.complaints import Complaints
from cakekv.vllm.scheduling.request_options import RequestOptions
from cakekv.vllm.threads import start_thread

MOST_WAITING = 1024
"""Hints that may wait to be told; more than that are complained of."""
LOOKED_AT = 64
"""Requests of the queue that the stores are told of."""
WAITS_S = 1.0
"""Seconds after which a request counts as one that waits; most begin before anything could be fetched for them."""


@dataclass
class _Seen:
    """A request in the queue."""

    since: float
    keys: Sequence[ChunkKey]


class Hints:
    """Called by the scheduler, which never waits for it.

    Parameters
    ----------
    store : Store
        Where chunks are.
    shards : sequence of callable
        From a chunk's key to those of its shards.
    shard_bytes : int
        Of a shard that is not stored yet.
    """

    def __init__(self, store: Store, shards: Sequence[Callable[[ChunkKey], ChunkKey]], shard_bytes: int) -> None:
        self._store = store
        self._shards = shards
        self._shard_bytes = shard_bytes
        self.fetches = len(store.tiers) > 1
        """Whether there is anything to fetch ahead."""
        self._changed = threading.Condition()
        self._waiting: deque[Callable[[], object]] = deque()
        self._queue: Sequence[tuple[str, Sequence[ChunkKey]]] | None = None
        """The queue, if the store has not been told of it."""
        self._told: tuple[str, ...] = ()
        self._seen: dict[str, _Seen] = {}
        self._names: dict[str, ChunkKey] = {}
        """Of requests that end a pin, the prompt's name."""
        self._thread: threading.Thread | None = None
        self._closed = False
        self._complaints = Complaints("a request's hint was not followed")

    def arrived(self, request_id: str, keys: Sequence[ChunkKey], own: RequestOptions) -> None:
        """A request came; `keys` are its prompt's."""
        if not keys:
            return
        name, keys = keys[-1], list(keys)
        if own.release:
            self._names[request_id] = name
        if own.pin_s:
            self._put(lambda: self._store.pin(name, self._sharded(keys), own.pin_s, self._shard_bytes))
        if own.prefetch:
            self._put(lambda: self._store.prefetch(name, self._sharded(keys)))

    def finished(self, request_id: str) -> None:
        """The request is over."""
        self._seen.pop(request_id, None)
        name = self._names.pop(request_id, None)
        if name is not None:
            self._put(lambda: self._store.release(name))

    def queue(self, waiting: Sequence[str], keys_of: Callable[[str], Sequence[ChunkKey]], now: float) -> None:
        """These requests have not begun, the next one first."""
        seen = {name: self._seen.get(name) or _Seen(now, keys_of(name)) for name in waiting}
        self._seen = seen
        names = tuple(name for name, one in seen.items() if now - one.since >= WAITS_S and one.keys)
        if names != self._told:
            self._told = names
            with self._changed:
                self._queue = [(name, list(seen[name].keys)) for name in names]
            self._wake()

    def close(self) -> None:
        """Tell nothing more. What hangs is not waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is told; returns whether it was, in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and self._queue is None, timeout_s)

    def _put(self, hint: Callable[[], object]) -> None:
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                self._complaints.say(f"{MOST_WAITING:,} wait already for a store that does not answer")
                return
            self._waiting.append(hint)
        self._wake()

    def _wake(self) -> None:
        with self._changed:
            if self._thread is None and not self._closed:
                self._thread = start_thread("cakekv-hints", self._work)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._queue is not None or self._closed)
                if self._closed:
                    return
                hint = self._waiting[0] if self._waiting else None
                queue = self._queue
            try:
                if hint is not None:
                    hint()
                elif queue is not None:
                    self._store.expect([Expected(name, self._sharded(keys)) for name, keys in queue])
            except CakeError as error:
                self._complaints.say(str(error))
            except Exception:
                self._complaints.say("the store failed in a way that no store should", exc_info=True)
            with self._changed:
                if hint is not None:
                    self._waiting.popleft()
                elif self._queue is queue:
                    self._queue = None
                self._changed.notify_all()

    def _sharded(self, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
        return [shard(key) for key in keys for shard in self._shards]

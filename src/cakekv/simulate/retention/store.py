"""What the trace is replayed against: a tier with nothing in it but its policy, or a real one with empty chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

from cakekv.chunk import PEEK_BYTES, ChunkShape, seal
from cakekv.keys import ChunkKey
from cakekv.store.base import Store
from cakekv.store.eviction.base import Eviction, Held
from cakekv.store.memory import MemoryStore


class Retained(Protocol):
    """What a replay needs of a store. Times are seconds."""

    def holds(self, keys: Sequence[ChunkKey], now: float) -> list[bool]:
        """Which of these chunks are stored."""

    def read(self, key: ChunkKey, now: float) -> None:
        """Read a chunk that is stored."""

    def write(self, key: ChunkKey, position: int, now: float) -> bool:
        """Store a chunk; whether it was kept."""


class PolicyOnly:
    """A tier of which there is only the policy; it evicts as `MemoryStore` does.

    Parameters
    ----------
    policy : Eviction
        New.
    capacity : int
        In chunks.
    chunk_tokens, chunk_bytes : int
        Of every chunk.
    """

    def __init__(self, policy: Eviction, capacity: int, chunk_tokens: int, chunk_bytes: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self._chunk_tokens = chunk_tokens
        self._chunk_bytes = chunk_bytes

    def holds(self, keys: Sequence[ChunkKey], now: float) -> list[bool]:
        self.policy.asked(keys, now)
        return [self.policy.get(key) is not None for key in keys]

    def read(self, key: ChunkKey, now: float) -> None:
        self.policy.read(key, now)

    def write(self, key: ChunkKey, position: int, now: float) -> bool:
        self.policy.removed(key)
        while len(self.policy) >= self.capacity:
            self.policy.evict(now)
        self.policy.wrote(Held(key, self._chunk_bytes, now, position, self._chunk_tokens))
        return True


class RealStore:
    """A `MemoryStore` filled with chunks of which there is only the beginning of the header, and on the trace's clock.

    Parameters
    ----------
    policy : Eviction
        New.
    capacity : int
        In chunks.
    chunk_tokens : int
        Of every chunk.
    wrap : callable
        What to put around the store, such as a rule of what is written.
    """

    def __init__(
        self, policy: Eviction, capacity: int, chunk_tokens: int, wrap: Callable[[Store], Store] = lambda store: store
    ) -> None:
        self._now = 0.0
        self._store = wrap(MemoryStore(capacity * PEEK_BYTES, policy, clock=lambda: self._now))
        self._chunk_tokens = chunk_tokens

    def holds(self, keys: Sequence[ChunkKey], now: float) -> list[bool]:
        self._now = now
        return [size is not None for size in self._store.lookup(keys)]

    def read(self, key: ChunkKey, now: float) -> None:
        self._now = now
        self._store.open(key).close()

    def write(self, key: ChunkKey, position: int, now: float) -> bool:
        self._now = now
        return self._store.write(key, memoryview(_header(self._chunk_tokens, position)))


@cache
def _header(tokens: int, position: int) -> bytes:
    shape = ChunkShape(tokens, (1,))
    data = bytearray(shape.total_bytes)
    seal(shape, memoryview(data), ChunkKey(bytes(ChunkKey.LENGTH)), position)
    return bytes(data[:PEEK_BYTES])


@cache
def key_of(block: int) -> ChunkKey:
    """The key of a trace's block."""
    return ChunkKey(hashlib.sha256(block.to_bytes(8, "little")).digest())

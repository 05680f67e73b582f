"""Chunks to fill stores with."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from functools import cache

from cakekv.chunk import ChunkShape, seal
from cakekv.keys import ChunkKey
from cakekv.store.base import Store

SHAPE = ChunkShape(16, (9000, 3000))
SIZE = SHAPE.total_bytes


def key_of(number: object) -> ChunkKey:
    return ChunkKey(hashlib.sha256(str(number).encode()).digest())


def chunk_of(number: int, position: int = 0) -> memoryview:
    """A sealed chunk, different for every number; the caller's to change."""
    return memoryview(bytearray(_sealed(number, position)))


@cache
def _sealed(number: int, position: int) -> bytes:
    data = bytearray(random.Random(number).randbytes(SIZE))
    seal(SHAPE, memoryview(data), key_of(number), position)
    return bytes(data)


def opener(store: Store) -> Callable[[], Store]:
    """What a `Member` opens: a store that is open."""
    return lambda: store


def read(store: Store, key: ChunkKey) -> bytes:
    with store.open(key) as reader:
        buffer = memoryview(bytearray(reader.size))
        assert reader.read_into(buffer, 0) == reader.size
        return bytes(buffer)

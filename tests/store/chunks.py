"""Chunks to fill stores with."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import numpy as np

from cakekv.chunk import ChunkShape, Form, seal, segments
from cakekv.keys import ChunkKey
from cakekv.store.base import Store
from cakekv.store.maintenance.walking import walk

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


PACKABLE = ChunkShape(16, (90000, 0, 30000))


def packable_chunk_of(number: int, position: int = 0) -> memoryview:
    """As `chunk_of`, of numbers in bfloat16, as a cache holds them."""
    data = memoryview(bytearray(PACKABLE.total_bytes))
    values = np.random.default_rng(number).standard_normal(60000).astype(np.float32)
    numbers = memoryview((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    first, _, last = segments(PACKABLE, data)
    first[:], last[:] = numbers[: len(first)], numbers[len(first) :]
    seal(PACKABLE, data, key_of(number), position)
    return data


def coded_chunk_of(number: int) -> memoryview:
    """As `chunk_of`, of what a codec made."""
    shape = ChunkShape(16, (300, 100, 20000), Form.CODED)
    data = memoryview(bytearray(shape.total_bytes))
    seal(shape, data, key_of(number), 0)
    return data


Kind = TypeVar("Kind", bound=Store)


def part_of(store: Store, kind: type[Kind]) -> Kind:
    """The one part of a store that is of this kind."""
    [part] = [part for part in walk(store) if isinstance(part, kind)]
    return part


def read(store: Store, key: ChunkKey) -> bytes:
    with store.open(key) as reader:
        buffer = memoryview(bytearray(reader.size))
        assert reader.read_into(buffer, 0) == reader.size
        return bytes(buffer)

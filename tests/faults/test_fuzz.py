"""The chunk parser under mutated headers: it says what is wrong, or the chunk is as it was sealed. Nothing else."""

from __future__ import annotations

import random
import struct
from collections import Counter

import pytest
from xxhash import xxh3_128

from cakekv.chunk import ALIGNMENT, ChunkShape, Form, header_bytes_of, peek_place, read_header, seal, verify_chunk
from cakekv.errors import CorruptChunk
from cakekv.keys import ChunkKey

INPUTS, LONG_INPUTS = 50_000, 1_000_000

SHAPES = [
    ChunkShape(1, (1, 1)),
    ChunkShape(16, (500, 0, 4096, 1)),
    ChunkShape(64, (90, 8, 130), Form.CODED),
    ChunkShape(7, (3,) * 130, Form.CODED),  # a header of two blocks
    ChunkShape(16, (90, 0, 130), Form.PACKED, (500, 0, 4096)),
]
EXTREMES = (
    0,
    1,
    2,
    3,
    63,
    64,
    95,
    96,
    127,
    4095,
    4096,
    8192,
    2**16,
    2**31,
    2**32 - 1,
    2**32,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
FIELDS = [(8, "<I"), (12, "<I"), (16, "<Q"), (24, "<Q"), (32, "<Q"), (64, "<Q"), (72, "<Q"), (80, "<Q")]
"""Offsets and types of the header's numbers; behind them the table."""


def sealed(shape: ChunkShape, seed: int) -> bytes:
    chunk = bytearray(random.Random(seed).randbytes(shape.total_bytes))
    seal(shape, memoryview(chunk), ChunkKey(bytes([seed] * 32)), 16 * seed)
    return bytes(chunk)


def mutate(chunks: list[bytes], choose: random.Random) -> tuple[bytearray, bytes]:
    """A chunk with one to three changes, mostly to its header, and what it was."""
    original = choose.choice(chunks)
    chunk = bytearray(original)
    for _ in range(choose.randint(1, 3)):
        kind = choose.random()
        if kind < 0.6:
            offset, form = choose.choice(FIELDS)
            if choose.random() < 0.5:
                offset, form = 96 + 8 * choose.randrange(4 * 130), "<Q"
            value = choose.choice(EXTREMES) if choose.random() < 0.7 else choose.getrandbits(64)
            if offset + 8 <= len(chunk):
                struct.pack_into(form, chunk, offset, value % 2 ** (8 * struct.calcsize(form)))
        elif kind < 0.75 and chunk:
            place = choose.randrange(min(len(chunk), 300) if choose.random() < 0.7 else len(chunk))
            chunk[place] ^= 1 << choose.randrange(8)
        elif kind < 0.85:
            other = choose.choice(chunks)
            begin = choose.randrange(0, 4096, 8)
            chunk[begin : begin + 64] = other[begin : begin + 64]
        elif kind < 0.95:
            del chunk[choose.randrange(len(chunk) + 1) :]
        else:
            chunk += choose.randbytes(choose.randrange(1, 5000))
    if choose.random() < 0.6 and len(chunk) >= 96:  # as somebody would who knows the format
        header_bytes = min(struct.unpack_from("<Q", chunk, 16)[0], len(chunk))
        chunk[80:96] = xxh3_128(chunk[:80] + chunk[96:header_bytes]).digest()
    return chunk, original


@pytest.mark.timeout(900)
def test_mutated_chunks(long: bool) -> None:
    seed = random.randrange(10**6)
    choose, outcomes = random.Random(seed), Counter[str]()
    chunks = [sealed(shape, number) for number, shape in enumerate(SHAPES)]
    for number in range(LONG_INPUTS if long else INPUTS):
        chunk, original = mutate(chunks, choose)
        view, where = memoryview(chunk), f"seed {seed}, input {number}"
        position, tokens = peek_place(view)
        assert position >= 0, where
        assert tokens >= 1, where
        size = choose.choice([len(chunk), len(original), choose.getrandbits(64)])
        try:
            length = header_bytes_of(view[:ALIGNMENT], size)
            assert ALIGNMENT <= length <= size, where
            header = read_header(view, size)
            assert header.total_bytes == size, where
            assert all(0 <= offset <= size for offset in header.offsets), where
            outcomes["a header"] += 1
        except CorruptChunk as error:
            outcomes[error.fault.name] += 1
        try:
            verify_chunk(view)
            assert chunk == original, f"{where}: bytes that were never sealed got through"
            outcomes["as it was"] += 1
        except CorruptChunk as error:
            assert chunk != original, where
            outcomes[error.fault.name] += 1
    print(f"seed {seed}: {dict(outcomes)}")
    assert len(outcomes) >= 12, f"not all checks were met: {outcomes}"

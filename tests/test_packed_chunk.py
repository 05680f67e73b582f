"""The packed form of a chunk: the same bits in fewer bytes, and nothing else."""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np
import pytest
from xxhash import xxh3_128

from cakekv.chunk import ChunkShape, Form, is_packed, peek_form, peek_place, read_header, seal, segments, verify_chunk
from cakekv.errors import BadInput, CannotUnpack, ChunkFault, CorruptChunk
from cakekv.keys import ChunkKey
from cakekv.packed_chunk import pack_chunk, unpack_chunk

KEY = ChunkKey(bytes(range(32)))
SHAPE = ChunkShape(16, (9000, 0, 12000, 2))
POSITION = 48


def numbers(size: int, seed: int = 0) -> bytes:
    """So many bytes of bfloat16, as a cache holds them."""
    values = np.random.default_rng(seed).standard_normal(size // 2 + 1).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:size]


def exact(shape: ChunkShape = SHAPE, seed: int = 0) -> memoryview:
    chunk = memoryview(bytearray(shape.total_bytes))
    for layer, segment in enumerate(segments(shape, chunk)):
        segment[:] = numbers(len(segment), seed + layer)
    seal(shape, chunk, KEY, POSITION)
    return chunk


def packed(seed: int = 0) -> memoryview:
    chunk = pack_chunk(exact(seed=seed))
    assert chunk is not None
    return chunk


def fault_of(chunk: Any) -> ChunkFault:
    with pytest.raises(CorruptChunk) as caught:
        unpack_chunk(memoryview(chunk))
    return caught.value.fault


def test_the_same_bits_come_back() -> None:
    chunk, before = packed(), exact()
    assert len(chunk) < len(before)
    assert is_packed(len(chunk))
    assert not is_packed(len(before))
    assert (peek_form(chunk), peek_place(chunk)) == (Form.PACKED, (POSITION, 16))
    header = verify_chunk(chunk)
    assert (header.key, header.position, header.shape.exact) == (KEY, POSITION, SHAPE)
    assert unpack_chunk(chunk) == before


def test_the_format_never_changes() -> None:
    """A change here needs a new format version."""
    chunk = bytes(packed())
    version, layers, header_bytes, total_bytes = struct.unpack_from("<IIQQ", chunk, 8)
    assert (version, layers, header_bytes, total_bytes) == (3, 4, 4096, len(chunk))
    entries = [struct.unpack_from("<QQ16sQ", chunk, 96 + 40 * layer) for layer in range(4)]
    assert [unpacked for *_, unpacked in entries] == list(SHAPE.segment_bytes)
    begin = 4096
    for layer, (offset, length, checksum, unpacked) in enumerate(entries):
        assert offset == begin
        binding = KEY + struct.pack("<QQIQ", POSITION, 16, layer, unpacked)
        assert checksum == xxh3_128(binding + chunk[offset : offset + length]).digest()
        begin += -(-length // 64) * 64
    assert total_bytes == begin + 64 * (begin % 4096 == 0)


def test_what_does_not_shrink_is_not_packed() -> None:
    chunk = exact()
    noise = random.Random(0)
    for segment in segments(SHAPE, chunk):
        segment[:] = noise.randbytes(len(segment))
    shape = ChunkShape(16, (4096 * 8,))
    chunk = memoryview(bytearray(noise.randbytes(shape.total_bytes)))
    seal(shape, chunk, KEY, POSITION)
    assert pack_chunk(chunk) is None


def test_damage_is_not_sealed_anew() -> None:
    """Neither way: packing and unpacking check what they are given."""
    chunk = exact()
    chunk[5000] ^= 1
    with pytest.raises(CorruptChunk) as caught:
        pack_chunk(chunk)
    assert caught.value.fault is ChunkFault.SEGMENT_CHECKSUM
    damaged = packed()
    damaged[5000] ^= 1
    assert fault_of(damaged) is ChunkFault.SEGMENT_CHECKSUM


def test_only_packed_chunks_are_unpacked() -> None:
    with pytest.raises(BadInput, match="not packed"):
        unpack_chunk(exact())


def resealed(lengths: tuple[int, ...] = SHAPE.segment_bytes, **bodies: bytes) -> memoryview:
    """A packed chunk as a hostile writer would make it: some segments replaced, and all sums right."""
    chunk = packed()
    header = read_header(chunk, len(chunk))
    parts = [bytes(segment) for segment in segments(header.shape, chunk)]
    for name, body in bodies.items():
        parts[int(name.removeprefix("layer"))] = body
    shape = ChunkShape(16, tuple(map(len, parts)), Form.PACKED, lengths)
    made = memoryview(bytearray(shape.total_bytes))
    for segment, part in zip(segments(shape, made), parts, strict=True):
        segment[:] = part
    seal(shape, made, KEY, POSITION)
    return made


@pytest.mark.parametrize(
    ("chunk", "faults"),
    [
        (lambda: resealed(layer0=b""), {ChunkFault.WRONG_SHAPE}),
        (lambda: resealed(layer1=b"\1"), {ChunkFault.WRONG_SHAPE, ChunkFault.UNDECODABLE}),
        (lambda: resealed(layer0=b"\xff" * 3000), {ChunkFault.WRONG_SHAPE, ChunkFault.UNDECODABLE}),
        (lambda: resealed((9000, 0, 11999, 2)), {ChunkFault.WRONG_SHAPE}),
        (lambda: resealed((2**62, 0, 12000, 2)), {ChunkFault.OVERLONG}),
        (lambda: packed()[:-64], {ChunkFault.TRUNCATED}),
    ],
)
def test_hostile_chunks_are_named(chunk: Any, faults: set[ChunkFault]) -> None:
    assert fault_of(chunk()) in faults


def test_a_cut_segment_is_undecodable() -> None:
    chunk = packed()
    first = segments(verify_chunk(chunk).shape, chunk)[0]
    assert fault_of(resealed(layer0=bytes(first[:-200]))) in {ChunkFault.UNDECODABLE, ChunkFault.WRONG_SHAPE}


def test_mutated_segments_are_named_or_unpack() -> None:
    """Whoever knows the format can make all sums right: then unpacking finds the fault, or fills the segment."""
    choose = random.Random(random.randrange(10**6))
    chunk = packed()
    original = bytes(segments(verify_chunk(chunk).shape, chunk)[0])
    faults = set()
    for _ in range(300):
        body = bytearray(original)
        for _ in range(choose.randint(1, 4)):
            body[choose.randrange(len(body) if choose.random() < 0.3 else 64)] = choose.randrange(256)
        if choose.random() < 0.2:
            del body[choose.randrange(len(body)) :]
        made = resealed(layer0=bytes(body))
        try:
            unpacked = unpack_chunk(made)
        except CorruptChunk as error:
            faults.add(error.fault)
        else:
            assert verify_chunk(unpacked).shape == SHAPE
            assert segments(SHAPE, unpacked)[2] == segments(SHAPE, exact())[2]
    assert ChunkFault.UNDECODABLE in faults
    assert faults <= {ChunkFault.UNDECODABLE, ChunkFault.WRONG_SHAPE}


def test_without_numba_it_is_said_what_to_install(request: pytest.FixtureRequest) -> None:
    chunk = packed()
    request.getfixturevalue("without_numba")
    for attempt in (lambda: unpack_chunk(chunk), lambda: pack_chunk(exact())):
        with pytest.raises(CannotUnpack, match=r"pip install 'cakekv\[codecs\]'"):
            attempt()

"""The chunk format: what is sealed comes back, and nothing else does."""

from __future__ import annotations

import random
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128

from cakekv.chunk import (
    ALIGNMENT,
    FORMAT_VERSION,
    MAGIC,
    TIGHT,
    ChunkShape,
    Form,
    header_bytes_of,
    is_packed,
    read_header,
    seal,
    segments,
    verify_chunk,
)
from cakekv.errors import BadInput, ChunkFault, CorruptChunk
from cakekv.keys import ChunkKey

KEY = ChunkKey(bytes(range(32)))
SHAPE = ChunkShape(16, (5000, 0, 4096, 1))
POSITION = 32

# The header's fields, told independently of the code: name -> (offset, struct format).
FIELDS = {
    "version": (8, "<I"),
    "layers": (12, "<I"),
    "header_bytes": (16, "<Q"),
    "total_bytes": (24, "<Q"),
    "key": (32, "32s"),
    "position": (64, "<Q"),
    "tokens": (72, "<Q"),
    "checksum": (80, "16s"),
    "first offset": (96, "<Q"),
    "first length": (104, "<Q"),
    "second offset": (128, "<Q"),
    "last length": (200, "<Q"),
}


def make(shape: Any = SHAPE, key: ChunkKey = KEY, position: Any = POSITION, seed: int = 0) -> Any:
    chunk = bytearray(random.Random(seed).randbytes(shape.total_bytes))
    seal(shape, memoryview(chunk), key, position)
    return chunk


def change(chunk: Any, **values: Any) -> Any:
    """Set fields of the header and make its checksum right again, as a hostile writer would."""
    for name, value in values.items():
        offset, form = FIELDS[name.replace("__", " ")]
        struct.pack_into(form, chunk, offset, value)
    header_bytes = struct.unpack_from("<Q", chunk, 16)[0]
    struct.pack_into("16s", chunk, 80, xxh3_128(chunk[:80] + chunk[96:header_bytes]).digest())
    return chunk


def fault_of(chunk: Any) -> Any:
    with pytest.raises(CorruptChunk) as caught:
        verify_chunk(memoryview(chunk))
    return caught.value.fault


def test_the_format_never_changes() -> None:
    """A change here needs a new format version."""
    assert FORMAT_VERSION == 1
    chunk = make()
    assert chunk[:8] == MAGIC == b"\x89CAKEKV\n"
    read = {name: struct.unpack_from(form, chunk, offset)[0] for name, (offset, form) in FIELDS.items()}
    assert read == {
        "version": 1,
        "layers": 4,
        "header_bytes": 4096,
        "total_bytes": 5 * 4096,
        "key": KEY,
        "position": 32,
        "tokens": 16,
        "checksum": xxh3_128(chunk[:80] + chunk[96:4096]).digest(),
        "first offset": 4096,
        "first length": 5000,
        "second offset": 3 * 4096,
        "last length": 1,
    }
    binding = KEY + struct.pack("<QQI", POSITION, 16, 0)
    assert chunk[112:128] == xxh3_128(binding + chunk[4096 : 4096 + 5000]).digest()


def shaped(tokens: int, lengths: Any, form: Form) -> ChunkShape:
    return ChunkShape(tokens, lengths, form, tuple(3 * n for n in lengths) if form is Form.PACKED else ())


shapes = st.builds(
    shaped,
    st.integers(1, 1000),
    st.lists(st.one_of(st.integers(0, 300), st.sampled_from([4095, 4096, 4097])), min_size=1, max_size=150)
    .filter(any)
    .map(tuple),
    st.sampled_from(Form),
)


@settings(deadline=None)
@given(shapes, st.binary(min_size=32, max_size=32).map(ChunkKey), st.integers(0, 2**63 - 1), st.integers())
def test_what_is_sealed_comes_back(shape: Any, key: ChunkKey, position: Any, seed: int) -> None:
    chunk = bytearray(random.Random(seed).randbytes(shape.total_bytes + 10))
    view = memoryview(chunk)
    before = [bytes(segment) for segment in segments(shape, view)]
    seal(shape, view, key, position)
    header = verify_chunk(view[: shape.total_bytes])
    header.expect(shape, key, position)
    assert (header.key, header.position, header.tokens) == (key, position, shape.tokens)
    assert (header.offsets, header.lengths) == (shape.offsets, shape.segment_bytes)
    assert header.total_bytes == shape.total_bytes
    multiple = ALIGNMENT if shape.form is Form.EXACT else TIGHT
    assert all(offset % multiple == 0 for offset in header.offsets)
    assert header.total_bytes % multiple == header.offsets[0] % ALIGNMENT == 0
    assert is_packed(header.total_bytes) == (shape.form is Form.PACKED)
    assert [bytes(view[a : a + n]) for a, n in zip(header.offsets, header.lengths, strict=True)] == before
    assert header_bytes_of(view[:ALIGNMENT], shape.total_bytes) == shape.header_bytes


def test_some_layers_can_be_read_alone() -> None:
    chunk = memoryview(make())
    header = read_header(chunk[: SHAPE.header_bytes], len(chunk))
    header.verify(2, segments(SHAPE, chunk)[2])


def test_sealing_is_repeatable_whatever_the_buffer_held() -> None:
    chunk = make()
    dirty = bytearray(b"\xff" * SHAPE.total_bytes)
    for old, new in zip(segments(SHAPE, memoryview(chunk)), segments(SHAPE, memoryview(dirty)), strict=True):
        new[:] = old
    seal(SHAPE, memoryview(dirty), KEY, POSITION)
    assert dirty == chunk


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: ChunkShape(0, (1,)),
        lambda: ChunkShape(2**32, (1,)),
        lambda: ChunkShape(1, ()),
        lambda: ChunkShape(1, (0,) * 70000),
        lambda: ChunkShape(1, (5, -1)),
        lambda: ChunkShape(1, (0, 0)),
        lambda: ChunkShape(1, (5, 3), Form.PACKED),
        lambda: ChunkShape(1, (5, 3), Form.PACKED, (9,)),
        lambda: ChunkShape(1, (5, 3), Form.PACKED, (9, -1)),
        lambda: ChunkShape(1, (5, 3), Form.CODED, (9, 9)),
        lambda: seal(SHAPE, memoryview(bytearray(SHAPE.total_bytes - 1)), KEY, 0),
        lambda: seal(SHAPE, memoryview(bytearray(SHAPE.total_bytes)), KEY, -1),
        lambda: seal(SHAPE, memoryview(bytearray(SHAPE.total_bytes)), KEY, 2**63),
    ],
)
def test_what_cannot_be_sealed_is_refused(attempt: Any) -> None:
    with pytest.raises(BadInput, match="chunk"):
        attempt()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda c: bytearray(), ChunkFault.TRUNCATED),
        (lambda c: c[:5], ChunkFault.TRUNCATED),
        (lambda c: c[:4095], ChunkFault.TRUNCATED),
        (lambda c: c[:-1], ChunkFault.TRUNCATED),
        (lambda c: c[:-4096], ChunkFault.TRUNCATED),
        (lambda c: make(ChunkShape(1, (1,) * 300))[:4096], ChunkFault.TRUNCATED),
        (lambda c: c + b"\0", ChunkFault.OVERLONG),
        (lambda c: c + c, ChunkFault.OVERLONG),
        (lambda c: b"\x88" + c[1:], ChunkFault.BAD_MAGIC),
        (lambda c: bytearray(len(c)), ChunkFault.BAD_MAGIC),
        (lambda c: bytearray(b"GGUF"), ChunkFault.BAD_MAGIC),
        (lambda c: change(c, version=4), ChunkFault.UNSUPPORTED_VERSION),
        (lambda c: change(c, version=3), ChunkFault.SEGMENT_MISPLACED),
        (lambda c: change(c, version=2), ChunkFault.SEGMENT_MISPLACED),
        (lambda c: change(c, layers=0), ChunkFault.HEADER_OUT_OF_RANGE),
        (lambda c: change(c, layers=2**32 - 1), ChunkFault.HEADER_OUT_OF_RANGE),
        (lambda c: change(c, layers=126), ChunkFault.HEADER_OUT_OF_RANGE),
        (lambda c: change(c, header_bytes=8192), ChunkFault.HEADER_OUT_OF_RANGE),
        (lambda c: change(c, header_bytes=2**64 - 4096), ChunkFault.HEADER_OUT_OF_RANGE),
        (lambda c: change(c, tokens=0), ChunkFault.HEADER_OUT_OF_RANGE),
        (lambda c: change(c, tokens=2**32), ChunkFault.HEADER_OUT_OF_RANGE),
        (lambda c: change(c, position=2**63), ChunkFault.HEADER_OUT_OF_RANGE),
        (lambda c: change(c, first__length=0, layers=1), ChunkFault.HEADER_OUT_OF_RANGE),
        (lambda c: change(c, total_bytes=2**63), ChunkFault.SEGMENT_MISPLACED),
        (lambda c: change(c, total_bytes=4096), ChunkFault.SEGMENT_MISPLACED),
        (lambda c: change(c, layers=3), ChunkFault.SEGMENT_MISPLACED),
        (lambda c: change(c, first__offset=0), ChunkFault.SEGMENT_MISPLACED),
        (lambda c: change(c, first__offset=4097), ChunkFault.SEGMENT_MISPLACED),
        (lambda c: change(c, first__offset=2**64 - 4096), ChunkFault.SEGMENT_MISPLACED),
        (lambda c: change(c, second__offset=4096), ChunkFault.SEGMENT_MISPLACED),
        (lambda c: change(c, first__length=2**64 - 1), ChunkFault.SEGMENT_MISPLACED),
        (lambda c: change(c, last__length=2**63), ChunkFault.SEGMENT_MISPLACED),
        (lambda c: change(c, first__length=5001), ChunkFault.SEGMENT_CHECKSUM),
        (lambda c: change(c, key=bytes(32)), ChunkFault.SEGMENT_CHECKSUM),
        (lambda c: change(c, position=48), ChunkFault.SEGMENT_CHECKSUM),
        (lambda c: change(c, tokens=15), ChunkFault.SEGMENT_CHECKSUM),
        (lambda c: c[:4096] + make(seed=1)[4096:], ChunkFault.SEGMENT_CHECKSUM),
        (lambda c: c[:4096] + bytes(len(c) - 4096), ChunkFault.SEGMENT_CHECKSUM),
        (lambda c: c[:300] + b"\1" + c[301:], ChunkFault.HEADER_CHECKSUM),
        (lambda c: c[:-1] + b"\1", ChunkFault.DIRTY_PADDING),
        (lambda c: change(c[:3000] + b"\1" + c[3001:]), ChunkFault.DIRTY_PADDING),
    ],
)
def test_every_fault_has_its_name(damage: Any, fault: Any) -> None:
    assert fault_of(damage(make())) is fault


def test_another_chunk_in_the_place_is_found() -> None:
    """A chunk copied over another is in itself perfect."""
    chunk = make()
    header = verify_chunk(memoryview(chunk))
    for wanted, fault in [
        ((SHAPE, ChunkKey(bytes(32)), POSITION), ChunkFault.WRONG_KEY),
        ((SHAPE, KEY, POSITION + 16), ChunkFault.WRONG_POSITION),
        ((ChunkShape(15, SHAPE.segment_bytes), KEY, POSITION), ChunkFault.WRONG_SHAPE),
        ((ChunkShape(16, SHAPE.segment_bytes[:3]), KEY, POSITION), ChunkFault.WRONG_SHAPE),
        ((ChunkShape(16, (5000, 1, 4096, 0)), KEY, POSITION), ChunkFault.WRONG_SHAPE),
    ]:
        with pytest.raises(CorruptChunk) as caught:
            header.expect(*wanted)
        assert caught.value.fault is fault


def test_a_header_longer_than_was_read_is_of_another_shape() -> None:
    chunk = memoryview(make(ChunkShape(1, (1,) * 300)))
    with pytest.raises(CorruptChunk) as caught:
        read_header(chunk[:4096], len(chunk))
    assert caught.value.fault is ChunkFault.WRONG_SHAPE


def test_segments_of_equal_length_cannot_be_swapped() -> None:
    shape = ChunkShape(1, (64, 64))
    chunk = memoryview(make(shape))
    header = verify_chunk(chunk)
    first, second = segments(shape, chunk)
    for layer, segment in [(0, second), (1, first), (0, first[:-1])]:
        with pytest.raises(CorruptChunk) as caught:
            header.verify(layer, segment)
        assert caught.value.fault is ChunkFault.SEGMENT_CHECKSUM


def test_every_flipped_bit_is_found() -> None:
    chunk = make(ChunkShape(1, (40, 8)))
    places = [*range(0, 400), *random.Random(0).sample(range(len(chunk)), 400)]
    for place in places:
        for bit in range(8):
            chunk[place] ^= 1 << bit
            fault_of(chunk)
            chunk[place] ^= 1 << bit
    verify_chunk(memoryview(chunk))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_gets_through_or_crashes(data: Any) -> None:
    """Fields overwritten with extreme values, the checksum repaired or not; cut, and extended."""
    chunk = make()
    for _ in range(data.draw(st.integers(0, 3))):
        offset, form = data.draw(st.sampled_from(list(FIELDS.values())))
        if form.endswith("s"):
            struct.pack_into(form, chunk, offset, data.draw(st.binary(min_size=16, max_size=32)))
        else:
            size = 8 * struct.calcsize(form)
            extreme = st.sampled_from([0, 1, 4095, 4096, 8192, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
            value = data.draw(st.one_of(extreme, st.integers(0, 2**64 - 1))) % 2**size
            struct.pack_into(form, chunk, offset, value)
    if data.draw(st.booleans()):
        header_bytes = min(struct.unpack_from("<Q", chunk, 16)[0], len(chunk))
        struct.pack_into("16s", chunk, 80, xxh3_128(chunk[:80] + chunk[96:header_bytes]).digest())
    chunk = chunk[: data.draw(st.integers(0, len(chunk)))] if data.draw(st.booleans()) else chunk
    chunk += data.draw(st.binary(max_size=20))
    try:
        verify_chunk(memoryview(chunk))
    except CorruptChunk:
        assert chunk != make()
    else:
        assert chunk == make()


@settings(deadline=None)
@given(st.binary(max_size=9000), st.booleans())
def test_noise_is_never_a_chunk(noise: Any, with_magic: Any) -> None:
    noise = MAGIC + struct.pack("<I", FORMAT_VERSION) + noise if with_magic else noise
    fault_of(noise)


def test_a_lying_header_allocates_nothing() -> None:
    chunk = make()
    lies = [
        change(make(), layers=2**32 - 1, header_bytes=2**63),
        change(make(), layers=2**16, header_bytes=4096 * 513),
        change(make(), total_bytes=2**62, last__length=2**62),
        change(make(), first__length=2**64 - 1),
    ]
    tracemalloc.start()
    try:
        for lie in lies:
            for size in (len(chunk), 2**63):
                with pytest.raises(CorruptChunk):
                    read_header(memoryview(lie)[:4096], size)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()

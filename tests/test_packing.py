"""Packing keeps every bit, and meets no bytes that make it touch memory that it was not given."""

from __future__ import annotations

import random
import struct
import threading
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakekv.codec.base import DamagedCode
from cakekv.demo.document import read_document
from cakekv.demo.model import demo_model
from cakekv.engine.transformers import TransformersEngine, load_tokenizer
from cakekv.packing import BLOCK, BLOCK_HEAD, HEAD, UNIT, bound, pack, unpack, unpacked_size

DTYPES = ["bfloat16", "float16", "float32"]
INPUTS, LONG_INPUTS = 3_000, 100_000
GUARD = b"\xa5" * 64


def guarded(size: int) -> tuple[bytearray, memoryview]:
    """Memory, and `size` bytes in the midst of it."""
    memory = bytearray(GUARD + bytes([0x5A]) * size + GUARD)
    return memory, memoryview(memory)[64 : 64 + size]


def packed(segment: bytes) -> bytes:
    """Pack, and check that it comes back and that nothing else was touched."""
    memory, room = guarded(bound(len(segment)))
    code = bytes(room[: pack(memoryview(segment), room)])
    assert memory.startswith(GUARD)
    assert memory.endswith(GUARD)
    assert unpacked_size(memoryview(code)) == len(segment)
    assert unpacked(code, len(segment)) == segment
    return code


def unpacked(code: bytes, size: int, around: bytes = GUARD) -> bytes:
    """Unpack from the midst of memory that cannot be written into the midst of other memory."""
    memory, segment = guarded(size)
    unpack(memoryview(around + code + around)[64:-64], segment)
    assert memory.startswith(GUARD)
    assert memory.endswith(GUARD)
    return bytes(segment)


def elements(values: torch.Tensor, dtype: str) -> bytes:
    return bytes(values.to(getattr(torch, dtype)).view(torch.uint8).numpy().tobytes())


def normal(count: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 1.45), ("float16", 1.15), ("float32", 1.18)])
def test_a_real_cache(dtype: str, least: float) -> None:
    engine = TransformersEngine.from_pretrained(demo_model(), dtype=dtype)
    tokenizer = load_tokenizer(demo_model())
    token_ids = [int(token) for token in tokenizer(read_document("demo", tokenizer))["input_ids"][:64]]
    engine.compute(cache := engine.new_cache(64), token_ids, 0)
    segments = [memoryview(bytearray(size)) for size in engine.layout.segment_bytes(64)]
    engine.gather(cache, 0, 64, segments)
    codes = [packed(bytes(segment)) for segment in segments]
    assert sum(map(len, segments)) / sum(map(len, codes)) > least
    assert {code[0] for code in codes} == {1 + DTYPES.index(dtype)}, "the dtype is found"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "count", [1, UNIT - 1, UNIT, 2 * UNIT, 2 * UNIT + 1, 1000, 2 * BLOCK, 2 * BLOCK + UNIT, 70_001]
)
def test_any_number_of_elements(dtype: str, count: int) -> None:
    code = packed(elements(normal(count), dtype))
    if count >= 1000:
        assert code[0] == 1 + DTYPES.index(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_any_number_of_bytes(dtype: str, cut: int) -> None:
    whole = elements(normal(5000), dtype)
    packed(whole[:-cut])
    packed(whole[cut:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_none_and_extreme_ones(dtype: str) -> None:
    info = torch.finfo(getattr(torch, dtype))
    odd = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, info.max, info.min, info.tiny, info.tiny / 4]
    values = normal(20_000)
    values[::7] = torch.tensor(odd).repeat(-(-len(values[::7]) // len(odd)))[: len(values[::7])]
    packed(elements(values, dtype))
    for one in odd:
        assert len(packed(elements(torch.full((5000,), one), dtype))) < 5000 * info.bits // 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_of_sixteen_bits(dtype: str) -> None:
    patterns = np.arange(65_536, dtype=np.uint16)
    plain = np.frombuffer(elements(normal(400_000), dtype), np.uint8)
    packed(plain.tobytes() + patterns.tobytes())
    packed(patterns.repeat(2).tobytes() + plain.tobytes())


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponents_that_no_code_suits(dtype: str) -> None:
    """In some blocks all are escaped, in others many."""
    chance = np.random.default_rng(3)
    for wide in (False, True):
        plain = normal(300_000)
        plain[BLOCK : 3 * BLOCK] *= torch.from_numpy(2.0 ** chance.integers(-14, 2, 2 * BLOCK)).float()
        if wide:
            noise = chance.integers(0, 256, 4 * BLOCK, np.uint8).tobytes()
            data = bytearray(elements(plain, dtype))
            data[8 * BLOCK : 8 * BLOCK + len(noise)] = noise
        else:
            data = bytearray(elements(plain, dtype))
        code = packed(bytes(data))
        assert code[0] == 1 + DTYPES.index(dtype)
        assert len(code) < len(data)


def test_what_does_not_shrink_is_kept() -> None:
    for size in (0, 1, 2, 3, 63, 64, 1000, 100_001):
        segment = random.Random(size).randbytes(size)
        code = packed(segment)
        assert code == b"\0" + segment


def test_planes_of_unequal_width() -> None:
    """As latents have; a quarter beside three quarters."""
    planes = elements(normal(64 * 64, scale=2.0**-9), "bfloat16") + elements(normal(64 * 512, scale=8.0), "bfloat16")
    assert len(planes) / len(packed(planes)) > 1.35


def test_there_has_to_be_room() -> None:
    with pytest.raises(ValueError, match="101"):
        pack(memoryview(bytes(100)), memoryview(bytearray(100)))


@given(st.binary(max_size=2000), st.integers(1, 40), st.integers(0, 3))
def test_any_bytes(data: bytes, times: int, cut: int) -> None:
    segment = data * times
    packed(segment[cut:])


@given(st.binary(max_size=400))
def test_any_bytes_for_a_code(code: bytes) -> None:
    try:
        size = unpacked_size(memoryview(code))
    except DamagedCode:
        size = 256
    assert size <= 2 * len(code) or size == 256
    for wanted in {size, 256}:
        with suppress(DamagedCode):
            unpacked(code, wanted)


def mutated(code: bytes, choose: random.Random) -> bytes:
    """A code with one to three changes, mostly to the heads of its blocks."""
    changed = bytearray(code)
    for _ in range(choose.randint(1, 3)):
        kind, place = choose.random(), choose.randrange(len(changed))
        if kind < 0.4:
            place = min(place, choose.randrange(HEAD + BLOCK_HEAD))
            changed[place] = choose.choice([0, 1, 0x7F, 0xFF, choose.randrange(256)])
        elif kind < 0.5 and len(changed) > 30:
            struct.pack_into("<H", changed, HEAD + choose.randrange(8, 18, 2), choose.choice([0, 1, 0xFFFF, 4000]))
        elif kind < 0.6:
            changed[place] ^= 1 << choose.randrange(8)
        elif kind < 0.7:
            changed[place : place + 40] = choose.randbytes(40)
        elif kind < 0.85:
            del changed[place:]
            changed = changed or bytearray(b"\0")
        else:
            changed += choose.randbytes(choose.randrange(1, 100))
    return bytes(changed)


@pytest.mark.timeout(900)
def test_mutated_codes(long: bool) -> None:
    """They are refused, or they fill the segment; nothing else is read or written."""
    seed = random.randrange(10**6)
    choose, outcomes = random.Random(seed), Counter[str]()
    escaping = normal(3000) * torch.exp(5 * normal(3000, 1))
    segments = [elements(values, dtype) for dtype in DTYPES for values in (normal(2000), normal(40_000), escaping)]
    segments += [segments[0] + choose.randbytes(700), bytes(10_000), b"kept"]
    codes = [packed(segment) for segment in segments]
    for number in range(LONG_INPUTS if long else INPUTS):
        which = choose.randrange(len(codes))
        code, where = mutated(codes[which], choose), f"seed {seed}, input {number}"
        try:
            size = unpacked_size(memoryview(code))
            assert 0 <= size <= 2 * len(code), where
        except DamagedCode:
            outcomes["no size"] += 1
            size = len(segments[which])
        wanted = choose.choice([len(segments[which]), size])
        try:
            filled = unpacked(code, wanted)
            outcomes["filled"] += 1
        except DamagedCode:
            outcomes["refused"] += 1
            with pytest.raises(DamagedCode):
                unpacked(code, wanted, bytes(64))
        else:
            assert unpacked(code, wanted, bytes(64)) == filled, f"{where}: it depends on what lies around it"
    print(f"seed {seed}: {dict(outcomes)}")
    assert min(outcomes[kind] for kind in ("no size", "filled", "refused")) > 0, outcomes


def test_a_segment_of_another_size() -> None:
    code = packed(elements(normal(1000), "bfloat16"))
    for size in (0, 1998, 1999, 2001, 4000):
        with pytest.raises(DamagedCode):
            unpacked(code, size)


def test_several_threads_at_once() -> None:
    segments = [elements(normal(60_000, seed), dtype) for seed, dtype in enumerate(DTYPES * 2)]
    codes = [packed(segment) for segment in segments]
    wrong: list[int] = []

    def work(first: int) -> None:
        for number in range(60):
            which = (first + number) % len(codes)
            room = memoryview(bytearray(bound(len(segments[which]))))
            if bytes(room[: pack(memoryview(segments[which]), room)]) != codes[which]:
                wrong.append(which)
            if unpacked(codes[which], len(segments[which])) != segments[which]:
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

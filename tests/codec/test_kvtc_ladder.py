"""The transform codec in two parts: what each gives, restores that read one or both, and damage in the second."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from cakekv.cake import Cake
from cakekv.chunk import read_header
from cakekv.codec.base import Code, Codec, DamagedCode, Plane, Values
from cakekv.codec.basis import Basis, PlaneBasis
from cakekv.codec.kvtc import Kvtc
from cakekv.codec.kvtc_ladder import STEPS, KvtcLadder
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.results import Prefill
from cakekv.rotation import Rotation
from cakekv.store.base import Store
from cakekv.store.memory import MemoryStore
from cakekv.store.throttled import ThrottledStore
from tests.bases import ready

CHUNK = 32
CODEC = "kvtc_ladder:bits=4"


def encoded(codec: Codec, plane: Plane, values: Values) -> list[Code]:
    codes = []
    for part in range(codec.parts):
        code = np.empty(codec.size(plane, part), np.uint8)
        codes.append(code[: codec.encode(plane, values, code, part)])
    return codes


def decoded(codec: Codec, plane: Plane, codes: list[Code]) -> Values:
    values = np.empty(plane.shape, np.float32)
    codec.decode(plane, codes, values)
    return values


def kvtc(ladder: Codec, times: int = 1) -> Kvtc:
    """With the same basis and a step so many times as large."""
    assert isinstance(ladder, KvtcLadder)
    assert ladder._basis is not None
    return Kvtc(bits=ladder.bits).with_basis(replace(ladder._basis, steps=times * ladder._basis.steps))


def samples(plane: Plane, rng: np.random.Generator) -> list[Values]:
    """Much like what was learned, far from it in one token, and in all."""
    usual = rng.standard_normal(plane.shape).astype(np.float32)
    stray = usual.copy()
    stray[:, plane.tokens // 2] *= 1e9
    return [usual, stray, usual * 1e20]


@pytest.mark.parametrize("bits", [0.7, 2.0, 4.5])
def test_each_level_is_kvtc_of_that_step(bits: float) -> None:
    rotation = Rotation(tuple(10000.0 ** (-pair / 8) for pair in range(8)))
    for role, start, dtype in product(("keys", "values"), (0, 640), ("float32", "float16")):
        plane = Plane(role, 0, 1, 2, 40, 16, dtype, rotation if role == "keys" else None, start)  # type: ignore[arg-type]
        ladder = ready(KvtcLadder(bits=bits), [plane])
        for values in samples(plane, np.random.default_rng(3)):
            if dtype == "float16":
                values = np.clip(values, -6e4, 6e4).astype(np.float16).astype(np.float32)
            codes, fine = encoded(ladder, plane, values), encoded(kvtc(ladder), plane, values)
            assert np.array_equal(codes[0], encoded(kvtc(ladder, STEPS), plane, values)[0])
            assert np.array_equal(decoded(ladder, plane, codes), decoded(kvtc(ladder), plane, fine))
            assert sum(code.size for code in codes) < 1.15 * fine[0].size + 32


def test_planes_that_take_too_many_bytes_are_kept_exactly() -> None:
    plane = Plane("values", 0, 1, 2, 40, 16, "float32", start=640)
    ladder = ready(KvtcLadder(bits=4.5), [plane])
    values = samples(plane, np.random.default_rng(3))[0] * 300
    for times in range(1, 2000, 300):
        codes = encoded(ladder, plane, values * times)
        assert sum(code.size for code in codes) <= plane.raw_bytes + 2 * (plane.tokens + 1) + 16
    assert np.array_equal(decoded(ladder, plane, codes), values * times)


def test_tokens_are_exact_where_the_second_part_would_be_too_long() -> None:
    """Small coefficients that the larger step does not code, each far larger than what was learned."""
    plane = Plane("values", 0, 1, 1, 64, 16, "float16", start=640)
    one, spread = np.ones((1, 16), np.float32), np.full((1, 16), 0.05, np.float32)
    basis = PlaneBasis(0 * one, np.eye(16, dtype=np.float32)[None], one, spread)
    steps, rates = np.array([4.0, 1.0, 0.25]), np.array([0.1, 1.0, 3.0])
    ladder = KvtcLadder(bits=1).with_basis(Basis({("values", 0): basis}, steps, rates))
    values = np.full(plane.shape, 1000.5, np.float32)
    codes = encoded(ladder, plane, values)
    assert np.array_equal(decoded(ladder, plane, codes), values)
    assert np.array_equal(decoded(ladder, plane, codes[:1]), values)


def test_a_second_part_that_is_not_of_this_first_one_is_damage() -> None:
    plane = Plane("values", 0, 1, 2, 64, 16, "float32", start=640)
    ladder = ready(KvtcLadder(bits=3), [plane])
    rng = np.random.default_rng(1)
    (first, second), (_, other) = (
        encoded(ladder, plane, rng.standard_normal(plane.shape).astype(np.float32)) for _ in range(2)
    )
    flipped = second.copy()
    flipped[len(flipped) // 2] ^= 4
    for bad in (other, flipped, second[:-2], second[:-1], second[:8], second[:5], np.append(second, second[:2])):
        with pytest.raises(DamagedCode):
            decoded(ladder, plane, [first, bad])


@pytest.fixture(scope="module")
def engine(make_engine: Callable[[str], TransformersEngine]) -> TransformersEngine:
    return make_engine("float32")


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """10 full chunks and a suffix of 5 tokens."""
    return random.Random(3).choices(range(211), k=10 * CHUNK + 5)


def saved(engine: TransformersEngine, prompt: list[int], codec: str) -> MemoryStore:
    store = MemoryStore()
    with Cake(engine, store=store, chunk_tokens=CHUNK, codec=codec) as cake:
        cake.prefill(prompt)
        assert cake.wait_saved().error is None
    return store


@pytest.fixture(scope="module")
def store(engine: TransformersEngine, prompt: list[int]) -> MemoryStore:
    return saved(engine, prompt, CODEC)


def loaded(engine: TransformersEngine, store: Store, prompt: list[int], codec: str, **options: Any) -> Prefill:
    with Cake(engine, store=store, chunk_tokens=CHUNK, codec=codec, **options) as cake:
        return cake.prefill(prompt, mode="load")


def same(one: Prefill, other: Prefill) -> bool:
    """Whether both have the same stored part."""
    return all(
        torch.equal(region[:, : 10 * CHUNK], same[:, : 10 * CHUNK])
        for layer, like in zip(one.cache.stored, other.cache.stored, strict=True)
        for region, same in zip(layer.regions, like.regions, strict=True)
    )


def test_one_part_or_both(engine: TransformersEngine, store: MemoryStore, prompt: list[int]) -> None:
    both, first = (loaded(engine, store, prompt, f"{CODEC},read={read}") for read in (2, 1))
    assert both.report.level_tokens == {"2 of 2": 10 * CHUNK}
    assert first.report.level_tokens == {"1 of 2": 10 * CHUNK}
    assert first.report.bytes_by_tier["memory"] < 0.75 * both.report.bytes_by_tier["memory"]
    alone = loaded(engine, saved(engine, prompt, "kvtc:bits=4"), prompt, "kvtc:bits=4")
    assert same(both, alone)
    assert not same(first, alone)


def test_a_target_chooses(engine: TransformersEngine, store: MemoryStore, prompt: list[int]) -> None:
    link = ThrottledStore(store, 1e6)  # where the bytes are what takes the time
    hasty = loaded(engine, link, prompt, CODEC, ttft_target_s=0.0, layered_finish=False)
    assert hasty.report.level_tokens == {"1 of 2": 10 * CHUNK}
    assert same(hasty, loaded(engine, store, prompt, f"{CODEC},read=1"))
    levels = loaded(engine, store, prompt, CODEC, ttft_target_s=1e6).report.level_tokens
    assert levels["2 of 2"] >= 7 * CHUNK, "all, once it is known what loads and spans take"
    assert sum(levels.values()) == 10 * CHUNK
    floor = loaded(engine, link, prompt, CODEC, ttft_target_s=0.0, quality_floor=2, layered_finish=False)
    assert floor.report.level_tokens == {"2 of 2": 10 * CHUNK}


def test_pieces_of_either_level(
    engine: TransformersEngine, store: MemoryStore, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cakekv.load.pieces._LEAST_READ_BYTES", 1)
    for read in (1, 2):
        codec = f"{CODEC},read={read}"
        pieces = loaded(engine, ThrottledStore(store, 1e6), prompt, codec, layered_finish=True)
        assert same(pieces, loaded(engine, store, prompt, codec, layered_finish=False))


def test_damage_in_the_second_part_is_no_matter_to_the_first(
    engine: TransformersEngine, store: MemoryStore, prompt: list[int]
) -> None:
    damaged = MemoryStore()
    layers = len(engine.layout.layers)
    for chunk in store:
        with store.open(chunk.key) as reader:
            data = bytearray(reader.size)
            reader.read_into(memoryview(data), 0)
        data[read_header(memoryview(data), len(data)).shape.offsets[layers] + 20] ^= 1
        damaged.write(chunk.key, memoryview(data))
    first = loaded(engine, damaged, prompt, f"{CODEC},read=1")
    assert first.report.level_tokens == {"1 of 2": 10 * CHUNK}
    both = loaded(engine, damaged, prompt, CODEC)
    assert both.report.loaded_tokens == 0
    assert "corrupt: segment checksum" in {miss.reason for miss in both.report.misses}


def test_what_cannot_be_asked(engine: TransformersEngine) -> None:
    for codec in ("kvtc_ladder:read=0", "kvtc_ladder:read=3", "kvtc_ladder:bits=0"):
        with pytest.raises(BadInput, match="codec kvtc_ladder"):
            Cake(engine, codec=codec)

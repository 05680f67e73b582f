"""The ladder: its levels, and restores that choose among them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cakekv.cake import Cake
from cakekv.codec import codec_named
from cakekv.codec.base import Plane
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.results import Prefill
from cakekv.store.base import Store
from cakekv.store.memory import MemoryStore
from cakekv.store.throttled import ThrottledStore

CHUNK = 32


@pytest.mark.parametrize("role", ["keys", "values"])
def test_every_part_makes_it_finer(role: Any) -> None:
    plane = Plane(role, 0, 1, 2, 40, 24)
    values = np.random.default_rng(1).standard_normal(plane.shape).astype(np.float32)
    ladder, int8 = codec_named("ladder"), codec_named("int8:group=32")
    codes = [np.zeros(ladder.size(plane, part), np.uint8) for part in range(3)]
    for part, code in enumerate(codes):
        ladder.encode(plane, values, code, part)
    exact, near = np.empty_like(values), np.empty_like(values)
    whole = np.zeros(int8.size(plane), np.uint8)
    int8.encode(plane, values, whole)
    int8.decode(plane, [whole], exact)
    errors = []
    for parts in (1, 2, 3):
        ladder.decode(plane, codes[:parts], near)
        errors.append(float(np.abs(near - exact).max()))
    assert errors[2] == 0, "all parts are int8"
    span = float(values.max() - values.min())
    assert errors[1] < errors[0] / 3
    assert errors[0] < span / 7, "half of a quarter of a group's range"


@pytest.fixture(scope="module")
def engine(make_engine: Callable[[str], TransformersEngine]) -> TransformersEngine:
    return make_engine("float32")


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """10 full chunks and a suffix of 5 tokens; with a window of 64, the last two are stored exactly."""
    rng = random.Random(3)
    return [rng.randrange(211) for _ in range(10 * CHUNK + 5)]


@pytest.fixture(scope="module")
def store(engine: TransformersEngine, prompt: list[int]) -> MemoryStore:
    store = MemoryStore()
    with Cake(engine, store=store, chunk_tokens=CHUNK, codec="ladder:window=64") as cake:
        cake.prefill(prompt)
    return store


def loaded(engine: TransformersEngine, store: Store, prompt: list[int], codec: str, **options: Any) -> Prefill:
    with Cake(engine, store=store, chunk_tokens=CHUNK, codec=codec, **options) as cake:
        return cake.prefill(prompt, mode="load")


@pytest.mark.parametrize("floor", [1, 2, 3])
def test_without_time_the_floor_is_read(
    engine: TransformersEngine, store: MemoryStore, prompt: list[int], floor: int
) -> None:
    codec, link = "ladder:window=64", ThrottledStore(store, 1e6)  # where the bytes are what takes the time
    hasty = loaded(engine, link, prompt, codec, ttft_target_s=0.0, quality_floor=floor, layered_finish=False)
    by_parts = {parts: loaded(engine, store, prompt, f"{codec},read={parts}") for parts in range(floor, 4)}
    for parts, one in by_parts.items():
        assert one.report.level_tokens == {"exact": 2 * CHUNK, f"{parts} of 3": 8 * CHUNK}
    # Reads are of whole pages, so that with chunks as small as these a part more may cost nothing.
    free = [
        parts for parts, one in by_parts.items() if one.report.bytes_by_tier == by_parts[floor].report.bytes_by_tier
    ]
    assert hasty.report.level_tokens == {"exact": 2 * CHUNK, f"{max(free)} of 3": 8 * CHUNK}
    assert hasty.report.lossy_tokens == 8 * CHUNK
    fixed = by_parts[max(free)]
    for layer, other in zip(hasty.cache.stored, fixed.cache.stored, strict=True):
        for region, same in zip(layer.regions, other.regions, strict=True):
            assert torch.equal(region[:, : 10 * CHUNK], same[:, : 10 * CHUNK])


@pytest.mark.parametrize("target", [float("inf"), 1e6])
def test_with_time_everything_is_read(
    engine: TransformersEngine, store: MemoryStore, prompt: list[int], target: float
) -> None:
    report = loaded(engine, store, prompt, "ladder:window=64", ttft_target_s=target).report
    levels = report.level_tokens
    assert levels["exact"] == 2 * CHUNK
    assert levels["3 of 3"] >= 5 * CHUNK, "all, once it is known what loads and spans take"
    assert sum(levels.values()) == 10 * CHUNK


def test_levels_of_other_codecs(engine: TransformersEngine, prompt: list[int]) -> None:
    store = MemoryStore()
    with Cake(engine, store=store, chunk_tokens=CHUNK, codec="int8") as cake:
        cake.prefill(prompt)
        assert cake.wait_saved().error is None
        report = cake.prefill(prompt, mode="load").report
    assert report.level_tokens == {"1 of 1": 10 * CHUNK}


def test_what_cannot_be_asked(engine: TransformersEngine) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("ladder", {"quality_floor": 0}),
        ("ladder:read=2", {"quality_floor": 3}),
        ("int8", {"quality_floor": 2}),
        ("ladder", {"ttft_target_s": -1.0}),
        ("ladder", {"ttft_target_s": float("nan")}),
    ]
    for codec, options in wrong:
        with pytest.raises(BadInput, match=next(iter(options))):
            Cake(engine, codec=codec, **options)

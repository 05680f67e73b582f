"""How much of what channels say survives each codec: on heads of several widths, alone and many, with channels as
unlike as those of real keys, and on a real model's cache."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from cakekv.chunk import segments
from cakekv.codec import CODECS, codec_named
from cakekv.codec.base import Codec, Plane
from cakekv.codec.cachegen import shrunk
from cakekv.codec.coder import ChunkCoder
from cakekv.demo.document import read_document
from cakekv.demo.model import demo_model
from cakekv.engine.transformers import TransformersEngine, load_tokenizer
from cakekv.rotation import Rotation

CHUNK = 64
START = 2 * CHUNK
HEADS = [(1, 64), (8, 64), (1, 128), (8, 128), (1, 256), (4, 256)]
"""Number and width."""
LOST = {
    "raw": (0.0, 0.0),
    "int8": (0.0001, 0.0003),
    "two_plane": (0.0001, 0.0002),
    "two_plane:read=upper": (0.008, 0.042),
    "ladder": (0.0001, 0.0002),
    "ladder:read=2": (0.008, 0.04),
    "ladder:read=1": (0.13, 0.57),
    "fp8": (0.024, 0.0015),
    "int4": (0.008, 0.042),
    "k5v4": (0.0027, 0.082),
    "kivi:bits=3": (0.037, 0.2),
    "kivi": (0.2, 0.82),
    "nuq3": (0.16, 0.11),
    "think": (0.45, 0.0),  # 40% of the keys' channels, and nothing else
    "turboquant": (0.1, 0.033),
    "cachegen:level=1": (0.22, 0.05),
    "cachegen": (0.67, 0.23),
    "cachegen:level=3": (0.9, 0.39),
}
"""Shares of variance that a recipe may lose of keys and of values: a quarter more than each does lose where it loses
most, or nothing, and far less than would be left by a codec to which wide channels hide the others."""


def lost(values: Any, found: Any) -> float:
    """The share of a channel's variance that is error, on average over channels; 1 says that nothing is left."""
    errors = ((found - values).astype(np.float64) ** 2).mean(1)
    return float(np.minimum(errors / values.astype(np.float64).var(1), 1).mean())


def unlike_channels(plane: Plane) -> Any:
    """Most channels spread about alike; of keys, one in fifty spreads thirty times as much, and one in ten is far off.

    So it is with the keys of Gemma 3, which are normalised before they are rotated.
    """
    heads, _, width = plane.shape
    shape, rng = (heads, 1, width), np.random.default_rng(width)
    spread, mean = np.exp(0.5 * rng.standard_normal(shape)), 0.5 * rng.standard_normal(shape)
    if plane.role == "keys":
        channels = rng.permutation(heads * width)
        spread.reshape(-1)[channels[: max(1, heads * width // 50)]] = 30.0
        mean = np.where(rng.random(shape) < 0.1, rng.choice([-12.0, 12.0], shape), mean)
    return (rng.standard_normal(plane.shape) * spread + mean).astype(np.float32)


def through(codec: Codec, plane: Plane, values: Any) -> Any:
    codes = []
    for part in range(codec.parts_read):
        code = np.empty(codec.size(plane, part), np.uint8)
        codes.append(code[: codec.encode(plane, values, code, part)])
    found = np.empty(plane.shape, np.float32)
    codec.decode(plane, codes, found)
    return found


def most(recipe: str, plane: Plane) -> float:
    return LOST[recipe][("keys", "values").index(plane.role)]


def test_every_codec_is_measured() -> None:
    assert set(CODECS) - {"kvtc", "kvtc_ladder"} <= set(LOST)  # these lose what a model would not notice


@pytest.mark.parametrize("recipe", LOST)
def test_a_few_wide_channels_do_not_hide_the_others(recipe: str) -> None:
    codec = codec_named(recipe)
    for (heads, width), role in product(HEADS, ("keys", "values")):
        rotation = Rotation(tuple(10000.0 ** (-pair / (width // 2)) for pair in range(width // 2)))
        # Float32, as what is exact in the cache's own type is no error of the codec's.
        plane = Plane("keys", 2, 4, heads, CHUNK, width, "float32", rotation, START)
        if role == "values":
            plane = Plane("values", 2, 4, heads, CHUNK, width, "float32")
        values = unlike_channels(plane)
        assert lost(values, through(codec, plane, values)) <= most(recipe, plane), (role, heads, width)


def test_cachegen_makes_only_far_channels_smaller() -> None:
    rng = np.random.default_rng(3)
    values = (rng.standard_normal((2, CHUNK, 64)) * rng.uniform(0.5, 2, (2, 1, 64))).astype(np.float32)
    values[1, :, 7] += 10
    assert np.array_equal(shrunk(values), values)
    values[0, :, 5] *= 100
    smaller = shrunk(values)
    assert np.array_equal(np.delete(smaller[0], 5, 1), np.delete(values[0], 5, 1))
    assert np.array_equal(smaller[1], values[1])
    middle = np.median(np.sqrt((values**2).mean(1)))
    assert 16 * middle / 2**0.5 < np.abs(smaller[0, :, 5]).max() <= 16 * middle * 1.0001


@pytest.fixture(scope="module")
def cached() -> list[tuple[Plane, Any]]:
    """The planes of a chunk of the demo's model, in the middle of a document."""
    engine = TransformersEngine.from_pretrained(demo_model(), dtype="float32")
    tokenizer = load_tokenizer(demo_model())
    tokens = tokenizer(read_document("demo", tokenizer)[:2000])["input_ids"][: START + CHUNK]
    cache = engine.new_cache(len(tokens))
    engine.compute(cache, tokens, 0)
    coder = ChunkCoder(codec_named("nuq3"), engine.layout, CHUNK, "float32", engine.rotations)
    data = memoryview(bytearray(coder.exact.total_bytes))
    engine.gather(cache, START, CHUNK, segments(coder.exact, data))
    planes = []
    for layer, segment in enumerate(segments(coder.exact, data)):
        numbers = np.frombuffer(segment, np.float32)
        for plane, begin in zip(coder.planes_of(layer), (0, coder.planes_of(layer)[0].elements), strict=True):
            planes.append((plane, numbers[begin : begin + plane.elements].reshape(plane.shape)))
    return planes


@pytest.mark.parametrize("recipe", LOST)
def test_a_real_models_cache_survives(recipe: str, cached: list[tuple[Plane, Any]]) -> None:
    codec = codec_named(recipe)
    for plane, values in cached:
        assert lost(values, through(codec, plane, values)) <= most(recipe, plane), (plane.role, plane.layer)

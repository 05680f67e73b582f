"""Keys taken back to before RoPE: a real model's own, and wherever in a document a chunk lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cakekv.chunk import read_header, segments
from cakekv.codec import codec_named
from cakekv.codec.coder import ChunkCoder
from cakekv.codec.kernels import turn
from cakekv.demo.document import read_document
from cakekv.demo.model import demo_model
from cakekv.engine.transformers import TransformersEngine, load_tokenizer
from cakekv.keys import ChunkKey
from cakekv.rotation import Rotation

CHUNK = 64
START = 3 * CHUNK
KEY = ChunkKey(bytes(32))


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine.from_pretrained(demo_model(), dtype="float32")


@pytest.fixture(scope="module")
def chunk(engine: TransformersEngine) -> bytearray:
    """The exact segments of a chunk in the middle of a document."""
    tokenizer = load_tokenizer(demo_model())
    tokens = tokenizer(read_document("demo", tokenizer)[:4000])["input_ids"][: START + CHUNK]
    cache = engine.new_cache(len(tokens))
    engine.compute(cache, tokens, 0)
    coder = coder_of(engine, "raw")
    data = bytearray(coder.exact.total_bytes)
    engine.gather(cache, START, CHUNK, segments(coder.exact, memoryview(data)))
    return data


def coder_of(engine: TransformersEngine, recipe: str) -> ChunkCoder:
    return ChunkCoder(codec_named(recipe), engine.layout, CHUNK, "float32", engine.rotations)


def keys_of(engine: TransformersEngine, data: bytearray, layer: int) -> Any:
    """(heads, tokens, width)"""
    plane = engine.layout.layers[layer].planes[0]
    shape = (plane.heads, CHUNK, plane.width)
    segment = segments(coder_of(engine, "raw").exact, memoryview(data))[layer]
    return np.frombuffer(segment, np.float32, int(np.prod(shape))).reshape(shape).copy()


def test_turned_back_a_channels_keys_are_closer_and_turned_again_they_are_the_same(
    engine: TransformersEngine, chunk: bytearray
) -> None:
    spread = {"cached": 0.0, "back": 0.0, "elsewhere": 0.0}
    for layer, rotation in enumerate(engine.rotations()):
        keys = keys_of(engine, chunk, layer)
        spread["cached"] += float(keys.var(axis=1).sum())
        for name, start in (("elsewhere", START + 7 * CHUNK), ("back", START)):
            cosine, sine = rotation.turns(start, CHUNK)
            back = keys.copy()
            turn(back, cosine, -sine, rotation.interleaved)
            spread[name] += float(back.var(axis=1).sum())
        assert np.abs(back - keys).max() > 0.1 * np.abs(keys).max()
        turn(back, cosine, sine, rotation.interleaved)
        assert np.abs(back - keys).max() < 1e-6 * np.abs(keys).max()
    assert spread["back"] < 0.8 * spread["cached"]


def test_a_chunk_in_the_middle_is_decoded_with_its_position(engine: TransformersEngine, chunk: bytearray) -> None:
    coder = coder_of(engine, "nuq3")
    coded = coder.encode(memoryview(chunk), memoryview(bytearray(coder.exact.total_bytes)), KEY, START)
    assert coded is not None
    shape = read_header(coded, len(coded)).shape
    away = {}
    for position in (START, 0, START + 1):
        decoded = bytearray(coder.exact.total_bytes)
        errors = []
        for layer, part in enumerate(segments(coder.exact, memoryview(decoded))):
            views = segments(shape, coded)
            coder.decode(layer, [views[i] for i in coder.segments_of(shape, [layer])], part, position)
            exact = keys_of(engine, chunk, layer)
            errors.append(np.linalg.norm(keys_of(engine, decoded, layer) - exact) / np.linalg.norm(exact))
        away[position] = float(np.mean(errors))
    assert away[START] < 0.15
    assert away[START] < 0.5 * away[START + 1]
    assert away[START] < 0.5 * away[0]


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_not_turned_stays(interleaved: bool) -> None:
    """Pairs as their definition says, one by one."""
    rotation = Rotation((1.0, 0.25), interleaved)
    values = np.random.default_rng(2).standard_normal((2, 5, 7)).astype(np.float32)
    turned = values.copy()
    turn(turned, *rotation.turns(11, 5), rotation.interleaved)
    pairs = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]
    for (first, second), frequency in zip(pairs, rotation.frequencies, strict=True):
        spun = values[..., first] + 1j * values[..., second]
        spun = spun * np.exp(1j * frequency * np.arange(11, 16))
        assert np.allclose(turned[..., first] + 1j * turned[..., second], spun, atol=1e-5)
    assert np.array_equal(turned[..., 4:], values[..., 4:])


def test_before_rope_keys_lose_less(engine: TransformersEngine, chunk: bytearray) -> None:
    lost = {}
    for recipe in ("nuq3", "nuq3:rope=after"):
        coder = coder_of(engine, recipe)
        coded = coder.encode(memoryview(chunk), memoryview(bytearray(coder.exact.total_bytes)), KEY, START)
        assert coded is not None
        shape, decoded = read_header(coded, len(coded)).shape, bytearray(coder.exact.total_bytes)
        lost[recipe] = 0.0
        for layer, part in enumerate(segments(coder.exact, memoryview(decoded))):
            views = segments(shape, coded)
            coder.decode(layer, [views[i] for i in coder.segments_of(shape, [layer])], part, START)
            lost[recipe] += float(np.square(keys_of(engine, decoded, layer) - keys_of(engine, chunk, layer)).sum())
    assert lost["nuq3"] < 0.85 * lost["nuq3:rope=after"]

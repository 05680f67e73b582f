"""Layers of random numbers, as methods see them, and tiny real models whose prompts are complete."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from cakekv.compress import method_named
from cakekv.compress.base import Layer
from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.ragged import RaggedCache
from cakekv.engine.transformers import TransformersEngine
from tests.matrix.models import build

HEADS, GROUP, WIDTH = 2, 2, 8


def toy(
    length: int, seed: int = 0, *, rows: int | None = None, dtype: torch.dtype = torch.float32, **more: Any
) -> Layer:
    """All of a text's keys and values, and its last queries (all, if `rows` is None)."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn((HEADS, length, WIDTH), generator=generator).to(dtype) for _ in range(2))
    queries = torch.randn((HEADS * GROUP, length, WIDTH), generator=generator).to(dtype)
    at = torch.arange(length)
    first = 0 if rows is None else max(0, length - rows)
    fields = {"index": 2, "layers": 6, "scaling": WIDTH**-0.5, **more}
    return Layer(
        keys=keys,
        values=values,
        positions=at.repeat(HEADS, 1),
        length=length,
        queries=queries[:, first:],
        query_positions=at[first:],
        **fields,
    )


def without_queries(layer: Layer) -> Layer:
    """As of a chunk that is being saved."""
    layer.queries = layer.query_positions = None
    return layer


@lru_cache
def engine_of(name: str = "llama", dtype: torch.dtype = torch.float32) -> TransformersEngine:
    return TransformersEngine(build(name).to(dtype))


def prompt_of(engine: TransformersEngine, tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, engine.vocabulary_size, (tokens,), generator=generator).tolist()


def complete(engine: TransformersEngine, tokens: int, room: int = 32) -> TwoEndedCache:
    cache = engine.new_cache(tokens + room)
    engine.compute(cache, prompt_of(engine, tokens), 0)
    return cache


def compressed(recipe: str, engine: TransformersEngine, tokens: int = 60) -> RaggedCache | TwoEndedCache:
    """What a method leaves of a real model's prompt."""
    return engine.compress(complete(engine, tokens), prompt_of(engine, tokens), method_named(recipe))

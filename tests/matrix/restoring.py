"""A restore by hand: chunks gathered from one cache, placed in another, and what full prefills differ by anyway."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.sampling import choose_token
from cakekv.engine.transformers import TransformersEngine
from tests.matrix.models import VOCABULARY

CHUNK = 8
PREFIX = 72
PROMPT = 77
NEW_TOKENS = 8
CUTS = (
    (0, 72),
    (0, 1, 72),
    (0, 13, 72),
    (0, 16, 72),
    (0, 37, 72),
    (0, 64, 72),
    (0, 71, 72),
    tuple(range(0, 73, 8)),
    tuple(range(0, 73, 7)),
    (0,),
)
"""Ways to cut a full prefill into spans; the last is the reference."""


def prompt() -> list[int]:
    return torch.randint(3, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(5)).tolist()


def poisoned_cache(engine: TransformersEngine) -> TwoEndedCache:
    """A cache in which every position that is neither computed nor loaded shows as NaN in the logits, if it is read."""
    cache = engine.new_cache(PROMPT + NEW_TOKENS)
    for layer in cache.stored:
        for region in layer.regions:
            region.fill_(float("nan"))
    if engine.device.type == "cuda":
        torch.cuda.synchronize()  # loads come in on another stream
    return cache


def prefill(engine: TransformersEngine, tokens: list[int], cuts: Sequence[int]) -> tuple[TwoEndedCache, torch.Tensor]:
    """Compute a whole prompt in spans that begin at `cuts`, as far as they lie within it."""
    cache = poisoned_cache(engine)
    for start, end in pairwise([*(cut for cut in cuts if cut < len(tokens)), len(tokens)]):
        logits = engine.compute(cache, tokens[start:end], start)
    return cache, logits


def noise(engine: TransformersEngine, tokens: list[int], reference: torch.Tensor) -> float:
    """How much the last logits of full prefills differ only because they are cut differently."""
    differences = [float((prefill(engine, tokens, cuts)[1] - reference).abs().max()) for cuts in CUTS]
    one_rounding = torch.finfo(engine.model.dtype).eps * float(reference.abs().max())
    return max(*differences, one_rounding)


def gather(engine: TransformersEngine, cache: TwoEndedCache, start: int, tokens: int = CHUNK) -> list[memoryview]:
    segments = [engine.staging(size) for size in engine.layout.segment_bytes(tokens)]
    engine.gather(cache, start, tokens, segments)
    return segments


def load(engine: TransformersEngine, cache: TwoEndedCache, source: TwoEndedCache, start: int, read_at: int) -> int:
    """Copy a chunk from `source`: of windowed layers only what a span computed at `read_at` and later can still see."""
    segments = [
        segment if layer.window is None or start + CHUNK > read_at - layer.window + 1 else None
        for layer, segment in zip(engine.layout.layers, gather(engine, source, start), strict=True)
    ]
    return engine.place(cache, start, CHUNK, segments)


def follow(
    engine: TransformersEngine, cache: TwoEndedCache, logits: torch.Tensor, tokens: Sequence[int | None]
) -> tuple[list[int], list[float]]:
    """Go on behind the prompt with `tokens` (None: greedily); the greedy choice at each, and by how much it won."""
    choices, margins = [], []
    for position, token in enumerate(tokens, start=PROMPT):
        first, second = logits.topk(2).values.tolist()
        margins.append(first - second)
        choices.append(choose_token(logits))
        logits = engine.compute(cache, [choices[-1] if token is None else token], position)
    return choices, margins

"""Layers of random queries and keys, as a method sees them, and their attention, written down naively."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cakekv.compress.base import Layer, Marked

HEADS, GROUP, WIDTH = 2, 3, 8
SCALING = WIDTH**-0.5


def layer(
    tokens: int,
    rows: int,
    index: int = 0,
    sharpness: float = 3.0,
    marked: Sequence[Marked] = (),
    dtype: torch.dtype = torch.float32,
) -> Layer:
    """Of a complete prompt; the sharper, the fewer tokens get attention."""
    generator = torch.Generator().manual_seed(17 * index + tokens)
    rows = min(rows, tokens)
    keys, values = (torch.randn(HEADS, tokens, WIDTH, generator=generator) for _ in range(2))
    queries = torch.randn(HEADS * GROUP, tokens, WIDTH, generator=generator) * sharpness
    return Layer(
        index,
        4,
        keys.to(dtype),
        values.to(dtype),
        torch.arange(tokens).repeat(HEADS, 1),
        tokens,
        queries[:, tokens - rows :].to(dtype),
        torch.arange(tokens - rows, tokens),
        SCALING,
        marked=marked,
    )


def row(layer: Layer, head: int, query: int, seen: Sequence[int] | None = None) -> dict[int, float]:
    """By position, the attention of one of a head's queries, of those that the layer has."""
    assert layer.queries is not None
    assert layer.query_positions is not None
    at = int(layer.query_positions[query])
    keys = layer.keys[head // GROUP].float()
    vector = layer.queries[head, query].float()
    positions = layer.positions[head // GROUP].tolist()
    entries = {position: number for number, position in enumerate(positions) if 0 <= position <= at}
    if seen is not None:
        entries = {position: entries[position] for position in seen if position in entries}
    logits = {position: float(vector @ keys[entry]) * SCALING for position, entry in entries.items()}
    most = max(logits.values())
    powers = {position: math.exp(logit - most) for position, logit in logits.items()}
    return {position: power / sum(powers.values()) for position, power in powers.items()}


def kept_positions(layer: Layer, kept: torch.Tensor) -> list[list[int]]:
    """By head of keys."""
    return [layer.positions[head][kept[head] & layer.present[head]].tolist() for head in range(layer.heads)]

"""Attention over a cache of which rows are absent: chunks were stored without them, and there is nothing to see."""

from __future__ import annotations

import torch

from cakekv.engine.cache import TwoEndedCache, TwoEndedLayer
from cakekv.engine.tap import Attending, Hand


def positions_of(layer: TwoEndedLayer, first: int, end: int) -> torch.Tensor:
    """The positions of a layer's rows from `first` to `end`: (kv_heads, tokens), int64; -1 where one is absent."""
    positions = torch.arange(first, end, device=layer.regions[0].device).repeat(layer.key_heads, 1)
    if layer.has_absent:
        positions.masked_fill_(layer.known_absent[:, first:end], -1)
    return positions


def visible(positions: torch.Tensor, length: int, tokens: int, window: int | None) -> torch.Tensor:
    """What the newest `tokens` of `length` see of entries at these positions: (kv_heads, tokens, entries), bool.

    Parameters
    ----------
    positions : Tensor
        (kv_heads, entries); -1 where there is none.
    length, tokens : int
        Tokens of the sequence so far, and those of them whose queries attend.
    window : int or None
        As in `LayerLayout`.
    """
    at = torch.arange(length - tokens, length, device=positions.device)[:, None]
    seen = (positions[:, None] >= 0) & (positions[:, None] <= at)
    if window is not None:
        seen &= positions[:, None] > at - window
    return seen


def attend_present(layer: TwoEndedLayer, attending: Attending) -> torch.Tensor:
    """The model's attention over what is there of a layer, which the newest tokens have just been written to."""
    if not layer.has_absent:
        return attending.ordinary()
    heads, tokens = attending.query.shape[1:3]
    positions = positions_of(layer, layer.length - attending.key.shape[2], layer.length)
    seen = visible(positions, layer.length, tokens, layer.window)
    return attending.attend(attending.key, attending.value, seen.repeat_interleave(heads // layer.key_heads, 0)[None])


def present_only(cache: TwoEndedCache) -> Hand:
    """The `Hand` of forwards over a cache of which rows may be absent."""

    def attend(attending: Attending) -> torch.Tensor:
        return attend_present(cache.layers[attending.layer], attending)

    return attend

"""Choosing the next token from logits."""

from __future__ import annotations

import torch

from cakekv.engine.base import check_sampling
from cakekv.errors import BadInput


def choose_token(
    logits: torch.Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Choose a token, greedily or by sampling.

    Parameters
    ----------
    logits : Tensor
        One per token of the vocabulary, shape (vocabulary,).
    temperature : float
        0 takes the most probable token; otherwise logits are divided by it and a token is sampled.
    top_k : int, optional
        Sample from this many of the most probable tokens only.
    top_p : float, optional
        Sample from the fewest most probable tokens that together have at least this probability.
    generator : torch.Generator, optional
        Source of randomness, on the logits' device; torch's own if not given.

    Raises
    ------
    BadInput
        A setting is out of range, or the logits hold a NaN, or an infinity to sample by.
    """
    if logits.ndim != 1 or not logits.numel():
        raise BadInput(f"logits must have shape (vocabulary,), not {tuple(logits.shape)}")
    check_sampling(temperature, top_k, top_p)
    if bool(logits.isnan().any()):
        raise BadInput("the logits hold a NaN: the model's weights or its KV cache are damaged")
    if temperature == 0:
        return int(logits.argmax())

    logits = logits.float()
    best = logits.max()
    if not bool(best.isfinite()):
        raise BadInput("the logits hold an infinity: the model's weights or its KV cache are damaged")
    # So that none becomes infinite, however low the temperature; what softmax gives is the same.
    scaled = (logits - best) / max(temperature, torch.finfo(torch.float32).tiny)
    ranked, tokens = scaled.sort(descending=True, stable=True)
    ranked = ranked[: None if top_k is None else min(top_k, len(ranked))]
    probabilities = ranked.softmax(dim=0)
    if top_p is not None:
        before = probabilities.cumsum(dim=0) - probabilities
        probabilities = probabilities[before < top_p]
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])

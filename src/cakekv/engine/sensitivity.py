"""What a model keeps of a text, and how much it minds errors there: what `cakekv codec learn` learns from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cakekv.engine.cache import TwoEndedLayer

if TYPE_CHECKING:
    from cakekv.codec.learning import Seen
    from cakekv.engine.transformers import TransformersEngine

_SPAN = 512


def look_at(
    engine: TransformersEngine, token_ids: Sequence[int], tail_tokens: int, seed: int
) -> Iterator[tuple[str, int, Seen]]:
    """Compute a text, and the gradients of what follows by its keys and values.

    What follows are the last tokens, with answers drawn from the model's own distribution: the products of such
    gradients are, on average, the Fisher information.

    Parameters
    ----------
    engine : TransformersEngine
        The model.
    token_ids : sequence of int
        The text.
    tail_tokens : int
        How many of its tokens, from the end, are what follows.
    seed : int
        What answers are drawn with.

    Yields
    ------
    role, layer, Seen
        Every plane, without the tokens that `kvtc` keeps exactly.

    Raises
    ------
    UnknownRotation
        How keys are turned by their positions is not known.
    """
    from cakekv.codec.learning import Seen

    rotations = engine.rotations()
    end = len(token_ids) - tail_tokens
    cache = engine.new_cache(end)
    for start in range(0, end, _SPAN):
        engine.compute(cache, token_ids[start : min(end, start + _SPAN)], start)
    grown = cache.dynamic_cache(end)
    pairs = zip(grown.layers, cache.layers, strict=True)
    layers = [layer for layer, kept in pairs if isinstance(kept, TwoEndedLayer)]
    leaves = []
    for layer in layers:
        layer.keys, layer.values = (plane.detach().requires_grad_() for plane in (layer.keys, layer.values))
        leaves += [layer.keys, layer.values]
    with torch.enable_grad():
        logits = engine.forward(grown, token_ids[end:]).logits[0].float()
        chances = torch.log_softmax(logits, -1)
        generator = torch.Generator().manual_seed(seed)
        answers = torch.multinomial(chances.detach().cpu().exp(), 1, generator=generator)
        likelihood = chances.gather(1, answers.to(chances.device)).sum()
        gradients = torch.autograd.grad(likelihood, leaves)
    for index, (plane, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        layer, first = index // 2, end - plane.shape[2]
        arrays = [one.detach()[0].to("cpu", torch.float32).numpy() for one in (plane, gradient)]
        if index % 2 == 0:
            arrays = [_turned_back(one, rotations[layer], first) for one in arrays]
        sinks = max(0, _sinks() - first)
        yield "values" if index % 2 else "keys", layer, Seen(*(one[:, sinks:] for one in arrays))


def _sinks() -> int:
    from cakekv.codec.kvtc import SINKS

    return SINKS


def _turned_back(plane: Any, rotation: Any, start: int) -> Any:
    from cakekv.codec.kernels import turn

    cosine, sine = rotation.turns(start, plane.shape[1])
    back = np.array(plane)
    turn(back, cosine, -sine, rotation.interleaved)
    return back

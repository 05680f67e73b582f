"""How a live model turns its keys by their positions: read from its rotary modules, and checked on its keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cakekv.engine.support import cached_keys
from cakekv.errors import UnknownRotation
from cakekv.rotation import Rotation

_TOKENS = 24
_TOLERANCE = 0.1
"""Share of the keys' size that may differ once they are turned back: roundings, deep in a model of 16 bits."""
_CHANGING = ("dynamic", "longrope")


def find_rotations(model: Any) -> list[Rotation]:
    """How the keys of each layer that caches any are turned.

    The frequencies are those that the model holds. Which layer uses which, and what are pairs, its keys tell: one token
    again and again has the same keys at all positions, in all layers, once they are turned back.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model that `probe` accepts.

    Raises
    ------
    UnknownRotation
        None of the model's frequencies explains its keys, or they change with the prompt's length.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind in _CHANGING:
            raise UnknownRotation(f"its RoPE is of the type {kind}, which changes with the prompt's length")
    candidates = [Rotation(())]
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            frequencies = tuple(buffer.float().reshape(-1).tolist())
            candidates += [Rotation(frequencies), Rotation(frequencies, interleaved=True)]
    candidates = list(dict.fromkeys(candidates))
    return [_best(candidates, keys, layer) for layer, keys in enumerate(cached_keys(model, [1] * _TOKENS))]


def _best(candidates: list[Rotation], keys: torch.Tensor, layer: int) -> Rotation:
    """The one that explains best how a layer's keys of one token, (heads, tokens, width), differ."""
    fitting = [one for one in candidates if 2 * len(one.frequencies) <= keys.shape[-1]]
    away = {one: _away(one, keys.numpy().astype(np.float64)) for one in fitting}
    best = min(away, key=lambda one: away[one])
    if not away[best] <= _TOLERANCE:
        raise UnknownRotation(f"nothing that it has of RoPE explains the keys of its layer {layer}")
    return best


def _away(rotation: Rotation, keys: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """How much keys of one token differ once they are turned back, as a share of their size."""
    from cakekv.codec.kernels import turn

    cosine, sine = rotation.turns(0, keys.shape[1])
    back = keys.copy()
    turn(back, cosine, -sine, rotation.interleaved)
    size = float(np.square(back).sum())
    return float(np.square(back - back[:, :1]).sum() / size) ** 0.5 if size else 0.0

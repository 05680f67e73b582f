"""Places chunks elsewhere than where they were computed: their keys are turned on the way, in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cakekv.codec.base import Segment
from cakekv.engine.base import Move
from cakekv.engine.cache import TwoEndedLayer
from cakekv.errors import UnknownRotation
from cakekv.rotation import Rotation, Turns

_TOKENS, _BY = 24, 1000
_TOLERANCE = 0.1
"""Share of the keys' or values' size that may differ: roundings, deep in a model of 16 bits."""


def place_moved(layer: TwoEndedLayer, start: int, segment: Segment, move: Move, rotation: Rotation | None) -> None:
    """Write a layer's segment of a chunk into its memory from position `start` on.

    Parameters
    ----------
    layer : TwoEndedLayer
        Of the cache being restored.
    start : int
        Where the first token that is not skipped goes.
    segment : memoryview or Tensor
        As in `Engine.place`.
    move : Move
        Where the chunk comes from.
    rotation : Rotation or None
        How the layer's keys are turned; None: they stay as they are.
    """
    offset, served = 0, move.tokens - move.skip
    for number, region in enumerate(layer.regions):
        target = region[:, start : start + served]
        heads, _, width = region.shape
        elements = heads * move.tokens * width
        if isinstance(segment, memoryview):
            part = torch.frombuffer(segment, dtype=region.dtype, count=elements, offset=offset)
        else:
            part = segment[offset : offset + elements * region.itemsize].view(region.dtype)
        source = part.view(heads, move.tokens, width)[:, move.skip :]
        offset += elements * region.itemsize
        keys = layer.key_heads if number == 0 and rotation is not None and rotation.frequencies and move.by else 0
        if region.device.type != "cpu":
            source = source.to(region.device, non_blocking=True)
            if keys:
                assert rotation is not None
                target[:keys] = turned(source[:keys], rotation.turns(move.by, 1), rotation.interleaved)
            target[keys:] = source[keys:]
            continue
        # By NumPy and numba, as `HostTransfer` says; 16-bit elements are copied as numbers.
        to, of = _plain(target), _plain(source)
        if keys:
            to[:keys] = _turned_by_host(source[:keys], rotation, move.by)
        np.copyto(to[keys:], of[keys:])


def check_turns(engine: Any, rotations: list[Rotation]) -> None:
    """Raise `UnknownRotation` unless keys that are turned are those which the model computes at their new positions.

    Parameters
    ----------
    engine : TransformersEngine
        The model's.
    rotations : list of Rotation
        What was found out about it.
    """
    from cakekv.engine.support import accepts

    if not accepts(getattr(engine.model, "_orig_mod", engine.model), "position_ids"):
        if any(rotation.frequencies for rotation in rotations):
            raise UnknownRotation("its forward takes no positions")
        return
    tokens = min(_TOKENS, engine.max_context // 2)
    by = min(_BY, engine.max_context - tokens)
    token_ids = [(7 * token + 3) % engine.vocabulary_size for token in range(tokens)]
    here, there, moved = (engine.new_cache(tokens) for _ in range(3))
    with torch.inference_mode():
        for cache, first in ((here, 0), (there, by)):
            cache.set_length(0)
            positions = torch.arange(first, first + tokens, device=engine.device)[None]
            engine.forward(cache, token_ids, position_ids=positions)
    segments = [engine.staging(size) for size in engine.layout.segment_bytes(tokens)]
    engine.gather(here, 0, tokens, segments)
    engine.place_moved(moved, 0, tokens, segments, Move(tokens, 0, by, rotations))
    for number, (one, other) in enumerate(zip(moved.stored, there.stored, strict=True)):
        for region, expected in zip(one.regions, other.regions, strict=True):
            size = float(expected.double().square().sum())
            away = float((region.double() - expected.double()).square().sum())
            if not away <= _TOLERANCE**2 * size:
                raise UnknownRotation(
                    f"turned to other positions, the keys of its layer {number} are not those that it computes there"
                )


def turned(keys: torch.Tensor, turns: Turns, interleaved: bool) -> torch.Tensor:
    """Keys turned in float32, on their device.

    Parameters
    ----------
    keys : Tensor
        (heads, tokens, width).
    turns : Turns
        As of `Rotation.turns`, of every token, or of one for all; of at least one pair.
    interleaved : bool
        As in `Rotation`.
    """
    cosine, sine = torch.from_numpy(turns.copy()).to(keys.device)
    result = keys.to(torch.float32, copy=True)
    part = result[..., : 2 * turns.shape[-1]]
    one, other = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
    first, second = one * cosine - other * sine, other * cosine + one * sine
    one.copy_(first)
    other.copy_(second)
    return result.to(keys.dtype)


def _turned_by_host(keys: torch.Tensor, rotation: Rotation | None, by: int) -> np.ndarray[Any, Any]:
    """The same by the CPU, as `_plain` has it."""
    from cakekv.codec.elements import from_elements, to_elements
    from cakekv.codec.kernels import turn

    assert rotation is not None
    dtype = str(keys.dtype).removeprefix("torch.")
    rows = np.array(_plain(keys), order="C")
    values = from_elements(rows.reshape(-1).view(np.uint8), dtype, rows.shape)
    cosine, sine = (np.repeat(each, rows.shape[1], axis=0) for each in rotation.turns(by, 1))
    turn(values, cosine, sine, rotation.interleaved)
    if dtype != "float32":  # else turned in place
        to_elements(values, dtype, rows.reshape(-1).view(np.uint8))
    return rows


def _plain(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's memory as NumPy sees it: elements of 16 bits as integers, since there is no bfloat16."""
    return (tensor.view(torch.int16) if tensor.itemsize == 2 else tensor).numpy()

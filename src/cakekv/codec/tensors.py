"""The decoders' inner steps as torch operations on any device: the counterpart of `kernels.py`.

Several layers with planes of one shape are decoded at once, along the first dimension: a device is busy for so short a
time with one of them that launching its kernels would take longer. Every multiplication and addition is an operation of
its own and rounds as the loops in `kernels.py` do, so that results are the same bit for bit.
"""

from __future__ import annotations

import torch

from cakekv.codec.kernels import groups_of, rows_of


def unpacked(code: torch.Tensor, bits: int, heads: int, tokens: int, width: int) -> torch.Tensor:
    """The codes that `kernels.put_codes` packed.

    Parameters
    ----------
    code : Tensor
        (layers, heads * rows * width), uint8.
    bits : {2, 3, 4, 5, 8}
        Per code.
    heads, tokens, width : int
        Of the plane.

    Returns
    -------
    Tensor
        (layers, heads, tokens, width), uint8.
    """
    rows = code.view(len(code), heads, rows_of(bits, tokens), width)
    if bits == 8:
        return rows
    if bits % 2 == 0:
        return _spread_bits(rows, bits).flatten(2, 3)[:, :, :tokens]
    low = bits - 1
    blocks = rows.view(len(code), heads, -1, bits, width)
    lower = _spread_bits(blocks[:, :, :, :low], low).flatten(3, 4)
    upper = _spread_bits(blocks[:, :, :, low:], 1).flatten(3, 4)
    return (lower | upper << low).flatten(2, 3)[:, :, :tokens]


def _spread_bits(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """(…, rows, width) to (…, rows, codes per byte, width): the lowest bits of a byte are its first code."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=rows.device)
    return (rows.unsqueeze(-2) >> shifts[:, None]) & ((1 << bits) - 1)


def numbers(code: torch.Tensor, begin: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of type `dtype` that stand in every layer's code, (layers, bytes), from byte `begin` on.

    Returns
    -------
    Tensor
        (layers, count), float32.
    """
    part = code[:, begin : begin + count * dtype.itemsize]
    aligned = part.clone(memory_format=torch.contiguous_format)  # they may begin at any byte
    return aligned.view(dtype).float()


def scales_and_lows(
    code: torch.Tensor, per_channel: bool, group: int, heads: int, tokens: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut a code that `kernels.quantise` wrote.

    Parameters
    ----------
    code : Tensor
        (layers, bytes), uint8.
    per_channel, group, heads, tokens, width
        As `quantise` was given them.

    Returns
    -------
    scales, lows : Tensor
        (layers, heads, tokens, width), float32: each element's.
    rest : Tensor
        (layers, bytes): the packed codes.
    """
    count = groups_of(per_channel, group, heads, tokens, width)
    both = numbers(code, 0, 2 * count, torch.bfloat16)
    if per_channel:
        many = each(both.view(len(code), 2, heads, -1, width), 3, group, tokens)
    else:
        many = each(both.view(len(code), 2, heads, tokens, -1), 4, group, width)
    return many[:, 0], many[:, 1], code[:, 4 * count :]


def each(few: torch.Tensor, dimension: int, group: int, count: int) -> torch.Tensor:
    """Every number `group` times along a dimension, `count` altogether."""
    group = min(group, count)
    shape = list(few.shape)
    shape.insert(dimension + 1, group)
    return few.unsqueeze(dimension + 1).expand(shape).flatten(dimension, dimension + 1).narrow(dimension, 0, count)

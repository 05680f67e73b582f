"""Five bits for keys, four for values, because an error in a key costs several times as much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cakekv.codec.affine import Affine
from cakekv.codec.base import Code, Plane, Values
from cakekv.codec.kernels import compiled, get_row, groups_of, put_codes, put_row, round_up, rows_of, unpack_row

if TYPE_CHECKING:
    import torch

_VALUE_BITS = 4
_GROUP_BYTES = 3
"""Of a group of values: a scale, and how far below zero its levels begin, in sixteenths of one."""


@dataclass(frozen=True)
class K5V4(Affine):
    """32 levels for each channel's keys, 16 for each token's values: as many bytes as `int4`, less what values save.

    That its groups are larger than those of `int4` costs less than a bit more for keys gains.

    Inside the frontier on both models of `docs/codecs.md`: `kvtc:bits=3` takes fewer bytes and is nearer to the exact
    cache, but has to learn a model first, and decodes many times more slowly.
    """

    name: ClassVar[str] = "k5v4"
    bits: ClassVar[int] = 5
    group: int = 64

    def size(self, plane: Plane, part: int = 0) -> int:
        if plane.role == "keys":
            return super().size(plane)
        codes = plane.heads * rows_of(_VALUE_BITS, plane.tokens) * plane.width
        return _GROUP_BYTES * groups_of(False, self.group, *plane.shape) + codes

    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        if plane.role == "keys":
            return super().encode(plane, values, code)
        _encode_values(values, self.group, code)
        return len(code)

    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        if plane.role == "keys":
            super().decode(plane, codes, values)
        else:
            _decode_values(codes[0], self.group, values)

    def decode_tensors(self, plane: Plane, codes: list[torch.Tensor]) -> torch.Tensor:
        if plane.role == "keys":
            return super().decode_tensors(plane, codes)
        import torch

        from cakekv.codec.tensors import each, numbers, unpacked

        count = groups_of(False, self.group, *plane.shape)
        grouped = (len(codes[0]), plane.heads, plane.tokens, -1)
        few = numbers(codes[0], 0, count, torch.bfloat16).view(grouped)
        depths = numbers(codes[0], 2 * count, count, torch.uint8).view(grouped).mul_(few * (1 / 16))
        scales, lows = (each(of_groups, 3, self.group, plane.width) for of_groups in (few, depths))
        packed = codes[0][:, _GROUP_BYTES * count :]
        return unpacked(packed, _VALUE_BITS, *plane.shape).float().mul_(scales).sub_(lows)


@compiled
def _encode_values(values, group, code):  # type: ignore[no-untyped-def]
    heads, tokens, width = values.shape
    across = (width + group - 1) // group
    depths_at = 2 * heads * tokens * across
    codes_at = 3 * heads * tokens * across
    code[codes_at:] = 0
    levels = np.float32(15)
    scale, depth = np.empty(across, np.float32), np.empty(across, np.float32)
    half, codes = np.empty(across, np.uint32), np.empty((tokens, width), np.uint8)
    for h in range(heads):
        for t in range(tokens):
            row, at = values[h, t], (h * tokens + t) * across
            for a in range(across):
                least, most = np.float32(0), np.float32(0)
                for w in range(a * group, min((a + 1) * group, width)):
                    least, most = min(least, row[w]), max(most, row[w])
                depth[a] = -least
                scale[a] = (most - least) / levels
            round_up(scale, half)
            put_row(code, 2 * at, half)
            for a in range(across):
                inverse = np.float32(1) / scale[a] if scale[a] > 1e-37 else np.float32(0)
                steps = np.rint(depth[a] * inverse * np.float32(16))  # 240 at most
                code[depths_at + at + a] = np.uint8(steps)
                low = steps * (scale[a] * np.float32(1 / 16))
                for w in range(a * group, min((a + 1) * group, width)):
                    level = (row[w] + low) * inverse + np.float32(0.5)
                    codes[t, w] = np.uint8(min(max(level, np.float32(0)), levels))
        put_codes(codes, 4, code, codes_at + h * ((tokens + 1) // 2) * width)


@compiled
def _decode_values(code, group, values):  # type: ignore[no-untyped-def]
    heads, tokens, width = values.shape
    across = (width + group - 1) // group
    depths_at, codes_at = 2 * heads * tokens * across, 3 * heads * tokens * across
    scales = np.empty((tokens, across), np.float32)
    for h in range(heads):
        get_row(code, 2 * h * tokens * across, scales.reshape(-1))
        for t in range(tokens):
            row = values[h, t]
            unpack_row(code, codes_at + h * ((tokens + 1) // 2) * width, 4, t, row)
            for a in range(across):
                scale = scales[t, a]
                low = np.float32(code[depths_at + (h * tokens + t) * across + a]) * (scale * np.float32(1 / 16))
                for w in range(a * group, min((a + 1) * group, width)):
                    row[w] = row[w] * scale - low

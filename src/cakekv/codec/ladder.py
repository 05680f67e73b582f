"""Eight bits in three parts: two are useful alone, two and four more refine them, so that a load can choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cakekv.codec.affine import Affine
from cakekv.codec.base import Code, Plane, Values
from cakekv.codec.kernels import compiled, get_row, groups_of, put_codes, quantise, rows_of, unpack_row

if TYPE_CHECKING:
    import torch

_BITS = (2, 2, 4)
"""Of each part, from the most significant."""


@dataclass(frozen=True)
class Ladder(Affine):
    """The codes of `int8`, cut into bits: 4 levels, 16 or 256 per group, by how many parts are read.

    What is not read is taken to be in the middle. So one or two parts diverge more than `kivi` and `int4`, of as many
    bits, on both models of `docs/codecs.md`: what it has for that is the choice when chunks are read.

    Parameters
    ----------
    read : {1, 2, 3}
        How many parts loads read, at most. All are always stored.
    """

    name: ClassVar[str] = "ladder"
    bits: ClassVar[int] = 8
    parts: ClassVar[int] = 3
    choices: ClassVar[tuple[str, ...]] = ("read",)
    window: int = 128
    read: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("read", 1 <= self.read <= self.parts, "1, 2 or 3")

    @property
    def parts_read(self) -> int:
        return self.read

    def size(self, plane: Plane, part: int = 0) -> int:
        scales = 0 if part else self._scales_bytes(plane)
        return scales + plane.heads * rows_of(_BITS[part], plane.tokens) * plane.width

    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        whole = np.empty(super().size(plane), np.uint8)
        quantise(values, self.bits, self._per_channel(plane), self.group, whole)
        scales = self._scales_bytes(plane)
        begin = 0 if part else scales
        code[:begin] = whole[:begin]
        _put_part(whole[scales:].reshape(plane.shape), _BITS[part], sum(_BITS[part + 1 :]), code[begin:])
        return len(code)

    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        parts = [codes[part] if part < len(codes) else codes[0][:0] for part in range(self.parts)]
        _decode(*parts, len(codes), self._per_channel(plane), self.group, values)

    def decode_tensors(self, plane: Plane, codes: list[torch.Tensor]) -> torch.Tensor:
        from cakekv.codec.tensors import scales_and_lows, unpacked

        scales, lows, first = scales_and_lows(codes[0], self._per_channel(plane), self.group, *plane.shape)
        values = unpacked(first, _BITS[0], *plane.shape).float()
        for bits, packed in zip(_BITS[1:], codes[1:], strict=False):
            values.mul_(1 << bits).add_(unpacked(packed, bits, *plane.shape))
        step = 1 << sum(_BITS[len(codes) :])
        return values.mul_(step).add_((step - 1) / 2).mul_(scales).add_(lows)

    def _scales_bytes(self, plane: Plane) -> int:
        """Scales and lows, with the first part."""
        return 4 * groups_of(self._per_channel(plane), self.group, *plane.shape)


@compiled
def _put_part(codes, bits, shift, code):  # type: ignore[no-untyped-def]
    """Pack `bits` bits of every code, above the lowest `shift`."""
    heads, tokens, width = codes.shape
    code[:] = 0
    mask = np.uint8((1 << bits) - 1)
    piece = np.empty((tokens, width), np.uint8)
    rows = (tokens * bits + 7) // 8
    for h in range(heads):
        for t in range(tokens):
            for w in range(width):
                piece[t, w] = (codes[h, t, w] >> np.uint8(shift)) & mask
        put_codes(piece, bits, code, h * rows * width)


@compiled
def _decode(first, second, third, parts, per_channel, group, values):  # type: ignore[no-untyped-def]
    heads, tokens, width = values.shape
    across = width if per_channel else (width + group - 1) // group
    groups = (tokens + group - 1) // group if per_channel else tokens
    lows_at = 2 * heads * groups * across
    two, four = (tokens * 2 + 7) // 8 * width, (tokens * 4 + 7) // 8 * width
    scales, lows = np.empty((groups, across), np.float32), np.empty((groups, across), np.float32)
    more = np.empty(width, np.float32)
    step = np.float32(64 if parts == 1 else 16 if parts == 2 else 1)
    middle = (step - np.float32(1)) / np.float32(2)
    for h in range(heads):
        at = 2 * h * groups * across
        get_row(first, at, scales.reshape(-1))
        get_row(first, lows_at + at, lows.reshape(-1))
        for t in range(tokens):
            row = values[h, t]
            unpack_row(first, 2 * lows_at + h * two, 2, t, row)
            if parts > 1:
                unpack_row(second, h * two, 2, t, more)
                for w in range(width):
                    row[w] = row[w] * np.float32(4) + more[w]
            if parts > 2:
                unpack_row(third, h * four, 4, t, more)
                for w in range(width):
                    row[w] = row[w] * np.float32(16) + more[w]
            if per_channel:
                scale, low = scales[t // group], lows[t // group]
                for w in range(width):
                    row[w] = (row[w] * step + middle) * scale[w] + low[w]
            else:
                for a in range(across):
                    one_scale, one_low = scales[t, a], lows[t, a]
                    for w in range(a * group, min((a + 1) * group, width)):
                        row[w] = (row[w] * step + middle) * one_scale + one_low

"""Eight bits in two parts: the upper four are useful alone, the lower can come later (QuantSpec, arXiv 2502.10424)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cakekv.codec.affine import Affine
from cakekv.codec.base import Code, Plane, Values
from cakekv.codec.kernels import compiled, get_row, put_codes, rows_of, unpack_row

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TwoPlane(Affine):
    """16 levels per group, and the remainder in 16 steps of a sixteenth of a level.

    Parameters
    ----------
    read : {"both", "upper"}
        What loads read. Both parts are always stored.
    """

    name: ClassVar[str] = "two_plane"
    bits: ClassVar[int] = 4
    parts: ClassVar[int] = 2
    choices: ClassVar[tuple[str, ...]] = ("read",)
    read: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("read", self.read in ("both", "upper"), "both or upper")

    @property
    def parts_read(self) -> int:
        return 2 if self.read == "both" else 1

    def size(self, plane: Plane, part: int = 0) -> int:
        return super().size(plane) if part == 0 else plane.heads * rows_of(4, plane.tokens) * plane.width

    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        if part == 0:
            return super().encode(plane, values, code)
        upper = np.empty(super().size(plane), np.uint8)
        super().encode(plane, values, upper)
        near = np.empty(plane.shape, np.float32)
        super().decode(plane, [upper], near)
        _put_remainders(values, near, upper, self._per_channel(plane), self.group, code)
        return len(code)

    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        super().decode(plane, codes[:1], values)
        if len(codes) > 1:
            _add_remainders(*codes, self._per_channel(plane), self.group, values)

    def decode_tensors(self, plane: Plane, codes: list[torch.Tensor]) -> torch.Tensor:
        from cakekv.codec.tensors import scales_and_lows, unpacked

        scales, lows, upper = scales_and_lows(codes[0], self._per_channel(plane), self.group, *plane.shape)
        values = unpacked(upper, self.bits, *plane.shape).float().mul_(scales).add_(lows)
        for lower in codes[1:]:
            values.add_(unpacked(lower, 4, *plane.shape).float().sub_(8).mul_(scales * (1 / 16)))
        return values


@compiled
def _steps(upper, h, per_channel, group, shape):  # type: ignore[no-untyped-def]
    """A sixteenth of the scales of a head, as `dequantise` reads them: by group, or token, and channel, or group."""
    _, tokens, width = shape
    across = width if per_channel else (width + group - 1) // group
    groups = (tokens + group - 1) // group if per_channel else tokens
    steps = np.empty((groups, across), np.float32)
    get_row(upper, 2 * h * groups * across, steps.reshape(-1))
    return steps * np.float32(1 / 16)


@compiled
def _put_remainders(values, near, upper, per_channel, group, lower):  # type: ignore[no-untyped-def]
    heads, tokens, width = values.shape
    lower[:] = 0
    codes = np.empty((tokens, width), np.uint8)
    for h in range(heads):
        steps = _steps(upper, h, per_channel, group, values.shape)
        for t in range(tokens):
            for w in range(width):
                step = steps[t // group, w] if per_channel else steps[t, w // group]
                inverse = np.float32(1) / step if step > 1e-37 else np.float32(0)
                level = (values[h, t, w] - near[h, t, w]) * inverse + np.float32(8.5)
                codes[t, w] = np.uint8(min(max(level, np.float32(0)), np.float32(15)))
        put_codes(codes, 4, lower, h * ((tokens + 1) // 2) * width)


@compiled
def _add_remainders(upper, lower, per_channel, group, values):  # type: ignore[no-untyped-def]
    heads, tokens, width = values.shape
    row = np.empty(width, np.float32)
    for h in range(heads):
        steps = _steps(upper, h, per_channel, group, values.shape)
        for t in range(tokens):
            unpack_row(lower, h * ((tokens + 1) // 2) * width, 4, t, row)
            target = values[h, t]
            if per_channel:
                each = steps[t // group]
                for w in range(width):
                    target[w] += (row[w] - np.float32(8)) * each[w]
            else:
                for a in range(steps.shape[1]):
                    step = steps[t, a]
                    for w in range(a * group, min((a + 1) * group, width)):
                        target[w] += (row[w] - np.float32(8)) * step

"""Eight-bit floating point (E4M3, arXiv 2209.05433) with a scale per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cakekv.codec.base import Code, Codec, Plane, Values
from cakekv.codec.kernels import compiled

if TYPE_CHECKING:
    import torch

_MOST = 448.0
"""The largest finite number."""


@dataclass(frozen=True)
class Fp8(Codec):
    """Three bits of mantissa for every element, keys and values; channels are scaled to use all exponents.

    Inside the frontier on both models of `docs/codecs.md`: `int8` takes as many bytes and is nearer to the exact cache.
    """

    name: ClassVar[str] = "fp8"
    on_device: ClassVar[bool] = True

    def size(self, plane: Plane, part: int = 0) -> int:
        return 4 * plane.heads * plane.width + plane.elements

    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        scales = np.abs(values).max(axis=1).astype(np.float32) / np.float32(_MOST)
        scales[scales < 1e-36] = 0.0
        count = 4 * scales.size
        code[:count] = np.frombuffer(scales.astype("<f4").tobytes(), np.uint8)
        with np.errstate(divide="ignore"):
            inverse = np.where(scales > 0, np.float32(1) / scales, np.float32(0))
        _encode(values, inverse, code[count:].reshape(plane.shape))
        return len(code)

    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        count = 4 * plane.heads * plane.width
        scales = np.frombuffer(codes[0][:count].tobytes(), "<f4").reshape(plane.heads, plane.width)
        _decode(codes[0][count:].reshape(plane.shape), scales.astype(np.float32), _TABLE, values)

    def decode_tensors(self, plane: Plane, codes: list[torch.Tensor]) -> torch.Tensor:
        import torch

        from cakekv.codec.tensors import numbers

        channels = plane.heads * plane.width
        scales = numbers(codes[0], 0, channels, torch.float32).view(-1, plane.heads, 1, plane.width)
        code = codes[0][:, 4 * channels :].view(-1, *plane.shape)
        values: torch.Tensor = code.view(torch.float8_e4m3fn).float()
        values.masked_fill_(code == 0x7F, _MOST).masked_fill_(code == 0xFF, -_MOST)  # no numbers: as in `_TABLE`
        return values.mul_(scales)


def _numbers() -> Values:
    """The 256 numbers of E4M3; the two that are not numbers as the largest."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    return np.where(code < 128, 1, -1) * np.minimum(size, _MOST).astype(np.float32)


_TABLE = _numbers().astype(np.float32)


@compiled
def _encode(values, inverse, code):  # type: ignore[no-untyped-def]
    """To the nearest, ties to even."""
    heads, tokens, width = values.shape
    scaled = np.empty(width, np.float32)
    bits = scaled.view(np.uint32)
    for h in range(heads):
        for t in range(tokens):
            for w in range(width):
                scaled[w] = values[h, t, w] * inverse[h, w]
            for w in range(width):
                word = bits[w]
                sign = (word >> np.uint32(24)) & np.uint32(0x80)
                size = word & np.uint32(0x7FFFFFFF)
                if size < np.uint32(121 << 23):  # below 2**-6: steps of 2**-9
                    small = np.uint32(np.rint(abs(scaled[w]) * np.float32(512.0)))
                else:
                    size += np.uint32(0x7FFFF) + ((size >> np.uint32(20)) & np.uint32(1))
                    small = min((size >> np.uint32(20)) - np.uint32(120 << 3), np.uint32(0x7E))
                code[h, t, w] = np.uint8(sign | small)


@compiled
def _decode(code, scales, table, values):  # type: ignore[no-untyped-def]
    heads, tokens, width = values.shape
    for h in range(heads):
        for t in range(tokens):
            for w in range(width):
                values[h, t, w] = table[code[h, t, w]] * scales[h, w]

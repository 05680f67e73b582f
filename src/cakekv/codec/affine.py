"""What all codecs with evenly spaced levels share: groups, each with a scale and a least element."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cakekv.codec.base import Code, Codec, Plane, Values
from cakekv.codec.kernels import PACKED_BITS, affine_bytes, dequantise, quantise

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Affine(Codec, ABC):
    """Even levels: keys in groups along each channel, because some channels are far larger than the others; values
    in groups of each token's channels (KIVI, arXiv 2402.02750, section 3).

    Parameters
    ----------
    group : int
        Elements that share a scale: tokens of a channel, or channels of a token. No group straddles chunks.
    keys : {"channel", "token"}
        What keys are grouped along; "token" is here to compare with.
    """

    bits: ClassVar[int]
    on_device: ClassVar[bool] = True
    group: int = 32
    keys: str = "channel"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("bits", self.bits in PACKED_BITS, "2, 3, 4, 5 or 8")
        self.check("group", 1 <= self.group < 2**31, "1 or more elements")
        self.check("keys", self.keys in ("channel", "token"), "channel or token")

    def size(self, plane: Plane, part: int = 0) -> int:
        return affine_bytes(self.bits, self._per_channel(plane), self.group, *plane.shape)

    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        quantise(values, self.bits, self._per_channel(plane), self.group, code)
        return len(code)

    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        dequantise(codes[0], self.bits, self._per_channel(plane), self.group, values)

    def decode_tensors(self, plane: Plane, codes: list[torch.Tensor]) -> torch.Tensor:
        from cakekv.codec.tensors import scales_and_lows, unpacked

        scales, lows, packed = scales_and_lows(codes[0], self._per_channel(plane), self.group, *plane.shape)
        return unpacked(packed, self.bits, *plane.shape).float().mul_(scales).add_(lows)

    def _per_channel(self, plane: Plane) -> bool:
        return plane.role == "keys" and self.keys == "channel"

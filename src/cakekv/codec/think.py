"""ThinK: drops the key channels that matter least (arXiv 2407.21018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cakekv.codec.base import Code, Codec, DamagedCode, Plane, Values
from cakekv.codec.elements import from_elements, to_elements


@dataclass(frozen=True)
class Think(Codec):
    """Drops a part of every head's key channels, those with the least energy; values are kept as they are.

    ThinK weighs a channel's keys with its last queries. A chunk is stored for questions that nobody has asked yet, so
    here keys alone decide, chunk by chunk.

    Inside the frontier on both models of `docs/codecs.md`: `int8` takes fewer bytes and is nearer to the exact cache.

    Parameters
    ----------
    drop : float
        The part of the channels that is dropped.
    pairwise : bool
        Whether to drop channels in the pairs that RoPE rotates (d, d + width / 2), so that keys can be rotated later.
    """

    name: ClassVar[str] = "think"
    drop: float = 0.4
    pairwise: bool = False
    window: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("drop", 0.0 < self.drop < 1.0, "between 0 and 1")

    def size(self, plane: Plane, part: int = 0) -> int:
        if plane.role == "values":
            return plane.raw_bytes
        kept = plane.heads * plane.tokens * self._kept(plane) * plane.itemsize
        return plane.heads * -(-plane.width // 8) + kept

    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        if plane.role == "values":
            to_elements(values, plane.dtype, code)
            return len(code)
        energy = np.einsum("htw,htw->hw", values, values, dtype=np.float64)
        if self._in_pairs(plane):
            half = plane.width // 2
            pairs = energy[:, :half] + energy[:, half:]
            best = np.argsort(-pairs, axis=1, kind="stable")[:, : self._kept(plane) // 2]
            best = np.concatenate([best, best + half], axis=1)
        else:
            best = np.argsort(-energy, axis=1, kind="stable")[:, : self._kept(plane)]
        best.sort(axis=1)
        mask = np.zeros((plane.heads, plane.width), np.uint8)
        np.put_along_axis(mask, best, 1, axis=1)
        packed = np.packbits(mask, axis=1)
        code[: packed.size] = packed.reshape(-1)
        kept = np.take_along_axis(values, best[:, None, :], axis=2)
        to_elements(np.ascontiguousarray(kept), plane.dtype, code[packed.size :])
        return len(code)

    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        code = codes[0]
        if plane.role == "values":
            np.copyto(values, from_elements(code, plane.dtype, plane.shape))
            return
        mask_bytes = -(-plane.width // 8)
        packed = code[: plane.heads * mask_bytes].reshape(plane.heads, mask_bytes)
        mask = np.unpackbits(packed, axis=1, count=plane.width).astype(bool)
        kept = self._kept(plane)
        if (mask.sum(axis=1) != kept).any():
            raise DamagedCode(f"a head's mask does not keep {kept} channels")
        shape = (plane.heads, plane.tokens, kept)
        data = from_elements(code[packed.size :], plane.dtype, shape)
        values[:] = 0.0
        for head in range(plane.heads):
            values[head][:, mask[head]] = data[head]

    def _in_pairs(self, plane: Plane) -> bool:
        return self.pairwise and plane.width % 2 == 0

    def _kept(self, plane: Plane) -> int:
        """Channels per head; at least one, or one pair."""
        if self._in_pairs(plane):
            return 2 * max(1, plane.width // 2 - int(self.drop * (plane.width // 2)))
        return max(1, plane.width - int(self.drop * plane.width))

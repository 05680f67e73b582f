"""Three bits with learned levels, and the few outliers nearly exact, in the spirit of KVQuant (arXiv 2401.18079).

Keys are quantised as they were before RoPE, channel by channel, and turned again when they are decoded. Unlike
KVQuant's, levels are learned from the chunk itself, not from a calibration set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from cakekv.codec.base import Code, Codec, DamagedCode, Plane, Values
from cakekv.codec.elements import from_elements, to_elements
from cakekv.codec.kernels import compiled, pack3, rows_of, turn, unpack_row
from cakekv.rotation import Rotation, Turns

_LEVELS = 8
_BINS = 512
_ROUNDS = 12
_UNTURNED = Rotation(())
_MOST = {"bfloat16": 3e38, "float16": 65504.0, "float32": 3e38}
"""Turned back, an element of float16 may be larger than float16 can hold."""


@dataclass(frozen=True)
class Nuq3(Codec):
    """Keys are scaled per channel, values per token; all of a plane shares eight levels.

    Inside the frontier on both models of `docs/codecs.md`: `kvtc:bits=3` takes fewer bytes and is nearer to the exact
    cache, but has to learn a model first, and decodes many times more slowly.

    Parameters
    ----------
    outliers : float
        The part of the elements that is kept in the cache's own type: those furthest from their channel's, or
        token's, mean.
    rope : {"before", "after"}
        Whether keys are quantised as they were before RoPE or as they are cached. The first needs a model that turns
        keys by nothing but their position, in a way that is known.
    """

    name: ClassVar[str] = "nuq3"
    version: ClassVar[int] = 2
    outliers: float = 0.01
    rope: str = "before"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("rope", self.rope in ("before", "after"), "before or after")
        self.check("outliers", 0.0 <= self.outliers <= 0.25, "from 0 to 0.25")

    @property
    def turns_back(self) -> bool:
        return self.rope == "before"

    def size(self, plane: Plane, part: int = 0) -> int:
        codes = plane.heads * rows_of(3, plane.tokens) * plane.width
        each = _index(plane).itemsize + plane.itemsize
        return 4 * _LEVELS + 4 * _vectors(plane) + self._kept(plane) * each + codes

    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        axis, (cosine, sine), interleaved = _axis(plane), *self._turns(plane)
        values = values.copy()
        turn(values, cosine, -sine, interleaved)
        mean, spread = values.mean(axis, keepdims=True), values.std(axis, dtype=np.float64, keepdims=True) + 1e-30
        away = np.abs((values - mean) / spread).reshape(-1)
        kept = np.sort(np.argpartition(-away, min(self._kept(plane), away.size - 1))[: self._kept(plane)])
        usual = values.copy()
        usual.reshape(-1)[kept] = np.broadcast_to(mean, values.shape).reshape(-1)[kept]
        low = _bfloat16(usual.min(axis, keepdims=True))
        scale = _bfloat16((usual.max(axis, keepdims=True) - low[0]).clip(0))
        with np.errstate(over="ignore"):  # where a group has one value, and that is rounded away from its low
            within = (usual - low[0]) / np.maximum(scale[0], np.float32(1e-30))
        place: Values = within.clip(0, 1).astype(np.float32)
        levels = _learn(place)
        nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, place).astype(np.uint8)
        exact = np.empty(len(kept) * plane.itemsize, np.uint8)
        to_elements(values.reshape(-1)[kept].clip(-_MOST[plane.dtype], _MOST[plane.dtype]), plane.dtype, exact)
        parts = [levels.astype("<f4"), scale[1], low[1], kept.astype(_index(plane)), exact]
        head = np.frombuffer(b"".join(part.tobytes() for part in parts), np.uint8)
        code[: head.size] = head
        pack3(nearest, code[head.size :])
        return len(code)

    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        code, vectors, kept = codes[0], _vectors(plane), self._kept(plane)
        lengths = [4 * _LEVELS, 2 * vectors, 2 * vectors, kept * _index(plane).itemsize, kept * plane.itemsize]
        ends = np.cumsum(lengths)
        pieces = [code[end - length : end].copy() for end, length in zip(ends, lengths, strict=True)]
        levels = pieces[0].view("<f4")
        scale, low = (from_elements(piece, "bfloat16", (vectors,)) for piece in pieces[1:3])
        index, outliers = pieces[3].view(_index(plane)), from_elements(pieces[4], plane.dtype, (kept,))
        if not np.isfinite(levels).all() or (index >= plane.elements).any():
            raise DamagedCode("a level that is no number, or an outlier that is nowhere")
        (cosine, sine), interleaved = self._turns(plane)
        per_channel, body = plane.role == "keys", code[ends[-1] :]
        _decode(body, levels, scale, low, per_channel, index, outliers, cosine, sine, interleaved, values)

    def _turns(self, plane: Plane) -> tuple[Turns, bool]:
        """How a plane is turned, and whether neighbours are pairs."""
        rotation = _UNTURNED
        if self.turns_back and plane.role == "keys":
            assert plane.rotation is not None, "ChunkCoder asks for it"
            rotation = plane.rotation
        return rotation.turns(plane.start, plane.tokens), rotation.interleaved

    def _kept(self, plane: Plane) -> int:
        return int(self.outliers * plane.elements)


def _axis(plane: Plane) -> int:
    return 1 if plane.role == "keys" else 2


def _vectors(plane: Plane) -> int:
    """How many channels, or tokens, have a scale."""
    return plane.heads * (plane.width if plane.role == "keys" else plane.tokens)


def _index(plane: Plane) -> np.dtype[np.unsignedinteger[npt.NBitBase]]:
    return np.dtype("<u2" if plane.elements <= 1 << 16 else "<u4")


def _bfloat16(values: Values) -> tuple[Values, npt.NDArray[np.uint16]]:
    """Rounded to bfloat16, as float32 and as it is stored."""
    data = np.empty(2 * values.size, np.uint8)
    to_elements(np.ascontiguousarray(values), "bfloat16", data)
    return from_elements(data, "bfloat16", values.shape), data.view("<u2")


def _learn(place: Values) -> Values:
    """The eight levels that leave the least square error: Lloyd's algorithm on a histogram of [0, 1]."""
    counts, _ = np.histogram(place, _BINS, (0, 1))
    middles = (np.arange(_BINS) + 0.5) / _BINS
    levels = (np.arange(_LEVELS) + 0.5) / _LEVELS
    for _ in range(_ROUNDS):
        nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, middles)
        weight = np.bincount(nearest, counts, _LEVELS)
        total = np.bincount(nearest, counts * middles, _LEVELS)
        levels = np.sort(np.where(weight > 0, total / np.maximum(weight, 1), levels))
    return levels.astype(np.float32)


@compiled
def _decode(code, levels, scale, low, per_channel, index, outliers, cosine, sine, interleaved, values):  # type: ignore[no-untyped-def]
    heads, tokens, width = values.shape
    rows = (tokens + 7) // 8 * 3
    for h in range(heads):
        scales, lows = scale[h * width : (h + 1) * width], low[h * width : (h + 1) * width]
        for t in range(tokens):
            row = values[h, t]
            unpack_row(code, h * rows * width, 3, t, row)
            if per_channel:
                for w in range(width):
                    row[w] = levels[np.uint8(row[w])] * scales[w] + lows[w]
            else:
                one_scale, one_low = scale[h * tokens + t], low[h * tokens + t]
                for w in range(width):
                    row[w] = levels[np.uint8(row[w])] * one_scale + one_low
    flat = values.reshape(-1)
    for i in range(index.size):
        flat[index[i]] = outliers[i]
    turn(values, cosine, sine, interleaved)

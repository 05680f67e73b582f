"""Fewer tokens per chunk: of every layer and head only the rows that a method keeps, encoded by another codec."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from cakekv.codec.base import LARGEST, Code, Codec, DamagedCode, Plane, Values
from cakekv.errors import BadInput, CannotEncode
from cakekv.keys import canonical

if TYPE_CHECKING:
    from cakekv.compress.base import Method

Kept = NDArray[np.bool_]
"""(heads, tokens)"""


def codec_of_rows(codec: Codec, methods: Sequence[Method]) -> Codec:
    """The codec with which chunks are stored, given a method that acts at `store`, if there is one among these.

    Raises
    ------
    BadInput
        The method cannot act there, or the codec cannot encode what it leaves.
    """
    acting = [method for method in methods if "store" in method.at]
    if not acting or isinstance(codec, Rows):
        return codec
    return Rows(window=codec.window, method=acting[0], inner=codec)


@dataclass(frozen=True, kw_only=True)
class Rows(Codec):
    """The rows that a method keeps of a chunk; which ones they are is written in front of them, a bit for every row.

    Layers with a window keep all of their rows, of which few are visible anyway.

    Parameters
    ----------
    method : Method
        Chooses, of each chunk by itself, and may merge others into what it keeps.
    inner : Codec
        Encodes the rows of each head as a plane of their own.
    """

    name: ClassVar[str] = "rows"
    fixed: ClassVar[bool] = False
    drops: ClassVar[bool] = True
    method: Method
    inner: Codec

    def __post_init__(self) -> None:
        super().__post_init__()
        method, inner = self.method, self.inner
        if method.compact:
            raise BadInput(f"compress {method.name} cannot act at store: what is stored keeps its positions")
        why = _why_not(inner)
        if why:
            raise BadInput(
                f"codec {inner.name} does not go with compress {method.name} at store, because {why}: give codec raw, "
                "int8 or int4"
            )

    @property
    def label(self) -> str:
        return f"{self.inner.label}+{self.method.name}"

    @property
    def fingerprint(self) -> str:
        return canonical(
            {
                "codec": self.name,
                "version": self.version,
                "window": self.window,
                "inner": self.inner.fingerprint,
                "method": self.method.fingerprint,
            }
        )

    def for_model(self, weights: Iterable[str]) -> Codec:
        return replace(self, inner=self.inner.for_model(weights))

    def check_plane(self, plane: Plane) -> None:
        self.inner.check_plane(_part(plane, 1))

    def size(self, plane: Plane, part: int = 0) -> int:
        return plane.heads * (_bits_bytes(plane) + self.inner.size(_part(plane, plane.tokens)))

    def prepare(
        self, planes: Sequence[Sequence[Plane]], values: Sequence[Sequence[Values]], position: int
    ) -> Sequence[Sequence[Values]]:
        """What is left of the chunk: the keys and the values of rows that are not kept are NaN."""
        import torch

        from cakekv.compress.base import Layer

        prepared = [[np.array(one) for one in layer] for layer in values]
        shown, targets = [], []
        for number, (layer, copies) in enumerate(zip(planes, prepared, strict=True)):
            if layer[0].windowed:
                continue
            keys, others = (torch.from_numpy(one) for one in copies)
            positions = torch.arange(position, position + layer[0].tokens, device="cpu").expand(layer[0].heads, -1)
            shown.append(Layer(number, len(planes), keys, others, positions, position + layer[0].tokens))
            targets.append(copies)
        for seen, copies, chosen in zip(shown, targets, self.method.keep(shown) if shown else [], strict=True):
            if chosen is None or bool(chosen.all()):
                continue
            if not bool(chosen.any(1).all()):
                raise CannotEncode(
                    f"{self.method.name} keeps nothing of a head of layer {seen.index}, tokens from {position}: at "
                    "least one row is needed; the chunk is not saved"
                )
            merged = self.method.merge(seen, chosen)
            if merged is not None:
                if merged.bias is not None:
                    raise CannotEncode(f"{self.method.name} gives rows a bias, which chunks have no place for")
                copies = [self._checked(one.numpy(), seen.index, position) for one in (merged.keys, merged.values)]
            dropped = ~chosen.numpy()
            for target, copy in zip(prepared[seen.index], copies, strict=True):
                target[:] = copy
                target[dropped] = np.nan
        return prepared

    def _checked(self, merged: Values, layer: int, position: int) -> Values:
        if not np.abs(merged).max(initial=0.0) <= LARGEST:
            raise CannotEncode(
                f"what {self.method.name} merges in layer {layer}, tokens from {position}, is not finite, or too "
                "large; the chunk is not saved"
            )
        return merged

    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        kept = ~np.isnan(values[..., 0])
        end = plane.heads * _bits_bytes(plane)
        code[:end] = np.packbits(kept, axis=1, bitorder="little").reshape(-1)
        for head, (own, one) in enumerate(self._heads(plane, kept)):
            begin, end = end, end + self.inner.size(own)
            self.inner.encode(own, np.ascontiguousarray(values[head : head + 1, one]), code[begin:end])
        return end

    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        code, end = codes[0], plane.heads * _bits_bytes(plane)
        if len(code) < end:
            raise DamagedCode("it ends within what says which rows there are")
        bits = np.unpackbits(code[:end].reshape(plane.heads, -1), axis=1, bitorder="little").astype(np.bool_)
        kept = bits[:, : plane.tokens]
        if bits[:, plane.tokens :].any() or not kept.any(1).all():
            raise DamagedCode("it does not say which rows there are")
        heads = list(self._heads(plane, kept))
        expected = end + sum(self.inner.size(own) for own, _ in heads)
        if len(code) != expected:
            raise DamagedCode(f"it has {len(code)} bytes instead of {expected} for so many rows")
        values.fill(np.nan if plane.role == "keys" else 0.0)
        for head, (own, one) in enumerate(heads):
            begin, end = end, end + self.inner.size(own)
            rows = np.empty(own.shape, np.float32)
            self.inner.decode(own, [code[begin:end]], rows)
            values[head, one] = rows[0]

    def _heads(self, plane: Plane, kept: Kept) -> Iterator[tuple[Plane, Kept]]:
        """For every head, its rows as a plane of their own, and which ones they are."""
        for one in kept:
            yield _part(plane, int(one.sum())), one


def _why_not(codec: Codec) -> str:
    """Why a codec cannot encode rows that stand anywhere; "" if it can."""
    if codec.turns_back:
        return "it takes keys back to before RoPE, row after row"
    if codec.parts > 1:
        return "it stores chunks in parts"
    if not codec.fixed:
        return "its codes vary in length"
    return ""


def _part(plane: Plane, tokens: int) -> Plane:
    """So many rows of one head."""
    return replace(plane, heads=1, tokens=tokens)


def _bits_bytes(plane: Plane) -> int:
    """Bytes that say which rows of a head there are."""
    return -(-plane.tokens // 8)

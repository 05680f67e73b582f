"""Four bits per element: keys quantised per channel, values per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cakekv.codec.affine import Affine


@dataclass(frozen=True)
class Int4(Affine):
    """16 levels between the least and the greatest element of every group; about 5 bits with the groups' scales.

    Inside the frontier on both models of `docs/codecs.md`: `k5v4` takes fewer bytes and is nearer to the exact cache.
    """

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4

"""Four bits per element: keys quantised per channel, values per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cakekv.codec.affine import Affine


@dataclass(frozen=True)
class Int4(Affine):
    """16 levels between the least and the greatest element of every group; about 5 bits with the groups' scales."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4

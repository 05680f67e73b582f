"""Eight bits per element: keys quantised per channel, values per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cakekv.codec.affine import Affine


@dataclass(frozen=True)
class Int8(Affine):
    """256 levels between the least and the greatest element of every group."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    group: int = 64

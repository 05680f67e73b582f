"""The cache as it is: exact, nothing to encode or decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cakekv.codec.base import Code, Codec, Plane, Values


@dataclass(frozen=True)
class Raw(Codec):
    """Bytes as the model has them. Where nothing is to be encoded, chunks are read straight into place."""

    name: ClassVar[str] = "raw"
    lossy: ClassVar[bool] = False
    encodes: ClassVar[bool] = False

    @property
    def fingerprint(self) -> str:
        """As in keys made before there were codecs."""
        return self.name

    def size(self, plane: Plane, part: int = 0) -> int:
        return plane.raw_bytes

    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        from cakekv.codec.elements import to_elements  # which need numba, and raw chunks do not

        to_elements(values, plane.dtype, code)
        return len(code)

    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        from cakekv.codec.elements import from_elements

        np.copyto(values, from_elements(codes[0], plane.dtype, plane.shape))

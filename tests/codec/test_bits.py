"""How long the codes of evenly spaced levels can be: what cannot be packed is refused before it writes anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from cakekv.codec.affine import Affine
from cakekv.codec.base import Plane
from cakekv.codec.kernels import PACKED_BITS, affine_bytes
from cakekv.errors import BadInput


@dataclass(frozen=True)
class Chosen(Affine):
    """As many bits as are asked for."""

    name: ClassVar[str] = "chosen"
    bits: int = 4  # type: ignore[misc]  # a parameter here, fixed elsewhere


@pytest.mark.parametrize("bits", [-1, 0, 1, 6, 7, 9, 16])
def test_a_codec_whose_codes_cannot_be_packed_is_refused(bits: int) -> None:
    with pytest.raises(BadInput, match=f"codec chosen: bits is {bits}, but must be 2, 3, 4, 5 or 8"):
        Chosen(bits=bits)
    with pytest.raises(ValueError, match=f"{bits} bits cannot be packed"):
        affine_bytes(bits, True, 32, 1, 16, 8)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 64])
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_all_others_stay_within_their_code(bits: int, tokens: int) -> None:
    codec, plane = Chosen(bits=bits), Plane("keys", 0, 1, 2, tokens, 5, "float32")
    values = np.random.default_rng(bits).standard_normal(plane.shape).astype(np.float32)
    size = codec.size(plane)
    guarded = np.full(size + 4096, 0xA5, np.uint8)
    assert codec.encode(plane, values, guarded[:size]) == size
    assert (guarded[size:] == 0xA5).all(), "nothing is written behind the code"
    found = np.full(plane.shape, np.nan, np.float32)
    codec.decode(plane, [guarded[:size]], found)
    assert np.abs(found - values).max() <= np.ptp(values) / (2**bits - 1)

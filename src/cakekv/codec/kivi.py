"""KIVI: two, three or four bits, and the newest tokens exact (arXiv 2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cakekv.codec.affine import Affine


@dataclass(frozen=True)
class Kivi(Affine):
    """Keys per channel, values per token, a window of exact tokens at the prompt's end.

    Inside the frontier on both models of `docs/codecs.md`: with 3 bits, `k5v4` takes fewer bytes and is nearer to the
    exact cache; with 2, `cachegen:level=2`, with and without the window.

    Parameters
    ----------
    bits : {2, 3, 4}
        Per element, besides the groups' scales.
    """

    name: ClassVar[str] = "kivi"
    bits: int = 2  # type: ignore[misc]  # a parameter here, fixed elsewhere
    window: int = 128

    def __post_init__(self) -> None:
        self.check("bits", self.bits in (2, 3, 4), "2, 3 or 4")
        super().__post_init__()

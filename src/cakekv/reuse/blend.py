"""CacheBlend (arXiv 2405.16444): of what documents brought, the positions that deviate most are computed again.

The first layers are computed at all positions. How far the values that come out at the check layer are from the reused
ones tells where those are wrong; from there on only the worst of them are computed, and what follows the documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cakekv.errors import BadInput
from cakekv.prompt import Place
from cakekv.reuse.base import Reuse

_MOST = 2**31 - 1


@dataclass(frozen=True)
class Blend(Reuse):
    """CacheBlend.

    Parameters
    ----------
    recompute : float
        Share of the positions to compute again, of those from the first reused one to the last; 1.0 is a full prefill.
    check : int
        The layer, counted from 0, whose keys and values are compared.
    tensor : {"values", "keys", "both"}
        What of them is.
    choice : {"deviation", "random"}
        Which positions are computed again: "random" ones (the same for the same prompt) are only good to compare with.

    Raises
    ------
    BadInput
        A parameter is out of range.
    """

    name: ClassVar[str] = "blend"
    recompute: float = 0.15
    check: int = 1
    tensor: str = "values"
    choice: str = "deviation"

    def __post_init__(self) -> None:
        share = self.recompute
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 <= share <= 1.0:
            raise BadInput(f"reuse blend: recompute is {share!r}, but must be a share from 0 to 1")
        object.__setattr__(self, "recompute", float(share))
        if isinstance(self.check, bool) or not isinstance(self.check, int) or not 1 <= self.check <= _MOST:
            raise BadInput(f"reuse blend: check is {self.check!r}, but must be a layer: a whole number of 1 or more")
        for name, words in (("tensor", ("values", "keys", "both")), ("choice", ("deviation", "random"))):
            if (word := getattr(self, name)) not in words:
                raise BadInput(f"reuse blend: {name} is {word!r}, but must be one of {', '.join(words)}")

    def recomputed(self, document: Place) -> range:
        return range(document.start, document.start)

"""DBudgetKV (arXiv 2502.16886): as many tokens as it takes until the norm of the last row of attention is nearly there.

No budget is given: a text whose last token looks at little keeps little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cakekv.compress.base import Layer, Method

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DBudgetKV(Method):
    """Ranks tokens, and keeps of the first ones as few as have the whole norm of attention, but for a threshold.

    Norms are taken per head, and averaged: all heads of a layer keep the same number of entries.

    Parameters
    ----------
    threshold : float
        This share of the norm may be lost. 0 keeps everything.
    sinks : int
        So many of the first tokens rank first.
    min_recent : int
        So many of the newest tokens are kept in any case. The paper has none; but in layers whose last token looks at
        little but the first, as many of small models do, its rule keeps that one and nothing else.
    exempt : int
        The first so many layers keep everything.
    rows : int
        The mean of so many of the last rows of attention is looked at.
    order : str
        How tokens rank behind the sinks: by "position", the newest first, as in the paper; or by the "attention" that
        they receive, in each head of keys by itself, as in the authors' example.
    """

    name: ClassVar[str] = "dbudgetkv"
    threshold: float = 0.01
    sinks: int = 4
    min_recent: int = 64
    exempt: int = 2
    rows: int = 1
    order: str = "position"

    def __post_init__(self) -> None:
        self.check("threshold", 0 <= self.threshold < 1, "0 or more, below 1")
        self.check("sinks", 0 <= self.sinks < 2**31, "0 or more tokens")
        self.check("min_recent", 0 <= self.min_recent < 2**31, "0 or more tokens")
        self.check("exempt", 0 <= self.exempt < 2**31, "0 or more layers")
        self.check("rows", 0 < self.rows < 2**31, "1 or more")
        self.check("order", self.order in ("position", "attention"), "position or attention")

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        return [None if self.threshold == 0 or layer.index < self.exempt else self._keep(layer) for layer in layers]

    def _keep(self, layer: Layer) -> torch.Tensor:
        import torch

        attention = layer.attention().mean(2)
        worth = layer.positions.float() if self.order == "position" else attention.mean(1)
        worth = worth.masked_fill(layer.first(self.sinks), float("inf")).masked_fill(~layer.present, float("-inf"))
        ranking = worth.argsort(dim=-1, descending=True, stable=True)
        ranked = attention.gather(-1, ranking[:, None].expand_as(attention))
        norms = ranked.square().cumsum(-1).sqrt().mean((0, 1))
        count = int((norms < (1 - self.threshold) * norms[-1]).sum()) + 1
        kept = torch.zeros_like(layer.present).scatter_(-1, ranking[:, :count], True)
        return (kept | layer.newest(self.min_recent)) & layer.present

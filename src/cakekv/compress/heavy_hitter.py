"""H2O (arXiv 2306.14048): the tokens that received most attention, and the newest. Others are compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cakekv.compress.base import ALL, Layer, Method, top

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HeavyHitter(Method):
    """The greatest sums of attention, per layer and head.

    Parameters
    ----------
    share : float
        Of the prompt's tokens, this share is kept.
    recent : float
        Of those that are kept, this share is for the newest.
    rows : int
        So many of the prompt's last rows of attention are summed up; -1 for all, as in the paper.
    pool : int
        Each sum is meaned over so many neighbours; odd. With the last rows only, it is SnapKV (arXiv 2404.14469).
    """

    name: ClassVar[str] = "heavy_hitter"
    share: float = 0.2
    recent: float = 0.5
    rows: int = ALL
    pool: int = 1

    def __post_init__(self) -> None:
        self.check("share", 0 < self.share <= 1, "above 0, up to 1")
        self.check("recent", 0 <= self.recent <= 1, "0 to 1")
        self.check("rows", self.rows == ALL or 0 < self.rows < 2**31, "1 or more, or -1 for all")
        self.check("pool", self.pool % 2 == 1 and 0 < self.pool < 2**31, "1 or another odd number")

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        return [self._keep(layer) for layer in layers]

    def _keep(self, layer: Layer) -> torch.Tensor:
        import torch

        budget = max(1, round(self.share * layer.length))
        recent = layer.newest(min(budget, max(1, round(self.recent * budget))))
        scores = layer.received()
        if self.pool > 1:
            scores = torch.nn.functional.avg_pool1d(scores, self.pool, 1, self.pool // 2)
        scores = scores.masked_fill(recent, float("inf")).masked_fill(~layer.present, float("-inf"))
        return top(scores, budget) & layer.present

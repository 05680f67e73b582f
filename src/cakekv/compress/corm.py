"""CORM (arXiv 2404.15949): tokens that were important to one of the last queries, and the newest.

No budget is given: the longer a text, the smaller the share of it that its last queries look at. It goes on while an
answer grows; what it has let go of does not come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cakekv.compress.base import Layer, Method

if TYPE_CHECKING:
    import torch

_NEVER = -(2**31)


@dataclass(frozen=True)
class Corm(Method):
    """What got at least an equal share, 1/t of a query that sees t tokens, from one of the last queries.

    A query sees what is left: t is the number of entries over which its attention is normalized.

    Parameters
    ----------
    window : int
        So many of the last queries count.
    recent : int
        So many of the newest tokens are kept in any case.
    union : bool
        Whether a token is important if it is to one of the queries that share a head of keys; else to their mean.
    """

    name: ClassVar[str] = "corm"
    times: ClassVar[frozenset[str]] = frozenset({"prefill", "decode"})
    window: int = 256
    recent: int = 256
    union: bool = True

    def __post_init__(self) -> None:
        self.check("window", 0 < self.window < 2**31, "1 query or more")
        self.check("recent", 0 < self.recent < 2**31, "1 token or more")

    @property
    def rows(self) -> int:
        return self.window

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        return [self._keep(layer) for layer in layers]

    def step(self, layer: Layer) -> torch.Tensor | None:
        return self._keep(layer) if "important" in layer.memo else None  # `keep` is not shown layers with a window

    def _keep(self, layer: Layer) -> torch.Tensor:
        important = self._last_important(layer)
        return (important > layer.length - 1 - self.window) | layer.newest(self.recent)

    def _last_important(self, layer: Layer) -> torch.Tensor:
        """(kv_heads, entries): the position of the last query that each entry was important to.

        That is all that a window of flags says. It is noted by position, since entries move when others are let go of.
        """
        import torch

        at = layer.positions.clamp_min(0)
        noted = layer.memo.get("important")
        if noted is None:
            noted = torch.zeros((layer.heads, 0), dtype=torch.int32, device=at.device)
        noted = torch.nn.functional.pad(noted, (0, layer.length - noted.shape[1]), value=_NEVER)
        for part in layer.by_rows():
            noted = noted.scatter_reduce(1, at, self._important(part), "amax")
        layer.memo["important"] = noted
        return noted.gather(1, at)

    def _important(self, layer: Layer) -> torch.Tensor:
        """(kv_heads, entries): the same, of these queries only."""
        import torch

        assert layer.query_positions is not None
        attention, visible = layer.attention(), layer.visible()
        shares = attention.amax(1) if self.union else attention.mean(1)
        important = visible & (shares >= 1 / visible.sum(-1, keepdim=True, dtype=torch.float32))
        rows = layer.query_positions.to(torch.int32)[None, :, None]
        return torch.where(important, rows, _NEVER).amax(1)

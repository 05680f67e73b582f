"""StreamingLLM (arXiv 2309.17453): the first tokens and the newest ones. What other methods are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cakekv.compress.base import Layer, Method

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SinkRecent(Method):
    """Sinks and a window.

    Parameters
    ----------
    sinks : int
        So many of the first tokens are kept.
    share : float
        Of the prompt's tokens, this share is kept, sinks included; at least 1 token besides them.
    recent : int
        If it is not 0: so many of the newest tokens are kept instead, also while an answer grows.
    """

    name: ClassVar[str] = "sink_recent"
    times: ClassVar[frozenset[str]] = frozenset({"prefill", "decode"})
    sinks: int = 4
    share: float = 0.2
    recent: int = 0

    def __post_init__(self) -> None:
        self.check("sinks", 0 <= self.sinks < 2**31, "0 or more tokens")
        self.check("share", 0 < self.share <= 1, "above 0, up to 1")
        self.check("recent", 0 <= self.recent < 2**31, "0 or more tokens")

    @property
    def at(self) -> frozenset[str]:
        return frozenset({"prefill", "decode"} if self.recent else {"prefill"})

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        return [self._keep(layer, self.recent or round(self.share * layer.length) - self.sinks) for layer in layers]

    def step(self, layer: Layer) -> torch.Tensor | None:
        return self._keep(layer, self.recent) if self.recent else None

    def _keep(self, layer: Layer, recent: int) -> torch.Tensor:
        return layer.first(self.sinks) | layer.newest(max(1, recent))

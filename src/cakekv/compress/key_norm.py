"""Keys with small norms (arXiv 2406.11430): they receive most attention. Needs no queries; others are compared with it.

The norm of a key does not change when RoPE turns it, and who asks does not matter: so a chunk can be made smaller as it
is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cakekv.compress.base import Layer, Method, top

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class KeyNorm(Method):
    """The smallest norms of keys, per layer and head.

    Parameters
    ----------
    share : float
        Of the entries of every head, this share is kept; at `store`, of every chunk's.
    when : {"store", "prefill"}
        Whether chunks are made smaller as they are stored, or a prompt's cache once it is complete.
    """

    name: ClassVar[str] = "key_norm"
    times: ClassVar[frozenset[str]] = frozenset({"store", "prefill"})
    share: float = 0.5
    when: str = "store"

    def __post_init__(self) -> None:
        self.check("share", 0 < self.share <= 1, "above 0, up to 1")
        self.check("when", self.when in self.times, "store or prefill")

    @property
    def at(self) -> frozenset[str]:
        return frozenset({self.when})

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        return [self._keep(layer) for layer in layers]

    def _keep(self, layer: Layer) -> torch.Tensor:
        norms = layer.keys.float().norm(dim=-1).masked_fill(~layer.present, float("inf"))
        counts = (layer.present.sum(1) * self.share).round().long().clamp_(min=1)
        return top(-norms, counts) & layer.present

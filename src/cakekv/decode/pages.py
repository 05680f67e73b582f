"""Pages of consecutive tokens, as Quest has them (arXiv 2406.10774). Others are compared with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cakekv.compress.base import Layer
from cakekv.decode.groups import Grouped, Groups


@dataclass(frozen=True)
class Pages(Grouped):
    """The pages whose keys could have the greatest product with a query, given least and greatest of each channel.

    Parameters
    ----------
    tokens : int
        Of a page.
    """

    name: ClassVar[str] = "pages"
    tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("tokens", self.tokens >= 1, "1 or more")

    @property
    def waits(self) -> int:
        return self.tokens

    def group(self, layer: Layer, start: int, end: int) -> Groups:
        keys = layer.keys[:, start:end].float()
        full = (end - start) // self.tokens * self.tokens
        parts = [keys[:, :full].reshape(layer.heads, -1, self.tokens, keys.shape[2])] if full else []
        if full < end - start:
            parts.append(keys[:, None, full:])
        marks = tuple(torch.cat([getattr(part, of)(2) for part in parts], 1) for of in ("amin", "amax"))
        sizes = torch.tensor([part.shape[2] for part in parts for _ in range(part.shape[1])], device=keys.device)
        order = torch.arange(start, end, device=keys.device)
        return Groups(end, order.expand(layer.heads, -1), sizes.expand(layer.heads, -1), marks)

    def score(self, queries: torch.Tensor, groups: Groups) -> torch.Tensor:
        least, greatest = groups.marks
        positive, negative = queries.clamp(min=0), queries.clamp(max=0)
        return positive @ greatest[:, None].mT + negative @ least[:, None].mT

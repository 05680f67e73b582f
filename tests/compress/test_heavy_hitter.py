from __future__ import annotations

import torch

from cakekv.compress import method_named
from cakekv.compress.base import Layer


def kept(recipe: str) -> list[int]:
    """Of ten entries, of which the fifth received all the attention."""
    layer = Layer(0, 1, torch.zeros(1, 10, 4), torch.zeros(1, 10, 4), torch.arange(10)[None], 10)
    layer.total = torch.eye(10)[4:5]
    (mask,) = method_named(recipe).keep([layer])
    assert mask is not None
    return mask[0].nonzero()[:, 0].tolist()


def test_sums_are_pooled_over_neighbours() -> None:
    assert kept("heavy_hitter:share=0.4,recent=0") == [4, 7, 8, 9]
    assert kept("heavy_hitter:share=0.4,recent=0,pool=3") == [3, 4, 5, 9]

"""The same rearrangement as `order.py`'s on the device that holds the cache, for chunks that are decoded there."""

from __future__ import annotations

import numpy as np
import torch

from cakekv.vllm.working.paged_cache.order import BlockOrder


class DeviceOrder:
    """Rearranges a layer's segment from planes to blocks.

    Parameters
    ----------
    order : BlockOrder
        Where elements are in a block.
    device : torch.device
        Where the segments are.
    """

    def __init__(self, order: BlockOrder, device: torch.device) -> None:
        self._shapes = [place.shape for place in order.places]
        self._element = {2: torch.int16, 4: torch.int32}[order.itemsize]
        places = np.concatenate([place.ravel() for place in order.places])
        self._sources = torch.from_numpy(np.argsort(places).astype(np.int32)).to(device)
        """By index in a block: which element of the block's planes, one plane behind the other."""

    def to_blocks(self, planes: torch.Tensor) -> torch.Tensor:
        """Planes, each (heads, tokens, width) of all blocks together, to blocks one after the other; flat, uint8."""
        elements = planes.view(self._element)
        blocks = len(elements) // len(self._sources)
        by_block, begin = [], 0
        for heads, tokens, width in self._shapes:
            end = begin + heads * blocks * tokens * width
            plane = elements[begin:end].view(heads, blocks, tokens * width)
            by_block.append(plane.transpose(0, 1).flatten(1))
            begin = end
        return torch.cat(by_block, 1).index_select(1, self._sources).flatten().view(torch.uint8)

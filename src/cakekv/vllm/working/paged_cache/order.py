"""Where in a block an attention backend puts which element, found out by having it write numbers.

Kernels order a block's inside as suits their instructions. Codecs need planes (heads, tokens, width): keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cakekv.codec.kernels import compiled

if TYPE_CHECKING:
    import torch

_DIGIT = 128
"""Whole numbers below are exact in every type that a cache may have."""


class BlockOrder:
    """Rearranges a layer's segment of a chunk between planes and blocks.

    Parameters
    ----------
    places : sequence of integer arrays
        Per plane, (heads, block tokens, width): index in a block, counted in elements.
    itemsize : int
        Bytes per element.
    """

    def __init__(self, places: Sequence[npt.NDArray[np.int32]], itemsize: int) -> None:
        self.places = places
        self.itemsize = itemsize
        self._element = {2: np.uint16, 4: np.uint32}[itemsize]
        self._block_elements = sum(place.size for place in places)

    def to_blocks(self, planes: memoryview, blocks: memoryview) -> None:
        """Planes, each (heads, tokens, width) of all blocks together, to blocks one after the other."""
        for plane, places, target in self._views(planes, blocks):
            _scatter(plane, places, target)

    def to_planes(self, blocks: memoryview, planes: memoryview) -> None:
        """The reverse."""
        for plane, places, source in self._views(planes, blocks):
            _collect(source, places, plane)

    def _views(self, planes: memoryview, blocks: memoryview):  # type: ignore[no-untyped-def]
        by_block = np.frombuffer(blocks, self._element).reshape(-1, self._block_elements)
        begin = 0
        for places in self.places:
            heads, tokens, width = places.shape
            end = begin + heads * len(by_block) * tokens * width
            plane = np.frombuffer(planes, self._element)[begin:end].reshape(heads, -1, width)
            yield plane, places, by_block
            begin = end


def learn_order(
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    write: Callable[[Sequence[torch.Tensor]], None],
    read: Callable[[], memoryview],
) -> BlockOrder | None:
    """Find out where elements go.

    Parameters
    ----------
    shapes : sequence of (heads, block tokens, width)
        Of the planes.
    dtype : torch.dtype
        Of the cache's elements.
    write : callable
        Has the attention backend write planes of these shapes into a block.
    read : callable
        That block's bytes.

    Returns
    -------
    BlockOrder or None
        None if the block does not hold each element once, and nothing else.
    """
    import torch

    sizes = [int(np.prod(shape)) for shape in shapes]
    elements = sum(sizes)
    numbers = np.arange(elements)
    found = np.zeros(elements, np.int64)
    weight = 1
    while weight < elements:
        digits = torch.from_numpy(numbers // weight % _DIGIT).to(dtype)
        write([part.view(shape) for part, shape in zip(torch.split(digits, sizes), shapes, strict=True)])
        block = torch.frombuffer(read(), dtype=dtype).to(torch.float32)
        if len(block) != elements:
            return None
        found += weight * np.nan_to_num(block.numpy(), nan=-1.0).astype(np.int64)
        weight *= _DIGIT
    if not np.array_equal(np.sort(found), numbers):
        return None
    places = np.empty(elements, np.int32)
    places[found] = np.arange(elements, dtype=np.int32)
    ends = np.cumsum(sizes)[:-1]
    parts = [part.reshape(shape) for part, shape in zip(np.split(places, ends), shapes, strict=True)]
    return BlockOrder(parts, dtype.itemsize)


@compiled
def _scatter(plane, places, blocks):  # type: ignore[no-untyped-def]
    heads, tokens, width = places.shape
    for h in range(heads):
        for b in range(blocks.shape[0]):
            for t in range(tokens):
                for w in range(width):
                    blocks[b, places[h, t, w]] = plane[h, b * tokens + t, w]


@compiled
def _collect(blocks, places, plane):  # type: ignore[no-untyped-def]
    heads, tokens, width = places.shape
    for h in range(heads):
        for b in range(blocks.shape[0]):
            for t in range(tokens):
                for w in range(width):
                    plane[h, b * tokens + t, w] = blocks[b, places[h, t, w]]

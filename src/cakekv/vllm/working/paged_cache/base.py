"""The contract of a paged cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cakekv.codec.base import Segment

if TYPE_CHECKING:
    import torch

    from cakekv.codec.coder import ChunkCoder
    from cakekv.codec.on_device import DeviceDecoder
    from cakekv.vllm.messages import StepOrders
    from cakekv.vllm.working.paged_cache.order import BlockOrder


class PagedCache(ABC):
    """One worker's KV cache.

    A block's inside is never looked at: attention kernels order it as suits their instructions. So the order is part of
    `layout`, and with it of every key.

    Parameters
    ----------
    layers : sequence of tensor
        Per layer, as `as_blocks` returns it.

    Attributes
    ----------
    layout : str
        Order of the bytes in a block, `canonical`.
    segment_of : dict of str to int
        Per layer's name, which of a chunk's segments holds its part.
    segment_bytes_per_block : tuple of int
        Per layer.
    """

    layout: str
    segment_of: dict[str, int]

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self.segment_bytes_per_block = tuple(layer[0].numel() for layer in layers)

    @abstractmethod
    def machine(self) -> str:
        """What the order of the bytes in a block depends on beside shapes and attention backend."""

    @abstractmethod
    def allocate(self, size: int) -> memoryview:
        """A buffer of `size` bytes to place from and gather into."""

    def decoder(self, coder: ChunkCoder, orders: Sequence[BlockOrder]) -> DeviceDecoder | None:
        """What decodes chunks into blocks where the cache is; None: the CPU does.

        Parameters
        ----------
        coder : ChunkCoder
            What a chunk looks like.
        orders : sequence of BlockOrder
            Per layer.
        """
        return None

    @abstractmethod
    def begin_step(self, orders: StepOrders) -> None:
        """The forward pass of a step is about to be launched; its loads are placed after this, from other threads."""

    @abstractmethod
    def gather(self, block_ids: Sequence[int], segments: Sequence[memoryview]) -> Callable[[], None]:
        """Copy blocks, as the steps launched so far leave them, into a chunk's segments.

        Called between the launches of two steps, by the thread that launches them.

        Returns
        -------
        callable
            Waits until the segments are filled. Whatever becomes of the blocks meanwhile, they hold what they should.
        """

    @abstractmethod
    def place(self, block_ids: Sequence[int], segments: Sequence[Segment | None]) -> None:
        """Copy a chunk's segments into blocks; those that are None are passed over.

        Called by any thread. When it returns, the segments may be overwritten, and every step that is launched from
        then on finds the chunk in place.
        """

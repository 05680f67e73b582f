"""A paged cache in main memory."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cakekv.codec.base import Segment
from cakekv.vllm.working.paged_cache.base import PagedCache

if TYPE_CHECKING:
    import torch

    from cakekv.vllm.messages import StepOrders


class HostPagedCache(PagedCache):
    """Copies by NumPy: `Tensor.copy_` would start a team of OpenMP threads in every thread that calls it."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        super().__init__(layers)
        self._layers = [layer.numpy() for layer in layers]

    def machine(self) -> str:
        import torch

        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

    def allocate(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def begin_step(self, orders: StepOrders) -> None:
        """Nothing: when a step is launched, the one before is over, and so are its copies."""

    def gather(self, block_ids: Sequence[int], segments: Sequence[memoryview]) -> Callable[[], None]:
        for layer, segment in zip(self._layers, segments, strict=True):
            parts = np.frombuffer(segment, np.uint8).reshape(len(block_ids), *layer.shape[1:])
            for part, block in zip(parts, block_ids, strict=True):
                part[:] = layer[block]
        return _nothing_to_wait_for

    def place(self, block_ids: Sequence[int], segments: Sequence[Segment | None]) -> None:
        for layer, segment in zip(self._layers, segments, strict=True):
            if segment is None:
                continue
            assert isinstance(segment, memoryview), "there is no decoder"
            parts = np.frombuffer(segment, np.uint8).reshape(len(block_ids), *layer.shape[1:])
            for part, block in zip(parts, block_ids, strict=True):
                layer[block] = part


def _nothing_to_wait_for() -> None:
    pass

"""vLLM's paged KV cache as bytes: blocks to and from the segments of a chunk."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cakekv.errors import UnsupportedEngine
from cakekv.keys import canonical

if TYPE_CHECKING:
    import torch


class PagedCache:
    """One worker's KV cache in main memory.

    A block's inside is never looked at: attention kernels order it as suits their instructions. So the order is part of
    `layout`, and with it of every key.

    Parameters
    ----------
    kv_caches : mapping of str to tensor
        Per layer, as vLLM hands them to a connector; layers that share one tensor count once.
    blocks : int
        Number of blocks in each.
    kernel : str
        The attention backend, which decides about the order in a block.

    Raises
    ------
    UnsupportedEngine
        A tensor is not in main memory, or not a plain sequence of blocks.
    """

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], blocks: int, kernel: str) -> None:
        self._layers: list[npt.NDArray[np.uint8]] = []
        shapes = []
        seen: dict[int, int] = {}
        self.segment_of: dict[str, int] = {}
        """Per layer's name, which of a chunk's segments holds its part."""
        for name, tensor in kv_caches.items():
            self.segment_of[name] = seen.setdefault(tensor.data_ptr(), len(seen))
            if self.segment_of[name] < len(self._layers):
                continue
            self._layers.append(_as_blocks(name, tensor, blocks))
            shapes.append([list(tensor.shape[1:]), str(tensor.dtype)])
        self.segment_bytes_per_block = tuple(layer.shape[1] for layer in self._layers)
        self.layout = canonical({"blocks": shapes, "kernel": kernel, "cpu": _instruction_set()})

    def gather(self, block_ids: Sequence[int], segments: Sequence[memoryview]) -> None:
        """Copy blocks into a chunk's segments."""
        for layer, segment in zip(self._layers, segments, strict=True):
            parts = np.frombuffer(segment, np.uint8).reshape(len(block_ids), -1)
            for part, block in zip(parts, block_ids, strict=True):
                part[:] = layer[block]

    def place(self, block_ids: Sequence[int], segments: Sequence[memoryview | None]) -> None:
        """Copy a chunk's segments into blocks; those that are None are passed over."""
        for layer, segment in zip(self._layers, segments, strict=True):
            if segment is None:
                continue
            parts = np.frombuffer(segment, np.uint8).reshape(len(block_ids), -1)
            for part, block in zip(parts, block_ids, strict=True):
                layer[block] = part


def _as_blocks(name: str, tensor: torch.Tensor, blocks: int) -> npt.NDArray[np.uint8]:
    """The tensor's own memory as (blocks, bytes)."""
    import torch

    if tensor.device.type != "cpu":
        raise UnsupportedEngine(
            f"the KV cache of {name} is on {tensor.device}: cakekv places chunks on CPUs only so far"
        )
    if not tensor.is_contiguous() or tensor.nbytes % blocks or tensor.shape[0] % blocks:
        raise UnsupportedEngine(
            f"the KV cache of {name}, of shape {tuple(tensor.shape)} and strides {tensor.stride()}, is not a sequence "
            f"of {blocks} blocks: this attention backend is not supported"
        )
    return tensor.view(torch.uint8).numpy().reshape(blocks, -1)


def _instruction_set() -> str:
    """What CPU attention kernels choose the order of a block by."""
    import torch

    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

"""A layer's KV cache as a tensor of bytes per block, whatever the order in which its attention backend wants them.

vLLM hands out a view per layer whose first dimension counts the blocks. Its other dimensions (heads, tokens, content;
K and V side by side or apart; one latent for MLA) lie in memory in an order of the backend's choice, and a block may be
cut into several smaller ones for the kernels. Here they are put into memory order and joined where they touch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cakekv.errors import UnsupportedEngine

if TYPE_CHECKING:
    import torch


def order_in_memory(tensor: torch.Tensor) -> list[int]:
    """The dimensions of a block, from the one with the largest strides to that with the smallest."""
    strides = tensor.stride()
    return sorted(range(1, tensor.dim()), key=lambda dimension: -strides[dimension])


def as_blocks(name: str, tensor: torch.Tensor, blocks: int) -> torch.Tensor:
    """The tensor's own memory as bytes.

    Parameters
    ----------
    name : str
        The layer's.
    tensor : tensor
        Its cache.
    blocks : int
        Number of blocks.

    Returns
    -------
    tensor
        Of type uint8 and shape (blocks, …, bytes), the last dimension contiguous, in between as few as possible: none
        if a block is one piece of memory.

    Raises
    ------
    UnsupportedEngine
        The tensor is not a sequence of so many blocks, or elements of it share memory.
    """
    import torch

    cut: torch.Tensor
    if tensor.dim() > 1 and tensor.shape[0] % blocks == 0:
        cut = tensor.unflatten(0, (blocks, -1))  # type: ignore[no-untyped-call]
        cut = cut.permute(0, *order_in_memory(cut))
        if cut.stride(-1) == 1:
            cut = cut.view(torch.uint8)
            shape, strides = [cut.shape[-1]], [1]
            for size, stride in reversed(list(zip(cut.shape[1:-1], cut.stride()[1:-1], strict=True))):
                if size == 1:
                    continue
                if stride == shape[0] * strides[0]:
                    shape[0] *= size
                else:
                    shape.insert(0, size)
                    strides.insert(0, stride)
            if all(strides[i] >= shape[i + 1] * strides[i + 1] for i in range(len(shape) - 1)):
                return cut.as_strided((blocks, *shape), (cut.stride(0), *strides))
    raise UnsupportedEngine(
        f"the KV cache of {name}, of shape {tuple(tensor.shape)} and strides {tensor.stride()}, is not a sequence "
        f"of {blocks} blocks: this attention backend is not supported"
    )

"""vLLM's paged KV cache as bytes: blocks to and from the segments of a chunk. One kind of memory, one file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cakekv.keys import canonical
from cakekv.vllm.working.paged_cache.base import PagedCache
from cakekv.vllm.working.paged_cache.layers import as_blocks, order_in_memory

if TYPE_CHECKING:
    import torch

__all__ = ["PagedCache", "open_paged_cache"]


def open_paged_cache(
    kv_caches: Mapping[str, torch.Tensor], blocks: int, kernel: str, zeroed: bool = False
) -> PagedCache:
    """The cache of one worker.

    Parameters
    ----------
    kv_caches : mapping of str to tensor
        Per layer, as vLLM hands them to a connector; layers that share one tensor count once.
    blocks : int
        Number of blocks in each.
    kernel : str
        The attention backend, which decides about the order in a block.
    zeroed : bool
        Whether vLLM zeroes blocks before it uses them again.

    Raises
    ------
    UnsupportedEngine
        A tensor is not cut into blocks as expected.
    """
    distinct: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in kv_caches.items():
        distinct.setdefault(tensor.data_ptr(), (name, tensor))
    layers = [as_blocks(name, tensor, blocks) for name, tensor in distinct.values()]
    shapes = [[list(tensor.shape[1:]), str(tensor.dtype), order_in_memory(tensor)] for _, tensor in distinct.values()]
    cache: PagedCache
    if layers[0].device.type == "cuda":
        from cakekv.vllm.working.paged_cache.cuda import CudaPagedCache

        cache = CudaPagedCache(layers, zeroed)
    else:
        from cakekv.vllm.working.paged_cache.host import HostPagedCache

        cache = HostPagedCache(layers)
    segments = {pointer: segment for segment, pointer in enumerate(distinct)}
    cache.segment_of = {name: segments[tensor.data_ptr()] for name, tensor in kv_caches.items()}
    cache.layout = canonical({"blocks": shapes, "kernel": kernel, "machine": cache.machine()})
    return cache

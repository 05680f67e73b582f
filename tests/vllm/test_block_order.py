"""Where elements are in a block is found out, whatever the layout; and what cannot be told apart is refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from test_paged_cache import BLOCKS, CACHES
from vllm.v1.kv_cache_layout import KVCacheLayout

from cakekv.vllm.working.paged_cache.device_order import DeviceOrder
from cakekv.vllm.working.paged_cache.host import HostPagedCache
from cakekv.vllm.working.paged_cache.layers import as_blocks
from cakekv.vllm.working.paged_cache.order import BlockOrder, learn_order

HEADS, TOKENS, WIDTH = 4, 16, 24
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SHAPES = [(HEADS, TOKENS, WIDTH)] * 2


def opened(name: str) -> tuple[torch.Tensor, HostPagedCache, BlockOrder | None]:
    """A cache with keys and values side by side, its blocks as bytes, and their order."""
    tensor = CACHES[name]()[0]
    host = HostPagedCache([as_blocks("layer", tensor, BLOCKS)])

    def write(planes: Sequence[torch.Tensor]) -> None:
        of_block = tensor.unflatten(0, (BLOCKS, -1))[0]  # (pieces, heads, tokens, keys and values)
        for part, plane in enumerate(planes):
            of_block[..., part * WIDTH : (part + 1) * WIDTH] = plane.unflatten(1, (len(of_block), -1)).transpose(0, 1)

    def read() -> memoryview:
        segment = host.allocate(host.segment_bytes_per_block[0])
        host.gather([0], [segment])()
        return segment

    return tensor, host, learn_order(SHAPES, torch.bfloat16, write, read)


@pytest.mark.parametrize(
    "name", [*(f"grouped-{layout.name}" for layout in KVCacheLayout), "split-blocks-LBNHC", "split-blocks-LBHNC"]
)
def test_blocks_to_planes_and_back(name: str) -> None:
    tensor, host, order = opened(name)
    assert order is not None
    blocks = [5, 2]
    size = 2 * host.segment_bytes_per_block[0]
    held, planes = host.allocate(size), host.allocate(size)
    host.gather(blocks, [held])()
    order.to_planes(held, planes)
    of_block = tensor.unflatten(0, (BLOCKS, -1))[blocks]  # (blocks, pieces, heads, tokens, keys and values)
    of_block = of_block.permute(2, 0, 1, 3, 4).reshape(HEADS, 2 * TOKENS, 2 * WIDTH)
    expected = torch.cat([of_block[..., :WIDTH].flatten(), of_block[..., WIDTH:].flatten()])
    assert np.array_equal(np.frombuffer(planes, np.int16), expected.view(torch.int16).numpy())
    back = host.allocate(size)
    order.to_blocks(planes, back)
    assert back == held
    for device in DEVICES:
        on_device = torch.frombuffer(planes, dtype=torch.uint8).to(device)
        again = DeviceOrder(order, torch.device(device)).to_blocks(on_device)
        assert again.cpu().numpy().tobytes() == bytes(held)


def test_a_backend_that_stores_something_else_has_no_order() -> None:
    block = torch.zeros(2 * HEADS * TOKENS * WIDTH, dtype=torch.bfloat16)

    def rounded(planes: Sequence[torch.Tensor]) -> None:
        block.copy_(torch.cat([plane.flatten() for plane in planes]) // 2)

    assert learn_order(SHAPES, torch.bfloat16, rounded, lambda: block.view(torch.uint8).numpy().data) is None
    longer = memoryview(bytearray(block.nbytes + 2))
    assert learn_order(SHAPES, torch.bfloat16, lambda planes: None, lambda: longer) is None

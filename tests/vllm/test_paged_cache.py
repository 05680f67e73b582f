"""Chunks to and from caches in all the layouts that vLLM knows, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lazy_streams import LazyDevice
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheTensor,
    MLAAttentionSpec,
    compute_layout_strides,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

import cakekv.vllm.working.paged_cache.cuda as cuda
from cakekv.errors import UnsupportedEngine
from cakekv.vllm.support import check_device
from cakekv.vllm.working.paged_cache import PagedCache, open_paged_cache
from cakekv.vllm.working.paged_cache.cuda import CudaPagedCache
from cakekv.vllm.working.paged_cache.host import HostPagedCache
from cakekv.vllm.working.paged_cache.layers import as_blocks

BLOCKS, LAYERS = 8, 3


def grouped(dtype: torch.dtype = torch.bfloat16) -> FullAttentionSpec:
    """Several heads, K and V side by side."""
    return FullAttentionSpec(block_size=16, num_kv_heads=4, head_size=24, dtype=dtype)


def latent(alignment: int | None = None) -> MLAAttentionSpec:
    """One latent per token; with an alignment, blocks end in bytes that nobody uses."""
    return MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=36, dtype=torch.bfloat16, alignment=alignment)


def vllms(spec: AttentionSpec, layout: str, kernel_block: int | None = None) -> Callable[[], list[torch.Tensor]]:
    """Caches as vLLM makes them."""

    def make() -> list[torch.Tensor]:
        order = KVCacheLayout[layout]
        strides = compute_layout_strides(spec, BLOCKS, LAYERS, order)
        size = LAYERS * BLOCKS * spec.page_size_bytes
        raw = torch.randint(-128, 128, (size,), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
        tensor = KVCacheTensor(size, [str(layer) for layer in range(LAYERS)], strides[0], strides[1])
        return create_kv_cache_views(raw, spec, BLOCKS, order, tensor, kernel_block)

    return make


def apart(heads_first: bool) -> Callable[[], list[torch.Tensor]]:
    """Caches in which a block holds all keys and then all values."""

    def make() -> list[torch.Tensor]:
        shape = (BLOCKS, 2, 4, 16, 24) if heads_first else (BLOCKS, 2, 16, 4, 24)
        caches = [torch.randn(shape, generator=torch.Generator().manual_seed(layer)) for layer in range(LAYERS)]
        return [cache.transpose(2, 3) for cache in caches] if heads_first else caches

    return make


CACHES = {
    **{f"grouped-{layout.name}": vllms(grouped(), layout.name) for layout in KVCacheLayout},
    **{f"fp8-{layout}": vllms(grouped(torch.float8_e4m3fn), layout) for layout in ("LBNHC", "BHLNC")},
    **{f"latent-{layout}": vllms(latent(), layout) for layout in ("LBNHC", "BLHNC")},
    **{f"padded-latent-{layout}": vllms(latent(1024), layout) for layout in ("LBNHC", "BLHNC")},
    **{f"split-blocks-{layout}": vllms(grouped(), layout, 8) for layout in ("LBNHC", "LBHNC")},
    "odd-BHLNC": vllms(
        FullAttentionSpec(block_size=3, num_kv_heads=4, head_size=5, dtype=torch.float8_e4m3fn), "BHLNC"
    ),
    "apart-NHD": apart(False),
    "apart-HND": apart(True),
}
"""What FlashAttention, FlashInfer, Triton and the backends for MLA and ROCm ask for is among these."""


def memory(cache: torch.Tensor) -> np.ndarray:
    """All bytes that the cache's memory has."""
    storage = cache.untyped_storage()
    return torch.tensor([], dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).numpy()


def addresses(cache: torch.Tensor, block: int) -> Any:
    """Where a block's bytes are, in order: by the definition of strides."""
    pieces = cache.shape[0] // BLOCKS
    indices = np.indices((pieces, *cache.shape[1:])).reshape(cache.dim(), -1)
    indices[0] += block * pieces
    elements: Any = cache.storage_offset() + np.array(cache.stride()) @ indices
    return np.sort((elements[:, None] * cache.itemsize + np.arange(cache.itemsize)).ravel())


@pytest.fixture(params=["host", "cuda"])
def opened(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[torch.Tensor]], PagedCache]:
    """Opens caches of either kind."""
    monkeypatch.setattr(cuda, "torch", LazyDevice())
    kind = {"host": HostPagedCache, "cuda": CudaPagedCache}[request.param]
    return lambda caches: kind([as_blocks("layer", cache, BLOCKS) for cache in caches])


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_every_layout(
    make: Callable[[], list[torch.Tensor]], opened: Callable[[list[torch.Tensor]], PagedCache]
) -> None:
    caches = make()
    cache = opened(caches)
    blocks, others = [5, 2, 7], [0, 6, 1]
    expected = [np.concatenate([memory(layer)[addresses(layer, block)] for block in blocks]) for layer in caches]
    segments = [cache.allocate(3 * size) for size in cache.segment_bytes_per_block]
    cache.gather(blocks, segments)()
    assert [bytes(segment) for segment in segments] == [part.tobytes() for part in expected]

    for layer in caches:
        memory(layer)[:] = 0
    cache.place(others, segments)
    placed = sum(len(addresses(layer, 0)) for layer in caches) * 3
    for layer, part in zip(caches, expected, strict=True):
        found = np.concatenate([memory(layer)[addresses(layer, block)] for block in others])
        assert found.tobytes() == part.tobytes()
    whole = {layer.untyped_storage().data_ptr(): np.count_nonzero(memory(layer)) for layer in caches}
    assert sum(whole.values()) == sum(np.count_nonzero(part) for part in expected) > placed // 2


def test_blocks_that_are_one_piece_are_copied_as_one() -> None:
    assert {as_blocks("", layer, BLOCKS).dim() for layer in vllms(grouped(), "BLNHC")()} == {2}
    assert {as_blocks("", layer, BLOCKS).dim() for layer in vllms(grouped(), "BHLNC")()} == {3}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, BLOCKS + 1, 16, 4, 24),  # keys and values before the blocks
        torch.zeros(BLOCKS, 4, 24, 2)[..., ::2],
        torch.zeros(BLOCKS, 1, 24).expand(BLOCKS, 4, 24),
        torch.zeros(BLOCKS * 96).as_strided((BLOCKS, 4, 24), (96, 12, 1)),
        torch.zeros(BLOCKS),
    ],
)
def test_what_is_no_sequence_of_blocks_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(UnsupportedEngine, match="is not a sequence of 8 blocks"):
        as_blocks("layers.0", tensor, BLOCKS)


def test_layers_that_share_a_cache_count_once_and_the_order_in_memory_tells_layouts_apart() -> None:
    first, second, _ = vllms(grouped(), "LBNHC")()
    cache = open_paged_cache({"a": first, "b": second, "c": first}, BLOCKS, "kernel")
    assert len(cache.segment_bytes_per_block) == 2
    heads_first, *_ = vllms(grouped(), "LBHNC")()
    assert heads_first.shape == first.shape
    layouts = {open_paged_cache({"a": layer}, BLOCKS, "kernel").layout for layer in (first, second, heads_first)}
    assert len(layouts) == 2


def test_devices(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm.cakekv")  # whatever engines in this process have set
    check_device("cpu", log=True)
    check_device("cuda", log=False)
    assert not caplog.records
    check_device("cuda", log=True)
    assert "has not run it on a GPU" in caplog.text
    with pytest.raises(UnsupportedEngine, match="CPUs and CUDA GPUs only"):
        check_device("xpu", log=True)

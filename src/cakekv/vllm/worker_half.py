"""The connector in a worker: takes orders before the forward pass, saves after it, reports with the step's output."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from cakekv.chunk import ChunkShape
from cakekv.errors import UnsupportedEngine
from cakekv.load.pieces import layer_groups
from cakekv.load.staging import StagingPool
from cakekv.store.opening import open_store
from cakekv.vllm.config import VllmOptions
from cakekv.vllm.layer_gate import LayerGate
from cakekv.vllm.load_pool import LoadPool
from cakekv.vllm.messages import ShardDescription, ShardReport, StepOrders, StepReport
from cakekv.vllm.metrics import CakeStats
from cakekv.vllm.paged_cache import open_paged_cache
from cakekv.vllm.save_pool import SavePool
from cakekv.vllm.shard_key import shard_key
from cakekv.vllm.support import check_device

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_LAST_WRITES_S = 10.0
"""Seconds that shutting down waits for what is still to be written."""


class WorkerHalf:
    """Loads and saves this worker's share of the chunks.

    Parameters
    ----------
    options : VllmOptions
        The plug-in's.
    vllm_config, kv_cache_config
        The engine's.
    """

    def __init__(self, options: VllmOptions, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        self._options = options
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._orders: StepOrders | None = None
        self._gate: LayerGate | None = None
        """Of the step that is computed, if it is a layered one."""
        self._loads: LoadPool | None = None
        self._saves: SavePool | None = None
        self.description: ShardDescription | None = None

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Get to work on these caches.

        Raises
        ------
        UnsupportedEngine
            They are on a device that is not supported, or not cut into blocks as expected.
        StoreError
            A store cannot be opened.
        """
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        self._rank = group.rank_in_group
        replicas = self._kv_cache_config.kv_tp_replicas
        tag = f"{self._rank // replicas} of {group.world_size // replicas}"
        name, tensor = next(iter(kv_caches.items()))
        check_device(tensor.device.type, log=self._rank == 0)
        config = self._kv_cache_config
        self.cache = open_paged_cache(kv_caches, config.num_blocks, self._kernel(name), config.needs_kv_cache_zeroing)
        blocks = self._options.chunk_tokens // self._kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        segment_bytes = tuple(blocks * size for size in self.cache.segment_bytes_per_block)
        shape = ChunkShape(self._options.chunk_tokens, segment_bytes)
        self.description = ShardDescription(tag, self.cache.layout, segment_bytes)
        self._tiers = [open_store(url) for url in self._options.store]
        key_of_share = partial(shard_key, tag=tag)
        threads = [self._options.load_threads or tier.parallel_reads for tier in self._tiers]
        staging = StagingPool(self.cache.allocate, shape.total_bytes)
        groups = layer_groups(shape)
        self._group_of = [number for number, group in enumerate(groups) for _ in group]
        self._loads = LoadPool(self._tiers, threads, shape, key_of_share, groups, self.cache.place, staging)
        if self._options.save and self._rank % replicas == 0:
            self._saves = SavePool(
                self._tiers[0], shape, key_of_share, self.cache.gather, self.cache.allocate, self._options.save_queue
            )

    def begin_step(self, orders: StepOrders) -> None:
        """Take in the scheduler's orders, before the forward pass."""
        if self._loads is None:
            raise UnsupportedEngine("vLLM runs a model without a KV cache; there is nothing that cakekv could restore")
        self._orders = orders
        if orders.cancels:
            self._loads.cancel(orders.cancels)
        self.cache.begin_step(orders)
        if orders.loads:
            self._loads.submit(orders.loads)
        self._gate = None
        if orders.awaited:
            self._gate = LayerGate(self._loads, orders.awaited[self._rank], orders.patience_s)

    def wait_for_layer(self, name: str) -> None:
        """Before this layer attends: wait until its part of the prefix is in place, if it still comes."""
        if self._gate is not None:
            self._gate.wait(self._group_of[self.cache.segment_of.get(name, -1)])

    def end_forward(self) -> None:
        """The forward pass is done: copy out what is to be saved."""
        if self._gate is not None:
            self._gate.close()
        if self._orders is not None and self._orders.saves and self._saves is not None:
            self._saves.save(self._orders.saves)

    def report(self) -> StepReport | None:
        """What happened since the last report, if anything did."""
        if self._orders is None or self._loads is None:
            return None
        report = ShardReport(self._orders.sequence)
        report.begun, report.ended = self._loads.take_events()
        if self._saves is not None:
            report.unsaved = self._saves.take_unsaved()
        if self._gate is not None:
            report.waited_s, report.lost = self._gate.waited_s, self._gate.lost
        eventful = report.begun or report.ended or report.unsaved or self._gate is not None
        return StepReport({self._rank: report}) if eventful or self._orders.answer else None

    def take_stats(self) -> CakeStats | None:
        """What happened since the last time, if anything did."""
        return self._saves.take_stats() if self._saves is not None else None

    def shutdown(self) -> None:
        """Stop loading, finish saving."""
        if self._loads is not None:
            self._loads.close()
            self._loads = None
            if self._saves is not None:
                self._saves.close(_LAST_WRITES_S)
                self._saves = None
            for tier in self._tiers:
                tier.close()

    def _kernel(self, layer_name: str) -> str:
        """What decides about the order of the bytes in a block, beside the tensor's shape."""
        layer = self._vllm_config.compilation_config.static_forward_context.get(layer_name)
        backend = getattr(layer, "attn_backend", None)
        name = backend.get_name() if backend is not None else ""
        return f"{name} {getattr(layer, 'isa', '')} {self._kv_cache_config.kv_cache_layout}"

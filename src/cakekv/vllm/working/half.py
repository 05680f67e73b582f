"""The connector in a worker: takes orders before the forward pass, saves after it, reports with the step's output."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from cakekv.errors import UnsupportedEngine
from cakekv.load.pieces import group_bytes, layer_groups, load_bytes
from cakekv.store.packed import warm_up_packing
from cakekv.vllm.config import VllmOptions
from cakekv.vllm.messages import StepOrders, StepReport, WorkerDescription, WorkerReport
from cakekv.vllm.metrics import CakeStats
from cakekv.vllm.stores import close_store, open_tiers
from cakekv.vllm.support import check_device
from cakekv.vllm.working.load_pool import LayerGate, LoadPool
from cakekv.vllm.working.save_pool import SavePool
from cakekv.vllm.working.shard import open_shards

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_IDLE_S = 0.005
"""Seconds that a step without requests waits for saves: long enough not to spin, short enough for who comes then."""
LAST_WRITES_S = 10.0
"""Seconds that shutting down waits for what is still to be written."""


class WorkerHalf:
    """Loads and saves this worker's shards of the chunks.

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
        self.loads: LoadPool | None = None
        self.saves: SavePool | None = None
        self._saving = 0
        """As in `WorkerReport`, when it was last said."""
        self.description: WorkerDescription | None = None

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Get to work on these caches.

        Raises
        ------
        UnsupportedEngine
            They are on a device that is not supported, or not cut into blocks as expected.
        BadOption
            An option does not go with the model's cache.
        StoreError
            A store cannot be opened.
        """
        from vllm.distributed.parallel_state import get_tp_group

        group, config = get_tp_group(), self._kv_cache_config
        self._rank, replicas = group.rank_in_group, config.kv_tp_replicas
        check_device(next(iter(kv_caches.values())).device.type, log=self._rank == 0)
        self.shards = shards = open_shards(
            self._options,
            self._vllm_config,
            config,
            kv_caches,
            self._rank // replicas,
            group.world_size // replicas,
        )
        coder = shards[0].coder
        shape = coder.expected([])
        groups = layer_groups(shape, coder.layers)
        self._group_of = [number for number, group in enumerate(groups) for _ in group]
        of_layers = partial(coder.segments_of, shape)
        sizes = group_bytes(shape, groups, range(coder.layers), of_layers).bytes
        self.description = WorkerDescription(
            tuple(shard.tag for shard in shards),
            shards[0].layout,
            coder.exact.total_bytes,
            len(shards) * load_bytes(shape, of_layers(range(coder.layers))),
            tuple(len(shards) * size for size in sizes),
            shards[0].documents.refused,
        )
        self._store, tiers = open_tiers(self._options)
        warm_up_packing(tiers)
        threads = [self._options.load_threads or tier.parallel_reads for tier in tiers]
        self.loads = LoadPool(tiers, threads, shards, groups)
        if self._options.save and self._rank % replicas == 0:
            self.saves = SavePool(self._store, shards, self._options.save_queue)

    def begin_step(self, orders: StepOrders) -> None:
        """Take in the scheduler's orders, before the forward pass."""
        if self.loads is None:
            raise UnsupportedEngine("vLLM runs a model without a KV cache; there is nothing that cakekv could restore")
        self._orders = orders
        if orders.cancels:
            self.loads.cancel(orders.cancels)
        for shard in self.shards:
            shard.cache.begin_step(orders)
            if any(order.sources for order in orders.loads):
                shard.documents.prepare()
            elif orders.idle:
                shard.documents.forget()
        self.loads.submit(orders.loads, orders.at_a_time)
        self._gate = None
        if orders.awaited:
            self._gate = LayerGate(self.loads, orders.awaited[self._rank], orders.patience_s)

    def wait_for_layer(self, name: str) -> None:
        """Before this layer attends: wait until its part of the prefix is in place, if it still comes."""
        if self._gate is not None:
            self._gate.wait(self._group_of[self.shards[0].cache.segment_of.get(name, -1)])

    def end_forward(self) -> None:
        """The forward pass is done: copy out what is to be saved."""
        if self._gate is not None:
            self._gate.close()
        if self._orders is None or self.saves is None:
            return
        if self._orders.saves:
            self.saves.save(self._orders.saves)
        if self._orders.idle:
            self.saves.wait(_IDLE_S)

    def report(self) -> StepReport | None:
        """What happened since the last report, if anything did."""
        if self._orders is None or self.loads is None:
            return None
        report = WorkerReport(self._orders.sequence)
        report.begun, report.ended = self.loads.take_events()
        if self.saves is not None:
            report.unsaved, report.saving = self.saves.take_unsaved(), self.saves.unsaid
        news = report.saving != self._saving
        self._saving = report.saving
        if self._gate is not None:
            report.waited_s, report.lost = self._gate.waited_s, self._gate.lost
        eventful = report.begun or report.ended or report.unsaved or news or self._gate is not None
        return StepReport({self._rank: report}) if eventful or self._orders.answer else None

    def take_stats(self) -> CakeStats | None:
        """What happened since the last time, if anything did."""
        return self.saves.take_stats() if self.saves is not None else None

    def shutdown(self) -> None:
        """Stop loading, finish saving, as far as that takes no longer than `LAST_WRITES_S`."""
        if self.loads is not None:
            until = monotonic() + LAST_WRITES_S
            self.loads.close()
            self.loads = None
            if self.saves is not None:
                self.saves.close(LAST_WRITES_S)
                self.saves = None
            close_store(self._store, max(0.1, until - monotonic()))

"""The class that `--kv-transfer-config` names: hands every call on to the half that runs in this process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from cakekv.vllm.config import VllmOptions
from cakekv.vllm.hooks import check_hooks
from cakekv.vllm.messages import StepOrders, StepReport, WorkerDescription
from cakekv.vllm.metrics import CakeMetrics, CakeStats
from cakekv.vllm.scheduling.half import CLOSING_S, RestoringScheduler, SchedulerHalf
from cakekv.vllm.scheduling.identity import make_hashes_stable
from cakekv.vllm.stores import close_store, open_tiers
from cakekv.vllm.support import check_engine, check_scheduler
from cakekv.vllm.working.half import WorkerHalf

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class CakeConnector(KVConnectorBase_V1):
    """Loads stored prefixes from the back, while `CakeScheduler` has them computed from the front.

    Parameters
    ----------
    vllm_config, kv_cache_config
        The engine's.
    role : KVConnectorRole
        Whether this is the scheduler's or a worker's.

    Raises
    ------
    UnsupportedEngine
        vLLM is set up in a way that cakekv cannot work with.
    BadOption
        An option is unknown or has a bad value.
    StoreError
        A store cannot be opened.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        options = VllmOptions.from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        check_hooks(options.untested_vllm)
        super().__init__(vllm_config, role, kv_cache_config)
        check_engine(vllm_config, kv_cache_config)
        options.check_block_size(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        if role == KVConnectorRole.SCHEDULER:
            check_scheduler(vllm_config)
            make_hashes_stable(vllm_config)
            self._options = options
            self._block_tokens: int = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            self._store, _ = open_tiers(options)
            self._close: Callable[[], None] = partial(close_store, self._store, CLOSING_S)
            """What to do at the end."""
        else:
            self.worker_half = WorkerHalf(options, vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is only a miss later on."""
        return False

    # ---------------------------------------------------------- in the scheduler

    def join(self, scheduler: RestoringScheduler) -> None:
        """Get to know the scheduler."""
        self._scheduler = scheduler

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        workers = {rank: worker for rank, worker in metadata.items() if isinstance(worker, WorkerDescription)}
        self.scheduler_half = SchedulerHalf(
            self._options, self._vllm_config, self._store, self._scheduler, self._block_tokens, workers
        )
        self._scheduler.join(self.scheduler_half)
        self._close = self.scheduler_half.close

    def on_new_request(self, request: Request) -> None:
        self.scheduler_half.arrived(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.scheduler_half.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self.scheduler_half.start(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self.scheduler_half.orders(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, StepReport):
            self.scheduler_half.receive(report)

    def has_pending_block_frees(self) -> bool:
        return self._scheduler.make_room()

    def has_pending_push_work(self) -> bool:
        return self.scheduler_half.last_saves.awaited

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.scheduler_half.finished(request)

    def reset_cache(self) -> bool:
        self.scheduler_half.start_anew()
        return True

    # --------------------------------------------------------------- in a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.worker_half.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self.worker_half.description

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepOrders)
        self.worker_half.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing: loads start when orders come, which is earlier."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """In a layered step, wait; else nothing attends to something that is still to come."""
        self.worker_half.wait_for_layer(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Nothing: chunks are saved whole."""

    def wait_for_save(self) -> None:
        self.worker_half.end_forward()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self.worker_half.report()

    # ------------------------------------------------------------------- in both

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self.role == KVConnectorRole.SCHEDULER:
            return self.scheduler_half.outcomes.take_stats()
        return self.worker_half.take_stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return CakeStats() if data is None else CakeStats(data=data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        return CakeMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.SCHEDULER:
            self._close()
        else:
            self.worker_half.shutdown()

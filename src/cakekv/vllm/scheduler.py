"""vLLM's schedulers, taught to compute a prompt's head while its tail is loaded.

Everything is decided in `restore/`: the planner of each restore says what to compute, the policy who gets the tokens of
a step. The classes translate that into vLLM's terms:

1. The connector has vLLM allocate the whole stored prefix and park the request, as for any asynchronous load.
2. As soon as compute is to begin, the parked request is taken back and prefilled in chunks from its front.
3. Where compute comes upon loaded chunks, the request jumps over them: its `num_computed_tokens` is set further. vLLM
   hashes loaded blocks with the tokens computed behind them, so nobody shares a block before it is whole.

The V1 model runner reads `num_computed_tokens` with every step. The V2 runner counts for itself; there a request jumps
by being resumed, as after a preemption, but with its blocks kept.
"""

from __future__ import annotations

from time import monotonic, time
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.request import RequestStatus

from cakekv.errors import UnsupportedEngine
from cakekv.restore.priority import Kind, RequestState
from cakekv.vllm.connector import CakeConnector
from cakekv.vllm.restoration import Restoration

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import PrefixCacheStats
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request


class CakeSchedulerMixin(Scheduler):
    """What both schedulers have in common.

    Raises
    ------
    UnsupportedEngine
        The KV connector is not `CakeConnector` itself.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.connector, CakeConnector):
            given = type(self.connector).__name__ if self.connector is not None else "none"
            raise UnsupportedEngine(
                f"{type(self).__name__} works with CakeConnector as the only KV connector, and this is {given}: name "
                'CakeConnector in --kv-transfer-config ("cakekv vllm-args" prints it); MultiConnector is not supported'
            )
        self._half = self.connector.scheduler_half
        self._half.join(self)
        self.resume_to_jump = self.use_v2_model_runner
        self._granted: dict[str, int] = {}
        """Tokens of the coming step per prefilling request."""
        self._looked_again: list[Request] = []
        """Requests of the coming step for which vLLM looked into its prefix cache a second time."""
        self._reserved: dict[Request, int] = {}
        """Blocks that prefills on their way still need, as it was when this step came to them."""
        self._adapters: tuple[int, set[int]] = (-1, set())
        """How many requests run, and which adapters they use, as of this step."""
        self._parked: list[list[KVCacheBlock]] = []
        """Blocks that nobody owns any more, but into which a worker may still write."""
        self._nobody_admitted = False
        """Whether plain requests waited in the last step and none could be taken in, though tokens were left."""
        self._turned_away: set[str] = set()
        """Restores that vLLM did not take into the last steps, though they were granted tokens of them."""

    # ------------------------------------------------------------ before a step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._half.think(self._turned_away)
        self._adapters = (-1, set())
        for restoration in list(self._half.restorations.values()):
            self._jump(restoration)
        waiting = self._share_out()
        before = set(self._half.restorations)
        self._reserved.clear()
        self._looked_again.clear()
        output = super().schedule(throttle_prefills)
        self._correct_statistics(before, output)
        left = self.max_num_scheduled_tokens - output.total_num_scheduled_tokens
        granted = {request_id for request_id in self._half.restorations if self._granted.get(request_id)}
        self._turned_away = (self._turned_away | granted) - output.num_scheduled_tokens.keys() if left else set()
        self._nobody_admitted = bool(waiting) and left > 1 and not waiting & output.num_scheduled_tokens.keys()
        return output

    def _jump(self, restoration: Restoration) -> None:
        """If compute has come upon loaded chunks, go on behind them."""
        request, position = restoration.request, restoration.position
        if request.status != RequestStatus.RUNNING or request.num_computed_tokens == position:
            return
        if request.num_computed_tokens > position and not restoration.offered_in_vain:
            return
        request.num_computed_tokens = position
        if self.resume_to_jump:
            self.running.remove(request)
            request.status = RequestStatus.PREEMPTED
            self.kv_holding_waiting.prepend_request(request)
            self.reset_preempted_req_ids.add(request.request_id)

    def _share_out(self) -> set[str]:
        """Have the policy share out the step's tokens; returns the plain requests among those that wait."""
        self._granted = {}
        restorations = self._half.restorations
        admission = self._half.admission
        if not restorations and not any(map(admission.unadmitted, self.waiting)):
            return set()
        unadmitted, plain_tokens = admission.full, 0
        states: list[RequestState] = []
        waiting_plain: set[str] = set()
        outside = set(self._turned_away)
        places = self.max_num_active_reqs - len(self.running) - self.num_waiting_for_streaming_input
        for request in self.running:
            states.append(self._state_of(request, restorations.get(request.request_id)))
        for queue in (self.kv_holding_waiting, self.waiting):
            for request in queue:
                restoration = restorations.get(request.request_id)
                if restoration is None and admission.unadmitted(request):
                    if not unadmitted:  # one says as much as all of them
                        unadmitted = True
                        state = self._state_of(request, None)
                        states.append(state._replace(kind=Kind.STORED_PREFILL, admitted=False))
                    continue
                if restoration is None:
                    if request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED) or self._nobody_admitted:
                        continue
                    waiting_plain.add(request.request_id)
                    if plain_tokens >= self.max_num_scheduled_tokens:
                        continue  # those before it use up the step
                state = self._state_of(request, restoration)
                if restoration is None:
                    plain_tokens += state.tokens
                elif state.tokens and (places <= 0 or not self._has_room_for_adapter(request)):
                    outside.add(state.request_id)
                elif state.tokens:
                    places -= 1
                states.append(state)
        beside_decodes = self._half.tokens_beside_decodes()
        # Whom vLLM has no room for gets what the others leave: else nobody would compute, and no room would come free.
        others = [state for state in states if state.request_id not in outside]
        shares = self._half.policy.share(others, self.max_num_scheduled_tokens, time(), beside_decodes)
        left = self.max_num_scheduled_tokens - sum(shares.tokens.values()) - shares.held_back
        for state in states:
            if state.request_id in outside:
                shares.tokens[state.request_id] = min(left, state.tokens)
                left -= shares.tokens[state.request_id]
        prefills = [state for state in states if state.kind is not Kind.DECODE and state.admitted]
        self._granted = {state.request_id: shares.tokens.get(state.request_id, 0) for state in prefills}
        # Whoever vLLM preempts, it takes from the end: restores that have computed least lose least.
        kinds = {state.request_id: state.kind for state in states}
        self.running.sort(
            key=lambda request: (
                kinds[request.request_id],
                -request.num_computed_tokens if kinds[request.request_id] is Kind.STORED_PREFILL else 0,
            )
        )
        return waiting_plain

    def _state_of(self, request: Request, restoration: Restoration | None) -> RequestState:
        """A request as the policies see it."""
        if restoration is not None and restoration.done_at is None:
            return self._half.state_of(restoration)
        tokens = request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
        decoding = request.status == RequestStatus.RUNNING and not request.is_prefill_chunk
        kind = Kind.DECODE if decoding else Kind.PLAIN_PREFILL
        return RequestState(request.request_id, kind, request.arrival_time, max(tokens, 0))

    # ------------------------------------------------------- while it is put together

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        tokens: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        granted = self._granted.get(request.request_id, tokens)
        if granted >= request.num_tokens - num_computed_tokens:
            return tokens  # all that is left; with speculation, vLLM pads a last token, and insists on that
        return min(tokens, granted)

    def _has_room_for_adapter(self, request: Request) -> bool:
        """Whether a request that waits may join those that run, by --max-loras.

        vLLM 0.32 counts the adapters of those only that are given tokens in a step. Running prefills may be given none
        here, and would be one adapter too many in the next step.
        """
        if self.lora_config is None or request.lora_request is None:
            return True
        running, used = self._adapters
        if running != len(self.running):  # once per step, and whenever one joins: not for each that waits
            used = {other.lora_request.lora_int_id for other in self.running if other.lora_request is not None}
            self._adapters = len(self.running), used
        return request.lora_request.lora_int_id in used or len(used) < self.lora_config.max_loras

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        if not self._has_room_for_adapter(request):
            return False
        restoration = self._half.restorations.get(request.request_id)
        if restoration is None and self._half.admission.must_wait(request):
            return False
        if restoration is None or not restoration.parked:
            # To be given no tokens later would end vLLM's search for others that wait.
            ready = bool(super()._handle_blocked_waiting_request(request))
            if restoration is not None and restoration.done_at is None:
                request.num_computed_tokens = restoration.position  # more may have been loaded since it jumped
            return ready and self._granted.get(request.request_id, 1) > 0
        if request.status != RequestStatus.WAITING_FOR_REMOTE_KVS or not self._granted.get(request.request_id, 0):
            return False
        restoration.parked = False
        request.num_computed_tokens = restoration.position
        request.status = RequestStatus.PREEMPTED if request.num_preemptions else RequestStatus.WAITING
        return True

    def _get_local_prefix_cache_hit(self, request: Request, *limit: int | None) -> tuple[KVCacheBlocks, int, int, bool]:
        if request.request_id in self._half.restorations:
            self._looked_again.append(request)
            return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False  # it has its blocks already
        blocks, tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request, *limit)
        lossy = self._half.lossy
        if tokens and lossy.codec.window:
            usable = lossy.usable_tokens(blocks.get_block_ids()[0], request.num_tokens)
            if usable < tokens:
                blocks, tokens = self.kv_cache_manager.truncate_computed_blocks(blocks, usable), usable
        return blocks, tokens, boundary, diverged

    def _inflight_prefill_reserved_blocks(self) -> int:
        """As vLLM's, which counts anew for every restore that begins: that grows with the square of their number."""
        for request in self._inflight_prefills:
            if request not in self._reserved:
                self._reserved[request] = self._request_remaining_blocks(request)
        return sum(self._reserved[request] for request in self._inflight_prefills)

    def _holds_kv_blocks(self, request: Request) -> bool:
        return Scheduler._holds_kv_blocks(request) or request.request_id in self._half.restorations

    # ------------------------------------------------------------------ statistics

    def _correct_statistics(self, before: set[str], output: SchedulerOutput) -> None:
        """Take back what vLLM counted as hits of restores that only begin, and what it looked up twice."""
        for request_id, restoration in self._half.restorations.items():
            if request_id not in before:
                hits = restoration.restore.prefix_tokens - restoration.local_tokens
                self._uncount(self.connector_prefix_cache_stats, restoration.request, restoration.queried_tokens, hits)
        for request in self._looked_again:
            if request.request_id in output.num_scheduled_tokens:
                self._uncount(self.connector_prefix_cache_stats, request, request.num_tokens, 0)
                if self.kv_cache_manager.prefix_cache_lookup_enabled(request):
                    self._uncount(self.kv_cache_manager.prefix_cache_stats, request, request.num_tokens, 0)

    def _uncount(self, stats: PrefixCacheStats | None, request: Request, tokens: int, hits: int) -> None:
        """The reverse of `PrefixCacheStats.record`, within the same step."""
        if stats is None or not self.log_stats:
            return
        if request.num_preemptions > 0:
            stats.preempted_requests -= 1
            stats.preempted_queries -= tokens
            stats.preempted_hits -= hits
            return
        stats.requests -= 1
        stats.queries -= tokens
        stats.hits -= hits
        for source, count in list(stats.hits_by_source.items()):
            taken = min(count, hits)
            hits -= taken
            stats.hits_by_source[source] = count - taken

    def count_hits(self, restoration: Restoration) -> None:
        """A restore is over: what it loaded was a hit."""
        if self.connector_prefix_cache_stats is None:
            return
        request, hits = restoration.request, restoration.restore.report.loaded_tokens
        self.connector_prefix_cache_stats.record(
            num_tokens=restoration.queried_tokens,
            num_hits=hits,
            preempted=request.num_preemptions > 0,
            hits_by_source={CacheHitSource.EXTERNAL_UNSPECIFIED: hits} if hits else None,
        )

    def count_prefill(self, restoration: Restoration) -> None:
        """The last tokens of a restored prompt are on their way: say how it was covered."""
        request, local = restoration.request, restoration.local_tokens
        if request.prefill_stats is not None and not request.num_preemptions:
            loaded = restoration.restore.report.loaded_tokens
            request.prefill_stats.set(request.num_prompt_tokens, local, min(loaded, request.num_prompt_tokens - local))

    # -------------------------------------------------------------- after a step

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        said = model_runner_output.kv_connector_output
        lost = self._half.layered_step_ended(said.kv_connector_worker_meta if said is not None else None)
        if lost is not None:
            self._discard_output(lost)
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        self._half.ended(scheduler_output.kv_connector_metadata)
        if self._half.outcomes.awaited:
            for output in (output for client in outputs.values() for output in client.outputs):
                request = self.requests.get(output.request_id)
                if request is not None and output.kv_transfer_params is None:
                    output.kv_transfer_params = self._half.report_early(request)
        return outputs

    # -------------------------------------------------------------- layered steps

    def serves_only(self, request: Request) -> bool:
        """Whether nobody else is there that a step could hold up."""
        return sum(self.get_request_counts()) == 1 and request.request_id in self.requests

    def _discard_output(self, restoration: Restoration) -> None:
        """What the last step computed is void: compute again, as vLLM does after failed synchronous loads."""
        request = restoration.request
        self.unhash(restoration)
        request.num_computed_tokens = restoration.position
        request.drop_stale_output = True
        request.num_stale_output_tokens = request.num_in_flight_tokens
        request.is_prefill_chunk = True
        self._inflight_prefills.add(request)

    def unhash(self, restoration: Restoration) -> None:
        """Have nobody share what may not be what its hash says."""
        block_ids = self.kv_cache_manager.get_block_ids(restoration.request_id)[0]
        self.kv_cache_manager.evict_blocks(set(block_ids[restoration.sure_blocks :]))

    # ------------------------------------------------------------- freeing blocks

    def _free_request_blocks(self, request: Request) -> None:
        if not self._half.drop(request):
            super()._free_request_blocks(request)
            return
        self.park_blocks(request)

    def park_blocks(self, request: Request) -> None:
        """Take a request's blocks away, and free them once no worker writes into them any more."""
        blocks: list[KVCacheBlock] = self.kv_cache_manager.pop_blocks_for_free(request)
        self._parked.append(blocks)

        def free() -> None:
            self._parked.remove(blocks)
            self.kv_cache_manager.block_pool.free_blocks(reversed(blocks))

        self._half.when_safe(free)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        super()._preempt_request(request, timestamp, drop_stale_output)
        self._half.arrived(request)

    def has_finished_requests(self) -> bool:
        return bool(super().has_finished_requests()) or self._half.waiting_for_workers

    def free_finished(self, request: Request) -> None:
        """No worker writes into the blocks of this finished request any more."""
        if request.request_id in self.requests:
            self._free_blocks(request)

    def make_room(self) -> bool:
        """An allocation failed for a running request. Returns whether blocks will come free by the next step.

        A restore that has computed nothing yet loses no work: it is given up before vLLM preempts anyone.
        """
        if self._half.waiting_for_workers:
            return True
        parked = [restoration.request for restoration in self._half.restorations.values() if restoration.parked]
        if not parked:
            return False
        self._send_back(parked[-1])
        return True

    def _send_back(self, request: Request) -> None:
        """Have a parked request begin again."""
        self.kv_holding_waiting.remove_requests([request])
        self.deferred_waiting.discard(request)
        self._free_request_blocks(request)
        self._inflight_prefills.discard(request)
        self._set_kv_fetch_stage(request, None)
        request.num_computed_tokens = 0
        request.status = RequestStatus.PREEMPTED if request.num_preemptions else RequestStatus.WAITING
        self.waiting.prepend_request(request)
        self._half.arrived(request)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """As vLLM's. Restores count as running requests; blocks that workers may still write into are passed over."""
        if reset_running_requests:
            timestamp = monotonic()
            while self.running:
                self._preempt_request(self.running.pop(), timestamp, drop_stale_output=True)
            self.prev_step_scheduled_req_ids.clear()
            for restoration in list(self._half.restorations.values()):
                self._send_back(restoration.request)
        pool = self.kv_cache_manager.block_pool
        for blocks in self._parked:
            pool.free_blocks(reversed(blocks))
        try:
            return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))
        finally:
            for blocks in self._parked:
                pool.touch(blocks)


class CakeScheduler(CakeSchedulerMixin):
    """For `--scheduler-cls` where vLLM schedules one step after the other."""


class CakeAsyncScheduler(CakeSchedulerMixin, AsyncScheduler):
    """For `--scheduler-cls` where vLLM schedules a step while the one before runs (`--async-scheduling`)."""

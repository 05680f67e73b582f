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
from vllm.v1.request import RequestStatus

from cakekv.errors import UnsupportedEngine
from cakekv.restore.priority import Kind, RequestState
from cakekv.vllm.connector import CakeConnector
from cakekv.vllm.scheduling.restoration import Restoration, Stage
from cakekv.vllm.support import computes_while_loading

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from cakekv.vllm.scheduling.half import SchedulerHalf

_DECODES = (Kind.DECODE, 0)
"""Where they stand among those that run."""


@computes_while_loading
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
        self.connector.join(self)
        self.resume_to_jump = self.use_v2_model_runner
        self._granted: dict[str, int] = {}
        """Tokens of the coming step per prefilling request."""
        self._reserved: dict[Request, int] = {}
        """Blocks that prefills on their way still need, as it was when this step came to them."""
        self._adapters: tuple[int, set[int]] = (-1, set())
        """How many requests run, and which adapters they use, as of this step."""
        self._nobody_admitted = False
        """Whether plain requests waited in the last step and none could be taken in, though tokens were left."""
        self._aside: list[Request] = []
        """Requests that wait, in turn, and of which nothing can begin in this step: vLLM need not look at them."""
        self._turned_away: set[str] = set()
        """Restores that vLLM did not take into the last steps, though they were granted tokens of them."""

    def join(self, half: SchedulerHalf) -> None:
        """The connector has met the workers: this is what it says from now on."""
        self._half = half

    # ------------------------------------------------------------ before a step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._half.begin_step(self._turned_away, alone=sum(self.get_request_counts()) == 1)
        self._adapters = (-1, set())
        for restoration in list(self._half.restorations.values()):
            self._jump(restoration)
        waiting = self._share_out()
        self._half.hits.begin_step(self._half.restorations)
        self._reserved.clear()
        output = self._schedule_others(throttle_prefills)
        self._half.hits.correct(self._half.restorations, output.num_scheduled_tokens)
        left = self.max_num_scheduled_tokens - output.total_num_scheduled_tokens
        granted = {request_id for request_id in self._half.restorations if self._granted.get(request_id)}
        self._turned_away = (self._turned_away | granted) - output.num_scheduled_tokens.keys() if left else set()
        self._nobody_admitted = bool(waiting) and left > 1 and not waiting & output.num_scheduled_tokens.keys()
        return output

    def _schedule_others(self, throttle_prefills: bool) -> SchedulerOutput:
        """As vLLM's `schedule`, which looks at every request that waits, but without those that were put aside."""
        if not self._aside:
            return super().schedule(throttle_prefills)
        waiting = list(self.waiting)
        self.waiting.remove_requests(self._aside)
        output = super().schedule(throttle_prefills)
        self.deferred_waiting.update(self._aside)
        left, known = list(self.waiting), set(waiting)
        still = {*left, *self._aside}
        in_turn = [request for request in left if request not in known]  # those that were sent back come first
        in_turn += [request for request in waiting if request in still]
        self.waiting.remove_requests(left)
        self.waiting.prepend_requests(reversed(in_turn))
        self._aside = []
        return output

    def get_request_counts(self) -> tuple[int, int]:
        running, waiting = super().get_request_counts()
        return running, waiting + len(self._aside)

    def _jump(self, restoration: Restoration) -> None:
        """If compute has come upon loaded chunks, go on behind them."""
        request = restoration.request
        if request.status != RequestStatus.RUNNING:
            return
        position = restoration.position
        if request.num_computed_tokens == position:
            return
        if request.num_computed_tokens > position and not restoration.layered_declined:
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
        decode_tokens = 0
        in_order: dict[str, tuple[int, int]] = {}
        for request in self.running:
            restoration = restorations.get(request.request_id)
            if restoration is None and not request.is_prefill_chunk:
                decode_tokens += _tokens_left(request)
                continue
            state = self._state_of(request, restoration)
            states.append(state)
            computed = request.num_computed_tokens if state.kind is Kind.STORED_PREFILL else 0
            in_order[state.request_id] = (state.kind, -computed)
        if len(in_order) < len(self.running):  # one says as much as all of them
            states.append(RequestState("", Kind.DECODE, 0.0, decode_tokens))
        for queue in (self.kv_holding_waiting, self.waiting):
            for request in queue:
                restoration = restorations.get(request.request_id)
                if restoration is None and admission.unadmitted(request):
                    if not unadmitted:  # one says as much as all of them
                        unadmitted = True
                        state = self._state_of(request, None)
                        states.append(state._replace(kind=Kind.STORED_PREFILL, admitted=False))
                    if queue is self.waiting and admission.held(request.request_id):
                        self._aside.append(request)
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
        self.running.sort(key=lambda request: in_order.get(request.request_id, _DECODES))
        return waiting_plain

    def _state_of(self, request: Request, restoration: Restoration | None) -> RequestState:
        """A request as the policies see it."""
        if restoration is not None and restoration.computed_by is None:
            return self._half.state_of(restoration)
        decoding = request.status == RequestStatus.RUNNING and not request.is_prefill_chunk
        kind = Kind.DECODE if decoding else Kind.PLAIN_PREFILL
        return RequestState(request.request_id, kind, request.arrival_time, _tokens_left(request))

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
            if restoration is not None and restoration.computed_by is None:
                request.num_computed_tokens = restoration.position  # more may have been loaded since it jumped
            return ready and self._granted.get(request.request_id, 1) > 0
        if request.status != RequestStatus.WAITING_FOR_REMOTE_KVS or not self._granted.get(request.request_id, 0):
            return False
        restoration.enter(Stage.PREFILLING)
        request.num_computed_tokens = restoration.position
        request.status = RequestStatus.PREEMPTED if request.num_preemptions else RequestStatus.WAITING
        return True

    def _get_local_prefix_cache_hit(self, request: Request, *limit: int | None) -> tuple[KVCacheBlocks, int, int, bool]:
        if request.request_id in self._half.restorations:
            self._half.hits.looked_up_again(request)
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

    def _discard_output(self, restoration: Restoration) -> None:
        """What the last step computed is void: compute again, as vLLM does after failed synchronous loads."""
        request = restoration.request
        request.num_computed_tokens = restoration.position
        request.drop_stale_output = True
        request.num_stale_output_tokens = request.num_in_flight_tokens
        request.is_prefill_chunk = True
        self._inflight_prefills.add(request)

    # ------------------------------------------------------------- freeing blocks

    def _free_request_blocks(self, request: Request) -> None:
        if not self._half.drop(request):
            super()._free_request_blocks(request)
            return
        self._half.parked_blocks.park(request)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        # With priorities, vLLM may take back tokens that it gave the request in this very step. It has already hashed
        # the blocks that they would have filled, and would share them, though nothing is in them.
        blocks = self.kv_cache_manager.get_block_ids(request.request_id)[0]
        self.kv_cache_manager.evict_blocks(set(blocks[request.num_computed_tokens // self.block_size :]))
        super()._preempt_request(request, timestamp, drop_stale_output)
        self._half.arrived(request)

    def has_finished_requests(self) -> bool:
        return bool(super().has_finished_requests()) or self._half.parked_blocks.waiting

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        if request_ids is None:  # all of them, as the engine shuts down: nothing is to be waited for
            self._half.last_saves.forget()
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        return finished

    def free_finished(self, request: Request) -> None:
        """No worker writes into the blocks of this finished request any more."""
        if request.request_id in self.requests:
            self._free_blocks(request)

    def make_room(self) -> bool:
        """An allocation failed for a running request. Returns whether blocks will come free by the next step.

        A restore that has computed nothing yet loses no work: it is given up before vLLM preempts anyone.
        """
        if self._half.parked_blocks.waiting:
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
        """As vLLM's. Restores count as running requests; blocks that workers may still write into are passed over.

        Those are the ones of loads that were given up and, with steps scheduled ahead, of the steps on their way: vLLM
        itself would raise an error because of them.
        """
        if reset_running_requests:
            timestamp = monotonic()
            while self.running:
                self._preempt_request(self.running.pop(), timestamp, drop_stale_output=True)
            self.prev_step_scheduled_req_ids.clear()
            for restoration in list(self._half.restorations.values()):
                self._send_back(restoration.request)
        with self._half.parked_blocks.passed_over(blocks for _, blocks in self.deferred_frees):
            return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))


def _tokens_left(request: Request) -> int:
    """Tokens that the request could compute now."""
    tokens: int = request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
    return max(tokens, 0)


class CakeScheduler(CakeSchedulerMixin):
    """For `--scheduler-cls` where vLLM schedules one step after the other."""


class CakeAsyncScheduler(CakeSchedulerMixin, AsyncScheduler):
    """For `--scheduler-cls` where vLLM schedules a step while the one before runs (`--async-scheduling`)."""

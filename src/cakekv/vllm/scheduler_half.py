"""The connector in the scheduler: looks up, starts restores, orders loads and saves, learns what became of them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from functools import partial
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from cakekv.codec import codec_named
from cakekv.errors import StoreError
from cakekv.restore.contention import SharedLoad, burdens
from cakekv.restore.costs import LoadCost
from cakekv.restore.flights import Source
from cakekv.restore.layered import LayerGroups
from cakekv.restore.priority import Kind, RequestState, open_policy
from cakekv.restore.stepwise import StepwiseRestore
from cakekv.store.base import distinct_names
from cakekv.vllm import layered_step
from cakekv.vllm.adapter_mixing import mixes_adapters
from cakekv.vllm.admission import Admission
from cakekv.vllm.asked import answer
from cakekv.vllm.config import VllmOptions
from cakekv.vllm.exactness import LossyBlocks
from cakekv.vllm.identity import Keyring, make_hashes_stable
from cakekv.vllm.load_desk import LoadDesk
from cakekv.vllm.lookup import Lookup
from cakekv.vllm.messages import ShardDescription, StepOrders, StepReport
from cakekv.vllm.outcomes import Outcomes
from cakekv.vllm.restoration import LOOK_S, Restoration
from cakekv.vllm.save_desk import SaveDesk
from cakekv.vllm.save_plan import SavePlan
from cakekv.vllm.shard_key import shard_key
from cakekv.vllm.step_clock import StepClock
from cakekv.vllm.step_costs import Piece, SharedCost, StepCosts
from cakekv.vllm.stores import close_store, open_tiers

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from cakekv.vllm.scheduler import CakeSchedulerMixin

_LOG = logging.getLogger("vllm.cakekv")

_LOOKUP_PATIENCE_S = 2.0
_LOOKED_AT = 16
"""Restores that may think a wait over as often as they like; more of them do so more seldom."""
_CLOSING_S = 2.0
"""Seconds that a store may take to be closed: here, nothing is written to it."""


class SchedulerHalf:
    """Drives one `Restore` per request with a stored prefix; the scheduler's class does the rest.

    Parameters
    ----------
    options : VllmOptions
        The plug-in's.
    vllm_config, kv_cache_config
        The engine's.
    """

    def __init__(self, options: VllmOptions, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        make_hashes_stable(vllm_config)
        self.options = options
        self.policy = open_policy("cake")
        self.costs = StepCosts()
        self.restorations: dict[str, Restoration] = {}
        """By request."""
        self.outcomes = Outcomes(options.log_requests)
        self._vllm_config = vllm_config
        self._block_tokens: int = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._store, self._tiers = open_tiers(options)
        self._codec = codec_named(options.codec)
        self.lossy = LossyBlocks(self._codec, self._block_tokens)
        depths = [options.load_threads or tier.parallel_reads for tier in self._tiers]
        names = distinct_names(self._tiers)
        sources = [Source(name, LoadCost(depth), depth) for name, depth in zip(names, depths, strict=True)]
        self._desk = LoadDesk(sources, self.policy)
        self._sequence = 0
        self._groups: LayerGroups | None = None
        """How chunks are cut for a layered finish; None: this engine cannot have layers wait."""
        self._heard: StepReport | None = None
        """The report that was listened to before its turn."""
        self._waited_s = 0.0
        """Seconds that the step waited for loads."""
        self._clock = StepClock(self.costs)
        self._states: dict[str, RequestState] = {}
        """The restores as the policies see them in this step."""
        self._token_s: dict[int, float] = {}
        """Per source, seconds of its time per token, in this step."""
        self._share = 1.0
        """What the restore that was last shared out got of the steps."""
        self._fences: deque[tuple[int, Callable[[], None]]] = deque()
        """What to do once workers have taken in the orders of this number."""

    def join(self, scheduler: CakeSchedulerMixin) -> None:
        """Get to know the scheduler."""
        self._scheduler = scheduler

    def meet_workers(self, shards: Mapping[tuple[int, int], ShardDescription]) -> None:
        """Get to know what each worker keeps of a chunk.

        Raises
        ------
        UnsupportedEngine
            The model's weights cannot be identified.
        """
        self._desk.ranks = len(shards)
        options = self.options
        first = shards[min(shards)]
        self.keyring = Keyring(
            self._vllm_config,
            options.chunk_tokens,
            self._scheduler.hash_block_size,
            first.layout,
            options.tenant,
            self._codec.fingerprint,
        )
        with suppress(StoreError):
            self.keyring.keep_to(self._store.identities())
        self._desk.chunk_bytes = sum(shard.chunk_bytes for shard in shards.values())
        if layered_step.is_possible(self._vllm_config) and self._codec.fixed:
            self._groups = layered_step.groups_of(shards.values())
        tags = sorted({tag for shard in shards.values() for tag in shard.tags})
        self._copies = sum(len(shard.tags) for shard in shards.values()) // len(tags)
        patience_s = min(_LOOKUP_PATIENCE_S, options.load_deadline)
        shares = [partial(shard_key, tag=tag) for tag in tags]
        self.lookup = Lookup(self._tiers, shares, first.exact_bytes, patience_s)
        self.saves = SavePlan(options.chunk_tokens, self._block_tokens, self.lossy)
        shares_blocks = self._vllm_config.cache_config.enable_prefix_caching
        self.admission = Admission(
            options, self.keyring, self.lookup, self._codec.window, shares_blocks, self._desk.alive
        )
        mixes = mixes_adapters(self._vllm_config)
        self._save_desk = SaveDesk(self._scheduler, self.admission, self.saves, self.lossy, mixes)
        identity = self.keyring.identity
        with suppress(StoreError):  # it only serves to explain misses
            self._store.remember_identity(identity.root.hex(), identity.fields())

    # ----------------------------------------------------------------- requests

    def arrived(self, request: Request) -> None:
        """A request came, or has to begin again: see what is stored of it."""
        self.saves.forget(request.request_id)
        self.lossy.forget(request.request_id)
        self.admission.arrived(request)

    def match(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """How many tokens more than `local_tokens` to make room for, as `get_num_new_matched_tokens` wants it."""
        if request.request_id in self.restorations:
            return 0, False
        return self.admission.match(request, local_tokens, self.restorations.values())

    def start(self, request: Request, block_ids: list[int], external_tokens: int) -> None:
        """The request's blocks are there: begin to restore."""
        if not external_tokens or request.request_id in self.restorations:
            return
        stored, prefix, local_tokens = self.admission.take(request.request_id)
        assert prefix == local_tokens + external_tokens
        now = monotonic()
        cost = SharedCost(self.costs, self._share)
        load_costs = [SharedLoad(source.cost) for source in self._desk.sources]
        found_bytes = self.lookup.chunk_bytes(request.request_id)
        if found_bytes is not None and not self._codec.fixed:
            self._desk.chunk_bytes = found_bytes * self._copies
        restore = StepwiseRestore(
            request.num_tokens,
            self.options.chunk_tokens,
            stored[: prefix // self.options.chunk_tokens],
            [source._replace(cost=shared) for source, shared in zip(self._desk.sources, load_costs, strict=True)],
            cost,
            chunk_bytes=self._desk.chunk_bytes,
            groups=self._groups_for(request, prefix),
            mode=self.admission.asked(request.request_id).mode,
            max_span_tokens=self._vllm_config.scheduler_config.max_num_batched_tokens,
            patience_s=self.options.load_deadline,
            deadline_s=self.options.load_deadline,
            covered_tokens=local_tokens,
            now=now,
        )
        self.restorations[request.request_id] = restoration = Restoration(
            request,
            restore,
            cost,
            load_costs,
            self.keyring.keys(request),
            block_ids,
            self._block_tokens,
            local_tokens,
            self.lossy,
        )
        self.admission.began(restoration)
        self._states[request.request_id] = self._state(restoration)

    def _groups_for(self, request: Request, prefix: int) -> LayerGroups | None:
        """For a layered finish; None if the suffix takes more than a step, or what it computes cannot be taken back."""
        fits = request.num_tokens - prefix <= self._scheduler.max_num_scheduled_tokens
        wanted = self.options.layered_finish and fits and layered_step.may_be_discarded(request)
        return self._groups if wanted else None

    def finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """The request is over.

        Returns whether vLLM must wait before it forgets the request (the scheduler is told when), and what goes with
        the response.
        """
        restoration = self.restorations.get(request.request_id)
        parked = restoration is not None and restoration.parked  # vLLM itself waits for the end of the loads then
        if self.drop(request):
            self._scheduler.park_blocks(request)
        report = self.outcomes.take_report(request.request_id)
        self._forget(request)
        if parked:
            self.when_safe(lambda: self._scheduler.free_finished(request))
        return parked, answer(report) if report is not None else None

    def drop(self, request: Request) -> bool:
        """The request's blocks are to be freed. Returns whether a worker may still write into them."""
        restoration = self.restorations.pop(request.request_id, None)
        if restoration is None:
            return False
        if restoration.unsure:
            self._scheduler.unhash(restoration)
        restoration.settle(monotonic())
        restoration.give_up()
        self._desk.adopt(restoration)
        self._scheduler.count_hits(restoration)
        report = restoration.report()
        report.lookup_s = self.lookup.seconds(request.request_id)
        wanted = self.admission.asked(request.request_id).report
        self.outcomes.ended(request.request_id, report, wanted, complete=restoration.done_at is not None)
        return restoration.loading

    def report_early(self, request: Request) -> dict[str, Any] | None:
        """What goes with any output of a request that a stop string may end, which only vLLM's front end sees."""
        params = request.sampling_params
        report = self.outcomes.report(request.request_id) if params is not None and params.stop else None
        return answer(report) if report is not None else None

    def _forget(self, request: Request) -> None:
        self.admission.forget(request.request_id)
        self.saves.forget(request.request_id)
        self.lossy.forget(request.request_id)

    def when_safe(self, action: Callable[[], None]) -> None:
        """Do something once no worker writes for any load that was given up until now."""
        self._fences.append((self._sequence + 1, action))

    def make_room(self) -> bool:
        """vLLM finds no free block for a running request. Returns whether it should wait instead of preempting one."""
        return self._scheduler.make_room()

    @property
    def waiting_for_workers(self) -> bool:
        """Whether blocks will be freed as soon as workers have answered."""
        return bool(self._fences)

    # -------------------------------------------------------------------- steps

    def think(self, turned_away: Container[str] = ()) -> None:
        """Before a step is put together: decide what the restores could use of it.

        Those `turned_away` may not get what they ask for, so others are asked, too.
        """
        now = monotonic()
        paused_s = self._clock.standstill_s()
        for restoration in self.restorations.values():
            restoration.pause(paused_s)
            restoration.begin_step(now)
        self._token_s = self._desk.seconds_per_token(self.options.chunk_tokens)
        self._states = {name: self._state(restoration) for name, restoration in self.restorations.items()}
        self._weigh(now)
        self._think_in_turn(now, turned_away)
        self.admission.begin_step(self.restorations)

    def _think_in_turn(self, now: float, turned_away: Container[str]) -> None:
        """Ask the restores what they could compute, in the policy's order.

        Once that is more than a step takes, those that are parked are passed over.
        """
        budget = self._scheduler.max_num_scheduled_tokens
        spare = self.tokens_beside_decodes()
        look_s = LOOK_S * max(1.0, len(self.restorations) / _LOOKED_AT)
        for state in self.policy.compute_order(self._states.values(), time()):
            restoration = self.restorations[state.request_id]
            if restoration.done_at is not None or (restoration.parked and budget <= 0):
                continue
            restoration.think(now, self._scheduler.serves_only(restoration.request), look_s)
            self._states[state.request_id] = state._replace(tokens=restoration.wanted)
            if state.request_id in turned_away:
                continue
            # One that gives way to decodes leaves to others what it may not have.
            limited = spare is not None and state.kind is Kind.STORED_PREFILL and state.gives_way
            budget -= min(restoration.wanted, spare or 0) if limited else restoration.wanted

    def _weigh(self, now: float) -> None:
        """Tell the restores how long they wait for the sources while others are served before them."""
        loading = [restoration for restoration in self.restorations.values() if not restoration.joined]
        states = [
            self._states[restoration.request_id]._replace(
                tokens=restoration.restore.prefix_tokens - restoration.restore.position
            )
            for restoration in loading
        ]
        burden = burdens(states, self.policy, time())
        for restoration in loading:
            for source, cost in enumerate(restoration.load_costs):
                cost.burden = burden[restoration.request_id].load.get(source, 1.0)
                if len(loading) > 1:
                    cost.crowded_s = now

    def state_of(self, restoration: Restoration) -> RequestState:
        """A restore as the policies see it in this step."""
        return self._states[restoration.request_id]

    def _state(self, restoration: Restoration) -> RequestState:
        """A restore as it is now, before it is known what it could compute."""
        restore, shape = restoration.restore, self.costs.cost.shape
        request, tokens, position = restoration.request, self.options.chunk_tokens, restore.position
        joined = restoration.joined
        loads = not joined and restore.mode != "compute"
        return RequestState(
            request.request_id,
            Kind.PLAIN_PREFILL if joined else Kind.STORED_PREFILL,
            request.arrival_time,
            0,
            front_s=self.costs.cost.seconds(position, tokens) / tokens,
            back_s=shape.linear + shape.quadratic * restore.latest.back,
            load_s={source: self._token_s[source] for source in restore.sources_left()} if loads else {},
            prefix_tokens=restore.prefix_tokens,
        )

    def orders(self, output: SchedulerOutput) -> StepOrders:
        """A step is put together: claim what it computes, order what workers do meanwhile."""
        now = monotonic()
        self._sequence += 1
        orders = StepOrders(self._sequence, answer=bool(self._fences))
        step_s = self._take(output.num_scheduled_tokens, now)
        states = [self._states[request_id] for request_id in self.restorations]
        self._desk.order(orders, self.restorations, states, step_s)
        for restoration in self.restorations.values():
            if restoration.unsure:
                self._await_layers(orders, restoration)
        self._save_desk.order(orders, output, self.restorations)
        return orders

    def _await_layers(self, orders: StepOrders, restoration: Restoration) -> None:
        """Have the workers' layers wait for what the suffix attends to."""
        assert self._groups is not None
        orders.awaited = restoration.awaited(self._desk.ranks, len(self._groups.bytes))
        patience_s = max(layered_step.LEAST_PATIENCE_S, layered_step.PATIENCE * restoration.awaited_s())
        orders.patience_s = min(patience_s, self.options.load_deadline)

    def _take(self, scheduled: Mapping[str, int], now: float) -> float:
        """Claim the tokens of the step; returns how many seconds it should take."""
        pieces = []
        if any(tokens > 1 for tokens in scheduled.values()):
            requests = self._scheduler.requests
            pieces = [
                Piece(requests[request_id].num_computed_tokens, tokens) for request_id, tokens in scheduled.items()
            ]
        step_s = self._clock.begin(self._sequence, pieces, bool(scheduled))
        left = self._scheduler.max_num_scheduled_tokens - sum(scheduled.values())
        beside_decodes = self.tokens_beside_decodes() if scheduled else None
        if beside_decodes is not None:
            left = min(left, beside_decodes)
        for request_id, restoration in self.restorations.items():
            if restoration.done_at is not None:
                continue
            tokens, start = scheduled.get(request_id, 0), restoration.request.num_computed_tokens
            if restoration.wanted or restoration.passed_over:
                wanted = Piece(restoration.position, restoration.wanted or 1)
                restoration.cost.shared(wanted, tokens, step_s)
            else:
                restoration.cost.spared(Piece(restoration.position, left), step_s)
            self._share = restoration.cost.share
            if tokens:
                position = restoration.position
                assert start == position, f"vLLM computes {request_id} from {start} on, the planner from {position}"
                restoration.take(tokens, now)
                if start + tokens >= restoration.restore.prompt_tokens:
                    restoration.done_at = self._sequence
                    if not restoration.unsure:
                        self._scheduler.count_prefill(restoration)
        return step_s

    def tokens_beside_decodes(self) -> int | None:
        """How many tokens restores that give way may compute in a step with decodes; None: any number."""
        if not self.options.decode_slowdown or not self._clock.decode_s:
            return None
        spare_s = (self.options.decode_slowdown - 1) * self._clock.decode_s
        return self._clock.tokens_within(spare_s, max((r.position for r in self.restorations.values()), default=0))

    def layered_step_ended(self, report: object) -> Restoration | None:
        """If a step's layers waited, listen to its report before its output is used; returns whose output is void."""
        restoration = next((each for each in self.restorations.values() if each.unsure), None)
        if restoration is None:
            return None
        shards = list(report.shards.values()) if isinstance(report, StepReport) else []
        if isinstance(report, StepReport):
            self.heard(report)
            self._heard = report
        waited = len(shards) == self._desk.ranks and not any(shard.lost for shard in shards)
        if not restoration.confirm(waited, monotonic()):
            return restoration
        self._scheduler.count_prefill(restoration)
        prefix, prompt = restoration.restore.prefix_tokens, restoration.restore.prompt_tokens
        self._save_desk.note(restoration.request_id, prefix, prompt - prefix, restoration)
        return None

    def ended(self, orders: StepOrders) -> None:
        """A step's output is there."""
        self._clock.end(orders.sequence, self._waited_s)
        self._waited_s = 0.0
        for restoration in list(self.restorations.values()):
            if restoration.done_at is not None and restoration.done_at <= orders.sequence:
                self.drop(restoration.request)

    def heard(self, report: StepReport) -> None:
        """Workers report."""
        if report is self._heard:
            self._heard = None
            return
        self._waited_s = max((shard.waited_s for shard in report.shards.values()), default=0.0)
        for rank, shard in report.shards.items():
            self._desk.heard(rank, shard)
            self.saves.unsaved(shard.unsaved)
        if len(report.shards) == self._desk.ranks:
            reached = min(shard.sequence for shard in report.shards.values())
            while self._fences and self._fences[0][0] <= reached:
                self._fences.popleft()[1]()

    def start_anew(self) -> None:
        """The weights may have changed. Who waits asks again, under new keys; who does not belongs to the old ones."""
        _LOG.info(
            "cakekv: vLLM's caches were cleared for new weights: from now on nothing that was stored before is found; "
            "an engine that is started anew finds it again"
        )
        self.keyring.start_anew()
        self.saves.start_anew()
        for request in self._scheduler.requests.values():
            if request.num_computed_tokens or request.request_id in self.restorations:
                self.admission.save_nothing_of(request.request_id)
            else:
                self.arrived(request)

    def close(self) -> None:
        """Stop looking things up."""
        if self._desk.ranks:
            self.lookup.close()
        close_store(self._store, _CLOSING_S)

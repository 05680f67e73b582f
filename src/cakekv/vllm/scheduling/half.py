"""The connector in the scheduler: looks up, starts restores, orders loads and saves, learns what became of them."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from time import monotonic, time
from typing import TYPE_CHECKING, Any, Protocol

from cakekv.codec import codec_named
from cakekv.errors import StoreError, UnsupportedEngine
from cakekv.keys import ChunkKey
from cakekv.restore.contention import SharedLoad, load_burdens
from cakekv.restore.costs import LoadCost
from cakekv.restore.flights import Tier
from cakekv.restore.level_choice import LayerGroups, Level
from cakekv.restore.options import PlannerOptions
from cakekv.restore.planner import Span
from cakekv.restore.priority import Kind, RequestState, open_policy
from cakekv.restore.stepwise import StepwisePlanner
from cakekv.store.base import Store, distinct_names
from cakekv.vllm.config import VllmOptions
from cakekv.vllm.messages import StepOrders, StepReport, WorkerDescription
from cakekv.vllm.scheduling import layered_step
from cakekv.vllm.scheduling.adapter_mixing import mixes_adapters
from cakekv.vllm.scheduling.admission import Admission
from cakekv.vllm.scheduling.documents import Marking, separator_tokens
from cakekv.vllm.scheduling.hints import LOOKED_AT, Hints
from cakekv.vllm.scheduling.hit_statistics import CountingScheduler, HitStatistics
from cakekv.vllm.scheduling.identity import ChunkNames
from cakekv.vllm.scheduling.last_saves import LastSaves
from cakekv.vllm.scheduling.load_dispatcher import LoadDispatcher
from cakekv.vllm.scheduling.lookup import BackgroundLookup
from cakekv.vllm.scheduling.lossy_blocks import LossyBlocks
from cakekv.vllm.scheduling.outcomes import Outcomes, answer
from cakekv.vllm.scheduling.parked_blocks import ParkedBlocks
from cakekv.vllm.scheduling.restoration import LOOK_S, Restoration, Stage
from cakekv.vllm.scheduling.save_dispatcher import SaveDispatcher, SaveTracker
from cakekv.vllm.scheduling.step_costs import SharedCost, StepClock, StepCosts
from cakekv.vllm.shard_key import shard_key
from cakekv.vllm.stores import close_store

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_LOG = logging.getLogger("vllm.cakekv")

_LOOKUP_PATIENCE_S = 2.0
_LOOKED_AT = 16
"""Restores that may reconsider a wait as often as they like; more of them do so more seldom."""
CLOSING_S = 2.0
"""Seconds that a store may take to be closed: here, nothing is written to it."""


class RestoringScheduler(CountingScheduler, Protocol):
    """What the connector, and its half in the scheduler, use of the scheduler that they serve."""

    requests: dict[str, Request]
    waiting: Iterable[Request]
    hash_block_size: int
    max_num_scheduled_tokens: int

    def join(self, half: SchedulerHalf) -> None:
        """The half is there: work with it."""

    def free_finished(self, request: Request) -> None:
        """No worker writes into the blocks of this finished request any more."""

    def make_room(self) -> bool:
        """An allocation failed for a running request. Returns whether blocks will come free by the next step."""


class SchedulerHalf:
    """Drives one planner per request with a stored prefix; the scheduler's class does the rest.

    Parameters
    ----------
    options : VllmOptions
        The plug-in's.
    vllm_config
        The engine's.
    store : Store
        Where chunks are. Closed with this.
    scheduler : RestoringScheduler
        The one that it serves.
    block_tokens : int
        Tokens per block of vLLM's cache.
    workers : mapping
        What each worker keeps of a chunk.

    Raises
    ------
    UnsupportedEngine
        The model's weights cannot be identified.
    """

    def __init__(
        self,
        options: VllmOptions,
        vllm_config: VllmConfig,
        store: Store,
        scheduler: RestoringScheduler,
        block_tokens: int,
        workers: Mapping[tuple[int, int], WorkerDescription],
    ) -> None:
        self.options = options
        self.policy = open_policy("cake")
        self.costs = StepCosts()
        self.restorations: dict[str, Restoration] = {}
        """By request."""
        self.outcomes = Outcomes(options.log_requests)
        self.hits = HitStatistics(scheduler)
        self.last_saves = LastSaves()
        self.tiers = list(store.tiers)
        self.parked_blocks = ParkedBlocks(scheduler.kv_cache_manager)
        self._store = store
        self._scheduler = scheduler
        self._step_tokens = scheduler.max_num_scheduled_tokens
        """Tokens that a step takes at the most."""
        self._max_span_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        self._sequence = 0
        """Number of the last orders."""
        self._received: StepReport | None = None
        """The report that was taken in before its turn."""
        self._waited_s = 0.0
        """Seconds that the step waited for loads."""
        self._clock = StepClock(self.costs)
        self._states: dict[str, RequestState] = {}
        """The restores as the policies see them in this step."""
        self._token_s: dict[int, float] = {}
        """Per tier, seconds of its time per token, in this step."""
        self._shape = self.costs.cost.shape
        """What compute costs, in this step."""
        self._furthest = 0
        """The position of the restore that has come furthest, in this step."""
        self.latest_share = 1.0
        """What the restore that was last shared out got of the steps."""

        self._codec = codec_named(options.codec)
        self.lossy = LossyBlocks(self._codec, block_tokens)
        first = workers[min(workers)]
        self.chunk_names = ChunkNames(
            vllm_config,
            options.chunk_tokens,
            scheduler.hash_block_size,
            first.layout,
            options.tenant,
            self._codec.fingerprint,
        )
        with suppress(StoreError):
            self.chunk_names.keep_to(store.identities())
        identity = self.chunk_names.identity
        with suppress(StoreError):  # it only serves to explain misses
            store.remember_identity(identity.root.hex(), identity.fields())

        depths = [options.load_threads or tier.parallel_reads for tier in self.tiers]
        names = distinct_names(self.tiers)
        tiers = [Tier(name, LoadCost(depth), depth) for name, depth in zip(names, depths, strict=True)]
        chunk_bytes = sum(worker.chunk_bytes for worker in workers.values())
        self.loads = LoadDispatcher(tiers, self.policy, len(workers), chunk_bytes)
        self._groups: LayerGroups | None = None
        """How chunks are cut for a layered finish; None: this engine cannot have layers wait."""
        if layered_step.is_possible(vllm_config) and self._codec.fixed:
            self._groups = layered_step.groups_of(workers.values())

        tags = sorted({tag for worker in workers.values() for tag in worker.tags})
        self._copies = sum(len(worker.tags) for worker in workers.values()) // len(tags)
        """How many workers keep each shard."""
        shards = [partial(shard_key, tag=tag) for tag in tags]
        patience_s = min(_LOOKUP_PATIENCE_S, options.load_deadline)
        self.lookup = BackgroundLookup(self.tiers, shards, first.exact_bytes, patience_s)
        separator = separator_tokens(options.documents_separator, vllm_config.model_config)
        self.hints = Hints(store, shards, first.exact_bytes)
        self.admission = Admission(
            options,
            self.chunk_names,
            self.lookup,
            self._codec.window,
            vllm_config.cache_config.enable_prefix_caching,
            self.loads.alive,
            Marking(separator, first.no_documents),
            block_tokens,
        )
        self.saves = SaveTracker(options.chunk_tokens, block_tokens, self.lossy)
        mixes = mixes_adapters(vllm_config)
        self._save_dispatcher = SaveDispatcher(
            scheduler.requests, self._block_ids, self.admission, self.saves, self.lossy, mixes
        )

    def _block_ids(self, request_id: str) -> list[int]:
        block_ids: list[int] = self._scheduler.kv_cache_manager.get_block_ids(request_id)[0]
        return block_ids

    # ----------------------------------------------------------------- requests

    def arrived(self, request: Request) -> None:
        """A request came, or has to begin again: see what is stored of it."""
        self.saves.forget(request.request_id)
        self.lossy.forget(request.request_id)
        self.admission.arrived(request)
        own = self.admission.options_of(request.request_id)
        if own.pin_s or own.release or own.prefetch:
            chunks = request.num_prompt_tokens // self.options.chunk_tokens
            self.hints.arrived(request.request_id, self._keys(request)[:chunks], own)

    def _keys(self, request: Request) -> list[ChunkKey]:
        """Of a request's chunks; none if they cannot be named, or may still change."""
        try:
            return [] if request.resumable else self.chunk_names.keys(request)
        except UnsupportedEngine:
            return []

    def match(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """How many tokens more than `local_tokens` to make room for, as `get_num_new_matched_tokens` wants it."""
        if request.request_id in self.restorations:
            return 0, False
        return self.admission.match(request, local_tokens, self.restorations.values())

    def start(self, request: Request, block_ids: list[int], external_tokens: int) -> None:
        """The request's blocks are there: begin to restore."""
        if not external_tokens or request.request_id in self.restorations:
            return
        stored, prefix, local_tokens, layout = self.admission.take(request.request_id)
        assert prefix == local_tokens + external_tokens
        now = monotonic()
        cost = SharedCost(self.costs, self.latest_share)
        found = [None if size is None else size * self._copies for size in self.lookup.chunk_bytes(request.request_id)]
        self.loads.found(found, self._codec)
        load_costs = [
            SharedLoad(tier.cost, read / self.loads.chunk_bytes)
            for tier, read in zip(self.loads.tiers, self.loads.bytes_read, strict=True)
        ]
        planner = StepwisePlanner(
            request.num_tokens,
            self.options.chunk_tokens,
            stored if layout else stored[: -(-prefix // self.options.chunk_tokens)],
            [tier._replace(cost=shared) for tier, shared in zip(self.loads.tiers, load_costs, strict=True)],
            cost,
            [Level.whole(self.loads.chunk_bytes, None if layout else self._groups_for(request, prefix))],
            PlannerOptions(
                mode=self.admission.options_of(request.request_id).mode,
                max_span_tokens=self._max_span_tokens,
                deadline_s=self.options.load_deadline,
            ),
            covered_tokens=local_tokens,
            starts=layout.grid.starts if layout else None,
            now=now,
        )
        self.restorations[request.request_id] = restoration = Restoration(
            request,
            planner,
            cost,
            load_costs,
            self.chunk_names.keys(request),
            block_ids,
            local_tokens,
            self.lossy,
            layout,
        )
        self.admission.began(restoration)
        self._states[request.request_id] = self._state(restoration)
        self._furthest = max(self._furthest, restoration.position)

    def _groups_for(self, request: Request, prefix: int) -> LayerGroups | None:
        """For a layered finish; None if the suffix takes more than a step, or what it computes cannot be taken back."""
        fits = request.num_tokens - prefix <= self._step_tokens
        wanted = self.options.layered_finish and fits and layered_step.may_be_discarded(request)
        return self._groups if wanted else None

    def finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """The request is over.

        Returns whether vLLM must wait before it forgets the request (the scheduler is told when), and what goes with
        the response.
        """
        restoration = self.restorations.get(request.request_id)
        parked = restoration is not None and restoration.parked  # vLLM itself waits for the end of the loads then
        if self.drop(request) or parked:
            self.parked_blocks.park(request)
        report = self.outcomes.take_report(request.request_id)
        self._forget(request)
        if parked:
            self.parked_blocks.when_safe(lambda: self._scheduler.free_finished(request))
        return parked, answer(report) if report is not None else None

    def drop(self, request: Request) -> bool:
        """The request's blocks are to be freed. Returns whether a worker may still write into them."""
        restoration = self.restorations.pop(request.request_id, None)
        if restoration is None:
            return False
        if restoration.layered:
            self._unhash(restoration)
        restoration.commit(monotonic())
        restoration.give_up()
        self.loads.adopt(restoration)
        self.hits.count_loaded(restoration)
        report = restoration.report()
        report.lookup_s = self.lookup.seconds(request.request_id)
        if note := self.admission.note_on(request.request_id):
            report.notes.append(note)
        wanted = self.admission.options_of(request.request_id).report
        self.outcomes.ended(request.request_id, report, wanted, complete=restoration.computed_by is not None)
        return restoration.loading

    def report_early(self, request: Request) -> dict[str, Any] | None:
        """What goes with any output of a request that a stop string may end, which only vLLM's front end sees."""
        params = request.sampling_params
        report = self.outcomes.report(request.request_id) if params is not None and params.stop else None
        return answer(report) if report is not None else None

    def _forget(self, request: Request) -> None:
        self.hints.finished(request.request_id)
        self.admission.forget(request.request_id)
        self.saves.forget(request.request_id)
        self.lossy.forget(request.request_id)

    def _unhash(self, restoration: Restoration) -> None:
        """Have nobody share what may not be what its hash says."""
        blocks = self._block_ids(restoration.request_id)[restoration.sure_blocks :]
        self._scheduler.kv_cache_manager.evict_blocks(set(blocks))

    # -------------------------------------------------------------------- steps

    def begin_step(self, turned_away: Container[str], alone: bool) -> None:
        """Before a step is put together: decide what the restores could use of it.

        Those `turned_away` may not get what they ask for, so others are asked, too. `alone` says whether vLLM has one
        request only, so that a step could hold nobody else up.
        """
        now = monotonic()
        paused_s = self._clock.standstill_s()
        for restoration in self.restorations.values():
            if paused_s:
                restoration.pause(paused_s)
            restoration.begin_step(now)
        self._token_s = self.loads.seconds_per_token(self.options.chunk_tokens)
        self._shape = self.costs.cost.shape
        self._states = {name: self._state(restoration) for name, restoration in self.restorations.items()}
        self._furthest = max((restoration.position for restoration in self.restorations.values()), default=0)
        self._weigh(now)
        self._decide_in_turn(now, turned_away, alone)
        self.admission.begin_step(self.restorations)
        if self.hints.fetches:
            self._look_ahead(now)

    def _look_ahead(self, now: float) -> None:
        """Tell the stores who waits, so that they fetch what those will need."""
        requests = self._scheduler.requests
        first = (request.request_id for request in islice(self._scheduler.waiting, LOOKED_AT))
        waiting = [name for name in first if name in requests and self.admission.unadmitted(requests[name])]
        self.hints.queue(waiting, lambda name: self._keys(requests[name]), now)

    def _decide_in_turn(self, now: float, turned_away: Container[str], alone: bool) -> None:
        """Ask the restores what they could compute, in the policy's order.

        Once that is more than a step takes, those that are parked are passed over.
        """
        budget = self._step_tokens
        spare = self.tokens_beside_decodes()
        look_s = LOOK_S * max(1.0, len(self.restorations) / _LOOKED_AT)
        for state in self.policy.compute_order(self._states.values(), time()):
            restoration = self.restorations[state.request_id]
            if restoration.computed_by is not None or (restoration.parked and budget <= 0):
                continue
            restoration.decide(now, alone, look_s)
            if restoration.demand.tokens:
                self._states[state.request_id] = state._replace(tokens=restoration.demand.tokens)
            if state.request_id in turned_away:
                continue
            # One that gives way to decodes leaves to others what it may not have.
            limited = spare is not None and state.kind is Kind.STORED_PREFILL and state.gives_way
            budget -= min(restoration.demand.tokens, spare or 0) if limited else restoration.demand.tokens

    def _weigh(self, now: float) -> None:
        """Tell the restores how long they wait for the tiers while others are served before them."""
        loading = [restoration for restoration in self.restorations.values() if not restoration.joined]
        states = [
            self._states[restoration.request_id]._replace(
                tokens=restoration.planner.prefix_tokens - restoration.planner.position
            )
            for restoration in loading
        ]
        burden = load_burdens(states, self.policy, time())
        for restoration in loading:
            burden_of = burden[restoration.request_id]
            for tier, cost in enumerate(restoration.load_costs):
                cost.burden = burden_of.get(tier, 1.0)
                if len(loading) > 1:
                    cost.crowded_s = now

    def state_of(self, restoration: Restoration) -> RequestState:
        """A restore as the policies see it in this step."""
        return self._states[restoration.request_id]

    def _state(self, restoration: Restoration) -> RequestState:
        """A restore as it is now, before it is known what it could compute."""
        planner, shape = restoration.planner, self._shape
        request, tokens, position = restoration.request, self.options.chunk_tokens, planner.position
        joined = restoration.joined
        loads = not joined and planner.mode != "compute"
        return RequestState(
            request.request_id,
            Kind.PLAIN_PREFILL if joined else Kind.STORED_PREFILL,
            request.arrival_time,
            0,
            front_s=self.costs.cost.seconds(position, tokens) / tokens,
            back_s=shape.linear + shape.quadratic * planner.latest.back,
            load_s={tier: self._token_s[tier] for tier in planner.tiers_left()} if loads else {},
            prefix_tokens=planner.prefix_tokens,
        )

    def orders(self, output: SchedulerOutput) -> StepOrders:
        """A step is put together: claim what it computes, order what workers do meanwhile."""
        now = monotonic()
        self._sequence += 1
        self.parked_blocks.ordered(self._sequence)
        orders = StepOrders(self._sequence, answer=self.parked_blocks.waiting)
        step_s = self._take(output.num_scheduled_tokens, now)
        states = [self._states[request_id] for request_id in self.restorations]
        self.loads.order(orders, self.restorations, states, step_s)
        for restoration in self.restorations.values():
            if restoration.layered:
                self._await_layers(orders, restoration)
        self._save_dispatcher.order(orders, output, self.restorations)
        orders.idle = not self._scheduler.requests
        return orders

    def _await_layers(self, orders: StepOrders, restoration: Restoration) -> None:
        """Have the workers' layers wait for what the suffix attends to."""
        assert self._groups is not None
        orders.awaited = restoration.awaited(self.loads.workers, len(self._groups.bytes))
        patience_s = max(layered_step.LEAST_PATIENCE_S, layered_step.PATIENCE * restoration.awaited_s())
        orders.patience_s = min(patience_s, self.options.load_deadline)

    def _take(self, scheduled: Mapping[str, int], now: float) -> float:
        """Claim the tokens of the step; returns how many seconds it should take."""
        spans = []
        if any(tokens > 1 for tokens in scheduled.values()):
            requests = self._scheduler.requests
            spans = [Span(requests[request_id].num_computed_tokens, tokens) for request_id, tokens in scheduled.items()]
        step_s = self._clock.begin(self._sequence, spans, bool(scheduled))
        left = self._step_tokens - sum(scheduled.values())
        beside_decodes = self.tokens_beside_decodes() if scheduled else None
        if beside_decodes is not None:
            left = min(left, beside_decodes)
        for request_id, restoration in self.restorations.items():
            if restoration.computed_by is not None:
                continue
            tokens, start = scheduled.get(request_id, 0), restoration.request.num_computed_tokens
            demand = restoration.demand
            if demand.tokens or not demand.known:
                wanted = Span(restoration.position, demand.tokens or 1)
                restoration.cost.shared(wanted, tokens, step_s)
            else:
                restoration.cost.spared(Span(restoration.position, left), step_s)
            self.latest_share = restoration.cost.share
            if tokens:
                position = restoration.position
                assert start == position, f"vLLM computes {request_id} from {start} on, the planner from {position}"
                restoration.take(tokens, self._sequence, now)
                if restoration.stage is Stage.COMPUTED:
                    self.hits.count_prefill(restoration)
        return step_s

    def tokens_beside_decodes(self) -> int | None:
        """How many tokens restores that give way may compute in a step with decodes; None: any number."""
        if not self.options.decode_slowdown or not self._clock.decode_s:
            return None
        spare_s = (self.options.decode_slowdown - 1) * self._clock.decode_s
        return self._clock.tokens_within(spare_s, self._furthest)

    def layered_step_ended(self, report: object) -> Restoration | None:
        """If a step's layers waited, take in its report before its output is used; returns whose output is void."""
        restoration = next((each for each in self.restorations.values() if each.layered), None)
        if restoration is None:
            return None
        workers = list(report.workers.values()) if isinstance(report, StepReport) else []
        if isinstance(report, StepReport):
            self.receive(report)
            self._received = report
        waited = len(workers) == self.loads.workers and not any(worker.lost for worker in workers)
        if not restoration.confirm(waited, monotonic()):
            self._unhash(restoration)
            return restoration
        self.hits.count_prefill(restoration)
        prefix, prompt = restoration.planner.prefix_tokens, restoration.planner.prompt_tokens
        self._save_dispatcher.note(restoration.request_id, prefix, prompt - prefix, restoration)
        return None

    def ended(self, orders: StepOrders) -> None:
        """A step's output is there."""
        self._clock.end(orders.sequence, self._waited_s)
        self._waited_s = 0.0
        for restoration in list(self.restorations.values()):
            if restoration.computed_by is not None and restoration.computed_by <= orders.sequence:
                self.drop(restoration.request)

    def receive(self, report: StepReport) -> None:
        """Workers report."""
        if report is self._received:
            self._received = None
            return
        self._waited_s = max((worker.waited_s for worker in report.workers.values()), default=0.0)
        for rank, worker in report.workers.items():
            self.loads.receive(rank, worker)
            self.saves.unsaved(worker.unsaved)
            self.last_saves.receive(rank, worker.saving)
        if len(report.workers) == self.loads.workers:
            self.parked_blocks.answered(min(worker.sequence for worker in report.workers.values()))

    def start_anew(self) -> None:
        """The weights may have changed. Who waits asks again, under new keys; who does not belongs to the old ones."""
        _LOG.info(
            "cakekv: vLLM's caches were cleared for new weights: from now on nothing that was stored before is found; "
            "an engine that is started anew finds it again"
        )
        self.chunk_names.start_anew()
        self.saves.start_anew()
        for request in self._scheduler.requests.values():
            if request.num_computed_tokens or request.request_id in self.restorations:
                self.admission.save_nothing_of(request.request_id)
            else:
                self.arrived(request)

    def close(self) -> None:
        """Stop looking things up."""
        self.lookup.close()
        self.hints.close()
        close_store(self._store, CLOSING_S)

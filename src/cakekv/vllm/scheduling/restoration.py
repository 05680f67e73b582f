"""One request's restore as the scheduler sees it: the planner, the blocks, and the loads that workers are at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from cakekv.keys import ChunkKey
from cakekv.restore.contention import SharedLoad
from cakekv.restore.coverage import State
from cakekv.restore.flights import Load
from cakekv.restore.planner import Span
from cakekv.restore.report import RestoreReport, told_apart
from cakekv.restore.stepwise import StepwisePlanner
from cakekv.vllm.messages import LoadOrder, LoadResult, Source
from cakekv.vllm.scheduling.documents import Layout
from cakekv.vllm.scheduling.lossy_blocks import LossyBlocks
from cakekv.vllm.scheduling.step_costs import SharedCost

if TYPE_CHECKING:
    from vllm.v1.request import Request

LOOK_S = 0.02
"""Seconds after which a wait is thought over even if nothing was heard."""


class Stage(Enum):
    """How far a restore has come, as vLLM sees it."""

    PARKED = "vLLM holds the request to be loading, so that it computes nothing"
    PREFILLING = "its prefix is computed and loaded"
    LAYERED = "the step computes its suffix layer by layer, while the last chunks arrive; that may turn out in vain"
    COMPUTED = "the last part of the prompt is computed, or on its way"


_NEXT = {
    Stage.PARKED: {Stage.PREFILLING},
    Stage.PREFILLING: {Stage.LAYERED, Stage.COMPUTED},
    Stage.LAYERED: {Stage.PREFILLING, Stage.COMPUTED},
    Stage.COMPUTED: set(),
}
"""The stages that may follow each stage."""


class Demand(NamedTuple):
    """What compute should take of a restore in the coming step."""

    tokens: int = 0
    layered: bool = False
    """Whether these are the suffix, although chunks before it still arrive."""
    known: bool = False
    """Whether the planner was asked; it is not while others use up the step's tokens."""


_UNKNOWN = Demand()


@dataclass(slots=True)
class _OpenLoad:
    """A load that some worker has not answered."""

    load: Load
    results: dict[int, LoadResult] = field(default_factory=dict)
    """Answers so far, by rank."""
    failed: bool = False
    cancelled: bool = False
    """Whether the workers were told to give it up."""


class Restoration:
    """Translates between a planner and the workers.

    Parameters
    ----------
    request
        vLLM's request.
    planner : StepwisePlanner
        Decides what is computed and what is loaded.
    cost : SharedCost
        The planner's idea of compute.
    load_costs : sequence of SharedLoad
        Its idea of each tier.
    keys : sequence of ChunkKey
        Keys of the chunks.
    block_ids : sequence of int
        The request's blocks, up to the end of the stored prefix at least.
    local_tokens : int
        Tokens that vLLM's own prefix cache had.
    lossy : LossyBlocks
        Told of what is loaded.
    layout : Layout or None
        If the prompt has documents, what the planner takes for its chunks.
    """

    def __init__(
        self,
        request: Request,
        planner: StepwisePlanner,
        cost: SharedCost,
        load_costs: Sequence[SharedLoad],
        keys: Sequence[ChunkKey],
        block_ids: Sequence[int],
        local_tokens: int,
        lossy: LossyBlocks,
        layout: Layout | None = None,
    ) -> None:
        self.request = request
        self.planner = planner
        self.cost = cost
        self.load_costs = load_costs
        self.keys = keys
        self.local_tokens = local_tokens
        self.queried_tokens = request.num_tokens - local_tokens
        """Tokens that vLLM asked about."""
        self.began = monotonic()
        self.stage = Stage.PARKED
        self.demand = Demand(known=True)
        self.computed_by: int | None = None
        """Number of the orders with which the last part of the prompt is computed."""
        self.failed_chunks: set[int] = set()
        """Chunks of which a load failed."""
        self.after_lossy_tokens = 0
        """Computed tokens that attend to inexact ones."""
        self.layered_declined = False
        """Whether a layered step was offered to the step before, and not taken."""
        self.sure_blocks = 0
        """Blocks before anything that the layered step awaits."""
        self._layered_failed = False
        """Whether one was in vain: the second time, the suffix waits."""
        self._lossy = lossy
        self._lossy_chunks: set[int] = set()
        """Chunks that were placed and are not exact."""
        self._reused_chunks: set[int] = set()
        """Those of them that are parts of documents."""
        self._layout = layout
        self._block_ids = block_ids
        self._loads: dict[int, _OpenLoad] = {}
        """By number."""
        self._span: Span | None = None
        """What the step computes."""
        self._idle_until = 0.0
        """The planner is not asked before, unless something is heard."""

    @property
    def request_id(self) -> str:
        """The request's."""
        return str(self.request.request_id)

    @property
    def lost(self) -> set[int]:
        """Chunks that were stored but could not be had, or not in time."""
        return self.failed_chunks | self.planner.coverage.late

    @property
    def loading(self) -> bool:
        """Whether a worker may still write into the request's blocks."""
        return bool(self._loads)

    @property
    def parked(self) -> bool:
        """Whether vLLM still holds the request to be loading."""
        return self.stage is Stage.PARKED

    @property
    def layered(self) -> bool:
        """Whether the suffix is being computed layer by layer, so that it is not known how that went."""
        return self.stage is Stage.LAYERED

    @property
    def joined(self) -> bool:
        """Whether the arms have met: all that is left is the suffix."""
        return self.stage is not Stage.LAYERED and self.planner.position >= self.planner.prefix_tokens

    @property
    def shared(self) -> bool:
        """Whether other requests find the prefix in vLLM's cache, which hashes it with what is computed behind it."""
        return self.stage is not Stage.LAYERED and self.planner.position > self.planner.prefix_tokens

    @property
    def position(self) -> int:
        """Where compute should go on."""
        return self.planner.prefix_tokens if self.demand.layered else self.planner.position

    def enter(self, stage: Stage) -> None:
        """Go on to another stage."""
        assert stage in _NEXT[self.stage], f"{self.request_id} is {self.stage.name} and cannot become {stage.name}"
        self.stage = stage

    def begin_step(self, now: float) -> None:
        """The step before is over. Unless `decide` follows, compute takes nothing."""
        self.commit(now)
        self.layered_declined = self.demand.layered
        self.demand = _UNKNOWN
        if self._loads:
            self.planner.check_late(now)

    def decide(self, now: float, alone: bool, look_s: float = LOOK_S) -> None:
        """Decide what compute should take next; `alone` if nobody else has work.

        A wait is thought over after `look_s` seconds even if nothing was heard.
        """
        self.planner.layered_allowed = alone and not self._layered_failed
        tokens, layered = 0, False
        if now >= self._idle_until:
            tokens = self.planner.computable_tokens(now)
            if not tokens and self.planner.layered_allowed:
                tokens = self.planner.layered_tokens
                layered = tokens > 0
            if not tokens:
                self._idle_until = now + look_s
        self.demand = Demand(tokens, layered, True)

    def commit(self, now: float) -> None:
        """What was taken in the step before is in the cache, as far as any later step can tell."""
        if self.stage is Stage.LAYERED:
            self.confirm(False, now)
        if self._span is not None:
            self.planner.computed(self._span, now)
            self._span = None

    def take(self, tokens: int, sequence: int, now: float) -> None:
        """Compute takes the next tokens, as far as they are the prompt's, in the step with orders of this number."""
        if self.demand.layered:
            assert tokens == self.demand.tokens, f"vLLM computes {tokens} tokens of a suffix of {self.demand.tokens}"
            self.sure_blocks = self.planner.position // self._lossy.block_tokens
            self._span = self.planner.take_layered(now)
            self.demand = self.demand._replace(layered=False)
            self.enter(Stage.LAYERED)
            self.computed_by = sequence
        else:
            left = self.planner.prompt_tokens - self.planner.position
            self._span = self.planner.take(min(tokens, left), now)
            if tokens >= left:
                self.enter(Stage.COMPUTED)
                self.computed_by = sequence
        self._idle_until = 0.0

    def confirm(self, waited: bool, now: float) -> bool:
        """The layered step is over; `waited` if all workers say that they had what they needed. Returns whether so."""
        assert self._span is not None
        if waited and not self.planner.lost and not self.planner.awaits_pieces:
            self.enter(Stage.COMPUTED)
            return True
        self.enter(Stage.PREFILLING)
        self._layered_failed = True
        self.planner.gave_up(self._span, now)
        self._span, self.computed_by = None, None
        return False

    def _awaited_loads(self) -> dict[int, Load]:
        """The loads that the suffix waits for."""
        return {number: open_.load for number, open_ in self._loads.items() if not open_.load.cancelled}

    def awaited(self, ranks: int, groups: int) -> dict[int, list[list[int]]]:
        """As in `StepOrders`."""
        awaited: dict[int, list[list[int]]] = {rank: [[] for _ in range(groups)] for rank in range(ranks)}
        for number, load in self._awaited_loads().items():
            for rank in awaited.keys() - self._loads[number].results.keys():
                awaited[rank][load.group or 0].append(number)
        return awaited

    def awaited_s(self) -> float:
        """Seconds that the slowest tier should take for them."""
        seconds = [0.0] * len(self.load_costs)
        for load in self._awaited_loads().values():
            seconds[load.tier] += self.load_costs[load.tier].seconds(load.size)
        return max(seconds)

    def next_load(self, tier: int, number: int, now: float, ahead: int) -> LoadOrder | None:
        """The next load to order from a tier, if any is worth it."""
        load = self.planner.next_load(tier, now, ahead)
        if load is None:
            return None
        self._loads[number] = _OpenLoad(load)
        sources = self._sources_of(load)
        key = sources[0].key if sources else self.keys[load.chunk]
        return LoadOrder(number, tier, key, load.start, self._blocks_of(load), load.group, sources)

    def _sources_of(self, load: Load) -> tuple[Source, ...]:
        """What of a document's chunks is loaded; nothing if it is a chunk of the prompt's own."""
        return self._layout.sources.get(load.chunk, ()) if self._layout is not None else ()

    def _blocks_of(self, load: Load) -> tuple[int, ...]:
        tokens = self._lossy.block_tokens
        return tuple(self._block_ids[load.start // tokens : (load.start + load.tokens) // tokens])

    def load(self, number: int) -> Load:
        """The planner's side of a load that was ordered."""
        return self._loads[number].load

    def new_cancels(self) -> Iterator[int]:
        """Loads that nobody needs any more and no worker was told of."""
        for number, open_ in self._loads.items():
            if open_.load.cancelled and not open_.cancelled:
                open_.cancelled = True
                yield number

    def begun(self, number: int, at: float) -> None:
        """A worker began with a load."""
        open_ = self._loads.get(number)
        if open_ is not None and open_.load.queued:
            self.planner.begun(open_.load, at)

    def ended(self, number: int, rank: int, result: LoadResult, ranks: int, now: float) -> bool:
        """A worker is through with a load. Returns whether all of them are."""
        open_ = self._loads[number]
        load, results = open_.load, open_.results
        results[rank] = result
        self._idle_until = 0.0
        at = now - result.ended_ago_s
        if result.reason and not open_.failed:
            open_.failed = True
            self.failed_chunks.add(load.chunk)
            self.planner.failed(load, result.reason, result.size, at, result.silent)
            load.cancelled = True  # so the other workers are told, too
        if len(results) < ranks:
            return False
        del self._loads[number]
        if open_.failed:
            return True
        load.began = now - max(result.began_ago_s for result in results.values())
        at = now - min(result.ended_ago_s for result in results.values())
        coded = any(result.coded for result in results.values())
        load.size = sum(result.size for result in results.values())  # in another form it is another size
        if not all(result.placed for result in results.values()):
            self.planner.abandoned(load, sum(result.size for result in results.values()), at)
        elif self.planner.arrived(load, at):
            self.planner.placed(load, at)
            if self._sources_of(load):
                self._lossy.reused(self._blocks_of(load))
                self._reused_chunks.add(load.chunk)
                self._lossy_chunks.add(load.chunk)
            elif self._lossy.loaded(self._blocks_of(load), coded):
                self._lossy_chunks.add(load.chunk)
        return True

    def report(self) -> RestoreReport:
        """What happened, as it stands."""
        report, state = self.planner.report(), self.planner.coverage.state
        report.ttft_s = monotonic() - self.began
        report.codec = self._lossy.codec.name
        tokens = self.planner.coverage.tokens
        report.lossy_tokens = sum(tokens[chunk] for chunk in self._lossy_chunks if state[chunk] is State.LOADED)
        reused = sum(tokens[chunk] for chunk in self._reused_chunks if state[chunk] is State.LOADED)
        if self._layout is not None and reused:
            report.reuse, report.reused_tokens = self._layout.reuse, reused
            links = self._layout.linked
            report.linked_tokens = sum(max(0, link.stop - max(link.start, self.local_tokens)) for link in links)
            report.misses = [part for miss in report.misses for part in told_apart(miss, links)]
        report.after_lossy_tokens = self.after_lossy_tokens
        return report

    def give_up(self) -> None:
        """No load is needed any more."""
        self.planner.cancel_loads()

    def pause(self, seconds: float) -> None:
        """The engine stood still: that is no fault of the loads."""
        for open_ in self._loads.values():
            open_.load.began += seconds

"""One request's restore as the scheduler sees it: the planner, the blocks, and the loads that workers are at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from cakekv.keys import ChunkKey
from cakekv.restore.contention import SharedLoad
from cakekv.restore.coverage import State
from cakekv.restore.flights import Load
from cakekv.restore.planner import Span
from cakekv.restore.report import RestoreReport
from cakekv.restore.stepwise import StepwisePlanner
from cakekv.vllm.messages import LoadOrder, LoadResult
from cakekv.vllm.scheduling.exactness import LossyBlocks
from cakekv.vllm.scheduling.step_costs import SharedCost

if TYPE_CHECKING:
    from vllm.v1.request import Request

LOOK_S = 0.02
"""Seconds after which a wait is thought over even if nothing was heard."""


class Restoration:
    """Translates between a planner and the workers.

    Parameters
    ----------
    request
        vLLM's request.
    restore : StepwisePlanner
        Its planner.
    cost : SharedCost
        The planner's idea of compute.
    load_costs : sequence of SharedLoad
        Its idea of each source.
    keys : sequence of ChunkKey
        Keys of the chunks.
    block_ids : sequence of int
        The request's blocks, up to the end of the stored prefix at least.
    block_tokens : int
        Tokens per block.
    local_tokens : int
        Tokens that vLLM's own prefix cache had.
    lossy : LossyBlocks
        Told of what is loaded.
    """

    def __init__(
        self,
        request: Request,
        restore: StepwisePlanner,
        cost: SharedCost,
        load_costs: Sequence[SharedLoad],
        keys: Sequence[ChunkKey],
        block_ids: Sequence[int],
        block_tokens: int,
        local_tokens: int,
        lossy: LossyBlocks,
    ) -> None:
        self.request = request
        self.restore = restore
        self.cost = cost
        self.load_costs = load_costs
        self.keys = keys
        self.local_tokens = local_tokens
        self.queried_tokens = request.num_tokens - local_tokens
        """Tokens that vLLM asked about."""
        self._lossy = lossy
        self._lossy_chunks: set[int] = set()
        """Chunks that were placed and are not exact."""
        self.after_lossy_tokens = 0
        """Computed tokens that attend to inexact ones."""
        self.began = monotonic()
        self.parked = True
        """Whether vLLM still holds it to be loading, so that it computes nothing."""
        self.wanted = 0
        """Tokens that compute should take in the coming step."""
        self.passed_over = False
        """Whether that was not thought about, since others use up the step's tokens."""
        self._block_ids = block_ids
        self._block_tokens = block_tokens
        self._chunk_blocks = restore.chunk_tokens // block_tokens
        self._loads: dict[int, Load] = {}
        """Loads that some worker has not answered, by number."""
        self._results: dict[int, dict[int, LoadResult]] = {}
        """Answers to them so far, by rank."""
        self._failed: set[int] = set()
        self.failed_chunks: set[int] = set()
        """Chunks of which a load failed."""
        self._cancelled: set[int] = set()
        """Loads that workers were told to give up."""
        self.offers_layered = False
        """Whether what is `wanted` is the suffix, although chunks before it still arrive."""
        self.offered_in_vain = False
        """Whether that was offered to the step before, and not taken."""
        self.unsure = False
        """Whether the suffix is being computed so, and it is not known how that went."""
        self.sure_blocks = 0
        """Blocks before anything that the layered step awaits."""
        self._gave_up = False
        """Whether that was in vain once: the second time, the suffix waits."""
        self.done_at: int | None = None
        """Number of the orders with which the last part of the prompt was computed."""
        self._span: Span | None = None
        self._idle_until = 0.0

    @property
    def request_id(self) -> str:
        """The request's."""
        return str(self.request.request_id)

    @property
    def lost(self) -> set[int]:
        """Chunks that were stored but could not be had, or not in time."""
        return self.failed_chunks | self.restore.coverage.late

    @property
    def loading(self) -> bool:
        """Whether a worker may still write into the request's blocks."""
        return bool(self._loads)

    @property
    def joined(self) -> bool:
        """Whether the arms have met: all that is left is the suffix."""
        return not self.unsure and self.restore.position >= self.restore.prefix_tokens

    @property
    def shared(self) -> bool:
        """Whether other requests find the prefix in vLLM's cache, which hashes it with what is computed behind it."""
        return not self.unsure and self.restore.position > self.restore.prefix_tokens

    @property
    def position(self) -> int:
        """Where compute should go on."""
        return self.restore.prefix_tokens if self.offers_layered else self.restore.position

    def begin_step(self, now: float) -> None:
        """The step before is over. Unless `think` follows, compute takes nothing."""
        self.settle(now)
        self.offered_in_vain = self.offers_layered
        self.wanted, self.offers_layered, self.passed_over = 0, False, True
        if self._loads:
            self.restore.check_late(now)

    def think(self, now: float, alone: bool, look_s: float = LOOK_S) -> None:
        """Decide what compute should take next; `alone` if nobody else has work.

        A wait is thought over after `look_s` seconds even if nothing was heard.
        """
        self.passed_over = False
        self.restore.layered_allowed = alone and not self._gave_up
        if now >= self._idle_until:
            self.wanted = self.restore.computable_tokens(now)
            if not self.wanted and self.restore.layered_allowed:
                self.wanted = self.restore.layered_tokens
                self.offers_layered = self.wanted > 0
            if not self.wanted:
                self._idle_until = now + look_s

    def settle(self, now: float) -> None:
        """What was taken in the step before is in the cache, as far as any later step can tell."""
        if self.unsure:
            self.confirm(False, now)
        if self._span is not None:
            self.restore.computed(self._span, now)
            self._span = None

    def take(self, tokens: int, now: float) -> None:
        """Compute takes the next tokens, as far as they are the prompt's."""
        if self.offers_layered:
            assert tokens == self.wanted, f"vLLM computes {tokens} tokens of a suffix of {self.wanted}"
            self.sure_blocks = self.restore.position // self._block_tokens
            self._span = self.restore.take_layered(now)
            self.offers_layered, self.unsure = False, True
        else:
            tokens = min(tokens, self.restore.prompt_tokens - self.restore.position)
            self._span = self.restore.take(tokens, now)
        self._idle_until = 0.0

    def confirm(self, waited: bool, now: float) -> bool:
        """The layered step is over; `waited` if all workers say that they had what they needed. Returns whether so."""
        assert self._span is not None
        self.unsure = False
        if waited and not self.restore.lost and not self.restore.awaits_pieces:
            return True
        self._gave_up = True
        self.restore.gave_up(self._span, now)
        self._span, self.done_at = None, None
        return False

    def _awaited_loads(self) -> dict[int, Load]:
        """The loads that the suffix waits for."""
        return {number: load for number, load in self._loads.items() if not load.cancelled}

    def awaited(self, ranks: int, groups: int) -> dict[int, list[list[int]]]:
        """As in `StepOrders`."""
        awaited: dict[int, list[list[int]]] = {rank: [[] for _ in range(groups)] for rank in range(ranks)}
        for number, load in self._awaited_loads().items():
            for rank in awaited.keys() - self._results.get(number, {}).keys():
                awaited[rank][load.group or 0].append(number)
        return awaited

    def awaited_s(self) -> float:
        """Seconds that the slowest source should take for them."""
        seconds = [0.0] * len(self.load_costs)
        for load in self._awaited_loads().values():
            seconds[load.tier] += self.load_costs[load.tier].seconds(load.size)
        return max(seconds)

    def next_load(self, source: int, number: int, now: float, ahead: int) -> LoadOrder | None:
        """The next load to order from a source, if any is worth it."""
        load = self.restore.next_load(source, now, ahead)
        if load is None:
            return None
        self._loads[number] = load
        return LoadOrder(number, source, self.keys[load.chunk], load.start, self._blocks_of(load), load.group)

    def _blocks_of(self, load: Load) -> tuple[int, ...]:
        return tuple(self._block_ids[load.chunk * self._chunk_blocks : (load.chunk + 1) * self._chunk_blocks])

    def load(self, number: int) -> Load:
        """The planner's side of a load that was ordered."""
        return self._loads[number]

    def new_cancels(self) -> Iterator[int]:
        """Loads that nobody needs any more and no worker was told of."""
        for number, load in self._loads.items():
            if load.cancelled and number not in self._cancelled:
                self._cancelled.add(number)
                yield number

    def begun(self, number: int, at: float) -> None:
        """A worker began with a load."""
        load = self._loads.get(number)
        if load is not None and load.queued:
            self.restore.begun(load, at)

    def ended(self, number: int, rank: int, result: LoadResult, ranks: int, now: float) -> bool:
        """A worker is through with a load. Returns whether all of them are."""
        load = self._loads[number]
        results = self._results.setdefault(number, {})
        results[rank] = result
        self._idle_until = 0.0
        at = now - result.ended_ago_s
        if result.reason and number not in self._failed:
            self._failed.add(number)
            self.failed_chunks.add(load.chunk)
            self.restore.failed(load, result.reason, result.size, at, result.silent)
            load.cancelled = True  # so the other workers are told, too
        if len(results) < ranks:
            return False
        del self._loads[number], self._results[number]
        if number in self._failed:
            return True
        load.began = now - max(result.began_ago_s for result in results.values())
        at = now - min(result.ended_ago_s for result in results.values())
        coded = any(result.coded for result in results.values())
        if self._lossy.codec.name != "raw":  # encoded or not, it may have another size than was expected
            load.size = sum(result.size for result in results.values())
        if not all(result.placed for result in results.values()):
            self.restore.abandoned(load, sum(result.size for result in results.values()), at)
        elif self.restore.arrived(load, at):
            self.restore.placed(load, at)
            if self._lossy.loaded(self._blocks_of(load), coded):
                self._lossy_chunks.add(load.chunk)
        return True

    def report(self) -> RestoreReport:
        """What happened, as it stands."""
        report, state = self.restore.report(), self.restore.coverage.state
        report.ttft_s = monotonic() - self.began
        report.codec = self._lossy.codec.name
        lossy = sum(state[chunk] is State.LOADED for chunk in self._lossy_chunks)
        report.lossy_tokens, report.after_lossy_tokens = lossy * self.restore.chunk_tokens, self.after_lossy_tokens
        return report

    def give_up(self) -> None:
        """No load is needed any more."""
        self.restore.cancel_loads()

    def pause(self, seconds: float) -> None:
        """The engine stood still: that is no fault of the loads."""
        for load in self._loads.values():
            load.began += seconds

"""The plan in force: what compute and each tier take next; made again when enough has changed."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from cakekv.restore.coverage import State
from cakekv.restore.level_choice import Level, best_level
from cakekv.restore.plan import Plan
from cakekv.restore.plan_search import PlanSearch
from cakekv.restore.situation import Moment, Situation

_PROBE_TOKENS = 128
"""First span while the speed of an arm is unknown: long enough to learn from, short enough to regret; then doubled."""


class Schedule:
    """What compute and each tier should take next.

    Parameters
    ----------
    situation : Situation
        The restore's.
    levels : sequence of Level
        How chunks can be read, the best last.
    target_at : float
        When everything should be covered, on the driver's clock.

    Attributes
    ----------
    plan : Plan
        What to load. Its queues shrink as loads are handed out.
    level : Level
        How chunks are read now.
    made_at : float
        When the plan was made, on the driver's clock.
    """

    def __init__(self, situation: Situation, levels: Sequence[Level], target_at: float) -> None:
        self._coverage = coverage = situation.coverage
        self._flights = situation.flights
        self._tiers = situation.tiers
        self._compute = situation.compute
        self._mode = situation.options.mode
        self._longest = situation.max_span_chunks
        self._longest_tokens = situation.max_span_tokens
        self._levels = levels if target_at < math.inf else levels[-1:]
        self._target_at = target_at
        loadable = [chunk for chunk in coverage.uncovered if coverage.holders[chunk]]
        reserved = loadable[0] if self._mode == "both" and len(loadable) > 1 else None
        self._search = PlanSearch(situation, reserved)
        self.plan = Plan({}, [[] for _ in self._tiers], [])
        self.level = levels[-1]
        self.made_at = -math.inf
        self._changes = 0
        """Chunks that changed hands since the plan was made."""
        self.invalidate()

    @property
    def chooses_level(self) -> bool:
        """Whether each load may be read in another way than the one before."""
        return len(self._levels) > 1

    @property
    def changed(self) -> bool:
        """Whether anything changed since the plan was made."""
        return self._changes > 0

    @property
    def stale(self) -> bool:
        """Whether to plan again. Far from the end that is worth doing only after so many changes.

        Where there are levels to choose from, every load is worth a thought.
        """
        if self.chooses_level:
            return self.changed
        return self._changes * 8 > len(self._coverage.uncovered)

    def changed_hands(self, chunks: int) -> None:
        """So many chunks are in other hands than when the plan was made."""
        self._changes += chunks

    def invalidate(self) -> None:
        """Something happened that the plan did not reckon with."""
        self._changes = self._coverage.chunks

    def update(self, moment: Moment) -> None:
        """Decide again which chunks to load, and how much of them."""
        self._changes, self.made_at = 0, moment.now
        if self._mode == "compute":
            return
        search, plans = self._search, dict[int, Plan]()
        chooses = self.chooses_level and search.costs_known

        def ends_s(level: int) -> float:
            size = self._levels[level].chunk_bytes
            plan = plans[level] = search.best_plan(moment, size, self.plan.assigned)
            return search.seconds(plan.assigned, moment, size) if chooses else 0.0

        level = best_level(len(self._levels) if chooses else 1, ends_s, self._target_at - moment.now)
        self.level, self.plan = self._levels[level], plans[level]
        self._move_loads()

    def _move_loads(self) -> None:
        """Give up the loads of chunks for which another tier is to be asked now."""
        assigned = self.plan.assigned
        for tier in range(len(self._tiers)):
            for load in self._flights.wanted(tier):
                if load.group is None and assigned.get(load.chunk, tier) != tier:
                    load.moved = True
                    self._flights.cancel(load)
                    self._coverage.give_back(load.chunk)

    def computable(self, first: int) -> int:
        """How many chunks from `first` on compute should take, as far as that matters for the next span."""
        coverage, assigned, end = self._coverage, self.plan.assigned, first
        start = coverage.start_of(first)
        limit = coverage.first_from(start + 2 * self._longest_tokens)
        while end < limit and end not in assigned and coverage.state[end] <= State.LOADING:
            end += 1
        unsure = assigned and any(not tier.cost.known for tier in self._tiers)
        if unsure or not self._compute.known:
            probed = coverage.chunk_at(start + max(_PROBE_TOKENS, start))
            return min(end - first, max(1, probed - first))
        return end - first

    def fills_two_spans(self, first: int, count: int) -> bool:
        """Whether so many chunks from `first` on are more than the next span and the one behind it can cover."""
        return self._tokens(first, count) >= 2 * self._longest_tokens

    def span_chunks(self, first: int, count: int) -> int:
        """Chunks of the next span, of `count` from `first` on; what two can cover is shared evenly between them."""
        tokens, longest, coverage = self._tokens(first, count), self._longest_tokens, self._coverage
        if tokens <= longest:
            return count
        start = coverage.start_of(first)
        most = coverage.chunk_at(start + longest) - first
        return most if tokens >= 2 * longest else min(most, coverage.first_from(start + -(-tokens // 2)) - first)

    def _tokens(self, first: int, count: int) -> int:
        return self._coverage.start_of(first + count) - self._coverage.start_of(first)

    def next_chunk(self, tier: int, may_queue: bool) -> int | None:
        """The chunk that `tier` should load now; if it is planned, it is taken off the plan's queue."""
        queue = self.plan.queues[tier]
        while queue:
            if self._coverage.state[queue[-1]] is not State.STORED:
                queue.pop()
            elif not may_queue and self._held_back(tier, queue[-1]):
                return None
            else:
                return queue.pop()
        if self._mode == "both" and not self._flights.any_begun:
            stored = (chunk for chunk in reversed(self._coverage.uncovered) if tier in self._coverage.holders[chunk])
            return next((chunk for chunk in stored if self._coverage.state[chunk] is State.STORED), None)
        return None

    def _held_back(self, tier: int, chunk: int) -> bool:
        """Whether loading the chunk now would only slow down loads that are due sooner."""
        if not self._tiers[tier].cost.is_shared(self.level.chunk_bytes):
            return False
        deadlines = self.plan.deadlines
        rank = bisect_right(deadlines, chunk)
        return any(bisect_right(deadlines, load.chunk) < rank for load in self._flights.wanted(tier))

    def cuts_a_span(self, chunk: int) -> bool:
        """Whether a chunk, to be computed after all, costs less to compute than the span that it would cut off."""
        if self._longest < 3 or not self._search.forecasts:
            return False
        state, assigned = self._coverage.state, self.plan.assigned
        if any(other in assigned or state[other] > State.LOADING for other in (chunk - 1, chunk, chunk + 1)):
            return False
        shape = self._compute.shape
        return shape.seconds(self._coverage.start_of(chunk), self._coverage.tokens[chunk]) < 2 * shape.fixed

    def loading_seconds(self, end: int, now: float) -> float:
        """Seconds until the tier that takes longest is through with what is to be loaded before chunk `end`."""
        return self._search.loading_seconds(self.plan.assigned, end, now, self.level.chunk_bytes)

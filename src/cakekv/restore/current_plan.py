"""The plan as it stands: who is to have which chunk, made again when enough has changed."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from cakekv.restore.costs import ComputeModel
from cakekv.restore.coverage import Coverage, State
from cakekv.restore.flights import Flights, Tier
from cakekv.restore.level_choice import Level, best_level
from cakekv.restore.outlook import Outlook, Plan

_PROBE_TOKENS = 128
"""First span while the speed of an arm is unknown: long enough to learn from, short enough to regret; then doubled."""


class CurrentPlan:
    """What compute and each tier should take next.

    Parameters
    ----------
    coverage, flights, tiers, compute, max_span_chunks, mode
        The restore's.
    levels : sequence of Level
        How chunks can be read, the best last.
    due : float
        When everything should be covered, on the driver's clock.

    Attributes
    ----------
    level : Level
        How chunks are read now.
    made_at : float
        When the plan was made, on the driver's clock.
    """

    def __init__(
        self,
        coverage: Coverage,
        flights: Flights,
        tiers: Sequence[Tier],
        compute: ComputeModel,
        levels: Sequence[Level],
        max_span_chunks: int,
        mode: str,
        due: float,
    ) -> None:
        loadable = [chunk for chunk in coverage.uncovered if coverage.holders[chunk]]
        reserved = loadable[0] if mode == "both" and len(loadable) > 1 else None
        self._outlook = Outlook(coverage, flights, tiers, compute, max_span_chunks, mode, reserved)
        self._coverage = coverage
        self._flights = flights
        self._tiers = tiers
        self._compute = compute
        self._levels = levels if due < math.inf else levels[-1:]
        self._due = due
        self.level = levels[-1]
        self.made_at = -math.inf
        self._outlook.chunk_bytes = self.level.chunk_bytes
        self._longest = max_span_chunks
        self._mode = mode
        self._plan: dict[int, int] = {}
        self._queues: list[list[int]] = [[] for _ in tiers]
        """Planned chunks per tier, the one due first at the end."""
        self._deadlines: list[int] = []
        """As in `outlook.Plan`."""
        self._changes = 0
        """Chunks that changed hands since the plan was made."""
        self.upset()

    @property
    def tiers(self) -> Mapping[int, int]:
        """The chunks to load, and from which tier."""
        return self._plan

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

    def note(self, chunks: int) -> None:
        """So many chunks changed hands."""
        self._changes += chunks

    def upset(self) -> None:
        """Something happened that the plan did not reckon with."""
        self._changes = self._coverage.chunks

    def make(self, now: float, busy_s: float, finish_s: float) -> None:
        """Decide again which chunks to load, and how much of them; parameters as in `Outlook.plan`."""
        self._changes, self.made_at = 0, now
        if self._mode == "compute":
            return
        outlook, plans = self._outlook, dict[int, Plan]()
        chooses = self.chooses_level and outlook.foresees

        def ends_s(level: int) -> float:
            outlook.chunk_bytes = self._levels[level].chunk_bytes
            plan = plans[level] = outlook.plan(now, busy_s, finish_s, self._plan)
            return outlook.seconds(plan.tiers, now, busy_s, finish_s) if chooses else 0.0

        level = best_level(len(self._levels) if chooses else 1, ends_s, self._due - now)
        self.level = self._levels[level]
        outlook.chunk_bytes = self.level.chunk_bytes
        self._plan, self._queues, self._deadlines = plans[level]
        for tier in range(len(self._tiers)):
            for load in self._flights.wanted(tier):
                if load.group is None and self._plan.get(load.chunk, tier) != tier:
                    load.moved = True
                    self._flights.cancel(load)
                    self._coverage.give_back(load.chunk)

    def computable(self, first: int) -> int:
        """How many chunks from `first` on compute should take, as far as that matters for the next span."""
        coverage, end = self._coverage, first
        limit = min(coverage.chunks, first + 2 * self._longest)
        while end < limit and end not in self._plan and coverage.state[end] <= State.LOADING:
            end += 1
        unsure = self._plan and any(not tier.cost.known for tier in self._tiers)
        if unsure or not self._compute.known:
            return min(end - first, max(1, _PROBE_TOKENS // coverage.chunk_tokens, first))
        return end - first

    def span_chunks(self, count: int) -> int:
        """Chunks of the next span, of `count` to compute; what two spans can cover is shared evenly between them."""
        longest = self._longest
        return count if count <= longest else longest if count >= 2 * longest else -(-count // 2)

    def due(self, tier: int, may_queue: bool) -> int | None:
        """The chunk that `tier` should load now; if it is planned, it is taken off the plan's queue."""
        queue = self._queues[tier]
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
        due = bisect_right(self._deadlines, chunk)
        return any(bisect_right(self._deadlines, load.chunk) < due for load in self._flights.wanted(tier))

    def cuts_a_span(self, chunk: int) -> bool:
        """Whether a chunk, to be computed after all, costs less to compute than the span that it would cut off."""
        if self._longest < 3 or not self._outlook.is_played:
            return False
        state = self._coverage.state
        if any(other in self._plan or state[other] > State.LOADING for other in (chunk - 1, chunk, chunk + 1)):
            return False
        shape = self._compute.shape
        return shape.seconds(self._coverage.start_of(chunk), self._coverage.chunk_tokens) < 2 * shape.fixed

    def loading_seconds(self, suffix: int, now: float) -> float:
        """Seconds until the tier that takes longest is through with what is planned before chunk `suffix`."""
        return self._outlook.busy_seconds(self._plan, suffix, now)

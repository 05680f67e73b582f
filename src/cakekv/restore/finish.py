"""When a restore ends with a layered finish, and when it does without one after all (see `layered`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cakekv.restore.costs import ComputeModel
from cakekv.restore.coverage import Coverage, State
from cakekv.restore.current_plan import CurrentPlan
from cakekv.restore.flights import Flights, Tier
from cakekv.restore.front import Front
from cakekv.restore.layered import LayeredFinish, cut_into_pieces
from cakekv.restore.level_choice import LayerGroups
from cakekv.restore.record import Recorder

_LAST_SPAN_SHARE = 0.5
"""If the suffix takes at least this share of the last span before it, loads are cut into pieces during that span."""
_WORTHWHILE = 0.05
"""Share of the suffix's time that loads must still take for a layered finish to begin."""
_CUT = 1.5
"""What a tier delivers in so many times the suffix's time is cut into pieces: no more can be in its way, unless it
takes longer than expected."""


class Finish:
    """Lets the suffix's layers wait for the last loads, where that pays.

    Parameters
    ----------
    coverage, flights, tiers, compute, plan, front, record
        The restore's.
    suffix : int
        First chunk behind the last stored one.
    groups : LayerGroups or None
        How a chunk is cut; None: the suffix always waits for whole chunks.

    Attributes
    ----------
    layered : LayeredFinish or None
        What is still on its way, once it has been cut into pieces.
    placing : int
        Pieces that are being placed.
    allowed : bool
        Whether the driver could have the suffix's layers wait for loads now.
    """

    def __init__(
        self,
        coverage: Coverage,
        flights: Flights,
        tiers: Sequence[Tier],
        compute: ComputeModel,
        plan: CurrentPlan,
        front: Front,
        record: Recorder,
        suffix: int,
        groups: LayerGroups | None,
    ) -> None:
        self._coverage = coverage
        self._flights = flights
        self._tiers = tiers
        self._compute = compute
        self._plan = plan
        self._front = front
        self._record = record
        self._suffix = suffix
        self._groups = groups
        self.layered: LayeredFinish | None = None
        self.placing = 0
        self.allowed = True

    def seconds(self) -> float:
        """Seconds that loads may go on while the suffix is computed; 0.0 if they may not."""
        coverage, span = self._coverage, self._front.span
        prefix_tokens = coverage.start_of(self._suffix)
        if (
            self._groups is None
            or not self.allowed
            or (span is not None and span.start >= prefix_tokens)
            or not self._compute.known
            or any(coverage.state[chunk] is State.MISSING for chunk in coverage.uncovered if chunk < self._suffix)
        ):
            return 0.0
        waits = 1 - 1 / len(self._groups.bytes)
        return self._compute.seconds(prefix_tokens, coverage.prompt_tokens - prefix_tokens) * waits

    def arm(self, now: float) -> bool:
        """Load what is left in pieces, if no more than the span now claimed is left to compute before the suffix.

        Begun while that last span runs, the first layers are there when the suffix asks for them. But compute cannot
        take over a chunk any more then, so the suffix must be worth that.
        """
        coverage, suffix_s = self._coverage, self.seconds()
        if self._groups is None or not suffix_s or any(not tier.cost.known for tier in self._tiers):
            return False
        computing, busy_s = self._front.span is not None, self._front.busy_s(now)
        if computing and suffix_s < _LAST_SPAN_SHARE * busy_s:
            return False
        waited = [chunk for chunk in coverage.uncovered if chunk < self._suffix]
        if any(chunk not in self._plan.tiers for chunk in waited):
            return False
        if self._plan.loading_seconds(self._suffix, now) < _WORTHWHILE * suffix_s + busy_s:
            return False
        if not computing and coverage.take_back_unwindowed(self._suffix):
            self._plan.upset()
            return False
        chunk_s = [tier.cost.seconds(self._plan.level.chunk_bytes) for tier in self._tiers]
        most = [_CUT * suffix_s / each_s if each_s else math.inf for each_s in chunk_s]
        self.layered = cut_into_pieces(coverage, waited, self._plan.tiers, self._groups, most)
        return True

    def disband(self) -> None:
        """Go back to whole chunks: what arrived in pieces so far was in vain."""
        assert self.layered is not None
        assert self._groups is not None
        assert not self.placing, "a piece may still be written where compute would write"
        for chunk in self.layered.incomplete:
            for group in range(len(self._groups.bytes)):
                load = self._flights.of_chunk(chunk, group)
                if load is not None:
                    self._flights.cancel(load)
            self._record.taken_back(0, self.layered.placed_bytes[chunk])
            self._coverage.give_back(chunk)
        for chunk in self.layered.not_begun:
            self._coverage.give_back(chunk)
        self.layered = None
        self._plan.upset()

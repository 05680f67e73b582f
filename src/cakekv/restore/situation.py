"""What a planner's parts look at together, and the moment for which they plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from cakekv.restore.costs import ComputeModel
from cakekv.restore.coverage import Coverage
from cakekv.restore.flights import Flights, Tier
from cakekv.restore.options import PlannerOptions


@dataclass(frozen=True)
class Situation:
    """Where a restore stands, and what its arms cost. The parts change; which they are does not.

    Parameters
    ----------
    coverage : Coverage
        Who covers what.
    flights : Flights
        The loads that were handed out.
    tiers : tuple of Tier
        Where to load from.
    compute : ComputeModel
        What spans cost.
    options : PlannerOptions
        What the restore may do.
    """

    coverage: Coverage
    flights: Flights
    tiers: tuple[Tier, ...]
    compute: ComputeModel
    options: PlannerOptions

    @cached_property
    def max_span_chunks(self) -> int:
        """Chunks of the usual length in the longest span."""
        return max(1, self.options.max_span_tokens // self.coverage.chunk_tokens)

    @cached_property
    def max_span_tokens(self) -> int:
        """Tokens in the longest span."""
        return self.max_span_chunks * self.coverage.chunk_tokens


class Moment(NamedTuple):
    """When a plan is made, and when either arm is free from then on."""

    now: float
    """Seconds on the driver's clock."""
    busy_s: float
    """Seconds until compute is done with the span it is at."""
    finish_s: float
    """Seconds that loads before the suffix may go on while the suffix is computed (see `layered_finish`)."""

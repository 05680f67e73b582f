"""What is ahead of a restore: what each uncovered chunk would cost either way, and which of them to load."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from cakekv.restore.assignment import Candidate, assign_loads, charge_spans, complete_landing, order_loads
from cakekv.restore.costs import ComputeModel
from cakekv.restore.coverage import Coverage, State
from cakekv.restore.flights import Flights, Tier
from cakekv.restore.forecast import Forecast

_MOST_PLAYED, _MOST_PLAYED_SIMPLE = 128, 24
"""With more uncovered chunks plans are not played to the end: it would take too long, and matters less. The second
figure is for one tier and no hole before the suffix."""
_TRIES = 24
"""Changes to a plan that are played at a time."""
_KEEP = 0.8
"""Factor on what is left of a load in flight: it is kept unless giving its bytes up clearly pays."""
_LAST_RESORT_S = 1e9
"""Seconds that computing a chunk is taken to cost where it is to be avoided."""


class Plan(NamedTuple):
    """Which chunks to load."""

    tiers: dict[int, int]
    """Chunk to tier; all others are to be computed."""
    queues: list[list[int]]
    """The planned chunks of each tier, the one due first at the end."""
    deadlines: list[int]
    """The chunks to be computed that have a chunk to be loaded directly before them, ascending."""


class Outlook:
    """Makes plans from the state of a restore.

    Parameters
    ----------
    coverage, flights, tiers, compute
        The restore's.
    max_span_chunks : int
        Chunks in the longest span.
    mode : str
        As in `PlannerOptions`.
    reserved : int or None
        A stored chunk that is to be computed all the same.

    Attributes
    ----------
    chunk_bytes : int
        Bytes to read for a chunk; whoever asks sets it.
    """

    def __init__(
        self,
        coverage: Coverage,
        flights: Flights,
        tiers: Sequence[Tier],
        compute: ComputeModel,
        max_span_chunks: int,
        mode: str,
        reserved: int | None,
    ) -> None:
        self._coverage = coverage
        self._flights = flights
        self._tiers = tiers
        self._compute = compute
        self._max_span_chunks = max_span_chunks
        self._mode = mode
        self._reserved = reserved
        self.chunk_bytes = 0

    def plan(self, now: float, busy_s: float, finish_s: float, before: Mapping[int, int]) -> Plan:
        """Decide which chunks to load.

        Parameters
        ----------
        now : float
            Seconds on the driver's clock.
        busy_s : float
            Seconds until compute is done with the span it is at.
        finish_s : float
            Seconds that loads may go on while the suffix is computed.
        before : mapping of int to int
            The plan so far, chunk to tier.
        """
        coverage, tiers, size = self._coverage, len(self._tiers), self.chunk_bytes
        uncharged, ends_s = self.candidates(now)
        candidates = uncharged
        lag_s = [0.0] * tiers
        if self._mode != "load":
            candidates = charge_spans(uncharged, self._compute.shape.fixed)
            lag_s = [
                0.0 if tier.cost.is_shared(size) else (tier.useful_depth(size) - 1) * tier.cost.seconds(size)
                for tier in self._tiers
            ]
        plan = assign_loads(candidates, tiers, busy_s, finish_s, ends_s, lag_s)
        if self._mode == "auto" and self._compute.known:

            def span_s(first: int, chunks: int) -> float:
                return busy_s + self._compute.seconds(coverage.start_of(first), chunks * coverage.chunk_tokens)

            complete_landing(candidates, plan, lag_s, self._max_span_chunks, span_s)
            if self.is_played:
                plan = self._played(uncharged, plan, before, now, busy_s, finish_s)
        return Plan(plan, *order_loads(candidates, plan, tiers))

    def _played(
        self,
        candidates: list[Candidate],
        plan: dict[int, int],
        before: Mapping[int, int],
        now: float,
        busy_s: float,
        finish_s: float,
    ) -> dict[int, int]:
        """The better of the new plan and the one before, with what small changes make better."""
        forecast = self._forecast(candidates, now, busy_s, finish_s)
        usable = {chunk: tier for chunk, _, load_s in candidates if (tier := before.get(chunk, -1)) in load_s}
        starts = [forecast.labels(usable), forecast.labels(plan)]
        if len(self._tiers) > 1:
            starts += [forecast.balanced(labels) for labels in starts]
        return forecast.plan(forecast.best(starts, _TRIES))

    @property
    def foresees(self) -> bool:
        """Whether what is left to do is of known speed."""
        if not self._compute.known and self._mode != "load":
            return False
        holders = {tier for chunk in self._coverage.uncovered for tier in self._coverage.holders[chunk]}
        return all(self._tiers[tier].cost.known for tier in holders)

    def seconds(self, plan: Mapping[int, int], now: float, busy_s: float, finish_s: float) -> float:
        """Seconds until everything would be covered under a plan."""
        forecast = self._forecast(self.candidates(now, as_it_is=True)[0], now, busy_s, finish_s)
        return forecast.seconds(forecast.labels(plan))

    def _forecast(self, candidates: list[Candidate], now: float, busy_s: float, finish_s: float) -> Forecast:
        compute = self._compute
        shared_s = compute.shape.fixed / self._max_span_chunks
        each_s = [self._flights.busy_seconds(tier, self.chunk_bytes, 0.0, now) for tier in range(len(self._tiers))]
        in_flight = {}
        for chunk, left_s in self._flights.remaining_seconds(0.0, now)[0].items():
            load = self._flights.of_chunk(chunk)
            if load is not None and not load.queued:
                in_flight[chunk] = (load.tier, left_s)
        return Forecast(
            [(chunk, compute_s - shared_s, load_s) for chunk, compute_s, load_s in candidates],
            compute.shape.fixed,
            self._max_span_chunks,
            each_s,
            [tier.useful_depth(self.chunk_bytes) for tier in self._tiers],
            [tier.cost.is_shared(self.chunk_bytes) for tier in self._tiers],
            in_flight,
            busy_s,
            finish_s,
        )

    @property
    def is_played(self) -> bool:
        """Whether plans are played to the end."""
        coverage = self._coverage
        if (
            self._mode != "auto"
            or not self._compute.known
            or len(coverage.uncovered) > _MOST_PLAYED
            or not all(tier.cost.known for tier in self._tiers)
        ):
            return False
        if len(self._tiers) > 1 or len(coverage.uncovered) <= _MOST_PLAYED_SIMPLE:
            return True
        states = (coverage.state[chunk] for chunk in coverage.uncovered)
        return any(behind > State.MISSING for state, behind in pairwise(states) if state is State.MISSING)

    def busy_seconds(self, plan: dict[int, int], suffix: int, now: float) -> float:
        """Seconds until the tier that takes longest is through with what is planned before chunk `suffix`."""
        busy_s = [0.0] * len(self._tiers)
        for chunk, _, load_s in self.candidates(now)[0]:
            if chunk < suffix and chunk in plan:
                busy_s[plan[chunk]] += load_s[plan[chunk]]
        return max(busy_s)

    def candidates(self, now: float, as_it_is: bool = False) -> tuple[list[Candidate], dict[int, float]]:
        """The uncovered chunks with what each would cost either way, and when those in flight should be in place.

        Where chunks are only to be loaded, computing is taken to be very dear, unless `as_it_is`.
        """
        coverage, shape = self._coverage, self._compute.shape
        tokens = coverage.chunk_tokens
        fixed = shape.fixed / self._max_span_chunks + tokens * (shape.linear + 0.5 * tokens * shape.quadratic)
        slope = tokens * shape.quadratic * tokens
        unknown_s = self._compute.seconds(0, tokens)
        pending_s = [
            self._flights.busy_seconds(tier, self.chunk_bytes, unknown_s, now) for tier in range(len(self._tiers))
        ]
        if self._mode == "load" and not as_it_is:
            fixed, slope = _LAST_RESORT_S, 0.0
            pending_s = [min(seconds, 1.0) for seconds in pending_s]
        by_holders: dict[tuple[int, ...], Mapping[int, float]] = {(): {}}
        remaining, ends_s = self._flights.remaining_seconds(unknown_s, now)
        candidates: list[Candidate] = []
        for chunk in coverage.uncovered:
            held = coverage.holders[chunk] if chunk != self._reserved else ()
            load_s = by_holders.get(held)
            if load_s is None:
                usable = (tier for tier in held if not self._flights.stalled(tier))
                load_s = by_holders[held] = {tier: pending_s[tier] for tier in usable}
            candidates.append((chunk, fixed + slope * chunk, load_s))
        is_played = self.is_played
        for chunk, left_s in remaining.items():
            load = self._flights.of_chunk(chunk)
            if load is None:  # a piece of it
                continue
            index = bisect_left(coverage.uncovered, chunk)
            _, compute_s, again = candidates[index]
            faster = {}
            if is_played or left_s > 2 * self._tiers[load.tier].cost.seconds(load.size):
                faster = {s: again_s for s, again_s in again.items() if s != load.tier and 2 * again_s < left_s}
            candidates[index] = (chunk, compute_s, {load.tier: _KEEP * left_s, **faster})
        return candidates, {chunk: _KEEP * seconds for chunk, seconds in ends_s.items()}

"""The search for a plan: what each uncovered chunk would cost either way, and which of them to load."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise

from cakekv.restore.assignment import Candidate, assign_loads, charge_spans, complete_landing
from cakekv.restore.coverage import State
from cakekv.restore.forecast import Forecast, Pace
from cakekv.restore.plan import Plan
from cakekv.restore.situation import Moment, Situation

_MOST_FORECAST, _MOST_FORECAST_SIMPLE = 128, 24
"""With more uncovered chunks nothing is forecast: it would take too long, and matters less. The second
figure is for one tier and no hole before the suffix."""
_TRIES = 24
"""Changes to a plan that are tried at a time."""
_KEEP = 0.8
"""Factor on what is left of a load in flight: it is kept unless giving its bytes up clearly pays."""
_LAST_RESORT_S = 1e9
"""Seconds that computing a chunk is taken to cost where it is to be avoided."""


class PlanSearch:
    """Looks for the best plan from where a restore stands.

    Parameters
    ----------
    situation : Situation
        The restore's.
    reserved : int or None
        A stored chunk that is to be computed all the same.
    """

    def __init__(self, situation: Situation, reserved: int | None) -> None:
        self._coverage = situation.coverage
        self._flights = situation.flights
        self._tiers = situation.tiers
        self._compute = situation.compute
        self._max_span_chunks = situation.max_span_chunks
        self._max_span_tokens = situation.max_span_tokens
        self._mode = situation.options.mode
        self._reserved = reserved

    def best_plan(self, moment: Moment, chunk_bytes: int, before: Mapping[int, int]) -> Plan:
        """Decide which chunks to load.

        Parameters
        ----------
        moment : Moment
            For which to plan.
        chunk_bytes : int
            Bytes to read for a chunk of the usual length.
        before : mapping of int to int
            Chunk to tier, by the plan so far.
        """
        coverage, tiers = self._coverage, len(self._tiers)
        uncharged, ends_s = self.candidates(moment.now, chunk_bytes)
        candidates = uncharged
        lag_s = [0.0] * tiers
        if self._mode != "load":
            candidates = charge_spans(uncharged, self._compute.shape.fixed)
            lag_s = [
                0.0
                if tier.cost.is_shared(chunk_bytes)
                else (tier.useful_depth(chunk_bytes) - 1) * tier.cost.seconds(chunk_bytes)
                for tier in self._tiers
            ]
        assigned = assign_loads(candidates, tiers, moment.busy_s, moment.finish_s, ends_s, lag_s)
        if self._mode == "auto" and self._compute.known:

            def span_s(chunks: Sequence[int]) -> float:
                tokens = sum(coverage.tokens[chunk] for chunk in chunks)
                return moment.busy_s + self._compute.seconds(coverage.start_of(chunks[0]), tokens)

            complete_landing(candidates, assigned, lag_s, self._max_span_chunks, span_s)
            if self.forecasts:
                assigned = self._improved(uncharged, assigned, before, self._forecast(uncharged, moment, chunk_bytes))
        return Plan.ordered(candidates, assigned, tiers)

    def _improved(
        self,
        candidates: list[Candidate],
        assigned: dict[int, int],
        before: Mapping[int, int],
        forecast: Forecast,
    ) -> dict[int, int]:
        """The better of the new assignment and the one before, with what small changes make better."""
        usable = {chunk: tier for chunk, _, load_s in candidates if (tier := before.get(chunk, -1)) in load_s}
        starts = [forecast.labels(usable), forecast.labels(assigned)]
        if len(self._tiers) > 1:
            starts += [forecast.balanced(labels) for labels in starts]
        return forecast.assigned(forecast.best(starts, _TRIES))

    @property
    def costs_known(self) -> bool:
        """Whether it is known how fast everything that is left goes."""
        if not self._compute.known and self._mode != "load":
            return False
        holders = {tier for chunk in self._coverage.uncovered for tier in self._coverage.holders[chunk]}
        return all(self._tiers[tier].cost.known for tier in holders)

    def seconds(self, assigned: Mapping[int, int], moment: Moment, chunk_bytes: int) -> float:
        """Seconds until everything would be covered."""
        candidates, _ = self.candidates(moment.now, chunk_bytes, as_it_is=True)
        forecast = self._forecast(candidates, moment, chunk_bytes)
        return forecast.seconds(forecast.labels(assigned))

    def _forecast(self, candidates: list[Candidate], moment: Moment, chunk_bytes: int) -> Forecast:
        compute, now = self._compute, moment.now
        shared_s = compute.shape.fixed / self._max_span_tokens
        paces = [Pace(tier.useful_depth(chunk_bytes), tier.cost.is_shared(chunk_bytes)) for tier in self._tiers]
        tokens = [self._coverage.tokens[candidate[0]] for candidate in candidates]
        in_flight = {}
        for chunk, left_s in self._flights.remaining_seconds(0.0, now)[0].items():
            load = self._flights.of_chunk(chunk)
            if load is not None and not load.queued:
                in_flight[chunk] = (load.tier, left_s)
        return Forecast(
            [
                (chunk, compute_s - shared_s * length, load_s)
                for length, (chunk, compute_s, load_s) in zip(tokens, candidates, strict=True)
            ],
            tokens,
            compute.shape.fixed,
            self._max_span_tokens,
            paces,
            in_flight,
            moment,
        )

    @property
    def forecasts(self) -> bool:
        """Whether plans are improved by forecasts of how they end."""
        coverage = self._coverage
        if (
            self._mode != "auto"
            or not self._compute.known
            or len(coverage.uncovered) > _MOST_FORECAST
            or not all(tier.cost.known for tier in self._tiers)
        ):
            return False
        if len(self._tiers) > 1 or len(coverage.uncovered) <= _MOST_FORECAST_SIMPLE:
            return True
        states = (coverage.state[chunk] for chunk in coverage.uncovered)
        return any(behind > State.MISSING for state, behind in pairwise(states) if state is State.MISSING)

    def loading_seconds(self, assigned: Mapping[int, int], end: int, now: float, chunk_bytes: int) -> float:
        """Seconds until the tier that takes longest is through with what is to be loaded before chunk `end`."""
        busy_s = [0.0] * len(self._tiers)
        for chunk, _, load_s in self.candidates(now, chunk_bytes)[0]:
            if chunk < end and chunk in assigned:
                busy_s[assigned[chunk]] += load_s[assigned[chunk]]
        return max(busy_s)

    def candidates(
        self, now: float, chunk_bytes: int, as_it_is: bool = False
    ) -> tuple[list[Candidate], dict[int, float]]:
        """The uncovered chunks with what each would cost either way, and when those in flight should be in place.

        Where chunks are only to be loaded, computing is taken to be very dear, unless `as_it_is`.
        """
        coverage, shape = self._coverage, self._compute.shape
        usual = coverage.chunk_tokens
        linear, quadratic = shape.fixed / self._max_span_tokens + shape.linear, shape.quadratic
        unknown_s = self._compute.seconds(0, usual)
        pending_s = [self._flights.busy_seconds(tier, chunk_bytes, unknown_s, now) for tier in range(len(self._tiers))]
        if self._mode == "load" and not as_it_is:
            linear, quadratic = _LAST_RESORT_S / usual, 0.0
            pending_s = [min(seconds, 1.0) for seconds in pending_s]
        fixed, slope = usual * (linear + 0.5 * usual * quadratic), usual * quadratic
        by_holders: dict[tuple[int, ...], Mapping[int, float]] = {(): {}}
        """By the tiers that hold a chunk and, behind them, what it lacks of the usual length, if it does."""
        starts, lengths, holders, reserved = coverage.starts, coverage.tokens, coverage.holders, self._reserved
        remaining, ends_s = self._flights.remaining_seconds(unknown_s, now)
        candidates: list[Candidate] = []
        for chunk in coverage.uncovered:
            kind = held = holders[chunk] if chunk != reserved else ()
            length = lengths[chunk]
            if length == usual:
                compute_s = fixed + slope * starts[chunk]
            else:
                compute_s = length * (linear + quadratic * (starts[chunk] + 0.5 * length))
                kind = held and (*held, length - usual)
            load_s = by_holders.get(kind)
            if load_s is None:
                usable = (tier for tier in held if not self._flights.stalled(tier))
                load_s = by_holders[kind] = {tier: pending_s[tier] * length / usual for tier in usable}
            candidates.append((chunk, compute_s, load_s))
        forecasts = self.forecasts
        for chunk, left_s in remaining.items():
            load = self._flights.of_chunk(chunk)
            if load is None:  # a piece of it
                continue
            index = bisect_left(coverage.uncovered, chunk)
            _, compute_s, again = candidates[index]
            faster = {}
            if forecasts or left_s > 2 * self._tiers[load.tier].cost.seconds(load.size):
                faster = {s: again_s for s, again_s in again.items() if s != load.tier and 2 * again_s < left_s}
            candidates[index] = (chunk, compute_s, {load.tier: _KEEP * left_s, **faster})
        return candidates, {chunk: _KEEP * seconds for chunk, seconds in ends_s.items()}

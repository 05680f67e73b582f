"""What is ahead of a restore: what each uncovered chunk would cost either way, and which of them to load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cakekv.restore.costs import ComputeCost
from cakekv.restore.coverage import Coverage, State
from cakekv.restore.flights import Flights, Source
from cakekv.restore.plan import Candidate, assign_loads, charge_spans, complete_landing, order_loads

_LAST_RESORT_S = 1e9
"""Seconds that computing a chunk is taken to cost where it is to be avoided."""


class Plan(NamedTuple):
    """Which chunks to load."""

    sources: dict[int, int]
    """Chunk to source; all others are to be computed."""
    queues: list[list[int]]
    """The planned chunks of each source that are not in flight, the one due first at the end."""


class Outlook:
    """Makes plans from the state of a restore.

    Parameters
    ----------
    coverage, flights, sources, compute
        The restore's.
    chunk_bytes : int
        Bytes to read for a chunk.
    max_span_chunks : int
        Chunks in the longest span.
    mode : str
        As in `Restore`.
    reserved : int or None
        A stored chunk that is to be computed all the same.
    """

    def __init__(
        self,
        coverage: Coverage,
        flights: Flights,
        sources: Sequence[Source],
        compute: ComputeCost,
        chunk_bytes: int,
        max_span_chunks: int,
        mode: str,
        reserved: int | None,
    ) -> None:
        self._coverage = coverage
        self._flights = flights
        self._sources = sources
        self._compute = compute
        self._chunk_bytes = chunk_bytes
        self._max_span_chunks = max_span_chunks
        self._mode = mode
        self._reserved = reserved

    def plan(self, now: float, busy_s: float, finish_s: float) -> Plan:
        """Decide which chunks to load.

        Parameters
        ----------
        now : float
            Seconds on the driver's clock.
        busy_s : float
            Seconds until compute is done with the span it is at.
        finish_s : float
            Seconds that loads may go on while the suffix is computed.
        """
        coverage, sources = self._coverage, len(self._sources)
        candidates, ends_s = self.candidates(now)
        lag_s = [0.0] * sources
        if self._mode != "load":
            candidates = charge_spans(candidates, self._compute.shape.fixed)
            lag_s = [(source.depth - 1) * source.cost.seconds(self._chunk_bytes) for source in self._sources]
        plan = assign_loads(candidates, sources, busy_s, finish_s, ends_s, lag_s)
        if self._mode == "auto" and self._compute.known:

            def span_s(first: int, chunks: int) -> float:
                return busy_s + self._compute.seconds(coverage.start_of(first), chunks * coverage.chunk_tokens)

            complete_landing(candidates, plan, lag_s, self._max_span_chunks, span_s)
        queues = order_loads(candidates, plan, sources, lambda chunk: coverage.state[chunk] is State.MISSING)
        return Plan(plan, queues)

    def busy_seconds(self, plan: dict[int, int], suffix: int, now: float) -> float:
        """Seconds until the source that takes longest is through with what is planned before chunk `suffix`."""
        busy_s = [0.0] * len(self._sources)
        for chunk, _, load_s in self.candidates(now)[0]:
            if chunk < suffix and chunk in plan:
                busy_s[plan[chunk]] += load_s[plan[chunk]]
        return max(busy_s)

    def candidates(self, now: float) -> tuple[list[Candidate], dict[int, float]]:
        """The uncovered chunks with what each would cost either way, and when those in flight should be in place."""
        coverage, shape = self._coverage, self._compute.shape
        tokens = coverage.chunk_tokens
        fixed = shape.fixed / self._max_span_chunks + tokens * (shape.linear + 0.5 * tokens * shape.quadratic)
        slope = tokens * shape.quadratic * tokens
        unknown_s = self._compute.seconds(0, tokens)
        pending_s = [
            self._flights.busy_seconds(source, self._chunk_bytes, unknown_s, now)
            for source in range(len(self._sources))
        ]
        if self._mode == "load":
            fixed, slope = _LAST_RESORT_S, 0.0
            pending_s = [min(seconds, 1.0) for seconds in pending_s]
        by_holders: dict[tuple[int, ...], dict[int, float]] = {(): {}}
        remaining, ends_s = self._flights.remaining_seconds(unknown_s, now)
        candidates: list[Candidate] = []
        for chunk in coverage.uncovered:
            if chunk in remaining and (load := self._flights.of_chunk(chunk)):
                load_s = {load.source: remaining[chunk]}
            else:
                held = coverage.holders[chunk] if chunk != self._reserved else ()
                if held not in by_holders:
                    usable = (source for source in held if not self._flights.stalled(source))
                    by_holders[held] = {source: pending_s[source] for source in usable}
                load_s = by_holders[held]
            candidates.append((chunk, fixed + slope * chunk, load_s))
        return candidates, ends_s

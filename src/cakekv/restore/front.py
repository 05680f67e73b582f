"""Compute's front: how far it has come, and the span that it is at."""

from __future__ import annotations

from typing import NamedTuple

from cakekv.restore.situation import Situation


class Span(NamedTuple):
    """Compute these positions next."""

    start: int
    tokens: int
    layered: bool = False
    """Whether each layer must wait for its part of the prefix."""


class Front:
    """Where compute stands.

    Parameters
    ----------
    situation : Situation
        The restore's.
    covered_tokens : int
        Positions at the front that are in the cache already.

    Attributes
    ----------
    span : Span or None
        What was claimed and is being computed.
    inside : int
        How far compute has come in the chunk at the front.
    """

    def __init__(self, situation: Situation, covered_tokens: int) -> None:
        self._coverage = coverage = situation.coverage
        self._flights = situation.flights
        self._compute = situation.compute
        self.span: Span | None = None
        self._began = 0.0
        covered_chunks = coverage.chunk_at(covered_tokens)
        self.inside = covered_tokens - coverage.start_of(covered_chunks)
        coverage.computing(0, covered_chunks + (self.inside > 0))
        coverage.computed(0, covered_chunks)

    @property
    def position(self) -> int:
        """The first position that is not covered, or to the end of the span that was claimed."""
        if self.span is not None:
            return self.span.start + self.span.tokens
        return self._coverage.start_of(self._coverage.front) + self.inside

    def claim(self, first: int, count: int) -> None:
        """Take these chunks, also from loads that are in flight."""
        for chunk in range(first, first + count):
            load = self._flights.of_chunk(chunk)
            if load is not None:
                self._flights.cancel(load)
        self._coverage.computing(first, first + count)

    def begin(self, span: Span, now: float) -> Span:
        """The span, whose chunks were claimed, is being computed from now on."""
        self.span, self._began = span, now
        return span

    def begin_chunks(self, first: int, count: int, now: float, layered: bool = False) -> Span:
        """Claim whole chunks and begin with them."""
        self.claim(first, count)
        start = self._coverage.start_of(first)
        return self.begin(Span(start, self._coverage.start_of(first + count) - start, layered), now)

    def covered(self, span: Span) -> float:
        """The span is in the cache. Returns when it began."""
        began = self._end(span)
        first, end = self._chunks_of(span)
        self._coverage.computed(first, end)
        self.inside = span.start + span.tokens - self._coverage.start_of(end)
        return began

    def gave_up(self, span: Span) -> float:
        """The span's positions are uncovered again. Returns when it began."""
        began = self._end(span)
        self._coverage.release(*self._chunks_of(span))
        return began

    def busy_s(self, now: float) -> float:
        """Seconds until compute is through with the chunks it has claimed."""
        busy_s = 0.0
        if self.span is not None:
            busy_s = max(0.0, self._began + self._compute.seconds(self.span.start, self.span.tokens) - now)
        position = self.position
        rest = self._coverage.start_of(self._coverage.first_from(position)) - position
        return busy_s + self._compute.seconds(position, rest) if rest else busy_s

    def _end(self, span: Span) -> float:
        assert self.span is not None, "no span was claimed"
        assert self.span == span, f"{span} was not claimed"
        self.span = None
        return self._began

    def _chunks_of(self, span: Span) -> tuple[int, int]:
        """First chunk of the span, and the one behind the last that it completes."""
        chunk_at = self._coverage.chunk_at
        return chunk_at(span.start), chunk_at(span.start + span.tokens)

"""The planner for a driver that shares out steps of its own, such as vLLM's scheduler.

It asks `computable_tokens` instead of `next_compute`, and claims with `take` what it has room for: a chunk belongs to
compute as soon as a span enters it. Such a driver learns about loads only between two steps, so it lets some queue
`ahead` at the tier and reports with `begun` when they begin. For a layered span it asks with `layered_tokens`, claims
it with `take_layered`, and says with `layered_allowed` whether it could.
"""

from __future__ import annotations

from cakekv.restore.flights import Load
from cakekv.restore.layered_finish import Phase
from cakekv.restore.planner import Planner, Span


class StepwisePlanner(Planner):
    """A `Planner` whose spans begin and end wherever its driver's steps do."""

    def computable_tokens(self, now: float) -> int:
        """How many tokens compute should take next; 0 while it should wait for a load, and at the end."""
        assert self._front.span is None, "the span before was not reported as computed"
        self.check_late(now)
        if self._finish.complete:
            self._finish.end()
        elif self._finish.phase is Phase.BROKEN and not self.placing:
            self._finish.disband()
        elif self._finish.phase is not Phase.WHOLE:
            return 0
        first = self.coverage.front + (self._front.inside > 0)
        count = self._computable(first, now)
        if not count and not self._front.inside:
            self._finish.begin(now)
        return self.coverage.start_of(first + self._schedule.span_chunks(first, count)) - self.position

    def take(self, tokens: int, now: float) -> Span:
        """Claim the next `tokens` tokens, of those that are computable, wherever in a chunk that ends."""
        start = self.position
        first = self.coverage.front + (self._front.inside > 0)
        self._front.claim(first, self.coverage.first_from(start + tokens) - first)
        span = self._front.begin(Span(start, tokens), now)
        if self.position == self.coverage.start_of(self.coverage.chunk_at(self.position)):
            self._finish.begin(now)
        return span

    @property
    def layered_tokens(self) -> int:
        """How many tokens `take_layered` would claim; 0 if it may not be called now."""
        if self._finish.phase is not Phase.IN_PIECES or self._front.span is not None:
            return 0
        return self.prompt_tokens - self.prefix_tokens

    def take_layered(self, now: float) -> Span:
        """Claim the suffix although chunks before it still arrive."""
        assert self.layered_tokens
        return self._begin_suffix(now)

    def tiers_left(self) -> set[int]:
        """The tiers that can deliver chunks which are not covered, and do not hang."""
        return {tier for tier in self.coverage.tiers_left() if not self._flights.stalled(tier)}

    @property
    def in_pieces(self) -> bool:
        """Whether what is left before the suffix is loaded in pieces."""
        return self._finish.phase is not Phase.WHOLE

    @property
    def awaits_pieces(self) -> bool:
        """Whether anything that a layered span attends to is still to come."""
        return self.in_pieces and not self._finish.complete

    def begun(self, load: Load, now: float) -> None:
        """The tier began with a load that had queued."""
        load.began = now
        self._flights.started(load)

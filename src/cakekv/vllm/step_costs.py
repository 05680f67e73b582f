"""What a step of vLLM's costs, and how much of it goes into one restore.

A step computes pieces of several requests at once. Attention aside, its time depends on the tokens alone, so a step is
one span of a `ComputeCost` whose attention equals that of all pieces together. What is learned is the machine's cost;
a restore that shares its steps with others sees it divided by its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cakekv.restore.costs import ComputeCost, ComputeShape

_LEAST_TOKENS = 16
"""Steps below are decodes, which cost by the weights read and not by the token."""
_LEAST_SHARE = 0.02
_HALF_LIFE_S = 0.5
"""Seconds of steps after which a restore's share has come half-way to what it gets now."""


class Piece(NamedTuple):
    """Tokens of one request in a step."""

    start: int
    tokens: int


def equivalent_span(pieces: Sequence[Piece]) -> Piece:
    """The span with as many tokens, and as many pairs of tokens that attend, as all pieces together.

    Its start may be negative: that of several pieces at the beginnings of their prompts.
    """
    tokens = sum(piece.tokens for piece in pieces)
    if not tokens:
        return Piece(0, 0)
    attended = sum(piece.tokens * (piece.start + 0.5 * piece.tokens) for piece in pieces)
    return Piece(round(attended / tokens - 0.5 * tokens), tokens)


class StepCosts:
    """Learns from every step what prefill costs.

    Parameters
    ----------
    cost : ComputeCost or None
        What is known already.
    """

    def __init__(self, cost: ComputeCost | None = None) -> None:
        self.cost = cost or ComputeCost()

    def observe(self, pieces: Sequence[Piece], seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        span = equivalent_span(pieces)
        if span.tokens >= _LEAST_TOKENS:
            self.cost.observe(span.start, span.tokens, seconds)

    def seconds(self, pieces: Sequence[Piece]) -> float:
        """Expected seconds of a step; 0.0 for an empty one."""
        span = equivalent_span(pieces)
        return self.cost.seconds(span.start, span.tokens) if span.tokens else 0.0


class SharedCost(ComputeCost):
    """What compute costs for one restore among other requests: the machine's cost over the share that it gets.

    Parameters
    ----------
    costs : StepCosts
        The machine's.
    share : float
        What restores have got lately.

    Attributes
    ----------
    share : float
        Of the steps, as they have been lately: what the restore gets done, by what it would alone.
    """

    def __init__(self, costs: StepCosts, share: float = 1.0) -> None:
        self._costs = costs
        self.share = max(_LEAST_SHARE, share)

    @property
    def known(self) -> bool:
        """Whether any step was measured."""
        return self._costs.cost.known

    @property
    def shape(self) -> ComputeShape:
        """The current estimate."""
        shape, share = self._costs.cost.shape, self.share
        return ComputeShape(shape.fixed / share, shape.linear / share, shape.quadratic / share)

    def seconds(self, start: int, tokens: int) -> float:
        """Expected seconds until a span is computed."""
        return self._costs.cost.seconds(start, tokens) / self.share

    def observe(self, start: int, tokens: int, seconds: float) -> None:
        """Nothing: steps are observed as a whole."""

    def shared(self, wanted: Piece, tokens: int, step_s: float) -> None:
        """Of a step that takes `step_s` seconds, the restore got `tokens` of those that it `wanted`."""
        if step_s <= 0 or not wanted.tokens:
            return
        alone_s = self._costs.seconds([wanted]) * tokens / wanted.tokens if tokens else 0.0
        self._approach(min(1.0, alone_s / step_s), step_s)

    def spared(self, left: Piece, step_s: float) -> None:
        """The restore wanted nothing of a step that takes `step_s` seconds, and these tokens were left of it.

        One that was passed over for a while thinks that computing does not pay, and so would never find out that it
        does again.
        """
        own_s = self._costs.seconds([left])
        if own_s > 0 and (share := own_s / (own_s + step_s)) > self.share:
            self._approach(share, own_s + step_s)

    def _approach(self, share: float, seconds: float) -> None:
        weight = 1 - 0.5 ** (seconds / _HALF_LIFE_S)
        self.share = max(_LEAST_SHARE, self.share + weight * (share - self.share))

"""What a step of vLLM's costs, learned from how long steps take, and how much of it goes into one restore.

A step computes spans of several requests at once. Attention aside, its time depends on the tokens alone, so a step is
taken for one span whose attention equals that of all its spans together. What is learned is the machine's cost; a
restore that shares its steps with others sees it divided by its share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import NamedTuple

from cakekv.restore.costs import ComputeCost, ComputeModel, ComputeShape
from cakekv.restore.planner import Span

_LEAST_TOKENS = 16
"""Steps below are decodes, which cost by the weights read and not by the token."""
_LEAST_SHARE = 0.02
_HALF_LIFE_S = 0.5
"""Seconds of steps after which a restore's share has come half-way to what it gets now."""
_STANDSTILL_S = 1.0
"""A longer time between two steps with none on its way means that the engine was paused."""


def equivalent_span(spans: Sequence[Span]) -> Span:
    """The span with as many tokens, and as many pairs of tokens that attend, as all these together.

    Its start may be negative: that of several spans at the beginnings of their prompts.
    """
    tokens = sum(span.tokens for span in spans)
    if not tokens:
        return Span(0, 0)
    attended = sum(span.tokens * (span.start + 0.5 * span.tokens) for span in spans)
    return Span(round(attended / tokens - 0.5 * tokens), tokens)


class StepCosts:
    """Learns from every step what prefill costs."""

    def __init__(self) -> None:
        self.cost = ComputeCost()

    def observe(self, spans: Sequence[Span], seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        span = equivalent_span(spans)
        if span.tokens >= _LEAST_TOKENS:
            self.cost.observe(span.start, span.tokens, seconds)

    def seconds(self, spans: Sequence[Span]) -> float:
        """Expected seconds of a step; 0.0 for an empty one."""
        span = equivalent_span(spans)
        return self.cost.seconds(span.start, span.tokens) if span.tokens else 0.0


class _Step(NamedTuple):
    """A step that vLLM was given."""

    sequence: int
    began: float
    spans: list[Span]
    """All that it computes, if prefills are among it."""
    computes: bool


class StepClock:
    """Times the steps, of which several may be on their way.

    Parameters
    ----------
    costs : StepCosts
        Learns from those with prefills.
    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._steps: deque[_Step] = deque()
        self._last_ended = 0.0
        self.decode_s = 0.0
        """Seconds of a step without prefills, as they have been lately; 0.0: there was none."""

    def begin(self, sequence: int, spans: list[Span], computes: bool) -> float:
        """A step begins; no spans if it is without prefills. Returns how many seconds it should take."""
        self._steps.append(_Step(sequence, monotonic(), spans, computes))
        prefill_s = self._costs.seconds(spans) if self._costs.cost.known else 0.0
        return max(prefill_s, self.decode_s) if computes else 0.0

    def end(self, sequence: int, waited_s: float = 0.0) -> None:
        """The step's output is there; for `waited_s` seconds it waited for loads."""
        now = monotonic()
        step = self._steps.popleft()
        assert step.sequence == sequence, "vLLM's steps end in another order than they began"
        # A step that was scheduled ahead began in truth when the one before ended.
        seconds = now - max(step.began, self._last_ended) - waited_s
        if step.spans:
            self._costs.observe(step.spans, seconds)
        elif step.computes:
            self.decode_s += (0.2 if self.decode_s else 1.0) * (seconds - self.decode_s)
        self._last_ended = now

    def tokens_within(self, seconds: float, position: int) -> int:
        """How many tokens can be computed at a position if a step may take that much longer for them."""
        shape = self._costs.cost.shape
        return int(seconds / (shape.linear + shape.quadratic * position))

    def standstill_s(self) -> float:
        """For how long the engine has been paused, if it was."""
        idle_s = monotonic() - self._last_ended
        return idle_s if not self._steps and self._last_ended and idle_s > _STANDSTILL_S else 0.0


class SharedCost(ComputeModel):
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

    def shared(self, wanted: Span, tokens: int, step_s: float) -> None:
        """Of a step that takes `step_s` seconds, the restore got `tokens` of those that it `wanted`."""
        if step_s <= 0 or not wanted.tokens:
            return
        alone_s = self._costs.seconds([wanted]) * tokens / wanted.tokens if tokens else 0.0
        self._approach(min(1.0, alone_s / step_s), step_s)

    def spared(self, left: Span, step_s: float) -> None:
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

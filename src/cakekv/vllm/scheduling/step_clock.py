"""How long vLLM's steps take, and from that what prefill costs."""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import NamedTuple

from cakekv.vllm.scheduling.step_costs import Piece, StepCosts

_STANDSTILL_S = 1.0
"""A longer time between two steps with none on its way means that the engine was paused."""


class _Step(NamedTuple):
    """A step that vLLM was given."""

    sequence: int
    began: float
    pieces: list[Piece]
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

    def begin(self, sequence: int, pieces: list[Piece], computes: bool) -> float:
        """A step begins; no pieces if it is without prefills. Returns how many seconds it should take."""
        self._steps.append(_Step(sequence, monotonic(), pieces, computes))
        prefill_s = self._costs.seconds(pieces) if self._costs.cost.known else 0.0
        return max(prefill_s, self.decode_s) if computes else 0.0

    def end(self, sequence: int, waited_s: float = 0.0) -> None:
        """The step's output is there; for `waited_s` seconds it waited for loads."""
        now = monotonic()
        step = self._steps.popleft()
        assert step.sequence == sequence, "vLLM's steps end in another order than they began"
        # A step that was scheduled ahead began in truth when the one before ended.
        seconds = now - max(step.began, self._last_ended) - waited_s
        if step.pieces:
            self._costs.observe(step.pieces, seconds)
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

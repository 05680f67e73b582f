"""The exact optimum in whole chunks and steps: dynamic programming over what a clairvoyant planner could do.

Like `cakekv.simulate.optimum`, but nothing can be cut finer than a chunk, and every step costs its fixed time however
few tokens it has. With many small holes that is what the time goes to: a step for each, or computing what lies between
two holes to spare a step. What remains relaxed: bytes flow at the tiers' summed bandwidth, without latency, and any
tier can deliver any chunk.

For a given end T the prompt is walked from the back. The state is how many chunks of the current step are filled (0:
the chunk behind is loaded) and how many chunks may still be loaded before the deadlines passed so far; its value is
the most work that the machine can still do before what was passed. Computing a chunk takes its time off that, and a
step's fixed time when it opens one; loading one takes a chunk off the room, which is first cut to what the tiers can
deliver until compute reaches the run of computed chunks behind it. T can be reached if any state at the front has work
left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cakekv.simulate.hardware import ComputeCurve
from cakekv.simulate.optimum import bisected
from cakekv.simulate.rate import STEADY, Rate

_NEVER = -np.inf


def best_seconds(
    curve: ComputeCurve,
    prompt_tokens: int,
    chunk_tokens: int,
    stored: Sequence[bool],
    token_bytes: float,
    bandwidth: Rate,
    effort: Rate = STEADY,
    *,
    between: tuple[float, float],
    precision: float = 2e-3,
) -> float:
    """The least time that any schedule of chunks and steps takes.

    Parameters
    ----------
    curve : ComputeCurve
        What prefill takes while the machine works at a rate of 1.
    prompt_tokens, chunk_tokens : int
        The prompt and the unit of loading.
    stored : sequence of bool
        Per chunk; the last one is computed in any case.
    token_bytes : float
        Bytes to load per token.
    bandwidth, effort : Rate
        The tiers' summed bytes per second, and the rate at which the machine works.
    between : tuple of float
        A lower bound, and a time that can be reached, in seconds.
    precision : float
        Relative width of the last bracket; its lower end is returned.

    Returns
    -------
    float
        Seconds, a lower bound too low by `precision` at most.
    """
    chunks = -(-prompt_tokens // chunk_tokens)
    span_chunks = max(1, curve.step_tokens // chunk_tokens)
    shape = curve.shape(span_chunks * chunk_tokens)
    starts = [chunk * chunk_tokens for chunk in range(chunks)]
    ends = [*starts[1:], prompt_tokens]
    work = [shape.seconds(start, end - start) - shape.fixed for start, end in zip(starts, ends, strict=True)]
    held = [chunk < len(stored) and stored[chunk] for chunk in range(chunks - 1)] + [False]
    walk = _Walk(work, held, shape.fixed, span_chunks, token_bytes * chunk_tokens, bandwidth, effort)
    return bisected(between, precision, walk.reaches_front)


@dataclass(frozen=True)
class _Walk:
    """A walk through the prompt from the back.

    Parameters
    ----------
    work : sequence of float
        Per chunk, what computing it takes besides a step's fixed time.
    held : sequence of bool
        Per chunk, whether a tier can deliver it.
    fixed_s : float
        A step's fixed time.
    span_chunks : int
        Chunks in the longest step.
    chunk_bytes : float
        Bytes to load for a chunk.
    bandwidth, effort : Rate
        As for `best_seconds`.
    """

    work: Sequence[float]
    held: Sequence[bool]
    fixed_s: float
    span_chunks: int
    chunk_bytes: float
    bandwidth: Rate
    effort: Rate

    def reaches_front(self, seconds: float) -> bool:
        """Whether work is left at the front if everything is to end after so many seconds."""
        most = sum(self.held)
        left = np.full((self.span_chunks + 1, most + 1), _NEVER)
        left[0, most] = self.effort.done(seconds)
        rooms = np.broadcast_to(np.arange(most + 1), (self.span_chunks, most + 1))
        for chunk in reversed(range(len(self.work))):
            computed = np.full_like(left, _NEVER)
            computed[2:] = left[1:-1]
            computed[1] = np.maximum(left[0], left[-1]) - self.fixed_s
            computed[1:] -= self.work[chunk]
            if self.held[chunk]:
                computed[0, :-1] = left[0, 1:]
                open_step = left[1:]
                alive = open_step >= 0
                remaining = open_step[alive]
                deliverable = np.floor(self._deliverable(remaining) / self.chunk_bytes + 1e-9)
                room = np.minimum(rooms[alive], deliverable).astype(np.int64) - 1
                np.maximum.at(computed[0], room[room >= 0], remaining[room >= 0])
            computed[computed < 0] = _NEVER
            left = computed
        return bool((left >= 0).any())

    def _deliverable(self, work: NDArray[np.float64]) -> NDArray[np.float64]:
        """Bytes the tiers deliver until the machine has done that much work."""
        return self.bandwidth.done_many(self.effort.when_many(work))

"""The least time one restore can take: what a planner that knew all costs and the future could not beat.

The relaxation: tokens are loaded and computed in pieces of any size, steps are always full (a step's fixed cost is
spread over its tokens), bytes flow at the tiers' summed bandwidth without latency, and any tier can deliver any chunk.
Each of these only helps, so no schedule of whole chunks and steps is faster: a lower bound. With every chunk in every
tier it is the exact optimum of the continuous problem:

Let the prompt be runs of stored positions, each followed by a hole (the suffix is the last). Compute goes in order and
must find everything before a hole covered; so the loads before hole i must be done when compute begins it, and the
latest that compute may begin it, if it is to end at T, is T minus the compute time of everything from there on. Of two
equal pieces to load, the later one is the better choice: computing it costs more, and it is bound by fewer of these
deadlines. So for a given T a pass from the back that loads as much as the deadlines behind it admit leaves the least
to compute, and T can be reached if and only if that fits. T follows by bisection. With rates that change over time
(known in advance) "bytes until" and "work until" are their integrals; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from cakekv.restore.coverage import Coverage
from cakekv.simulate.hardware import ComputeCurve
from cakekv.simulate.rate import STEADY, Rate


class Run(NamedTuple):
    """Positions from `start` to `end` that are all stored, or all not."""

    start: int
    end: int
    stored: bool


def runs_of(prompt_tokens: int, chunk_tokens: int, stored: Sequence[bool]) -> list[Run]:
    """The runs of a prompt of which chunk i is stored if `stored[i]`; its last token is always computed."""
    coverage = Coverage(prompt_tokens, chunk_tokens, [(0,) if held else () for held in stored], None)
    runs: list[Run] = []
    for chunk, holders in enumerate(coverage.holders):
        start, end, held = coverage.start_of(chunk), coverage.start_of(chunk + 1), bool(holders)
        if runs and runs[-1].stored == held:
            start = runs.pop().start
        runs.append(Run(start, end, held))
    return runs


def least_seconds(
    curve: ComputeCurve,
    runs: Sequence[Run],
    token_bytes: float,
    bandwidth: Rate,
    effort: Rate = STEADY,
) -> float:
    """The bound.

    Parameters
    ----------
    curve : ComputeCurve
        What prefill takes while the machine works at a rate of 1.
    runs : sequence of Run
        The prompt; the last run is not stored.
    token_bytes : float
        Bytes to load per token.
    bandwidth : Rate
        The tiers' summed bandwidth over time in bytes per second.
    effort : Rate
        The rate at which the machine works over time.

    Returns
    -------
    float
        Seconds.
    """
    most_s = effort.when(curve.amortised(0, runs[-1].end))
    return bisected(
        (0.0, most_s), 1e-6, lambda seconds: _reachable(seconds, curve, runs, token_bytes, bandwidth, effort)
    )


def bisected(between: tuple[float, float], precision: float, reachable: Callable[[float], bool]) -> float:
    """The least time that can be reached, too low by at most `precision` of itself.

    Parameters
    ----------
    between : tuple of float
        A lower bound, and a time that can be reached, in seconds.
    precision : float
        Relative width of the last bracket; its lower end is returned.
    reachable : callable
        Whether a restore can end after so many seconds.
    """
    low, high = between
    while high - low > precision * high:
        middle = (low + high) / 2
        if reachable(middle):
            high = middle
        else:
            low = middle
    return low


def _reachable(
    seconds: float,
    curve: ComputeCurve,
    runs: Sequence[Run],
    token_bytes: float,
    bandwidth: Rate,
    effort: Rate,
) -> bool:
    left = effort.done(seconds)
    """Work the machine can still do before what has been passed over, from the back."""
    room = float("inf")
    """Bytes that can be loaded before the deadlines of what has been passed over."""
    for start, end, stored in reversed(runs):
        if stored:
            loaded = min(float(end - start), room / token_bytes)
            room -= loaded * token_bytes
            left -= curve.amortised(start, end - loaded)
        else:
            left -= curve.amortised(start, end)
            if left >= 0:
                begins = effort.when(left)
                room = min(room, bandwidth.done(begins))
        if left < 0:
            return False
    return True

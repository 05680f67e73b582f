"""How fast the paper's machines compute and load, read off its compute-only and I/O-only figures alone.

Of a cell's two speed-ups only their quotient is used: compute-only time over I/O-only time, from which Cake's own time
has cancelled. I/O-only takes bytes / bandwidth plus an overhead. The quotients of one machine at several bandwidths
reveal the overhead (with none, time to compute would seem to fall as bandwidth rises): it grows with the tokens,
differs between models, and depends neither on the hardware nor on the bytes, so it is one line `base + per_token * n`,
fitted to Table 4, times one factor per model. What grows with the tokens is the loader's; the base is part of every
request, however its cache comes about. Compute-only time then is the quotient times I/O-only time, and what is left of
it without the base is fitted per hardware, share and model as `linear * n + quadratic * n**2 / 2` over Table 4's
lengths. Where only 16k tokens were measured, the curvature comes from the same hardware's other model (Table 5) or
from the chunk times of Fig. 2 (H100), in proportion to the model's arithmetic.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from cakekv.errors import BadInput
from cakekv.restore.costs import ComputeShape
from cakekv.simulate.paper_tables import FIGURE_2_CHUNK_S, FIGURE_2_LAST_CHUNK, MODELS, Cell, ModelShape, cells

STEP_TOKENS = 512
"""Token budget of an engine step in the paper's tables."""
SHORT_STEP = 0.2
"""Part of an unshared full step's time (attention aside) that a step of one token takes, too: reading the weights.

The tables have no short steps; this is the A100's time to read a 7B model's weights over its 40 ms for 512 tokens.
"""
HARDWARE = ("A100", "2xA100", "H100")
SHARES = (0.125, 0.5, 0.875, 1.0)
_LARGE = "LongAlpaca-13B"


@dataclass(frozen=True)
class ComputeCurve:
    """What prefill takes on one machine at one share of it.

    Parameters
    ----------
    linear : float
        Seconds per token in full steps.
    quadratic : float
        Seconds per token and position it attends to.
    step_tokens : int
        Tokens of this request in a full step: the share's part of the engine's token budget.
    fixed_part : float
        Part of a full step's time, attention aside, that the shortest step takes, too.
    """

    linear: float
    quadratic: float
    step_tokens: int
    fixed_part: float

    def shape(self, span_tokens: int) -> ComputeShape:
        """The planner's cost model that is right for spans that take as many steps as one of `span_tokens`."""
        fixed = self.fixed_part * self.linear * self.step_tokens * self._steps(span_tokens)
        return ComputeShape(fixed, (1 - self.fixed_part) * self.linear, self.quadratic)

    def seconds(self, start: int, tokens: int) -> float:
        """Seconds of a span, in as many steps as it takes."""
        return self.shape(tokens).seconds(start, tokens)

    def _steps(self, tokens: int) -> int:
        return -(-tokens // self.step_tokens)

    def amortised(self, start: float, end: float) -> float:
        """Seconds from position `start` to `end` in full steps: the least it can take."""
        return (end - start) * (self.linear + self.quadratic * (start + end) / 2)


@dataclass(frozen=True)
class Overhead:
    """What I/O-only takes beside bytes / bandwidth."""

    request_s: float
    """Seconds of every request, also of one that is computed."""
    token_s: float
    """Seconds per token loaded."""


def io_only_s(cell: Cell) -> float:
    """Seconds to load everything."""
    overhead = overhead_of(cell.model)
    return _wire_s(cell) + overhead.request_s + overhead.token_s * cell.tokens


def _wire_s(cell: Cell) -> float:
    return MODELS[cell.model].token_bytes(cell.bits) * cell.tokens * 8 / (cell.gbps * 1e9)


@cache
def overhead_of(model: str) -> Overhead:
    """The overhead that the figures of a model of the paper show."""
    large = [cell for cell in cells() if cell.model == _LARGE]
    lengths = sorted({cell.tokens for cell in large})
    found = [_fitted_overhead([cell for cell in large if cell.tokens == tokens]) for tokens in lengths]
    token_s, request_s = (float(value) for value in np.polyfit(lengths, found, 1))
    if model == _LARGE:
        return Overhead(request_s, token_s)
    factor = _fitted_overhead([cell for cell in cells() if cell.model == model]) / found[-1]
    return Overhead(request_s * factor, token_s * factor)


def _fitted_overhead(measured: Sequence[Cell]) -> float:
    """The overhead, in seconds, under which compute-only time depends least on bandwidth; golden-section search."""
    groups: dict[tuple[str, float], list[tuple[float, float]]] = defaultdict(list)
    for cell in measured:
        groups[cell.hardware, cell.share].append((cell.compute / cell.io, _wire_s(cell)))

    def spread(overhead_s: float) -> float:
        logs = [[math.log(quotient * (wire_s + overhead_s)) for quotient, wire_s in group] for group in groups.values()]
        return float(sum(np.var(group) * len(group) for group in logs))

    low, high, ratio = 0.0, 1.0, (math.sqrt(5) - 1) / 2
    while high - low > 1e-5:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if spread(left) < spread(right):
            high = right
        else:
            low = left
    return (low + high) / 2


@cache
def compute_only_s(hardware: str, share: float, model: str) -> dict[int, float]:
    """Seconds to compute everything by prompt length: the geometric mean over the bandwidths it was compared at."""
    found: dict[int, list[float]] = defaultdict(list)
    for cell in cells():
        if (cell.hardware, cell.share, cell.model) == (hardware, share, model):
            found[cell.tokens].append(math.log(io_only_s(cell) * cell.compute / cell.io))
    return {tokens: math.exp(sum(logs) / len(logs)) for tokens, logs in sorted(found.items())}


@cache
def curve(hardware: str, share: float, model: str) -> ComputeCurve:
    """The compute curve of a model of the paper on one of its machines.

    Raises
    ------
    BadInput
        The paper has no figures for it.
    """
    times = compute_only_s(hardware, share, model)
    if not times:
        raise BadInput(f"the paper has no figures for {model} on {hardware} at a share of {share:.1%}")
    lengths = np.array(list(times), dtype=float)
    steps_s = np.array(list(times.values())) - overhead_of(model).request_s
    if len(times) > 1:
        columns = np.stack([lengths, lengths**2 / 2], axis=1) / steps_s[:, None]
        (linear, quadratic), *_ = np.linalg.lstsq(columns, np.ones(len(times)), rcond=None)
    else:
        curvature = _curvature(hardware, share, MODELS[model])
        linear = steps_s[0] / (lengths[0] + curvature * lengths[0] ** 2 / 2)
        quadratic = linear * curvature
    return ComputeCurve(
        float(linear), float(quadratic), max(1, round(share * STEP_TOKENS)), 1 - share + SHORT_STEP * share
    )


def estimated_curve(hardware: str, share: float, model: ModelShape) -> ComputeCurve:
    """The curve of any model: the paper's if it has one, else that of LongAlpaca-13B scaled by the arithmetic."""
    if model.name in MODELS and compute_only_s(hardware, share, model.name):
        return curve(hardware, share, model.name)
    large, reference = curve(hardware, share, _LARGE), MODELS[_LARGE]
    linear = large.linear * model.parameters / reference.parameters
    curvature = large.quadratic / large.linear * model.attention_share / reference.attention_share
    return ComputeCurve(linear, linear * curvature, large.step_tokens, large.fixed_part)


def _curvature(hardware: str, share: float, model: ModelShape) -> float:
    """Attention per position over the rest, from the nearest thing measured, in proportion to the arithmetic."""
    if hardware in FIGURE_2_CHUNK_S:
        first_s, last_s = FIGURE_2_CHUNK_S[hardware]
        reference = MODELS["LongAlpaca-7B"]
        # first = linear + curvature * 512/2; last = linear + curvature * (65 * 512 + 512/2), in units of linear
        slope = (last_s - first_s) / (FIGURE_2_LAST_CHUNK * STEP_TOKENS)
        curvature = slope / (first_s - slope * STEP_TOKENS / 2)
    else:
        reference = MODELS[_LARGE]
        large = curve(hardware, share, _LARGE)
        curvature = large.quadratic / large.linear
    return curvature * model.attention_share / reference.attention_share

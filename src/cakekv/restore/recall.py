"""Decides whether a prefix is read only as its queries ask for it, from which position on, and what is read next.

Pure, like the planner. A first token that sees a selection of the prefix (ClusterKV, arXiv 2412.03213) needs all that
is computed at the front, but of what is loaded behind it only the rows that its queries select. So the back arm loads
by priority instead of strictly from the end: first what a layer has asked for, then what promises most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cakekv.restore.costs import ComputeModel, LoadModel

Unit = TypeVar("Unit")
_TIMES = 4.0
"""Times its budget that a question of a dozen tokens selects, where nothing is known."""
_LEARNS = 0.3
_FRONT_GAINS = 1.15
"""So many times as long should it take without a front before one is computed: that takes cores from what is read."""


@dataclass(frozen=True)
class RecallShape:
    """What reading a prefix piece by piece takes, beside reading it whole.

    Parameters
    ----------
    ends : sequence of int
        Positions, ascending from 0, from which on that may be done, and the one where it ends.
    token_bytes : int
        Bytes of one token's keys and values.
    beside_bytes : int
        Bytes to read per token before anything is selected.
    first_bytes : int
        Bytes to read per token, of all layers, before the first one that selects.
    share : float
        Of the rows of the other layers, the part that the suffix selects, as far as is known.
    reads : int
        How many times in turn it asks for rows: once per layer.
    """

    ends: Sequence[int]
    token_bytes: int
    beside_bytes: int
    first_bytes: int
    share: float
    reads: int

    def seconds(self, front: int, prompt_tokens: int, compute: ComputeModel, load: LoadModel) -> float:
        """Until the first token, if the prefix is computed up to `front`, and read as asked for behind it."""
        end = self.ends[-1]
        computed = compute.seconds(0, front) if front else 0.0
        before = load.seconds(self.beside_bytes * end + self.first_bytes * (end - front))
        rows = (self.token_bytes - self.first_bytes) * (end - front) * min(1.0, self.share)
        asked = load.seconds(round(rows)) + self.reads * max(load.duration(1), load.request_s)
        return max(computed, before) + asked + compute.seconds(end, prompt_tokens - end)


class Spread:
    """Learns which part of a prefix suffixes select: more than a budget, since every query selects its own."""

    def __init__(self) -> None:
        self._times = _TIMES

    def share(self, budget: int, tokens: int) -> float:
        """The part of `tokens` that is expected to be selected."""
        return min(1.0, self._times * budget / tokens)

    def observe(self, share: float, budget: int, tokens: int) -> None:
        """That part of `tokens` was selected."""
        self._times += _LEARNS * (share * tokens / budget - self._times)


def recalled_from(
    shape: RecallShape,
    prompt_tokens: int,
    prefix_tokens: int,
    compute: ComputeModel,
    load: LoadModel,
    chunk_bytes: int,
    chunk_tokens: int,
) -> int | None:
    """The position from which on the prefix is read as asked for; None if computing and loading all of it is sooner.

    Parameters
    ----------
    shape : RecallShape
        What that takes.
    prompt_tokens, prefix_tokens : int
        Of the prompt, and of what is stored of it.
    compute, load : ComputeModel, LoadModel
        What either arm costs. If nothing is known of one, the whole prefix is loaded, which teaches it.
    chunk_bytes, chunk_tokens : int
        Of a stored chunk, as it is read whole.
    """
    if not (compute.known and load.known):
        return None

    def until(met: int) -> float:
        computed = compute.seconds(0, met) if met else 0.0
        return max(computed, load.seconds(chunk_bytes * -(-(prefix_tokens - met) // chunk_tokens)))

    whole = min(until(met) for met in range(0, prefix_tokens + 1, chunk_tokens))
    whole += compute.seconds(prefix_tokens, prompt_tokens - prefix_tokens)
    seconds = {front: shape.seconds(front, prompt_tokens, compute, load) for front in shape.ends[:-1]}
    best = min(seconds, key=lambda front: seconds[front])
    if seconds[shape.ends[0]] < _FRONT_GAINS * seconds[best]:
        best = shape.ends[0]
    return best if seconds[best] < whole else None


def by_promise(units: Mapping[Unit, Iterable[float]]) -> list[Unit]:
    """Units to read, the one first of which the best missing part promises most.

    Parameters
    ----------
    units : mapping
        Each with the ranks of its missing parts: 0 promises most.
    """
    return sorted(units, key=lambda unit: min(units[unit], default=float("inf")))

"""What a restore with holes takes, from the planner's own choice of chunks, in one pass instead of event by event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cakekv.restore.assignment import Candidate, assign_loads
from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost
from cakekv.restore.flights import Tier
from cakekv.restore.level_choice import Level
from cakekv.restore.planner import Planner, PlannerOptions
from cakekv.simulate.machine import VirtualTier, constant, run_restore, undisturbed

DEPTH = 2
"""Loads in flight at a time, where the planner itself is run."""


class Timing(NamedTuple):
    """What comes of one prompt."""

    seconds: float
    """To the first token."""
    loads: Sequence[int]
    """The chunks that are loaded, in the order in which they are."""
    behind: Sequence[int] = ()
    """Those that are loaded from the tier behind, likewise."""


class Timer:
    """One machine and one tier, and maybe one behind that, whose speeds are constant and known.

    Parameters
    ----------
    shape : ComputeShape
        What a span costs.
    chunk_tokens : int
        Tokens of a chunk; a span takes no more.
    tokens_per_s : float
        What the tier delivers.
    behind_tokens_per_s : float
        What the tier behind it does.
    """

    def __init__(
        self, shape: ComputeShape, chunk_tokens: int, tokens_per_s: float, behind_tokens_per_s: float = 1.0
    ) -> None:
        self.shape = shape
        self.chunk_tokens = chunk_tokens
        self.load_s = chunk_tokens / tokens_per_s
        self.behind_s = chunk_tokens / behind_tokens_per_s
        self._compute_s: list[float] = []
        self._until_s = [0.0]

    def whole_chunks(self, prompt_tokens: int) -> int:
        """Chunks of a prompt that can be of use: its last token is computed in any case."""
        return (prompt_tokens - 1) // self.chunk_tokens

    def computed(self, prompt_tokens: int) -> float:
        """Seconds if nothing is stored."""
        chunks = self.whole_chunks(prompt_tokens)
        self._extend(chunks)
        return self._until_s[chunks] + self._suffix_s(prompt_tokens, chunks)

    def restored(self, prompt_tokens: int, stored: Sequence[bool], behind: Sequence[bool] = ()) -> Timing:
        """What comes of a prompt of which chunk i is stored if `stored[i]`, or else in the tier behind if `behind[i]`;
        those past the end of it are not."""
        chunks = self.whole_chunks(prompt_tokens)
        if not any(stored[:chunks]) and not any(behind[:chunks]):
            return Timing(self.computed(prompt_tokens), ())
        self._extend(chunks)
        held: dict[int, float] = {0: self.load_s}
        farther: dict[int, float] = {1: self.behind_s}
        missing: dict[int, float] = {}
        candidates: list[Candidate] = []
        for chunk in range(chunks):
            near = chunk < len(stored) and stored[chunk]
            far = chunk < len(behind) and behind[chunk]
            candidates.append((chunk, self._compute_s[chunk], held if near else farther if far else missing))
        candidates.append((chunks, self._suffix_s(prompt_tokens, chunks), missing))
        chosen = assign_loads(candidates, 2)
        loads: list[int] = []
        from_behind: list[int] = []
        group: list[int] = []
        seconds = 0.0
        for chunk, compute_s, _ in candidates:
            if chunk in chosen:
                group.append(chunk)
                continue
            if group:  # the loads due first come first, those of one deadline from behind
                loads += [one for one in reversed(group) if chosen[one] == 0]
                from_behind += [one for one in reversed(group) if chosen[one] == 1]
                group = []
                seconds = max(seconds, len(loads) * self.load_s, len(from_behind) * self.behind_s)
            seconds += compute_s
        return Timing(seconds, loads, from_behind)

    def _suffix_s(self, prompt_tokens: int, chunks: int) -> float:
        start = chunks * self.chunk_tokens
        return self.shape.seconds(start, prompt_tokens - start)

    def _extend(self, chunks: int) -> None:
        for chunk in range(len(self._compute_s), chunks):
            self._compute_s.append(self.shape.seconds(chunk * self.chunk_tokens, self.chunk_tokens))
            self._until_s.append(self._until_s[-1] + self._compute_s[-1])


def planned_seconds(timer: Timer, prompt_tokens: int, stored: Sequence[bool]) -> float:
    """The same time as `Timer.restored` gives, from the planner that ships, on a virtual clock."""
    size = 1 << 20
    rate = size / timer.load_s
    cost = LoadCost(DEPTH)
    cost.observe(size, 0.0, size / rate)
    planner = Planner(
        prompt_tokens,
        timer.chunk_tokens,
        [(0,) if held else () for held in stored[: timer.whole_chunks(prompt_tokens)]],
        [Tier("tier", cost, DEPTH)],
        ComputeCost(timer.shape, trusted=True),
        [Level.whole(size)],
        PlannerOptions(max_span_tokens=timer.chunk_tokens),
    )
    return run_restore(planner, undisturbed(timer.shape.seconds), [VirtualTier(constant(rate))])

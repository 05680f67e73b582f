"""A restore's plan in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cakekv.restore.coverage import State
from cakekv.restore.situation import Situation


class PlannedRun(NamedTuple):
    """Positions that are covered in the same way."""

    start: int
    tokens: int
    how: str
    """"compute" or the name of a tier."""
    why: str
    seconds: float
    """That it keeps its arm busy; 0.0 if nothing is known of the tier."""

    def __str__(self) -> str:
        verb = "compute" if self.how == "compute" else f"load from {self.how}"
        time = f"about {self.seconds:.3f} s" if self.seconds else "time unknown"
        reason = f" ({self.why})" if self.why else ""
        return f"{self.start:>9,} - {self.start + self.tokens:>9,}  {verb:<16} {time}{reason}"


def planned_runs(situation: Situation, assigned: Mapping[int, int], chunk_bytes: int) -> list[PlannedRun]:
    """What happens to the chunks that are not covered yet, in runs.

    Parameters
    ----------
    situation : Situation
        The restore's.
    assigned : mapping of int to int
        Chunk to tier, for the chunks to load.
    chunk_bytes : int
        Bytes to read for a chunk of the usual length.
    """
    coverage, tiers, compute = situation.coverage, situation.tiers, situation.compute
    groups: list[tuple[int, int, int, bool]] = []
    for chunk in coverage.uncovered:
        tier = assigned.get(chunk, -1)
        missing = coverage.state[chunk] is State.MISSING
        if groups and groups[-1][1] == chunk and groups[-1][2:] == (tier, missing):
            groups[-1] = (groups[-1][0], chunk + 1, tier, missing)
        else:
            groups.append((chunk, chunk + 1, tier, missing))
    runs = []
    for first, end, tier, missing in groups:
        start = coverage.start_of(first)
        tokens = coverage.start_of(end) - start
        if tier < 0:
            why = "not stored" if missing else "sooner than loading it"
            runs.append(PlannedRun(start, tokens, "compute", why, compute.seconds(start, tokens)))
        else:
            size = -(-chunk_bytes * tokens // coverage.chunk_tokens)
            seconds = tiers[tier].cost.seconds(size)
            runs.append(PlannedRun(start, tokens, tiers[tier].name, "", seconds))
    return runs

"""The plan: which chunks to load, from where, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cakekv.restore.assignment import Candidate


class Plan(NamedTuple):
    """Which chunks to load; all others are to be computed."""

    assigned: Mapping[int, int]
    """Chunk to the tier that is to deliver it."""
    queues: list[list[int]]
    """The chunks of each tier, the one due first at the end."""
    deadlines: list[int]
    """The chunks to be computed that have a chunk to be loaded directly before them, ascending."""

    @classmethod
    def ordered(cls, candidates: Sequence[Candidate], assigned: Mapping[int, int], tiers: int) -> Plan:
        """Nearest deadline first; back to front before each, since compute may take over what is nearest to it.

        Parameters
        ----------
        candidates : sequence of Candidate
            All uncovered chunks, by ascending position.
        assigned : mapping of int to int
            Chunk to tier, for the chunks to load.
        tiers : int
            How many tiers there are.
        """
        queues: list[list[int]] = [[] for _ in range(tiers)]
        group: list[list[int]] = [[] for _ in range(tiers)]
        deadlines: list[int] = []
        deadline = candidates[-1][0] + 1 if candidates else 0
        open_group = False
        for chunk, _, _ in reversed(candidates):
            tier = assigned.get(chunk)
            if tier is not None:
                group[tier].append(chunk)
                if not open_group:
                    open_group = True
                    deadlines.append(deadline)
                continue
            deadline = chunk
            if open_group:
                open_group = False
                _close(queues, group)
        _close(queues, group)
        return cls(assigned, queues, deadlines[::-1])


def _close(queues: Sequence[list[int]], group: Sequence[list[int]]) -> None:
    for queue, chunks in zip(queues, group, strict=True):
        queue.extend(reversed(chunks))
        chunks.clear()

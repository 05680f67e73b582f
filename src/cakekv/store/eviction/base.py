"""The contract of an eviction policy: which chunks go first when room is needed. It has no clock and no state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from cakekv.keys import ChunkKey


class Candidate(NamedTuple):
    """A chunk that might go."""

    key: ChunkKey
    size: int
    """Bytes."""
    used_at: float
    """Seconds since the epoch at which it was last written or read."""
    uses: int = 0
    """How often it was read; on disk, how often by this process."""
    position: int = 0
    """Tokens of the prompt before it; 0 if that is not known."""
    tokens: int = 1
    """Tokens in it."""


class Eviction(ABC):
    """A policy."""

    name: str
    """As in `evict=NAME`."""
    needs_position: bool = False
    """Whether it looks at `position` and `tokens`, which a disk has to read out of the chunk."""

    lasting: bool = False
    """Whether an order stays right as time passes and chunks come, but for the chunks that are used meanwhile."""

    @abstractmethod
    def order(self, candidates: Iterable[Candidate], now: float) -> list[Candidate]:
        """All candidates, the first to go first.

        Parameters
        ----------
        candidates : iterable of Candidate
            In any order.
        now : float
            Seconds since the epoch; no candidate was used later.
        """


SAME_S = 10.0
"""Chunks that were used within about so many seconds of each other, such as those of one prompt, are equally old."""


def ages(candidates: Iterable[Candidate], now: float) -> list[tuple[Candidate, float]]:
    """Each candidate with its age in seconds, at least `SAME_S`, the least recently used first."""
    ordered = sorted(candidates, key=lambda candidate: candidate.used_at)
    return [(candidate, max(now - candidate.used_at, 0.0) + SAME_S) for candidate in ordered]


class Victims:
    """The chunks to evict next. A store asks for them one by one, and gathers candidates when there are none left.

    Ordering all chunks for each eviction would be slow, and an order goes stale as chunks come and are used; so only
    the first part of it is kept (unless it lasts), and chunks that were used since are for the store to pass over.
    """

    SHARE = 8
    """Only the first of so many parts of an order is kept."""

    def __init__(self, policy: Eviction) -> None:
        self.policy = policy
        self._queue: deque[Candidate] = deque()

    def refill(self, candidates: Iterable[Candidate], now: float) -> None:
        """Choose among these from now on."""
        ordered = self.policy.order(candidates, now)
        self._queue = deque(ordered if self.policy.lasting else ordered[: -(-len(ordered) // self.SHARE)])

    def next(self) -> Candidate | None:
        """The next one; None if candidates have to be gathered."""
        return self._queue.popleft() if self._queue else None

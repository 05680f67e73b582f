"""Keeps an engine without requests in steps until its workers have said what became of the last saves."""

from __future__ import annotations

from time import monotonic

_HANGS_S = 5.0
"""Saves of which none ended for so long are not waited for: what becomes of them is said with the next request."""


class LastSaves:
    """How much the workers still have to say about saves.

    vLLM is told by its workers with a step's output only, and makes no steps without requests.
    """

    def __init__(self) -> None:
        self._unsaid: dict[int, int] = {}
        self._changed_at = 0.0

    def receive(self, rank: int, unsaid: int) -> None:
        """A worker still has to report on so many saves."""
        if unsaid != self._unsaid.get(rank, 0):
            self._changed_at = monotonic()
        self._unsaid[rank] = unsaid

    def forget(self) -> None:
        """Wait for none of those that are under way."""
        self._unsaid.clear()

    @property
    def awaited(self) -> bool:
        """Whether a step should follow, even if no request is there."""
        return any(self._unsaid.values()) and monotonic() - self._changed_at < _HANGS_S

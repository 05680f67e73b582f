"""Chunks that wait to be copied to another tier, noted in their tier so that the list outlives the process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from cakekv.keys import ChunkKey


class WaitingCopies(ABC):
    """The notes of this process. All methods may be called from several threads, and raise `OSError` or `StoreError`
    if the tier cannot take notes."""

    @abstractmethod
    def add(self, keys: Iterable[ChunkKey]) -> None:
        """These chunks wait from now on; durable when this returns."""

    @abstractmethod
    def remove(self, key: ChunkKey) -> None:
        """This chunk waits no more."""

    @abstractmethod
    def take_over(self) -> list[ChunkKey]:
        """Make the notes of processes that ended this one's. Returns the chunks that they were about."""

    def close(self) -> None:  # noqa: B027 - closing is optional
        """Leave the notes for whoever opens the store next, if there are any."""

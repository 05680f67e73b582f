"""The contract of an eviction policy: it hears what happens to every chunk of a tier, and says which one goes next.

A policy is pure: no I/O, no clock, no threads. Its store tells it the time and serialises the calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING

from cakekv.keys import ChunkKey

if TYPE_CHECKING:
    from cakekv.store.base import Expected

AHEAD_S = 1.0
"""A time that is further ahead was told by a clock that was wrong."""


@dataclass(slots=True, eq=False)
class Held:
    """A chunk that the tier holds, as its policy sees it."""

    key: ChunkKey
    size: int
    """Bytes."""
    used_at: float
    """Seconds since the epoch at which it was last written or read."""
    position: int = 0
    """Tokens of the prompt before it; 0 if that is not known."""
    tokens: int = 1
    """Tokens in it."""
    uses: int = 0
    """How often it was read, as far as this process knows."""


class Eviction(ABC):
    """A policy: an index of one tier's chunks, with its own idea of which goes first."""

    name: str
    """As in `evict=NAME`."""
    needs_position: bool = False
    """Whether it looks at `position` and `tokens`, which a disk has to read out of chunks that it finds."""

    def __init__(self) -> None:
        self._held: dict[ChunkKey, Held] = {}
        """The chunks that may go."""
        self._spared: frozenset[ChunkKey] = frozenset()
        self._aside: dict[ChunkKey, Held] = {}
        """Those that would have gone, and are spared: the policy's own index is without them."""
        self._latest = float("-inf")
        """The latest time that it was told of."""

    def __len__(self) -> int:
        return len(self._held) + len(self._aside)

    def get(self, key: ChunkKey) -> Held | None:
        """What is known of a chunk; None if nothing is."""
        return self._held.get(key) or self._aside.get(key)

    def chunks(self) -> Iterator[Held]:
        """All chunks that it knows of, in no particular order."""
        return chain(self._held.values(), self._aside.values())

    @property
    def may_evict(self) -> bool:
        """Whether it knows of a chunk that it has not found to be spared."""
        return bool(self._held)

    def spare(self, keys: frozenset[ChunkKey]) -> None:
        """These do not go, from now on, whether they are in the tier or not; those that were spared before may."""
        if keys is self._spared:
            return
        self._spared = keys
        for key in [key for key in self._aside if key not in keys]:
            chunk = self._held[key] = self._aside.pop(key)
            self._came(chunk)

    def asked(self, keys: Sequence[ChunkKey], now: float) -> None:
        """These were looked up, stored or not: usually the chunks of one prompt, in order. That is no use of them."""
        self._latest = max(self._latest, now)

    def expect(self, queue: Sequence[Expected]) -> None:  # noqa: B027 - only some policies look ahead
        """These requests wait, the next one first; replaces what was said before."""

    def wrote(self, chunk: Held) -> None:
        """A chunk was written, or found in the tier. What was known under its key is forgotten."""
        self.removed(chunk.key)
        self._held[chunk.key] = chunk
        self._latest = max(self._latest, chunk.used_at)
        self._came(chunk)

    def read(self, key: ChunkKey, now: float) -> None:
        """A chunk is read; one that is not known is passed over."""
        chunk = self.get(key)
        if chunk is not None:
            if key in self._held:
                self._before_read(chunk, now)
            chunk.used_at = max(chunk.used_at, now)
            self._latest = max(self._latest, now)
            chunk.uses += 1

    def removed(self, key: ChunkKey) -> None:
        """A chunk is gone, whoever removed it; one that is not known is passed over."""
        chunk = self._held.pop(key, None)
        if chunk is not None:
            self._went(chunk)
        self._aside.pop(key, None)

    def evict(self, now: float) -> Held | None:
        """The chunk that is to go next, which the policy forgets; None if it knows of none that may.

        Parameters
        ----------
        now : float
            Seconds since the epoch.
        """
        if not self._held:
            return None
        if self._latest > now + AHEAD_S:
            # Chunks used while the clock was ahead would outlive all others until it is there again.
            ahead = sorted((chunk for chunk in self.chunks() if chunk.used_at > now), key=attrgetter("used_at"))
            for held in ahead:
                held.used_at = now
            self._latest = now
            self._redated([held for held in ahead if held.key in self._held], now)
        while self._held:
            chunk = self._victim(now)
            del self._held[chunk.key]
            self._went(chunk)
            if chunk.key not in self._spared:
                return chunk
            self._aside[chunk.key] = chunk
        return None

    @abstractmethod
    def _victim(self, now: float) -> Held:
        """The chunk that is to go next; there is at least one."""

    def _came(self, chunk: Held) -> None:  # noqa: B027
        """A chunk is in the index now."""

    def _before_read(self, chunk: Held, now: float) -> None:  # noqa: B027
        """A chunk is about to be marked as read."""

    def _redated(self, chunks: Sequence[Held], now: float) -> None:  # noqa: B027
        """The clock was ahead and is not any more; these chunks, last used first to last, count as used now."""

    def _went(self, chunk: Held) -> None:  # noqa: B027
        """A chunk is not in the index any more."""

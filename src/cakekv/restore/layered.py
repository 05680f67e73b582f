"""The layered finish: the suffix is computed while the last chunks before it still arrive, layer by layer.

Layer l of the suffix needs the prefix's keys and values of layer l only. So once compute has nothing left to do before
the suffix, what is still to be loaded is cut into groups of layers and loaded in their order, and the suffix's forward
pass waits before each layer for just that. Both arms stay busy to the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cakekv.restore.coverage import Coverage, State


class LayerGroups(NamedTuple):
    """How a chunk is cut for a layered finish: bytes to read per group of layers, in the order of the layers."""

    bytes: tuple[int, ...]
    """With the windowed layers."""
    unwindowed_bytes: tuple[int, ...]
    """Without them; 0 for a group that consists of them."""


class Piece(NamedTuple):
    """One group of layers of one chunk."""

    chunk: int
    group: int
    size: int


class LayeredFinish:
    """What is still on its way while the suffix is computed.

    Parameters
    ----------
    chunks : mapping of int to (int, tuple of int)
        Chunks to load in pieces: the source, and the bytes of each group.
    whole : iterable of int
        Chunks whose loads in one piece were in flight already; every layer waits for them.
    groups : int
        Number of groups of layers.
    sources : int
        Number of sources.
    """

    def __init__(
        self, chunks: Mapping[int, tuple[int, tuple[int, ...]]], whole: Iterable[int], groups: int, sources: int
    ) -> None:
        self._pending: list[deque[Piece]] = [deque() for _ in range(sources)]
        self._missing = [0] * groups
        """Pieces of each group that are not in place."""
        self._missing_of: dict[int, int] = {}
        """Pieces of each chunk that are not in place."""
        self.placed_bytes: dict[int, int] = {}
        """Of the chunks that are not complete."""
        self.whole = set(whole)
        self.broken = False
        for group in range(groups):
            for chunk, (source, sizes) in sorted(chunks.items(), reverse=True):
                if sizes[group]:
                    self._pending[source].append(Piece(chunk, group, sizes[group]))
                    self._missing[group] += 1
                    self._missing_of[chunk] = self._missing_of.get(chunk, 0) + 1
                    self.placed_bytes[chunk] = 0

    def next(self, source: int) -> Piece | None:
        """What `source` should load next."""
        return self._pending[source].popleft() if self._pending[source] else None

    @property
    def asked(self) -> list[int]:
        """The sources that are yet to be asked for pieces."""
        return [source for source, pending in enumerate(self._pending) if pending]

    def placed(self, chunk: int, group: int, size: int) -> bool:
        """A piece is in the cache. Returns whether its chunk is complete."""
        self._missing[group] -= 1
        self._missing_of[chunk] -= 1
        self.placed_bytes[chunk] += size
        if self._missing_of[chunk]:
            return False
        del self._missing_of[chunk], self.placed_bytes[chunk]
        return True

    def ready(self, group: int) -> bool:
        """Whether all that this group of layers attends to is in the cache."""
        return not self.whole and not self._missing[group]

    @property
    def complete(self) -> bool:
        """Whether everything is in the cache."""
        return not self.whole and not self._missing_of

    @property
    def incomplete(self) -> list[int]:
        """Chunks of which pieces are not in place, ascending."""
        return sorted(self._missing_of)


def cut_into_pieces(
    coverage: Coverage, waited: Iterable[int], plan: Mapping[int, int], groups: LayerGroups, sources: int
) -> LayeredFinish:
    """Load the chunks that are waited for in pieces, by the plan; those on their way already come as a whole."""
    whole = [chunk for chunk, state in enumerate(coverage.state) if state in (State.LOADING, State.PLACING)]
    pieces = {}
    for chunk in waited:
        if coverage.state[chunk] is State.STORED:
            sizes = groups.bytes if coverage.needs_window(chunk) else groups.unwindowed_bytes
            pieces[chunk] = (plan[chunk], sizes)
            coverage.state[chunk] = State.LOADING
    return LayeredFinish(pieces, whole, len(groups.bytes), sources)

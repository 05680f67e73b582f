"""The layered finish: the suffix is computed while the last chunks before it still arrive, layer by layer.

Layer l of the suffix needs the prefix's keys and values of layer l only. So once compute has nothing left to do before
the suffix, the last chunks to be loaded are cut into groups of layers and loaded in their order, and the suffix's
forward pass waits before each layer for just that. Both arms stay busy to the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cakekv.restore.coverage import Coverage, State
from cakekv.restore.level_choice import LayerGroups


class Piece(NamedTuple):
    """One group of layers of one chunk, or all of it."""

    chunk: int
    group: int | None
    size: int | None
    """Bytes of the group."""


class LayeredFinish:
    """What is still on its way while the suffix is computed.

    Parameters
    ----------
    chunks : mapping of int to (int, tuple of int)
        Chunks to load in pieces: the tier, and the bytes of each group.
    whole : mapping of int to (int or None)
        Chunks that come in one piece, before the pieces, and their tiers; None: on its way already. Every layer waits
        for them.
    groups : int
        Number of groups of layers.
    tiers : int
        Number of tiers.
    """

    def __init__(
        self,
        chunks: Mapping[int, tuple[int, tuple[int, ...]]],
        whole: Mapping[int, int | None],
        groups: int,
        tiers: int,
    ) -> None:
        self._pending: list[deque[Piece]] = [deque() for _ in range(tiers)]
        self._missing = [0] * groups
        """Pieces of each group that are not in place."""
        self._missing_of: dict[int, int] = {}
        """Pieces of each chunk that are not in place."""
        self.placed_bytes: dict[int, int] = {}
        """Of the chunks that are not complete."""
        self.whole = set(whole)
        self.broken = False
        for chunk, tier in sorted(whole.items(), reverse=True):
            if tier is not None:
                self._pending[tier].append(Piece(chunk, None, None))
        for group in range(groups):
            for chunk, (at, sizes) in sorted(chunks.items(), reverse=True):
                if sizes[group]:
                    self._pending[at].append(Piece(chunk, group, sizes[group]))
                    self._missing[group] += 1
                    self._missing_of[chunk] = self._missing_of.get(chunk, 0) + 1
                    self.placed_bytes[chunk] = 0

    def next(self, tier: int) -> Piece | None:
        """What `tier` should load next."""
        return self._pending[tier].popleft() if self._pending[tier] else None

    @property
    def asked(self) -> list[int]:
        """The tiers that are yet to be asked for pieces."""
        return [tier for tier, pending in enumerate(self._pending) if pending]

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

    @property
    def not_begun(self) -> list[int]:
        """Chunks that are to come in one piece, and that nobody was asked for."""
        return [piece.chunk for pending in self._pending for piece in pending if piece.group is None]


def cut_into_pieces(
    coverage: Coverage,
    waited: Iterable[int],
    plan: Mapping[int, int],
    groups: LayerGroups,
    most: Sequence[float],
) -> LayeredFinish:
    """Load the chunks that are waited for by the plan, the last ones in pieces.

    Parameters
    ----------
    coverage : Coverage
        The restore's.
    waited : iterable of int
        The chunks.
    plan : mapping of int to int
        Their tiers.
    groups : LayerGroups
        How a chunk is cut.
    most : sequence of float
        Per tier, how many of its chunks to cut: a piece is a request of its own.
    """
    whole: dict[int, int | None] = {
        chunk: None for chunk, state in enumerate(coverage.state) if state in (State.LOADING, State.PLACING)
    }
    pieces: dict[int, tuple[int, tuple[int, ...]]] = {}
    left = list(most)
    for chunk in sorted(waited):
        if coverage.state[chunk] is not State.STORED:
            continue
        tier = plan[chunk]
        if left[tier] > 0:
            left[tier] -= 1
            pieces[chunk] = (tier, groups.bytes if coverage.needs_window(chunk) else groups.unwindowed_bytes)
        else:
            whole[chunk] = tier
        coverage.state[chunk] = State.LOADING
    return LayeredFinish(pieces, whole, len(groups.bytes), len(most))

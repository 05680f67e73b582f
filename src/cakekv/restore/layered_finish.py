"""The layered finish: the suffix is computed while the last chunks before it still arrive, layer by layer.

Layer l of the suffix needs the prefix's keys and values of layer l only. So once compute has nothing left to do before
the suffix, the last chunks to be loaded are cut into groups of layers and loaded in their order, and the suffix's
forward pass waits before each layer for just that. Both arms stay busy to the end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from cakekv.restore.coverage import Coverage, State
from cakekv.restore.flights import Load
from cakekv.restore.front import Front
from cakekv.restore.level_choice import LayerGroups
from cakekv.restore.report import Recorder
from cakekv.restore.schedule import Schedule
from cakekv.restore.situation import Situation

_LAST_SPAN_SHARE = 0.5
"""If the suffix takes at least this share of the last span before it, loads are cut into pieces during that span."""
_WORTHWHILE = 0.05
"""Share of the suffix's time that loads must still take for a layered finish to begin."""
_CUT = 1.5
"""What a tier delivers in so many times the suffix's time is cut into pieces: no more can be in its way, unless it
takes longer than expected."""


class Piece(NamedTuple):
    """One group of layers of one chunk, or all of it."""

    chunk: int
    group: int | None = None
    size: int | None = None
    """Bytes of the group."""


class Pieces:
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
        for chunk, tier in sorted(whole.items(), reverse=True):
            if tier is not None:
                self._pending[tier].append(Piece(chunk))
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
    def pending_tiers(self) -> list[int]:
        """The tiers that have pieces left to load."""
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
        """Chunks that are to come in one piece, and that no tier has begun to load."""
        return [piece.chunk for pending in self._pending for piece in pending if piece.group is None]


class Phase(Enum):
    """How chunks are loaded."""

    WHOLE = "whole"
    """Whole; the suffix waits for all of them."""
    IN_PIECES = "in pieces"
    """The last of them in pieces; the suffix may be computed, and its layers wait."""
    BROKEN = "broken"
    """A load was lost: back to whole chunks, as soon as no piece is being placed."""


class LayeredFinish:
    """Lets the suffix's layers wait for the last loads, where that pays.

    The phases run from `WHOLE` to `IN_PIECES` (`begin`) and back, when the suffix is computed (`end`); or from there to
    `BROKEN` (`break_off`), and back to `WHOLE` (`disband`).

    Parameters
    ----------
    situation : Situation
        The restore's.
    schedule : Schedule
        The plan in force.
    front : Front
        Where compute stands.
    record : Recorder
        Is told what was in vain.
    groups : LayerGroups or None
        How a chunk is cut; None: the suffix always waits for whole chunks.

    Attributes
    ----------
    phase : Phase
        How chunks are loaded now.
    pieces : Pieces or None
        What is still on its way, unless chunks are loaded whole.
    placing : int
        Pieces that are being placed.
    allowed : bool
        Whether the driver could have the suffix's layers wait for loads now.
    """

    def __init__(
        self, situation: Situation, schedule: Schedule, front: Front, record: Recorder, groups: LayerGroups | None
    ) -> None:
        self._situation = situation
        self._coverage = situation.coverage
        self._schedule = schedule
        self._front = front
        self._record = record
        self._groups = groups
        self.phase = Phase.WHOLE
        self.pieces: Pieces | None = None
        self.placing = 0
        self.allowed = True

    def seconds(self) -> float:
        """Seconds that loads may go on while the suffix is computed; 0.0 if they may not."""
        coverage, span, compute = self._coverage, self._front.span, self._situation.compute
        prefix_tokens = coverage.start_of(coverage.suffix)
        if (
            self._groups is None
            or not self.allowed
            or (span is not None and span.start >= prefix_tokens)
            or not compute.known
            or any(coverage.state[chunk] is State.MISSING for chunk in coverage.uncovered if chunk < coverage.suffix)
        ):
            return 0.0
        waits = 1 - 1 / len(self._groups.bytes)
        return compute.seconds(prefix_tokens, coverage.prompt_tokens - prefix_tokens) * waits

    def begin(self, now: float) -> bool:
        """Load what is left in pieces, if no more than the span now claimed is left to compute before the suffix.

        Begun while that last span runs, the first layers are there when the suffix asks for them. But compute cannot
        take over a chunk any more then, so the suffix must be worth that. Returns whether it was begun.
        """
        coverage, tiers, schedule, suffix_s = self._coverage, self._situation.tiers, self._schedule, self.seconds()
        if self._groups is None or not suffix_s or any(not tier.cost.known for tier in tiers):
            return False
        computing, busy_s = self._front.span is not None, self._front.busy_s(now)
        if computing and suffix_s < _LAST_SPAN_SHARE * busy_s:
            return False
        waited = [chunk for chunk in coverage.uncovered if chunk < coverage.suffix]
        if any(chunk not in schedule.plan.assigned for chunk in waited):
            return False
        if schedule.loading_seconds(coverage.suffix, now) < _WORTHWHILE * suffix_s + busy_s:
            return False
        if not computing and coverage.take_back_unwindowed(coverage.suffix):
            schedule.invalidate()
            return False
        chunk_s = [tier.cost.seconds(schedule.level.chunk_bytes) for tier in tiers]
        most = [_CUT * suffix_s / each_s if each_s else math.inf for each_s in chunk_s]
        self.pieces = cut_into_pieces(coverage, waited, schedule.plan.assigned, self._groups, most)
        self.phase = Phase.IN_PIECES
        return True

    def next_piece(self, tier: int) -> Piece | None:
        """What `tier` should load next, of what is left in pieces."""
        return self.pieces.next(tier) if self.pieces is not None and self.phase is Phase.IN_PIECES else None

    def placed(self, load: Load) -> bool:
        """A load is in the cache. Returns whether its chunk is complete."""
        if load.group is None:
            if self.pieces is not None:
                self.pieces.whole.discard(load.chunk)
            return True
        assert self.pieces is not None
        self.placing -= 1
        return self.pieces.placed(load.chunk, load.group, load.size)

    def ready(self, group: int) -> bool:
        """Whether all that this group of layers attends to is in the cache."""
        return self.pieces is None or self.pieces.ready(group)

    @property
    def complete(self) -> bool:
        """Whether everything that was still on its way is in the cache."""
        return self.pieces is not None and self.pieces.complete

    def end(self) -> None:
        """Everything that the suffix attends to is in the cache."""
        assert self.pieces is None or not self.pieces.incomplete
        self.pieces, self.phase = None, Phase.WHOLE

    def break_off(self) -> None:
        """A load was lost: if the suffix waits for it, it waits in vain."""
        if self.phase is Phase.IN_PIECES:
            self.phase = Phase.BROKEN

    def check_stalled(self) -> None:
        """Break off if a tier that has pieces left to load hangs."""
        if self.pieces is not None and any(map(self._situation.flights.stalled, self.pieces.pending_tiers)):
            self.break_off()

    def disband(self) -> None:
        """Go back to whole chunks: what arrived in pieces so far was in vain."""
        assert self.pieces is not None
        assert self._groups is not None
        assert not self.placing, "a piece may still be written where compute would write"
        flights = self._situation.flights
        for chunk in self.pieces.incomplete:
            for group in range(len(self._groups.bytes)):
                load = flights.of_chunk(chunk, group)
                if load is not None:
                    flights.cancel(load)
            self._record.taken_back(0, self.pieces.placed_bytes[chunk])
            self._coverage.give_back(chunk)
        for chunk in self.pieces.not_begun:
            self._coverage.give_back(chunk)
        self.pieces, self.phase = None, Phase.WHOLE
        self._schedule.invalidate()


def cut_into_pieces(
    coverage: Coverage,
    waited: Iterable[int],
    tiers: Mapping[int, int],
    groups: LayerGroups,
    most: Sequence[float],
) -> Pieces:
    """Have the chunks loaded that the suffix waits for, the last ones in pieces.

    Parameters
    ----------
    coverage : Coverage
        The restore's.
    waited : iterable of int
        The chunks.
    tiers : mapping of int to int
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
        tier = tiers[chunk]
        if left[tier] > 0:
            left[tier] -= 1
            sizes = groups.bytes if coverage.needs_window(chunk) else groups.unwindowed_bytes
            pieces[chunk] = (tier, tuple(coverage.share_of(size, chunk) for size in sizes))
        else:
            whole[chunk] = tier
        coverage.loading(chunk)
    return Pieces(pieces, whole, len(groups.bytes), len(most))

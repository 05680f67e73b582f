"""How much of each chunk to read, where a chunk can be read in part: the best that still ends in time.

A codec may store chunks in parts, each of use without those behind it (`Codec.parts`): reading more of them costs more
bytes and gives keys and values that are nearer to the exact ones. CacheGen (arXiv 2310.07240) chooses such a
level per chunk from the bandwidth as it is; here the choice follows from when both arms together should end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

RESERVE = 0.1
"""Share of a target that is kept in hand, since no forecast is exact."""


class LayerGroups(NamedTuple):
    """How a chunk of the usual length is cut for a layered finish: bytes to read per group of layers, in order."""

    bytes: tuple[int, ...]
    """With the windowed layers."""
    unwindowed_bytes: tuple[int, ...]
    """Without them; 0 for a group that consists of them."""


class Level(NamedTuple):
    """One way to read chunks.

    Parameters
    ----------
    parts : int or None
        How many parts of a chunk are read; None: as many as the codec says.
    chunk_bytes, unwindowed_chunk_bytes : int
        Bytes to read for a chunk of the usual length, and for its part of the layers without a sliding window.
    groups : LayerGroups or None
        How a chunk is cut for a layered finish (see `layered_finish`); None: the suffix waits for whole chunks.
    """

    parts: int | None
    chunk_bytes: int
    unwindowed_chunk_bytes: int
    groups: LayerGroups | None = None

    @classmethod
    def whole(cls, chunk_bytes: int, groups: LayerGroups | None = None) -> Self:
        """Of a chunk all that is stored; no layer has a sliding window."""
        return cls(None, chunk_bytes, chunk_bytes, groups)


def best_level(levels: int, ends_s: Callable[[int], float], left_s: float) -> int:
    """Choose a level.

    Parameters
    ----------
    levels : int
        How many there are, the best last.
    ends_s : callable
        (level) to the seconds until everything would be covered, if all that is still to be loaded were loaded at it.
    left_s : float
        Seconds until it should be.

    Returns
    -------
    int
        The best level that ends in time; if none does, the one that ends first, of equals the best.
    """
    first, first_s = levels - 1, ends_s(levels - 1)
    if first_s <= left_s:
        return first
    for level in reversed(range(levels - 1)):
        seconds = ends_s(level)
        if seconds <= left_s:
            return level
        if seconds < first_s:
            first, first_s = level, seconds
    return first

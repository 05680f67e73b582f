"""How keys are turned by their positions (RoPE), so that a codec can turn them back and turn them again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Turns = npt.NDArray[np.float32]
"""(2, tokens, pairs): cosine and sine of every pair's angle at every token."""


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding of one layer's keys (RoPE, arXiv 2104.09864), the same for all heads.

    A factor on what is turned, as YaRN has it, is no part of this: it is left on the keys.

    Parameters
    ----------
    frequencies : tuple of float
        Radians per position, one for each pair of elements that is turned. The first `2 * len(frequencies)` elements of
        a head are turned, the others not; none at all if it is empty.
    interleaved : bool
        Whether neighbours are pairs; else the first half of the turned elements with the second.
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False

    def turns(self, start: int, tokens: int) -> Turns:
        """Cosines and sines at the positions from `start` on."""
        return _turns(self.frequencies, start, tokens)


@lru_cache(maxsize=32)
def _turns(frequencies: tuple[float, ...], start: int, tokens: int) -> Turns:
    """Kept for a while, because all layers of a chunk ask for the same."""
    angles = np.arange(start, start + tokens, dtype=np.float64)[:, None] * np.array(frequencies, np.float64)
    turns = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    turns.flags.writeable = False
    return turns

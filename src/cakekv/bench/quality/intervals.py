"""Bootstrap intervals over documents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

_SAMPLES = 2000


def interval(weighted: Sequence[tuple[float, float]], level: float = 0.95) -> tuple[float, float, float]:
    """A weighted mean over documents and its percentile bootstrap interval; documents are what is drawn.

    Each document is measured with and without the codec, and its value is of that pair: so the intervals are paired.

    Parameters
    ----------
    weighted : sequence of (value, weight)
        One per document; those of weight 0 count for nothing.
    level : float
        Of the interval.

    Returns
    -------
    tuple of float
        Mean, lower end, upper end; not numbers if no document counts.
    """
    values, weights = (np.array(column, np.float64) for column in zip(*weighted, strict=True))
    if not weights.sum():
        return (float("nan"),) * 3
    times = _times_drawn(len(values))
    with np.errstate(invalid="ignore"):
        means = times @ (values * weights) / (times @ weights)
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float((values * weights).sum() / weights.sum()), float(low), float(high)


@cache
def _times_drawn(documents: int) -> npt.NDArray[np.float64]:
    """How often each document is drawn: (samples, documents)."""
    return np.random.default_rng(0).multinomial(documents, [1 / documents] * documents, _SAMPLES).astype(np.float64)

"""Bootstrap intervals over documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

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


def spread(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """The coefficient of variation over documents, standard deviation by mean, and its interval as of `interval`."""
    column = np.array(values, np.float64)
    times = np.vstack([np.ones(len(column)), _times_drawn(len(column))]) / len(column)
    means = times @ column
    coefficients = np.sqrt(np.maximum(times @ column**2 - means**2, 0.0)) / means
    low, high = np.quantile(coefficients[1:], [(1 - level) / 2, (1 + level) / 2])
    return float(coefficients[0]), float(low), float(high)


def figures_of(columns: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """The mean of each column of (value, weight), and `intervals` by name, as JSON can hold them."""
    figures: dict[str, Any] = {}
    intervals: dict[str, list[float | None]] = {}
    for name, column in columns.items():
        mean, low, high = interval(column)
        figures[name] = number(mean)
        intervals[name] = [number(low), number(high)]
    return figures | {"intervals": intervals}


def number(value: Any) -> Any:
    """What JSON can hold of a figure: None for not a number."""
    return None if isinstance(value, float) and math.isnan(value) else value


@cache
def _times_drawn(documents: int) -> npt.NDArray[np.float64]:
    """How often each document is drawn: (samples, documents)."""
    return np.random.default_rng(0).multinomial(documents, [1 / documents] * documents, _SAMPLES).astype(np.float64)

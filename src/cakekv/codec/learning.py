"""Learns a basis for `kvtc`: axes that part what a model would notice from what it would not.

An error d in a plane's elements changes the distribution of the next tokens by about d' F d / 2 nats, where F is the
Fisher information: the mean of g g', g being the gradient of the log likelihood of tokens drawn from the model's own
distribution. Axes are the principal components of the elements once their differences are measured by F. Then all
errors of one size in coefficients matter alike, so that one step for all of them spends the fewest bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cakekv.codec.basis import Array, Basis, PlaneBasis
from cakekv.codec.kvtc import LEAST, costs_of, tables_for

WIDEST = 256
"""Heads are taken together up to so many elements: what more of them would save, decoding would lose."""
_EVENNESS = 0.2
"""The share of a plane's sensitivity that is spread evenly, because few texts do not show all that may matter."""
_EVERY = 4
"""Of the tokens, so many are looked at once for how large coefficients are."""
_STEPS = 72
_GROWTH = 2**-0.25


class Seen(NamedTuple):
    """One plane on one text.

    Attributes
    ----------
    elements : array
        (heads, tokens, width), keys as they are before RoPE.
    gradients : array
        Of the log likelihood, turned likewise.
    """

    elements: Array
    gradients: Array


@dataclass
class _Moments:
    """Sums over all texts of one plane, by block: (blocks, p) and (blocks, p, p)."""

    count: int
    total: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]
    sensitivity: npt.NDArray[np.float64]
    sample: list[Array]


class Learner:
    """Sees a model's planes text by text, and makes a basis of them."""

    def __init__(self) -> None:
        self._moments: dict[tuple[str, int], _Moments] = {}

    def see(self, role: str, layer: int, seen: Seen) -> None:
        """Take in one plane on one text, without the tokens that stay exact anyway."""
        elements, gradients = (_blocks(array) for array in seen)
        blocks, tokens, p = elements.shape
        one = self._moments.setdefault(
            (role, layer),
            _Moments(0, np.zeros((blocks, p)), np.zeros((blocks, p, p)), np.zeros((blocks, p, p)), []),
        )
        one.count += tokens
        one.total += elements.sum(1, dtype=np.float64)
        one.squares += elements.transpose(0, 2, 1) @ elements
        one.sensitivity += gradients.astype(np.float64).transpose(0, 2, 1) @ gradients
        one.sample.append(elements[:, ::_EVERY].copy())

    def basis(self) -> Basis:
        """What was learned.

        Returns
        -------
        Basis
            Without its digest, which it has once it is read from a file.
        """
        planes: dict[tuple[str, int], PlaneBasis] = {}
        samples: dict[tuple[str, int], Array] = {}
        for key, one in sorted(self._moments.items()):
            fitted = [_fitted(*block, one.count) for block in zip(one.total, one.squares, one.sensitivity, strict=True)]
            mean, rows, scale = (np.stack(column).astype(np.float32) for column in zip(*fitted, strict=True))
            rows = rows.astype(np.float16).astype(np.float32)  # as it is kept
            plane = PlaneBasis(mean, rows, scale, np.zeros_like(mean))
            sample = ((np.concatenate(one.sample, 1) - mean[:, None]) @ plane.inverse).astype(np.float32)
            spread = np.maximum(np.abs(sample).mean(1), 1e-30)
            planes[key] = PlaneBasis(mean, rows, scale, spread)
            samples[key] = sample[:, :: max(1, sample.shape[1] // 256)]
        steps, rates = _rates(planes, samples)
        return Basis(planes, steps, rates)


def _blocks(array: Array) -> Array:
    """(heads, tokens, width) as (blocks, tokens, p)."""
    heads, tokens, width = array.shape
    together = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * width <= WIDEST))
    parts = array.reshape(heads // together, together, tokens, width)
    return np.ascontiguousarray(parts.transpose(0, 2, 1, 3).reshape(heads // together, tokens, together * width))


def _fitted(
    total: npt.NDArray[np.float64], squares: npt.NDArray[np.float64], sensitivity: npt.NDArray[np.float64], count: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A block's mean, rows and scales."""
    mean = total / count
    variance = squares / count - np.outer(mean, mean)
    matters = sensitivity / count
    even = np.trace(matters) / len(mean)
    weights, axes = np.linalg.eigh(matters + (_EVENNESS * even + 1e-20) * np.eye(len(mean)))
    roots = np.sqrt(weights)
    into, out = axes * roots, (axes / roots).T
    sizes, turned = np.linalg.eigh(into.T @ variance @ into)
    rows = turned[:, np.argsort(-sizes, kind="stable")].T @ out
    scale = np.linalg.norm(rows, axis=1)
    rows /= scale[:, None]
    rows *= np.sign(rows[np.arange(len(rows)), np.abs(rows).argmax(1)])[:, None]
    return mean, rows, scale


def _rates(
    planes: dict[tuple[str, int], PlaneBasis], samples: dict[tuple[str, int], Array]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Steps, and how many bits an element takes with each."""
    largest = max(float(plane.spread.max()) for plane in planes.values())
    steps = np.array([largest * 8 * _GROWTH**step for step in range(_STEPS)])
    elements = sum(sample.size for sample in samples.values())
    rates = []
    for step in steps:
        bits = 0.0
        for key, plane in planes.items():
            for sizes, sample in zip(plane.spread / step, samples[key], strict=True):
                coded = sizes >= LEAST
                bits += costs_of(sample[:, coded] / step, *tables_for(sizes[coded]))
        rates.append(bits / elements)
    return steps, np.array(list(accumulate(rates, max)))


def learn(texts: Iterable[Iterable[tuple[str, int, Seen]]]) -> Basis:
    """Make a basis of what is seen of all planes, text by text."""
    learner = Learner()
    for text in texts:
        for role, layer, seen in text:
            learner.see(role, layer, seen)
    return learner.basis()

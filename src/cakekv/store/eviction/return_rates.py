"""How often a chunk will be wanted while it is kept, learned from the chunks kept before."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BUCKETS = 48
_EDGES = [0.0] + [math.exp2(step / 2) for step in range(_BUCKETS)]
"""Ages in seconds that begin a bucket, and the end of the last one: half octaves, up to 138 days."""
_LEARN_EVERY = 1000
"""Returns and evictions after which the rates are worked out anew."""
_KEEP = 0.9
"""Weight that what was seen before keeps then."""
_DOUBT_AGE = 5.0
"""Returns at the expected rate that a bucket of ages is assumed to have seen beside those that it did see."""
_DOUBT_CLASS = 20.0
"""The same for a class of chunks."""


class ReturnRates:
    """Returns per second of a chunk, by the time since it was last wanted and by classes that it belongs to.

    Proportional hazards (Cox 1972): a rate by age that all chunks share, times a factor for each class, which is how
    often its chunks came back over how often chunks of their ages do. So what is known of one age holds for all
    classes, and a class whose chunks are evicted young is not taken for one that is not wanted. That eviction should go
    by hits per byte and second of what is kept, learned by class and age, is LHD's idea (Beckmann et al., NSDI 2018).

    Parameters
    ----------
    kinds : int
        How many classes, each of another kind, a chunk belongs to at the same time.
    """

    def __init__(self, kinds: int) -> None:
        self._returned = [0.0] * _BUCKETS
        self._evicted = [0.0] * _BUCKETS
        self._classes: list[dict[int, list[float]]] = [{} for _ in range(kinds)]
        """Per kind and class: returns seen, and expected by age."""
        self._factors: list[dict[int, float]] = [{} for _ in range(kinds)]
        self._products: dict[tuple[int, ...], float] = {}
        self._unlearned = 0
        self._by_age([1.0 / (edge + 10.0) for edge in _EDGES[:-1]])  # until something is known, the newer the better

    def rate(self, age: float, classes: tuple[int, ...]) -> float:
        """Returns per second of keeping a chunk for the best time from now on.

        Parameters
        ----------
        age : float
            Seconds since it was last wanted.
        classes : tuple of int
            One of each kind.
        """
        factor = self._products.get(classes)
        if factor is None:
            factor = 1.0
            for factors, name in zip(self._factors, classes, strict=True):
                factor *= factors.get(name, 1.0)
            self._products[classes] = factor
        return factor * self._best[_bucket(age)]

    def observe(self, age: float, classes: tuple[int, ...], returned: bool) -> None:
        """A chunk of that age was wanted again, or evicted."""
        bucket = _bucket(age)
        (self._returned if returned else self._evicted)[bucket] += 1.0
        expected = self._expected[bucket]
        for seen, name in zip(self._classes, classes, strict=True):
            counts = seen.setdefault(name, [0.0, 0.0])
            counts[0] += returned
            counts[1] += expected
        self._unlearned += 1
        if self._unlearned >= _LEARN_EVERY:
            self._learn()

    def _learn(self) -> None:
        self._unlearned = 0
        self._products.clear()
        kept_s = [0.0] * _BUCKETS
        older = 0.0
        for bucket in reversed(range(_BUCKETS)):
            here = self._returned[bucket] + self._evicted[bucket]
            kept_s[bucket] = (older + here / 2) * (_EDGES[bucket + 1] - _EDGES[bucket])
            older += here
        mean = (sum(self._returned) + 1.0) / (sum(kept_s) + 1.0)
        rates = []
        for bucket in range(_BUCKETS):
            likely = mean * min(1.0, 120.0 / (_EDGES[bucket] + 10.0))
            rates.append((self._returned[bucket] + _DOUBT_AGE) / (kept_s[bucket] + _DOUBT_AGE / likely))
        for seen, factors in zip(self._classes, self._factors, strict=True):
            returns = sum(counts[0] for counts in seen.values()) + 1e-9
            expected = sum(counts[1] for counts in seen.values()) + 1e-9
            for name, counts in seen.items():
                factors[name] = (counts[0] * expected / returns + _DOUBT_CLASS) / (counts[1] + _DOUBT_CLASS)
                counts[0] *= _KEEP
                counts[1] *= _KEEP
        self._returned = [_KEEP * count for count in self._returned]
        self._evicted = [_KEEP * count for count in self._evicted]
        self._by_age(rates)

    def _by_age(self, rates: Sequence[float]) -> None:
        """From the rate at every age, what is expected up to it, and the best mean of any time that begins with it."""
        returns = [0.0]
        for bucket, rate in enumerate(rates):
            returns.append(returns[-1] + rate * (_EDGES[bucket + 1] - _EDGES[bucket]))
        self._expected = returns[:-1]

        def mean(begin: int, end: int) -> float:
            return (returns[end] - returns[begin]) / (_EDGES[end] - _EDGES[begin])

        # The Gittins index: a chunk that is left alone at first but will be wanted is worth waiting for.
        self._best = [max(mean(begin, end) for end in range(begin + 1, _BUCKETS + 1)) for begin in range(_BUCKETS)]


def _bucket(age: float) -> int:
    return 0 if age < 1.0 else min(_BUCKETS - 1, int(2.0 * math.log2(age)) + 1)

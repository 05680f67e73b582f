"""A rate over time, known in advance: bandwidth in bytes per second, or how fast a machine works."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


class Rate:
    """A piecewise constant rate; the last one lasts for ever.

    Parameters
    ----------
    rates : sequence of float
        The rates, not negative, the last one positive.
    period_s : float
        Seconds that each lasts.
    """

    def __init__(self, rates: Sequence[float], period_s: float = 1.0) -> None:
        if not rates or min(rates) < 0 or rates[-1] <= 0 or period_s <= 0:
            raise ValueError("a rate needs values that are not negative, the last of them and the period positive")
        self.rates = tuple(rates)
        self.period_s = period_s
        self._done = [0.0]
        for rate in self.rates[:-1]:
            self._done.append(self._done[-1] + rate * period_s)

    def __call__(self, now: float) -> tuple[float, float]:
        """The rate at `now`, and when it changes next, as `VirtualTier` asks for it."""
        place = self._place(now)
        return self.rates[place], (place + 1) * self.period_s if place + 1 < len(self.rates) else float("inf")

    def _place(self, now: float) -> int:
        place = int(now / self.period_s)
        # now may be a boundary that the division rounds below itself
        if (place + 1) * self.period_s <= now:
            place += 1
        return min(place, len(self.rates) - 1)

    @property
    def mean(self) -> float:
        """The mean of the rates."""
        return sum(self.rates) / len(self.rates)

    def done(self, now: float) -> float:
        """What was done from 0 until `now`: the integral of the rate."""
        place = self._place(now)
        return self._done[place] + self.rates[place] * (now - place * self.period_s)

    def when(self, done: float) -> float:
        """The latest time at which no more than `done` was done; the inverse of `done`."""
        place = bisect_right(self._done, done) - 1
        rate = self.rates[place]
        return place * self.period_s + (done - self._done[place]) / rate

    def done_many(self, now: NDArray[np.float64]) -> NDArray[np.float64]:
        """`done` for many times."""
        place = np.minimum((now / self.period_s).astype(np.int64), len(self.rates) - 1)
        done, rates = self._arrays
        return done[place] + rates[place] * (now - place * self.period_s)

    def when_many(self, done: NDArray[np.float64]) -> NDArray[np.float64]:
        """`when` for many amounts."""
        known, rates = self._arrays
        place = np.searchsorted(known, done, side="right") - 1
        return place * self.period_s + (done - known[place]) / rates[place]

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.array(self._done), np.array(self.rates)

    def ends(self, now: float, work: float) -> float:
        """When `work` begun at `now` ends."""
        return self.when(self.done(now) + work)


STEADY = Rate([1.0])


def pooled(rates: Sequence[Rate]) -> Rate:
    """The sum of several rates.

    Raises
    ------
    ValueError
        They do not change at the same times.
    """
    if len({(rate.period_s, len(rate.rates)) for rate in rates}) != 1:
        raise ValueError("only rates of one period and length can be added")
    return Rate([sum(step) for step in zip(*(rate.rates for rate in rates), strict=True)], rates[0].period_s)

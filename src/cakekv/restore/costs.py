"""What a span costs to compute and a chunk to load: the contracts, and models that learn online from measurements."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from cakekv.restore.read_costs import ReadCost

_NOISE = 0.05
"""Relative noise expected of a span's time."""
_TRUST = (1.0, 1.0, 0.2)
"""How firmly the prior's shape is held, per coefficient: the attention share differs most between machines."""
_MEMORY = 0.97
"""Weight that an observation keeps when the next one arrives."""
_OUTLIER = math.log(1.5)
_SHARED = 0.3
"""Loads share a tier if one alone wastes no more than this part of what several would have delivered beside it."""
_IN_FLIGHT_S = 0.15
"""Seconds of a tier's work that may always be in flight: short beside what a restore takes, long beside a hiccup."""


@dataclass(frozen=True)
class ComputeShape:
    """Seconds of a span as `fixed + linear * n + quadratic * n * (start + n / 2)`, up to a common factor.

    Parameters
    ----------
    fixed : float
        Per span (kernel launches, Python).
    linear : float
        Per token (projections, MLPs).
    quadratic : float
        Per token and position it attends to.
    """

    fixed: float
    linear: float
    quadratic: float

    def seconds(self, start: int, tokens: int) -> float:
        """Seconds of the span of `tokens` tokens that begins at position `start`."""
        return self.fixed + tokens * (self.linear + self.quadratic * (start + 0.5 * tokens))


TYPICAL = ComputeShape(fixed=20e-3, linear=1e-3, quadratic=1e-3 / 4096)
"""A shape to start from where nothing is known: attention costs as much as the rest at 4k tokens of context."""


class ComputeModel(ABC):
    """What spans cost to compute."""

    @property
    @abstractmethod
    def known(self) -> bool:
        """Whether anything was measured, here or before."""

    @property
    @abstractmethod
    def shape(self) -> ComputeShape:
        """The current estimate."""

    @abstractmethod
    def seconds(self, start: int, tokens: int) -> float:
        """Expected seconds of the span of `tokens` tokens that begins at position `start`."""

    @abstractmethod
    def observe(self, start: int, tokens: int, seconds: float) -> None:
        """Learn from a span that took `seconds`."""


class ComputeCost(ComputeModel):
    """Learns what prefill costs on this machine.

    Weighted ridge regression of the three coefficients towards the prior's shape, on relative errors, with a slowly
    fading memory; a fast multiplicative correction follows a machine that suddenly has more or less to give. A single
    outlier is doubted, a second one in the same direction believed.

    Parameters
    ----------
    prior : ComputeShape
        The shape assumed before anything was measured.
    trusted : bool
        True if `prior` was measured (a stored calibration) rather than assumed.
    """

    def __init__(self, prior: ComputeShape = TYPICAL, trusted: bool = False) -> None:
        self._prior = prior
        self._fit = prior
        self._moments = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3
        self._measured = 0.0
        self._expected = 0.0
        self._log_scale = 0.0
        self._doubted: tuple[int, int, float] | None = None
        self._known = trusted

    @property
    def known(self) -> bool:
        return self._known

    @property
    def shape(self) -> ComputeShape:
        scale = math.exp(self._log_scale)
        return ComputeShape(self._fit.fixed * scale, self._fit.linear * scale, self._fit.quadratic * scale)

    def seconds(self, start: int, tokens: int) -> float:
        return self._fit.seconds(start, tokens) * math.exp(self._log_scale)

    def observe(self, start: int, tokens: int, seconds: float) -> None:
        if tokens <= 0 or seconds <= 0:
            return
        if self.known:
            surprise = math.log(seconds / self.seconds(start, tokens))
            if abs(surprise) > _OUTLIER:
                doubted, self._doubted = self._doubted, (start, tokens, surprise)
                if doubted is None or (doubted[2] > 0) != (surprise > 0):
                    return
            else:
                self._doubted = None
        self._learn(start, tokens, seconds)
        correction = math.log(seconds / self._fit.seconds(start, tokens))
        self._log_scale += 0.5 * (correction - self._log_scale) if self.known else correction
        self._known = True

    def _learn(self, start: int, tokens: int, seconds: float) -> None:
        prior = self._prior
        features = (prior.fixed, prior.linear * tokens, prior.quadratic * tokens * (start + 0.5 * tokens))
        weight = 1.0 / (_NOISE * seconds) ** 2
        for i in range(3):
            self._targets[i] = _MEMORY * self._targets[i] + weight * features[i] * seconds
            for j in range(3):
                self._moments[i][j] = _MEMORY * self._moments[i][j] + weight * features[i] * features[j]
        self._measured = _MEMORY * self._measured + seconds
        self._expected = _MEMORY * self._expected + sum(features)
        common = self._measured / self._expected
        held = [trust / common**2 for trust in _TRUST]
        matrix = [[self._moments[i][j] + (held[i] if i == j else 0.0) for j in range(3)] for i in range(3)]
        factors = _solve(matrix, [self._targets[i] + held[i] * common for i in range(3)])
        fixed, linear, quadratic = (max(factor, 0.02 * common) for factor in factors)
        self._fit = ComputeShape(prior.fixed * fixed, prior.linear * linear, prior.quadratic * quadratic)


def _solve(a: list[list[float]], b: list[float]) -> list[float]:
    """Solve a positive definite 3×3 system by Gaussian elimination."""
    rows = [[*a[i], b[i]] for i in range(3)]
    for i in range(3):
        for j in range(i + 1, 3):
            factor = rows[j][i] / rows[i][i]
            for k in range(i, 4):
                rows[j][k] -= factor * rows[i][k]
    x = [0.0] * 3
    for i in (2, 1, 0):
        x[i] = (rows[i][3] - sum(rows[i][k] * x[k] for k in range(i + 1, 3))) / rows[i][i]
    return x


@dataclass(frozen=True)
class LoadFigures:
    """What a tier was found to cost.

    Parameters
    ----------
    byte_s : float
        Seconds per byte while the tier is busy.
    load_s : float
        Seconds that one load takes, from its request.
    load_bytes : float
        Bytes of such a load.
    alone_s : float
        Seconds that it takes with the tier to itself; 0.0 if that is not known.
    """

    byte_s: float
    load_s: float
    load_bytes: float
    alone_s: float


class LoadModel(ABC):
    """What loads from one tier cost. Sizes are bytes."""

    @property
    @abstractmethod
    def known(self) -> bool:
        """Whether anything was measured, here or before."""

    @property
    @abstractmethod
    def measured(self) -> bool:
        """Whether anything was measured here."""

    @property
    @abstractmethod
    def last_completed(self) -> float | None:
        """When the last load was done, on the clock of `observe`."""

    @property
    @abstractmethod
    def figures(self) -> LoadFigures:
        """The current estimate; only if something is `known`."""

    @abstractmethod
    def seconds(self, size: int) -> float:
        """Seconds that `size` more bytes keep the tier busy; 0.0 while nothing is known."""

    @abstractmethod
    def duration(self, size: int) -> float:
        """Seconds from the request for `size` bytes until they are placed; 0.0 while nothing is known."""

    @abstractmethod
    def is_shared(self, size: int) -> bool:
        """Whether loads of `size` bytes in flight beside each other mostly slow each other down.

        So it is behind a link that one load fills; not on a device that needs several. Unknown counts as no.
        """

    @abstractmethod
    def useful_loads(self, size: int) -> int:
        """How many loads of `size` bytes in flight keep the tier busy: more would only end later, all of them."""

    @abstractmethod
    def observe(self, size: int, began: float, ended: float, alone: bool = False) -> None:
        """Learn from a load.

        Parameters
        ----------
        size : int
            Bytes.
        began, ended : float
            When it was requested and done, in seconds of any one clock.
        alone : bool
            Whether no other load was in flight meanwhile.
        """

    @property
    @abstractmethod
    def request_s(self) -> float:
        """Seconds that a read takes however small it is, as far as `observe_read` tells."""

    @abstractmethod
    def observe_read(self, size: int, began: float, ended: float, beside: float = 1.0) -> None:
        """Learn from a read of a part of a chunk. These differ in size, and small ones are mostly waiting.

        Parameters
        ----------
        size : int
            Bytes.
        began, ended : float
            As of `observe`.
        beside : float
            How many reads were in flight on average meanwhile, this one included. No loads were.
        """


class LoadCost(LoadModel):
    """Learns how fast one tier delivers chunks.

    Three figures: seconds per byte while the tier is busy (from the intervals between completions, so that parallel
    reads count once), the duration of a load among others (for what is in flight), and of one that had the tier to
    itself, which tells whether parallel reads gain anything. All fade within a few chunks. Reads of parts of chunks
    tell what a byte costs, once what a request costs is taken off; durations of loads are taken to change as that does.

    Parameters
    ----------
    depth : int
        Loads the tier serves at a time; completions of parallel loads come in bunches, so the memory spans several.
    prior : LoadFigures or None
        What was measured some other time. It counts as one load, and no further than the first load allows.
    """

    def __init__(self, depth: int = 1, prior: LoadFigures | None = None) -> None:
        self._depth = depth
        self._memory_loads = 3.0 + 2.0 * depth
        self._bytes = 0.0
        self._busy_s = 0.0
        self._duration_s = 0.0
        self._duration_bytes = 1.0
        self._alone_s = 0.0
        self._alone_bytes = 1.0
        self._last_completed: float | None = None
        self._reads = ReadCost()
        self._request_s = 0.0
        self._last_read: float | None = None
        self._seen_busy = prior is not None
        """Whether any load had others beside it."""
        if prior is not None:
            self._bytes, self._busy_s = prior.load_bytes, prior.byte_s * prior.load_bytes
            self._duration_s, self._duration_bytes = prior.load_s, prior.load_bytes
            self._alone_s, self._alone_bytes = prior.alone_s, prior.load_bytes

    @property
    def known(self) -> bool:
        return self._bytes > 0

    @property
    def measured(self) -> bool:
        return self.last_completed is not None

    @property
    def last_completed(self) -> float | None:
        # Of loads alone it says when the tier began with the next one: reads are not counted in what that took.
        both = [at for at in (self._last_completed, self._last_read) if at is not None]
        return max(both, default=None)

    @property
    def request_s(self) -> float:
        return self._request_s

    @property
    def figures(self) -> LoadFigures:
        size = self._duration_bytes
        alone_s = self._alone_s * size / self._alone_bytes
        return LoadFigures(self._busy_s / self._bytes, self._duration_s, size, alone_s)

    def seconds(self, size: int) -> float:
        return size * self._busy_s / self._bytes if self._bytes > 0 else 0.0

    def duration(self, size: int) -> float:
        return self._duration_s * size / self._duration_bytes

    def is_shared(self, size: int) -> bool:
        if not self._alone_s or self._depth == 1:
            return False
        lost_s = self._alone_s * size / self._alone_bytes - self.seconds(size)
        return lost_s < _SHARED * (self._depth - 1) * self.seconds(size)

    def useful_loads(self, size: int) -> int:
        # As many as the tier serves while one passes through it alone (Little's law), and one more, so that a figure
        # which is too low corrects itself; at the least some time's worth, since clients and servers are held up at
        # times. One, while nothing is known, and all that it serves at a time, until both figures are.
        if not self.known:
            return 1
        seconds = self.seconds(size)
        if not self._alone_s or not self._seen_busy or not seconds:
            return self._depth
        # A tenth is noise, which must not double what is in flight.
        passing = 1 + math.ceil(0.9 * self._alone_s * size / self._alone_bytes / seconds)
        return min(self._depth, max(passing, int(_IN_FLIGHT_S / seconds)))

    def observe(self, size: int, began: float, ended: float, alone: bool = False) -> None:
        if size <= 0 or ended <= began:
            return
        if self._last_completed is None:
            self._doubt_prior(size, ended - began)
        busy_from = began if self._last_completed is None else max(began, self._last_completed)
        interval = max(ended - busy_from, 0.0)
        self._last_completed = ended if self._last_completed is None else max(ended, self._last_completed)
        # What is known fades with the time it took, not with every completion: parallel loads end in bunches.
        expected = self.seconds(size)
        keep = math.exp(-interval / (self._memory_loads * max(expected, interval / 4))) if expected > 0 else 1.0
        self._bytes = keep * self._bytes + size
        self._busy_s = keep * self._busy_s + interval
        self._seen_busy |= not alone
        if alone:
            fresh = 1.0 if not self._alone_s else 0.4
            self._alone_s += fresh * (ended - began - self._alone_s)
            self._alone_bytes += fresh * (size - self._alone_bytes)
        fresh = 1.0 if not self._duration_s else 0.4
        self._duration_s += fresh * (ended - began - self._duration_s)
        self._duration_bytes += fresh * (size - self._duration_bytes)

    def observe_read(self, size: int, began: float, ended: float, beside: float = 1.0) -> None:
        if size <= 0 or ended <= began:
            return
        before = self._busy_s / self._bytes if self.known else 0.0
        self._reads.observe(size, ended - began, beside)
        self._request_s, byte_s = self._reads.fit(before)
        self._last_read = ended if self._last_read is None else max(ended, self._last_read)
        if before:
            self._alone_s *= byte_s / before
            self._duration_s *= byte_s / before
        else:
            self._bytes = self._duration_bytes = float(size)
            self._duration_s = size * byte_s
        self._busy_s = self._bytes * byte_s

    def _doubt_prior(self, size: int, seconds: float) -> None:
        """Bring the prior to what the first load allows: it was alone on the tier, or beside `depth - 1` others."""
        if self._bytes > 0:
            prior_s = self._busy_s / self._bytes
            byte_s = min(max(prior_s, seconds / size / self._depth), seconds / size)
            self._bytes = min(self._bytes, float(size))
            self._busy_s = byte_s * self._bytes
            self._alone_s *= byte_s / prior_s
            self._duration_s = 0.0

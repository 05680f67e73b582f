"""What reads of many sizes cost: so much per request, and so much per byte."""

from __future__ import annotations

_MEMORY = 0.93
"""Weight that a read keeps when the next one comes."""
_TO_BYTES = 0.02
"""How firmly a request is held to cost nothing: if all reads have one size, all of their time is taken to be bytes'."""
_HOLD = 1.0
"""How firmly bytes are held to cost what is known of them. Reads that are mostly waiting say little of it."""
_LEAST = 0.02
"""Of what an average read takes, the part that is taken to be its bytes', at the least."""


class ReadCost:
    """Learns it from reads that share a tier.

    Weighted regression with a fading memory. A byte counts as often as there are reads in flight: so many share what
    the tier delivers. Reads weigh by their size, and not by their time, so that a tier is believed to be slow
    as soon as to be fast.
    """

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._request_bytes = 0.0
        """How many bytes a request costs as much as."""

    def observe(self, size: int, seconds: float, beside: float) -> None:
        """Learn from a read of `size` bytes, while which `beside` were in flight on average, it included."""
        x = size * max(1.0, beside)
        weight = 1.0 / (x + self._request_bytes) ** 2
        self._weight = _MEMORY * self._weight + weight
        self._x = _MEMORY * self._x + weight * x
        self._y = _MEMORY * self._y + weight * seconds
        self._xx = _MEMORY * self._xx + weight * x * x
        self._xy = _MEMORY * self._xy + weight * x * seconds

    def fit(self, known_byte_s: float = 0.0) -> tuple[float, float]:
        """Seconds per request, and per byte while the tier is busy; of what was observed.

        Parameters
        ----------
        known_byte_s : float
            What is known of the latter; 0.0 for nothing.
        """
        held = _HOLD if known_byte_s else 0.0
        weight, xx, xy = self._weight * (1 + _TO_BYTES), self._xx + held, self._xy + held * known_byte_s
        byte_s = (weight * xy - self._x * self._y) / (weight * xx - self._x**2)
        byte_s = max(min(byte_s, xy / xx), _LEAST * self._y / self._x)  # neither costs less than nothing
        request_s = max(0.0, (self._y - self._x * byte_s) / weight)
        self._weigh(request_s / byte_s)
        return request_s, byte_s

    def _weigh(self, request_bytes: float) -> None:
        """Have reads weigh as if a request cost as much as so many bytes: those to come, and about so those before."""
        usual = self._x / self._weight
        factor = ((usual + self._request_bytes) / (usual + request_bytes)) ** 2
        self._request_bytes = request_bytes
        for name in ("_weight", "_x", "_y", "_xx", "_xy"):
            setattr(self, name, factor * getattr(self, name))

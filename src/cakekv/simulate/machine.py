"""A virtual clock that drives the planner: compute and tiers are cost functions instead of an engine and stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cakekv.restore.flights import Load
from cakekv.restore.planner import Span, Wait
from cakekv.restore.protocol import PlannerProtocol

ComputeTime = Callable[[Span, float], float]
"""(span, now) to the seconds it takes."""


def undisturbed(seconds: Callable[[int, int], float]) -> ComputeTime:
    """A machine that nobody else uses: a span takes `seconds` of its start and its tokens, whenever it is computed."""
    return lambda span, now: seconds(span.start, span.tokens)


@dataclass
class VirtualTier:
    """A tier whose loads in flight share its bandwidth evenly.

    Parameters
    ----------
    bandwidth : callable
        (now) to (bytes per second, time at which that changes next, in seconds; infinity for never).
    latency_s : float
        Seconds before a load's first byte.
    """

    bandwidth: Callable[[float], tuple[float, float]]
    latency_s: float = 0.0


def constant(bytes_per_s: float) -> Callable[[float], tuple[float, float]]:
    """A bandwidth that never changes."""
    return lambda now: (bytes_per_s, float("inf"))


def run_restore(
    planner: PlannerProtocol, compute_time: ComputeTime, tiers: Sequence[VirtualTier], now: float = 0.0, groups: int = 1
) -> float:
    """Drive one restore to its end.

    Parameters
    ----------
    planner : PlannerProtocol
        Decides the restore; fresh, begun at `now`.
    compute_time : callable
        What spans really take.
    tiers : sequence of VirtualTier
        One per tier of the planner.
    now : float
        Seconds on the virtual clock.
    groups : int
        Groups of layers that a layered span goes through one after the other, each in the same time.

    Returns
    -------
    float
        The clock when every position was covered.
    """
    flights: list[list[_Flight]] = [[] for _ in tiers]
    span: Span | None = None
    span_ends = float("inf")
    layers = _Layers(0, 0.0)
    look_again = float("inf")
    while True:
        if span is None:
            answer = planner.next_compute(now)
            if answer is None:
                return now
            if isinstance(answer, Wait):
                look_again = max(answer.until, now + 1e-6)
            else:
                span, look_again = answer, float("inf")
                layers = _Layers(groups if span.layered else 1, compute_time(span, now))
                span_ends = layers.go_on(planner, span, now)
        for index, tier in enumerate(tiers):
            for flight in [flight for flight in flights[index] if flight.load.cancelled]:
                flights[index].remove(flight)
                planner.abandoned(flight.load, int(flight.load.size - flight.left), now)
            while (load := planner.next_load(index, now)) is not None:
                flights[index].append(_Flight(load, float(load.size), now + tier.latency_s))
        upcoming = min(span_ends, look_again, *(_next_event(t, f, now) for t, f in zip(tiers, flights, strict=True)))
        for tier, loads in zip(tiers, flights, strict=True):
            _deliver(tier, loads, now, upcoming)
        now = upcoming
        for loads in flights:
            for flight in [flight for flight in loads if flight.left <= 1e-3]:
                loads.remove(flight)
                if planner.arrived(flight.load, now):
                    planner.placed(flight.load, now)
        if span is not None and now >= span_ends:
            layers.left -= 1
            span_ends = float("inf")
            if not layers.left:
                planner.computed(span, now, layers.waited_s)
                span = None
        if span is not None and span_ends == float("inf"):
            span_ends = layers.go_on(planner, span, now)


class _Layers:
    """How far a span has come through the groups of layers."""

    def __init__(self, groups: int, seconds: float) -> None:
        self.groups = self.left = groups
        self.waited_s = 0.0
        self._each_s = seconds / max(groups, 1)
        self._stopped: float | None = None

    def go_on(self, planner: PlannerProtocol, span: Span, now: float) -> float:
        """When the next group will be through; infinity if it has to wait for loads."""
        if span.layered and not planner.layer_ready(self.groups - self.left):
            self._stopped = now if self._stopped is None else self._stopped
            return float("inf")
        if self._stopped is not None:
            self.waited_s += now - self._stopped
            self._stopped = None
        return now + self._each_s


@dataclass(eq=False)
class _Flight:
    load: Load
    left: float
    flows_from: float


def _next_event(tier: VirtualTier, flights: list[_Flight], now: float) -> float:
    if not flights:
        return float("inf")
    rate, changes = tier.bandwidth(now)
    flowing = [flight for flight in flights if flight.flows_from <= now]
    waiting = [flight.flows_from for flight in flights if flight.flows_from > now]
    done = now + min(flight.left for flight in flowing) * len(flowing) / rate if flowing and rate > 0 else float("inf")
    return min(changes, done, *waiting)


def _deliver(tier: VirtualTier, flights: list[_Flight], now: float, until: float) -> None:
    flowing = [flight for flight in flights if flight.flows_from <= now]
    for flight in flowing:
        flight.left -= tier.bandwidth(now)[0] * (until - now) / len(flowing)

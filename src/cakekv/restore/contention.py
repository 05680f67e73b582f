"""What a restore sees of the arms while other requests use them: the same costs, and the time it waits for its turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cakekv.restore.costs import ComputeModel, ComputeShape, LoadFigures, LoadModel
from cakekv.restore.priority.base import Kind, Policy, RequestState

_PROBE_SHARE = 0.5
"""A tier that once was slow is taken to deliver a chunk in this share of the prompt's compute time."""


@dataclass
class Burden:
    """How many times as long either arm takes for a request as it would alone: others are served before it."""

    compute: float = 1.0
    load: dict[int, float] = field(default_factory=dict)
    """Per tier; 1.0 where there is none."""


def burdens(requests: Sequence[RequestState], policy: Policy, now: float) -> dict[str, Burden]:
    """What the open prefills are to each other.

    A request with t seconds of work of its own is through after `ahead + t` seconds, where `ahead` is how long those
    before it keep the arm busy. Decodes are left out: their steps are short.

    Parameters
    ----------
    requests : sequence of RequestState
        All open ones, with unique ids.
    policy : Policy
        Orders them.
    now : float
        Seconds on the clock of `RequestState.arrived_s`.
    """
    requests = [request for request in requests if request.kind is not Kind.DECODE]
    result = {request_id: Burden(load=load) for request_id, load in load_burdens(requests, policy, now).items()}
    ahead_s = 0.0
    for request in policy.compute_order(requests, now):
        result[request.request_id].compute = _burden(ahead_s, _compute_s(request))
        ahead_s += _both_s(request)
    return result


def load_burdens(requests: Sequence[RequestState], policy: Policy, now: float) -> dict[str, dict[int, float]]:
    """The part of `burdens` that concerns loads, for prefills: per request, as in `Burden`."""
    result: dict[str, dict[int, float]] = {request.request_id: {} for request in requests}
    both_s = {request.request_id: _both_s(request) for request in requests}
    for tier in {tier for request in requests for tier in request.load_s}:
        ahead_s = 0.0
        for request in policy.load_order(requests, tier, now):
            own_s = request.tokens * request.load_s[tier]
            result[request.request_id][tier] = _burden(ahead_s, own_s)
            ahead_s += both_s[request.request_id]
    return result


def _burden(ahead_s: float, own_s: float) -> float:
    return 1.0 + ahead_s / own_s if own_s > 0 else 1.0


def _compute_s(request: RequestState) -> float:
    return request.tokens * 0.5 * (request.front_s + request.back_s)


def _both_s(request: RequestState) -> float:
    """Seconds until both arms together are through with it; a tier of unknown speed counts as much as compute."""
    compute_s = _compute_s(request)
    rates = sum(1.0 / token_s for token_s in request.load_s.values() if token_s > 0)
    if compute_s <= 0 or not request.load_s:
        return compute_s
    load_s = request.tokens / rates if rates > 0 else compute_s
    return compute_s * load_s / (compute_s + load_s)


class SharedCompute(ComputeModel):
    """One request's view of a compute cost that all requests learn together."""

    def __init__(self, cost: ComputeModel) -> None:
        self._cost = cost
        self.burden = 1.0

    @property
    def known(self) -> bool:
        return self._cost.known

    @property
    def shape(self) -> ComputeShape:
        shape, burden = self._cost.shape, self.burden
        if burden == 1.0:
            return shape
        return ComputeShape(shape.fixed * burden, shape.linear * burden, shape.quadratic * burden)

    def seconds(self, start: int, tokens: int) -> float:
        return self._cost.seconds(start, tokens) * self.burden

    def observe(self, start: int, tokens: int, seconds: float) -> None:
        self._cost.observe(start, tokens, seconds)


class SharedLoad(LoadModel):
    """One request's view of a tier's cost that all requests learn together.

    Parameters
    ----------
    cost : LoadModel
        The tier's. Its bandwidth is learned from the completions of all requests' loads.
    share_read : float
        Bytes that the tier reads to each byte that the request plans with, which plans with the same for every tier:
        fewer where chunks are packed. What is learned, it is told in bytes read.

    Attributes
    ----------
    burden : float
        As in `Burden`.
    crowded_s : float
        When other requests last used the tier, on the clock of `observe`.
    """

    def __init__(self, cost: LoadModel, share_read: float = 1.0) -> None:
        self._cost = cost
        self._share_read = share_read
        self._doubt = 1.0
        self.burden = 1.0
        self.crowded_s = float("-inf")

    def doubt(self, size: int, prompt_s: float) -> None:
        """Make sure that a chunk of `size` bytes is tried, however slow the tier once was.

        Otherwise a tier that is believed slow would never be used, and never be found to be fast. `prompt_s` is how
        many seconds computing the whole prompt takes.
        """
        expected_s = self._cost.seconds(self._read(size))
        if expected_s > 0 and not self._cost.measured:
            self._doubt = min(1.0, _PROBE_SHARE * prompt_s / expected_s)

    @property
    def known(self) -> bool:
        return self._cost.known

    @property
    def measured(self) -> bool:
        return self._cost.measured

    @property
    def last_completed(self) -> float | None:
        return self._cost.last_completed

    @property
    def figures(self) -> LoadFigures:
        return self._cost.figures

    def seconds(self, size: int) -> float:
        return self._cost.seconds(self._read(size)) * self._factor

    def duration(self, size: int) -> float:
        return self._cost.duration(self._read(size)) * (1.0 if self._cost.measured else self._doubt)

    def is_shared(self, size: int) -> bool:
        return self._cost.is_shared(self._read(size))

    def useful_loads(self, size: int) -> int:
        return self._cost.useful_loads(self._read(size))

    def observe(self, size: int, began: float, ended: float, alone: bool = False) -> None:
        self._cost.observe(size, began, ended, alone and began > self.crowded_s)

    @property
    def request_s(self) -> float:
        return self._cost.request_s

    def observe_read(self, size: int, began: float, ended: float, beside: float = 1.0) -> None:
        self._cost.observe_read(size, began, ended, beside)

    def _read(self, size: int) -> int:
        return round(size * self._share_read)

    @property
    def _factor(self) -> float:
        return self.burden if self._cost.measured else self.burden * self._doubt

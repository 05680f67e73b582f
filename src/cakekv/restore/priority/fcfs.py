"""First come, first served: what engines do by default."""

from __future__ import annotations

from cakekv.restore.priority.base import Policy, RequestState


class FirstComeFirstServed(Policy):
    """Prefills in order of arrival, stored prefix or not; loads likewise."""

    name = "fcfs"

    def compute_rank(self, request: RequestState) -> tuple[float, ...]:
        return ()

    def load_rank(self, request: RequestState, tier: int) -> tuple[float, ...]:
        return ()

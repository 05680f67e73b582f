"""Cake's adaptive scheduling (arXiv 2410.03065, section 3.3): compute goes first to those that I/O cannot help."""

from __future__ import annotations

from cakekv.restore.priority.base import Policy, RequestState


class CakeOrder(Policy):
    """Within a step 1. decodes, 2. prefills without a stored prefix, 3. prefills with one; each in order of arrival."""

    name = "cake"

    def compute_rank(self, request: RequestState) -> tuple[float, ...]:
        return (request.kind,)

    def load_rank(self, request: RequestState, tier: int) -> tuple[float, ...]:
        return ()

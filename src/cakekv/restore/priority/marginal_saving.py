"""Both arms work where they save most, as CacheFlow argues (arXiv 2604.25080)."""

from __future__ import annotations

from cakekv.restore.priority.base import Kind, Policy, RequestState


class MarginalSaving(Policy):
    """Cake's classes; among restores, each arm goes where a second of it spares most of the other arm's time.

    A second of I/O loads `1 / load_s` tokens at the back frontier and spares `back_s / load_s` seconds of compute:
    most for long prefixes (late tokens attend to more) and fast tiers. A second of compute covers `1 / front_s` tokens
    and spares `load_s / front_s` seconds of I/O: most for short prefixes and slow tiers. Of equals, the restore with
    the fewest tokens left gets the compute, since it is done soonest.
    """

    name = "marginal_saving"

    def compute_rank(self, request: RequestState) -> tuple[float, ...]:
        if request.kind is not Kind.STORED_PREFILL:
            return (request.kind,)
        if not request.load_s:
            # All that is left is the suffix, which only compute can cover: no second of it is spared by waiting.
            return (request.kind, float("-inf"), request.tokens)
        saving = min(request.load_s.values()) / request.front_s if request.front_s > 0 else float("inf")
        return (request.kind, -saving, request.tokens)

    def load_rank(self, request: RequestState, tier: int) -> tuple[float, ...]:
        seconds = request.load_s[tier]
        return (-request.back_s / seconds if seconds > 0 else float("-inf"),)

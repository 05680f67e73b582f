"""Plans one prompt's restore, from what is stored of it and what both arms cost. Runs nothing."""

from __future__ import annotations

from time import monotonic
from typing import Any

from cakekv.embedded.arbiter import Request
from cakekv.embedded.arms import Arms
from cakekv.embedded.stored import Found
from cakekv.load.pieces import levels_of
from cakekv.restore.contention import Burden, SharedCompute, SharedLoad
from cakekv.restore.explanation import PlannedRun
from cakekv.restore.options import Mode, PlannerOptions
from cakekv.restore.planner import Planner
from cakekv.restore.priority import RequestState
from cakekv.reuse.blend import Blend


class Planning:
    """A prompt's planner, and how the prompt looks to those that it takes turns with (`OpenPrefill`).

    All but the constructor is called with the arbiter's lock held.

    Parameters
    ----------
    arms : Arms
        What compute and the tiers cost, and the options.
    request : Request
        Whose prompt it is.
    prompt_tokens : int
        Its length.
    found : Found
        What is stored of it.
    mode : {"auto", "compute", "load", "both"}
        As in `PlannerOptions`.

    Attributes
    ----------
    request, found
        As given.
    planner : Planner
        Decides.
    loads : bool
        Whether there is anything to load.
    """

    def __init__(self, arms: Arms[Any, Any], request: Request, prompt_tokens: int, found: Found, mode: Mode) -> None:
        options, layout, coder = arms.options, arms.engine.layout, arms.coder
        shape = coder.expected([size for sizes in found.sizes for size in sizes])
        levels = levels_of(coder, shape, layout.unwindowed, arms.groups, options.quality_floor)
        self._arms = arms
        self.request = request
        self.found = found
        self._chunk_bytes = levels[-1].chunk_bytes
        self._compute_cost = SharedCompute(arms.compute_cost)
        shares = [coder.share_read(sizes) for sizes in found.sizes]
        self._chunk_bytes_read = [round(self._chunk_bytes * share) for share in shares]
        self._load_costs = [SharedLoad(tier.cost, share) for tier, share in zip(arms.tiers, shares, strict=True)]
        for load_cost in self._load_costs:
            load_cost.doubt(self._chunk_bytes, arms.compute_cost.seconds(0, prompt_tokens))
        self.loads = any(found.holders) and mode != "compute"
        self.planner = Planner(
            prompt_tokens,
            shape.tokens,
            found.holders,
            [tier._replace(cost=cost) for tier, cost in zip(arms.tiers, self._load_costs, strict=True)],
            self._compute_cost,
            levels,
            PlannerOptions(
                mode=mode,
                max_span_tokens=options.max_span_tokens,
                window=None if found.starts is not None and isinstance(options.reuse, Blend) else layout.window,
                ttft_target_s=options.ttft_target_s,
                deadline_s=options.deadline_s,
            ),
            starts=found.starts,
            now=request.arrived_s,
        )

    def runs(self) -> list[PlannedRun]:
        """The plan as it stands."""
        return self.planner.explain(monotonic())

    def state(self) -> RequestState:
        """As `OpenPrefill.state`."""
        planner, coverage = self.planner, self.planner.coverage
        return RequestState.prefill(
            self.request.id,
            self.request.arrived_s,
            coverage.uncovered_tokens,
            stored=self.loads,
            shape=self._arms.compute_cost.shape,
            span_tokens=self._arms.options.max_span_tokens,
            front=coverage.start_of(coverage.front),
            back=planner.latest.back,
            load_s={tier: self._token_s(tier) for tier in coverage.tiers_left()} if self.loads else {},
            prefix_tokens=planner.prefix_tokens,
        )

    def _token_s(self, tier: int) -> float:
        return self._arms.tiers[tier].cost.seconds(self._chunk_bytes_read[tier]) / self.planner.chunk_tokens

    def bear(self, burden: Burden) -> None:
        """Plan with what the others leave of either arm."""
        self._compute_cost.burden = burden.compute
        for tier, cost in enumerate(self._load_costs):
            cost.burden = burden.load.get(tier, 1.0)
            cost.crowded_s = monotonic()

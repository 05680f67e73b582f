"""What one prompt's restore is planned from: what is stored of it, and what both arms cost it. Nothing runs here."""

from __future__ import annotations

from time import monotonic
from typing import Any

from cakekv.embedded.arbiter import Request
from cakekv.embedded.arms import Arms
from cakekv.embedded.stored import Found
from cakekv.load.pieces import levels_of
from cakekv.restore.contention import Burden, SharedCompute, SharedLoad
from cakekv.restore.explanation import PlannedRun
from cakekv.restore.planner import Mode, Planner
from cakekv.restore.priority import RequestState


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
        As in `Planner`.

    Attributes
    ----------
    planner : Planner
        Decides.
    loads : bool
        Whether there is anything to load.
    """

    def __init__(self, arms: Arms[Any, Any], request: Request, prompt_tokens: int, found: Found, mode: Mode) -> None:
        options, layout, shape = arms.options, arms.engine.layout, arms.coder.expected(found.sizes)
        *coarser, best = levels_of(arms.coder, shape, layout.unwindowed, arms.groups, options.quality_floor)
        self._arms = arms
        self._request = request
        self._chunk_bytes = best.chunk_bytes
        self._compute_cost = SharedCompute(arms.compute_cost)
        self._load_costs = [SharedLoad(source.cost) for source in arms.sources]
        for load_cost in self._load_costs:
            load_cost.doubt(best.chunk_bytes, arms.compute_cost.seconds(0, prompt_tokens))
        self.loads = any(found.holders) and mode != "compute"
        self.planner = Planner(
            prompt_tokens,
            shape.tokens,
            found.holders,
            [source._replace(cost=cost) for source, cost in zip(arms.sources, self._load_costs, strict=True)],
            self._compute_cost,
            chunk_bytes=best.chunk_bytes,
            unwindowed_chunk_bytes=best.unwindowed_chunk_bytes,
            coarser=coarser,
            ttft_target_s=options.ttft_target_s,
            window=layout.window,
            groups=best.groups,
            mode=mode,
            max_span_tokens=options.max_span_tokens,
            patience_s=options.deadline_s,
            deadline_s=options.deadline_s,
            now=request.arrived_s,
        )

    def runs(self) -> list[PlannedRun]:
        """The plan as it stands."""
        return self.planner.explain(monotonic())

    def state(self) -> RequestState:
        """As `OpenPrefill.state`."""
        planner, coverage = self.planner, self.planner.coverage
        tokens = min(len(coverage.uncovered) * coverage.chunk_tokens, planner.prompt_tokens)
        return RequestState.prefill(
            self._request.id,
            self._request.arrived_s,
            tokens,
            stored=self.loads,
            shape=self._arms.compute_cost.shape,
            span_tokens=self._arms.options.max_span_tokens,
            front=coverage.start_of(coverage.front),
            back=planner.latest.back,
            load_s={source: self._token_s(source) for source in coverage.sources_left()} if self.loads else {},
            prefix_tokens=planner.prefix_tokens,
        )

    def _token_s(self, source: int) -> float:
        return self._arms.sources[source].cost.seconds(self._chunk_bytes) / self.planner.chunk_tokens

    def bear(self, burden: Burden) -> None:
        """Plan with what the others leave of either arm."""
        self._compute_cost.burden = burden.compute
        for source, cost in enumerate(self._load_costs):
            cost.burden = burden.load.get(source, 1.0)
            cost.crowded_s = monotonic()

"""Reports of restores on a virtual clock, for everything that draws them."""

from __future__ import annotations

from cakekv.restore.costs import ComputeCost, LoadCost
from cakekv.restore.flights import Tier
from cakekv.restore.level_choice import Level
from cakekv.restore.planner import Mode, Planner, PlannerOptions
from cakekv.restore.report import RestoreReport
from cakekv.simulate.machine import VirtualTier, constant, run_restore


def synthetic_report(
    mode: Mode, *, prompt: int = 7020, missing: range = range(0), bandwidth: float = 350.0
) -> RestoreReport:
    """A restore with chunks of 64 tokens and "bytes" of one token; a span of n tokens takes about n / 350 s."""
    stored = [() if chunk in missing else (0,) for chunk in range(prompt // 64)]
    restore = Planner(
        prompt,
        64,
        stored,
        [Tier("disk", LoadCost(2), 2)],
        ComputeCost(),
        [Level.whole(64)],
        PlannerOptions(mode=mode),
    )
    tier = VirtualTier(constant(bandwidth))
    restore.report().ttft_s = run_restore(
        restore, lambda span, now: 0.05 + span.tokens * (1 + span.start / 14000) / 450, [tier]
    )
    return restore.report()

"""What a study found, group by group, and whether it is what was aimed at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cakekv.simulate.study import Outcome

_WORST_LISTED = 10


@dataclass(frozen=True)
class Group:
    """The restores of one kind: time over the optimum, and over the better arm."""

    name: str
    count: int
    median: float
    p99: float
    worst: float
    arm_median: float
    arm_worst: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


def group(name: str, outcomes: Sequence[Outcome]) -> Group:
    """Sum up outcomes, of which there is at least one."""
    ratios = np.array([outcome.ratio for outcome in outcomes])
    arms = np.array([outcome.against_better_arm for outcome in outcomes])
    return Group(
        name,
        len(outcomes),
        float(np.median(ratios)),
        float(np.percentile(ratios, 99)),
        float(ratios.max()),
        float(np.median(arms)),
        float(arms.max()),
    )


def groups(outcomes: Sequence[Outcome]) -> list[Group]:
    """By constant or fluctuating resources, cold or warm cost models, and within the warm constant ones by holes."""
    found: list[Group] = []
    for fluctuates in (False, True):
        for warm in (True, False):
            name = f"{'fluctuating' if fluctuates else 'constant'}, {'warm' if warm else 'cold'}"
            mine = [
                outcome
                for outcome in outcomes
                if (outcome.configuration.fluctuates, outcome.configuration.warm) == (fluctuates, warm)
            ]
            if mine:
                found.append(group(name, mine))
            if warm and not fluctuates:
                kinds = sorted({outcome.configuration.holes for outcome in mine})
                for holes in kinds:
                    same = [outcome for outcome in mine if outcome.configuration.holes == holes]
                    found.append(group(f"  holes: {holes}", same))
    return found


def verdicts(found: Sequence[Group]) -> list[str]:
    """A sentence per target: met, or missed by how much."""
    by_name = {group.name: group for group in found}
    lines = []
    if steady := by_name.get("constant, warm"):
        lines += [
            _verdict("constant, warm: time over optimum at the median", steady.median, 1.03),
            _verdict("constant, warm: time over optimum at the 99th percentile", steady.p99, 1.10),
            _verdict("constant, warm: time over the better arm at worst", steady.arm_worst, 1.01),
        ]
    if fluctuating := by_name.get("fluctuating, warm"):
        lines.append(_verdict("fluctuating, warm: time over optimum at the median", fluctuating.median, 1.05))
    return lines


def _verdict(text: str, value: float, target: float) -> str:
    outcome = "met" if value <= target else f"MISSED by {value - target:.3f}"
    return f"{outcome}: {text} is {value:.3f}, target at most {target:.2f}"


def worst(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The restores farthest from the optimum, the worst first."""
    return sorted(outcomes, key=lambda outcome: -outcome.ratio)[:_WORST_LISTED]


def slowest_against_arm(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The restores that lose most to the better single arm, the worst first."""
    return sorted(outcomes, key=lambda outcome: -outcome.against_better_arm)[:_WORST_LISTED]

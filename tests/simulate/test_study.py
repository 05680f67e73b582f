"""A small study, so that a planner that gets much worse is noticed."""

from __future__ import annotations

import pytest

from cakekv.simulate.study import Outcome, draw, run
from cakekv.simulate.targets import groups, slowest_against_arm, verdicts, worst


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return [run(draw(0, index)) for index in range(50)]


def test_no_restore_beats_the_optimum(outcomes: list[Outcome]) -> None:
    assert min(outcome.ratio for outcome in outcomes) >= 1 - 1e-6


def test_the_planner_stays_near_the_optimum(outcomes: list[Outcome]) -> None:
    steady = next(group for group in groups(outcomes) if group.name == "constant, warm")
    assert steady.count >= 15
    assert steady.median <= 1.05
    assert steady.worst <= 1.6
    assert steady.arm_worst <= 1.3


def test_both_kinds_of_everything_are_drawn(outcomes: list[Outcome]) -> None:
    configurations = [outcome.configuration for outcome in outcomes]
    assert {configuration.holes for configuration in configurations} == {"none", "few", "random", "runs"}
    assert {(c.fluctuates, c.warm) for c in configurations} == {(f, w) for f in (True, False) for w in (True, False)}
    assert {len(configuration.tiers) for configuration in configurations} == {1, 2}
    assert len(groups(outcomes)) == 8


def test_a_configuration_can_be_drawn_again(outcomes: list[Outcome]) -> None:
    chosen = worst(outcomes)[0]
    again = run(draw(0, chosen.configuration.index))
    assert again.to_dict() == chosen.to_dict()
    assert slowest_against_arm(outcomes)[0].against_better_arm == max(o.against_better_arm for o in outcomes)


def test_a_missed_target_says_by_how_much() -> None:
    bad = Outcome(draw(0, 12), time_s=2.0, least_s=1.0, compute_s=1.0, load_s=3.0)
    assert (bad.configuration.fluctuates, bad.configuration.warm) == (False, True)
    assert verdicts(groups([bad]))[0].startswith("MISSED by 0.970: ")
    assert verdicts(groups([bad]))[2].startswith("MISSED by 0.990: ")

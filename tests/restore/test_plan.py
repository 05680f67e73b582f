"""In which order planned loads are asked for: worked by hand."""

from __future__ import annotations

from cakekv.restore.assignment import Candidate
from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost
from cakekv.restore.flights import Tier
from cakekv.restore.level_choice import Level
from cakekv.restore.plan import Plan
from cakekv.restore.planner import Planner, PlannerOptions


def uncovered(chunks: int, holes: set[int]) -> list[Candidate]:
    return [(chunk, 1.0, {} if chunk in holes else {0: 1.0, 1: 1.0}) for chunk in range(chunks)]


def test_the_nearest_deadline_comes_first_and_back_to_front_before_each() -> None:
    # Compute takes 0, the hole 3 and the suffix 7: 1 and 2 are due when it gets to 3, 4 to 6 when it gets to 7.
    plan = Plan.ordered(uncovered(8, {3, 7}), {1: 0, 2: 0, 4: 0, 5: 1, 6: 0}, tiers=2)
    assert [list(reversed(queue)) for queue in plan.queues] == [[2, 1, 6, 4], [5]]
    assert plan.deadlines == [3, 7]


def test_what_is_computed_between_loads_is_a_deadline_too() -> None:
    plan = Plan.ordered(uncovered(6, {5}), {1: 0, 3: 0, 4: 0}, tiers=1)
    assert list(reversed(plan.queues[0])) == [1, 4, 3]
    assert plan.deadlines == [2, 5]


def test_without_loads_there_is_nothing_to_wait_for() -> None:
    assert Plan.ordered(uncovered(3, {2}), {}, tiers=2) == ({}, [[], []], [])
    assert Plan.ordered([], {}, tiers=1) == ({}, [[]], [])


def test_chunks_of_any_length_cost_and_are_read_by_their_tokens() -> None:
    cost = LoadCost(4)
    cost.observe(1000, -1.0, -0.9)
    planner = Planner(
        100,
        40,
        [(0,), (0,), (), (0,)],
        [Tier("tier", cost, 4)],
        ComputeCost(ComputeShape(0.0, 1.0, 0.0), trusted=True),
        [Level.whole(1000)],
        PlannerOptions(max_span_tokens=40),
        starts=[0, 40, 50, 56, 80],
    )
    assert planner.next_compute(0.0).__class__.__name__ == "Wait"
    loads = [planner.next_load(0, 0.0) for _ in range(3)]
    assert [(load.start, load.tokens, load.size) for load in loads if load] == [
        (40, 10, 250),
        (0, 40, 1000),
        (56, 24, 600),
    ]
    assert [(run.start, run.tokens, run.how, round(run.seconds, 6)) for run in planner.explain(0.0)] == [
        (0, 50, "tier", 0.125),
        (50, 6, "compute", 6.0),
        (56, 24, "tier", 0.06),
        (80, 20, "compute", 20.0),
    ]

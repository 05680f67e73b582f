"""A step of several requests' tokens as one span; a restore's share of it."""

from __future__ import annotations

import pytest

from cakekv.restore.costs import ComputeCost, ComputeShape
from cakekv.restore.planner import Span
from cakekv.vllm.scheduling.step_costs import SharedCost, StepCosts, equivalent_span

SHAPE = ComputeShape(fixed=10e-3, linear=1e-3, quadratic=1e-6)


def seconds(spans: list[Span]) -> float:
    """What the machine takes for a step."""
    return SHAPE.fixed + sum(SHAPE.seconds(span.start, span.tokens) - SHAPE.fixed for span in spans)


def step_costs(cost: ComputeCost) -> StepCosts:
    """Costs of which something is known already."""
    costs = StepCosts()
    costs.cost = cost
    return costs


@pytest.mark.parametrize(
    "spans",
    [[Span(100, 50)], [Span(0, 256), Span(0, 256)], [Span(4000, 1), Span(1000, 300), Span(0, 200)]],
)
def test_a_step_costs_as_much_as_its_equivalent_span(spans: list[Span]) -> None:
    span = equivalent_span(spans)
    assert span.tokens == sum(span.tokens for span in spans)
    assert SHAPE.seconds(span.start, span.tokens) == pytest.approx(seconds(spans), rel=2e-3)


def test_mixed_steps_teach_what_a_span_alone_costs() -> None:
    costs = step_costs(ComputeCost(ComputeShape(20e-3, 2e-3, 1e-6)))
    for number in range(40):
        spans = [Span(3000, 1), Span(number * 100, 100 + 7 * (number % 5)), Span(0, 200)]
        costs.observe(spans, seconds(spans))
    assert costs.cost.seconds(2000, 512) == pytest.approx(SHAPE.seconds(2000, 512), rel=0.15)


def test_decodes_teach_nothing_of_prefill() -> None:
    costs = StepCosts()
    costs.observe([Span(100, 1)] * 10, 1.0)
    assert not costs.cost.known


def test_a_restore_that_gets_half_of_every_step_takes_twice_as_long() -> None:
    costs = step_costs(ComputeCost(ComputeShape(0.0, 1e-3, 0.0), trusted=True))
    shared = SharedCost(costs)
    assert shared.seconds(0, 100) == pytest.approx(0.1)
    for _ in range(50):
        shared.shared(Span(0, 200), 100, 0.2)
    assert shared.seconds(0, 100) == pytest.approx(0.2, rel=0.01)
    assert shared.shape.linear == pytest.approx(2e-3, rel=0.01)


def test_a_few_tokens_in_a_step_that_decodes_are_little_for_its_time() -> None:
    """Ten tokens in steps of 50 ms, where a step of its own would have computed 450 in half a second."""
    costs = step_costs(ComputeCost(ComputeShape(50e-3, 1e-3, 0.0), trusted=True))
    shared = SharedCost(costs)
    for _ in range(100):
        shared.shared(Span(0, 450), 10, 50e-3)
    assert shared.share == pytest.approx((0.5 / 450 * 10) / 50e-3, rel=0.01)


def test_a_share_follows_time_and_not_the_number_of_steps() -> None:
    costs = step_costs(ComputeCost(ComputeShape(0.0, 1e-3, 0.0), trusted=True))
    few, many = SharedCost(costs), SharedCost(costs)
    few.shared(Span(0, 100), 0, 0.5)
    for _ in range(10):
        many.shared(Span(0, 100), 0, 0.05)
    assert few.share == pytest.approx(0.5)
    assert many.share == pytest.approx(0.5)


def test_a_restore_that_gets_nothing_is_left_to_the_loads() -> None:
    costs = step_costs(ComputeCost(ComputeShape(0.0, 1e-3, 0.0), trusted=True))
    shared = SharedCost(costs)
    for _ in range(50):
        shared.shared(Span(500, 100), 0, 0.1)
    assert shared.seconds(0, 100) > 1.0


def test_a_restore_that_was_passed_over_learns_that_steps_are_free_again() -> None:
    """It wants nothing, since computing does not seem to pay; so what others leave has to tell it."""
    costs = step_costs(ComputeCost(ComputeShape(0.0, 1e-3, 0.0), trusted=True))
    shared = SharedCost(costs)
    for _ in range(100):
        shared.shared(Span(500, 100), 0, 0.1)
    assert shared.share < 0.03
    for _ in range(5):
        shared.spared(Span(500, 512), 0.0)
    assert shared.share > 0.9


def test_what_busy_steps_leave_is_no_more_than_it_is() -> None:
    costs = step_costs(ComputeCost(ComputeShape(0.0, 1e-3, 0.0), trusted=True))
    shared = SharedCost(costs, 0.1)
    for _ in range(100):
        shared.spared(Span(0, 100), 0.3)
    assert shared.share == pytest.approx(0.25, rel=0.01)
    before = shared.share
    shared.spared(Span(0, 10), 0.3)
    shared.spared(Span(0, 0), 0.3)
    assert shared.share == before

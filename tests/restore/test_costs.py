"""The cost models: what they learn, and how fast."""

from __future__ import annotations

import random

import pytest

from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost

TRUTH = ComputeShape(fixed=0.05, linear=1.1e-3, quadratic=4.6e-7)


def test_one_span_sets_the_scale() -> None:
    cost = ComputeCost(ComputeShape(0.02, 1e-3, 1e-3 / 4096))
    assert not cost.known
    cost.observe(0, 512, 5.0)
    assert cost.known
    assert cost.seconds(0, 512) == pytest.approx(5.0, rel=1e-6)


def test_the_attention_term_is_learned_from_a_prefill() -> None:
    cost = ComputeCost()
    for start in range(0, 4096, 512):
        cost.observe(start, 512, TRUTH.seconds(start, 512))
    # extrapolated to twice the length it was learned on
    assert cost.seconds(7680, 512) == pytest.approx(TRUTH.seconds(7680, 512), rel=0.1)


def test_noise_is_averaged_out() -> None:
    rng = random.Random(1)
    cost = ComputeCost()
    for _ in range(4):
        for start in range(0, 4096, 512):
            cost.observe(start, 512, TRUTH.seconds(start, 512) * rng.uniform(0.9, 1.1))
    assert cost.seconds(2048, 512) == pytest.approx(TRUTH.seconds(2048, 512), rel=0.08)


def test_a_single_outlier_is_doubted_and_a_change_is_followed() -> None:
    cost = ComputeCost()
    for start in range(0, 4096, 512):
        cost.observe(start, 512, TRUTH.seconds(start, 512))
    before = cost.seconds(4096, 512)
    cost.observe(4096, 512, 10 * TRUTH.seconds(4096, 512))
    assert cost.seconds(4096, 512) == before
    for start in range(4608, 7168, 512):  # the machine is now three times slower
        cost.observe(start, 512, 3 * TRUTH.seconds(start, 512))
    assert cost.seconds(7168, 512) == pytest.approx(3 * TRUTH.seconds(7168, 512), rel=0.2)


def test_nonsense_is_not_learned() -> None:
    cost = ComputeCost()
    cost.observe(0, 0, 1.0)
    cost.observe(0, 10, 0.0)
    assert not cost.known


def test_parallel_loads_count_once() -> None:
    # Two loads of 100 bytes at a time, a pair every second: 200 bytes per second.
    cost = LoadCost(depth=2)
    for second in range(10):
        cost.observe(100, second, second + 1.0)
        cost.observe(100, second, second + 1.0)
    assert cost.seconds(100) == pytest.approx(0.5)
    assert cost.duration(100) == pytest.approx(1.0)


def test_idle_time_of_a_tier_is_not_held_against_it() -> None:
    cost = LoadCost()
    cost.observe(100, 0.0, 1.0)
    cost.observe(100, 50.0, 51.0)
    assert cost.seconds(100) == pytest.approx(1.0)


def test_a_changed_bandwidth_is_followed_within_a_few_chunks() -> None:
    cost = LoadCost(depth=2)
    now = 0.0
    for _ in range(30):
        cost.observe(100, now, now + 1.0)
        now += 1.0
    for _ in range(10):
        cost.observe(100, now, now + 4.0)
        now += 4.0
    assert cost.seconds(100) == pytest.approx(4.0, rel=0.2)

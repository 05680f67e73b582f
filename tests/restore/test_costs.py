"""The cost models: what they learn, and how fast."""

from __future__ import annotations

import random

import pytest

from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost, LoadFigures

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


def reads(cost: LoadCost, byte_s: float, request_s: float, began: float = 0.0) -> float:
    """Let it learn from reads of many sizes, four of which share the tier; returns when the last one ended."""
    rng = random.Random(7)
    for _ in range(80):
        size = rng.choice([3_000, 30_000, 200_000, 1_000_000])
        seconds = (request_s + 4 * size * byte_s) * rng.uniform(0.9, 1.1)
        cost.observe_read(size, began, began + seconds, beside=4.0)
        began += seconds / 4
    return began


def test_reads_of_parts_tell_requests_from_bytes() -> None:
    cost = LoadCost(depth=4)
    ended = reads(cost, 1e-8, 0.03)
    assert cost.measured
    assert cost.seconds(10**8) == pytest.approx(1.0, rel=0.3)
    assert cost.request_s == pytest.approx(0.03, rel=0.2)
    assert cost.last_completed == pytest.approx(ended, abs=0.1)


def test_reads_of_parts_tell_that_a_link_has_changed() -> None:
    cost = LoadCost(depth=4, prior=LoadFigures(1e-8, 1.0, 25e6, 0.5))
    at = reads(cost, 1e-7, 0.001)
    assert cost.seconds(10**8) == pytest.approx(10.0, rel=0.3)
    assert cost.duration(25_000_000) == pytest.approx(10.0, rel=0.3)
    reads(cost, 1e-9, 0.001, at)
    assert cost.seconds(10**8) < 0.5


def test_reads_of_parts_do_not_make_loads_look_fast() -> None:
    """A load that ended just behind a read has not begun there."""
    cost = LoadCost(depth=2)
    cost.observe(1000, 0.0, 10.0)
    cost.observe_read(10, 19.0, 19.1)
    cost.observe(1000, 10.0, 20.0)
    assert cost.seconds(1000) == pytest.approx(10.0, rel=0.3)


def test_reads_that_are_mostly_waiting_do_not_stop_it_from_learning() -> None:
    cost, rng, at = LoadCost(depth=4), random.Random(1), 0.0
    for wait_s in (0.001, 0.02, 0.001):
        for _ in range(100):
            seconds = wait_s * rng.uniform(0.5, 1.5)
            cost.observe_read(rng.choice([100, 300, 1000]), at, at + seconds)
            at += seconds
        assert cost.request_s + cost.seconds(300) == pytest.approx(wait_s, rel=0.4)
        assert cost.seconds(300) > 1e-3 * wait_s

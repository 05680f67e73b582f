"""What requests are to each other: worked by hand, and on the simulator's clock."""

from __future__ import annotations

from typing import Any

import pytest

from cakekv.restore.contention import Burden, SharedCompute, SharedLoad, burdens
from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost, LoadFigures
from cakekv.restore.flights import Tier
from cakekv.restore.level_choice import Level
from cakekv.restore.planner import Planner
from cakekv.restore.priority import Kind, RequestState, open_policy
from cakekv.simulate.machine import VirtualTier, constant, run_restore

CHUNK_BYTES = 64_000


def about(seconds: float) -> Any:
    """`pytest.approx`, where a number is wanted."""
    return pytest.approx(seconds)


def restore(name: str, arrived_s: float, tokens: int, load_s: float = 1e-3) -> RequestState:
    """A token costs 1 ms to compute."""
    return RequestState(name, Kind.STORED_PREFILL, arrived_s, tokens, front_s=1e-3, back_s=1e-3, load_s={0: load_s})


def plain(name: str, arrived_s: float, tokens: int) -> RequestState:
    return RequestState(name, Kind.PLAIN_PREFILL, arrived_s, tokens, front_s=1e-3, back_s=1e-3)


def test_alone_there_is_no_burden() -> None:
    assert burdens([restore("a", 0.0, 1000)], open_policy("cake"), 0.0) == {"a": Burden(1.0, {0: 1.0})}


def test_a_restore_behind_a_plain_prefill_waits_for_compute_only() -> None:
    # The plain one computes for 3 s; the other would need 1 s alone: it is through after 4 s.
    answer = burdens([restore("r", 0.0, 1000), plain("p", 1.0, 3000)], open_policy("cake"), 1.0)
    assert answer["r"] == Burden(about(4.0), {0: 1.0})
    assert answer["p"] == Burden()


def test_a_restore_behind_another_waits_for_both_arms() -> None:
    # Both arms work 2,000 tokens off in 1 s; the other has 1 s of either of its own.
    answer = burdens([restore("a", 0.0, 2000), restore("b", 1.0, 1000)], open_policy("fcfs"), 1.0)
    assert answer["a"] == Burden(1.0, {0: 1.0})
    assert answer["b"] == Burden(about(2.0), {0: about(2.0)})


def test_decodes_and_unknown_tiers_burden_nobody_for_ever() -> None:
    decode = RequestState("d", Kind.DECODE, 0.0, 1)
    answer = burdens([decode, restore("a", 0.0, 1000, load_s=0.0), restore("b", 0.0, 1000)], open_policy("fcfs"), 0.0)
    assert "d" not in answer
    assert answer["a"].load == {0: 1.0}
    assert answer["b"] == Burden(about(1.5), {0: about(1.5)})


def planned_loads(compute: float, load: float) -> int:
    """Chunks that a restore of 40 stored ones means to load; both arms take 64 ms a chunk."""
    compute_cost = SharedCompute(ComputeCost(ComputeShape(1e-6, 1e-3, 1e-12), trusted=True))
    load_cost = SharedLoad(LoadCost(1, LoadFigures(1e-6, 0.064, CHUNK_BYTES, 0.0)))
    compute_cost.burden, load_cost.burden = compute, load
    planner = Planner(2561, 64, [(0,)] * 40, [Tier("disk", load_cost, 1)], compute_cost, [Level.whole(CHUNK_BYTES)])
    return sum(run.tokens for run in planner.explain(0.0) if run.how == "disk") // 64


def test_a_restore_that_has_to_wait_for_compute_loads_more_and_the_other_way_round() -> None:
    assert planned_loads(1.0, 1.0) == 20
    assert planned_loads(3.0, 1.0) == 30
    assert planned_loads(1.0, 3.0) == 10


def ttft(cost: LoadCost, byte_s: float) -> float:
    """4,096 stored tokens, 1 ms each to compute, from a tier that really takes `byte_s` seconds a byte."""
    compute = ComputeCost(ComputeShape(1e-4, 1e-3, 1e-9), trusted=True)
    view = SharedLoad(cost)
    view.doubt(CHUNK_BYTES, compute.seconds(0, 4128))
    planner = Planner(4128, 64, [(0,)] * 64, [Tier("disk", view, 2)], compute, [Level.whole(CHUNK_BYTES)])
    return run_restore(planner, lambda span, now: 1e-4 + span.tokens * 1e-3, [VirtualTier(constant(1 / byte_s))])


@pytest.mark.parametrize("wrong_by", [1e-6, 1e-3, 0.1, 0.5, 1.0, 2.0, 10.0, 1e3, 1e6])
def test_what_was_stored_of_a_tier_is_corrected_when_it_has_changed(wrong_by: float) -> None:
    """The tier loads a token in 1 ms, as long as computing takes, whatever was thought of it."""
    byte_s = 1e-6
    prior = LoadFigures(byte_s * wrong_by, 2 * CHUNK_BYTES * byte_s * wrong_by, CHUNK_BYTES, 0.0)
    cost = LoadCost(2, prior)
    right = ttft(LoadCost(2, LoadFigures(byte_s, 2 * CHUNK_BYTES * byte_s, CHUNK_BYTES, 0.0)), byte_s)
    assert right == pytest.approx(2.1, rel=0.05)
    # Two of the 64 chunks at most are waited for, or computed, in vain.
    assert ttft(cost, byte_s) <= right * 1.05
    assert cost.seconds(CHUNK_BYTES) == pytest.approx(CHUNK_BYTES * byte_s, rel=0.25)


@pytest.mark.parametrize("wrong_by", [1e-6, 0.1, 10.0, 1e6])
@pytest.mark.parametrize("depth", [1, 4])
def test_a_wrong_prior_is_forgotten_within_a_few_chunks(wrong_by: float, depth: int) -> None:
    """Bunches of `depth` chunks, 0.1 s per chunk."""
    cost = LoadCost(depth, LoadFigures(1e-6 * wrong_by, 0.1 * depth * wrong_by, 1e5, 0.1 * wrong_by))
    for bunch in range(2 if depth > 1 else 5):
        for _ in range(depth):
            cost.observe(100_000, bunch * 0.1 * depth, (bunch + 1) * 0.1 * depth)
    assert cost.seconds(100_000) == pytest.approx(0.1, rel=0.35)
    assert cost.duration(100_000) == pytest.approx(0.1 * depth, rel=0.1)


def test_a_tier_that_is_as_slow_as_ever_is_tried_with_little() -> None:
    byte_s = 1e-3  # 64 s a chunk; computing everything takes 4.1 s
    cost = LoadCost(2, LoadFigures(byte_s, 128.0, CHUNK_BYTES, 0.0))
    assert ttft(cost, byte_s) == pytest.approx(4.13, rel=0.02)


def test_all_learn_from_what_one_measures() -> None:
    compute, load = ComputeCost(), LoadCost(2)
    views = [(SharedCompute(compute), SharedLoad(load)) for _ in range(2)]
    assert not views[1][0].known
    assert not views[1][1].known
    views[0][0].observe(0, 128, 0.5)
    views[0][1].observe(1000, 0.0, 1.0)
    assert views[1][0].seconds(0, 128) == compute.seconds(0, 128) == pytest.approx(0.5)
    assert views[1][1].seconds(1000) == load.seconds(1000) == pytest.approx(1.0)
    assert views[1][1].last_completed == 1.0
    assert views[1][1].figures == load.figures


def test_a_burden_is_one_requests_own() -> None:
    compute, load = ComputeCost(ComputeShape(1e-3, 1e-3, 1e-9), trusted=True), LoadCost(1)
    load.observe(1000, 0.0, 1.0)
    burdened, other = (SharedCompute(compute), SharedLoad(load)), (SharedCompute(compute), SharedLoad(load))
    burdened[0].burden = burdened[1].burden = 3.0
    assert burdened[0].seconds(0, 64) == pytest.approx(3 * other[0].seconds(0, 64))
    assert burdened[0].shape.seconds(0, 64) == pytest.approx(3 * other[0].shape.seconds(0, 64))
    assert burdened[1].seconds(500) == pytest.approx(3 * other[1].seconds(500))
    assert burdened[1].duration(500) == other[1].duration(500)


def test_a_tier_that_has_fewer_bytes_to_read_is_expected_to_be_done_sooner() -> None:
    """Plans reckon with the same bytes for all tiers; what a tier is found to cost is per byte that it reads."""
    cost = LoadCost(1, LoadFigures(1e-6, 0.064, CHUNK_BYTES, 0.0))
    packed = SharedLoad(cost, share_read=0.625)
    assert packed.seconds(CHUNK_BYTES) == pytest.approx(0.625 * SharedLoad(cost).seconds(CHUNK_BYTES))
    assert packed.duration(CHUNK_BYTES) == pytest.approx(0.625 * SharedLoad(cost).duration(CHUNK_BYTES))
    before = packed.seconds(CHUNK_BYTES)
    for number in range(20):
        began = 10.0 * number
        packed.observe(round(0.625 * CHUNK_BYTES), began, began + before)
    assert packed.seconds(CHUNK_BYTES) == pytest.approx(before, rel=0.01)

"""What the planner makes of a tier that its loads share, and of one that is slow beside an idle one."""

from __future__ import annotations

import pytest

from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost
from cakekv.restore.flights import Load, Tier
from cakekv.restore.level_choice import Level
from cakekv.restore.planner import Planner, PlannerOptions, Span
from cakekv.simulate.machine import VirtualTier, constant, run_restore

SIZE = 100


def tier(each_s: float, depth: int, alone_s: float | None) -> Tier:
    """A tier that is known to deliver a chunk every `each_s` seconds, and one alone in `alone_s`."""
    cost = LoadCost(depth)
    if alone_s is not None:
        cost.observe(SIZE, -1e6, -1e6 + alone_s, alone=True)
    for load in range(-200, 0):
        cost.observe(SIZE, load * each_s - depth * each_s - 1, load * each_s - 1)
    return Tier("tier", cost, depth)


def restore(stored: str, *tiers: Tier, compute_s: float = 1.0, fixed_s: float = 0.0) -> Planner:
    """Chunks of 10 tokens; L is stored at every tier, h is a hole; the suffix comes behind."""
    holders = tuple(range(len(tiers)))
    shape = ComputeShape(fixed_s, compute_s / 10, 0.0)
    return Planner(
        10 * len(stored) + 1,
        10,
        [holders if letter == "L" else () for letter in stored],
        tiers,
        ComputeCost(shape, trusted=True),
        [Level.whole(SIZE)],
        PlannerOptions(max_span_tokens=100),
    )


def loads(planner: Planner, tier: int, now: float) -> list[Load]:
    found = []
    while (load := planner.next_load(tier, now)) is not None:
        found.append(load)
    return found


def test_a_tier_is_shared_if_one_load_alone_takes_little_more_than_its_part() -> None:
    assert tier(1.0, 4, alone_s=1.1).cost.is_shared(SIZE)
    assert not tier(1.0, 4, alone_s=4.0).cost.is_shared(SIZE), "four at a time are four times as fast"
    assert not tier(1.0, 4, alone_s=None).cost.is_shared(SIZE), "unknown"
    assert not tier(1.0, 1, alone_s=1.0).cost.is_shared(SIZE), "there is nobody to share with"


def test_loads_due_later_wait_for_those_due_sooner_on_a_shared_tier() -> None:
    # Chunk 0 is due at once, for the hole; the others only when that has been computed, 50 s later.
    shared = restore("LhLLLL", tier(1.0, 4, alone_s=1.0), compute_s=50.0)
    assert shared.next_compute(0.0).__class__.__name__ == "Wait"
    assert [load.chunk for load in loads(shared, 0, 0.0)] == [0]
    parallel = restore("LhLLLL", tier(1.0, 4, alone_s=4.0), compute_s=50.0)
    assert [load.chunk for load in loads(parallel, 0, 0.0)] == [0, 5, 4, 3]


def test_the_others_follow_once_it_is_there() -> None:
    planner = restore("LhLLLL", tier(1.0, 4, alone_s=1.0), compute_s=50.0)
    [first] = loads(planner, 0, 0.0)
    assert planner.arrived(first, 1.0)
    planner.placed(first, 1.0)
    assert [load.chunk for load in loads(planner, 0, 1.0)] == [5, 4], "two keep it busy, so more would only end late"


def test_an_unknown_tier_is_tried_with_one_load() -> None:
    planner = restore("LLLLLL", Tier("new", LoadCost(4), 4), compute_s=50.0)
    [probe] = loads(planner, 0, 0.0)
    assert planner.arrived(probe, 1.0)
    planner.placed(probe, 1.0)
    assert len(loads(planner, 0, 1.0)) == 4


def test_a_load_moves_from_a_tier_that_has_become_slow_to_one_that_is_idle() -> None:
    slow, fast = tier(1.0, 1, alone_s=None), tier(1.0, 1, alone_s=None)
    planner = restore("LL", slow, fast, compute_s=100.0)
    [first], [second] = loads(planner, 0, 0.0), loads(planner, 1, 0.0)
    assert planner.arrived(second, 1.0)
    planner.placed(second, 1.0)
    assert loads(planner, 1, 1.0) == []
    # The first tier has been silent for 9 s with a load that should take 1 s.
    planner.check_late(9.0)
    planner.next_compute(9.0)
    [again] = loads(planner, 1, 9.0)
    assert again.chunk == first.chunk
    assert first.cancelled
    assert first.moved
    assert not planner.arrived(first, 9.5), "it must not be placed twice"
    assert planner.arrived(again, 10.0)
    planner.placed(again, 10.0)
    span = planner.next_compute(10.0)
    assert isinstance(span, Span)
    planner.computed(span, 11.0)
    assert planner.done
    assert [load.outcome for load in planner.report().loads] == ["placed", "moved", "placed"]


def test_a_chunk_that_would_cut_off_a_short_span_is_refused() -> None:
    # A span of up to 7 chunks costs 7.6 ms and about 3 ms per chunk; 54 stored chunks and the suffix fill 8 spans in
    # 217 ms. A load takes 177 ms, so one chunk arrives; but then the suffix takes a ninth span: 7.6 ms to save 3 ms.
    shape = ComputeShape(7.6e-3, 2.53e-3 / 64, 0.012e-3 / 64**2)
    planner = Planner(
        3487,
        64,
        [(0,)] * 54,
        [tier(0.1765, 4, alone_s=0.177)],
        ComputeCost(shape, trusted=True),
        [Level.whole(SIZE)],
        PlannerOptions(max_span_tokens=448),
    )
    link = VirtualTier(constant(SIZE / 0.1765), 0.5e-3)
    ended = run_restore(planner, lambda span, now: shape.seconds(span.start, span.tokens), [link])
    assert planner.report().wasted_bytes > 0, "one chunk was asked for"
    assert planner.report().loaded_tokens == 0
    assert len(planner.report().spans) == 8
    alone = sum(shape.seconds(start, min(448, 3487 - start)) for start in range(0, 3487, 448))
    assert ended == pytest.approx(alone)

"""What the planner makes of a tier that its loads share, and of one that is slow beside an idle one."""

from __future__ import annotations

from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost
from cakekv.restore.flights import Load, Source
from cakekv.restore.planner import Restore, Span

SIZE = 100


def tier(each_s: float, depth: int, alone_s: float | None) -> Source:
    """A tier that is known to deliver a chunk every `each_s` seconds, and one alone in `alone_s`."""
    cost = LoadCost(depth)
    if alone_s is not None:
        cost.observe(SIZE, -1e6, -1e6 + alone_s, alone=True)
    for load in range(-200, 0):
        cost.observe(SIZE, load * each_s - depth * each_s - 1, load * each_s - 1)
    return Source("tier", cost, depth)


def restore(stored: str, *sources: Source, compute_s: float = 1.0, fixed_s: float = 0.0) -> Restore:
    """Chunks of 10 tokens; L is stored at every source, h is a hole; the suffix comes behind."""
    holders = tuple(range(len(sources)))
    shape = ComputeShape(fixed_s, compute_s / 10, 0.0)
    return Restore(
        10 * len(stored) + 1,
        10,
        [holders if letter == "L" else () for letter in stored],
        sources,
        ComputeCost(shape, trusted=True),
        chunk_bytes=SIZE,
        max_span_tokens=100,
    )


def loads(planner: Restore, source: int, now: float) -> list[Load]:
    found = []
    while (load := planner.next_load(source, now)) is not None:
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
    assert [load.chunk for load in loads(planner, 0, 1.0)] == [5, 4, 3, 2]


def test_an_unknown_tier_is_tried_with_one_load() -> None:
    planner = restore("LLLLLL", Source("new", LoadCost(4), 4), compute_s=50.0)
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
    assert [load.outcome for load in planner.report.loads] == ["placed", "moved", "placed"]


def test_a_chunk_is_refused_if_it_would_cut_off_a_short_span() -> None:
    # A span costs 10 s, a chunk 1 s more. Chunk 5's load is still on its way when computing 0..5 and the suffix in one
    # span has become the better plan.
    planner = restore("LLLLLL", tier(1.0, 1, alone_s=None), compute_s=1.0, fixed_s=10.0)
    planner.mode = "both"  # asks for the last chunk in any case
    [load] = loads(planner, 0, 0.0)[:1]
    planner.mode = "auto"
    planner._replan(0.0)
    planner._plan = {}
    assert not planner.arrived(load, 1.0)
    assert planner.report.wasted_bytes == SIZE

"""Which chunks to load: hand-worked cases, the arithmetic beside each."""

from __future__ import annotations

from cakekv.restore.assignment import Candidate, assign_loads


def chunks(costs: list[float], stored: dict[int, dict[int, float]]) -> list[Candidate]:
    """One candidate per compute cost; `stored` maps a chunk to its load seconds per tier."""
    return [(chunk, cost, stored.get(chunk, {})) for chunk, cost in enumerate(costs)]


def test_equal_arms_meet_in_the_middle() -> None:
    # 8 stored chunks, 1 s each either way, and a suffix. Loads 7, 6, 5, 4 take 4 s while 0..3 are computed in 4 s.
    plan = assign_loads(chunks([1.0] * 9, {c: {0: 1.0} for c in range(8)}), tiers=1)
    assert plan == {7: 0, 6: 0, 5: 0, 4: 0}


def test_dearer_late_chunks_move_the_meeting_point_back() -> None:
    # Compute costs 1, 2, 3, 4; each load 2 s. Load {3}: max(1+2+3, 2) = 6 s. Load {3, 2}: max(1+2, 4) = 4 s.
    # Load {3, 2, 1}: max(1, 6) = 6 s. So two are loaded.
    plan = assign_loads(chunks([1.0, 2.0, 3.0, 4.0, 1.0], {c: {0: 2.0} for c in range(4)}), tiers=1)
    assert set(plan) == {3, 2}


def test_a_load_slower_than_computing_everything_is_not_worth_it() -> None:
    # Everything before the suffix is computed in 4 s; one load takes 4 s: nothing is gained.
    assert assign_loads(chunks([1.0] * 5, {c: {0: 4.0} for c in range(4)}), tiers=1) == {}


def test_a_fast_tier_gets_everything() -> None:
    # All 4 loads take 0.4 s, less than computing any one chunk.
    plan = assign_loads(chunks([1.0] * 5, {c: {0: 0.1} for c in range(4)}), tiers=1)
    assert set(plan) == {0, 1, 2, 3}


def test_loads_behind_a_hole_have_the_holes_time_too() -> None:
    # Stored 0..3, holes 4..7, stored 8..9, suffix 10; all 1 s. Before the hole both arms share 4 chunks: 2 and 2.
    # The hole keeps compute busy for 4 s; chunks 8 and 9 load meanwhile. All of it ends at 2 + 4 = 6 s.
    stored = {c: {0: 1.0} for c in (0, 1, 2, 3, 8, 9)}
    assert set(assign_loads(chunks([1.0] * 11, stored), tiers=1)) == {2, 3, 8, 9}


def test_a_small_early_hole_does_not_draw_loads_away_from_the_dear_tail() -> None:
    # Stored 0, hole 1, stored 2..5 with rising cost; loads take 3 s. Loading 5 and 4: max(1+1+4+5, 6) = 11 s.
    # Loading 5, 4 and 3: max(1+1+4, 9) = 9 s. Loading 2, too: max(1+1, 12) = 12 s. Chunk 0 would arrive after compute.
    plan = assign_loads(chunks([1.0, 1.0, 4.0, 5.0, 6.0, 7.0, 1.0], {c: {0: 3.0} for c in (0, 2, 3, 4, 5)}), tiers=1)
    assert set(plan) == {5, 4, 3}


def test_two_tiers_load_side_by_side() -> None:
    # Both tiers hold all 9 chunks at 1 s, compute takes 1 s each: three arms, three chunks each.
    plan = assign_loads(chunks([1.0] * 10, {c: {0: 1.0, 1: 1.0} for c in range(9)}), tiers=2)
    assert sorted(plan.values()) == [0, 0, 0, 1, 1, 1]
    assert set(plan) == {3, 4, 5, 6, 7, 8}


def test_a_fast_tier_helps_at_the_front_when_it_holds_only_the_front() -> None:
    # Chunks 0..3 in a tier of 0.1 s, 4..7 in one of 1 s, compute 1 s. The fast tier takes all it has (0.4 s), so
    # compute starts at chunk 4 and meets the slow tier half way.
    stored = {c: {0: 0.1} for c in range(4)} | {c: {1: 1.0} for c in range(4, 8)}
    plan = assign_loads(chunks([1.0] * 9, stored), tiers=2)
    assert {c for c, tier in plan.items() if tier == 0} >= {1, 2, 3}
    assert {c for c, tier in plan.items() if tier == 1} >= {6, 7}


def test_compute_that_is_busy_leaves_more_to_load() -> None:
    idle = assign_loads(chunks([1.0] * 9, {c: {0: 1.0} for c in range(8)}), tiers=1)
    busy = assign_loads(chunks([1.0] * 9, {c: {0: 1.0} for c in range(8)}), tiers=1, compute_busy_s=2.0)
    # 2 s of head start for the loads: 5 loads in 5 s against 2 s + 3 computed chunks.
    assert len(idle) == 4
    assert set(busy) == {3, 4, 5, 6, 7}

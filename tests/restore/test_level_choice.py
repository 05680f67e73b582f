"""The level to read chunks at: properties of the choice, and a planner that makes it under a virtual clock."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost, LoadFigures
from cakekv.restore.flights import Load, Tier
from cakekv.restore.level_choice import RESERVE, Level, best_level
from cakekv.restore.planner import Planner, PlannerOptions
from cakekv.simulate.machine import VirtualTier, run_restore
from cakekv.simulate.rate import Rate

seconds = st.floats(0, 100)


@given(st.lists(seconds, min_size=1, max_size=5), seconds)
def test_the_best_level_in_time(ends: list[float], left_s: float) -> None:
    level = best_level(len(ends), lambda level: ends[level], left_s)
    in_time = [level for level, end in enumerate(ends) if end <= left_s]
    if in_time:
        assert level == max(in_time)
    else:
        assert ends[level] == min(ends)
        assert ends.count(ends[level]) == 1 or level == max(i for i, end in enumerate(ends) if end == ends[level])


@given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=5, unique=True),
    st.floats(1, 1e5),
    st.floats(1, 1e5),
    st.floats(0, 5),
    seconds,
)
def test_more_bandwidth_is_never_a_worse_level(
    sizes: list[int], one: float, other: float, rest_s: float, left_s: float
) -> None:
    """Where loads alone decide when all is covered."""
    sizes.sort()
    ends = [[size / rate + rest_s for size in sizes] for rate in sorted((one, other))]
    less, more = (best_level(len(sizes), each.__getitem__, left_s) for each in ends)
    assert less <= more


CHUNKS, TOKENS, BEST = 40, 64, 900
COARSER = (Level(1, 300, 300), Level(2, 500, 500))
SHAPE = ComputeShape(1e-6, 0.1 / TOKENS, 1e-12)


class Watched(Planner):
    """Counts the loads that are placed by how much of them was read."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.read: Counter[int | None] = Counter()

    def placed(self, load: Load, now: float) -> None:
        self.read[load.parts] += 1
        super().placed(load, now)


def restored(bandwidth: Rate, target_s: float, levels: tuple[Level, ...], mode: str = "auto") -> tuple[float, Watched]:
    """When 40 chunks of 0.1 s to compute each are covered; the tier's speed is known to be its first bandwidth."""
    best = levels[-1]._replace(parts=None)
    rate = bandwidth.rates[0]
    known = LoadCost(2, LoadFigures(1 / rate, 2 * best.chunk_bytes / rate, best.chunk_bytes, 0.0))
    restore = Watched(
        CHUNKS * TOKENS + 1,
        TOKENS,
        [(0,)] * CHUNKS,
        [Tier("tier", known, 2)],
        ComputeCost(SHAPE, trusted=True),
        [*levels[:-1], best],
        PlannerOptions(mode=mode, ttft_target_s=target_s, max_span_tokens=TOKENS),  # type: ignore[arg-type]
    )
    ended = run_restore(restore, lambda span, now: SHAPE.seconds(span.start, span.tokens), [VirtualTier(bandwidth)])
    return ended, restore


ALL = (*COARSER, Level(3, BEST, BEST))


def test_without_a_target_everything_is_read() -> None:
    _, restore = restored(Rate([9000.0]), float("inf"), ALL)
    assert list(restore.read) == [None], "as much as the codec says"


def test_with_no_time_as_little_as_possible_is_read() -> None:
    ended, restore = restored(Rate([9000.0]), 0.0, ALL)
    assert list(restore.read) == [1]
    assert ended == restored(Rate([9000.0]), 0.0, ALL[:1])[0]
    _, restore = restored(Rate([9000.0]), 0.0, ALL[1:])
    assert list(restore.read) == [2], "the floor holds"


@settings(max_examples=60, deadline=None)
@given(st.floats(500, 50_000), st.floats(0.1, 4.0), st.sampled_from(["auto", "load"]))
def test_the_target_is_met_if_the_coarsest_level_meets_it(rate: float, target_s: float, mode: str) -> None:
    ends = [restored(Rate([rate]), float("inf"), ALL[level : level + 1], mode)[0] for level in range(3)]
    ended, restore = restored(Rate([rate]), target_s, ALL, mode)
    if ends[0] <= target_s * (1 - RESERVE):
        assert ended <= target_s + 0.1  # the span that ends last is 0.1 s long
    if ends[2] <= target_s * (1 - RESERVE) - 0.1:
        assert set(restore.read) <= {None}, "nothing is given away"


def test_a_drop_of_the_bandwidth_costs_quality_not_time() -> None:
    # 20 chunks a second at the best level, from 0.3 s on for a second and a half a quarter of that.
    drop = Rate([18_000.0, *[4_500.0] * 5, 18_000.0], 0.3)
    best_s, _ = restored(drop, float("inf"), ALL[2:])
    least_s, _ = restored(drop, float("inf"), ALL[:1])
    target_s = 1.8
    ended, restore = restored(drop, target_s, ALL)
    assert least_s < ended <= target_s < best_s
    # Before the drop there is time to read all of six chunks; two more are on their way. Then there is none to lose.
    assert restore.read[None] == 8
    assert restore.read[1] > 8

from __future__ import annotations

import pytest

from cakekv.bench.bound import clairvoyant_bound, compute_curve, load_curve
from cakekv.errors import CakeError
from cakekv.restore.report import LoadRecord, SpanRecord

# 1 s for the first 100 tokens, 3 s for the next, 0.5 s for a suffix of 10; a pause between spans is nobody's cost.
SPANS = [SpanRecord(0, 100, 0.0, 1.0), SpanRecord(100, 100, 1.5, 4.5), SpanRecord(200, 10, 4.5, 5.0)]


def load(start: int, began: float, ended: float, outcome: str = "placed") -> LoadRecord:
    return LoadRecord(start, 50, "disk", began, ended, 50, outcome)


# Back to front, one at a time, 1 s each.
LOADS = [load(150, 0, 1), load(100, 1, 2), load(50, 2, 3), load(0, 3, 4)]


def test_the_arms_meet_where_their_times_cross() -> None:
    # In [100, 150]: front = 1 + 3 x / 100, rest = 2 - x / 50; equal at x = 20, where both are 1.6.
    bound = clairvoyant_bound(SPANS, LOADS, 200, 0.5)
    assert bound.meet_at == pytest.approx(120)
    assert bound.seconds == pytest.approx(1.6 + 0.5)


def test_a_load_that_takes_no_time_leaves_only_the_suffix() -> None:
    loads = [load(start, 0, 0) for start in (0, 50, 100, 150)]
    bound = clairvoyant_bound(SPANS, loads, 200, 0.5)
    assert tuple(bound) == pytest.approx((0.5, 0))


def test_a_load_that_takes_forever_leaves_the_computing_alone() -> None:
    loads = [load(start, 1e9 * number, 1e9 * (number + 1)) for number, start in enumerate((150, 100, 50, 0))]
    bound = clairvoyant_bound(SPANS, loads, 200, 0.5)
    assert bound.seconds == pytest.approx(4.5, abs=1e-5)
    assert bound.meet_at == pytest.approx(200, abs=1e-5)


def test_a_suffix_dearer_on_its_own_than_with_the_rest_leaves_the_computing_alone() -> None:
    assert tuple(clairvoyant_bound(SPANS, LOADS, 200, 5.0)) == pytest.approx((4.5, 200))


def test_loads_in_flight_together_share_the_time() -> None:
    # Two at a time, 2 s per pair: as if each took 1 s.
    together = [load(150, 0, 2), load(100, 0, 2), load(50, 2, 4), load(0, 2, 4)]
    assert load_curve(together).seconds == pytest.approx([4, 3, 2, 1, 0])
    # The second begins while the first is in flight: [0, 1] alone, [1, 2] shared, [2, 3] alone.
    staggered = [load(50, 0, 2), load(0, 1, 3)]
    assert load_curve(staggered).seconds == pytest.approx([3, 1.5, 0])


def test_idle_time_and_lost_loads_are_not_counted() -> None:
    loads = [load(50, 0, 1), load(0, 1, 2, "corrupt: checksum"), load(0, 5, 6)]
    assert load_curve(loads).seconds == pytest.approx([2, 1, 0])


def test_times_between_measured_points_lie_on_lines() -> None:
    front = compute_curve(SPANS)
    assert [front.at(position) for position in (0, 50, 100, 150, 210)] == pytest.approx([0, 0.5, 1, 2.5, 4.5])


@pytest.mark.parametrize(
    ("spans", "loads"),
    [
        pytest.param([], LOADS, id="nothing computed"),
        pytest.param(SPANS, [], id="nothing loaded"),
        pytest.param(SPANS[1:], LOADS, id="the head was not computed"),
        pytest.param(SPANS[:1], LOADS, id="the tail was not computed"),
        pytest.param(SPANS, LOADS[:2], id="the head was not loaded"),
        pytest.param(SPANS, LOADS[1:], id="the tail was not loaded"),
        pytest.param(SPANS, [*LOADS, LOADS[0]], id="a chunk was loaded twice"),
    ],
)
def test_runs_that_do_not_cover_the_prefix_are_refused(spans: list[SpanRecord], loads: list[LoadRecord]) -> None:
    with pytest.raises(CakeError, match="no bound can be told"):
        clairvoyant_bound(spans, loads, 200, 0.5)

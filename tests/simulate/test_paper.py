"""The paper's cells and figures, predicted."""

from __future__ import annotations

import pytest

from cakekv.simulate import figures
from cakekv.simulate.figures import BURST, figure_5, figure_6
from cakekv.simulate.paper import Prediction, predict, summarise
from cakekv.simulate.paper_tables import cells


@pytest.fixture(scope="module")
def predictions() -> list[Prediction]:
    return [predict(cell) for cell in cells()]


def test_targets(predictions: list[Prediction]) -> None:
    summary = summarise(predictions)
    assert summary.baseline_error <= 0.06
    assert summary.gain >= 0.04
    assert summary.lost_by_paper == 5
    assert summary.worst_of_ours_there >= 0.99
    assert [line for line in summary.verdicts() if not line.startswith("met: ")] == []


def test_nobody_beats_the_optimum(predictions: list[Prediction]) -> None:
    for prediction in predictions:
        assert max(prediction.ours[0], prediction.baseline[0]) <= prediction.optimum[0] * (1 + 1e-4), prediction.cell


def test_both_figures_of_a_cell_belong_to_one_time(predictions: list[Prediction]) -> None:
    for prediction in predictions:
        (io, compute), (other_io, other_compute) = prediction.ours, prediction.baseline
        assert io / other_io == pytest.approx(compute / other_compute)


def test_a_missed_target_says_by_how_much(predictions: list[Prediction]) -> None:
    slow = [Prediction(p.cell, p.baseline, p.paper, p.optimum) for p in predictions]
    lines = summarise(slow).verdicts()
    assert lines[1].startswith("MISSED by 0.040: ours is 0.0% faster")
    assert lines[2].startswith("MISSED by 0.190: ")


def test_figure_5_both_frontiers_meet_and_the_optimum_is_below() -> None:
    for seed in range(3):
        walk = figure_5(seed)
        assert walk.least_s <= walk.time_s < 1.15 * walk.least_s
        assert 0 < walk.met_at < figures.PREFIX_TOKENS
        assert walk.frontiers[0].back == figures.PREFIX_TOKENS
        assert all(
            b.front >= a.front and b.back <= a.back for a, b in zip(walk.frontiers, walk.frontiers[1:], strict=False)
        )


def test_figure_6_serving_the_burst_first_saves_time() -> None:
    assert (len(BURST), min(BURST), max(BURST)) == (22, 32, 448)
    burst = figure_6()
    assert burst.fcfs_s == pytest.approx(figures.FIGURE_6_FCFS_S, rel=0.01)
    assert burst.adaptive_s < 0.95 * burst.fcfs_s

"""The picture of codecs: what is on the frontier, and that every point is named."""

from __future__ import annotations

from pathlib import Path

from matplotlib.image import imread

from benchmarks.frontier import MODELS, measured
from cakekv.bench.quality.picture import Measured, beaten_by, frontier, quality_picture

ONE = {
    "best": Measured(100, 0.99, 0.001),
    "small": Measured(50, 0.9, 0.1),
    "twin": Measured(50, 0.9, 0.1),
    "worse": Measured(60, 0.85, 0.2),
    "agrees": Measured(60, 0.95, 0.3),
    "large": Measured(200, 0.98, 0.01),
}


def test_what_is_beaten_lies_inside_the_frontier() -> None:
    better = {recipe: beaten_by(recipe, ONE) for recipe in ONE}
    assert better.pop("worse") == ["small", "twin"]
    assert better.pop("large") == ["best"]
    assert not any(better.values())
    assert frontier([(one.bytes_per_token, one.kl) for one in ONE.values()]) == [(50, 0.1), (100, 0.001)]
    assert frontier([]) == []


def test_a_row_per_model(tmp_path: Path) -> None:
    for models in ({"one": ONE}, {"one": ONE, "another": ONE}):
        quality_picture(models, tmp_path / "codecs.png")
        height, width, _ = imread(tmp_path / "codecs.png").shape
        assert height == round(width * len(models) * 4.6 / 13)


def test_the_committed_measurements_have_what_is_drawn() -> None:
    for files in MODELS.values():
        assert {"int8", "k5v4", "cachegen:level=2"} <= set(measured(*files))

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest

from cakekv.bench.grid import Point, check_grid
from cakekv.bench.picture import bench_picture
from cakekv.errors import BadInput
from cakekv.restore.report import RestoreReport


class Engine:
    max_context = 1000


def check(prefixes: list[int], tokens: int = 2000, suffix: int = 32) -> None:
    engine: Any = Engine()
    check_grid(engine, tokens, prefixes, suffix, 64)


@pytest.mark.parametrize(
    ("prefixes", "tokens", "message"),
    [
        ([64, 100], 2000, "100 tokens is not a multiple"),
        ([0], 2000, "0 tokens is not a multiple"),
        ([960, 1024], 2000, "longer than the model's context"),
        ([512], 543, "longer than the document"),
    ],
)
def test_a_grid_that_cannot_be_measured_is_refused(prefixes: list[int], tokens: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check(prefixes, tokens)


def test_a_grid_that_just_fits_is_accepted() -> None:
    check([64, 512], tokens=544)
    check([960], suffix=40)


def point(prefix: int, ratio: float) -> Point:
    made = Point(prefix, ratio, 1e6 * ratio)
    for repeat in (0.9, 1.0, 1.3):
        compute_s = prefix / 350 * repeat
        load_s = compute_s / ratio
        for mode, seconds in {
            "compute": compute_s,
            "load": load_s,
            "both": 1.05 / (1 / compute_s + 1 / load_s),
        }.items():
            made.runs[mode].append(RestoreReport(mode, prefix + 32, 64, ttft_s=seconds))
        made.bounds.append(1 / (1 / compute_s + 1 / load_s))
    return made


def test_a_point_gives_medians_and_what_follows_from_them() -> None:
    data = point(1024, 2.0).to_dict()
    assert data["compute_s"] == median(data["repeats"]["compute_s"])
    assert data["load_s"] == pytest.approx(data["compute_s"] / 2)
    assert data["both_of_bound"] == pytest.approx(1 / 1.05)
    assert data["both_of_better"] == pytest.approx(data["load_s"] / data["both_s"])
    assert data["bandwidth_bytes_per_s"] == 2e6


def test_a_picture_of_the_grid(tmp_path: Path) -> None:
    points = [point(prefix, ratio).to_dict() for prefix in (1024, 2048, 7168) for ratio in (0.25, 0.5, 1, 2, 4, 8)]
    bench_picture(points, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")

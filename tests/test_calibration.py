"""Costs kept between processes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cakekv import calibration
from cakekv.calibration import Calibration, compute_key, tier_key
from cakekv.errors import CakeError
from cakekv.keys import Identity
from cakekv.restore.costs import ComputeShape, LoadFigures

SHAPE = ComputeShape(0.05, 1e-3, 4e-7)
FIGURES = LoadFigures(1e-8, 0.02, 1e6, 0.01)
IDENTITY = Identity("weights", "architecture", "float32", "layout", 64)


def write(file: Path, key: str, figures: ComputeShape | LoadFigures) -> None:
    kept = Calibration(file)
    kept.keep(key, figures)
    kept.write()


def test_what_was_written_is_read_beside_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "new" / "calibration.json"
    write(file, "a", SHAPE)
    write(file, "b", ComputeShape(1.0, 2.0, 3.0))
    write(file, "t", FIGURES)
    kept = Calibration(file)
    assert kept.compute("a") == SHAPE
    assert kept.compute("b") == ComputeShape(1.0, 2.0, 3.0)
    assert kept.tier("t") == FIGURES
    assert kept.compute("c") is None
    assert [path.name for path in file.parent.iterdir()] == ["calibration.json"]


def test_two_processes_that_were_open_at_once_keep_each_others_figures(tmp_path: Path) -> None:
    first, second = Calibration(tmp_path / "c.json"), Calibration(tmp_path / "c.json")
    first.keep("a", SHAPE)
    second.keep("t", FIGURES)
    first.write()
    second.write()
    assert Calibration(tmp_path / "c.json").compute("a") == SHAPE


def test_a_file_from_before_tiers_were_kept_still_counts(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text('{"a": [0.05, 0.001, 4e-07]}')
    assert Calibration(file).compute("a") == SHAPE
    assert Calibration(file).tier("b") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"a": 5}',
        '{"a": [1.0, 2.0]}',
        '{"a": [1.0, -2.0, 3.0]}',
        '{"a": [1.0, NaN, 3.0]}',
        '{"a": [1.0, Infinity, 3.0]}',
        '{"a": [1e300, 1.0, 3.0]}',
        '{"a": [1.0, 1e-300, 3.0]}',
        '{"a": [true, 1.0, 3.0]}',
        '{"a": ["1.0", 1.0, 3.0]}',
        '{"a": [1e-8, 0.02, 1e6, -1.0]}',
        '{"a": [1e-8, 0.02, 1e300, 0.0]}',
    ],
)
def test_a_damaged_file_is_written_anew(tmp_path: Path, text: str) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(text)
    assert Calibration(file).compute("a") is None
    assert Calibration(file).tier("a") is None
    write(file, "a", SHAPE)
    assert Calibration(file).compute("a") == SHAPE


def test_a_pipe_in_its_place_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "calibration.json")
    assert Calibration(tmp_path / "calibration.json").compute("a") is None


def test_it_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MAX_ENTRIES", 3)
    for key in "abcadb":
        write(tmp_path / "c.json", key, SHAPE)
    assert list(json.loads((tmp_path / "c.json").read_text())) == ["a", "d", "b"]


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CakeError, match="CAKEKV_CACHE"):
        write(tmp_path / "file" / "calibration.json", "a", SHAPE)


def test_the_key_names_what_costs_depend_on() -> None:
    key = compute_key(IDENTITY, "cpu 2", 512)
    assert key == compute_key(replace(IDENTITY, tenant="x", chunk_tokens=32), "cpu 2", 512)
    assert key != compute_key(replace(IDENTITY, weights="other"), "cpu 2", 512)
    assert key != compute_key(IDENTITY, "cpu 4", 512)
    assert key != compute_key(IDENTITY, "cpu 2", 1024)
    tier = tier_key("file:///kv", "cpu 2", 4096)
    assert len({key, tier, tier_key("file:///kv", "cpu 4", 4096), tier_key("file:///kv", "cpu 2", 8192)}) == 4

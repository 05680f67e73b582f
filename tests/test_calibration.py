"""Compute costs kept between processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cakekv.calibration import calibration_key, read_calibration, write_calibration
from cakekv.errors import CakeError
from cakekv.keys import Identity
from cakekv.restore.costs import ComputeShape

SHAPE = ComputeShape(0.05, 1e-3, 4e-7)
IDENTITY = Identity("weights", "architecture", "float32", "layout", 64)


def test_what_was_written_is_read_beside_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "new" / "calibration.json"
    write_calibration(file, "a", SHAPE)
    write_calibration(file, "b", ComputeShape(1.0, 2.0, 3.0))
    assert read_calibration(file, "a") == SHAPE
    assert read_calibration(file, "b") == ComputeShape(1.0, 2.0, 3.0)
    assert read_calibration(file, "c") is None
    assert [path.name for path in file.parent.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"a": 5}', '{"a": [1.0, 2.0]}', '{"a": [1.0, -2.0, 3.0]}', '{"a": [1.0, NaN, 3.0]}']
)
def test_a_damaged_file_is_written_anew(tmp_path: Path, text: str) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(text)
    assert read_calibration(file, "a") is None
    write_calibration(file, "a", SHAPE)
    assert read_calibration(file, "a") == SHAPE


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CakeError, match="CAKEKV_CACHE"):
        write_calibration(tmp_path / "file" / "calibration.json", "a", SHAPE)


def test_the_key_names_what_costs_depend_on() -> None:
    key = calibration_key(IDENTITY, "cpu 2", 512)
    assert key == calibration_key(replace(IDENTITY, tenant="x", chunk_tokens=32), "cpu 2", 512)
    assert key != calibration_key(replace(IDENTITY, weights="other"), "cpu 2", 512)
    assert key != calibration_key(IDENTITY, "cpu 4", 512)
    assert key != calibration_key(IDENTITY, "cpu 2", 1024)

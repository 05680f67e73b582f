from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from cakekv.cli.main import app


def test_figures_and_their_intervals_are_written(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    common = ["quality", "--model", tiny_model, "--documents", 3, "--tokens", 256, "--continuation", 16]
    result = CliRunner().invoke(app, [str(one) for one in [*common, "--recipe", "int8", "--json", file]])
    assert result.exit_code == 0, result.stderr
    data = json.loads(file.read_text())
    for name in ("agreement", "kl", "bytes_per_token", "ratio", "encode_gbps", "decode_gbps"):
        low, high = data["intervals"][name]
        assert low <= data[name] <= high
    assert data["ratio"] > 1
    assert len(data["documents"]) == 3
    assert "int8" in result.stdout
    both = CliRunner().invoke(app, [str(one) for one in [*common, "--recipe", "int8", "--recipe", "raw"]])
    assert both.exit_code == 0
    assert "raw" in both.stdout


def test_bad_input_is_refused(tiny_model: Path) -> None:
    result = CliRunner().invoke(app, ["quality", "--model", str(tiny_model), "--recipe", "int9"])
    assert result.exit_code == 2
    assert "int9" in result.stderr

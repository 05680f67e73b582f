from __future__ import annotations

import json
from pathlib import Path

import typer
from typer.testing import CliRunner

from benchmarks import scbench
from cakekv.cli.main import app as cli
from tests.cli.conftest import tiny_model

__all__ = ["tiny_model"]


def test_turns_are_measured_and_printed(tiny_model: Path, tmp_path: Path) -> None:
    train = ["less", "train", "--model", str(tiny_model), "--documents", "3", "--tokens", "96", "--epochs", "1"]
    assert CliRunner().invoke(cli, train).exit_code == 0
    app, file = typer.Typer(), tmp_path / "scbench.json"
    app.command()(scbench.main)
    small = ["--sessions", "1", "--tokens", "420", "--task", "kv", "--model", str(tiny_model), "--json", str(file)]
    result = CliRunner().invoke(app, small)
    assert result.exit_code == 0, result.output
    names = [method["name"] for method in json.loads(file.read_text())["methods"]]
    assert names == ["full", *scbench.CODECS, *scbench.METHODS, *scbench.SIGHTS]
    printed = CliRunner().invoke(app, ["--print", str(file)])
    assert printed.exit_code == 0
    assert "kv does not count" in printed.output

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import identity
from tests.matrix.models import build


def test_looks_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_demo", lambda: build("llama"))
    app = typer.Typer()
    app.command()(identity.main)
    file = tmp_path / "identity.json"
    result = CliRunner().invoke(app, ["--looks", "5", "--json", str(file)])
    assert result.exit_code == 0, result.output
    data = json.loads(file.read_text())
    assert data["models"]["300 tensors"]["tensors"] == 300
    for figures in data["models"].values():
        assert 0 < figures["look_ms"] <= figures["look_95_ms"] < figures["first_ms"]

"""cakekv share calibrate: once per model; then layers share what others keep."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from cakekv.cake import Cake
from cakekv.cli.main import app


def test_a_map_is_found_and_used(tiny_model: Path, document: Path, tmp_path: Path) -> None:
    ask = ["ask", "--model", str(tiny_model), "--document", str(document), "--question", "What?", "--share", "1"]
    ask += ["--store", str(tmp_path / "store"), "--max-new-tokens", "2"]
    without = CliRunner().invoke(app, ask)
    assert without.exit_code == 2
    assert "cakekv share calibrate" in without.output
    out = tmp_path / "map.json"
    calibrate = ["share", "calibrate", "--model", str(tiny_model), "--documents", "2", "--layers", "1"]
    run = CliRunner().invoke(app, [*calibrate, "--out", str(out)])
    assert run.exit_code == 0, run.output
    assert "layer 1 attends to what layer 0 keeps" in run.output
    assert CliRunner().invoke(app, ask).exit_code == 0
    with Cake.from_pretrained(tiny_model) as plain, Cake.from_pretrained(tiny_model, share=out) as cake:
        assert 2 * cake.engine.layout.token_bytes == plain.engine.layout.token_bytes
        assert cake.identity.architecture != plain.identity.architecture

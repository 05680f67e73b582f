"""cakekv share calibrate: once per model; then layers share what others keep."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cakekv.cake import Cake
from cakekv.cli.main import app
from cakekv.errors import BadInput


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


def test_a_codec_learns_the_model_as_it_is_used(tiny_model: Path, tmp_path: Path) -> None:
    file, learn = tmp_path / "map.json", ["--model", str(tiny_model), "--documents", "3", "--tokens", "64"]
    assert CliRunner().invoke(app, ["share", "calibrate", *learn, "--layers", "1", "--out", str(file)]).exit_code == 0
    assert CliRunner().invoke(app, ["codec", "learn", *learn]).exit_code == 0
    with pytest.raises(BadInput, match="cakekv codec learn"):  # what it knows is of other layers
        Cake.from_pretrained(tiny_model, share=1, codec="kvtc")
    assert CliRunner().invoke(app, ["codec", "learn", *learn, "--share", "1"]).exit_code == 0
    with Cake.from_pretrained(tiny_model, tmp_path / "kv", share=1, codec="kvtc", chunk_tokens=16) as cake:
        text = "What is shared is kept once. " * 4
        assert cake.generate(text, max_new_tokens=2).token_ids
        cake.wait_saved()
        assert cake.generate(text, max_new_tokens=2, mode="load").report.loaded_tokens > 0

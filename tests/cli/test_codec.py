"""cakekv codec learn: once per model; then the codec that needed it works."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cakekv.cake import Cake
from cakekv.cli.main import app
from cakekv.codec.basis import read_basis
from cakekv.errors import BadInput


def test_a_model_is_learned(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cakekv codec learn"):
        Cake.from_pretrained(str(tiny_model), codec="kvtc")
    out = tmp_path / "tiny.basis"
    learn = ["codec", "learn", "--model", str(tiny_model), "--documents", "3", "--tokens", "128", "--out", str(out)]
    run = CliRunner().invoke(app, learn)
    assert run.exit_code == 0, run.output
    digest = read_basis(out).digest
    assert digest in run.output
    with Cake.from_pretrained(str(tiny_model), codec="kvtc") as cake:
        assert digest in cake.codec.fingerprint
    assert CliRunner().invoke(app, learn).exit_code == 0
    assert read_basis(out).digest == digest


def test_its_help() -> None:
    run = CliRunner().invoke(app, ["codec", "learn", "--help"])
    assert run.exit_code == 0
    assert "CAKEKV_CACHE" in run.output


def test_too_few_texts(tiny_model: Path, tmp_path: Path) -> None:
    learn = ["codec", "learn", "--model", str(tiny_model), "--texts", str(tmp_path), "--documents", "4"]
    run = CliRunner().invoke(app, learn)
    assert run.exit_code != 0
    assert "not enough text" in run.output

"""cakekv less train: once per model; then decode=less, which needed it, works."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from cakekv.cli.main import app
from cakekv.decode.less_kernels import read_kernels


def _train(model: Path, *more: str) -> list[str]:
    return ["less", "train", "--model", str(model), "--documents", "3", "--tokens", "96", "--epochs", "1", *more]


def test_a_model_is_learned_twice_alike(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.less"
    run = CliRunner().invoke(app, _train(tiny_model, "--out", str(out)))
    assert run.exit_code == 0, run.output
    learned = read_kernels(out)
    assert learned.digest in run.output
    assert sorted(learned.layers) == [0, 1]
    assert learned.about["recent"] == "28"
    assert CliRunner().invoke(app, _train(tiny_model, "--out", str(out))).exit_code == 0
    assert read_kernels(out).digest == learned.digest


def test_what_was_learned_is_tuned(tiny_model: Path, tmp_path: Path) -> None:
    """It begins with what was learned before, and is found in its place."""
    out, tuned = tmp_path / "tiny.less", tmp_path / "tuned.less"
    assert CliRunner().invoke(app, _train(tiny_model, "--out", str(out))).exit_code == 0
    options = ["--documents", "2", "--tokens", "512", "--rounds", "1", "--out", str(tuned)]
    run = CliRunner().invoke(app, ["less", "tune", "--model", str(tiny_model), *options])
    assert run.exit_code == 0, run.output
    learned = read_kernels(tuned)
    assert learned.about["tuned_tokens"] == "512"
    assert learned.about["epochs"] == "1"
    assert learned.layers[0].key_in.shape == read_kernels(out).layers[0].key_in.shape
    assert "without a state" in run.output


def test_too_few_texts(tiny_model: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(app, _train(tiny_model, "--texts", str(tmp_path), "--documents", "4"))
    assert run.exit_code != 0
    assert "not enough text" in run.output

"""`cakekv simulate cluster`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from cakekv.cli.simulate_cluster import cluster
from cakekv.errors import BadInput


def call(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(cluster)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_sample_compared(tmp_path: Path) -> None:
    file, picture = tmp_path / "cluster.json", tmp_path / "cluster.png"
    result = call("--json", file, "--picture", picture, "--requests", 400, "--policy", "marginal_saving")
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    data = json.loads(file.read_text())
    assert data["settings"]["requests"] == 400
    systems = {system["system"]: system for system in data["systems"]}
    assert list(systems) == ["compute", "load", "layerwise", "cake", "ours", "ours-layered"]
    for name, system in systems.items():
        assert name in result.output
        assert len(system["ttft_quantiles_s"]) == len(data["quantiles"]) == 101
        assert system["p50_ttft_s"] <= system["p99_ttft_s"] <= system["ttft_quantiles_s"][100]
        assert system["goodput_per_s"] <= system["throughput_per_s"]
    assert systems["compute"]["loaded_remote_tokens"] == 0
    assert systems["ours"]["computed_tokens"] < systems["compute"]["computed_tokens"]
    assert systems["ours"]["mean_ttft_s"] < systems["compute"]["mean_ttft_s"]


def test_a_slow_remote_tier_makes_loading_a_loss_and_ours_no_slower_than_computing(tmp_path: Path) -> None:
    file = tmp_path / "cluster.json"
    slow = ("--tiers", "remote=10TB@25Gbps", "--bandwidth", "1Gbps", "--speed-up", "20", "--json", file)
    assert call(*slow, "--systems", "compute,load,ours").exit_code == 0
    compute, load, ours = (system["mean_ttft_s"] for system in json.loads(file.read_text())["systems"])
    assert ours < compute < load


def test_a_measured_calibration_replaces_the_data_sheet(tmp_path: Path) -> None:
    calibration, file = tmp_path / "calibration.json", tmp_path / "cluster.json"
    calibration.write_text('{"fixed": 0.0, "linear": 0.001, "quadratic": 0.0}')
    arguments = ("--systems", "compute", "--gpus", 100, "--requests", 1, "--json", file)
    assert call("--calibration", calibration, *arguments).exit_code == 0
    data = json.loads(file.read_text())
    assert data["settings"]["compute_shape"] == {"fixed": 0.0, "linear": 0.001, "quadratic": 0.0}
    assert data["systems"][0]["mean_ttft_s"] == pytest.approx(data["systems"][0]["computed_tokens"] * 0.001)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--systems", "ours,magic"), "there is no system 'magic'"),
        (("--policy", "best"), "there is no priority policy 'best'"),
        (("--routing", "random"), "there is no routing 'random'"),
        (("--model", "gpt-9"), "does not know the model 'gpt-9'"),
        (("--gpu", "abacus"), "does not know the GPU 'abacus'"),
        (("--gpus", "6", "--gpus-per-node", "4"), "make --gpus a multiple"),
        (("--speed-up", "0"), "give a factor above 0"),
        (("--speed-up", "nan"), "give a factor above 0"),
        (("--bandwidth", "fast"), "'fast' is not a bandwidth"),
        (("--bandwidth", "unlimited"), "--bandwidth needs a limit"),
        (("--ttft-target", "soon"), "'soon' is not a duration"),
        (("--tiers", "disk=1GB@1GB/s"), "is not a tier"),
        (("--trace", "absent.jsonl"), "cannot be read"),
        (("--calibration", "absent.json"), "is not a calibration"),
    ],
)
def test_bad_settings_are_refused(arguments: tuple[str, ...], complaint: str) -> None:
    result = call(*arguments)
    assert isinstance(result.exception, BadInput)
    assert complaint in str(result.exception)

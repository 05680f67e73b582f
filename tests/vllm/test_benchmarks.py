"""The benchmark program runs from end to end, on a tiny model, and its results hold what they should."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_engine import save_model
from typer.testing import CliRunner

from benchmarks import vllm_burst, vllm_load, vllm_overhead, vllm_peers, vllm_restore
from cakekv.bench.picture import bench_picture
from cakekv.bench.vllm.asking import Answer
from cakekv.bench.vllm.lmcache import LMCacheServer
from cakekv.demo.model import demo_model
from cakekv.errors import BadInput, CakeError

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"


def program(main: Callable[..., None]) -> typer.Typer:
    app = typer.Typer()
    app.command()(main)
    return app


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_model(tmp_path / "model", vocab_size=49152)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, folder / name)
    return folder


@pytest.mark.slow
def test_restore_measures_all_arms_and_compares_their_answers(
    model: Path, tmp_path: Path, server_environment: None
) -> None:
    results, picture = tmp_path / "out" / "bench.json", tmp_path / "out" / "bench.png"
    words = ["--json", str(results), "--picture", str(picture), "--model", str(model), "--repeats", "1"]
    words += ["--prefix", "512", "--suffix", "40", "--ratios", "1", "--link", "software"]
    words += ["--serve", "--enforce-eager --dtype float32 --max-model-len 2048"]
    run = CliRunner().invoke(program(vllm_restore.main), words)
    assert run.exit_code == 0, run.output
    (point,) = json.loads(results.read_text())["points"]
    assert point["identical"]
    assert point["bandwidth_ratio"] == 1
    for name in ("compute_s", "load_s", "both_s", "bound_s"):
        assert point[name] > 0
        assert len(point["repeats"][name]) == 1
    (computed,), (loaded,) = point["repeats"]["computed_tokens"], point["repeats"]["loaded_tokens"]
    assert computed + loaded == 552
    assert picture.stat().st_size > 0


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists() or os.geteuid() != 0, reason="needs make install-peers, and root for a link")
def test_peers_are_asked_the_same_and_answer_the_same(model: Path, tmp_path: Path, server_environment: None) -> None:
    results, picture = tmp_path / "out" / "bench.json", tmp_path / "out" / "bench.png"
    words = ["--json", results, "--picture", picture, "--model", model, "--prefix", "512", "--suffix", "40"]
    words += ["--ratios", "1", "--repeats", "1", "--store-repeats", "1"]
    words += ["--serve", "--enforce-eager --dtype float32 --max-model-len 2048"]
    run = subprocess.run(
        [PEERS, "benchmarks/vllm_peers.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    data = json.loads(results.read_text())
    (point,) = data["points"]
    assert point["identical"]
    assert point["repeats"]["lmcache_loaded_bytes"][0] >= data["stored_bytes"]["lmcache"] > 0
    assert data["stored_bytes"]["cakekv"] == pytest.approx(data["stored_bytes"]["lmcache"], rel=0.1)
    assert [line["bandwidth_ratio"] for line in data["storing"]] == [None, 1]
    for name in ("plain", "lmcache", "cakekv"):
        assert len(point["repeats"][f"{name}_s"]) == len(data["storing"][0]["repeats"][f"{name}_ttft_s"]) == 1
    assert picture.stat().st_size > 0


def test_peers_must_store_the_same() -> None:
    for words in (["--prefix", "500"], ["--suffix", "256"]):
        run = CliRunner().invoke(program(vllm_peers.main), words)
        assert isinstance(run.exception, BadInput)


def test_a_picture_of_peers(tmp_path: Path) -> None:
    times = {f"{line.name}_s": 2.0 for line in vllm_peers.LINES}
    point = {"prefix_tokens": 512, **times, "repeats": {name: [taken] for name, taken in times.items()}}
    points = [{**point, "bandwidth_ratio": ratio} for ratio in (0.5, 1.0)]
    bench_picture(points, tmp_path / "peers.png", vllm_peers.LINES)
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_is_not_installed_is_told_how_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(CakeError, match="make install-peers"), LMCacheServer("127.0.0.1", 6379, 256, tmp_path / "log"):
        pass


@pytest.mark.parametrize("main", [vllm_burst.main, vllm_load.main, vllm_overhead.main, vllm_peers.main])
def test_the_other_programs_say_what_they_take(main: Any) -> None:
    run = CliRunner().invoke(program(main), ["--help"])
    assert run.exit_code == 0
    assert "--json" in run.output


def test_figures_of_a_run() -> None:
    answers = [Answer(0.0, [1.0, 1.5, 2.5], [1, 2, 3]), Answer(1.0, [4.0], [1])]
    assert answers[0].ttft_s == 1.0
    figures = vllm_load._figures(answers)
    assert figures["mean_ttft_s"] == 2.0
    assert figures["mean_gap_s"] == 0.75
    assert figures["tokens_per_s"] == 1.0

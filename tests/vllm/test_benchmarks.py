"""The benchmark program runs from end to end, on a tiny model, and its results hold what they should."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest
import typer
from benchmarks import vllm_burst, vllm_load, vllm_overhead, vllm_restore
from tiny_engine import save_model
from typer.testing import CliRunner

from cakekv.bench.vllm.asking import Answer
from cakekv.demo.model import demo_model


def program(main: Callable[..., None]) -> typer.Typer:
    app = typer.Typer()
    app.command()(main)
    return app


@pytest.fixture
def model(tmp_path):
    folder = save_model(tmp_path / "model", vocab_size=49152)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, folder / name)
    return folder


@pytest.mark.slow
def test_restore_measures_all_arms_and_compares_their_answers(model, tmp_path, server_environment):
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


@pytest.mark.parametrize("main", [vllm_burst.main, vllm_load.main, vllm_overhead.main])
def test_the_other_programs_say_what_they_take(main):
    run = CliRunner().invoke(program(main), ["--help"])
    assert run.exit_code == 0
    assert "--json" in run.output


def test_figures_of_a_run():
    answers = [Answer(0.0, [1.0, 1.5, 2.5], [1, 2, 3]), Answer(1.0, [4.0], [1])]
    assert answers[0].ttft_s == 1.0
    assert answers[0].took_s == 2.5
    figures = vllm_load._figures(answers)
    assert figures["mean_ttft_s"] == 2.0
    assert figures["mean_gap_s"] == 0.75
    assert figures["tokens_per_s"] == 1.0

"""The benchmark program runs from end to end, on a tiny model, and its results hold what they should."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_engine import save_model
from typer.testing import CliRunner

from benchmarks import vllm_burst, vllm_client, vllm_load, vllm_overhead, vllm_peers, vllm_restore, vllm_reuse
from cakekv.bench.picture import bench_picture
from cakekv.bench.servers import free_port
from cakekv.bench.vllm.asking import Answer
from cakekv.bench.vllm.client import bench_serve
from cakekv.bench.vllm.lmcache import LMCacheServer
from cakekv.bench.vllm.server import Server
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
def test_reuse_replaces_its_own_results(
    model: Path, tmp_path: Path, server_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "reuse.json"
    others = {"methods": [1], "ttft": [{"engine": "embedded"}, {"engine": "vllm"}]}
    results.write_text(json.dumps(others))
    monkeypatch.setattr(vllm_reuse, "LOG", tmp_path / "reuse.log")
    words = ["--json", str(results), "--model", str(model), "--tiny"]
    words += ["--serve", "--enforce-eager --dtype float32 --max-model-len 2048"]
    run = CliRunner().invoke(program(vllm_reuse.main), words)
    assert run.exit_code == 0, run.output
    data = json.loads(results.read_text())
    assert data["methods"] == [1]
    embedded, point = data["ttft"]
    assert embedded == {"engine": "embedded"}
    assert (point["engine"], point["method"]) == ("vllm", "epic:link=16")
    assert 0 <= point["agreement"] <= 1
    assert point["compute_s"] > 0
    assert point["reuse_s"] > 0
    assert point["prompt_tokens"] == 40 + 512 + 24


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
    with pytest.raises(CakeError, match="make install-peers"), LMCacheServer({}, 256, tmp_path / "log"):
        pass


def check_rows_of_client(results: Path, systems: Sequence[str]) -> None:
    rows = {(row["system"], row["dataset"]): row for row in json.loads(results.read_text())["rows"]}
    assert set(rows) == {(name, dataset) for name in systems for dataset in ("prefix_repetition", "multi_turn")}
    for (name, dataset), row in rows.items():
        assert row["requests"] == row["cold_requests"] == (6 if dataset == "prefix_repetition" else 12)
        for key in ("duration_s", "mean_ttft_s", "p99_ttft_s"):
            assert row[key] == row["repeats"][0]["warm"][key] > 0
            assert row[f"cold_{key}"] > 0
        assert (row["loaded_tokens"] > 0) == (name != "vllm")


@pytest.mark.slow
def test_the_client_of_vllm_asks_each_system_the_same(model: Path, tmp_path: Path, server_environment: None) -> None:
    results = tmp_path / "out" / "client.json"
    words = ["--json", str(results), "--model", str(model), "--tiny", "--repeats", "1", "--systems", "vllm,cakekv"]
    run = CliRunner().invoke(program(vllm_client.main), words)
    assert run.exit_code == 0, run.output
    check_rows_of_client(results, ("vllm", "cakekv"))


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="needs make install-peers")
def test_the_client_of_vllm_asks_lmcache_too(model: Path, tmp_path: Path, server_environment: None) -> None:
    results = tmp_path / "out" / "client.json"
    words = ["--json", results, "--model", model, "--tiny", "--repeats", "1"]
    run = subprocess.run(
        [PEERS, "benchmarks/vllm_client.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    check_rows_of_client(results, ("vllm", "cakekv", "lmcache"))


def test_systems_that_are_not_known() -> None:
    run = CliRunner().invoke(program(vllm_client.main), ["--systems", "vllm,sglang"])
    assert isinstance(run.exception, BadInput)
    assert "sglang" in str(run.exception)


def test_a_request_that_fails_ends_the_measurement(tmp_path: Path) -> None:
    server = Server(demo_model(), tmp_path / "log")
    server.port = free_port()  # where nobody answers
    file = tmp_path / "conversations.json"
    turns = [
        {"from": "human", "value": "How do I open a file?"},
        {"from": "gpt", "value": "With open(), in a with block."},
    ]
    file.write_text(json.dumps([{"conversations": turns}]))
    words = ["--dataset-name", "sharegpt", "--dataset-path", str(file)]
    with pytest.raises(CakeError, match="0 of 1 requests were answered"):
        bench_serve(server, words, requests=1, at_once=1)
    assert "Failed requests" in server.log.read_text()


def test_between_two_turns_of_a_conversation_all_others_have_one(tmp_path: Path) -> None:
    class Numbers:
        """Prompts of tokens that no other has."""

        begin = 1000

        def next(self, length: int) -> list[int]:
            self.begin += length
            return list(range(self.begin - length, self.begin))

    workload = vllm_client.TINY._replace(conversations=3, turns=3, turn_tokens=100)
    numbers: Any = Numbers()
    entries = vllm_client._conversations(workload, demo_model(), numbers, seed=0)
    said = [entry["conversations"][0]["value"] for entry in entries]
    assert len(set(said)) == 9
    for earlier, later in zip(said, said[3:], strict=False):
        assert later.startswith(earlier)
    assert len({text[:50] for text in said}) == 3


@pytest.mark.parametrize(
    "main", [vllm_burst.main, vllm_client.main, vllm_load.main, vllm_overhead.main, vllm_peers.main]
)
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

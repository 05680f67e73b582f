from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import gpu
from cakekv.bench.decoding import decoding_speeds
from tests.engine.decoding import Decoding
from tests.threads import single_thread

LINKS = [("memory", None), ("memory", 7), ("disk", None), ("disk", 7)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_thread():
        yield


def run(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(gpu.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_point_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    recipes = ["--recipes", "int4 nuq3"]
    run("--tiny", "--device", "cpu", "--gbps", 7, "--repeats", 2, "--json", file, "--folder", tmp_path, *recipes)
    data = json.loads(file.read_text())
    assert data["device"] == data["machine"]["processor"]
    assert data["token_bytes"] == 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, width, bfloat16
    assert data["left_out"] == []
    assert [speeds["recipe"] for speeds in data["decoding"]] == ["int4", "nuq3"]
    for speeds in data["decoding"]:
        assert speeds["exact_bytes"] == data["token_bytes"] * data["chunk_tokens"]
        assert speeds["coded_bytes"] < speeds["exact_bytes"]
        assert speeds["cores_gbps"] > 0
        assert speeds["device_gbps"] is None, "a CPU is no device"
    assert [(point["prefix_tokens"], point["tier"], point["link_gbps"]) for point in data["points"]] == [
        (prefix, *link) for prefix in (256, 512) for link in LINKS
    ]
    for point in data["points"]:
        check_point(point, suffix_tokens=data["suffix_tokens"])
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"], "the stores are removed"


def check_point(point: dict[str, Any], suffix_tokens: int) -> None:
    repeats = point["repeats"]
    assert all(len(values) == 2 for values in repeats.values())
    for computed, loaded in zip(repeats["computed_tokens"], repeats["loaded_tokens"], strict=True):
        assert computed + loaded == point["prefix_tokens"] + suffix_tokens
    assert point["bandwidth_bytes_per_s"] == (None if point["link_gbps"] is None else 7e9 / 8)
    for mode in ("both", "auto"):
        assert point[f"{mode}_of_bound"] == point["bound_s"] / point[f"{mode}_s"]
        assert point[f"{mode}_of_better"] == min(point["compute_s"], point["load_s"]) / point[f"{mode}_s"]


def test_what_there_is_no_time_for_is_left_out_and_named(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    output = run("--tiny", "--device", "cpu", "--gbps", 7, "--minutes", 0, "--json", file, "--recipes", "")
    data = json.loads(file.read_text())
    assert "decoding" not in data
    assert data["points"] == []
    assert data["left_out"] == [
        {"tier": tier, "link_gbps": link_gbps, "prefix_tokens": prefix, "repeats": 3}
        for prefix in (256, 512)
        for tier, link_gbps in LINKS
    ]
    assert output.count("left out") == 8


def test_a_point_is_expected_to_take_as_before_or_at_most_quadratically_longer() -> None:
    took_s = {("disk", 4096): 1.0, ("disk", 8192): 3.0, ("memory", 4096): 0.5}
    link: Any = SimpleNamespace(name="disk")
    assert gpu.expected_s(took_s, link, 4096) == 1.0
    assert gpu.expected_s(took_s, link, 8192) == 3.0
    assert gpu.expected_s(took_s, link, 32_768) == 3.0 * 16
    assert gpu.expected_s(took_s, link, 2048) == 0.0


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "gpu.json"
    assert "needs a GPU" in run("--json", file)
    assert not file.exists()


def test_a_device_that_decodes_is_measured_beside_the_cores() -> None:
    engine = Decoding(gpu.build_engine(gpu.TINY, "cpu").model)
    (speeds,) = decoding_speeds(engine, 512, ["int8"], repeats=3)
    assert speeds["device_gbps"] > 0
    assert len(engine.decoded) == 3 * len(engine.layout.layers)
    assert "one core decodes" in gpu.describe_decoding(speeds)
    assert "the GPU decodes" in gpu.describe_decoding(speeds)
    assert "the GPU does not" in gpu.describe_decoding(speeds | {"device_gbps": None})

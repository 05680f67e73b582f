from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cakekv.cli.main import app
from cakekv.errors import CakeError


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_bench_measures_every_point(
    tiny_model: Path, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/cakekv", "bench"])
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    code, _, err = run(
        *("bench", "--json", out, "--picture", picture, "--model", tiny_model, "--document", document),
        *("--prefixes", "128,512", "--ratios", "0.5,2", "--repeats", "2", "--folder", tmp_path),
    )
    assert code == 0, err
    data = json.loads(out.read_text())
    assert [(point["prefix_tokens"], point["bandwidth_ratio"]) for point in data["points"]] == [
        (prefix, ratio) for prefix in (128, 512) for ratio in (0.5, 2)
    ]
    assert data["machine"]["cores"] >= 1
    assert data["command"] == "cakekv bench"
    for point in data["points"]:
        assert point["both_of_bound"] == point["bound_s"] / point["both_s"]
        assert point["both_of_better"] == min(point["compute_s"], point["load_s"]) / point["both_s"]
        assert point["bound_s"] > 0
        repeats = point["repeats"]
        assert all(len(values) == 2 for values in repeats.values())
        for computed, loaded in zip(repeats["computed_tokens"], repeats["loaded_tokens"], strict=True):
            assert computed + loaded == point["prefix_tokens"] + 32
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [], "the stores are removed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefixes", "100"], "multiple of the chunk"),
        (["--prefixes", "many"], "prefix lengths"),
        (["--ratios", "1,-1"], "positive"),
        (["--ratios", "inf"], "positive"),
        (["--prefixes", "65536"], "longer than the document"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(
    tiny_model: Path, document: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "bench.json"
    code, _, err = run("bench", "--json", out, "--model", tiny_model, "--document", document, *arguments)
    assert code == 2
    assert message in err
    assert not out.exists()


def test_demo_three_ways_with_the_same_answer(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cakekv.demo.model.demo_model", lambda: tiny_model)
    for _ in range(2):  # what the first run leaves behind does not disturb the second
        code, out, err = run("demo", "--out", tmp_path, "--tokens", "5000", "--json")
        assert code == 0, err
        data = json.loads(out)
        assert data == json.loads((tmp_path / "demo.json").read_text())
        assert data["identical"] is True
        assert 3000 < data["document_tokens"] <= 5000
        modes = data["modes"]
        assert list(modes) == ["compute", "load", "both"]
        assert modes["compute"]["loaded_tokens"] == 0
        assert modes["compute"]["met_at"] is None
        assert modes["load"]["computed_tokens"] < 64
        assert modes["both"]["loaded_tokens"] > 0
        assert modes["both"]["computed_tokens"] >= modes["both"]["met_at"] > 0
        single = min(modes["compute"]["ttft_s"], modes["load"]["ttft_s"])
        assert data["both_over_better_single_arm"] == modes["both"]["ttft_s"] / single
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    code, out, _ = run("store", "verify", tmp_path / "demo-store", "--json")
    assert code == 0
    assert json.loads(out)["chunks"] == modes["load"]["loaded_tokens"] / 64


@pytest.mark.parametrize(
    ("computes", "dtype", "expected"),
    [(True, "auto", "bfloat16"), (False, "auto", "float32"), (False, "bfloat16", "bfloat16")],
)
def test_the_demos_model_is_float32_where_bfloat16_is_slow(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computes: bool, dtype: str, expected: str
) -> None:
    from transformers import LlamaForCausalLM

    from cakekv.cli.model import load_cake

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    LlamaForCausalLM.from_pretrained(tiny_model, dtype="bfloat16").save_pretrained(folder)
    monkeypatch.setattr("cakekv.demo.model.demo_model", lambda: folder)
    monkeypatch.setattr("cakekv.demo.model.computes_bfloat16", lambda: computes)
    with load_cake("demo", None, dtype=dtype) as cake:
        engine: Any = cake.engine
        assert str(engine.model.dtype) == f"torch.{expected}"


def test_a_missing_demo_model_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAKEKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("cakekv.demo.model.PACKAGE", "no_such_package")
    code, _, err = run("demo", "--out", tmp_path / "out")
    assert code == 1
    assert "make install" in err


def test_the_model_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cakekv.demo import model

    def fails_midway(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise OSError("no space left on device")

    def converts(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")

    package = tmp_path / "package" / "pretend_smollm2"
    package.mkdir(parents=True)
    (package / model.GGUF_FILE).touch()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("CAKEKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "PACKAGE", package.name)
    monkeypatch.setattr(model, "_convert", fails_midway)
    with pytest.raises(CakeError, match="no space left"):
        model.demo_model()
    assert not model.is_converted()
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    monkeypatch.setattr(model, "_convert", converts)
    assert (model.demo_model() / "config.json").is_file()
    monkeypatch.setattr(model, "_convert", fails_midway)
    assert model.demo_model().is_dir(), "it is converted once"
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1

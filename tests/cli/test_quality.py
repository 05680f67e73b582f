from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cakekv.cli.main import app


def test_figures_and_their_intervals_are_written(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    common = ["quality", "--model", tiny_model, "--documents", 3, "--tokens", 256, "--continuation", 16]
    result = CliRunner().invoke(app, [str(one) for one in [*common, "--recipe", "int8", "--json", file]])
    assert result.exit_code == 0, result.stderr
    data = json.loads(file.read_text())
    for name in ("agreement", "kl", "bytes_per_token", "ratio", "encode_gbps", "decode_gbps"):
        low, high = data["intervals"][name]
        assert low <= data[name] <= high
    assert data["ratio"] > 1
    assert len(data["documents"]) == 3
    assert "int8" in result.stdout
    two = ["--recipe", "int8", "--recipe", "raw", "--json", file]
    both = CliRunner().invoke(app, [str(one) for one in [*common, *two]])
    assert both.exit_code == 0
    assert "raw" in both.stdout
    data = json.loads(file.read_text())
    (pair,) = data["paired"]
    assert (pair["a"], pair["b"]) == ("int8", "raw")
    assert pair["kl"] == data["recipes"][0]["kl"] > 0
    assert pair["kl_ratio"] is None  # raw has none
    halves = ["--recipe", "int8", "--computed", "0", "--computed", "0.5", "--json", file]
    assert CliRunner().invoke(app, [str(one) for one in [*common, *halves]]).exit_code == 0
    data = json.loads(file.read_text())
    assert [one["computed"] for one in data["recipes"]] == [0.0, 0.5]
    assert data["paired"][0]["b"] == "int8, 0.5 computed"


def test_more_recipes_are_added_to_a_file(tiny_model: Path, tmp_path: Path) -> None:
    def judge(file: Path, *arguments: object) -> Any:
        command = ["quality", "--model", tiny_model, "--tokens", 256, "--continuation", 16, "--json", file, *arguments]
        return CliRunner().invoke(app, [str(one) for one in command])

    def answers(file: Path) -> Any:
        """Names, sizes and divergences; roundings may differ where memory is aligned otherwise."""
        data = json.loads(file.read_text())
        exact = [
            [one["recipe"], one["fingerprint"], [(each["kind"], each["stored_bytes"]) for each in one["documents"]]]
            for one in data["recipes"]
        ]
        found = [each["kl"] for one in data["recipes"] for each in one["documents"]]
        pairs = {(pair["a"], pair["b"]): pair["kl"] for pair in data["paired"]}
        return exact, found, pairs

    at_once, one_by_one, three = tmp_path / "at-once.json", tmp_path / "one-by-one.json", ("--documents", 3)
    assert judge(at_once, *three, "--recipe", "int8", "--recipe", "int4", "--recipe", "fp8").exit_code == 0
    for more in (["--recipe", "int8"], ["--recipe", "int8", "--recipe", "int4"], ["--recipe", "fp8"]):
        result = judge(one_by_one, *three, "--add", *more)
        assert result.exit_code == 0, result.stderr
    (exact, found, pairs), (same, *near) = answers(one_by_one), answers(at_once)
    assert exact == same
    assert [found, pairs] == [pytest.approx(one, 1e-3, 1e-6) for one in near]
    assert json.loads(one_by_one.read_text())["command"].count("; then ") == 2

    before = one_by_one.read_text()
    for arguments, complaint in (
        (["--recipe", "int8"], "all of these recipes"),
        (["--recipe", "raw", "--dtype", "float32"], "dtype"),
        (["--recipe", "raw", "--documents", 2], "2 documents"),
    ):
        result = judge(one_by_one, *three, "--add", *arguments)
        assert result.exit_code == 2
        assert complaint in result.stderr
    one_by_one.write_text(before.replace('"asked": ', '"asked": 1'))
    assert "its documents are not those" in judge(one_by_one, *three, "--add", "--recipe", "raw").stderr
    one_by_one.write_text(before.replace('\\"codec\\":\\"int4\\"', '\\"codec\\":\\"int5\\"'))
    assert "judge it again with --recipe int4" in judge(one_by_one, *three, "--add", "--recipe", "raw").stderr
    assert judge(one_by_one, *three, "--add", "--recipe", "int4").exit_code == 0


def test_bad_input_is_refused(tiny_model: Path) -> None:
    result = CliRunner().invoke(app, ["quality", "--model", str(tiny_model), "--recipe", "int9"])
    assert result.exit_code == 2
    assert "int9" in result.stderr


def test_ways_of_reuse_are_judged(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "reuse.json"
    common = ["quality", "--model", tiny_model, "--prompts", 2, "--documents", 2, "--tokens", 320, "--continuation", 8]

    def judge(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(one) for one in [*common, "--json", file, *arguments]])

    result = judge("--reuse", "turned")
    assert result.exit_code == 0, result.stderr
    assert "turned" in result.stdout
    result = judge("--reuse", "naive", "--reuse", "epic:link=16", "--add")
    assert result.exit_code == 0, result.stderr
    assert "turning keys removes" in result.stderr
    data = json.loads(file.read_text())
    assert data["settings"]["documents"] == [2]
    exact, *ways = data["methods"]
    assert [one["name"] for one in ways] == ["turned", "naive", "epic:link=16"]
    assert exact["kl"] == 0.0
    for one in ways:
        low, high = one["intervals"]["kl"]
        assert 0.0 < low <= one["kl"] <= high
        assert (one["facts_two"], len(one["prompts"])) == (2, 2)
    assert ways[2]["recomputed_share"] == 16 / 640
    assert len(data["claims"]) == 3
    assert len(data["paired"]) == 3
    for arguments, complaint in (
        (["--reuse", "turned", "--add"], "all of these ways"),
        (["--reuse", "naiv"], "naiv"),
        (["--reuse", "turned", "--recipe", "int8"], "--recipe"),
        (["--reuse", "turned", "--computed", 0.5], "--computed"),
        (["--recipe", "int8"], "--prompts"),
    ):
        result = judge(*arguments)
        assert result.exit_code == 2
        assert complaint in result.stderr
    assert CliRunner().invoke(app, ["quality"]).exit_code == 2


def test_what_keeps_fewer_tokens_is_judged(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "compress.json"
    common = ["quality", "--model", tiny_model, "--documents", 2, "--tokens", 256, "--continuation", 16]

    def judge(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(one) for one in [*common, "--json", file, *arguments]])

    result = judge("--compress", "sink_recent:share=0.5", "--decode", "whole")
    assert result.exit_code == 0, result.stderr
    assert "sink_recent:share=0.5" in result.stdout
    result = judge("--compress", "heavy_hitter:share=0.5", "--add")
    assert result.exit_code == 0, result.stderr
    data = json.loads(file.read_text())
    assert [(one["name"], one["kept"]) for one in data["methods"]] == [
        ("exact", 1),
        ("sink_recent:share=0.5", 0.5),
        ("whole", 1),
        ("heavy_hitter:share=0.5", 0.5),
    ]
    assert data["methods"][1]["kl"] > 0
    for arguments, complaint in (
        (["--compress", "sink_recent:share=0.5", "--add"], "all of these already"),
        (["--compress", "sink_recent", "--question-first", "--add"], "questions"),
        (["--compress", "sink_recant"], "sink_recant"),
        (["--compress", "sink_recent:share=2"], "share is 2"),
        (["--decode", "hole"], "hole"),
        (["--compress", "sink_recent", "--recipe", "int8"], "--recipe"),
        (["--compress", "sink_recent", "--computed", 0.5], "--computed"),
        (["--compress", "sink_recent", "--prompts", 2], "--prompts"),
    ):
        result = judge(*arguments)
        assert result.exit_code == 2
        assert complaint in result.stderr

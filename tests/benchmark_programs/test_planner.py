from __future__ import annotations

import json
from pathlib import Path

import typer
from typer.testing import CliRunner

from benchmarks import planner


def run(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(planner.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_both_arms_decide(tmp_path: Path) -> None:
    file = tmp_path / "planner.json"
    output = run("--chunks", "20,100", "--opened-chunks", 50, "--repeats", 2, "--json", file)
    data = json.loads(file.read_text())
    assert [row["chunks"] for row in data["decisions"]] == [20, 100]
    for row in data["decisions"]:
        assert row["next_load"]["decisions"] > row["chunks"] / 4
        assert row["next_compute"]["decisions"] > 2
        assert row["all"]["decisions"] == row["next_load"]["decisions"] + row["next_compute"]["decisions"]
        assert all(row[kind]["mean_us"] > 0 for kind in ("next_compute", "next_load", "all"))
    assert data["opening"]["chunks"] == 50
    assert len(data["opening"]["repeats_ms"]) == 2
    assert "target" not in output, "targets are for other lengths"


def test_targets_are_told_where_they_apply() -> None:
    output = run("--chunks", planner.AT_CHUNKS, "--repeats", 1)
    assert output.count("target met") + output.count("target missed") == 2


def test_a_target_is_met_up_to_its_limit() -> None:
    assert planner.verdict(20.0, 20.0, "µs").startswith("target met")
    assert planner.verdict(20.1, 20.0, "µs").startswith("target missed")

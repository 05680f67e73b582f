"""`cakekv simulate` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cakekv.cli.simulate import app
from cakekv.errors import CakeError

PNG = b"\x89PNG"


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_paper(tmp_path: Path) -> None:
    output = invoke("paper", "--json", str(tmp_path / "new/paper.json"), "--picture", str(tmp_path / "paper.png"))
    assert "Table 3" in output
    assert "Figure 5" in output
    assert "met: " in output
    cells = json.loads((tmp_path / "new/paper.json").read_text())
    assert len(cells) == 160
    for cell in cells:
        assert set(cell) == {"table", "row", "column", "paper", "baseline", "ours"}
        assert all(len(cell[name]) == 2 for name in ("paper", "baseline", "ours"))
    first = next(cell for cell in cells if cell["row"] == "2xA100, 12.5%" and cell["column"] == "7 Gbps")
    assert (first["table"], first["paper"]) == (3, [1.87, 2.18])
    figures = json.loads((tmp_path / "new/paper-figures.json").read_text())
    assert set(figures) == {"figure_5", "figure_6", "summary", "verdicts"}
    assert (tmp_path / "paper.png").read_bytes().startswith(PNG)


def test_plan() -> None:
    arguments = ("plan", "--model", "Llama-3.1-8B", "--tokens", "16000", "--bandwidth", "7Gbps", "--compute", "A100")
    output = invoke(*arguments)
    assert "breaks even" in output
    assert "Storing pays." in output
    data = json.loads(invoke(*arguments, "--suffix", "500", "--json"))
    assert data["stored_tokens"] == 15488
    assert data["stored_bytes"] == 15488 * 128 * 1024
    assert data["both_s"] < min(data["compute_s"], data["load_s"])


def test_plan_says_what_was_wrong() -> None:
    arguments = ["plan", "--model", "x", "--tokens", "16000", "--bandwidth", "7Gbps", "--compute", "A100"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "unknown model" in result.output


def test_a_plans_picture_sweeps_the_bandwidth(tmp_path: Path) -> None:
    prompt = ("--model", "32,8,128", "--tokens", "4096", "--suffix", "64")
    invoke("plan", *prompt, "--bandwidth", "8Gbps", "--compute", "8000", "--picture", str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(PNG)
    verdicts = json.loads((tmp_path / "plan.json").read_text())
    load, both = [each["load_s"] for each in verdicts], [each["both_s"] for each in verdicts]
    assert load == sorted(load, reverse=True)
    assert all(each["both_s"] <= 1.02 * min(each["compute_s"], each["load_s"]) for each in verdicts)
    assert both[0] > 3 * both[-1], "from a sixteenth of break-even to sixteen times"


def test_study(tmp_path: Path) -> None:
    output = invoke(
        "study",
        "--configs",
        "12",
        "--seed",
        "3",
        "--json",
        str(tmp_path / "s.json"),
        "--picture",
        str(tmp_path / "s.png"),
    )
    assert "Farthest from the optimum" in output
    data = json.loads((tmp_path / "s.json").read_text())
    assert [outcome[0] for outcome in data["outcomes"]] == list(range(12))
    farthest = [outcome["ratio"] for outcome in data["farthest_from_optimum"]]
    assert round(farthest[0], 4) == max(ratio for _, ratio, _ in data["outcomes"])
    assert (tmp_path / "s.png").read_bytes().startswith(PNG)
    again = invoke("study", "--seed", "3", "--index", "5", "--json", str(tmp_path / "one.json"))
    assert again
    assert json.loads((tmp_path / "one.json").read_text())["outcomes"] == [data["outcomes"][5]]


def test_an_unwritable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CakeError, match="could not be written"):
        invoke("study", "--configs", "1", "--json", str(tmp_path / "taken" / "s.json"))

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from cakekv.cli.main import app


def test_methods_and_codecs_are_judged_and_added(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "scbench.json"
    common = ["scbench", "--model", tiny_model, "--sessions", 1, "--tokens", 420, "--task", "kv", "--task", "mf"]

    def judge(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(one) for one in [*common, "--json", file, *arguments]])

    result = judge("--codec", "int8", "--compress", "sink_recent")
    assert result.exit_code == 0, result.stderr
    assert "kv does not count" in result.stderr
    result = judge("--add", "--decode", "whole")
    assert result.exit_code == 0, result.stderr
    data = json.loads(file.read_text())
    assert [(one["name"], one["kind"]) for one in data["methods"]] == [
        ("full", "full"),
        ("int8", "codec"),
        ("sink_recent", "compress"),
        ("whole", "decode"),
    ]
    assert data["methods"][2]["kept_share"]["turns"] < 0.25
    assert [task["asked"] for task in data["tasks"]] == [10, 10]
    for arguments, complaint in (
        (["--add", "--codec", "int8"], "all of these"),
        (["--add", "--codec", "raw", "--own-answers"], "own_answers"),
        (["--compress", "int8"], "int8"),
        (["--codec", "raw", "--task", "chess"], "chess"),
        ([], "--compress"),
    ):
        result = judge(*arguments)
        assert result.exit_code == 2
        assert complaint in result.stderr

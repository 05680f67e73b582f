"""What results say of how they were made."""

from __future__ import annotations

import pytest

from cakekv.bench.machine import describe_run


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["benchmarks/tiers.py", "--json", "my results.json"], "python benchmarks/tiers.py --json 'my results.json'"),
        (["/opt/venv/bin/cakekv", "bench", "--repeats", "5"], "cakekv bench --repeats 5"),
    ],
)
def test_the_command_can_be_given_again(monkeypatch: pytest.MonkeyPatch, words: list[str], command: str) -> None:
    monkeypatch.setattr("sys.argv", words)
    run = describe_run()
    assert run["command"] == command
    assert run["machine"]["cores"] >= 1

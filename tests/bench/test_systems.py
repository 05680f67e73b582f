"""Claims of several systems in one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cakekv.bench.systems import Claim, write_systems


def test_each_system_replaces_its_own(tmp_path: Path) -> None:
    file = tmp_path / "decode.json"
    write_systems(file, "quantspec", [Claim("quantspec: a", "one", 1, True), Claim("quantspec: b", "two", 2, True)], {})
    write_systems(file, "clusterkv", [Claim("clusterkv: a", "three", {"at": 3}, False)], {"documents": 20})
    write_systems(file, "quantspec", [Claim("quantspec: c", "four", 4, True)], {"gamma": 5})
    written = json.loads(file.read_text())
    assert [one["name"] for one in written["systems"]] == ["clusterkv: a", "quantspec: c"]
    assert written["systems"][0] == {"name": "clusterkv: a", "claim": "three", "measured": {"at": 3}, "holds": False}
    assert written["settings"]["clusterkv"]["documents"] == 20
    assert written["settings"]["quantspec"]["gamma"] == 5
    assert "machine" in written["settings"]["quantspec"]


def test_a_claim_has_its_systems_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kvsharer"):
        write_systems(tmp_path / "decode.json", "less", [Claim("kvsharer: a", "one", 1, True)], {})


def test_what_is_added_leaves_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "decode.json"
    write_systems(file, "less", [Claim("less, 1 token", "one", 1, True), Claim("less, 2 tokens", "two", 2, True)], {})
    for measured in (3, 4):
        write_systems(file, "less", [Claim("less, 2 tokens", "two", measured, False)], {"at": measured}, " 2 tokens")
    data = json.loads(file.read_text())
    assert [(one["name"], one["measured"]) for one in data["systems"]] == [("less, 1 token", 1), ("less, 2 tokens", 4)]
    assert data["settings"]["less 2 tokens"]["at"] == 4
    assert "at" not in data["settings"]["less"]

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.sights import COLUMNS, main
from benchmarks.table import decode
from tests.threads import single_thread


def test_sights_and_shared_layers_are_judged(tiny_model: Path, tmp_path: Path) -> None:
    """It goes on where it stopped; a budget of everything changes nothing, and shared layers change something."""
    file = tmp_path / "decode.json"
    file.write_text(json.dumps({"systems": [{"name": "other"}]}))
    ways = ["clusterkv:budget=32,full_layers=0", "pages:budget=9999", "share:0>1"]
    with single_thread():
        for part in (ways[:1], ways):
            main(file, part, documents=2, tokens=256, continuation=8, model=str(tiny_model))
    written = json.loads(file.read_text())
    assert written["systems"] == [{"name": "other"}]
    rows = {row["name"]: row for row in written["judge"]}
    assert list(rows) == ["exact", *ways]
    assert all(row["documents"] == 2 and set(COLUMNS) < set(row) for row in rows.values())
    assert rows["pages:budget=9999"]["kl"] < 1e-5
    assert rows["share:0>1"]["kl"] > 1e-4
    layers = json.loads((tiny_model / "config.json").read_text())["num_hidden_layers"]
    assert rows["share:0>1"]["kept"] == pytest.approx(1 - 1 / layers)
    assert "`share:0>1`" in decode(written)

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.quantspec import main
from tests.threads import single_thread


def test_every_claim_is_measured(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "decode.json"
    with single_thread():
        main(file, str(tiny_model), documents=3, context=400, tokens=5, gamma=2, long=300)
    written = json.loads(file.read_text())
    claims = {one["name"].removeprefix("quantspec: "): one for one in written["systems"]}
    assert set(claims) == {"acceptance", "no collapse", "tokens", "bytes", "sparse drafts", "seconds"}
    assert claims["tokens"]["measured"] == {"answers": 2, "identical": 2}
    assert claims["tokens"]["holds"]
    assert 0 <= claims["acceptance"]["measured"]["acceptance"] <= 1
    assert written["settings"]["quantspec:"]["documents"] == 3

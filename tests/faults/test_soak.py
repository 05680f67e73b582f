"""A long mixed run in miniature, restores, saves, aborts, evictions, faults: nothing wrong and nothing leaked."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.faults.leaks import Sample, leaks
from tests.faults.processes import printed, running


@pytest.mark.timeout(1200)
def test_soak(tmp_path: Path, long: bool) -> None:
    seconds, seed = 600 if long else 14, random.randrange(10**6)
    with running(f"tests.faults.soaking.main({str(tmp_path)!r}, {seconds}, {seed})") as process:
        found = json.loads(printed(process))
    figures, samples = found["figures"], [Sample(*one) for one in found["samples"]]
    settled = [one for one in samples if one.done > 0.4 * seconds]
    print(f"seed {seed}: {figures}; {settled[0]} to {settled[-1]}")
    assert figures["wrong outputs"] == 0, f"seed {seed}"
    for kind in (
        "answers",
        "aborted",
        "evicted",
        "saved chunks",
        "loads placed",
        "loads corrupt",
        "loads store failed",
    ):
        assert figures.get(kind, 0) > 0, f"no {kind}: no test of that; {figures}"
    assert len(settled) > 10
    assert not leaks(settled), f"seed {seed}: {leaks(settled)}"

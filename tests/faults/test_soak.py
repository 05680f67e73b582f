"""A long mixed run in miniature, restores, saves, aborts, evictions, faults: nothing wrong and nothing leaked."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.faults.leaks import ALLOWED_BYTES, Sample, leaks
from tests.faults.processes import printed, running

WARMING_BYTES = 8 << 20
"""By so much may memory drift in a short run, in which allocators and caches of code still fill: 32 kB a request."""


@pytest.mark.timeout(1200)
def test_soak(tmp_path: Path, long: bool) -> None:
    rounds, seed = 12_000 if long else 420, random.randrange(10**6)
    with running(f"tests.faults.soaking.main({str(tmp_path)!r}, {rounds}, {seed})") as process:
        found = json.loads(printed(process))
    figures, samples = found["figures"], [Sample(*one) for one in found["samples"]]
    settled = [one for one in samples if one.done > 0.4 * rounds]
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
    found_leaks = leaks(settled, ALLOWED_BYTES if long else WARMING_BYTES)
    assert not found_leaks, f"seed {seed}: {found_leaks}"

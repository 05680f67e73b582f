"""Whatever is interrupted, and wherever: the next request is answered, rightly, and nothing is left behind."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.faults.processes import printed, running


@pytest.mark.timeout(3600)
def test_interrupts(tmp_path: Path, long: bool) -> None:
    count, seed = 2000 if long else 200, random.randrange(10**6)
    with running(f"tests.faults.interrupting.main({str(tmp_path / 'kv')!r}, {count}, {seed})") as process:
        figures = json.loads(printed(process))
    print(f"seed {seed}: {figures}")
    assert figures["interrupts"] >= count
    assert not figures["wrong answers"], f"seed {seed}"
    assert not figures["left over"], f"seed {seed}"
    assert not figures["unsaved"], f"seed {seed}"
    assert figures["threads left"] <= 0, f"seed {seed}"

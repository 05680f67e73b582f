"""`kill -9` of writers at random moments: nothing half-visible, everything else intact, and what is there is used."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.faults.processes import printed, running

KILLS = 200


@pytest.mark.timeout(900)
def test_writers_of_a_folder(tmp_path: Path, long: bool) -> None:
    seed, kills = random.randrange(10**6), KILLS if long else 60
    with running(f"tests.faults.killing.disk({str(tmp_path / 'kv')!r}, {kills}, {seed})") as process:
        figures = json.loads(printed(process))
    print(f"seed {seed}: {figures}")
    assert figures["kills"] == kills
    assert figures["in mid-write"] > kills // 20, "hardly any was killed while it wrote: no test of that"
    assert figures["chunks checked"] > kills


@pytest.mark.timeout(900)
def test_processes_in_mid_prefill(tmp_path: Path, long: bool) -> None:
    seed, kills = random.randrange(10**6), KILLS if long else 8
    with running(f"tests.faults.killing.cake({str(tmp_path / 'kv')!r}, {kills}, {seed})") as process:
        figures = json.loads(printed(process))
    print(f"seed {seed}: {figures}")
    assert figures["kills"] == kills
    assert figures["wrong outputs"] == 0
    assert figures["loaded tokens"] > 0, "nothing was saved before a kill: no test of that"

"""Two writers and two readers on one folder for a while: no wrong byte, and no moment at which it holds too much."""

from __future__ import annotations

import json
import random
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from cakekv.store.disk import DiskStore
from tests.faults.processes import printed, running
from tests.faults.sharing import CAPACITY
from tests.store.test_disk_processes import bytes_in


@pytest.mark.timeout(900)
def test_two_writers_and_two_readers(tmp_path: Path, long: bool) -> None:
    seconds, seed = 600 if long else 4, random.randrange(10**6)
    folder = tmp_path / "kv"
    store = DiskStore(folder, CAPACITY)
    samples = most = 0
    with ExitStack() as stack:
        writers, readers = (
            [
                stack.enter_context(
                    running(f"tests.faults.sharing.{what}({str(folder)!r}, {seconds}, {seed + number})")
                )
                for number in range(2)
            ]
            for what in ("write", "check")
        )
        while any(process.poll() is None for process in writers):
            most = max(most, bytes_in(folder))
            assert most <= CAPACITY
            samples += 1
            time.sleep(0.002)
        written, found = ([json.loads(printed(process)) for process in group] for group in (writers, readers))
    print(f"seed {seed}: {samples} samples, at most {most} of {CAPACITY} bytes; writers {written}; readers {found}")
    assert samples > 20 * seconds
    assert most > CAPACITY // 2, "it was never full: no test of that"
    assert all(figures["written"] > 100 for figures in written)
    assert sum(figures["evicted"] for figures in written) > 0
    assert all(figures["right"] > 100 for figures in found)
    assert all("wrong" not in figures and "failed" not in figures for figures in found)
    stats = store.stats()
    assert stats.bytes == sum(chunk.size for chunk in store) <= CAPACITY
    assert not any((folder / "incoming").iterdir())

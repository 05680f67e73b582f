"""Requests that wait: what is counted, and that looking ahead is worth it where the queue is long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cakekv.cli.main import app
from cakekv.restore.costs import ComputeShape
from cakekv.simulate.cluster.hardware import MODELS, compute_shape
from cakekv.simulate.cluster.trace import BLOCK_TOKENS, Arrival
from cakekv.simulate.retention.comparison import Workload
from cakekv.simulate.retention.sessions import Sessions
from cakekv.simulate.retention.waiting import WaitingRow, measure_waiting

LLAMA = MODELS["llama-3.1-8b"]
CHUNK_BYTES = LLAMA.token_bytes * BLOCK_TOKENS


@pytest.fixture(scope="module")
def sessions() -> Workload:
    return Workload(Sessions().trace(800).requests, compute_shape(LLAMA, "h100"), LLAMA.token_bytes)


def row(workload: Workload, policy: str, load: float, disk_ratio: float = 1.0) -> WaitingRow:
    return measure_waiting(workload, policy, 50 * 10**9, load, 12.0, disk_ratio)


@pytest.mark.parametrize(("load", "least"), [(0.1, 0.0), (2.0, 0.10)])
def test_looking_ahead_is_worth_it_where_the_queue_is_long_and_harmless_elsewhere(
    sessions: Workload, load: float, least: float
) -> None:
    ahead, lru, fifo = (row(sessions, policy, load) for policy in ("lookahead", "lru", "fifo"))
    assert ahead.ram_share - max(lru.ram_share, fifo.ram_share) >= least
    assert ahead.mean_ttft_s <= lru.mean_ttft_s
    assert lru.fetched == fifo.fetched == 0
    both = [one.ram_share + one.disk_share for one in (ahead, lru, fifo)]
    assert max(both) - min(both) < 1e-9, "the disk has everything"


def test_a_slow_disk_is_no_worse(sessions: Workload) -> None:
    ahead, lru = row(sessions, "lookahead", 1.0, 0.1), row(sessions, "lru", 1.0, 0.1)
    assert ahead.mean_ttft_s <= 1.02 * lru.mean_ttft_s


def test_what_is_counted() -> None:
    """Two prompts of four chunks each, one after the other, twice; RAM holds one of them."""
    shape = ComputeShape(0.0, 1e-3, 0.0)
    prompts = [tuple(range(4)), tuple(range(4, 8))]
    arrivals = [Arrival(at, 4 * BLOCK_TOKENS + 1, prompts[at % 2]) for at in range(4)]
    workload = Workload(arrivals, shape, LLAMA.token_bytes)
    lru = measure_waiting(workload, "lru", 4 * CHUNK_BYTES, 100.0, 1000.0, 1000.0)
    assert (lru.ram_share, lru.disk_share) == (0.0, 0.5)
    ahead = measure_waiting(workload, "lookahead", 4 * CHUNK_BYTES, 100.0, 1000.0, 1000.0)
    assert ahead.ram_share > 0.2
    assert ahead.ram_share + ahead.disk_share == 0.5


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "waiting.json"
    line = ["simulate", "retention", "--sessions", "200", "--capacities", "20GB", "--ratios", "1", "--loads", "1.5"]
    result = CliRunner().invoke(app, [*line, "--policies", "lookahead", "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["policy"] for row in rows] == ["lru", "lookahead"]
    assert rows[1]["points_above_baseline"] > 0

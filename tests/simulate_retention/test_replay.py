"""Replays: the same in a real store; what they count; which policy keeps what is worth keeping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cakekv.cli.simulate_retention import retention
from cakekv.errors import BadInput
from cakekv.restore.costs import ComputeShape
from cakekv.simulate.cluster.hardware import MODELS, compute_shape
from cakekv.simulate.cluster.trace import BLOCK_TOKENS, Arrival, read_trace
from cakekv.simulate.retention.comparison import (
    Row,
    Workload,
    deviations,
    equal_capacity,
    is_same_in_the_real_store,
    measure,
)
from cakekv.simulate.retention.replay import replay
from cakekv.simulate.retention.sessions import Sessions
from cakekv.simulate.retention.store import PolicyOnly, RealStore, key_of
from cakekv.simulate.retention.timing import Timer
from cakekv.store.eviction import POLICIES, policy_named

LLAMA = MODELS["llama-3.1-8b"]
GB = 10**9
FLAT = ComputeShape(0.0, 1e-3, 0.0)


@pytest.fixture(scope="module")
def sample() -> Workload:
    """The sample that comes with the package; it is a thirtieth of the trace, and so are the capacities."""
    return Workload(read_trace().requests, compute_shape(LLAMA, "h100"), LLAMA.token_bytes)


@pytest.fixture(scope="module")
def sessions() -> Workload:
    return Workload(Sessions().trace(600).requests, compute_shape(LLAMA, "h100"), LLAMA.token_bytes)


class Watched:
    """A store, and all that it ever answered."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.history: list[Any] = []

    def holds(self, keys: Any, now: Any) -> Any:
        found = self.store.holds(keys, now)
        self.history.append(found)
        return found

    def read(self, key: Any, now: Any) -> None:
        self.store.read(key, now)

    def write(self, key: Any, position: Any, now: Any) -> bool:
        return self.store.write(key, position, now)


@pytest.mark.parametrize("name", POLICIES)
def test_the_real_store_has_the_same_victims(name: str, sample: Workload) -> None:
    alone: Any = Watched(PolicyOnly(policy_named(name), 40, BLOCK_TOKENS, 80))
    real: Any = Watched(RealStore(policy_named(name), 40, BLOCK_TOKENS))
    timer = sample.timer(1.0)
    assert replay(alone, timer, sample.requests) == replay(real, timer, sample.requests)
    assert alone.history == real.history
    assert is_same_in_the_real_store(sample, name, 40 * sample.chunk_bytes, 1.0)


def request(at: float, *blocks: Any, tokens: Any = None) -> Any:
    return Arrival(at, tokens or len(blocks) * BLOCK_TOKENS + 1, blocks)


def test_what_is_counted() -> None:
    timer = Timer(FLAT, BLOCK_TOKENS, 1000.0)  # loading is as fast as computing
    store = PolicyOnly(policy_named("lru"), 100, BLOCK_TOKENS, 1)
    result, cases = replay(store, timer, [request(0, 1, 2, 3, 4), request(9, 1, 2, 3, 4, 5, 6)], keep_every=1)
    assert (result.chunks, result.found, result.loaded, result.written, result.declined) == (10, 4, 2, 6, 0)
    assert result.saved_s == pytest.approx(2 * 0.512)
    assert result.computed_s == pytest.approx(10 * 0.512 + 2e-3)
    assert [list(case.stored) for case in cases] == [[True] * 4 + [False] * 2]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("lru", [5, 6, 7, 8]),  # the newest
        ("lfu", [3, 4, 7, 8]),  # 3 and 4 were read; of the others the oldest go
        ("s3fifo", [3, 4, 7, 8]),
        ("keep_the_tail", [3, 4, 7, 8]),  # the tails
    ],
)
def test_victims_of_a_small_trace(name: str, kept: list[int]) -> None:
    """One prompt comes twice, and its tail is read; then another one needs its room."""
    timer = Timer(FLAT, BLOCK_TOKENS, 1000.0)
    store = PolicyOnly(policy_named(name), 4, BLOCK_TOKENS, 1)
    replay(store, timer, [request(0, 1, 2, 3, 4), request(60, 1, 2, 3, 4), request(60.5, 5, 6, 7, 8)])
    assert [block for block in range(1, 9) if store.policy.get(key_of(block))] == kept


def test_keep_the_tail_saves_more_than_lru_where_room_is_scarce(sample: Workload) -> None:
    saved = {name: measure(sample, name, 10 * GB, 1.0)[0].saved_s for name in ("lru", "keep_the_tail")}
    assert saved["keep_the_tail"] > 1.3 * saved["lru"]


def test_keep_the_tail_saves_more_than_lru_in_synthetic_conversations(sessions: Workload) -> None:
    saved = {name: measure(sessions, name, 200 * GB, 1.0)[0].saved_s for name in ("lru", "keep_the_tail")}
    assert saved["keep_the_tail"] > 1.1 * saved["lru"]


def test_all_policies_save_the_same_with_room_for_everything(sample: Workload) -> None:
    rows = [measure(sample, name, 10_000 * GB, 1.0)[0] for name in POLICIES]
    assert len({row.saved_s for row in rows}) == 1
    assert rows[0].saved_share > 0.1


def test_unread_heads_are_not_written(sample: Workload) -> None:
    everything, _ = measure(sample, "lru", 100 * GB, 1.0)
    thrifty, _ = measure(sample, "lru", 100 * GB, 1.0, "skip_head=auto")
    assert thrifty.written_bytes < 0.95 * everything.written_bytes
    assert thrifty.saved_s > 0.97 * everything.saved_s


def test_the_planner_agrees_with_what_was_counted(sample: Workload) -> None:
    _, cases = measure(sample, "keep_the_tail", 10 * GB, 1.0, keep_every=5)
    found = deviations(cases, sample.timer(1.0))
    assert found["restores"] > 10
    assert abs(found["mean"]) < 0.02
    assert found["median_absolute"] < 0.01


def test_equal_capacity_is_interpolated() -> None:
    def row(policy: Any, capacity: Any, saved_s: Any) -> Any:
        return Row(policy, "", 1.0, capacity, saved_s, 0.0, 0.0, 0.0, 0.0, 0)

    rows = [row("lru", 100, 10.0), row("lru", 200, 30.0), row("other", 100, 20.0), row("other", 200, 31.0)]
    assert [equal_capacity(rows, each) for each in rows] == [100, 200, 150, float("inf")]


def test_sessions_are_conversations() -> None:
    requests = Sessions(seed=3).trace(1500).requests
    assert [each.arrived_s for each in requests] == sorted(each.arrived_s for each in requests)
    assert requests == Sessions(seed=3).trace(1500).requests != Sessions(seed=4).trace(1500).requests
    assert all(len(each.blocks) == each.prompt_tokens // BLOCK_TOKENS for each in requests)
    known: set[Any] = set()
    continued = 0
    for each in requests:
        seen = [block in known for block in each.blocks]
        assert seen == sorted(seen, reverse=True), "what is known is the beginning"
        continued += sum(seen) > 4
        known.update(each.blocks)
    assert 0.4 < continued / len(requests) < 0.8
    assert len({each.blocks[0] for each in requests}) == 4


def call(*arguments: Any) -> Any:
    command = typer.Typer()
    command.command()(retention)
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_the_command(tmp_path: Path) -> None:
    file, picture = tmp_path / "retention.json", tmp_path / "retention.png"
    what = ("--sessions", 60, "--capacities", "20GB,40GB", "--policies", "keep_the_tail", "--ratios", 1)
    run = call(*what, "--rules", "skip_head=2048", "--json", file, "--picture", picture)
    assert run.exit_code == 0, run.output
    data = json.loads(file.read_text())
    assert [(row["policy"], row["rule"]) for row in data["rows"][:2]] == [("lru", ""), ("keep_the_tail", "")]
    assert data["rows"][0]["times_baseline"] == 1.0
    assert data["rows"][-1]["rule"] == "skip_head=2048"
    assert data["differ_in_the_real_store"] == []
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options",
    [["--capacities", "1MB"], ["--policies", "lifo"], ["--ratios", "0"], ["--trace", "x", "--sessions", "3"]],
)
def test_bad_options(options: list[str]) -> None:
    assert isinstance(call("--sessions", 3, *options).exception, BadInput)

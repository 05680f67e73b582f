"""Policies, capacities and bandwidths side by side: figures, JSON, and the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cakekv.chunk import PEEK_BYTES
from cakekv.restore.costs import ComputeShape
from cakekv.simulate.cluster.trace import BLOCK_TOKENS, Arrival
from cakekv.simulate.retention.replay import Case, Result, replay
from cakekv.simulate.retention.store import PolicyOnly, RealStore, Retained
from cakekv.simulate.retention.timing import Timer, planned_seconds
from cakekv.store.base import Store
from cakekv.store.eviction import policy_named
from cakekv.store.tail_only import TailOnlyStore
from cakekv.store.unread_heads import UnreadHeadsStore

BASELINE = "lru"
"""What the others are compared with."""


@dataclass(frozen=True)
class Workload:
    """Requests, and the machine that serves them.

    Parameters
    ----------
    requests : sequence of Arrival
        In order of arrival.
    shape : ComputeShape
        What a span costs.
    token_bytes : int
        Bytes of one token's KV cache.
    """

    requests: Sequence[Arrival]
    shape: ComputeShape
    token_bytes: int

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk, which is a block of the trace."""
        return self.token_bytes * BLOCK_TOKENS

    def balanced(self) -> float:
        """Tokens per second that a tier delivers if loading all prompts takes as long as computing them."""
        timer = Timer(self.shape, BLOCK_TOKENS, 1.0)
        tokens = sum(request.prompt_tokens for request in self.requests)
        return tokens / sum(timer.computed(request.prompt_tokens) for request in self.requests)

    def timer(self, ratio: float) -> Timer:
        """At so many times the balanced bandwidth."""
        return Timer(self.shape, BLOCK_TOKENS, ratio * self.balanced())


@dataclass(frozen=True)
class Row:
    """One policy at one capacity and bandwidth.

    Attributes
    ----------
    policy, rule : str
        The policy; what is written, as an option of a store's URL ("" for everything).
    ratio : float
        Bandwidth over the balanced one.
    capacity_bytes : int
        Of the tier.
    saved_s : float
        Seconds of TTFT saved, in all.
    saved_share : float
        Of the seconds without a store.
    saved_s_per_gb : float
        Per GB of capacity.
    found_share, loaded_share : float
        Of the whole chunks asked for, those that were stored, and those that were loaded.
    written_bytes : int
        To the tier.
    """

    policy: str
    rule: str
    ratio: float
    capacity_bytes: int
    saved_s: float
    saved_share: float
    saved_s_per_gb: float
    found_share: float
    loaded_share: float
    written_bytes: int


def measure(
    workload: Workload, policy: str, capacity_bytes: int, ratio: float, rule: str = "", keep_every: int = 0
) -> tuple[Row, list[Case]]:
    """Replay the workload once; with a write rule, through the store that ships.

    Parameters
    ----------
    workload : Workload
        What is asked for.
    policy : str
        A name of an eviction policy.
    capacity_bytes : int
        At least a chunk's.
    ratio : float
        Bandwidth over the balanced one.
    rule : str
        "", "skip_head=auto" or "skip_head=N".
    keep_every : int
        As for `replay`.
    """
    capacity = capacity_bytes // workload.chunk_bytes
    store: Retained
    if rule:
        store = RealStore(policy_named(policy), capacity, BLOCK_TOKENS, _wrapper(rule.removeprefix("skip_head=")))
    else:
        store = PolicyOnly(policy_named(policy), capacity, BLOCK_TOKENS, workload.chunk_bytes)
    result, cases = replay(store, workload.timer(ratio), workload.requests, keep_every)
    return _row(policy, rule, ratio, capacity_bytes, result, workload.chunk_bytes), cases


def is_same_in_the_real_store(workload: Workload, policy: str, capacity_bytes: int, ratio: float) -> bool:
    """Whether a `MemoryStore` with that policy fares exactly as the policy alone."""
    capacity = capacity_bytes // workload.chunk_bytes
    alone = PolicyOnly(policy_named(policy), capacity, BLOCK_TOKENS, PEEK_BYTES)
    real = RealStore(policy_named(policy), capacity, BLOCK_TOKENS)
    timer = workload.timer(ratio)
    return replay(alone, timer, workload.requests) == replay(real, timer, workload.requests)


def deviations(cases: Sequence[Case], timer: Timer) -> dict[str, Any]:
    """By how much the planner that ships, on a virtual clock, takes longer than the times that were counted."""
    found = [planned_seconds(timer, case.prompt_tokens, case.stored) / case.seconds - 1.0 for case in cases]
    return {
        "restores": len(found),
        "mean": statistics.fmean(found),
        "median_absolute": statistics.median(map(abs, found)),
        "least": min(found),
        "most": max(found),
    }


def equal_capacity(rows: Sequence[Row], row: Row) -> float:
    """Bytes that the baseline needs to save as much as `row` does, interpolated; infinity if more than was tried."""
    curve = sorted(
        (other.capacity_bytes, other.saved_s)
        for other in rows
        if other.policy == BASELINE and not other.rule and other.ratio == row.ratio
    )
    below = (0.0, 0.0)
    for capacity, saved_s in curve:
        if saved_s >= row.saved_s:
            share = (row.saved_s - below[1]) / (saved_s - below[1])
            return below[0] + share * (capacity - below[0])
        below = (capacity, saved_s)
    return math.inf


def to_dict(settings: dict[str, Any], rows: Sequence[Row], checked: dict[str, Any]) -> dict[str, Any]:
    """Plain data: the settings, one object per row, and how far the planner is from the times counted."""
    return {
        "settings": settings,
        "planner": checked,
        "rows": [asdict(row) | dict(_compared(rows, row)) for row in rows],
    }


def table(rows: Sequence[Row], ratio: float) -> Table:
    """One row per policy and capacity, at one bandwidth."""
    answer = Table("capacity", "policy", box=SIMPLE_HEAD, title=f"{ratio:g} × the balanced bandwidth")
    for column in ("s saved", "of all", "s/GB", "× LRU", "LRU needs", "found", "loaded", "TB written"):
        answer.add_column(column, justify="right")
    for row in rows:
        if row.ratio != ratio:
            continue
        compared = dict(_compared(rows, row))
        needs = compared["equal_capacity_bytes"]
        answer.add_row(
            f"{row.capacity_bytes / 1e9:,.0f} GB",
            f"{row.policy} {row.rule}".strip(),
            f"{row.saved_s:,.0f}",
            f"{row.saved_share:.1%}",
            f"{row.saved_s_per_gb:.2f}",
            f"{compared['times_baseline']:.2f}" if compared["times_baseline"] is not None else "",
            "more" if needs is None else f"{needs / 1e9:,.0f} GB",
            f"{row.found_share:.1%}",
            f"{row.loaded_share:.1%}",
            f"{row.written_bytes / 1e12:.1f}",
        )
    return answer


def _compared(rows: Sequence[Row], row: Row) -> Iterator[tuple[str, float | None]]:
    same = (
        other.saved_s
        for other in rows
        if (other.policy, other.rule) == (BASELINE, "")
        and (other.ratio, other.capacity_bytes) == (row.ratio, row.capacity_bytes)
    )
    baseline_s = next(same, 0.0)
    yield "times_baseline", row.saved_s / baseline_s if baseline_s else None
    capacity = equal_capacity(rows, row)
    yield "equal_capacity_bytes", capacity if math.isfinite(capacity) else None


def _wrapper(head: str) -> Callable[[Store], Store]:
    return UnreadHeadsStore if head == "auto" else lambda store: TailOnlyStore(store, int(head))


def _row(policy: str, rule: str, ratio: float, capacity: int, result: Result, chunk_bytes: int) -> Row:
    return Row(
        policy,
        rule,
        ratio,
        capacity,
        result.saved_s,
        result.saved_s / result.computed_s,
        result.saved_s / (capacity / 1e9),
        result.found / result.chunks,
        result.loaded / result.chunks,
        result.written * chunk_bytes,
    )

"""Requests that wait for one machine, RAM and a disk behind it: what it is worth to look ahead in their queue.

The machine serves one request at a time, in the order in which they came. What the disk alone holds is loaded from
there and kept in RAM, too. A policy that looks ahead has the disk, while it is idle, bring what waiting requests need
into RAM, in the order of the queue and within what RAM has room for, as `store.lookahead` does; and it is told of the
queue, as a store's policy is. All is written to both tiers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cakekv.keys import ChunkKey
from cakekv.simulate.cluster.trace import BLOCK_TOKENS, Arrival
from cakekv.simulate.retention.comparison import BASELINE, Workload
from cakekv.simulate.retention.store import PolicyOnly, key_of
from cakekv.simulate.retention.timing import Timer
from cakekv.store.base import Expected
from cakekv.store.eviction import policy_named
from cakekv.store.eviction.lookahead import LookAhead

_AHEAD = 2
"""Times the capacity of RAM, what is looked at of a queue; what is behind that has no say anyway."""


@dataclass(frozen=True)
class WaitingRow:
    """One policy of RAM, at one capacity and load.

    Attributes
    ----------
    policy : str
        The policy.
    load : float
        Seconds of computing everything that arrive per second.
    capacity_bytes : int
        Of RAM.
    disk_ratio : float
        The disk's bandwidth over the balanced one.
    ram_share, disk_share : float
        Of the whole chunks asked for, those that were in RAM when their request's turn came, and only on disk.
    mean_ttft_s, mean_restore_s : float
        From arrival to the first token; from a request's turn on.
    mean_queue : float
        Requests that wait behind the one that begins.
    fetched : int
        Chunks that were brought into RAM ahead.
    """

    policy: str
    load: float
    capacity_bytes: int
    disk_ratio: float
    ram_share: float
    disk_share: float
    mean_ttft_s: float
    mean_restore_s: float
    mean_queue: float
    fetched: int


def measure_waiting(
    workload: Workload,
    policy: str,
    capacity_bytes: int,
    load: float,
    ram_ratio: float,
    disk_ratio: float,
    disk_bytes: int | None = None,
) -> WaitingRow:
    """Replay the workload once.

    Parameters
    ----------
    workload : Workload
        What is asked for; its arrivals are spread so that they make up the load.
    policy : str
        Of RAM, a name of an eviction policy; the disk evicts the least recently used.
    capacity_bytes : int
        Of RAM, at least a chunk's.
    load : float
        See `WaitingRow`.
    ram_ratio, disk_ratio : float
        The tiers' bandwidths over the balanced one.
    disk_bytes : int or None
        Of the disk; None: all fits.
    """
    balanced = workload.balanced()
    timer = Timer(workload.shape, BLOCK_TOKENS, ram_ratio * balanced, disk_ratio * balanced)
    queue = _Queue(workload, policy, capacity_bytes // workload.chunk_bytes, timer, disk_bytes)
    requests = workload.requests
    span_s = requests[-1].arrived_s - requests[0].arrived_s
    stretch = sum(timer.computed(request.prompt_tokens) for request in requests) / (load * max(span_s, 1e-9))
    for request in requests:
        queue.arrive(request._replace(arrived_s=request.arrived_s * stretch))
    return queue.finish(policy, load, capacity_bytes, disk_ratio)


class _Queue:
    """The machine, its tiers, and who waits."""

    def __init__(self, workload: Workload, policy: str, capacity: int, timer: Timer, disk_bytes: int | None) -> None:
        chunk_bytes = workload.chunk_bytes
        on_disk = 1 << 60 if disk_bytes is None else max(1, disk_bytes // chunk_bytes)
        self._timer = timer
        self._ram = PolicyOnly(policy_named(policy), capacity, BLOCK_TOKENS, chunk_bytes)
        self._disk = PolicyOnly(policy_named(BASELINE), on_disk, BLOCK_TOKENS, chunk_bytes)
        self._looks_ahead = isinstance(self._ram.policy, LookAhead)
        self._waiting: deque[tuple[Arrival, list[ChunkKey]]] = deque()
        self._free_s = self._disk_free_s = self._now = 0.0
        self._is_full = False
        """Whether not all of the queue is looked at."""
        self._plan: Iterator[tuple[ChunkKey, int]] = iter(())
        self._chunks = self._in_ram = self._on_disk = self._fetched = 0
        self._ttft_s: list[float] = []
        self._restore_s: list[float] = []
        self._behind: list[int] = []

    def arrive(self, request: Arrival) -> None:
        """The next request; whoever has his turn before it is served."""
        self._serve_until(request.arrived_s)
        self._fetch_until(request.arrived_s)
        self._waiting.append((request, [key_of(block) for block in request.blocks]))
        if not self._is_full:
            self._look_ahead()

    def finish(self, policy: str, load: float, capacity_bytes: int, disk_ratio: float) -> WaitingRow:
        """Nobody comes any more."""
        self._serve_until(float("inf"))
        return WaitingRow(
            policy,
            load,
            capacity_bytes,
            disk_ratio,
            self._in_ram / self._chunks,
            self._on_disk / self._chunks,
            fmean(self._ttft_s),
            fmean(self._restore_s),
            fmean(self._behind),
            self._fetched,
        )

    def _serve_until(self, time_s: float) -> None:
        while self._waiting and (at := max(self._free_s, self._waiting[0][0].arrived_s)) < time_s:
            self._fetch_until(at)
            self._serve(at)

    def _serve(self, now: float) -> None:
        request, keys = self._waiting[0]
        in_ram = self._ram.holds(keys, now)
        on_disk = [there and not near for there, near in zip(self._disk.holds(keys, now), in_ram, strict=True)]
        timing = self._timer.restored(request.prompt_tokens, in_ram, on_disk)
        usable = self._timer.whole_chunks(request.prompt_tokens)
        self._chunks += usable
        self._in_ram += sum(in_ram[:usable])
        self._on_disk += sum(on_disk[:usable])
        self._free_s = now + timing.seconds
        self._ttft_s.append(self._free_s - request.arrived_s)
        self._restore_s.append(timing.seconds)
        self._behind.append(len(self._waiting) - 1)
        self._disk_free_s = max(self._disk_free_s, now) + len(timing.behind) * self._timer.behind_s
        for chunk in timing.loads:
            self._ram.read(keys[chunk], now)
        for chunk in timing.behind:
            self._disk.read(keys[chunk], now)
        for chunk, key in enumerate(keys):
            if not in_ram[chunk] and (not on_disk[chunk] or chunk in timing.behind):
                self._ram.write(key, chunk * BLOCK_TOKENS, now)
            if not in_ram[chunk] and not on_disk[chunk]:
                self._disk.write(key, chunk * BLOCK_TOKENS, now)
        self._waiting.popleft()
        self._look_ahead()

    def _look_ahead(self) -> None:
        """The queue has changed."""
        if not self._looks_ahead:
            return
        queue: list[Expected] = []
        left = _AHEAD * self._ram.capacity
        for request, keys in self._waiting:
            queue.append(Expected(request, keys))
            left -= len(keys)
            if left < 0:
                break
        self._is_full = left < 0
        self._ram.policy.expect(queue)
        self._plan = self._missing(queue)

    def _missing(self, queue: Sequence[Expected]) -> Iterator[tuple[ChunkKey, int]]:
        """What only the disk has, as far as RAM has room for all that those need."""
        seen: set[ChunkKey] = set()
        for one in queue:
            for chunk, key in enumerate(one.keys):
                if key in seen:
                    continue
                seen.add(key)
                if len(seen) > self._ram.capacity:
                    return
                if self._ram.policy.get(key) is None and self._disk.policy.get(key) is not None:
                    yield key, chunk

    def _fetch_until(self, time_s: float) -> None:
        """Let the disk work for those who wait."""
        self._disk_free_s = max(self._disk_free_s, self._now)
        self._now = max(self._now, time_s)
        while self._disk_free_s + self._timer.behind_s <= time_s and (found := next(self._plan, None)) is not None:
            key, chunk = found
            self._disk_free_s += self._timer.behind_s
            self._disk.read(key, self._disk_free_s)
            self._ram.write(key, chunk * BLOCK_TOKENS, self._disk_free_s)
            self._fetched += 1


def waiting_to_dict(settings: dict[str, Any], rows: Sequence[WaitingRow]) -> dict[str, Any]:
    """Plain data: the settings, and one object per row, with how many points of RAM hits it has above the baseline."""
    return {
        "settings": settings,
        "rows": [asdict(row) | {"points_above_baseline": 100.0 * (row.ram_share - _base(rows, row))} for row in rows],
    }


def waiting_table(rows: Sequence[WaitingRow]) -> Table:
    """One row per load, capacity and policy."""
    answer = Table("load", "RAM", "disk", "policy", box=SIMPLE_HEAD)
    for column in ("in RAM", "above LRU", "only on disk", "mean TTFT", "mean restore", "queue", "fetched"):
        answer.add_column(column, justify="right")
    for row in rows:
        answer.add_row(
            f"{row.load:g}",
            f"{row.capacity_bytes / 1e9:,.0f} GB",
            f"{row.disk_ratio:g} ×",
            row.policy,
            f"{row.ram_share:.1%}",
            f"{100 * (row.ram_share - _base(rows, row)):+.1f}",
            f"{row.disk_share:.1%}",
            f"{row.mean_ttft_s:,.2f} s",
            f"{row.mean_restore_s:.3f} s",
            f"{row.mean_queue:,.1f}",
            f"{row.fetched:,}",
        )
    return answer


def _base(rows: Sequence[WaitingRow], row: WaitingRow) -> float:
    place = row.load, row.capacity_bytes, row.disk_ratio
    same = (other for other in rows if (other.load, other.capacity_bytes, other.disk_ratio) == place)
    return next((other.ram_share for other in same if other.policy == BASELINE), row.ram_share)

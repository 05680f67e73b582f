"""Several systems on the same arrivals: figures, JSON, and the table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from cakekv.simulate.cluster.cluster import Cluster, Run
from cakekv.simulate.cluster.trace import Trace

QUANTILES = tuple(round(0.01 * percent, 2) for percent in range(101))
_DEFAULT_LOAD = 0.8
"""Utilisation of the nodes if everything were recomputed, where no speed-up is asked for."""


@dataclass(frozen=True)
class SystemResult:
    """What one system made of the trace.

    Attributes
    ----------
    system : str
        Its name.
    mean_ttft_s, p50_ttft_s, p99_ttft_s : float
        Seconds from a request's arrival to its first token.
    goodput_per_s : float
        Requests per second whose first token came within the target.
    throughput_per_s : float
        Requests per second.
    computed_tokens, loaded_ram_tokens, loaded_remote_tokens : int
        Tokens by where they came from; loads that compute overtook included.
    busy : float
        Share of the nodes' time in which compute served a prompt, waits for its loads included.
    ttft_quantiles_s : list of float
        At 0%, 1%, ... 100%.
    """

    system: str
    mean_ttft_s: float
    p50_ttft_s: float
    p99_ttft_s: float
    goodput_per_s: float
    throughput_per_s: float
    computed_tokens: int
    loaded_ram_tokens: int
    loaded_remote_tokens: int
    busy: float
    ttft_quantiles_s: list[float]


def summarise(system: str, run: Run, cluster: Cluster, ttft_target_s: float) -> SystemResult:
    """The figures of one run."""
    quantiles = [float(value) for value in np.quantile(run.ttft_s, QUANTILES)]
    return SystemResult(
        system=system,
        mean_ttft_s=float(run.ttft_s.mean()),
        p50_ttft_s=quantiles[50],
        p99_ttft_s=quantiles[99],
        goodput_per_s=int((run.ttft_s <= ttft_target_s).sum()) / run.makespan_s,
        throughput_per_s=len(run.ttft_s) / run.makespan_s,
        computed_tokens=round(run.computed_tokens),
        loaded_ram_tokens=round(run.loaded_tokens["ram"]),
        loaded_remote_tokens=round(run.loaded_tokens["remote"]),
        busy=run.busy_s / (run.makespan_s * cluster.nodes),
        ttft_quantiles_s=quantiles,
    )


def default_speed_up(cluster: Cluster, trace: Trace) -> float:
    """The speed-up at which recomputing everything would keep the nodes busy for 80% of the time."""
    machine = cluster.machine
    work_s = sum(machine.compute_s(0, request.prompt_tokens) for request in trace.requests)
    return _DEFAULT_LOAD * cluster.nodes * trace.period_s / work_s


def to_dict(settings: dict[str, Any], results: list[SystemResult]) -> dict[str, Any]:
    """Plain data: the settings, and one object per system."""
    return {"settings": settings, "quantiles": list(QUANTILES), "systems": [asdict(result) for result in results]}


def table(results: list[SystemResult], ttft_target_s: float) -> Table:
    """One row per system."""
    answer = Table("system", box=SIMPLE_HEAD, title=f"TTFT in s; requests/s within {ttft_target_s:g} s; M tokens")
    for column in ("mean", "P50", "P99", "goodput", "busy", "computed", "RAM", "remote"):
        answer.add_column(column, justify="right")
    for result in results:
        answer.add_row(
            result.system,
            f"{result.mean_ttft_s:.2f}",
            f"{result.p50_ttft_s:.2f}",
            f"{result.p99_ttft_s:.2f}",
            f"{result.goodput_per_s:.1f}",
            f"{result.busy:.0%}",
            f"{result.computed_tokens / 1e6:.1f}",
            f"{result.loaded_ram_tokens / 1e6:.1f}",
            f"{result.loaded_remote_tokens / 1e6:.1f}",
        )
    return answer

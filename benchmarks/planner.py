"""What the planner's decisions cost: no engine, no stores, a virtual clock.

    python benchmarks/planner.py --json benchmarks/planner.json

The whole prefix is stored, and loading it takes as long as computing it, so that both arms decide until they meet.
What both cost is known from the start, as after a few restores.

A decision is an answer of `next_compute` or `next_load`: a span, a wait or a load. The driver asks for loads after
every event, mostly to no avail; what those questions cost is charged to the next load. Opening is everything until
the first span and the first load are known.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import typer

from cakekv.bench.machine import describe_run
from cakekv.cli.console import number_list, write_json
from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost
from cakekv.restore.flights import Load, Tier
from cakekv.restore.level_choice import Level
from cakekv.restore.planner import Planner, PlannerOptions, Span, Wait
from cakekv.simulate.machine import VirtualTier, constant, run_restore, undisturbed

CHUNK_TOKENS, SPAN_TOKENS, SUFFIX_TOKENS = 128, 512, 256
CHUNK_BYTES = CHUNK_TOKENS * 131_072
"""As an 8B Llama has in 16 bits."""
SHAPE = ComputeShape(fixed=5e-3, linear=3e-5, quadratic=1e-9)
"""Seconds of prefill, about those of an 8B Llama on a data centre's GPU."""
DEPTH = 4
"""Loads in flight."""

AT_CHUNKS, MOST_US = 1000, 20.0
"""Target: microseconds per decision, on average, at that many chunks."""
OPENED_CHUNKS, MOST_MS = (1 << 20) // CHUNK_TOKENS, 50.0
"""Target: milliseconds to open a restore of a prefix of a million tokens."""


class TimedPlanner(Planner):
    """A planner that notes what its decisions take.

    Attributes
    ----------
    compute_s, load_s : list of float
        Seconds per answer of `next_compute` and `next_load`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.compute_s: list[float] = []
        self.load_s: list[float] = []
        self._in_vain_s = 0.0

    def next_compute(self, now: float) -> Span | Wait | None:
        began = perf_counter()
        answer = super().next_compute(now)
        if answer is not None:
            self.compute_s.append(perf_counter() - began)
        return answer

    def next_load(self, tier: int, now: float, ahead: int = 0) -> Load | None:
        began = perf_counter()
        load = super().next_load(tier, now, ahead)
        self._in_vain_s += perf_counter() - began
        if load is not None:
            self.load_s.append(self._in_vain_s)
            self._in_vain_s = 0.0
        return load


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    chunks: Annotated[str, typer.Option(help="Lengths of the prefix, in chunks.")] = f"100,{AT_CHUNKS},8000",
    opened_chunks: Annotated[int, typer.Option(min=1, help="Length of the prefix that is opened.")] = OPENED_CHUNKS,
    repeats: Annotated[int, typer.Option(min=1, help="Restores of each length; medians count.")] = 5,
) -> None:
    """Measure what the planner's decisions cost."""
    lengths: list[int] = number_list(chunks, int, "lengths")
    data: dict[str, Any] = {
        **describe_run(),
        "chunk_tokens": CHUNK_TOKENS,
        "max_span_tokens": SPAN_TOKENS,
        "decisions": [measure_decisions(length, repeats) for length in lengths],
        "opening": measure_opening(opened_chunks, repeats),
    }
    for row in data["decisions"]:
        for kind in ("next_compute", "next_load", "all"):
            figures = row[kind]
            print(
                f"{row['chunks']:5,} chunks, {kind:12}: mean {figures['mean_us']:7.1f} µs, "
                f"p99 {figures['p99_us']:8.1f} µs, max {figures['max_us']:8.1f} µs, {figures['decisions']:5,} decisions"
            )
        if row["chunks"] == AT_CHUNKS:
            print(verdict(row["all"]["mean_us"], MOST_US, f"µs per decision at {AT_CHUNKS:,} chunks"))
    print(f"{opened_chunks:,} chunks opened in {data['opening']['median_ms']:.1f} ms")
    if opened_chunks == OPENED_CHUNKS:
        print(verdict(data["opening"]["median_ms"], MOST_MS, f"ms to open {OPENED_CHUNKS:,} chunks"))
    if json_file is not None:
        write_json(json_file, data)


def verdict(value: float, most: float, what: str) -> str:
    """Whether a target is met, in words."""
    return f"target {'met' if value <= most else 'missed'}: {value:.1f}, at most {most:g} {what}"


def balanced_bandwidth(chunks: int) -> float:
    """Bytes per second at which loading a prefix of so many chunks takes as long as computing it."""
    spans = range(0, chunks * CHUNK_TOKENS, SPAN_TOKENS)
    return chunks * CHUNK_BYTES / sum(SHAPE.seconds(start, SPAN_TOKENS) for start in spans)


def new_planner(chunks: int, bandwidth: float) -> TimedPlanner:
    """The planner of a prefix of so many chunks, which expects a bandwidth in bytes per second."""
    loading = LoadCost(DEPTH)
    loading.observe(CHUNK_BYTES, -1.0 - CHUNK_BYTES / bandwidth, -1.0)
    return TimedPlanner(
        chunks * CHUNK_TOKENS + SUFFIX_TOKENS,
        CHUNK_TOKENS,
        [(0,)] * chunks,
        [Tier("tier", loading, DEPTH)],
        ComputeCost(SHAPE, trusted=True),
        [Level.whole(CHUNK_BYTES)],
        PlannerOptions(max_span_tokens=SPAN_TOKENS),
    )


def measure_decisions(chunks: int, repeats: int) -> dict[str, Any]:
    """Microseconds per decision of whole restores: medians, over the repeats, of mean, 99th percentile and maximum."""
    runs: dict[str, list[list[float]]] = {"next_compute": [], "next_load": [], "all": []}
    bandwidth = balanced_bandwidth(chunks)
    tier = VirtualTier(constant(bandwidth))
    for _ in range(repeats):
        planner = new_planner(chunks, bandwidth)
        run_restore(planner, undisturbed(SHAPE.seconds), [tier])
        runs["next_compute"].append(planner.compute_s)
        runs["next_load"].append(planner.load_s)
        runs["all"].append(planner.compute_s + planner.load_s)
    return {"chunks": chunks} | {
        kind: {
            "decisions": len(taken[0]),
            "mean_us": 1e6 * median(mean(seconds) for seconds in taken),
            "p99_us": 1e6 * median(float(np.percentile(seconds, 99)) for seconds in taken),
            "max_us": 1e6 * median(max(seconds) for seconds in taken),
        }
        for kind, taken in runs.items()
    }


def measure_opening(chunks: int, repeats: int) -> dict[str, Any]:
    """Milliseconds until the first decision of both arms, median and every repeat."""
    bandwidth = balanced_bandwidth(chunks)
    took_ms = []
    for _ in range(repeats):
        began = perf_counter()
        planner = new_planner(chunks, bandwidth)
        planner.next_compute(0.0)
        planner.next_load(0, 0.0)
        took_ms.append(1e3 * (perf_counter() - began))
    return {"chunks": chunks, "median_ms": median(took_ms), "repeats_ms": took_ms}


if __name__ == "__main__":
    typer.run(main)

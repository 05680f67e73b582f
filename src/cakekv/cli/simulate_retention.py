"""`cakekv simulate retention`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from cakekv.cli.console import NEWS, RESULTS, one_of
from cakekv.errors import BadInput
from cakekv.quantities import format_bytes, parse_bytes
from cakekv.simulate.cluster.hardware import PEAK_FLOPS, compute_shape, model_size, read_calibration
from cakekv.simulate.cluster.trace import read_trace
from cakekv.simulate.retention.comparison import (
    BASELINE,
    Row,
    Workload,
    deviations,
    is_same_in_the_real_store,
    measure,
    table,
    to_dict,
)
from cakekv.simulate.retention.replay import Case
from cakekv.simulate.retention.sessions import Sessions
from cakekv.simulate.retention.waiting import measure_waiting, waiting_table, waiting_to_dict
from cakekv.store.eviction import POLICIES, policy_named
from cakekv.store.eviction.lookahead import LookAhead

_NOT_AHEAD = ",".join(name for name in POLICIES if name != LookAhead.name)
"""Where nobody waits, looking ahead is LRU."""
_CHECKED_RESTORES = 40
"""Per policy and bandwidth, about so many restores are run through the planner, too."""


def retention(
    trace: Annotated[
        Path | None,
        typer.Option(help="JSON lines in Mooncake's format; without it a sample of its conversation trace is used."),
    ] = None,
    sessions: Annotated[
        int | None, typer.Option(help="So many requests of synthetic conversations instead of a trace.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the synthetic conversations.")] = 0,
    capacities: Annotated[
        str, typer.Option(help="Of the tier, with commas between.")
    ] = "50GB,100GB,200GB,400GB,800GB,1600GB",
    policies: Annotated[
        str, typer.Option(help="Eviction policies, with commas between; lru is always among them.")
    ] = _NOT_AHEAD,
    ratios: Annotated[
        str,
        typer.Option(help="Bandwidths, as multiples of that at which loading all prompts takes as long as computing."),
    ] = "0.5,1,2,4",
    rules: Annotated[
        str, typer.Option(help="Rules of what is written, beside everything; tried at balance, in the real store.")
    ] = "skip_head=auto,skip_head=4096",
    loads: Annotated[
        str | None,
        typer.Option(
            help="Have requests wait for one machine instead, with the tier as RAM and a disk behind it; seconds of "
            "computing everything that arrive per second, with commas between."
        ),
    ] = None,
    ram_ratio: Annotated[float, typer.Option(help="With --loads: RAM's bandwidth; --ratios are the disk's.")] = 12.0,
    model: Annotated[str, typer.Option(help="For example llama-3.1-8b or llama-3.1-70b.")] = "llama-3.1-8b",
    gpu: Annotated[str, typer.Option(help=f"{one_of(PEAK_FLOPS)}.")] = "h100",
    calibration: Annotated[
        Path | None,
        typer.Option(help='Measured compute costs instead: a JSON object {"fixed", "linear", "quadratic"} in seconds.'),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write settings and figures here.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw what each policy saves here.")] = None,
) -> None:
    """Compare eviction policies by the time to first token that they save on a trace.

    One tier, empty at first; every prompt is looked up, restored from both ends with what is there, and what was
    computed of it is written. TTFT is what the restore takes, without waiting for others. The policies are the ones
    that the stores use.

    With --loads, requests wait: the policy lookahead, which is told of the queue and has the disk fetch ahead, is then
    among them, and what is counted is what was in RAM when a request's turn came, and the mean TTFT.
    """
    if loads is not None and policies == _NOT_AHEAD:
        policies = ",".join(POLICIES)
    if trace is not None and sessions is not None:
        raise BadInput("--trace and --sessions exclude each other")
    names = list(dict.fromkeys([BASELINE, *filter(None, policies.split(","))]))
    for name in names:
        policy_named(name)
    factors = [_positive(text, "--ratios") for text in ratios.split(",")]
    sizes = sorted({parse_bytes(text) for text in capacities.split(",")})
    known = model_size(model)
    shape = read_calibration(calibration) if calibration else compute_shape(known, gpu)
    arrivals = Sessions(seed=seed).trace(sessions) if sessions else read_trace(trace)
    workload = Workload(arrivals.requests, shape, known.token_bytes)
    if sizes[0] < workload.chunk_bytes:
        raise BadInput(f"a chunk alone has {format_bytes(workload.chunk_bytes)}: give more than {sizes[0]} bytes")
    settings: dict[str, Any] = {
        "trace": f"sessions, seed {seed}" if sessions else trace.name if trace else "sample",
        "requests": len(workload.requests),
        "model": model,
        "gpu": "calibration" if calibration else gpu,
        "compute_shape": asdict(shape),
        "chunk_bytes": workload.chunk_bytes,
        "balanced_bytes_per_s": workload.balanced() * known.token_bytes,
    }
    if loads is not None:
        used = [_positive(text, "--loads") for text in loads.split(",")]
        _wait(workload, names, sizes, used, (_positive(str(ram_ratio), "--ram-ratio"), factors), settings, json_file)
        return
    balanced = 1.0 if 1.0 in factors else factors[0]
    runs = [(name, size, factor, "") for factor in factors for size in sizes for name in names]
    runs += [
        (name, size, balanced, rule)
        for rule in filter(None, rules.split(","))
        for size in sizes
        for name in dict.fromkeys([BASELINE, names[-1]])
    ]
    rows: list[Row] = []
    cases: dict[float, list[Case]] = {factor: [] for factor in factors}
    with Progress(console=NEWS, transient=True) as progress:
        for name, size, factor, rule in progress.track(runs, description="replaying"):
            checked = size == sizes[0] and not rule
            keep_every = max(1, len(workload.requests) // _CHECKED_RESTORES) if checked else 0
            row, kept = measure(workload, name, size, factor, rule, keep_every)
            rows.append(row)
            cases[factor] += kept
            if json_file:  # as they come, so that an interrupted run leaves what it has
                json_file.write_text(json.dumps(to_dict(settings, rows, {}), indent=1) + "\n")
        checks = progress.track(cases.items(), description="asking the planner")
        planner = {f"{factor:g}": deviations(kept, workload.timer(factor)) for factor, kept in checks}
        same = progress.track(names, description="in a real store")
        differ = [name for name in same if not is_same_in_the_real_store(workload, name, sizes[0], balanced)]
    data = to_dict(settings, rows, planner) | {"differ_in_the_real_store": differ}
    if json_file:
        json_file.write_text(json.dumps(data, indent=1) + "\n")
    if picture:
        from cakekv.simulate.retention.picture import draw

        draw(data, picture)
    for factor in factors:
        RESULTS.print(table(rows, factor))
    for ratio, check in planner.items():
        RESULTS.print(
            f"{ratio} × balance: the planner took {check['mean']:+.1%} longer in {check['restores']} of these "
            f"restores, the median deviation is {check['median_absolute']:.1%}"
        )
    RESULTS.print(f"other victims in a real store than here: {', '.join(differ) or 'none'}")


def _wait(
    workload: Workload,
    names: Sequence[str],
    sizes: Sequence[int],
    loads: Sequence[float],
    ratios: tuple[float, Sequence[float]],
    settings: dict[str, Any],
    json_file: Path | None,
) -> None:
    """With a queue; `ratios` are RAM's and the disk's."""
    ram, disks = ratios
    runs = [(disk, load, size, name) for disk in disks for load in loads for size in sizes for name in names]
    rows = []
    with Progress(console=NEWS, transient=True) as progress:
        for disk, load, size, name in progress.track(runs, description="replaying"):
            rows.append(measure_waiting(workload, name, size, load, ram, disk))
    settings |= {"ram_ratio": ram, "disk_ratios": list(disks)}
    if json_file:
        json_file.write_text(json.dumps(waiting_to_dict(settings, rows), indent=1) + "\n")
    RESULTS.print(waiting_table(rows))


def _positive(text: str, option: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise BadInput(f"{text!r} in {option} is not a number above 0")
    return value

"""`cakekv simulate cluster`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from cakekv.cli.console import NEWS, RESULTS, one_of
from cakekv.errors import BadInput
from cakekv.quantities import parse_bandwidth, parse_duration
from cakekv.restore.priority import POLICIES, open_policy
from cakekv.simulate.cluster.cluster import BEHAVIOURS, Cluster, run_cluster
from cakekv.simulate.cluster.coarse import Machine
from cakekv.simulate.cluster.comparison import default_speed_up, summarise, table, to_dict
from cakekv.simulate.cluster.hardware import PEAK_FLOPS, SPAN_TOKENS, compute_shape, model_size, read_calibration
from cakekv.simulate.cluster.routing import ROUTINGS
from cakekv.simulate.cluster.tiers import parse_tiers
from cakekv.simulate.cluster.trace import read_trace


def cluster(
    trace: Annotated[
        Path | None,
        typer.Option(help="JSON lines in Mooncake's format; without it a sample of its conversation trace is used."),
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the cluster.", min=1)] = 8,
    gpus_per_node: Annotated[
        int, typer.Option(help="GPUs that hold the model together (tensor parallel). They share a node's tiers.", min=1)
    ] = 1,
    gpu: Annotated[str, typer.Option(help=f"{one_of(PEAK_FLOPS)}.")] = "h100",
    model: Annotated[str, typer.Option(help="For example llama-3.1-8b or llama-3.1-70b.")] = "llama-3.1-8b",
    share: Annotated[
        float, typer.Option(help="Share of the compute that prefill may use; decodes have the rest.", min=0.01, max=1)
    ] = 1.0,
    calibration: Annotated[
        Path | None,
        typer.Option(help='Measured compute costs instead: a JSON object {"fixed", "linear", "quadratic"} in seconds.'),
    ] = None,
    tiers: Annotated[
        str, typer.Option(help="Each node's RAM and the tier shared by all: capacity@bandwidth to each node.")
    ] = "ram=64GB@200Gbps,remote=10TB@25Gbps",
    bandwidth: Annotated[
        str | None, typer.Option(help="Bandwidth of the remote tier to each node, in place of the one in --tiers.")
    ] = None,
    remote_limit: Annotated[
        str | None, typer.Option(help="Bandwidth of the remote tier to all nodes together, such as 2Tbps.")
    ] = None,
    systems: Annotated[str, typer.Option(help="Which systems to compare, with commas between.")] = ",".join(BEHAVIOURS),
    policy: Annotated[
        str, typer.Option(help=f"Who is served first among those waiting on a node: {one_of(POLICIES)}.")
    ] = "fcfs",
    starvation: Annotated[str, typer.Option(help="No request is passed over for longer than this.")] = "10s",
    routing: Annotated[
        str, typer.Option(help="prefix: where the prompt's prefix is in RAM, if that pays; or least-loaded.")
    ] = "prefix",
    requests: Annotated[
        int | None, typer.Option(help="How many; the trace is repeated with new users where it is too short.", min=1)
    ] = None,
    speed_up: Annotated[
        float | None,
        typer.Option(help="Factor on the arrival rate. Default: recomputing everything would keep the GPUs 80% busy."),
    ] = None,
    ttft_target: Annotated[str, typer.Option(help="Requests with a later first token don't count as goodput.")] = "5s",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write settings and figures here.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the distribution of TTFT and the goodput here.")] = None,
) -> None:
    """Simulate a cluster that serves a trace: compute-only, load-only, layerwise overlap, Cake, and this planner.

    Every node has RAM of its own, and all share a remote tier. Both keep the least recently used 512-token blocks and
    start empty. Only prefill is simulated. TTFT counts from a request's arrival, so it includes its wait for a GPU.

    "ours" is what the planner does with known costs; "ours-layered" adds a layered finish: the end of the prefix
    arrives layer by layer while the suffix is being computed.
    """
    chosen = [name.strip() for name in systems.split(",")]
    for name in chosen:
        if name not in BEHAVIOURS:
            raise BadInput(f"there is no system {name!r}: choose among {', '.join(BEHAVIOURS)}")
    if routing not in ROUTINGS:
        raise BadInput(f"there is no routing {routing!r}: choose one of {', '.join(ROUTINGS)}")
    if gpus % gpus_per_node:
        raise BadInput(f"{gpus} GPUs cannot be divided into nodes of {gpus_per_node}: make --gpus a multiple of it")
    if speed_up is not None and not 0 < speed_up < float("inf"):
        raise BadInput(f"--speed-up is {speed_up}: give a factor above 0")
    target_s = parse_duration(ttft_target)
    order = open_policy(policy, parse_duration(starvation))
    size = model_size(model)
    sizes = parse_tiers(tiers)
    if bandwidth is not None:
        rate = parse_bandwidth(bandwidth)
        if rate is None:
            raise BadInput("--bandwidth needs a limit, such as 25Gbps")
        sizes = sizes._replace(remote=sizes.remote._replace(bandwidth=rate))
    shape = read_calibration(calibration) if calibration else compute_shape(size, gpu, gpus_per_node, share)
    machine = Machine(shape, sizes.ram.bandwidth / size.token_bytes, size.layers, SPAN_TOKENS)
    limit = parse_bandwidth(remote_limit) if remote_limit is not None else None
    simulated = Cluster(gpus // gpus_per_node, machine, size.token_bytes, sizes, limit, routing)
    arrivals = read_trace(trace)
    count = len(arrivals.requests) if requests is None else requests
    factor = default_speed_up(simulated, arrivals) if speed_up is None else speed_up
    settings: dict[str, Any] = {
        "trace": trace.name if trace else "sample",
        "requests": count,
        "speed_up": factor,
        "gpus": gpus,
        "gpus_per_node": gpus_per_node,
        "gpu": gpu,
        "model": model,
        "share": share,
        "compute_shape": asdict(shape),
        "tiers": tiers,
        "remote_bandwidth_bytes_per_s": sizes.remote.bandwidth,
        "remote_limit_bytes_per_s": limit,
        "policy": policy,
        "starvation_s": order.starvation_s,
        "routing": routing,
        "ttft_target_s": target_s,
    }
    results = []
    with Progress(console=NEWS, transient=True) as progress:
        for name in progress.track(chosen, description="simulating"):
            run = run_cluster(simulated, arrivals, count, factor, name, order)
            results.append(summarise(name, run, simulated, target_s))
    data = to_dict(settings, results)
    if json_file:
        json_file.write_text(json.dumps(data, indent=1) + "\n")
    if picture:
        from cakekv.simulate.cluster.picture import draw

        draw(data, picture)
    RESULTS.print(f"{count} requests at {factor:.3g} × the trace's rate on {simulated.nodes} nodes")
    RESULTS.print(table(results, target_s))

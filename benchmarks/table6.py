"""The paper's Table 6 on a real model in miniature: 16, 8 and 3 bits at four bandwidths, loaded, computed and both.

    python benchmarks/table6.py --json benchmarks/table6.json

16 bits are "raw", 8 are "int8", 3 are "nuq3" (the paper's are KVQuant's). Bandwidths are multiples of the balanced one
of 16 bits, at which loading the prefix takes as long as computing it. In every round each bandwidth sees one
compute-only run, and of every codec one load-only run and one of both arms, in turn. Beside the measured speed-ups
stand the simulator's: the planner that ships on a virtual clock, with this machine's compute cost, the codec's bytes
per chunk, and its decoding, which delays every chunk. `compute_slowdown` is what the spans of a run of both arms took
over what the same positions took in the compute-only run of its round: what loading and decoding beside it cost the
computing arm.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer

from cakekv.bench.bound import compute_curve
from cakekv.bench.grid import check_grid, fill
from cakekv.bench.machine import describe_run
from cakekv.bench.quality.documents import Document
from cakekv.bench.quality.judge import Judge
from cakekv.cake import Cake
from cakekv.cli.console import number_list, write_json
from cakekv.cli.model import load_cake
from cakekv.codec import codec_named
from cakekv.demo.document import read_document
from cakekv.engine.transformers import TransformersEngine
from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost, LoadFigures
from cakekv.restore.flights import Tier
from cakekv.restore.level_choice import Level
from cakekv.restore.planner import Mode, Planner, PlannerOptions
from cakekv.restore.report import RestoreReport
from cakekv.simulate.machine import VirtualTier, constant, run_restore
from cakekv.store.disk import DiskStore
from cakekv.store.throttled import ThrottledStore

BITS = {16: "raw", 8: "int8", 3: "nuq3"}


class Stored(NamedTuple):
    """A prefix as one codec stores it."""

    cake: Cake
    link: ThrottledStore
    bytes: int
    decode_s: float
    """Seconds to decode a chunk, on one thread."""


def store_prefix(
    engine: TransformersEngine, recipe: str, prompt: Sequence[int], prefix: int, folder: Path, stack: ExitStack
) -> Stored:
    """Fill a store of its own with the prefix."""
    link = ThrottledStore(stack.enter_context(DiskStore(folder)), math.inf)
    cake = stack.enter_context(Cake(engine, None, link, codec=recipe))
    stored_bytes = fill(cake, prompt[:prefix])
    document = Document("text", list(prompt[: 4 * cake.chunk_tokens]), list(prompt[-8:]), [])
    judged = Judge(engine, cake.chunk_tokens).judge(document, [codec_named(recipe)])[0]
    exact_bytes = engine.layout.token_bytes * cake.chunk_tokens
    decode_s = 0.0 if math.isnan(judged.decode_gbps) else exact_bytes / judged.decode_gbps / 1e9
    return Stored(cake, link, stored_bytes, decode_s)


def predicted_s(mode: Mode, stored: Stored, shape: ComputeShape, bandwidth: float, prompt: int, prefix: int) -> float:
    """What the simulator says a run takes."""
    cake = stored.cake
    chunks = prefix // cake.chunk_tokens
    size, depth = stored.bytes // chunks, stored.link.parallel_reads
    known = LoadFigures(1 / bandwidth, depth * size / bandwidth + stored.decode_s, size, size / bandwidth)
    restore = Planner(
        prompt,
        cake.chunk_tokens,
        [(0,)] * chunks,
        [Tier("link", LoadCost(depth, known), depth)],
        ComputeCost(shape, trusted=True),
        [Level.whole(size)],
        PlannerOptions(mode=mode, max_span_tokens=cake.max_span_tokens),
    )
    tier = VirtualTier(constant(bandwidth), latency_s=stored.decode_s)
    return run_restore(restore, lambda span, now: shape.seconds(span.start, span.tokens), [tier])


class Cell:
    """One codec at one bandwidth."""

    def __init__(self, bits: int, ratio: float, bandwidth: float) -> None:
        self.bits, self.ratio, self.bandwidth = bits, ratio, bandwidth
        self.runs: dict[Mode, list[RestoreReport]] = defaultdict(list)
        self.slowdowns: list[float] = []

    def measure(self, stored: Stored, prompt: Sequence[int], alone: RestoreReport) -> None:
        """Load, then both; `alone` is the compute-only run of this round."""
        stored.link.set_bandwidth(self.bandwidth)
        modes: tuple[Mode, ...] = ("load", "both")
        for mode in modes:
            self.runs[mode].append(stored.cake.prefill(prompt, mode=mode, save=False).report)
        self.runs["compute"].append(alone)
        curve = compute_curve(alone.spans)
        spans = [span for span in self.runs["both"][-1].spans if span.start + span.tokens <= alone.prefix_tokens]
        expected_s = sum(curve.at(span.start + span.tokens) - curve.at(span.start) for span in spans)
        if expected_s:
            self.slowdowns.append(sum(span.ended_s - span.began_s for span in spans) / expected_s)

    def to_dict(self, stored: Stored, shape: ComputeShape, prompt: int, prefix: int) -> dict[str, Any]:
        """Medians, and the simulator's figures beside them."""
        measured = {mode: median(report.ttft_s for report in reports) for mode, reports in self.runs.items()}
        foreseen = {mode: predicted_s(mode, stored, shape, self.bandwidth, prompt, prefix) for mode in self.runs}
        return {
            "bits": self.bits,
            "codec": BITS[self.bits],
            "bandwidth_ratio": self.ratio,
            "bandwidth_bytes_per_s": self.bandwidth,
            **{f"{mode}_s": seconds for mode, seconds in measured.items()},
            "over_load": measured["load"] / measured["both"],
            "over_compute": measured["compute"] / measured["both"],
            "predicted_over_load": foreseen["load"] / foreseen["both"],
            "predicted_over_compute": foreseen["compute"] / foreseen["both"],
            "predicted_both_s": foreseen["both"],
            "compute_slowdown": median(self.slowdowns) if self.slowdowns else None,
            "repeats": {f"{mode}_s": [report.ttft_s for report in reports] for mode, reports in self.runs.items()},
            "met_at": [report.met_at for report in self.runs["both"]],
        }


def measure(
    engine: TransformersEngine,
    prompt: Sequence[int],
    prefix: int,
    ratios: Sequence[float],
    repeats: int,
    folder: Path,
    data: dict[str, Any],
) -> Iterator[None]:
    """Fill `data`, round by round."""
    with ExitStack() as stack:
        stored = {bits: store_prefix(engine, BITS[bits], prompt, prefix, folder / BITS[bits], stack) for bits in BITS}
        raw = stored[16].cake
        alone = raw.prefill(prompt, mode="compute", save=False).report
        balanced = stored[16].bytes / compute_curve(alone.spans).at(prefix)
        cells = [Cell(bits, ratio, ratio * balanced) for ratio in ratios for bits in BITS]
        data["balanced_bytes_per_s"] = balanced
        data["stored"] = {
            BITS[bits]: {"bytes": one.bytes, "ratio": stored[16].bytes / one.bytes, "decode_s_per_chunk": one.decode_s}
            for bits, one in stored.items()
        }
        for _ in range(repeats):
            for ratio in ratios:
                alone = raw.prefill(prompt, mode="compute", save=False).report
                for cell in cells:
                    if cell.ratio == ratio:
                        cell.measure(stored[cell.bits], prompt, alone)
            shape = raw.compute_cost.shape
            data["cells"] = [cell.to_dict(stored[cell.bits], shape, len(prompt), prefix) for cell in cells]
            yield


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")],
    prefix: Annotated[int, typer.Option(help="Length of the stored prefix, in tokens.")] = 2048,
    suffix_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind it.")] = 32,
    ratios: Annotated[str, typer.Option(help="Bandwidths, in multiples of 16 bits' balanced one.")] = "0.5,1,2,4",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
) -> None:
    """Measure the table and set the simulator's beside it."""
    multiples: list[float] = number_list(ratios, float, "ratios")
    cake = load_cake("demo", None)
    token_ids = [int(token) for token in cake.tokenizer(read_document("demo", cake.tokenizer))["input_ids"]]
    check_grid(cake.engine, len(token_ids), [prefix], suffix_tokens, cake.chunk_tokens)
    cake.prefill(token_ids[:512], mode="compute")  # the first forward of a process is slow
    data: dict[str, Any] = {
        **describe_run(),
        "prefix_tokens": prefix,
        "suffix_tokens": suffix_tokens,
        "chunk_tokens": cake.chunk_tokens,
    }
    prompt = token_ids[: prefix + suffix_tokens]
    with tempfile.TemporaryDirectory(prefix="cakekv-table6-") as folder:
        for _ in measure(cake.engine, prompt, prefix, multiples, repeats, Path(folder), data):  # type: ignore[arg-type]
            write_json(json_file, data)
    for cell in data["cells"]:
        slowdown = "–" if cell["compute_slowdown"] is None else f"{cell['compute_slowdown']:.2f}"
        print(
            f"{cell['bits']:>2} bits, {cell['bandwidth_ratio']:g} × balanced: {cell['over_load']:.2f} over load-only, "
            f"{cell['over_compute']:.2f} over compute-only (simulated {cell['predicted_over_load']:.2f}, "
            f"{cell['predicted_over_compute']:.2f}); computing takes {slowdown} of its time alone"
        )


if __name__ == "__main__":
    typer.run(main)

"""How much of each chunk to read: a fixed level beside one chosen as the bandwidth changes, under a target for TTFT.

    python benchmarks/adaptive_level.py --json benchmarks/adaptive_level.json --picture benchmarks/adaptive_level.png

The demo's model restores documents of several kinds through a link whose bandwidth follows a trace, the same in every
run: it wavers around the balanced one (at which reading all of every chunk takes as long as computing it) and falls to
a quarter of that for a while. The codec is "ladder", which stores every chunk in three parts: variants read one, two or
three of them throughout, or choose for a target ("adaptive"). The first document sets the target, half-way between the
TTFT of three parts and of one, and counts for nothing else. Without a layered finish, which fixes what
is read of the last chunks, and so is not used where levels are chosen. Quality is judged on the very cache that
each run left: the next-token distributions of what follows the document, against those over the exact cache.
"""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import numpy as np
import typer

from cakekv.bench.bound import compute_curve
from cakekv.bench.machine import describe_run
from cakekv.bench.quality.documents import Document, make_documents
from cakekv.bench.quality.judge import Reference, follow
from cakekv.cake import Cake
from cakekv.cli.console import write_json
from cakekv.cli.model import load_cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import CakeError
from cakekv.report.colours import BOTH, BOUND, COMPUTE, FAILED, LOAD
from cakekv.report.picture import new_figure, save_figure
from cakekv.results import Prefill
from cakekv.simulate.rate import Rate
from cakekv.store.disk import DiskStore
from cakekv.store.throttled import ThrottledStore

PERIOD_S = 0.1
SEED = 3
COLOURS = {"1 of 3": FAILED, "2 of 3": LOAD, "3 of 3": COMPUTE, "adaptive": BOTH}


def bandwidths(balanced: float, compute_s: float) -> Rate:
    """Around the balanced bandwidth, and from a sixth to two thirds of the time to compute at a quarter of that."""
    rng = np.random.default_rng(SEED)
    periods = math.ceil(2 * compute_s / PERIOD_S)
    rates = balanced * np.exp(rng.normal(0.0, 0.15, periods))
    rates[round(periods / 12) : round(periods / 3)] *= 0.25
    return Rate([float(rate) for rate in rates], PERIOD_S)


@contextmanager
def following(link: ThrottledStore, trace: Rate) -> Iterator[None]:
    """Let the link's bandwidth follow the trace, from now on."""
    over = threading.Event()
    link.set_bandwidth(trace.rates[0])

    def follow_trace() -> None:
        for rate in trace.rates[1:]:
            if over.wait(trace.period_s):
                return
            link.set_bandwidth(rate)

    thread = threading.Thread(target=follow_trace)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Comparison:
    """The variants on one model, each with what it has learned of link and machine."""

    def __init__(self, engine: TransformersEngine, folder: Path, stack: ExitStack, **options: Any) -> None:
        self.engine = engine
        self.stack, self.options = stack, options
        self.link = ThrottledStore(stack.enter_context(DiskStore(folder)), math.inf)
        self.cakes = {
            name: stack.enter_context(Cake(engine, None, self.link, codec=f"ladder:read={name[0]}", **options))
            for name in ("1 of 3", "2 of 3", "3 of 3")
        }
        self.trace: Rate | None = None

    def first(self, document: Document) -> dict[str, Any]:
        """Set trace and target by a document."""
        stored_bytes = self.store(document)
        spans = self.cakes["3 of 3"].prefill(prompt_of(document), mode="compute", save=False).report.spans
        compute_s = compute_curve(spans).at(len(document.context))
        balanced = stored_bytes / compute_s
        self.trace = bandwidths(balanced, compute_s)
        ttft_s: dict[str, list[float]] = {name: [] for name in self.cakes}
        for _ in range(3):  # the first round teaches them what link and machine are like
            for name, one in self.cakes.items():
                ttft_s[name].append(self.run(one, document).report.ttft_s)
        best, least = (median(ttft_s[name][1:]) for name in ("3 of 3", "1 of 3"))
        target_s = (best + least) / 2
        adaptive = Cake(self.engine, None, self.link, codec="ladder", ttft_target_s=target_s, **self.options)
        self.cakes["adaptive"] = self.stack.enter_context(adaptive)
        for _ in range(3):
            self.run(adaptive, document)
        return {
            "compute_s": compute_s,
            "balanced_bytes_per_s": balanced,
            "trace": {"period_s": PERIOD_S, "bytes_per_s": list(self.trace.rates)},
            "ttft_target_s": target_s,
            "first_ttft_s": ttft_s,
        }

    def store(self, document: Document) -> int:
        """Save the document's chunks; returns their bytes."""
        self.link.set_bandwidth(math.inf)
        cake = self.cakes["3 of 3"]
        before = replace(cake.wait_saved())
        cake.prefill(document.context, mode="compute")
        saved = cake.wait_saved()
        if (saved.saved_chunks - before.saved_chunks) * cake.chunk_tokens != len(document.context):
            raise CakeError(f"not all chunks were stored: {saved.error or 'the tier declined'}")
        return saved.saved_bytes - before.saved_bytes

    def run(self, cake: Cake, document: Document) -> Prefill:
        """Restore the document while the bandwidth follows the trace."""
        assert self.trace is not None
        with following(self.link, self.trace):
            return cake.prefill(prompt_of(document), save=False)

    def compare(self, document: Document) -> dict[str, Any]:
        """One document through every variant."""
        self.store(document)
        exact = self.cakes["3 of 3"].prefill(prompt_of(document), mode="compute", save=False)
        reference = Reference(follow(self.engine, exact.cache, document))
        result: dict[str, Any] = {"kind": document.kind, "compute_s": exact.report.ttft_s}
        for name, cake in self.cakes.items():
            run = self.run(cake, document)
            kl, agreement, _ = reference.compare(follow(self.engine, run.cache, document))
            report = run.report
            result[name] = {
                "ttft_s": report.ttft_s,
                "kl": kl,
                "agreement": agreement,
                "computed_tokens": report.computed_tokens,
                "level_tokens": report.level_tokens,
                "lossy_share": report.lossy_share,
                "loads": [load for load in report.to_dict()["loads"] if name == "adaptive"],
            }
        return result


def prompt_of(document: Document) -> list[int]:
    """The document with what follows it, so that its cache has room for being judged."""
    return document.context + document.tail


def summary(documents: Sequence[dict[str, Any]], target_s: float) -> dict[str, Any]:
    """Of every variant, over documents."""
    result = {}
    for name in COLOURS:
        ones = [document[name] for document in documents]
        levels = {level for one in ones for level in one["level_tokens"]}
        result[name] = {
            "ttft_s": median(one["ttft_s"] for one in ones),
            "longest_ttft_s": max(one["ttft_s"] for one in ones),
            "in_time": sum(one["ttft_s"] <= target_s for one in ones),
            "kl": fmean(one["kl"] for one in ones),
            "agreement": fmean(one["agreement"] for one in ones),
            "computed_tokens": fmean(one["computed_tokens"] for one in ones),
            "level_tokens": {
                level: fmean(one["level_tokens"].get(level, 0) for one in ones) for level in sorted(levels)
            },
        }
    return result


def draw(data: dict[str, Any], path: Path) -> None:
    """What the link could carry and what was read of which chunk when; TTFT and quality of every run."""
    figure, axes = new_figure(1, 2, 11.0, 4.2)
    link, runs = axes
    trace, target_s = data["trace"], data["ttft_target_s"]
    one = data["documents"][-1]["adaptive"]
    for load in one["loads"]:
        name = f"{load['parts'] or 3} of 3"
        if load["outcome"] == "placed":
            width = load["ended_s"] - load["began_s"]
            bar = {"height": load["tokens"], "left": load["began_s"], "color": COLOURS[name], "align": "edge"}
            link.barh(load["start"], width, **bar)
    rate = link.twinx()
    times = np.arange(len(trace["bytes_per_s"])) * trace["period_s"]
    rate.step(times, np.array(trace["bytes_per_s"]) / 1e6, where="post", color=BOUND, linewidth=1)
    rate.set_ylim(0)
    rate.set_ylabel("bandwidth (MB/s)")
    for ax in (link, rate):
        ax.set_xlim(0, 1.3 * max(target_s, one["ttft_s"]))
    link.axvline(target_s, color=BOTH, linestyle="--", linewidth=1)
    link.set_xlabel("seconds since the request")
    link.set_ylabel("position in the prompt (tokens)")
    link.set_title("what was read, as the bandwidth changed", loc="left", fontsize=10, fontweight="bold")
    for name, colour in COLOURS.items():
        ones = [document[name] for document in data["documents"]]
        runs.scatter([one["ttft_s"] for one in ones], [one["kl"] for one in ones], color=colour, label=name, s=22)
    runs.axvline(target_s, color=BOTH, linestyle="--", linewidth=1, label="target")
    runs.set_xlabel("TTFT (s)")
    runs.set_ylabel("KL divergence (nats)")
    runs.set_yscale("log")
    runs.set_title("every run", loc="left", fontsize=10, fontweight="bold")
    figure.legend(*runs.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    save_figure(figure, path)


def measure(
    engine: TransformersEngine, documents: Sequence[Document], folder: Path, data: dict[str, Any], **options: Any
) -> Iterator[None]:
    """Fill `data`, document by document. The first one only sets trace and target."""
    with ExitStack() as stack:
        comparison = Comparison(engine, folder, stack, **options)
        data |= comparison.first(documents[0])
        data["documents"] = []
        for document in documents[1:]:
            data["documents"].append(comparison.compare(document))
            data["variants"] = summary(data["documents"], data["ttft_target_s"])
            yield


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")],
    picture: Annotated[Path | None, typer.Option(help="Draw them here, as PNG.")] = None,
    documents: Annotated[int, typer.Option(min=1, help="How many, beside the first.")] = 9,
    tokens: Annotated[int, typer.Option(min=256, help="Length of each, in tokens: whole chunks of 64.")] = 2048,
    continuation: Annotated[int, typer.Option(min=8, help="Tokens behind it.")] = 128,
) -> None:
    """Compare fixed levels with an adaptive one."""
    cake = load_cake("demo", None)
    made = make_documents(cake.tokenizer, documents + 1, tokens, continuation)
    made = [replace(document, needles=[]) for document in made]
    data: dict[str, Any] = {
        **describe_run(),
        "prefix_tokens": tokens,
        "suffix_tokens": continuation,
    }
    with tempfile.TemporaryDirectory(prefix="cakekv-adaptive-") as folder:
        for _ in measure(cake.engine, made, Path(folder) / "store", data, layered_finish=False):  # type: ignore[arg-type]
            write_json(json_file, data)
    for name, one in data["variants"].items():
        print(
            f"{name:>9}: {one['ttft_s']:.2f} s, {one['in_time']} of {documents} within {data['ttft_target_s']:.2f} s; "
            f"KL {one['kl']:.4f}, agreement {one['agreement']:.3f}"
        )
    if picture is not None:
        draw(data, picture)


if __name__ == "__main__":
    typer.run(main)

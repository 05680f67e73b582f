"""Compute, load, both and auto on a GPU: the shape of Llama 3.1 8B, real tiers, and links of a data centre's speeds.

    python benchmarks/gpu.py --json benchmarks/gpu.json
    python benchmarks/gpu.py --tiny --device cpu        # to try the program

The weights are random (nothing is downloaded): what a restore takes does not depend on them. One long prefix is stored
in a memory and a disk tier; the shorter ones are heads of it. Each tier is measured bare, and behind a link of each
bandwidth. Before each run the system is asked to forget the disk tier's pages; a system that does not, shows in how
fast the bare disk loads. Before all of it a chunk is decoded, recipe by recipe, on one core and on the GPU.

Repeats go through all points before the next begins, so that what else the machine does meets all of them. Where time
runs out, the JSON says which repeats were left out; it is written after every point.
"""

from __future__ import annotations

import gc
import math
import random
import tempfile
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer

from cakekv.bench.bound import compute_curve
from cakekv.bench.grid import Point, fill
from cakekv.bench.machine import describe_run
from cakekv.bench.page_cache import forget_chunks
from cakekv.cake import Cake
from cakekv.cli.console import number_list, write_json
from cakekv.restore.planner import Mode
from cakekv.store.disk import DiskStore
from cakekv.store.memory import MemoryStore
from cakekv.store.throttled import ThrottledStore

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from cakekv.engine.transformers import TransformersEngine

MEASURED: tuple[Mode, ...] = ("compute", "load", "both", "auto")
GBPS = 1e9 / 8
"""Bytes per second."""

Name = TypeVar("Name", bound=Hashable)


class Workload(NamedTuple):
    """A model's shape, and what to restore with it."""

    model: dict[str, Any]
    """Arguments of transformers' LlamaConfig."""
    prefixes: list[int]
    """Lengths in tokens, ascending."""
    suffix_tokens: int
    chunk_tokens: int
    max_span_tokens: int


_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_8B = Workload(
    {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rope_parameters": _ROPE,
    },
    prefixes=[4096, 8192, 16_384, 32_768],
    suffix_tokens=256,
    chunk_tokens=128,
    max_span_tokens=2048,  # shorter spans leave a fast GPU waiting for kernel launches
)
TINY = Workload(
    {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 131_072,
        "rope_parameters": _ROPE,
    },
    prefixes=[256, 512],
    suffix_tokens=16,
    chunk_tokens=32,
    max_span_tokens=128,
)


class Link(NamedTuple):
    """A tier, bare or behind a link, with the `Cake` that loads from it."""

    tier: str
    gbps: float | None
    """Gbit/s; None: bare."""
    cake: Cake

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return math.inf if self.gbps is None else self.gbps * GBPS

    @property
    def name(self) -> str:
        """For people."""
        return self.tier if self.gbps is None else f"{self.tier} at {self.gbps:g} Gbit/s"


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")] = Path("out/gpu.json"),
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny model and short prefixes, to try the program.")] = False,
    gbps: Annotated[str, typer.Option(help="Bandwidths of the links, in Gbit/s.")] = "7,25,32,56",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each mode at each point; medians count.")] = 3,
    minutes: Annotated[float, typer.Option(min=0, help="Begin nothing that would end later than this.")] = 8.0,
    folder: Annotated[Path | None, typer.Option(help="Make the disk tier in here, on the disk to be measured.")] = None,
    recipes: Annotated[
        str, typer.Option(help="Codecs to decode with, separated by spaces; they need numba. Empty: none.")
    ] = "fp8 int8 two_plane ladder int4 k5v4 kivi:bits=3 kivi nuq3",
    commit: Annotated[str | None, typer.Option(help="The git commit, where git is not there to tell it.")] = None,
) -> None:
    """Measure compute, load, both and auto side by side on a GPU."""
    deadline = monotonic() + 60 * minutes
    speeds: list[float] = number_list(gbps, float, "bandwidths")

    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print("This benchmark needs a GPU that PyTorch can use (CUDA), and there is none: nothing was measured.")
        return
    workload = TINY if tiny else LLAMA_8B
    setup_s: dict[str, float] = {}
    with timed(setup_s, "build"):
        engine = build_engine(workload, device)
    with timed(setup_s, "identify"):
        engine.identity(workload.chunk_tokens)
    data = describe_workload(engine, workload, commit) | {"setup_s": setup_s}
    if recipes:
        from cakekv.bench.decoding import decoding_speeds

        with timed(setup_s, "decode"):
            data["decoding"] = decoding_speeds(engine, workload.chunk_tokens, recipes.split())
        for speeds_of in data["decoding"]:
            print(describe_decoding(speeds_of), flush=True)
    longest = workload.prefixes[-1]
    token_ids = random.Random(0).choices(range(engine.vocabulary_size), k=longest + workload.suffix_tokens)
    prompts = {prefix: token_ids[:prefix] + token_ids[longest:] for prefix in workload.prefixes}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cakekv-gpu-", dir=folder)))
        links = open_links(stack, engine, workload, scratch, speeds)
        for link in links:
            if link.gbps is None:
                with timed(setup_s, f"fill {link.tier}"):
                    fill(link.cake, token_ids[:longest])
        for link in links:  # staging buffers are allocated, costs learned
            link.cake.prefill(prompts[workload.prefixes[0]], mode="load", save=False)
        balanced = balanced_bandwidths(links[0].cake, token_ids, workload.prefixes)
        points = [
            (link, Point(prefix, link.bandwidth / balanced[prefix], link.bandwidth, MEASURED))
            for prefix in workload.prefixes
            for link in links
        ]
        gc.collect()
        gc.freeze()  # leaves the collections between the runs little to look through
        stack.callback(gc.unfreeze)
        took_s: dict[tuple[str, int], float] = {}
        for _ in range(repeats):
            for link, point in points:
                prefix = point.prefix_tokens
                if monotonic() + expected_s(took_s, link, prefix) > deadline:
                    continue
                with timed(took_s, (link.name, prefix)):
                    point.measure(link.cake, prompts[prefix], lambda _: clean_up(scratch))
                print(describe(link, point), flush=True)
                write_json(json_file, data | results(points, repeats))
    data |= results(points, repeats)
    write_json(json_file, data)
    for entry in data["left_out"]:
        print("left out, for want of time:", entry)


@contextmanager
def timed(seconds: dict[Name, float], name: Name) -> Iterator[None]:
    """Note under `name` the seconds that the `with` block takes."""
    began = monotonic()
    yield
    seconds[name] = monotonic() - began


def expected_s(took_s: dict[tuple[str, int], float], link: Link, prefix_tokens: int) -> float:
    """Seconds that a point should take, from what points took so far, by name of the link and length of the prefix.

    As long as before or, for the first time, as the link's next shorter prefix times the square of their quotient:
    attention grows no faster. 0.0 if nothing is known.
    """
    known = [(tokens, seconds) for (name, tokens), seconds in took_s.items() if name == link.name]
    shorter, seconds = max((each for each in known if each[0] <= prefix_tokens), default=(prefix_tokens, 0.0))
    return seconds * (prefix_tokens / shorter) ** 2


def describe_workload(engine: TransformersEngine, workload: Workload, commit: str | None) -> dict[str, Any]:
    """What is measured, and on what."""
    import torch

    run = describe_run()
    machine = run["machine"]
    on_gpu = engine.device.type == "cuda"
    return {
        **run,
        "machine": machine | {"commit": commit or machine["commit"]},
        "device": torch.cuda.get_device_name() if on_gpu else machine["processor"],
        "cuda": torch.version.cuda if on_gpu else None,
        "model": workload.model | {"parameters": sum(weights.numel() for weights in engine.model.parameters())},
        "token_bytes": sum(engine.layout.segment_bytes(1)),
        "suffix_tokens": workload.suffix_tokens,
        "chunk_tokens": workload.chunk_tokens,
        "max_span_tokens": workload.max_span_tokens,
    }


def build_engine(workload: Workload, device: str) -> TransformersEngine:
    """The model in bfloat16 with random weights, drawn on the device."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from cakekv.engine.transformers import TransformersEngine

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**workload.model), dtype=torch.bfloat16)
    return TransformersEngine(model)


def open_links(
    stack: ExitStack, engine: TransformersEngine, workload: Workload, folder: Path, speeds: Sequence[float]
) -> list[Link]:
    """A memory and a disk tier, each bare first and then behind each bandwidth."""
    links = []
    for tier in (MemoryStore(), DiskStore(folder / "store")):
        for gbps in (None, *speeds):
            store = tier if gbps is None else ThrottledStore(tier, gbps * GBPS)
            cake = Cake(
                engine, None, store, chunk_tokens=workload.chunk_tokens, max_span_tokens=workload.max_span_tokens
            )
            links.append(Link(tier.name, gbps, stack.enter_context(cake)))
    return links


def balanced_bandwidths(cake: Cake, token_ids: Sequence[int], prefixes: Sequence[int]) -> dict[int, float]:
    """For each prefix the bytes per second at which loading it takes as long as computing it."""
    token_bytes = sum(cake.engine.layout.segment_bytes(1))
    front = compute_curve(cake.prefill(token_ids, mode="compute", save=False).report.spans)
    return {prefix: prefix * token_bytes / front.at(prefix) for prefix in prefixes}


def clean_up(folder: Path) -> None:
    """Free the caches of earlier runs, and ask the system to forget the pages of the files in a folder."""
    gc.collect()
    forget_chunks(folder)


def describe(link: Link, point: Point) -> str:
    """A point's medians so far, for people."""
    seconds = ", ".join(f"{mode} {point.seconds(mode):.3f}" for mode in MEASURED)
    return f"{point.prefix_tokens:6,} tokens, {link.name}: {seconds}, bound {median(point.bounds):.3f} s"


def describe_decoding(speeds: dict[str, Any]) -> str:
    """How fast a recipe is decoded, for people."""
    rates = [("one core", speeds["cores_gbps"]), ("the GPU", speeds["device_gbps"])]
    return f"{speeds['recipe']}: " + ", ".join(
        f"{where} does not decode it" if gbps is None else f"{where} decodes {gbps:.2f} GB/s" for where, gbps in rates
    )


def results(points: Sequence[tuple[Link, Point]], repeats: int) -> dict[str, Any]:
    """What was measured so far, and what was not."""
    measured, left_out = [], []
    for link, point in points:
        place = {"tier": link.tier, "link_gbps": link.gbps}
        if point.bounds:
            measured.append(place | point.to_dict())
        if missing := repeats - len(point.bounds):
            left_out.append(place | {"prefix_tokens": point.prefix_tokens, "repeats": missing})
    return {"points": measured, "left_out": left_out}


if __name__ == "__main__":
    typer.run(main)

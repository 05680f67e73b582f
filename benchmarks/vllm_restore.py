"""TTFT of a long prompt whose beginning is stored: plain vLLM, loading only, and both, at several bandwidths.

    python benchmarks/vllm_restore.py --json out/bench_vllm.json --picture out/bench_vllm.png

Bandwidths are multiples of the balanced one, at which loading the prefix takes as long as computing it. The store is a
Valkey server behind a link that the kernel slows down (Linux, as root, with iproute2); nothing in cakekv is slowed
down. Where that cannot be had, or with `--link software`, it is a folder that is slowed down in software, and the
results say so.

Each time is what a client sees: from sending the request to the first token. Plain vLLM is a server of its own, beside
the one with the plug-in; they are asked in turn. `bound_s` is the clairvoyant bound, from the spans and loads of runs
in the modes compute and load (see `cakekv.bench.bound`). `identical` compares the greedy continuations of all three.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from cakekv.bench.bound import clairvoyant_bound
from cakekv.bench.link import ShapedLink
from cakekv.bench.machine import describe_run
from cakekv.bench.picture import bench_picture
from cakekv.bench.servers import valkey_behind
from cakekv.bench.vllm.asking import Answer, Texts, ask, spans_of
from cakekv.bench.vllm.contest import Contest
from cakekv.bench.vllm.filling import fill
from cakekv.bench.vllm.options import (
    ChunkTokens,
    JsonFile,
    LayeredFinish,
    ModelFolder,
    Picture,
    Prefix,
    Ratios,
    Repeats,
    Serve,
    StepTokens,
    Suffix,
)
from cakekv.bench.vllm.server import Server
from cakekv.cli.console import NEWS, number_list, write_json
from cakekv.errors import BadInput, CakeError
from cakekv.restore.report import LoadRecord

SHOWN_TOKENS = 32
"""Tokens of the continuations that are compared."""


def main(
    json_file: JsonFile = Path("out/bench_vllm.json"),
    picture: Picture = None,
    model: ModelFolder = None,
    prefix: Prefix = 4096,
    suffix: Suffix = 256,
    chunk_tokens: ChunkTokens = 128,
    step_tokens: StepTokens = 512,
    ratios: Ratios = "0.5,1,2,4",
    repeats: Repeats = 3,
    layered_finish: LayeredFinish = False,
    link_kind: Annotated[str, typer.Option("--link", help="network, software, or auto.")] = "auto",
    serve: Serve = "--enforce-eager --dtype float32",
) -> None:
    """Measure plain vLLM, loading only, and both."""
    wanted: list[float] = number_list(ratios, float, "ratios")
    contest = Contest(json_file, model, serve, step_tokens)
    options = {"chunk_tokens": chunk_tokens, "mode": "both", "layered_finish": layered_finish}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        link = _link(stack, link_kind)
        url = f"{stack.enter_context(valkey_behind(link))}?timeout=60s" if link else f"{folder}/store"
        plain = stack.enter_context(contest.server())
        texts = Texts(plain)
        prompt = texts.next(prefix + suffix)
        with contest.server({**options, "store": url}) as server:
            balanced = fill(server, texts, [prompt], prefix)
        NEWS.print(f"balanced bandwidth: {balanced / 1e6:.2f} MB/s", highlight=False, soft_wrap=True)
        about = {
            **describe_run(),
            "link": "a folder, slowed down in software" if link is None else "Valkey behind a link shaped by tc tbf",
            "model": contest.model.name,
            "prefix_tokens": prefix,
            "suffix_tokens": suffix,
            "chunk_tokens": chunk_tokens,
            "step_tokens": step_tokens,
            "layered_finish": layered_finish,
        }
        points: list[dict[str, Any]] = []
        for ratio in wanted:
            bandwidth = ratio * balanced
            if link is None:
                shaped = f"{url}?bandwidth={bandwidth:.0f}B/s"
            else:
                shaped = url
                link.set_bandwidth(bandwidth)
            with contest.server({**options, "store": shaped, "save": False}) as server:
                points.append(_measure(plain, server, prompt, prefix, ratio, bandwidth, repeats))
            _show(points[-1])
            write_json(json_file, {**about, "balanced_bytes_per_s": balanced, "points": points})
    if picture is not None:
        bench_picture(points, picture)


def _link(stack: ExitStack, kind: str) -> ShapedLink | None:
    """A link in the kernel, or None for one in software."""
    if kind not in ("auto", "network", "software"):
        raise BadInput(f"--link is network, software or auto, not {kind}")
    if kind == "software":
        return None
    try:
        return stack.enter_context(ShapedLink())
    except CakeError as error:
        if kind == "network":
            raise
        NEWS.print(f"no link in the kernel ({error}); one in software instead", highlight=False, soft_wrap=True)
        return None


def _measure(
    plain: Server, server: Server, prompt: list[int], prefix: int, ratio: float, bandwidth: float, repeats: int
) -> dict[str, Any]:
    """One bandwidth: a round to warm up, so that costs are known, and to compare answers; then the measured ones."""

    def once(tokens: int = 1) -> dict[str, Answer]:
        return {
            "compute": ask(plain, prompt, tokens),
            "load": ask(server, prompt, tokens, mode="load", report=True),
            "both": ask(server, prompt, tokens, mode="both", report=True),
            "compute_with_plug_in": ask(server, prompt, tokens, mode="compute", report=True),
        }

    cold_s = ask(server, prompt, mode="both").ttft_s
    shown = [answer.token_ids for answer in once(SHOWN_TOKENS).values()]
    rounds = [once() for _ in range(repeats)]
    times = {name: [answers[name].ttft_s for answers in rounds] for name in rounds[0]}
    times["bound"] = [_bound(answers, prefix) for answers in rounds]
    medians = {f"{name}_s": median(taken) for name, taken in times.items()}
    both = [answers["both"].report or {} for answers in rounds]
    return {
        "prefix_tokens": prefix,
        "bandwidth_ratio": ratio,
        "bandwidth_bytes_per_s": bandwidth,
        **medians,
        "both_first_time_s": cold_s,
        "both_of_better": min(medians["compute_s"], medians["load_s"]) / medians["both_s"],
        "both_of_bound": medians["bound_s"] / medians["both_s"],
        "identical": all(tokens == shown[0] for tokens in shown)
        and all(answer.token_ids == shown[0][:1] for answers in rounds for answer in answers.values()),
        "repeats": {
            **{f"{name}_s": taken for name, taken in times.items()},
            **{name: [report.get(name) for report in both] for name in ("met_at", "computed_tokens", "loaded_tokens")},
            "layered": [any(load["group"] is not None for load in report.get("loads", [])) for report in both],
        },
    }


def _bound(answers: dict[str, Answer], prefix: int) -> float:
    loaded = answers["load"]
    suffix_s = sum(span.ended_s - span.began_s for span in spans_of(loaded))
    assert loaded.report is not None
    loads = [LoadRecord(**load) for load in loaded.report["loads"]]
    return clairvoyant_bound(spans_of(answers["compute_with_plug_in"]), loads, prefix, suffix_s).seconds


def _show(point: dict[str, Any]) -> None:
    NEWS.print(
        f"{point['bandwidth_ratio']:g}x: compute {point['compute_s']:.2f} s, load {point['load_s']:.2f} s, both "
        f"{point['both_s']:.2f} s ({point['both_of_better']:.2f}x the better, {point['both_of_bound']:.0%} of the "
        f"bound), {'identical' if point['identical'] else 'NOT IDENTICAL'}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    typer.run(main)

"""A long request with a stored prefix, then a burst of short ones: the paper's Figure 6, measured.

    python benchmarks/vllm_burst.py --json benchmarks/vllm_burst.json

Plain vLLM computes everything, first come, first served: the default. The plug-in either only loads the long request,
or works on it from both ends with what the burst leaves of each step. Besides, plain vLLM gets the burst alone: that
is what the burst's TTFT should look like. The bandwidth is the balanced one. With `--before`, the plug-in of another
source tree (`git archive COMMIT src | tar x -C FOLDER`) is asked the same in turn, from the same store.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import typer

from cakekv.bench.machine import describe_run
from cakekv.bench.vllm.asking import PlannedRequest, Texts, ask, ask_at
from cakekv.bench.vllm.contest import Contest, warmed
from cakekv.bench.vllm.server import Server
from cakekv.cli.console import NEWS, write_json


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")] = Path("out/vllm_burst.json"),
    model: Annotated[Path | None, typer.Option(help="The model's folder; by default the demo's.")] = None,
    prefix: Annotated[int, typer.Option(min=1, help="Stored tokens: a multiple of --chunk-tokens.")] = 7168,
    suffix: Annotated[int, typer.Option(min=1, help="Tokens after it.")] = 256,
    burst: Annotated[int, typer.Option(min=1, help="Requests in the burst.")] = 22,
    shortest: Annotated[int, typer.Option(min=1, help="Tokens of the shortest.")] = 32,
    longest: Annotated[int, typer.Option(min=1, help="Tokens of the longest.")] = 448,
    after_s: Annotated[float, typer.Option(min=0, help="Seconds from the long request to the burst.")] = 0.2,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that each request generates.")] = 1,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens per chunk.")] = 256,
    step_tokens: Annotated[int, typer.Option(min=1, help="vLLM's --max-num-batched-tokens.")] = 512,
    before: Annotated[Path | None, typer.Option(help="The folder `src` of a source tree to compare with.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians count.")] = 5,
    serve: Annotated[str, typer.Option(help="More of vLLM's command line.")] = "--enforce-eager --dtype bfloat16",
) -> None:
    """Measure a burst behind a long request."""
    contest = Contest(json_file, model, serve, step_tokens)
    with ExitStack() as stack:
        plain = stack.enter_context(contest.server())
        texts = Texts(plain)
        long = texts.next(prefix + suffix)
        restoring = contest.restoring_server(texts, [long], prefix, chunk_tokens)
        server, balanced = stack.enter_context(restoring)
        ask(plain, long)
        earlier = []
        if before is not None:
            other = contest.server(server.plug_in, environment={"PYTHONPATH": str(before.resolve())})
            earlier = [("cake_before", warmed(stack.enter_context(other), long), {"mode": "auto"})]
        rng = random.Random(6)
        lengths = [rng.randint(shortest, longest) for _ in range(burst)]
        about = {
            **describe_run(),
            "model": contest.model.name,
            "prefix_tokens": prefix,
            "burst_tokens": lengths,
            "balanced_bytes_per_s": balanced,
        }
        runs: dict[str, list[dict[str, float]]] = {}
        for round_ in range(-1, repeats):  # one round to warm up
            short = [texts.next(length) for length in lengths]
            for name, asked, own in (
                ("burst_alone", plain, None),
                ("default", plain, {}),
                ("load", server, {"mode": "load"}),
                ("cake", server, {"mode": "auto"}),
                *earlier,
            ):
                run = _run(asked, long, short, after_s, tokens, own)
                NEWS.print(f"{round_}: {name}: {run}", highlight=False, soft_wrap=True)
                if round_ >= 0:
                    runs.setdefault(name, []).append(run)
            if round_ >= 0:
                write_json(json_file, {**about, **_results(runs)})


def _results(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds."""
    results = {name: {key: median(run[key] for run in rounds) for key in rounds[0]} for name, rounds in runs.items()}
    cake, default, alone = results["cake"], results["default"], results["burst_alone"]
    return {
        "results": results,
        "completion_saved": 1 - cake["all_done_s"] / default["all_done_s"],
        "burst_ttft_over_alone": cake["burst_mean_ttft_s"] / alone["burst_mean_ttft_s"],
        "repeats": runs,
    }


def _run(
    server: Server,
    long: Sequence[int],
    short: Sequence[Sequence[int]],
    after_s: float,
    tokens: int,
    own: dict[str, str] | None,
) -> dict[str, float]:
    """One round; `own` is None for the burst alone."""
    plan: list[PlannedRequest] = [] if own is None else [(0.0, long, tokens)]
    plan += [(after_s, prompt, tokens) for prompt in short]
    answers = ask_at(server, plan, **(own or {}))
    began_s = min(answer.asked_s for answer in answers)
    burst = answers if own is None else answers[1:]
    return {
        "all_done_s": max(answer.came_s[-1] for answer in answers) - began_s,
        "burst_done_s": max(answer.came_s[-1] for answer in burst) - began_s,
        "burst_mean_ttft_s": mean(answer.ttft_s for answer in burst),
        **({} if own is None else {"long_ttft_s": answers[0].ttft_s}),
    }


if __name__ == "__main__":
    typer.run(main)

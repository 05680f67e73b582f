"""What the plug-in costs when there is nothing to restore: time per step with it and without it.

    python benchmarks/vllm_overhead.py --json benchmarks/vllm_overhead.json

Two servers, one with the plug-in (nothing is stored, nothing is saved), are asked the same in turn: prompts of several
lengths, for the time of prefill per step, and generation by several requests at once, for the time per decoding step.
The ratio is the median over rounds of what the two servers took, one right after the other.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from cakekv.bench.machine import describe_run
from cakekv.bench.vllm.asking import Texts, ask, ask_at
from cakekv.bench.vllm.contest import Contest
from cakekv.bench.vllm.options import JsonFile, ModelFolder, Repeats, Serve, StepTokens
from cakekv.cli.console import NEWS, number_list, write_json


def main(
    json_file: JsonFile = Path("out/vllm_overhead.json"),
    model: ModelFolder = None,
    prompts: Annotated[str, typer.Option(help="Lengths of prompts, in tokens.")] = "512,1024,2048",
    batches: Annotated[str, typer.Option(help="Requests that generate at once.")] = "1,4,16",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that each generates.")] = 64,
    step_tokens: StepTokens = 512,
    save: Annotated[bool, typer.Option("--save", help="Save what is computed, which is more than nothing.")] = False,
    repeats: Repeats = 9,
    serve: Serve = "--enforce-eager --dtype bfloat16",
) -> None:
    """Measure steps with the plug-in and without."""
    lengths: list[int] = number_list(prompts, int, "lengths")
    sizes: list[int] = number_list(batches, int, "batch sizes")
    contest = Contest(json_file, model, serve, step_tokens)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        options = {"store": f"{folder}/store", "save": save}
        plain = stack.enter_context(contest.server())
        with_it = stack.enter_context(contest.server(options))
        servers = {"plain": plain, "with_plug_in": with_it}
        texts = Texts(plain)
        times: dict[str, dict[str, list[float]]] = {}
        for round_ in range(-1, repeats):  # one round to warm up
            order = list(servers.items())[:: 1 if round_ % 2 else -1]  # who comes second may have it warmer
            for length in lengths:
                prompt = texts.next(length)
                steps = -(-length // step_tokens)
                for name, server in order:
                    taken = ask(server, prompt).ttft_s / steps
                    if round_ >= 0:
                        times.setdefault(f"prefill of {length}", {}).setdefault(name, []).append(taken)
            for size in sizes:
                batch = [(0.0, texts.next(32), tokens) for _ in range(size)]
                for name, server in order:
                    taken = median(gap for answer in ask_at(server, batch) for gap in answer.gaps_s)
                    if round_ >= 0:
                        times.setdefault(f"decoding of {size}", {}).setdefault(name, []).append(taken)
    rows = [
        {
            "step": step,
            **{f"{name}_s": median(taken) for name, taken in by_server.items()},
            "ratio": median(a / b for a, b in zip(by_server["with_plug_in"], by_server["plain"], strict=True)),
            "repeats": by_server,
        }
        for step, by_server in times.items()
    ]
    for row in rows:
        NEWS.print(f"{row['step']}: {row['ratio']:.3f} of the time without", highlight=False, soft_wrap=True)
    data = {**describe_run(), "steps": rows}
    write_json(json_file, data)


if __name__ == "__main__":
    typer.run(main)

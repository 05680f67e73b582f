"""Seconds per token of an answer with ClusterKV, and of clustering, beside the full cache. Wants a quiet machine.

    python benchmarks/clusterkv_steps.py --json benchmarks/decode.json

Every round computes the same tokens over each cache, in turn; medians of the rounds are compared.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import typer

from cakekv.bench.systems import Claim, write_systems
from cakekv.cli.console import number_list
from cakekv.cli.model import load_cake
from cakekv.decode import sight_named
from cakekv.demo.document import read_document

CLUSTERING_S = 5.0
_SPAN = 512


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results in here, beside those of others.")],
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto.")] = "float32",
    tokens: Annotated[int, typer.Option(help="Of the prompt.")] = 7000,
    budgets: Annotated[str, typer.Option(help="Tokens that a query sees.")] = "256,512,1024",
    steps: Annotated[int, typer.Option(min=1, help="Tokens of an answer, in every round.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="That count.")] = 5,
) -> None:
    """Time steps."""
    cake = load_cake(model, None, dtype=dtype)
    engine = cake.engine
    prompt = [int(token) for token in cake.tokenizer(read_document("demo", cake.tokenizer))["input_ids"]][:tokens]
    cache = engine.new_cache(len(prompt))
    for start in range(0, len(prompt), _SPAN):
        engine.compute(cache, prompt[start : start + _SPAN], start)
    recipes = ["whole"] + [
        f"clusterkv:budget={budget}{more}"
        for budget in number_list(budgets, int, "budgets")
        for more in ("", ",average=yes")
    ]
    caches: dict[str, Any] = {}
    looking: dict[str, float] = {}
    for recipe in recipes:
        began = perf_counter()
        caches[recipe] = engine.look(cache, prompt, sight_named(recipe))
        looking[recipe] = perf_counter() - began
    clustering_s = median(looking[recipe] for recipe in recipes[1:]) - looking["whole"]
    seconds: dict[str, list[float]] = {recipe: [] for recipe in recipes}
    for number in range(rounds + 1):
        for recipe in recipes if number % 2 else reversed(recipes):
            began = perf_counter()
            for step in range(steps):
                engine.compute(caches[recipe], [prompt[step]], len(prompt) + number * steps + step)
            seconds[recipe].append((perf_counter() - began) / steps)
    step_s = {recipe: median(each[1:]) for recipe, each in seconds.items()}
    claims = [
        Claim(
            f"clusterkv steps: {recipe.partition(':')[2]} of {len(prompt)} tokens",
            "a token of an answer takes less time than over the full cache",
            {"step_s": step_s[recipe], "full_step_s": step_s["whole"], "share": step_s[recipe] / step_s["whole"]},
            step_s[recipe] < step_s["whole"],
        )
        for recipe in recipes[1:]
    ]
    claims.append(
        Claim(
            f"clusterkv steps: clustering {len(prompt)} tokens",
            f"clusters of a prompt are found in less than {CLUSTERING_S:g} s",
            clustering_s,
            clustering_s < CLUSTERING_S,
        )
    )
    write_systems(json_file, "clusterkv steps", claims, {"model": model, "dtype": dtype, "rounds": rounds})
    for claim in claims:
        print(claim.name, claim.measured)


if __name__ == "__main__":
    typer.run(main)

"""What a step of an answer costs over a long prompt: bytes of its cache and seconds, for each method and sight.

    python benchmarks/decode_steps.py --json benchmarks/decode_steps.json
    python benchmarks/decode_steps.py --json out/decode_steps.json --tiny     # to try the program

The prompt is computed once. Then, in turns: the full cache, every method and every sight at its default answers by the
same tokens, one by one. `token_s` is the median step; `choose_s` is what it took once, before the first. `tap_s` is how
long it takes to show a method the last --window rows of the prompt, and `tap_share` that beside the whole prefill.
Nothing else should run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import typer

from cakekv.bench.machine import describe_run
from cakekv.bench.quality.compress import COMPRESS, DECODE, EXACT, follow_singly, way_named
from cakekv.bench.quality.documents import make_documents
from cakekv.cli.console import write_json
from cakekv.cli.model import load_cake
from cakekv.compress import METHODS
from cakekv.compress.base import Method
from cakekv.compress.heavy_hitter import HeavyHitter
from cakekv.decode import SIGHTS
from cakekv.decode.base import Sight
from cakekv.engine.ragged import RaggedCache, ragged_view
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import CakeError

SPAN = 512
REPEATS = 5


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")],
    tokens: Annotated[int, typer.Option(min=256, help="Of the prompt.")] = 7168,
    steps: Annotated[int, typer.Option(min=1, help="Of the answer.")] = 32,
    window: Annotated[int, typer.Option(min=1, help="Rows that the tap shows.")] = 64,
    way: Annotated[list[str] | None, typer.Option(help="Only this method or sight; repeatable.")] = None,
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto.")] = "auto",
    tiny: Annotated[bool, typer.Option("--tiny", help="A short prompt, a few steps.")] = False,
) -> None:
    """Measure steps over what methods keep and sights see."""
    if tiny:
        tokens, steps = 256, 4
    options = dict.fromkeys(METHODS, COMPRESS) | dict.fromkeys(SIGHTS, DECODE)
    ways = {one: way_named(options.get(one.partition(":")[0], COMPRESS), one) for one in way or options}
    loaded = load_cake(model, None, dtype=dtype)
    engine: TransformersEngine = loaded.engine  # type: ignore[assignment]  # load_cake makes transformers engines
    document = make_documents(loaded.tokenizer, 1, tokens, steps)[0]
    engine.compressible(list(ways.values()))
    engine.compute(engine.new_cache(SPAN), document.context[:SPAN], 0)  # the first forward of a process is slow
    settings = {"model": model, "dtype": dtype, "tokens": tokens, "steps": steps, "window": window}
    write_json(
        json_file,
        {**describe_run(), **settings, **measure(engine, document.context, document.continuation, ways, window)},
    )


def measure(
    engine: TransformersEngine,
    prompt: Sequence[int],
    answer: Sequence[int],
    ways: Mapping[str, Method | Sight],
    window: int,
) -> dict[str, Any]:
    """Figures of the prefill and the tap, and `ways`: of the full cache and each way."""
    began, exact = perf_counter(), engine.new_cache(len(prompt) + len(answer))
    for start in range(0, len(prompt), SPAN):
        engine.compute(exact, prompt[start : start + SPAN], start)
    prefill_s = perf_counter() - began
    tap_s = median(_compress(engine, exact, prompt, HeavyHitter(share=1, rows=window))[1] for _ in range(REPEATS))
    found = []
    for name, one in {EXACT: None, **ways}.items():
        exact.set_length(len(prompt))
        left, choose_s = (exact, 0.0) if one is None else _compress(engine, exact, prompt, one)
        cache = left if isinstance(left, RaggedCache) else ragged_view(exact, len(prompt))
        size, kept = cache.held_bytes, cache.kept_share
        _, token_s = follow_singly(engine, left, answer, len(prompt), [1] * len(answer))
        found.append({"name": name, "kept": kept, "cache_bytes": size, "choose_s": choose_s, "token_s": token_s})
    return {"prefill_s": prefill_s, "tap_s": tap_s, "tap_share": tap_s / prefill_s, "ways": found}


def _compress(engine: TransformersEngine, exact: Any, prompt: Sequence[int], way: Method | Sight) -> tuple[Any, float]:
    began = perf_counter()
    left = engine.look(exact, prompt, way) if isinstance(way, Sight) else engine.compress(exact, prompt, way)
    return left, perf_counter() - began


if __name__ == "__main__":
    try:
        typer.run(main)
    except CakeError as error:
        sys.exit(f"error: {error}")

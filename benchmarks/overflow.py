"""What moving the rest of a truncated conversation does to perplexity, against computing it anew.

    python benchmarks/overflow.py --json benchmarks/overflow.json

A text of which the part behind its head is dropped, up to the middle; what follows it in its source is predicted.
*computed* is the truncated text's own prefill, *moved* is what was stored of the whole text with its keys turned,
*coupled* the same without turning them, and *whole* nothing dropped, for what dropping costs. `ppl_change` is against
*computed*, paired by document. Everything that is stored is loaded; `ttft_s` is of one run per document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import torch
import typer

from cakekv.bench.machine import describe_run
from cakekv.bench.quality.documents import Document, make_documents
from cakekv.bench.quality.intervals import interval
from cakekv.bench.quality.judge import follow
from cakekv.cake import Cake
from cakekv.cli.console import write_json
from cakekv.demo.model import demo_model
from cakekv.engine.transformers import TransformersEngine, load_tokenizer
from cakekv.prompt import Truncated
from cakekv.results import Prefill
from cakekv.store.memory import MemoryStore

METHODS = ("computed", "moved", "coupled", "whole")


class Measured(NamedTuple):
    """What one method does to one document."""

    kind: str
    nll: float
    """Mean negative log-likelihood of the continuation's tokens, in nats."""
    moved: int
    """Positions that were moved."""
    ttft_s: float


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")],
    documents: Annotated[int, typer.Option(min=2, help="How many.")] = 12,
    tokens: Annotated[int, typer.Option(min=256, help="Of each, before anything is dropped.")] = 2048,
    head: Annotated[int, typer.Option(min=0, help="Tokens at the beginning that are kept.")] = 64,
    ratio: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the others that is dropped.")] = 0.5,
    continuation: Annotated[int, typer.Option(min=1, help="Tokens that are predicted.")] = 256,
    tiny: Annotated[bool, typer.Option("--tiny", help="Two short documents, to see that it works.")] = False,
) -> None:
    """Measure what truncating does to the demo's model, in float32."""
    if tiny:
        documents, tokens, continuation = 2, 320, 32
    engine = TransformersEngine.from_pretrained(demo_model(), dtype="float32")
    dropped = range(head, head + int(ratio * (tokens - head)))
    measured: dict[str, list[Measured]] = {method: [] for method in METHODS}
    for document in make_documents(load_tokenizer(demo_model()), documents, tokens, continuation):
        for method, one in judge(engine, document, dropped).items():
            measured[method].append(one)
        print(document.kind, *(f"{method} {math.exp(ones[-1].nll):.3f}" for method, ones in measured.items()))
    settings = {
        "documents": documents,
        "tokens": tokens,
        "dropped": [dropped.start, dropped.stop],
        "continuation": continuation,
    }
    methods = [summary(method, ones, measured["computed"]) for method, ones in measured.items()]
    for figures in methods:
        print(*(f"{name} {value}" for name, value in figures.items() if name != "documents"))
    write_json(json_file, {**describe_run(), "settings": settings, "methods": methods})


def judge(engine: TransformersEngine, document: Document, dropped: range) -> dict[str, Measured]:
    """What every method makes of a document without `dropped`."""
    store, context, tail = MemoryStore(), document.context, document.continuation[:1]
    left = Document(document.kind, context[: dropped.start] + context[dropped.stop :], document.continuation, [])
    whole = Document(document.kind, context, document.continuation, [])
    room = len(document.continuation) + 1

    def measure(cake: Cake, prompt: Any, read: Document) -> Measured:
        began = perf_counter()
        prefill = cake.prefill(prompt, mode="load", save=False, room=room)
        took = perf_counter() - began
        return Measured(document.kind, nll(engine, prefill, read), prefill.report.moved_tokens, took)

    with Cake(engine, None, store) as cake:
        cake.prefill(context)
        cake.wait_saved()
        cake.plan(Truncated(context, dropped))  # so that it is known how keys are turned before time is taken
        grown = context + tail
        found = {
            "moved": measure(cake, Truncated(grown, dropped), left),
            "coupled": measure(cake, Truncated(grown, dropped, turn=False), left),
            "whole": measure(cake, grown, whole),
        }
    with Cake(engine) as cake:
        found["computed"] = measure(cake, left.context + tail, left)
    return {method: found[method] for method in METHODS}


def nll(engine: TransformersEngine, prefill: Prefill, read: Document) -> float:
    """Mean negative log-likelihood of what follows a document, in nats per token."""
    said = torch.log_softmax(follow(engine, prefill.cache, read), -1)
    return -float(said.gather(1, torch.tensor(read.continuation)[:, None]).mean())


def summary(method: str, ones: Sequence[Measured], computed: Sequence[Measured]) -> dict[str, Any]:
    """A method's figures, with 95 % intervals over documents, and each document's."""
    figures = {
        "ppl": interval([(one.nll, 1.0) for one in ones]),
        "ppl_change": interval([(one.nll - other.nll, 1.0) for one, other in zip(ones, computed, strict=True)]),
    }
    values = {
        name: [(math.expm1 if name == "ppl_change" else math.exp)(value) for value in three]
        for name, three in figures.items()
    }
    return {
        "name": method,
        **{name: mean for name, (mean, _, _) in values.items()},
        "intervals": {name: [low, high] for name, (_, low, high) in values.items()},
        "ttft_s": sum(one.ttft_s for one in ones) / len(ones),
        "moved_tokens": max(one.moved for one in ones),
        "documents": [one._asdict() for one in ones],
    }


if __name__ == "__main__":
    typer.run(main)

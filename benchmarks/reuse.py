"""What reusing documents does to answers: prompts of several documents, against the same prompts computed in full.

    python benchmarks/reuse.py --json benchmarks/reuse.json

Every document was computed by itself. A prompt is several of them, then what follows the last one in its text, then a
question about a fact in each. *Agreement* is the share of positions of what follows with the same likeliest token,
*retrieval* the share of facts that the exact cache finds, *of_all* the share of all facts that are found, whether the
exact cache finds them or not, *digits* the share of all facts' digits that are right, each behind the right ones, and
*recomputed* the share of the prompt that is linked. `exact` has the exact cache's own figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from cakekv.bench.machine import describe_run
from cakekv.bench.quality.documents import Document as Judged
from cakekv.bench.quality.documents import Needle, make_documents
from cakekv.bench.quality.intervals import interval
from cakekv.bench.quality.judge import Reference, answers, follow
from cakekv.cake import Cake
from cakekv.cli.console import write_json
from cakekv.demo.model import demo_model
from cakekv.engine.transformers import TransformersEngine, load_tokenizer
from cakekv.prompt import Document
from cakekv.store.memory import MemoryStore

EXACT = "exact"
WAYS = ("naive:turn=no", "naive", "epic:link=1", "epic:link=16", "epic:link=32")


class Asked(NamedTuple):
    """A prompt, part by part, and what is asked behind it."""

    parts: list[list[int]]
    whole: Judged


class Measured(NamedTuple):
    """What one way does to one prompt."""

    kl: float
    agreement: float
    asked: int
    found: int
    facts: int
    all_found: int
    digits: int
    right_digits: int
    recomputed: float


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")],
    prompts: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    documents: Annotated[int, typer.Option(min=2, help="Documents in each.")] = 4,
    tokens: Annotated[int, typer.Option(min=256, help="Of each document.")] = 384,
    continuation: Annotated[int, typer.Option(min=1, help="Tokens that follow the last document.")] = 64,
) -> None:
    """Measure what reuse does to the answers of the demo's model, in float32."""
    engine = TransformersEngine.from_pretrained(demo_model(), dtype="float32")
    made = make_documents(load_tokenizer(demo_model()), prompts * documents, tokens, continuation)
    measured: dict[str, list[Measured]] = {way: [] for way in (EXACT, *WAYS)}
    for number in range(prompts):
        asked = prompt_of(made[number * documents : (number + 1) * documents])
        for way, one in judge(engine, asked, WAYS).items():
            measured[way].append(one)
        print(f"{number + 1} of {prompts}:", *(f"{way} {ones[-1].kl:.3f}" for way, ones in measured.items()))
    settings = {"documents": documents, "tokens": tokens, "continuation": continuation, "prompts": prompts}
    methods = [summary(way, ones) for way, ones in measured.items()]
    for method in methods:
        print(*(f"{name} {value}" for name, value in method.items() if name != "prompts"))
    write_json(json_file, {**describe_run(), "settings": settings, "methods": methods})


def prompt_of(documents: Sequence[Judged]) -> Asked:
    """A prompt of these documents; facts about names that several of them have are not asked for."""
    names = Counter(needle.question for document in documents for needle in document.needles)
    needles: list[Needle] = []
    for document in documents:
        needles += [needle for needle in document.needles if names[needle.question] == 1][:1]
    context = [token for document in documents for token in document.context]
    last = documents[-1]
    return Asked([document.context for document in documents], Judged(last.kind, context, last.continuation, needles))


def judge(engine: TransformersEngine, asked: Asked, ways: Sequence[str]) -> dict[str, Measured]:
    """Compare every way with the exact cache."""
    parts, whole, store = [Document(part) for part in asked.parts], asked.whole, MemoryStore()
    room = len(whole.tail) + 1
    with Cake(engine) as cake:
        exact = cake.prefill(whole.context, room=room)
    reference = Reference(follow(engine, exact.cache, whole), len(whole.continuation))
    known = answers(whole, reference.likeliest)
    facts = len(known)
    digits = sum(len(needle.answer) for needle in whole.needles)
    own = Measured(0.0, 1.0, sum(known), sum(known), facts, sum(known), digits, right(whole, reference.likeliest), 0.0)
    found = {EXACT: own}
    for way in ways:
        with Cake(engine, None, store, reuse=way, learn=False) as cake:
            for part in parts:
                cake.learn(part)
            cake.wait_saved()
            prefill = cake.prefill([*parts, whole.tail[:1]], mode="load", room=room)
        kl, agreement, likeliest = reference.compare(follow(engine, prefill.cache, whole))
        got = answers(whole, likeliest)
        both = sum(one and is_known for one, is_known in zip(got, known, strict=True))
        linked = prefill.report.linked_tokens / len(whole.context)
        counts = (sum(known), both, facts, sum(got), digits, right(whole, likeliest))
        found[way] = Measured(kl, agreement, *counts, linked)
    return found


def right(whole: Judged, said: torch.Tensor) -> int:
    """How many of the answers' tokens a model says that is led along them."""
    at, count = len(whole.continuation), 0
    for needle in whole.needles:
        at += len(needle.question)
        count += sum(one == other for one, other in zip(said[at:].tolist(), needle.answer, strict=False))
        at += len(needle.answer)
    return count


def summary(way: str, ones: Sequence[Measured]) -> dict[str, Any]:
    """A way's figures, with 95 % intervals over prompts, and each prompt's."""
    columns = {
        "kl": [(one.kl, 1.0) for one in ones],
        "agreement": [(one.agreement, 1.0) for one in ones],
        "retrieval": [(one.found / max(one.asked, 1), float(one.asked)) for one in ones],
        "of_all": [(one.all_found / max(one.facts, 1), float(one.facts)) for one in ones],
        "digits": [(one.right_digits / max(one.digits, 1), float(one.digits)) for one in ones],
        "recomputed_share": [(one.recomputed, 1.0) for one in ones],
    }
    figures = {name: interval(column) for name, column in columns.items()}
    return {
        "name": way,
        **{name: mean for name, (mean, _, _) in figures.items()},
        "intervals": {name: [low, high] for name, (_, low, high) in figures.items()},
        "facts": sum(one.facts for one in ones),
        "prompts": [one._asdict() for one in ones],
    }


if __name__ == "__main__":
    typer.run(main)

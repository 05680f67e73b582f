"""QuantSpec: how many drafts of four bits are accepted by eight, and what that reads.

    python benchmarks/quantspec.py --json benchmarks/decode.json

Each document goes on in three ways: as text, with a question about a fact in it (retrieval), and with a request to sum
it up. Each is answered greedily, with so many tokens whatever they are: with eight bits alone, drafted from the upper
four bits, and drafted from the first and newest tokens in eight bits, as many as take the same bytes. Nothing of that
depends on the machine's speed, except for the seconds per token, which are told of one longer prompt.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Annotated, Any

import typer

from cakekv.bench.quality.documents import Document, make_documents
from cakekv.bench.systems import Claim, write_systems
from cakekv.cake import Cake
from cakekv.cli.model import load_cake
from cakekv.prompt import ids_of
from cakekv.results import Generation
from cakekv.store.memory import MemoryStore

WAYS = {"eight bits": "gamma=0", "upper": "gamma={gamma}", "recent": "gamma={gamma},draft=recent"}
SUMMARY = "\n\nIn short, the text above says that"


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the claims here.")] = Path("out/decode.json"),
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 21,
    context: Annotated[int, typer.Option(min=256, help="Tokens of a document.")] = 1024,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 32,
    gamma: Annotated[int, typer.Option(min=1, help="Tokens to draft.")] = 5,
    long: Annotated[int, typer.Option(min=256, help="Tokens of the prompt whose steps are timed.")] = 7168,
) -> None:
    """Measure QuantSpec."""
    loaded = load_cake(model, None, dtype="float32")
    loaded.engine.stop_tokens = frozenset()
    made = make_documents(loaded.tokenizer, documents, context, 2)
    answers: dict[str, dict[str, list[Generation]]] = defaultdict(lambda: defaultdict(list))
    for number, document in enumerate(made):
        for task, prompt in _prompts(loaded.tokenizer, document).items():
            for way, given in _answer(loaded, prompt, tokens, gamma).items():
                answers[way][task].append(given)
            report = answers["upper"][task][-1].report
            print(f"{number} {document.kind}, {task}: {report.acceptance:.3f} of {report.drafted_tokens}", flush=True)
    seconds = _seconds(loaded, make_documents(loaded.tokenizer, 1, long, 2)[0].context, gamma)
    claims = _claims(answers, seconds, context, loaded)
    settings = {"model": model, "dtype": "float32", "documents": documents, "context": context, "tokens": tokens}
    write_systems(json_file, "quantspec", claims, {**settings, "gamma": gamma, "long": long})
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.measured}")


def _prompts(tokenizer: Any, document: Document) -> dict[str, list[int]]:
    question = document.needles[1].question
    return {
        "continuation": document.context,
        "retrieval": [*document.context, *question],
        "summary": document.context + ids_of(tokenizer, SUMMARY),
    }


def _answer(loaded: Cake, prompt: list[int], tokens: int, gamma: int) -> dict[str, Generation]:
    """The prompt's answer in every way; it is computed once and loaded then."""
    given = {}
    with MemoryStore() as store:
        for way, recipe in WAYS.items():
            with Cake(loaded.engine, loaded.tokenizer, store, decode=f"quantspec:{recipe.format(gamma=gamma)}") as cake:
                given[way] = cake.generate(prompt, max_new_tokens=tokens)
                cake.wait_saved()
    return given


def _seconds(loaded: Cake, prompt: list[int], gamma: int, tokens: int = 17) -> dict[str, float]:
    """Seconds per token of a long prompt's answer."""
    seconds = {}
    with MemoryStore() as store:
        for way, decode in {"full cache": None, **{way: f"quantspec:{WAYS[way]}" for way in WAYS}}.items():
            decode = decode and decode.format(gamma=gamma)
            with Cake(loaded.engine, loaded.tokenizer, store, decode=decode, save_answers=False) as cake:
                times = [monotonic() for _ in cake.stream(prompt, max_new_tokens=tokens)]
                cake.wait_saved()
            seconds[way] = (times[-1] - times[0]) / (tokens - 1)
    return seconds


def _claims(
    answers: dict[str, dict[str, list[Generation]]], seconds: dict[str, float], context: int, loaded: Cake
) -> list[Claim]:
    tasks = list(answers["upper"])
    rates = {way: {task: _acceptance(answers[way][task]) for task in tasks} for way in ("upper", "recent")}
    overall = {way: _acceptance([one for task in tasks for one in answers[way][task]]) for way in rates}
    pairs = [
        (one.token_ids, other.token_ids)
        for task in tasks
        for one, other in zip(answers["eight bits"][task], answers["upper"][task], strict=True)
    ]
    same = sum(one == other for one, other in pairs)
    read = {way: mean(_read(one) for task in tasks for one in answers[way][task]) for way in WAYS}
    full = loaded.engine.held_bytes(loaded.engine.new_cache(context)) or 0
    reports = [one.report for task in tasks for one in answers["upper"][task]]
    worst = min(report.acceptance or 0.0 for report in reports)
    return [
        Claim(
            "quantspec: acceptance",
            "A draft behind accepted ones is accepted, too, with a probability of at least 0.90",
            {
                "acceptance": overall["upper"],
                "worst_answer": worst,
                "of_all_drafted": sum(report.accepted_tokens for report in reports)
                / sum(report.drafted_tokens for report in reports),
            },
            overall["upper"] >= 0.9,
        ),
        Claim(
            "quantspec: no collapse",
            "It is at least 0.90 as well where a fact is asked for, and where a text is summed up",
            rates["upper"],
            min(rates["upper"]["retrieval"], rates["upper"]["summary"]) >= 0.9,
        ),
        Claim(
            "quantspec: tokens",
            "Every answer is, token for token, that of greedy decoding over eight bits",
            {"answers": len(pairs), "identical": same},
            same == len(pairs),
        ),
        Claim(
            "quantspec: bytes",
            "A token of an answer reads fewer bytes of keys and values than the full cache in two bytes an element has",
            {
                "full_float32": full,
                "full_two_bytes": full / 2,
                "eight_bits": read["eight bits"],
                "drafted": read["upper"],
                "drafted_of_two_bytes": read["upper"] / (full / 2),
            },
            read["upper"] < full / 2,
        ),
        Claim(
            "quantspec: sparse drafts",
            "They are accepted more often than drafts from the first and newest tokens, at equal bytes, in every kind of text",
            {**rates, "overall": overall, "bytes": {way: read[way] for way in rates}},
            all(rates["upper"][task] > rates["recent"][task] for task in tasks),
        ),
        Claim(
            "quantspec: seconds",
            "No gain in time is claimed: in PyTorch on a CPU, a token takes longer than over the full cache",
            seconds,
            seconds["upper"] > seconds["full cache"],
        ),
    ]


def _acceptance(answers: list[Generation]) -> float:
    reports = [answer.report for answer in answers]
    accepted = sum(report.accepted_tokens for report in reports)
    return accepted / (accepted + sum(report.rejected_tokens for report in reports))


def _read(answer: Generation) -> float:
    return answer.report.step_read_bytes or 0.0


if __name__ == "__main__":
    typer.run(main)

"""QuantSpec: how many drafts of four bits are accepted by eight, and what that reads.

    python benchmarks/quantspec.py --json benchmarks/decode.json

Each document is asked for a fact that is in it (retrieval), and to be summed up. Answers are greedy, and have so many
tokens whatever they are. All are drafted from the upper four bits; of every third document, they are decoded with eight
bits alone, too, and drafted from the first and newest tokens in eight bits, as many as take the same bytes. Nothing of
that depends on the machine's speed, except for the seconds per token, which are told of one longer prompt.
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
Answers = dict[str, dict[str, list[Generation]]]
"""By way and task."""
SUMMARY = "\n\nIn short, the text above says that"


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the claims here.")] = Path("out/decode.json"),
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 21,
    context: Annotated[int, typer.Option(min=256, help="Tokens of a document.")] = 768,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 24,
    gamma: Annotated[int, typer.Option(min=1, help="Tokens to draft.")] = 5,
    long: Annotated[int, typer.Option(min=256, help="Tokens of the prompt whose steps are timed.")] = 7168,
) -> None:
    """Measure QuantSpec."""
    loaded = load_cake(model, None, dtype="float32")
    engine: Any = loaded.engine
    engine.stop_tokens = frozenset()
    settings = {"model": model, "dtype": "float32", "documents": documents, "context": context, "tokens": tokens}
    settings |= {"gamma": gamma, "long": long}
    answers: Answers = defaultdict(lambda: defaultdict(list))
    for number, document in enumerate(make_documents(loaded.tokenizer, documents, context, 2)):
        with MemoryStore() as store:
            for task, prompt in _prompts(loaded.tokenizer, document).items():
                for way in WAYS if number % 3 == 0 else ["upper"]:
                    decode = f"quantspec:{WAYS[way].format(gamma=gamma)}"
                    with Cake(engine, loaded.tokenizer, store, decode=decode) as cake:
                        answers[way][task].append(cake.generate(prompt, max_new_tokens=tokens))
                        cake.wait_saved()
                report = answers["upper"][task][-1].report
                print(f"{number} {document.kind}, {task}: {report.acceptance} of {report.drafted_tokens}", flush=True)
    full = engine.held_bytes(engine.new_cache(context))
    claims = _claims(answers, full)
    write_systems(json_file, "quantspec:", claims, settings)
    claims.append(_timed(_seconds(loaded, make_documents(loaded.tokenizer, 1, long, 2)[0].context, gamma)))
    write_systems(json_file, "quantspec:", claims, settings)
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.measured}")


def _prompts(tokenizer: Any, document: Document) -> dict[str, list[int]]:
    return {
        "retrieval": [*document.context, *document.needles[1].question],
        "summary": document.context + ids_of(tokenizer, SUMMARY),
    }


def _seconds(loaded: Cake, prompt: list[int], gamma: int, tokens: int = 13) -> dict[str, float]:
    """Seconds per token of a long prompt's answer."""
    seconds = {}
    with MemoryStore() as store:
        for way, decode in {"full cache": None, "quantspec": f"quantspec:gamma={gamma}"}.items():
            with Cake(loaded.engine, loaded.tokenizer, store, decode=decode, save_answers=False) as cake:
                times = [monotonic() for _ in cake.stream(prompt, max_new_tokens=tokens)]
                cake.wait_saved()
            seconds[way] = (times[-1] - times[0]) / (len(times) - 1)
    return seconds


def _claims(answers: Answers, full: int) -> list[Claim]:
    tasks = list(answers["upper"])
    rates = {way: {task: _acceptance(answers[way][task]) for task in tasks} for way in ("upper", "recent")}
    overall = _acceptance([one for task in tasks for one in answers["upper"][task]])
    same_texts = {task: _acceptance(answers["upper"][task][::3]) for task in tasks}
    pairs = [
        (one.token_ids, other.token_ids)
        for task in tasks
        for one, other in zip(answers["eight bits"][task], answers["upper"][task][::3], strict=True)
    ]
    same = sum(one == other for one, other in pairs)
    read = {way: mean(_read(one) for task in tasks for one in answers[way][task]) for way in WAYS}
    reports = [one.report for task in tasks for one in answers["upper"][task]]
    worst = min(report.acceptance or 0.0 for report in reports)
    return [
        Claim(
            "quantspec: acceptance",
            "A draft behind accepted ones is accepted, too, with a probability of at least 0.90",
            {
                "acceptance": overall,
                "worst_answer": worst,
                "of_all_drafted": sum(report.accepted_tokens for report in reports)
                / sum(report.drafted_tokens for report in reports),
            },
            overall >= 0.9,
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
            "They are accepted more often than drafts from the first and newest tokens, at equal bytes, in every kind "
            "of text",
            {"upper": same_texts, "recent": rates["recent"], "bytes": {way: read[way] for way in rates}},
            all(same_texts[task] > rates["recent"][task] for task in tasks),
        ),
    ]


def _timed(seconds: dict[str, float]) -> Claim:
    return Claim(
        "quantspec: seconds",
        "No gain in time is claimed: in PyTorch on a CPU, a token takes longer than over the full cache",
        seconds,
        seconds["quantspec"] > seconds["full cache"],
    )


def _acceptance(answers: list[Generation]) -> float:
    reports = [answer.report for answer in answers]
    accepted = sum(report.accepted_tokens for report in reports)
    return accepted / (accepted + sum(report.rejected_tokens for report in reports))


def _read(answer: Generation) -> float:
    return answer.report.step_read_bytes or 0.0


if __name__ == "__main__":
    typer.run(main)

"""What becomes of answers whose first token has read only what its queries select of a stored prefix.

    python benchmarks/recall.py --json benchmarks/decode.json

A document's context is stored, with clusters beside its chunks. Then its continuation, and a question for each of its
needles, are computed behind it: over all of the prefix, and over what ClusterKV selects, read from a store in memory.
The right answer is fed token by token. Compared are the likeliest tokens, the first one's included, and whether needles
are found. Nothing is timed; `recall_ttft.py` does that. A run that was interrupted goes on, from the file beside the
results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cakekv.bench.quality.documents import Document, make_documents
from cakekv.bench.quality.intervals import figures_of
from cakekv.bench.systems import Claim, write_systems
from cakekv.cake import Cake
from cakekv.cli.console import write_json
from cakekv.cli.model import load_cake
from cakekv.store.memory import MemoryStore

CLUSTERS = "tokens=32,span=1024,lazy=yes"
SIGHTS = ("budget=256", "budget=256,average=yes", "budget=512,average=yes")
AGREEMENT = 0.95
SUFFIX, FOLLOWED = 16, 16


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results in here, beside those of others.")],
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    tokens: Annotated[int, typer.Option(help="Of a context; a multiple of 1,024.")] = 4096,
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 21,
    sight: Annotated[
        list[str] | None, typer.Option(help="What of ClusterKV a query sees, such as budget=512; repeatable.")
    ] = None,
) -> None:
    """Compare answers over a selection with those over everything."""
    loaded = load_cake(model, None, dtype="float32")
    each = sight or SIGHTS
    raw = json_file.with_suffix(".recall.json")
    rows: list[dict[str, Any]] = json.loads(raw.read_text()) if raw.exists() else []
    for document in make_documents(loaded.tokenizer, documents, tokens, SUFFIX + FOLLOWED, paragraphs=True)[
        len(rows) :
    ]:
        rows.append(compare(loaded, document, each))
        write_json(raw, rows)
        print(len(rows), rows[-1], flush=True)
    settings = {"model": model, "dtype": "float32", "documents": len(rows), "context_tokens": tokens}
    settings |= {"clusters": CLUSTERS, "suffix_tokens": SUFFIX, "chunk_tokens": loaded.chunk_tokens}
    write_systems(json_file, "clusterkv lazy answers", claims(rows, each, tokens), settings)
    raw.unlink()


def compare(loaded: Cake, document: Document, sights: Sequence[str]) -> dict[str, Any]:
    """What answers behind one document's context have in common, by sight."""
    context, engine = document.context, loaded.engine
    continued = document.continuation[:SUFFIX], document.continuation[SUFFIX:]
    asked = [continued, *((list(needle.question), list(needle.answer)) for needle in document.needles)]
    counts: dict[str, Any] = {sight: {"same": 0, "first": 0, "found": 0, "bytes": 0} for sight in sights}
    row: dict[str, Any] = {"tokens": 0, "prompts": len(asked), "needles": 0, **counts}
    with MemoryStore() as store:
        lazy = [Cake(engine, None, store, decode=f"clusterkv:{sight},{CLUSTERS}") for sight in sights]
        lazy[0].prefill([*context, *asked[0][0]])
        lazy[0].wait_saved()
        for number, (suffix, answer) in enumerate(asked):
            prompt = [*context, *suffix]
            exact, report = followed(Cake(engine, None, store), prompt, answer)
            row["tokens"] += len(answer)
            row["whole_bytes"] = sum(report.bytes_by_tier.values())
            was_found = number > 0 and exact == list(answer)
            row["needles"] += was_found
            for sight, cake in zip(sights, lazy, strict=True):
                seen, report = followed(cake, prompt, answer)
                assert report.recalled_tokens == len(context), report.notes
                own = row[sight]
                own["same"] += sum(one == other for one, other in zip(exact, seen, strict=True))
                own["first"] += exact[0] == seen[0]
                own["found"] += was_found and seen == list(answer)
                own["bytes"] += report.first_read_bytes / len(asked)
        for cake in lazy:
            cake.close()
    return row


def followed(cake: Cake, prompt: list[int], answer: Sequence[int]) -> tuple[list[int], Any]:
    """The likeliest tokens along an answer, and how its prompt was restored."""
    prefill = cake.prefill(prompt, mode="load", save=False, room=len(answer))
    report, likeliest = prefill.report, [int(torch.as_tensor(prefill.logits).argmax())]
    for step, token in enumerate(answer[:-1]):
        likeliest.append(int(cake.engine.compute(prefill.cache, [token], len(prompt) + step).argmax()))
    if prefill.recall is not None:
        prefill.recall.settle()
    return likeliest, report


def claims(rows: Sequence[dict[str, Any]], sights: Sequence[str], tokens: int) -> list[Claim]:
    """What the documents show."""
    made = []
    for sight in sights:
        own = [row[sight] for row in rows]
        pairs = list(zip(rows, own, strict=True))
        counted = {
            "agreement": [(one["same"] / row["tokens"], row["tokens"]) for row, one in pairs],
            "first_token": [(one["first"] / row["prompts"], row["prompts"]) for row, one in pairs],
            "retrieval": [(one["found"] / row["needles"], row["needles"]) for row, one in pairs if row["needles"]],
            "bytes_share": [(one["bytes"] / row["whole_bytes"], row["whole_bytes"]) for row, one in pairs],
        }
        figures: dict[str, Any] = figures_of({name: each for name, each in counted.items() if each})
        figures["needles"] = sum(row["needles"] for row in rows)
        claim = f"at least {AGREEMENT} of the likeliest tokens are those of a prefix that was read whole"
        name = f"clusterkv lazy answers: {sight} of {tokens} tokens"
        made.append(Claim(name, claim, figures, figures["agreement"] >= AGREEMENT))
    return made


if __name__ == "__main__":
    typer.run(main)
